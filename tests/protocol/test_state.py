"""The states of a migration and what may follow what."""

import pytest

from pageferry.pipeline.state import FINAL, IN_POSTCOPY, TRANSITIONS, Status, advance, diagram
from pageferry.transport.errors import LocalProtocolError

# Written down once more, so that a change of the table is meant.
ALLOWED = {
    ("none", "setup"),
    ("setup", "active"),
    ("setup", "failed"),
    ("setup", "cancelling"),
    ("active", "device"),
    ("active", "pre-switchover"),
    ("pre-switchover", "device"),
    ("pre-switchover", "failed"),
    ("pre-switchover", "cancelling"),
    ("active", "failed"),
    ("active", "cancelling"),
    ("device", "completed"),
    ("device", "failed"),
    ("device", "cancelling"),
    ("device", "postcopy-active"),
    ("device", "postcopy-paused"),
    ("postcopy-active", "completed"),
    ("postcopy-active", "failed"),
    ("postcopy-active", "postcopy-paused"),
    ("postcopy-paused", "postcopy-recover"),
    ("postcopy-paused", "failed"),
    ("postcopy-recover", "postcopy-active"),
    ("postcopy-recover", "postcopy-paused"),
    ("postcopy-recover", "failed"),
    ("postcopy-recover", "completed"),
    ("cancelling", "cancelled"),
    ("cancelling", "failed"),
}


@pytest.mark.parametrize("current", Status)
def test_every_pair_of_states(current):
    """Allowed: the new state. Not allowed: our own bug, and said so with both names."""
    for following in Status:
        if (current.value, following.value) in ALLOWED:
            assert advance(current, following) is following
        else:
            with pytest.raises(LocalProtocolError, match=f"{current.value} .* {following.value}"):
                advance(current, following)


def test_the_final_states_are_those_with_nothing_behind_them():
    """And every state can be reached."""
    assert set(TRANSITIONS) == set(Status)
    assert {status for status, following in TRANSITIONS.items() if not following} == set(FINAL)
    reached = {following for row in TRANSITIONS.values() for following in row}
    assert reached | {Status.NONE} == set(Status)


def test_names_are_qemus():
    """A QMP client compares them with MigrationStatus."""
    assert [status.value for status in Status] == [
        "none", "setup", "active", "pre-switchover", "device", "postcopy-active",
        "postcopy-paused", "postcopy-recover", "cancelling", "completed", "failed", "cancelled",
    ]  # fmt: skip


def test_the_picture_shows_the_whole_table():
    """One arrow for each row, and the way out of the final states."""
    arrows = {tuple(line.strip().split(" --> ")) for line in diagram().splitlines()[1:]}
    ends = {(status.value, "[*]") for status in FINAL}
    # mermaid takes no dash in a name
    allowed = {(a.replace("-", "_"), b.replace("-", "_")) for a, b in ALLOWED}
    assert arrows == allowed | ends | {("[*]", "none")}


def test_a_guest_that_left_never_comes_back():
    """From a state in which it runs at the destination nothing leads to one in which it is here."""
    after = {following for status in IN_POSTCOPY for following in TRANSITIONS[status]}
    assert after == {*IN_POSTCOPY, Status.COMPLETED, Status.FAILED}
