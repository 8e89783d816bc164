"""The file of a batch: every change whole or not there, one owner, and nothing forgotten."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from pageferry.pipeline.batch_state import LOST_TRACK, BatchState, look
from pageferry.pipeline.manifest import Manifest, changed, manifest
from pageferry.pipeline.planner import State
from pageferry.transport.errors import DestinationError, PageferryError, UsageError

ERROR = {"class": "PeerLost", "message": "gone", "exit-code": 7}


def some(count=5) -> Manifest:
    items = [{"source": f"image:/i/vm{n}", "priority": n, "codec": "lz4"} for n in range(count)]
    return manifest({"items": items, "parallel": 3, "max-bandwidth": "1Gbit"}, "/", "image:/o/")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "batch.state")


def states(path):
    return [row.state for row in look(path).rows]


def test_what_was_given_comes_back(path):
    given = some()
    state = BatchState(path, given)
    assert state.policy == given.policy
    assert [row.item for row in state.rows()] == given.items
    assert {row.state for row in state.rows()} == {State.PENDING}
    state.close()
    state.close()
    again = BatchState(path, None)
    assert again.policy == given.policy
    assert [row.item for row in again.rows()] == given.items
    again.close()
    assert os.listdir(os.path.dirname(path)) == ["batch.state"]


def test_outcomes(path):
    state = BatchState(path, some())
    for number in range(4):
        state.started(number)
    state.ended(0, State.COMPLETED, 0, report={"total-time": 5})
    state.ended(1, State.WAITING, 1, error=ERROR)
    state.ended(2, State.FAILED, 3, error=ERROR)
    rows = state.rows()
    assert [r.state.value for r in rows] == [
        "completed", "waiting", "failed", "running", "pending",
    ]  # fmt: skip
    assert [r.attempts for r in rows] == [1, 1, 1, 1, 0]
    assert [r.failures for r in rows] == [0, 1, 3, 0, 0]
    assert rows[0].report == {"total-time": 5} and rows[2].error == ERROR
    # whoever looks meanwhile sees the same
    seen = look(path)
    assert seen.owner == os.getpid()
    assert list(seen.rows) == rows
    state.close()


def test_taken_up_again(path):
    """What ran is pending, its attempt counted; what waited too, its failures kept; what ended has
    ended."""
    state = BatchState(path, some())
    for number in range(4):
        state.started(number)
    state.ended(0, State.COMPLETED, 0, report={})
    state.ended(1, State.WAITING, 1, error=ERROR)
    state.ended(2, State.FAILED, 3, error=ERROR)
    state.close()
    state = BatchState(path, None)
    rows = state.rows()
    assert [r.state.value for r in rows] == [
        "completed", "pending", "failed", "pending", "pending",
    ]  # fmt: skip
    assert [(r.attempts, r.failures) for r in rows] == [(1, 0), (1, 1), (1, 3), (1, 0), (0, 0)]
    state.close()


def test_a_guest_that_was_being_handed_over_is_not_sent_again(path):
    """It may run at its destination: only somebody who has looked may say so."""
    state = BatchState(path, some(3))
    for number in range(3):
        state.started(number)
    state.switching(0)
    state.switching(1)
    state.ended(1, State.WAITING, 1, error=ERROR)  # it was not, after all
    state.close()
    state = BatchState(path, None)
    first, second, third = state.rows()
    assert (first.state, second.state, third.state) == (
        State.FAILED, State.PENDING, State.PENDING,
    )  # fmt: skip
    assert first.error == {"class": "ConfirmationLost", "message": LOST_TRACK}
    state.forgive()
    assert state.rows()[0].state is State.FAILED
    with pytest.raises(UsageError, match="called 'vm2'"):
        state.forgive({"vm0", "vm2"})
    state.forgive({"vm0"})
    assert state.rows()[0].state is State.PENDING
    state.close()


def test_what_failed_may_be_tried_anew(path):
    state = BatchState(path, some(2))
    state.started(0)
    state.ended(0, State.FAILED, 3, error=ERROR)
    state.forgive()
    assert (state.rows()[0].state, state.rows()[0].failures) == (State.PENDING, 0)
    state.close()


def test_other_limits_from_now_on(path):
    state = BatchState(path, some())
    state.policy = changed(state.policy, 9, "2Gbit")
    state.close()
    state = BatchState(path, None)
    assert (state.policy.parallel, state.policy.max_bandwidth) == (9, 250_000_000)
    assert changed(state.policy, None, None) == state.policy
    for wrong in ((0, None), (None, "fast"), (None, "1kB")):
        with pytest.raises(UsageError, match="the batch"):
            changed(state.policy, *wrong)
    state.close()


def test_a_state_is_never_begun_anew(path):
    BatchState(path, some()).close()
    with pytest.raises(UsageError, match="is there already: `pageferry batch resume --state"):
        BatchState(path, some())
    assert len(look(path).rows) == 5


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_other_files_are_refused_and_left_alone(path, content):
    with open(path, "wb") as f:
        f.write(content)
    for attempt in (lambda: BatchState(path, None), lambda: look(path)):
        with pytest.raises(UsageError, match="is no state of a batch"):
            attempt()
    if content:
        with pytest.raises(UsageError):
            BatchState(path, some())
    with open(path, "rb") as f:
        assert f.read() == content


def test_other_databases_are_refused(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE x (y)")
    db.close()
    for attempt in (lambda: BatchState(path, None), lambda: BatchState(path, some())):
        with pytest.raises(UsageError, match=r"is no state of a batch|is there already"):
            attempt()


def test_a_state_of_another_version(path):
    BatchState(path, some()).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UsageError, match="version 99"):
        BatchState(path, None)


def test_no_such_file(path):
    for attempt in (lambda: BatchState(path, None), lambda: look(path)):
        with pytest.raises(UsageError):
            attempt()
    assert not os.path.exists(path)
    with pytest.raises(UsageError, match="cannot open the state"):
        BatchState(f"{path}/x", some())


def test_closed(path):
    state = BatchState(path, some())
    state.close()
    with pytest.raises(PageferryError, match="closed"):
        state.rows()


def test_a_full_disk_is_an_error(path):
    """As the database says it: no page more than it has."""
    state = BatchState(path, some())
    state._db.execute("PRAGMA max_page_count = 1")
    long = {"class": "x", "message": "y" * 100_000}
    with pytest.raises(DestinationError, match="cannot keep the state"):
        state.ended(3, State.FAILED, 1, error=long)
    assert states(path) == [State.PENDING] * 5
    state._db.execute("PRAGMA max_page_count = 100000")
    state.ended(0, State.FAILED, 1, error=ERROR)
    assert states(path)[0] is State.FAILED
    state.close()


_CHILD = """
import sys
from pageferry.pipeline.batch_state import BatchState
from pageferry.pipeline.manifest import manifest
from pageferry.pipeline.planner import State
items = [{"source": f"image:/i/vm{n}"} for n in range(50)]
state = BatchState(sys.argv[1], manifest({"items": items}, "/", "image:/o/"))
print("open", flush=True)
for number in range(50):
    state.started(number)
    print("started", number, flush=True)
    state.ended(number, State.COMPLETED, 0, report={"total-time": number})
    print("ended", number, flush=True)
sys.stdin.read()
"""


def child(path):
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 15, 40, 77])
def test_kill_9_at_any_moment(path, lines):
    """What was said to be done is done; at most one thing more."""
    with child(path) as process:
        said = [process.stdout.readline().split() for _ in range(lines)]
        process.kill()
        said += [line.split() for line in process.stdout.read().splitlines()]
    assert process.returncode == -signal.SIGKILL
    ended = sum(line[0] == "ended" for line in said)
    begun = sum(line[0] == "started" for line in said)
    assert look(path).owner is None
    state = BatchState(path, None)
    rows = state.rows()
    assert len(rows) == 50
    completed = [row.number for row in rows if row.state is State.COMPLETED]
    assert completed == list(range(len(completed)))
    assert ended <= len(completed) <= ended + 1
    assert {row.state for row in rows[len(completed) :]} <= {State.PENDING}
    assert begun <= sum(row.attempts for row in rows) <= begun + 1
    assert all(row.report == {"total-time": row.number} for row in rows[: len(completed)])
    state.close()


def test_one_process_at_a_time(path):
    """A second is refused and does no harm; when the first is killed the next may."""
    with child(path) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match="somebody works on the batch"):
            BatchState(path, None)
        with pytest.raises(UsageError, match="somebody works on the batch"):
            BatchState(path, some())
        assert look(path).owner == process.pid
        while process.stdout.readline() != "ended 49\n":
            pass
        assert set(states(path)) == {State.COMPLETED}
        process.kill()
    state = BatchState(path, None)
    assert replace(look(path), rows=()).owner == os.getpid()
    state.close()


def test_killed_before_it_was_one(path):
    """A file that has our mark and no version yet is begun anew."""
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA application_id = {0x70667279}")
    db.close()
    assert os.path.getsize(path) > 0
    state = BatchState(path, some())
    assert len(state.rows()) == 5
    state.close()
