"""What a round does: the pages that were written are taken, looked for and sent, and meanwhile it
is looked how much is written again.

Knows the guest, its page table and the senders. Must not know the destination, nor why there is
another round (migration.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

from ..transport.errors import PageferryError
from ..transport.pages import PAGE_SIZE
from ..workers import jobs
from ..workers.guests.base import TRACKING_HASH, SourceGuest
from . import migration as core
from .blocking import Blocking
from .convergence import Convergence
from .crew import extents
from .equipment import Equipment
from .initial import InitialPages
from .journal import Journal
from .pressure import Pressure
from .statistics import RoundCost, Statistics
from .steering import Steering

# Pages in a Scan job.
_SCAN_PAGES = 16384
# A block above 32 GiB is looked at in a thread: the control link must not fall silent.
_PAGES_IN_LOOP = 8 << 20
# Looking how much was written meanwhile costs at most one part in so many.
_LOOK_AHEAD_SHARE = 50
# A settle that took less had nothing to wait for.
_NOTHING_SECONDS = 0.0005


class Rounds:
    """One migration's, one after the other. `announce(number, pages)`: awaited before the first
    page of each. Times: CLOCK_MONOTONIC seconds."""

    def __init__(
        self,
        guest: SourceGuest,
        call: Blocking,
        statistics: Statistics,
        journal: Journal,
        convergence: Convergence,
        pressure: Pressure,
        announce: Callable[[int, int], Awaitable[None]],
    ) -> None:
        self._guest, self._call = guest, call
        self._statistics, self._journal = statistics, journal
        self._convergence, self._pressure, self._announce = convergence, pressure, announce
        self.cut = asyncio.Event()  # hand out no more of this round
        self._written = (0, 0.0)  # pages dirty again, after so many seconds of a round
        self._written_due = 0.0
        self._taken_at = time.monotonic()
        self._scan_seconds = 0.0  # what the last scan of all memory took
        self._sending = False  # a round goes on, so nobody takes dirty pages

    def __repr__(self) -> str:
        return f"<Rounds {self._statistics.rounds}>"

    # ---- what is to be sent --------------------------------------------------------------

    async def take_initial(self, equipment: Equipment, initial: InitialPages) -> core.Taken:
        """From now on writes are seen; all that `initial` says is dirty."""
        begin = time.monotonic()
        await self._call(self._guest.start_tracking)
        self._taken_at = time.monotonic()
        await initial.mark(equipment.table)
        if self._guest.live:
            begin += await self._settle()
            self._journal.info("writes are tracked by %s", self._guest.tracking)
        if there := initial.already_there:
            self._journal.info("%d pages are there already, and left out", there)
        pages = equipment.remaining()
        return core.Taken(pages, pages, 0.0, time.monotonic() - begin)

    async def _settle(self) -> float:
        """Before pages that were taken are read. Seconds; in the statistics, because the guest's
        disks stand still meanwhile."""
        begin = time.monotonic()
        await self._call(self._guest.settle)
        took = time.monotonic() - begin
        known = self._statistics.extra.get("disks-drained-us", 0)
        if took > _NOTHING_SECONDS:
            self._statistics.extra["disks-drained-us"] = max(known, round(took * 1e6))
        return took

    async def take_dirty(self, equipment: Equipment, *, stopped: bool) -> core.Taken:
        """What was written since the last time. `stopped`: the guest stands still."""
        begin = time.monotonic()
        before = equipment.remaining()
        scan, ahead = equipment.hashes is not None, 0.0
        if self._guest.live and self._guest.tracking != TRACKING_HASH:
            # all memory is looked at once, to know what that takes, and when the guest is stopped
            scan = scan and (stopped or not self._scan_seconds)
            ahead = 0.0 if scan else self._scan_seconds
            for i, block in enumerate(self._guest.blocks):
                if block.pages > _PAGES_IN_LOOP:
                    runs = await self._call(self._guest.dirty_pages, i)
                else:  # a few ms, and a switchover has no time for a thread
                    runs = self._guest.dirty_pages(i)
                equipment.table.mark_dirty(i, runs)
            if not stopped:
                begin += await self._settle()  # no part of a switchover
        if scan:
            scan_began = time.monotonic()
            await self.scan(equipment)
            self._scan_seconds = time.monotonic() - scan_began
        pages = equipment.remaining()
        now = time.monotonic()
        since, self._taken_at = begin - self._taken_at, begin
        return core.Taken(pages, pages - before, since, now - begin + ahead)

    async def scan(self, equipment: Equipment) -> None:
        """All memory is compared with what was sent; what differs is dirty."""
        todo: Iterator[jobs.AnyJob] = (
            jobs.Scan(i, first, min(_SCAN_PAGES, block.pages - first))
            for i, block in enumerate(self._guest.blocks)
            for first in range(0, block.pages, _SCAN_PAGES)
        )
        await equipment.crew.distribute(todo, jobs.ScanDone, lambda reply: None)

    # ---- sending it ----------------------------------------------------------------------

    async def send(
        self, equipment: Equipment, instruction: core.SendRound, pages: int, *, still: bool
    ) -> core.RoundDone:
        """All that is dirty, `pages` in all, and the barrier behind it. `still`: this is while the
        guest stands still."""
        crew, counters = equipment.crew, equipment.counters
        begin = time.monotonic()
        zero, wire = counters.total("duplicate"), counters.total("wire_bytes")
        cpu, waited = crew.pool.cpu_seconds(), equipment.waited()
        await self._announce(instruction.number, pages)
        spans = extents(equipment.table, self._guest.blocks, counters.workers, pages)
        todo: Iterator[jobs.AnyJob] = (
            jobs.Extent(s.block, s.first, s.count, instruction.live) for s in spans
        )
        self.cut.clear()
        if equipment.deltas is not None and instruction.live:
            for _ in equipment.deltas.begin_round(instruction.number, equipment.table, counters):
                await asyncio.sleep(0)
        self._written, self._sending = (0, 0.0), instruction.live
        steering = self._steer(equipment, still=still)
        if steering is not None:
            todo = steering.pieces(todo, self._host_pages)
        try:
            await crew.distribute(todo, jobs.ExtentDone, lambda reply: None, self.cut, steering)
            if steering is not None:
                steering.end_round()
            await crew.all(jobs.Barrier(instruction.number), jobs.BarrierDone)
        finally:
            self._sending = False
        lost = equipment.remaining()
        done = core.RoundDone(
            pages - lost, lost, time.monotonic() - begin,
            zero=counters.total("duplicate") - zero,
            wire=counters.total("wire_bytes") - wire,
        )  # fmt: skip
        self._journal.round_ends(pages=pages, lost=lost, zero=done.zero, wire=done.wire)
        if instruction.number == 1:
            self._statistics.first_round = RoundCost(
                done.pages, done.wire, done.seconds, crew.pool.cpu_seconds() - cpu,
                equipment.waited() - waited,
            )  # fmt: skip
        return done

    def _steer(self, equipment: Equipment, *, still: bool) -> Steering | None:
        """The steering, if there is one, told that a round begins. While the guest stands still
        nothing is tried."""
        steering, found = equipment.steering, self._convergence
        if steering is not None:
            if steering.seeker.too_slow(
                found.rate, found.dirty_rate, rounds=found.rounds, still=still
            ):
                steering.hurry()
            steering.begin_round(equipment.crew.pool, equipment.remaining(), learning=not still)
        return steering

    def _host_pages(self, block: int) -> int:
        return self._guest.blocks[block].spec.page_size // PAGE_SIZE

    # ---- beside it -----------------------------------------------------------------------

    def look_ahead(self) -> int | None:
        """How much the guest has written in this round, for the ETA; the percentage of its time
        that it is to lose, if that is another one. In the event loop, and never while pages are
        taken."""
        now, percentage = time.monotonic(), None
        if not self._sending or now < self._written_due:
            return None
        if self._statistics.total_pages > _PAGES_IN_LOOP:
            return None
        with contextlib.suppress(PageferryError):  # whoever takes them says it
            if (pages := self._guest.written_so_far()) is not None:
                since = now - self._taken_at
                self._written = pages, since
                moved = self._statistics.pages_done - self._statistics.round_base
                percentage = self._pressure.look(pages, moved, since)
        self._written_due = now + _LOOK_AHEAD_SHARE * (time.monotonic() - now)
        return percentage

    def eta(self, *, still: bool) -> float | None:
        """Seconds, to the end: when the guest runs there, or all of its memory has come. `still`:
        nobody writes."""
        statistics, found = self._statistics, self._convergence
        left, rate = statistics.remaining_pages, statistics.steady_rate()
        if rate <= 0:
            return None
        if still:
            return round(left * PAGE_SIZE / rate, 1)
        written, since = self._written
        dirty_rate = found.dirty_rate_now(written, since)
        eta = found.eta(left, rate, written, dirty_rate, statistics.total_pages)
        return None if eta is None else round(eta, 1)
