"""`pageferry snapshot`: a guest as it is at one instant, in a file, and the guest goes on.

Without `live` it stands still while savers write. With it:

    1. its memory is registered; the guard serves writes; all memory is protected, while it runs
    2. stop the guest, take its device state, hold the guard, protect what was written since
    3. the guard saves from now on; the guest goes on. This pause is all that it notices
    4. savers go through all memory; what the guest writes before they come is saved by the guard
    5. let go of everything, write the index, sync
    6. give the file its name: from here on nothing that fails, and no cancel, changes how it ends

Whatever fails before that: the file goes, everything is let go, the guest goes on. If this process
is killed, the kernel lets go (guests keep no descriptor). Touches no memory itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from .._version import __version__
from ..transport.errors import (
    LocalProtocolError,
    PageferryError,
    PeerLost,
    SourceError,
    UsageError,
    as_ours,
)
from ..transport.pages import PAGE_SIZE
from ..transport.snapshot_format import CHUNK_PAGES
from ..workers import guard, jobs, saver
from ..workers.claims import TODO, WRITTEN, Claims
from ..workers.counters import Counters
from ..workers.forking import context, end_a_hung_server
from ..workers.guests.base import ArmedMemory, SourceGuest
from ..workers.guests.protecting import changed, regions_of
from ..workers.pool import Pool, Worker
from ..workers.saver import LettingGo, SaverJob, stretches
from ..workers.snapshot_file import SnapshotWriter
from . import narration
from .blocking import Blocking, to_its_end
from .callbacks import tell
from .crew import Crew
from .journal import Journal
from .state import Status
from .statistics import Statistics

# An extent: 16 MiB. Chunks that are protected at a time, 2 MiB: a write waits for no more.
_EXTENT_PAGES = 4096
_PROTECTED_CHUNKS = 32
_WATCH_SECONDS = 0.25
# A guest that stands still and whose memory map stays about to change is not waited for.
_CHANGING_SECONDS = 1.0
# What has not come to an end so long after a yank is ended by force.
_YANK_SECONDS = 0.5
_log = logging.getLogger("pageferry")
_T = TypeVar("_T")


class Snapshot:
    """One snapshot of `guest` at `path`."""

    def __init__(
        self,
        guest: SourceGuest,
        path: str,
        workers: int,
        *,
        live: bool = False,
        direct: bool = False,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if guest.live and not guest.can_stop:
            raise SourceError(
                "this memory cannot be stopped, so that no instant can be saved: say who writes it "
                "(ram:PATH?pid=PID)"
            )
        self.guest = guest
        guest.stays = True
        self.live = live and guest.live  # what nobody writes needs no care
        self.statistics = Statistics("snapshot")
        self.status = Status.NONE
        self.on_progress = on_progress
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda name, data: None
        self.journal = Journal("snapshot", "")
        self._path, self._workers, self._direct = path, workers, direct
        self._call = Blocking()
        self._failure: asyncio.Future[None] | None = None
        self._writer: SnapshotWriter | None = None
        self._memory: ArmedMemory | None = None
        self._claims: Claims | None = None
        self._crew: Crew | None = None
        self._guard: Pool | None = None
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._watching: asyncio.Task[None] | None = None
        self._stopped = self._resuming = self._saved = False
        self._driving = self._publishing = False
        self._task: asyncio.Task[Any] | None = None

    def __repr__(self) -> str:
        return f"<Snapshot {self.guest.kind} to {self._path} {self.status.value}>"

    # ---- what others may ask -------------------------------------------------------------

    def cancel(self) -> None:
        """The file goes; the guest goes on. Without effect once the file is to get its name."""
        if self._task is None or self._publishing:
            return
        if self.status in (Status.SETUP, Status.ACTIVE):
            self._become(Status.CANCELLING)
        self._task.cancel()

    def can_be_yanked(self) -> bool:
        """Whether there is something to cut: from the start until everything is let go of."""
        return self._driving

    def yank(self) -> None:
        """Cut everything that may hang: workers, the guest's monitor. It fails, and the guest goes
        on. It may have failed before, and hang on its way to the end."""
        _log.warning("yanked: nothing is waited for any more")
        self.guest.yank()
        for pool in self._pools():
            if pool is not None:
                pool.hurry()
        asyncio.get_running_loop().call_later(_YANK_SECONDS, self._end_a_hung_start)
        if not self._publishing:
            self._fail(PeerLost("yanked: somebody had it cut, because it hung"))

    def _end_a_hung_start(self) -> None:
        """Others' processes end with the fork server: so only if we wait for it ourselves."""
        if any(pool is not None and pool.is_starting for pool in self._pools()):
            end_a_hung_server()

    def _pools(self) -> tuple[Pool | None, Pool | None]:
        return self._crew.pool if self._crew is not None else None, self._guard

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        raise UsageError("a snapshot has nothing that can be set while it is taken")

    def query_parameters(self) -> dict[str, Any]:
        """QEMU's names for what it was asked to be like."""
        return {
            "multifd-channels": self._workers, "background-snapshot": self.live,
            "direct-io": self._direct,
        }  # fmt: skip

    def query_processes(self) -> list[dict[str, Any]]:
        """What each process has cost so far, as `processes` of the result."""
        return self.statistics.processes_now(*self._pools())

    def start_postcopy(self) -> None:
        raise UsageError("a snapshot has no postcopy: `pageferry restore --lazy` is one")

    def go_on(self) -> None:
        """It never waits."""

    def pause(self) -> None:
        raise UsageError("a snapshot cannot pause: cancel it, and take it again")

    def recover(self, where: str | None) -> None:
        raise UsageError("a snapshot never pauses")

    def query(self) -> dict[str, Any]:
        """As query-migrate."""
        report = self.statistics.report(self.status, None)
        rate, written = self.statistics.rates()
        left = self.statistics.remaining_pages * PAGE_SIZE
        report["progress"] = {
            "rate": round(rate), "wire-rate": round(written), "dirty-rate": 0,
            "round-bytes": self.statistics.round_pages * PAGE_SIZE,
            "eta": round(left / rate, 1) if rate else None,
        }  # fmt: skip
        return report

    # ---- the run -------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Returns the report, raises the error."""
        self._task = asyncio.current_task()
        self._failure = asyncio.get_running_loop().create_future()
        self._driving = True
        self._become(Status.SETUP)
        try:
            await self._unless_it_fails(self._save())
            await self._publish()
        except Exception as e:
            error = as_ours(e)
            self._become(Status.FAILED, error.message)
            await self._close_whatever_comes(error)
            error.data["report"] = self._last_report()
            raise error from e
        except asyncio.CancelledError:
            await self._close_whatever_comes()
            self._become(Status.CANCELLED)
            self._last_report()
            raise
        self._become(Status.COMPLETED)
        try:
            await self._close_whatever_comes()
        except Exception as e:  # the guest goes on, and the file is there: so it is said
            _log.warning("the snapshot is whole, but not all could be let go of: %s", e)
        return self._last_report()

    async def _close_whatever_comes(self, error: PageferryError | None = None) -> None:
        """A cancel meanwhile (a second one, or one that is too late) changes nothing of how it has
        ended, and whoever watches hears of that."""
        with contextlib.suppress(asyncio.CancelledError):
            await to_its_end(self._close(error))

    def _become(self, status: Status, why: str = "") -> None:
        self.status = status
        self.journal.became(status, why)
        tell(self.on_event, "MIGRATION", {"status": status.value})

    def _last_report(self) -> dict[str, Any]:
        self._driving = False
        report = self.query()
        report.pop("progress")
        self.journal.round_ends()
        self.journal.over(narration.ended(report))
        return report

    async def _unless_it_fails(self, work: Awaitable[_T]) -> _T:
        """`work`, unless a process fails, or the guest ends, meanwhile."""
        assert self._failure is not None
        task = asyncio.ensure_future(work)
        both: list[asyncio.Future[Any]] = [task, self._failure]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._failure.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._failure.done():
                self._failure.exception()

    def _fail(self, error: Exception) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    def _failed(self, error: Exception) -> None:
        """A process: when all is saved, none is needed any more."""
        if not self._saved:
            self._fail(error)

    async def _save(self) -> None:
        """All of it to disk, but without a name."""
        during = self.journal.during
        await during("start", self._start)
        self._watching = asyncio.ensure_future(self._watch())
        pages = self.statistics.total_pages = sum(block.pages for block in self.guest.blocks)
        self.statistics.begin_round(1, pages)  # what the guard saves in its first moments, too
        if self.live:
            state = await self._instant()
            self._begin()
        else:
            self._begin()
            state = await during("stand still", self._stand_still)
        await during("save", self._save_all)
        await during("go on", self._call, self._go_on)
        await during("sync", self._finish, state)

    def _begin(self) -> None:
        """From now on memory is saved."""
        self._become(Status.ACTIVE)
        self.statistics.set_up = time.monotonic()
        self.journal.round_begins(1, self.statistics.total_pages)
        tell(self.on_event, "MIGRATION_PASS", {"pass": 1})

    async def _save_all(self) -> None:
        assert self._crew is not None and self._claims is not None
        await self._crew.distribute(self._extents(), jobs.ExtentDone, lambda reply: None)
        if self.live:
            await self._ask_guard(jobs.Finish())
        if not self._claims.all_saved():
            raise LocalProtocolError("some memory was saved by nobody")

    async def _finish(self, state: bytes) -> None:
        assert self._writer is not None
        guest = self.guest
        taken = await self._call(
            self._writer.finish, guest.kind, guest.running, guest.image_size, __version__, state
        )
        self.statistics.extra |= {"file-bytes": taken, "file": self._path}

    async def _publish(self) -> None:
        """Whoever cancels it from here on comes too late: the file is there."""
        assert self._writer is not None
        self._publishing = True
        with contextlib.suppress(asyncio.CancelledError):
            await to_its_end(self._call(self._writer.publish))
        self.statistics.ended = time.monotonic()

    async def attach(self) -> None:
        """All for which root may be needed. `run` does it, unless it is done."""
        if self.live and self._memory is None:
            self._memory = await self._call(self.guest.protect)

    async def close(self) -> None:
        """Let go of what was attached to and never ran. Idempotent."""
        await self._let_go()
        self._close_memory()

    # ---- processes -----------------------------------------------------------------------

    async def _start(self) -> None:
        guest = self.guest
        self._writer = await self._call(self._open)
        await self.attach()
        lock = context().Lock() if self.live else None
        chunks = [-(-block.pages // CHUNK_PAGES) for block in guest.blocks]
        self._claims = Claims(chunks, lock)
        counters = self.statistics.counters = Counters(self._workers, self.journal.lane)
        self._crew = Crew(counters, self._failed)
        self._crew.pool.role = "saver"
        await self._crew.pool.start(saver.main, [self._job(counters)] * self._workers)
        if self.live:
            self.statistics.urgent = Counters(1, self.journal.lane)
            self._guard = Pool("guard", self.statistics.urgent, self._on_guard, self._failed)
            await self._guard.start(guard.main, [self._job(self.statistics.urgent)])
            await self._answers.get()
        await self._crew.gather(jobs.Ready)

    def _open(self) -> SnapshotWriter:
        blocks = self.guest.blocks
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self._path)
            if any(os.path.samestat(there, os.fstat(block.file.fd)) for block in blocks):
                raise UsageError(f"{self._path} is the memory that is to be saved: name another")
        return SnapshotWriter(self._path, [block.spec for block in blocks], direct=self._direct)

    def _job(self, counters: Counters) -> SaverJob:
        assert self._writer is not None and self._claims is not None
        return SaverJob(
            self.guest.blocks, self._writer.targets, self._writer.tables, self._claims, counters,
            self._memory,
        )  # fmt: skip

    def _on_guard(self, worker: Worker, job: jobs.AnyJob) -> None:
        if isinstance(job, jobs.Ready):
            self._answers.put_nowait(job.token)
        else:
            self._fail(LocalProtocolError(f"{worker!r} said {job!r}"))

    async def _ask_guard(self, job: jobs.AnyJob) -> None:
        assert self._guard is not None
        self._guard.say_all(job)
        await self._answers.get()

    def _extents(self) -> Iterator[jobs.AnyJob]:
        for i, block in enumerate(self.guest.blocks):
            for first in range(0, block.pages, _EXTENT_PAGES):
                count = min(_EXTENT_PAGES, block.pages - first)
                yield jobs.Extent(i, first, count, self.live)

    async def _watch(self) -> None:
        try:
            while True:
                for pool in self._pools():
                    if pool is not None and not self._saved:
                        pool.check()
                # that it goes on is no surprise then; nor, when all is saved, that it ends
                if not (self._resuming or self._saved):
                    self.guest.check()
                self._progress()
                await asyncio.sleep(_WATCH_SECONDS)
        except PageferryError as e:
            self._fail(e)

    def _progress(self) -> None:
        if self.on_progress is not None:
            tell(self.on_progress, self.query())

    # ---- the instant ---------------------------------------------------------------------

    async def _stand_still(self) -> bytes:
        """From now to `_go_on`; its device state."""
        if self.guest.live:
            await self._stop()
        return await self._call(self.guest.save_state)

    async def _stop(self) -> None:
        self._stopped = True  # first: whatever comes, it goes on
        begin = time.monotonic()
        await self._call(self.guest.stop)
        self.statistics.stopped = self.guest.stopped_at or begin

    async def _instant(self) -> bytes:
        """The guest stands still for as long as it takes to protect what it wrote since all was
        protected; its device state."""
        assert self._memory is not None
        during = self.journal.during
        await during("protect", self._call, self._protect_all)
        await during("stop", self._stop)
        state: bytes = await during("device state", self._call, self.guest.save_state)
        # before its memory is protected: devices may write to it as they are saved
        await self._ask_guard(jobs.Hold(secrets.token_bytes(4), True))
        again = await during("protect again", self._call, self._protect_again)
        self.statistics.extra["protected-again"] = again
        await self._ask_guard(jobs.Hold(secrets.token_bytes(4), False))
        await during("resume", self._call, self._resume)
        return state

    def _protect_all(self) -> None:
        """While the guest runs, and the guard lets go what it writes."""
        assert self._memory is not None
        protect = LettingGo(self._memory)
        for i, block in enumerate(self.guest.blocks):
            chunks = -(-block.pages // CHUNK_PAGES)
            for first in range(0, chunks, _PROTECTED_CHUNKS):
                protect(i, first, min(_PROTECTED_CHUNKS, chunks - first), on=True)

    def _protect_again(self) -> int:
        """What was let go meanwhile. The guest stands still, the guard is held; chunks."""
        assert self._memory is not None and self._claims is not None
        until = time.monotonic() + _CHANGING_SECONDS

        def on_changing() -> None:
            if time.monotonic() > until:
                raise SourceError("the guest was changing its memory map just then: start again")
            time.sleep(0)

        protect, count = LettingGo(self._memory, on_changing), 0
        for i in range(len(self.guest.blocks)):
            view = self._claims.view(i)
            written = [int(chunk) for chunk in (view == WRITTEN).nonzero()[0]]
            for first, n in stretches(written):
                protect(i, first, n, on=True)
                view[first : first + n] = TODO
            count += len(written)
        return count

    def _resume(self) -> None:
        self._resuming = True
        try:
            self.guest.resume()
        finally:
            self._resuming = False
        self._stopped = False
        self.statistics.running = time.monotonic()

    def _go_on(self) -> None:
        """All is saved: hold nothing back any more."""
        if self._stopped:
            self.guest.check()  # somebody let it go on since the last look: of no one instant
        if self._memory is not None:
            pid = self.guest.process
            if pid and regions_of(pid, self.guest.blocks) != self._memory.regions:
                raise changed(pid)  # what was written there was not seen
            self._memory.disarm()
        self._saved = True
        if self._stopped:
            self._resume()

    # ---- the end -------------------------------------------------------------------------

    async def _close(self, error: PageferryError | None) -> None:
        """Each step is taken whatever became of the others: nobody may sleep for ever."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        first: Exception | None = None
        for step in (self._let_go, self._end_processes, self._let_run):
            try:
                await step()
            except Exception as e:
                if error is not None:
                    error.message += f"; and then: {e}"
                first = first or e
        self._progress_at_end()
        if error is None and first is not None:
            raise first

    async def _let_go(self) -> None:
        """First: a guest may sleep, and its stop or resume with it."""
        if self._memory is not None:
            with contextlib.suppress(OSError):  # it has ended, or maps it no more
                self._memory.disarm()
        left = await self._call.idle()  # of somebody who was not waited for
        if isinstance(left, ArmedMemory) and self._memory is None:
            self._memory = left
        if isinstance(left, SnapshotWriter) and self._writer is None:
            self._writer = left

    async def _end_processes(self) -> None:
        pools = self._pools()
        for pool in pools:
            if pool is not None:
                if self.status is not Status.COMPLETED:
                    pool.hurry()
                await pool.close()
        self.statistics.remember_processes(*pools)
        self._close_memory()
        if self._claims is not None:
            self._claims.close()
        if self._writer is not None:
            self._writer.discard()

    def _close_memory(self) -> None:
        """Ours is the last descriptor: the kernel wakes who sleeps even so."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    async def _let_run(self) -> None:
        if self._stopped:
            await self._call(self._resume)

    def _progress_at_end(self) -> None:
        statistics = self.statistics
        if self.live and statistics.urgent is not None:
            faults, spent = statistics.urgent.total("requests"), statistics.urgent.total("held_ns")
            statistics.extra["writes-held-back"] = faults
            statistics.extra["held-back-us"] = round(spent / 1000 / faults, 1) if faults else 0
        for name in ("counters", "urgent"):
            counters = getattr(statistics, name)
            if isinstance(counters, Counters):
                setattr(statistics, name, counters.freeze())
                counters.close()
        self._progress()
