"""The fault process: reads who sleeps on a missing page, asks for it, installs what comes.

One process at the destination, at real-time priority where that is permitted. A fault on a page
that is to come is asked for once, however many threads sleep on it; one on a page that is
known to be zero (a hole, or given back by the guest) is answered here. Answers are installed with
UFFDIO_COPY, which wakes who sleeps. In QEMU, postcopy_ram_fault_thread and
postcopy_preempt_thread (migration/postcopy-ram.c, ram.c).

While the source is gone it goes on with zero pages and keeps what was asked for, to ask again
once the channel is back. Decides nothing: whether a connection is over is the coordinator's to say.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..transport.curve import Binds, Dials
from ..transport.errors import GuestGone, LocalProtocolError, RemoteProtocolError, WorkerDied
from ..transport.links import parse_endpoint, short
from ..transport.pages import PAGE_SIZE
from ..transport.snapshot_format import CHUNK_PAGES
from ..transport.urgent import Elsewhere, Page, Requesting
from ..transport.urgent_links import UrgentLink, urgent_link
from . import jobs
from .counters import Counters
from .guests.base import ArmedMemory, Region
from .here import HereReader
from .kernel.userfaultfd import READ_MESSAGES, Fault, Removed, read_messages, wake
from .latency import Latency
from .placing import ARRIVAL, GuestPlacer
from .priority import FIFO, FIFO_PRIORITY, become_urgent, collect_seldom
from .process import HEARTBEAT_SECONDS, Desk, run_worker, traced
from .ram import RamBlock
from .received import Received, Waiting, WaitingWriter
from .segments import Segment
from .snapshot_file import CheckedBlock

# An answer that stays away for this long was lost with its connection: ask again.
ASK_AGAIN_SECONDS = 1.0
# Installed pages are reported with the next request, or this long after the last, or so many.
_REPORT_SECONDS = 0.005
_REPORT_PAGES = 32
_ARRIVALS = 256
# Turns of the loop between two looks at the clock.
_TURNS = 16
_LOCK_SECONDS = 30.0
_A_MOMENT = 0.00005


_SUMMED = (
    "requests", "ask_ns", "normal", "duplicate", "wire_bytes", "held_ns", "install_ns", "answered",
    "served_here",
)  # fmt: skip


@dataclass
class FaultJob:
    """Everything it needs, pickled into it once. `arrivals`: the pipe from the receivers; `direct`:
    the channel is a connection of its own; `dial`: `listen` is where the source listens;
    `removing`: a lock, if the guest may give memory back (placing.py); `reading`: a word that is
    not 0 while what it gave back is read and not yet marked; `curve`: only with keys; `here`:
    blocks of a snapshot that is read here, so that nobody is asked (here.py)."""

    blocks: list[RamBlock]
    memory: ArmedMemory
    received: Received
    waiting: Waiting
    arrivals: Any
    latency: Latency
    counters: Counters
    listen: str
    token: bytes
    direct: bool = False
    dial: bool = False
    removing: Any = None
    reading: Segment | None = None
    curve: Binds | Dials | None = None
    here: Sequence[CheckedBlock] = ()


@dataclass(slots=True)
class _Wanted:
    """A host page that somebody sleeps on. Times: CLOCK_MONOTONIC, nanoseconds."""

    block: int
    page: int
    since: int
    asked: int = 0  # when it was asked for last; 0: not yet
    number: int = -1  # of that request
    again: bool = False  # asked for more than once


def main(pipe: Connection, index: int, job: FaultJob) -> None:
    run_worker(
        "pf-fault",
        pipe,
        job.counters,
        index,
        lambda desk: traced(desk, FaultProcess)(desk, job).run(),
    )


class FaultProcess:
    """The process's one object."""

    def __init__(self, desk: Desk, job: FaultJob) -> None:
        self.desk, self.job, self.row = desk, job, desk.row
        self.uffd = job.memory.uffd
        self.placer = GuestPlacer(
            job.memory, job.received, self.row, job.removing, self._while_changing
        )
        self.here = HereReader(job.here) if job.here else None
        self.backlog: deque[Fault] = deque()  # read, and not yet looked at
        self.waiting = WaitingWriter(job.waiting)
        self.latency = job.latency.writer()
        self.session: Requesting[_Wanted] = Requesting()
        self.wanted: dict[tuple[int, int], _Wanted] = {}
        self.link: UrgentLink | None = None
        self.linked_fd = -1
        self.poll = select.poll()
        self.arrivals = job.arrivals.fileno()
        self.sums = dict.fromkeys(_SUMMED, 0)  # added to the counters now and then
        self.armed, self.held = True, False
        self.took = 0  # what the last answer was on the wire, nanoseconds
        self.looked = self.reported = time.monotonic()

    def run(self) -> None:
        self._map_the_word()
        rank = become_urgent()
        collect_seldom()
        self.row.set("priority", rank)
        self.priority = FIFO_PRIORITY if rank == FIFO else 0
        os.set_blocking(self.arrivals, False)
        for fd in (self.desk.pipe.fileno(), self.uffd, self.arrivals):
            self.poll.register(fd, select.POLLIN)
        self._link(self.job.listen, self.job.token, self.job.curve, dial=self.job.dial)
        # whoever was read by a process before this one sleeps and is told of no more
        for region in self.job.memory.regions:
            wake(self.uffd, region.address, region.pages * PAGE_SIZE)
        try:
            pipe = self.desk.pipe.fileno()
            ready = [(pipe, 0), (self.uffd, 0), (self.arrivals, 0)]
            turns = 0
            while True:
                for fd, _ in ready:
                    if fd == pipe and not self._commands():
                        return
                    self._turn(fd)
                turns += 1
                if not ready or turns % _TURNS == 0:
                    self._look_after()
                if self.backlog:
                    self._faults()
                if self.link is not None and self.link.eager:
                    self._answers()  # the last before the poll: whatever was sent may hide answers
                ready = self.poll.poll(self._patience() * 1000)
        finally:
            self._report()
            self._unlink()

    def _turn(self, fd: int) -> None:
        """Do what `fd` is readable for."""
        if fd == self.uffd:
            self._faults()
        elif fd == self.linked_fd:
            self._answers()
        elif fd == self.arrivals:
            self._arrivals()

    def _map_the_word(self) -> None:
        """`reading`; GuestGone if a process before this one was killed at the wrong moment."""
        if self.job.removing is not None:
            assert self.job.reading is not None
            self.reading = memoryview(self.job.reading.array(np.uint64, 1).data)
            if self.reading[0]:
                raise GuestGone(
                    "the fault process was killed while the guest gave memory back: what that was "
                    "is not known; end the guest and restore it again"
                )

    def _patience(self) -> float:
        return _REPORT_SECONDS if self.session.unsaid else HEARTBEAT_SECONDS

    # ---- the coordinator -----------------------------------------------------------------

    def _commands(self) -> bool:
        """Jobs of the coordinator; False when told to stop."""
        while self.desk.waiting():
            match self.desk.take():
                case jobs.Stop():
                    return False
                case jobs.Unlink():
                    self._unlink()
                case jobs.Relink() as job:
                    self._unlink()
                    where = job.endpoint or self.job.listen
                    self._link(where, job.token, job.curve, dial=bool(job.endpoint))
                case jobs.Hold() as job:
                    self._hold(job.on)
                    self.desk.say(jobs.Ready(token=job.token))
                case jobs.Finish() as job:
                    self._disarm()
                    self.desk.say(jobs.Ready(token=job.token))
                case job:
                    raise LocalProtocolError(f"the fault process was told {job!r}")
        return True

    def _link(self, where: str, token: bytes, curve: Binds | Dials | None, *, dial: bool) -> None:
        self.session = Requesting()
        self.link = urgent_link(self.job.direct, self.priority)
        endpoint = ""
        if dial:
            assert not isinstance(curve, Binds)
            self.link.dial(parse_endpoint(where), token, curve)
        else:
            assert not isinstance(curve, Dials)
            endpoint = short(self.link.listen(parse_endpoint(where), token, curve))
        self.linked_fd = self.link.fd
        self.poll.register(self.linked_fd, select.POLLIN)
        for wanted in self.wanted.values():
            wanted.asked, wanted.number = 0, -1
        self.desk.say(jobs.Ready(endpoint, token))

    def _unlink(self) -> None:
        if self.link is not None:
            if self.linked_fd >= 0:
                self.poll.unregister(self.linked_fd)
                self.linked_fd = -1
            self.link.close()
            self.link = None

    def _broke(self) -> None:
        self._unlink()
        self.desk.say(jobs.Unlink())

    def _hold(self, on: bool) -> None:
        """Read no faults: the coordinator is about to say which pages are missing, and until all
        is said and done a hole may be zero or yet to come. What was read before is answered."""
        if on and not self.held:
            self._faults()
            self.poll.unregister(self.uffd)
        elif self.held and not on:
            self.poll.register(self.uffd, select.POLLIN)
        self.held = on

    def _disarm(self) -> None:
        """Everything has arrived: what is still a hole is zero, as any hole is."""
        self._hold(False)
        self._faults()
        if self.armed:
            self.armed = False
            self.poll.unregister(self.uffd)
            self.job.memory.disarm()
            # who gave memory back just then waits until that is read
            self._read()
            while self.placer.changing():
                self._while_changing()
        self._report()

    # ---- faults --------------------------------------------------------------------------

    def _faults(self) -> None:
        more = self.armed and not self.held
        while more:
            more = self._read()
            came = time.monotonic_ns()
            while self.backlog:
                found = self.placer.map.locate(self.backlog.popleft().address)
                if found is not None:
                    self._fault(*found, came)

    def _read(self) -> bool:
        """Take what the kernel says; True if there may be more."""
        lock = self.job.removing
        if lock is None:
            events = read_messages(self.uffd)
        else:
            if not lock.acquire(timeout=_LOCK_SECONDS):
                raise WorkerDied("a receiver died while it installed pages")
            try:
                # who reads lets the guest go on: what is read and not marked would be lost with us
                self.reading[0] = 1
                events = read_messages(self.uffd)
                for event in events:
                    if isinstance(event, Removed):
                        self._removed(event)
                self.reading[0] = 0
            finally:
                lock.release()
        self.backlog.extend(event for event in events if isinstance(event, Fault))
        return len(events) == READ_MESSAGES

    def _while_changing(self) -> None:
        """The guest waits for its removal to be read."""
        self._read()
        time.sleep(_A_MOMENT)  # not a yield: at real-time priority that lets nobody run

    def _fault(self, region: Region, page: int, came: int) -> None:
        host = region.page_size // PAGE_SIZE
        page -= (page - region.first) % host
        if self.placer.view(region.block)[page]:
            # known to be zero, or it has just been installed: then this only wakes
            if self.placer.zero(region, page, host):
                self.row.add("local_zero", host)
            return
        if self.here is not None:
            self._install_here(self.here, region, page, came)
            return
        if (region.block, page) in self.wanted:
            self.row.add("repeated", 1)
            return
        wanted = self.wanted[region.block, page] = _Wanted(region.block, page, came)
        self.waiting.add(region.block, page)
        self._ask(wanted)

    def _install_here(self, here: HereReader, region: Region, page: int, came: int) -> None:
        """Read it, and install it; then what was read around it and is missing as well. Nobody
        claims a page for that: a snapshot has one content of it, whoever comes first."""
        host = region.page_size // PAGE_SIZE
        first, count = page, host
        if host < CHUNK_PAGES:
            first = max(page - page % CHUNK_PAGES, region.first)
            count = (
                min(page - page % CHUNK_PAGES + CHUNK_PAGES, region.first + region.pages) - first
            )
        content = here.stretch(region.block, first, count)
        self._install_part(region, page, host, first, content)
        if self.job.removing is not None:
            self.placer.zero(region, page, host)  # given back meanwhile, it was left out: wake
        self.latency.add(time.monotonic_ns() - came)
        missing = bytes(self.placer.view(region.block)[first : first + count])
        at = missing.find(0)
        while at >= 0:
            n = len(missing) - at - len(missing[at:].lstrip(b"\0"))
            self._install_part(region, first + at, n, first, content)
            at = missing.find(0, at + n)
        self.sums["served_here"] += 1
        self.sums["answered"] += 1
        self.sums["install_ns"] += time.monotonic_ns() - came

    def _install_part(
        self, region: Region, page: int, count: int, first: int, content: memoryview
    ) -> None:
        """`count` pages of `content`, which begins with page `first`."""
        begin = (page - first) * PAGE_SIZE
        part = content[begin : begin + count * PAGE_SIZE]
        self.placer.install(region.block, page, count, part)
        self.sums["normal"] += count

    def _ask(self, wanted: _Wanted) -> None:
        """Ask for it; if nobody is there to be asked, `_look_after` does later."""
        if self.link is None:
            return
        data = self.session.ask(
            wanted.block, wanted.page, wanted, instead=wanted.number, took=self.took
        )
        self.took = 0
        wanted.number = self.session.last
        if not self.link.send(data):
            return
        now = time.monotonic_ns()
        if wanted.asked:
            wanted.again = True
            self.row.add("asked_again", 1)
        else:
            self.sums["requests"] += 1
            self.sums["ask_ns"] += now - wanted.since
        wanted.asked = now

    def _removed(self, event: Removed) -> None:
        """The guest gave memory back: it reads as zero from now on, and what comes is stale. Who
        sleeps on a page of it is to find zeros."""
        for region in self.job.memory.regions:
            end = region.address + region.pages * PAGE_SIZE
            first, last = max(event.start, region.address), min(event.end, end)
            if first >= last:
                continue
            page = region.first + (first - region.address) // PAGE_SIZE
            count = (last - first) // PAGE_SIZE
            self.placer.view(region.block)[page : page + count] = b"\1" * count
            for wanted in list(self.wanted.values()):
                if wanted.block == region.block and page <= wanted.page < page + count:
                    self._close(wanted.block, wanted.page, time.monotonic_ns())
                    offset = (wanted.page - region.first) * PAGE_SIZE
                    self.backlog.append(Fault(region.address + offset))

    # ---- answers -------------------------------------------------------------------------

    def _answers(self) -> None:
        link = self.link
        if link is None:
            return
        while (data := link.receive()) is not None:
            came = time.monotonic_ns()
            answer = self.session.receive(data)
            if isinstance(answer, Page):
                self._install(answer, came)
            elif isinstance(answer, Elsewhere):
                self.row.add("elsewhere", 1)
                self._arrived(answer.block, answer.page, came)
        if link.broken:
            self._broke()
        elif self.session.unsaid >= _REPORT_PAGES:
            self._report()
            if link.eager:
                self._answers()

    def _install(self, answer: Page[_Wanted], came: int) -> None:
        block, page = answer.block, answer.page
        region = self.placer.map.region(block, page)
        host = region.page_size // PAGE_SIZE
        if len(answer.content) not in (0, host * PAGE_SIZE):
            raise RemoteProtocolError("an answer that is no host page")
        if self.placer.view(block)[page] and self.job.removing is None:
            # asked for twice, and both answers came
            at = region.address + (page - region.first) * PAGE_SIZE
            wake(self.uffd, at, region.page_size)
        elif self.placer.view(block)[page]:
            self.placer.zero(region, page, host)  # given back meanwhile, or here already
        elif host == 1 and len(answer.content):
            self.placer.install_page(region, page, answer.content)
        else:
            self.placer.install(block, page, host, answer.content)
        now = time.monotonic_ns()
        if not answer.token.again:  # else it is not known which request this answers
            self.took = max(1, came - answer.token.asked - answer.held)
        self.session.placed(answer.number)
        sums = self.sums
        sums["normal" if len(answer.content) else "duplicate"] += host
        sums["wire_bytes"] += len(answer.content)
        sums["held_ns"] += answer.held
        sums["install_ns"] += now - came
        sums["answered"] += 1
        self._close(block, page, now)

    def _close(self, block: int, page: int, now: int) -> None:
        """Nobody waits for this page any more."""
        wanted = self.wanted.pop((block, page), None)
        if wanted is not None:
            self.waiting.remove(block, page)
            self.session.forget(wanted.number)
            self.latency.add(now - wanted.since)

    def _arrived(self, block: int, page: int, when: int) -> None:
        """If a receiver has installed it, the wait is over."""
        if (block, page) in self.wanted and self.placer.view(block)[page]:
            self._close(block, page, when)

    def _arrivals(self) -> None:
        """What receivers say they installed."""
        try:
            data = os.read(self.arrivals, ARRIVAL.size * _ARRIVALS)
        except BlockingIOError:
            return
        for block, page, when in ARRIVAL.iter_unpack(data):
            self._arrived(block, page, when)

    # ---- now and then --------------------------------------------------------------------

    def _look_after(self) -> None:
        """Report what is placed; look at waits that nobody told the end of, ask again."""
        now = time.monotonic()
        if self.session.unsaid and now - self.reported > _REPORT_SECONDS:
            self._report()
        if now - self.looked < HEARTBEAT_SECONDS / 2:
            return
        self.looked = now
        if self.link is not None and self.link.broken:
            self._broke()
        self._report(also_nothing=True)  # makes good a report that was lost
        for wanted in list(self.wanted.values()):
            self._arrived(wanted.block, wanted.page, time.monotonic_ns())
            waits = time.monotonic_ns() - wanted.asked
            if waits > ASK_AGAIN_SECONDS * 1e9 and (wanted.block, wanted.page) in self.wanted:
                self._ask(wanted)

    def _report(self, *, also_nothing: bool = False) -> None:
        for name, amount in self.sums.items():
            if amount:
                self.row.add(name, amount)
                self.sums[name] = 0
        while self.link is not None and (self.session.unsaid or also_nothing):
            also_nothing = False
            if not self.link.send(self.session.report()):
                break
        self.reported = time.monotonic()
