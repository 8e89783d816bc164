"""The guard: in a live snapshot, the process that saves a chunk before the guest's first write.

Reads the userfaultfd: who writes what is protected sleeps until the chunk is copied and let go,
which takes some ten microseconds here. The copy is written to the file by a thread of its own, so
that nobody waits for storage, as long as there is room for copies. One process, at real-time
priority where that is permitted, but for that thread. The order of its shared writes, and why
nobody sleeps for ever, is in claims.py. In QEMU, ram_save_queue_pages of a background snapshot.

If memory is given back by madvise (a balloon) meanwhile, what it held may be lost, and so is the
snapshot: it fails.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import sys
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from queue import SimpleQueue

from ..transport.errors import LocalProtocolError, SourceError
from ..transport.pages import PAGE_SIZE
from ..transport.snapshot_format import CHUNK_BYTES, CHUNK_PAGES
from . import jobs
from .claims import CLAIMED, FREE, SAVED, TODO, WRITTEN
from .kernel.userfaultfd import READ_MESSAGES, Fault, Removed, read_messages, wake
from .placing import GuestMap
from .priority import become_urgent, collect_seldom
from .process import HEARTBEAT_SECONDS, Desk, run_worker, traced
from .saver import Keeper, LettingGo, SaverJob, read_chunks

# Copies that wait to be written: 64 MiB. When there are more, writers wait for storage.
_SLOTS = 1024
# A chunk that a saver is copying is looked at again so often: that takes it some 200 us.
_LOOK_SECONDS = 0.0005
# The thread that writes takes the interpreter for no longer, while somebody waits.
_SWITCH_SECONDS = 0.0001
_A_MOMENT = 0.00005


def main(pipe: Connection, index: int, job: SaverJob) -> None:
    run_worker(
        "pf-guard", pipe, job.counters, index, lambda desk: traced(desk, Guard)(desk, job).run()
    )


class Guard:
    """The process's one object. `saving`: the instant was; before it, nothing has to be saved."""

    def __init__(self, desk: Desk, job: SaverJob) -> None:
        assert job.memory is not None
        self.desk, self.job, self.row = desk, job, desk.row
        self.uffd = job.memory.uffd
        self.map = GuestMap(job.memory.regions)
        self.letting_go = LettingGo(job.memory, self._while_changing)
        self.keeper = Keeper(job, desk.row)
        self.views = [job.claims.view(i) for i in range(len(job.blocks))]
        self.slots = memoryview(mmap.mmap(-1, _SLOTS * CHUNK_BYTES))
        self.free: SimpleQueue[int] = SimpleQueue()
        for slot in range(_SLOTS):
            self.free.put(slot)
        # slot, block, chunk, content; None at the end
        self.kept: SimpleQueue[tuple[int, int, int, memoryview] | None] = SimpleQueue()
        self.failed: Exception | None = None  # of the thread that writes
        self.faults: deque[Fault] = deque()
        self.copied: list[tuple[int, int]] = []  # by a saver, right now; somebody sleeps on them
        self.saving = self.held = self.finishing = False

    def run(self) -> None:
        self.row.set("priority", become_urgent())
        collect_seldom()
        poll = select.poll()
        poll.register(self.desk.pipe.fileno(), select.POLLIN)
        poll.register(self.uffd, select.POLLIN)
        sys.setswitchinterval(_SWITCH_SECONDS)
        writing = self.begin_writing()
        self.desk.say(jobs.Ready())
        try:
            while True:
                while self.desk.waiting():
                    if not self._command(self.desk.take()):
                        return
                if self.failed is not None:
                    raise self.failed
                if self.held:
                    self.desk.pipe.poll(HEARTBEAT_SECONDS)
                    continue
                self._serve()
                if self.finishing and self.free.qsize() == _SLOTS:
                    self.finishing = False
                    self.desk.say(jobs.Ready())
                soon = self.copied or self.finishing
                poll.poll((_LOOK_SECONDS if soon else HEARTBEAT_SECONDS) * 1000)
        finally:
            self.failed = self.failed or LocalProtocolError("it was told to stop")  # write no more
            self.kept.put(None)
            writing.join()

    def begin_writing(self) -> threading.Thread:
        """Start the thread that writes; it ends behind None."""

        def write() -> None:
            with contextlib.suppress(OSError):  # of this thread alone (sched(7))
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            while (item := self.kept.get()) is not None:
                try:
                    if self.failed is None:
                        self._write(*item)
                except Exception as e:
                    self.failed = e
                finally:
                    self.free.put(item[0])  # whoever waits for room is not left waiting

        thread = threading.Thread(target=write, name="guard-writes", daemon=True)
        thread.start()
        return thread

    def _command(self, job: jobs.AnyJob) -> bool:
        match job:
            case jobs.Stop():
                return False
            case jobs.Hold():
                # Nothing is let go any more. What was read has been served: `_serve` ends with it.
                self.held, self.saving = job.on, True
                self.desk.say(jobs.Ready(token=job.token))
            case jobs.Finish():
                self.finishing = True
            case job:
                raise LocalProtocolError(f"the guard was told {type(job).__name__}")
        return True

    # ---- writers -------------------------------------------------------------------------

    def _serve(self) -> None:
        """All who sleep now."""
        more = True
        while more:
            more = self._read()
            came = time.monotonic_ns()
            while self.faults:
                found = self.map.locate(self.faults.popleft().address)
                if found is not None:
                    self._fault(found[0].block, found[1] // CHUNK_PAGES, came)
        self._look_again()

    def _read(self) -> bool:
        """Take what the kernel says; True if there may be more."""
        events = read_messages(self.uffd)
        for event in events:
            if isinstance(event, Removed):
                self._removed(event)
            else:
                self.faults.append(event)
        return len(events) == READ_MESSAGES

    def _while_changing(self) -> None:
        """The guest waits for its removal to be read."""
        self._read()
        time.sleep(_A_MOMENT)  # not a yield: at real-time priority that lets nobody run

    def _fault(self, block: int, chunk: int, came: int) -> None:
        view = self.views[block]
        if not self.saving:
            view[chunk] = WRITTEN
            self.letting_go(block, chunk, 1)
        elif view[chunk] == TODO and self.job.claims.claim(view, chunk, 1):
            self._save(block, chunk)
            self.row.add("requests", 1)
            self.row.add("held_ns", time.monotonic_ns() - came)
        else:
            self.copied.append((block, chunk))
            self.row.add("elsewhere", 1)

    def _save(self, block: int, chunk: int) -> None:
        slot = self.free.get()
        buffer = self.slots[slot * CHUNK_BYTES : (slot + 1) * CHUNK_BYTES]
        content = read_chunks(self.job.blocks[block], chunk, 1, buffer)
        self.letting_go(block, chunk, 1)
        self.views[block][chunk] = FREE
        self.kept.put((slot, block, chunk, content))

    def _write(self, slot: int, block: int, chunk: int, content: memoryview) -> None:
        self.keeper.keep(block, chunk, content)
        self.views[block][chunk] = SAVED

    def _look_again(self) -> None:
        """Who sleeps on what somebody else let go meanwhile goes on: it was woken, or, if it fell
        asleep just then, it is now."""
        waiting, self.copied = self.copied, []
        for block, chunk in waiting:
            if self.views[block][chunk] in (TODO, CLAIMED):
                self.copied.append((block, chunk))
                continue
            for address, length in self.letting_go.where(block, chunk, 1):
                wake(self.uffd, address, length)

    def _removed(self, event: Removed) -> None:
        """Whether it was saved before cannot be told: QEMU punches holes first."""
        for region in self.map.regions:
            end = region.address + region.pages * PAGE_SIZE
            if self.saving and event.start < end and region.address < event.end:
                raise SourceError(
                    "the guest gave memory back (a balloon, madvise) while it was being saved: "
                    "start again, or take the snapshot without --live"
                )
