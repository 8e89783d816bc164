"""Carries out what goals.py decides: which senders get extents, with which codec, and what a slice
of the migration cost.

A parked sender is one that is given no extent. It keeps its channel, beats, hears acknowledgements,
and passes every barrier; what it was given it finishes. A choice is in force, and measured, from
when all extents that were handed out before it are answered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from ..transport.codecs import before
from ..transport.pages import PAGE_SIZE
from ..workers import jobs
from ..workers.counters import Counters
from ..workers.page_table import GROUP
from ..workers.pool import Pool
from .goals import Choice, Seeker, Slice

# While something is being tried an extent is what takes a sender so long, so that a choice is soon
# in force; within these bounds (1 to 8 MiB), and of this size where nothing is known.
_PIECE_SECONDS = 0.02
_LEAST_PIECE, _FIRST_PIECE, _MOST_PIECE = 256, GROUP, 4 * GROUP
# Choices that a report names: the first and the last of them.
_KEPT = 32


class Steering:
    """One migration's. Times: CLOCK_MONOTONIC seconds."""

    def __init__(
        self,
        seeker: Seeker,
        counters: Counters,
        receiver_cpu: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        deltas: bool = False,
    ) -> None:
        """`receiver_cpu`: processor seconds of all receivers so far, if that is known here;
        `deltas`: they are made before any codec."""
        self.seeker = seeker
        self._counters, self._receiver_cpu, self._clock = counters, receiver_cpu, clock
        self._started, self._deltas = clock(), deltas
        self._pool: Pool | None = None
        self._learning = False
        self._turn = 0
        self._given: dict[int, deque[int]] = {}  # turns of the extents each sender has, in order
        self._late = 0  # of these, how many are of an older turn
        self._until = 0  # pages that will have been sent at the end of this round
        self._begin: _Reading | None = None
        self._piece = _FIRST_PIECE
        self._choices: list[dict[str, Any]] = []
        self._left_out = 0

    def __repr__(self) -> str:
        return f"<Steering {self.seeker!r}>"

    # ---- a round -------------------------------------------------------------------------

    def begin_round(self, pool: Pool, pages: int, *, learning: bool) -> None:
        """A round of so many pages begins; without `learning` nothing is tried in it."""
        self.seeker.drop()
        self._until = self._pages_done() + pages
        self._pool, self._learning = pool, learning
        self._given = {worker.index: deque() for worker in pool.workers}
        self._new_turn()

    def end_round(self) -> None:
        """What was not measured to its end says nothing."""
        self._begin = None
        self.seeker.drop()

    def may_work(self, worker: int) -> bool:
        """False if this sender is parked."""
        return worker < self.seeker.choice.workers

    def pieces(
        self, todo: Iterator[jobs.AnyJob], host_pages: Callable[[int], int]
    ) -> Iterator[jobs.AnyJob]:
        """Extents, smaller ones while something is tried. `host_pages(block)`: so many pages are a
        host page there, which has one owner."""
        for job in todo:
            if not isinstance(job, jobs.Extent):
                yield job
                continue
            first, end, host = job.first, job.first + job.count, host_pages(job.block)
            while first < end:
                size = end - first
                if self._learning and not (self.seeker.settled or self.seeker.resting):
                    size = min(size, max(self._piece // host, 1) * host)
                yield msgspec.structs.replace(job, first=first, count=size)
                first += size

    def give(self, worker: int, job: jobs.AnyJob) -> jobs.AnyJob:
        """`job`, as this sender is to get it now."""
        if not isinstance(job, jobs.Extent):
            return job
        self._given[worker].append(self._turn)
        choice = self.seeker.choice
        return msgspec.structs.replace(job, codec=choice.codec, level=choice.level)

    def answered(self, worker: int) -> bool:
        """This sender has finished the oldest extent it had; True if the choice is another one."""
        if self._given[worker].popleft() != self._turn:
            self._late -= 1
        if not self._learning or self._late:
            return False
        now = self._read()
        if self._begin is None:
            self._begin = now
            return False
        found = now.since(self._begin, max(0, self._until - now.pages))
        if not self.seeker.enough(found):
            return False
        before = self.seeker.choice
        self.seeker.learn(found)
        self._begin = now
        rate = found.pages / max(found.seconds, 1e-6) / before.workers
        self._piece = min(max(int(rate * _PIECE_SECONDS), _LEAST_PIECE), _MOST_PIECE)
        if self.seeker.choice == before:
            return False
        self._piece = min(self._piece, _FIRST_PIECE)
        self._note(before, found)
        self._new_turn()
        return True

    def _new_turn(self) -> None:
        self._turn += 1
        self._late = sum(len(turns) for turns in self._given.values())
        self._begin = None if self._late else self._read()

    def _read(self) -> _Reading:
        assert self._pool is not None
        total = self._counters.total
        return _Reading(
            self._clock(), self._pages_done(), total("wire_bytes"), self._pool.cpu_seconds(),
            self._receiver_cpu(), (total("wait_ns") + total("paced_ns")) / 1e9,
        )  # fmt: skip

    def _pages_done(self) -> int:
        total = self._counters.total
        return total("normal") + total("duplicate") - total("lost_pages")

    # ---- what is said of it --------------------------------------------------------------

    def hurry(self) -> None:
        """The guest writes too fast: see Seeker.hurry."""
        if self.seeker.hurry():
            self._choices.append({"time": self._time(), "goal": self.seeker.goal})

    def _time(self) -> int:
        return round((self._clock() - self._started) * 1000)

    def _note(self, used: Choice, found: Slice) -> None:
        note = {
            "time": self._time(),
            "workers": used.workers,
            "codec": before(self._deltas, used.codec),
            **({} if used.level is None else {"level": used.level}),
            "rate": round(found.pages * PAGE_SIZE / max(found.seconds, 1e-6)),
        }
        self._choices.append(note)
        if len(self._choices) > _KEPT:
            self._left_out += 1
            del self._choices[_KEPT // 2]

    def report(self) -> dict[str, Any]:
        """For query-migrate. `goal-choices`: what was tried when, milliseconds since the channels
        were opened, and what it moved; the last one is in `workers-active` and `codec`."""
        kept = self.seeker.kept
        level = {} if kept.level is None else {"level": kept.level}
        left_out = {"goal-choices-left-out": self._left_out} if self._left_out else {}
        return {
            "goal": self.seeker.goal,
            "workers-active": kept.workers,
            "codec": before(self._deltas, kept.codec),
            **level,
            "goal-choices": list(self._choices),
            **left_out,
        }


class _Reading:
    """All counters at one moment."""

    def __init__(
        self, at: float, pages: int, wire: int, sender_cpu: float, receiver_cpu: float | None,
        waited: float,
    ) -> None:  # fmt: skip
        self.at, self.pages, self.wire = at, pages, wire
        self.sender_cpu, self.receiver_cpu, self.waited = sender_cpu, receiver_cpu, waited

    def since(self, before: _Reading, left: int) -> Slice:
        """What was between the two; `left`: pages."""
        received = None
        if self.receiver_cpu is not None and before.receiver_cpu is not None:
            received = self.receiver_cpu - before.receiver_cpu
        return Slice(
            self.at - before.at, self.pages - before.pages, self.wire - before.wire,
            self.sender_cpu - before.sender_cpu, received, self.waited - before.waited,
            left,
        )  # fmt: skip
