"""Where pages go at the destination: into a file, or, once its memory is armed, into the guest.

Before the switchover receivers write the file that is guest memory (ram.py). In postcopy they
install pages in the guest's address space (UFFDIO_COPY): the kernel does each once and wakes who
sleeps on it. A zero page is installed as well, never skipped: a hole would be a fault that
nobody answers. Host pages above 4 KiB are put together here and installed whole.
Knows no socket and nothing of frames but their runs.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..transport.errors import RemoteProtocolError, WorkerDied
from ..transport.pages import PAGE_SIZE, Runs, pages_of, runs_of
from ..transport.wire import Buffer
from .counters import Row
from .guests.base import ArmedMemory, Region
from .kernel.userfaultfd import Installer, MemoryChanging
from .preemption import page_key
from .ram import RamBlock
from .received import Received, Waiting

# What a receiver tells the fault process: block, page, CLOCK_MONOTONIC. Below PIPE_BUF: atomic.
ARRIVAL = struct.Struct("<QQQ")
# With memory that may be given back: pages installed before others have a turn with the lock.
_LOCKED_PAGES = 64
_LOCK_SECONDS = 30.0
# Host pages that one channel may have begun and not finished: a frame or two were lost.
_MAX_PARTIAL = 16


def address_of(content: Buffer) -> int:
    """Where a buffer is in our memory. It must outlive the use of the address."""
    return int(np.frombuffer(content, np.uint8).__array_interface__["data"][0])


class GuestMap:
    """From pages to guest addresses and back."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions
        self._by_address = sorted(regions, key=lambda r: r.address)
        self._addresses = [r.address for r in self._by_address]
        self._by_page = sorted(regions, key=lambda r: (r.block, r.first))
        self._pages = [(r.block, r.first) for r in self._by_page]

    def region(self, block: int, page: int) -> Region:
        """The region that holds a page; RemoteProtocolError if none does."""
        at = bisect.bisect_right(self._pages, (block, page)) - 1
        if at >= 0:
            region = self._by_page[at]
            if region.block == block and page < region.first + region.pages:
                return region
        raise RemoteProtocolError(f"page {page} of block {block} is nowhere in the guest")

    def locate(self, address: int) -> tuple[Region, int] | None:
        """Region and page at a guest address."""
        at = bisect.bisect_right(self._addresses, address) - 1
        if at < 0:
            return None
        region = self._by_address[at]
        page = (address - region.address) // PAGE_SIZE
        return (region, region.first + page) if page < region.pages else None


class GuestPlacer:
    """Installs pages in an armed guest.

    A guest that gives memory back (`lock`) makes a page's content stale: what it removed is marked
    received, and is not installed any more. That a page is not removed between our look and our
    install is the lock's work: the fault process holds it while it reads and marks removals, who
    installs holds it from the look to the end of the install. Where the kernel says that the
    map is changing, it is let go, `on_changing` is called, and looked at again.
    """

    def __init__(
        self,
        memory: ArmedMemory,
        received: Received,
        row: Row,
        lock: Any = None,
        on_changing: Callable[[], None] | None = None,
    ) -> None:
        self.map = GuestMap(memory.regions)
        self._installer = Installer(memory.uffd)
        self._staging = bytearray(PAGE_SIZE)
        self._staged = address_of(self._staging)
        self._received = received
        self._views: dict[int, Any] = {}
        self._row = row
        self._lock = lock
        self._on_changing = on_changing or _a_moment

    def changing(self) -> bool:
        """After all regions were unregistered: somebody still waits for an event to be read."""
        return any(self._installer.changing(r.address) for r in self.map.regions)

    def view(self, block: int) -> Any:
        """Received bytes of a block."""
        if block not in self._views:
            self._views[block] = memoryview(self._received.view(block).data)
        return self._views[block]

    def install(self, block: int, page: int, count: int, content: Buffer) -> None:
        """Install `count` pages from `page`, whole host pages; empty `content` means zeros."""
        at, end = page, page + count
        base = address_of(content) if len(content) else 0
        while at < end:
            region = self.map.region(block, at)
            n = min(end, region.first + region.pages) - at
            source = base + (at - page) * PAGE_SIZE if base else 0
            if self._lock is None:
                self._copy_all(region, at, source, n * PAGE_SIZE)
                self.view(block)[at : at + n] = b"\1" * n
            else:
                self._install_what_is_not_removed(region, at, n, source)
            at += n

    def install_page(self, region: Region, page: int, content: Buffer) -> None:
        """`install` for one page of 4 KiB with content, at a third of the cost."""
        if self._lock is not None:
            self.install(region.block, page, 1, content)
            return
        self._staging[:] = content
        self._copy_all(region, page, self._staged, PAGE_SIZE)
        self.view(region.block)[page] = 1

    def zero(self, region: Region, page: int, count: int) -> bool:
        """Wake who sleeps on a host page that is received: zeros where nothing is there.

        True if zeros were installed; that a page was there is no second arrival of it.
        """
        return self._copy_again(region, page, 0, count * PAGE_SIZE) == 0

    def _copy_all(self, region: Region, page: int, source: int, length: int) -> None:
        self._count(self._copy_again(region, page, source, length))

    def _copy_again(self, region: Region, page: int, source: int, length: int) -> int:
        """`_copy`, again where the kernel had to break off."""
        done = there = 0
        while True:
            try:
                at = source + done if source else 0
                there += self._copy(region, page + done // PAGE_SIZE, at, length - done)
            except MemoryChanging as e:
                done += e.done
                self._on_changing()
            else:
                return there

    def _count(self, there: int) -> None:
        if there:
            self._row.add("already_there", there // PAGE_SIZE)

    def _install_what_is_not_removed(
        self, region: Region, page: int, count: int, source: int
    ) -> None:
        view = self.view(region.block)
        host = region.page_size // PAGE_SIZE
        step = max(_LOCKED_PAGES, host)
        at, end = page, page + count
        while at < end:
            changing = False
            if not self._lock.acquire(timeout=_LOCK_SECONDS):
                raise WorkerDied("a process died while it installed pages")
            try:
                n = 0
                while at + n < end and n < step and not view[at + n]:
                    n += host
                if n:
                    from_ = source + (at - page) * PAGE_SIZE if source else 0
                    try:
                        self._count(self._copy(region, at, from_, n * PAGE_SIZE))
                    except MemoryChanging as e:
                        n, changing = e.done // PAGE_SIZE, True
                    view[at : at + n] = b"\1" * n
                    at += n
                else:
                    at += host  # it is here, or was given back
            finally:
                self._lock.release()
            if changing:
                self._on_changing()

    def _copy(self, region: Region, page: int, source: int, length: int) -> int:
        """Install; bytes that were there. MemoryChanging only where memory may be given back."""
        address = region.address + (page - region.first) * PAGE_SIZE
        if source:
            there = self._installer.copy(address, source, length, region.page_size)
        elif region.page_size == PAGE_SIZE:
            there = self._installer.zero(address, length, region.page_size)
        else:  # the kernel has no zero page of hugetlbfs to give
            there, zeros = 0, bytes(region.page_size)
            for at in range(0, length, region.page_size):
                there += self._installer.copy(
                    address + at, address_of(zeros), region.page_size, region.page_size
                )
        return there


def _a_moment() -> None:
    """The fault process reads what changes; until then."""
    time.sleep(0.0001)


class FramePlacer:
    """A receiver's: whole frames, and word to the fault process about pages it waits for."""

    def __init__(
        self, blocks: list[RamBlock], placer: GuestPlacer, waiting: Waiting, tell: int
    ) -> None:
        self._host = [block.spec.page_size // PAGE_SIZE for block in blocks]
        self._placer = placer
        self._waiting = waiting.words()
        self._tell = tell
        self._partial: dict[tuple[int, int], tuple[bytearray, set[int]]] = {}

    def wanted(self, block: int, runs: Runs) -> Runs:
        """Those of `runs` that have not come by another way. Parts of a host page all have to."""
        if self._host[block] > 1:
            return runs
        pages = pages_of(runs)
        return runs_of(pages[np.frombuffer(self._placer.view(block), np.uint8)[pages] == 0])

    def place(self, block: int, runs: Runs, content: Buffer) -> None:
        """The pages of `runs`; empty `content` means zeros."""
        view, at = memoryview(content), 0
        for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
            part = view[at : at + count * PAGE_SIZE] if view else view
            at += count * PAGE_SIZE
            if self._host[block] == 1:
                self._placer.install(block, first, count, part)
            else:
                self._gather(block, first, count, part)

    def _gather(self, block: int, first: int, count: int, content: memoryview) -> None:
        """Put host pages together; install those that are whole."""
        host = self._host[block]
        at = first
        while at < first + count:
            begin = at // host * host
            n = min(first + count, begin + host) - at
            key = (block, begin)
            if key not in self._partial:
                if len(self._partial) >= _MAX_PARTIAL:
                    raise RemoteProtocolError("too many host pages were begun and not finished")
                self._partial[key] = (bytearray(host * PAGE_SIZE), set())
            buffer, have = self._partial[key]
            if len(content):
                source = (at - first) * PAGE_SIZE
                target = (at - begin) * PAGE_SIZE
                buffer[target : target + n * PAGE_SIZE] = content[source : source + n * PAGE_SIZE]
            have.update(range(at, at + n))
            if len(have) == host:
                del self._partial[key]
                self._placer.install(block, begin, host, buffer)
            at += n

    def tell_arrivals(self, block: int, tables: tuple[Runs, ...]) -> None:
        """Tell the fault process which of these it waits for. Call when no lock is held."""
        words = self._waiting[self._waiting != 0]
        if not len(words):
            return
        now = time.monotonic_ns()
        host = self._host[block]
        for runs in tables:
            if not len(runs[0]):
                continue
            pages = pages_of(runs)
            keys = (pages // host * host + page_key(block, 0)).astype(np.uint64)
            for key in np.intersect1d(words, keys).tolist():
                # a full pipe means that nobody reads; then a look from time to time finds it
                with contextlib.suppress(BlockingIOError):
                    os.write(self._tell, ARRIVAL.pack(block, key - page_key(block, 0), now))
