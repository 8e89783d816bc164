"""What there is to be tested, and what is to come of it: looked at as a reader would."""

from pathlib import Path

import pytest
from cells import (
    ASKING,
    IN_EACH_TEST,
    JUMPING,
    LAZILY,
    LEFT_OUT,
    LOADING,
    MOMENTS,
    MORE,
    NEXT_MESSAGE,
    OTHERS,
    PAUSED,
    POSTCOPY,
    QUOTA,
    RECOVER,
    RESTORING,
    ROUND_1,
    SAVING,
    SAVING_LIVE,
    SETUP,
    STARTING,
    STOPS,
    STREAM,
    STREAM_POSTCOPY,
    Cell,
    Fault,
    Kind,
    Line,
    Outcome,
    RunSaid,
    Victim,
    bound,
    cells,
    exists,
    expected,
    in_each_test,
    loss,
)
from table import rules

from pageferry.pipeline.state import FINAL, Status
from pageferry.transport import messages

ALL = list(cells())
NETWORK = [moment for moment in MOMENTS if moment.kind is Kind.NETWORK]


def test_every_state_has_a_moment_or_a_reason():
    assert {moment.status for moment in MOMENTS} | set(LEFT_OUT) == set(Status)
    assert not {moment.status for moment in MOMENTS} & set(LEFT_OUT)
    assert set(FINAL) < set(LEFT_OUT)


def test_every_process_is_killed_and_stopped_in_every_moment_in_which_it_is_there():
    for moment in NETWORK:
        for victim in Victim:
            there = [f for f in (Fault.KILL, Fault.STOP) if exists(Cell(moment, f, victim))]
            assert len(there) in (0, 2)
    ever = {v for m in NETWORK for v in Victim if exists(Cell(m, Fault.KILL, v))}
    left_out = {(m.name, v.value) for m in NETWORK for v in ever
                if not exists(Cell(m, Fault.KILL, v))}  # fmt: skip
    assert len(ever) == 10
    assert left_out == {
        ("setup", "receiver"),
        ("postcopy-recover", "receiver"),
        ("postcopy-paused", "sender"),
        ("postcopy-paused", "receiver"),
        ("postcopy-paused", "urgent sender"),
    }


def test_each_kind_of_run_has_its_own_and_what_is_left_out_has_a_reason():
    for kind in OTHERS:
        of_kind = [cell for cell in ALL if cell.moment.kind is kind]
        assert {cell.hit for cell in of_kind if cell.fault is Fault.KILL} >= set(OTHERS[kind])
        assert {(cell.fault, cell.hit) for cell in of_kind} >= set(MORE[kind])
    nobody_writes = {(m, Victim.GUARD) for m in (SAVING,)}
    nobody_waits = {(RESTORING, Victim.URGENT), (RESTORING, Victim.FAULT)}
    for moment in MOMENTS:
        for victim in OTHERS.get(moment.kind, ()):
            left_out = (moment, victim) in nobody_writes | nobody_waits
            assert exists(Cell(moment, Fault.KILL, victim)) != left_out
            assert exists(Cell(moment, Fault.STOP, victim)) != left_out
    assert {m for m in MOMENTS if not any(cell.moment is m for cell in ALL)} == set()


def test_the_link_is_cut_in_every_moment_and_every_cell_has_an_outcome():
    assert {cell.moment for cell in ALL if cell.hit is Line.WIRE} == {*NETWORK, STOPS, QUOTA}
    assert {cell.moment for cell in ALL if cell.hit is Line.STREAM} == {STREAM, STREAM_POSTCOPY}
    assert len({str(cell) for cell in ALL}) == len(ALL) > 400
    for cell in ALL:
        assert isinstance(expected(cell), Outcome) and loss(cell)


def test_a_message_is_lost_in_every_moment():
    assert set(NEXT_MESSAGE) == set(NETWORK)
    for name in NEXT_MESSAGE.values():
        assert issubclass(getattr(messages, name), messages.Message)


@pytest.mark.parametrize(
    ("moment", "fault", "hit", "outcome"),
    [
        (SETUP, Fault.KILL, Victim.DESTINATION, Outcome.SOURCE_RUNS),
        (ROUND_1, Fault.KILL, Victim.SENDER, Outcome.SOURCE_RUNS),
        (ROUND_1, Fault.KILL, Victim.SOURCE_GUEST, Outcome.GUEST_DIES),
        (ROUND_1, Fault.STOP, Victim.SOURCE_GUEST, Outcome.COMPLETES),
        (ROUND_1, Fault.LOSE, Line.DATA, Outcome.COMPLETES),
        (ROUND_1, Fault.LOSE, Line.ACKS, Outcome.SOURCE_RUNS),
        (ASKING, Fault.CUT, Line.WIRE, Outcome.SOURCE_RUNS),
        (LOADING, Fault.KILL, Victim.DESTINATION_GUEST, Outcome.SOURCE_RUNS),
        (LOADING, Fault.REPEAT, Line.CONTROL, Outcome.ARRIVES),
        (STARTING, Fault.KILL, Victim.SENDER, Outcome.COMPLETES),
        (STARTING, Fault.KILL, Victim.DESTINATION, Outcome.UNCONFIRMED),
        (STARTING, Fault.CUT, Line.WIRE, Outcome.ARRIVES),
        (JUMPING, Fault.KILL, Victim.DESTINATION_GUEST, Outcome.SOURCE_RUNS),
        (POSTCOPY, Fault.KILL, Victim.FAULT, Outcome.RECOVERS),
        (POSTCOPY, Fault.KILL, Victim.SOURCE_GUEST, Outcome.COMPLETES),
        (POSTCOPY, Fault.KILL, Victim.SOURCE, Outcome.LOST),
        (POSTCOPY, Fault.KILL, Victim.DESTINATION_GUEST, Outcome.LOST),
        (PAUSED, Fault.STOP, Victim.DESTINATION, Outcome.RECOVERS),
        (PAUSED, Fault.CUT, Line.WIRE, Outcome.RECOVERS),
        (RECOVER, Fault.LOSE, Line.CONTROL, Outcome.RECOVERS),
        # a process outlives who moves it
        (STOPS, Fault.KILL, Victim.SOURCE, Outcome.SOURCE_RUNS),
        (QUOTA, Fault.KILL, Victim.SOURCE_AND_SLOWER, Outcome.SOURCE_RUNS),
        (QUOTA, Fault.STOP, Victim.SLOWER, Outcome.SOURCE_RUNS),
        (STREAM, Fault.KILL, Victim.COMMAND, Outcome.SOURCE_RUNS),
        (STREAM_POSTCOPY, Fault.CUT, Line.STREAM, Outcome.RECOVERS),
        (STREAM_POSTCOPY, Fault.KILL, Victim.SOURCE, Outcome.LOST),
        (SAVING, Fault.KILL, Victim.COORDINATOR, Outcome.NOT_SAVED),
        (SAVING, Fault.KILL, Victim.GUEST, Outcome.SAVED_ALONE),
        (SAVING, Fault.STOP, Victim.GUEST, Outcome.NOT_SAVED),
        (SAVING_LIVE, Fault.KILL, Victim.GUEST, Outcome.NO_GUEST),
        (SAVING_LIVE, Fault.EXHAUST, Line.DISK, Outcome.NOT_SAVED),
        (RESTORING, Fault.CUT, Line.FILE, Outcome.NOT_RESTORED),
        (LAZILY, Fault.CORRUPT, Line.FILE, Outcome.LOST),
        (LAZILY, Fault.CANCEL, Victim.COORDINATOR, Outcome.COMPLETES),
        (LAZILY, Fault.TWICE, Victim.COORDINATOR, Outcome.LOST),
    ],
)
def test_outcomes(moment, fault, hit, outcome):
    assert expected(Cell(moment, fault, hit)) is outcome


def test_before_run_the_guest_lives_on_unless_its_own_host_process_died():
    own = (Victim.SOURCE, Victim.SOURCE_SERVER, Victim.SOURCE_GUEST)
    for cell in ALL:
        if cell.moment.run is RunSaid.NO and expected(cell) is Outcome.GUEST_DIES:
            assert cell.fault is Fault.KILL and cell.hit in own


def test_nothing_but_a_killed_end_loses_a_guest():
    """A link, a worker, a source's guest: never. What is restored lazily has no other end."""
    for cell in ALL:
        if cell.moment is LAZILY and expected(cell) is Outcome.LOST:
            assert cell.hit not in (Victim.SENDER, Victim.RECEIVER, Victim.URGENT, Victim.FAULT)
        elif expected(cell) is Outcome.LOST:
            assert cell.fault is Fault.KILL or cell.hit is Line.MEMORY
            assert not isinstance(cell.hit, Victim) or cell.hit in (
                Victim.SOURCE, Victim.DESTINATION, Victim.DESTINATION_SERVER,
                Victim.DESTINATION_GUEST,
            )  # fmt: skip


def test_a_dead_local_process_is_known_within_two_seconds_all_else_within_five():
    assert bound(Cell(ROUND_1, Fault.KILL, Victim.SENDER)) == 2
    assert bound(Cell(ROUND_1, Fault.STOP, Victim.SENDER)) == 5
    assert bound(Cell(ROUND_1, Fault.KILL, Victim.SOURCE)) == 5
    assert bound(Cell(ROUND_1, Fault.CUT, Line.WIRE)) == 5


def test_of_each_new_kind_of_run_some_cells_are_in_each_test():
    quick = [cell for cell in ALL if in_each_test(cell)]
    assert {cell.moment for cell in quick} == set(MOMENTS)
    assert len(IN_EACH_TEST) == len([c for c in quick if c.moment.kind is not Kind.NETWORK])


def test_the_document_is_of_this_matrix():
    """`make torture` writes it."""
    text = (Path(__file__).parents[2] / "docs" / "torture.md").read_text()
    assert rules() in text
    for moment in MOMENTS:
        _, _, after = text.partition(f"### {moment.name}\n")
        part = after.partition("###")[0]
        for cell in ALL:
            assert cell.moment is not moment or f"| {cell.what} |" in part, str(cell)
