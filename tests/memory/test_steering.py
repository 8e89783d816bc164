"""Who gets extents, how large they are, and when a slice begins: with real counters."""

from types import SimpleNamespace

import pytest

from pageferry.pipeline.goals import FASTEST, LEAST_CPU, LEAST_PAGES, SLICE_SECONDS, Choice, Seeker
from pageferry.pipeline.steering import Steering
from pageferry.transport.codecs import before
from pageferry.workers import jobs
from pageferry.workers.counters import Counters

WORKERS = 3


class Senders:
    """A pool whose processes cost what it is told."""

    def __init__(self):
        self.workers = [SimpleNamespace(index=i) for i in range(WORKERS)]
        self.seconds = 0.0

    def cpu_seconds(self):
        return self.seconds


class Ride:
    """A steering with a clock that stands, until it is moved."""

    def __init__(self, goal, pages=10**9):
        self.now = 0.0
        self.counters, self.senders = Counters(WORKERS), Senders()
        self.rows = [self.counters.row(i) for i in range(WORKERS)]
        seeker = Seeker(goal, WORKERS)
        self.steering = Steering(seeker, self.counters, clock=lambda: self.now)
        self.steering.begin_round(self.senders, pages, learning=True)

    def give(self, worker):
        return self.steering.give(worker, jobs.Extent(0, 0, 512, False))

    def move(self, pages, seconds=1.25 * SLICE_SECONDS, worker=0, waited=0.0):
        """So many pages in so many seconds, answered by this worker."""
        self.now += seconds
        self.senders.seconds += seconds
        self.rows[worker].add("normal", pages)
        self.rows[worker].add("wire_bytes", pages * 4096)
        self.rows[worker].add("wait_ns", int(waited * 1e9))
        return self.steering.answered(worker)


@pytest.fixture
def ride():
    rides = []

    def make(*arguments):
        rides.append(Ride(*arguments))
        return rides[-1]

    yield make
    for made in rides:
        made.rows.clear()
        made.counters.close()


def test_an_extent_has_the_codec_of_the_moment(ride):
    """Nothing else does."""
    ours = ride(FASTEST)
    assert (ours.give(0).codec, ours.give(1).level) == ("none", None)
    scan = jobs.Scan(0, 0, 1)
    assert ours.steering.give(0, scan) is scan


def test_who_is_parked_gets_none(ride):
    assert [ride(LEAST_CPU).steering.may_work(i) for i in range(WORKERS)] == [True, False, False]
    assert [ride(FASTEST).steering.may_work(i) for i in range(WORKERS)] == [True] * 3


def test_a_choice_counts_from_when_older_extents_are_answered(ride):
    """What a sender still has of the choice before is not measured as the new one's."""
    ours = ride(FASTEST)
    for worker in (0, 1, 1):
        ours.give(worker)
    assert ours.move(LEAST_PAGES, waited=1.0)  # a slice: now lz4 is tried
    assert ours.steering.seeker.choice == Choice(3, "lz4")
    ours.give(0)
    assert not ours.move(LEAST_PAGES, worker=1)  # of those before
    assert not ours.move(10 * LEAST_PAGES, worker=1)  # the last of them: from here on
    assert ours.steering.seeker.choice == Choice(3, "lz4")
    ours.give(1)
    assert ours.move(2 * LEAST_PAGES, worker=0, waited=1.0)
    assert ours.steering.seeker.choice == Choice(3, "none")
    rates = [c["rate"] for c in ours.steering.report()["goal-choices"]]
    assert rates == [round(n * LEAST_PAGES * 4096 / SLICE_SECONDS / 1.25) for n in (1, 2)]


def test_the_end_of_a_round_ends_what_is_tried(ride):
    ours = ride(FASTEST)
    ours.give(0)
    assert ours.move(LEAST_PAGES, waited=1.0)
    ours.steering.end_round()
    assert ours.steering.seeker.choice == Choice(3, "none")


def test_without_learning_nothing_is_tried(ride):
    """In the last round the guest stands still."""
    ours = ride(FASTEST)
    ours.steering.begin_round(ours.senders, 10**9, learning=False)
    for _ in range(20):
        ours.give(0)
        assert not ours.move(LEAST_PAGES, waited=1.0)
    job = jobs.Extent(0, 512, 8192, False)
    assert list(ours.steering.pieces(iter([job]), lambda block: 1)) == [job]


@pytest.mark.parametrize("host", [1, 512, 1024, 1 << 18])
def test_pieces_are_the_extent_once_and_of_whole_host_pages(ride, host):
    """Whatever they are cut into, each page is in one."""
    ours = ride(FASTEST)
    whole = [jobs.Extent(0, 2 * host, 4 * host + 3, True), jobs.Scan(0, 0, 1)]
    pieces = list(ours.steering.pieces(iter(whole), lambda block: host))
    assert pieces.pop() == whole[1]
    at = 2 * host
    for piece in pieces:
        assert piece.first == at and piece.live
        assert piece.first % host == 0
        at += piece.count
    assert at == 6 * host + 3
    assert len(pieces) == 1 if host == 1 else len(pieces) > 1


def test_what_is_said_of_it(ride):
    ours = ride(LEAST_CPU)
    ours.now = 2.0
    ours.steering.hurry()
    assert ours.steering.report() == {
        "goal": "fastest", "workers-active": 3, "codec": "none",
        "goal-choices": [{"time": 2000, "goal": "fastest"}],
    }  # fmt: skip


def test_the_codec_is_named_with_the_deltas_before_it():
    """As it would be asked for."""
    assert [before(True, name) for name in ("none", "zstd")] == ["xbzrle", "xbzrle+zstd"]
    counters = Counters(1)
    steering = Steering(Seeker(FASTEST, 1, ("zstd", 3)), counters, deltas=True)
    assert steering.report()["codec"] == "xbzrle+zstd"
    counters.close()
