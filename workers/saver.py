"""A saver: one process that writes memory of a guest to a snapshot, each page at its place.

Takes extents from the coordinator. Of each it claims what is nobody's, a window at a time, copies
it, lets the guest write it again (in a live snapshot), and then looks for zeros, takes digests and
writes: so the guest never waits for storage. The order of its shared writes is in claims.py;
whom the guest does not let wait is guard.py. Knows no kind of guest.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from ..transport import snapshot_format as form
from ..transport.errors import LocalProtocolError, SourceError
from ..transport.pages import PAGE_SIZE, WORDS, runs_of
from ..transport.snapshot_format import CHUNK_BYTES, CHUNK_PAGES
from . import jobs
from .claims import FREE, SAVED, Claims
from .counters import Counters, Row
from .guests.base import ArmedMemory, Region
from .inspection import zero_pages
from .kernel.userfaultfd import write_protect
from .priority import become_background
from .process import HEARTBEAT_SECONDS, Desk, run_worker, traced
from .ram import RamBlock
from .snapshot_file import Tables

# Claimed, copied and written together. Of a guest that goes on less: a write waits for so much to
# be copied, some 50 us.
_WINDOW, _LIVE_WINDOW = 16, 4
_A_MOMENT = 0.00005
_ZERO_DIGESTS: dict[int, bytes] = {}


@dataclass
class SaverJob:
    """Everything a saver or the guard needs, pickled into it once. `targets`: the snapshot's
    memory, a block each; `memory`: only of a live snapshot."""

    blocks: list[RamBlock]
    targets: list[RamBlock]
    tables: Tables
    claims: Claims
    counters: Counters
    memory: ArmedMemory | None = None


def main(pipe: Connection, index: int, job: SaverJob) -> None:
    run_worker(
        f"pf-save-{index}",
        pipe,
        job.counters,
        index,
        lambda desk: traced(desk, Saver)(desk, job).run(),
    )


class Saver:
    """The process's one object."""

    def __init__(self, desk: Desk, job: SaverJob) -> None:
        self.desk, self.job = desk, job
        self.keeper = Keeper(job, desk.row)
        self.letting_go = LettingGo(job.memory) if job.memory is not None else None
        self.window = _LIVE_WINDOW if job.memory is not None else _WINDOW
        # aligned, as direct I/O wants it
        self.buffer = memoryview(mmap.mmap(-1, self.window * CHUNK_BYTES))
        self.views = [job.claims.view(i) for i in range(len(job.blocks))]

    def run(self) -> None:
        if self.job.memory is not None:
            become_background()
        self.desk.say(jobs.Ready())
        while True:
            if not self.desk.pipe.poll(HEARTBEAT_SECONDS):
                continue
            match self.desk.take():
                case jobs.Stop():
                    return
                case jobs.Extent() as extent:
                    self._save(extent)
                    self.desk.say(jobs.ExtentDone(0))
                case job:
                    raise LocalProtocolError(f"a saver was told {type(job).__name__}")

    def _save(self, extent: jobs.Extent) -> None:
        first, last = extent.first // CHUNK_PAGES, -(-(extent.first + extent.count) // CHUNK_PAGES)
        for at in range(first, last, self.window):
            count = min(self.window, last - at)
            mine = self.job.claims.claim(self.views[extent.block], at, count)
            for chunk, n in stretches(mine):
                self._save_chunks(extent.block, chunk, n)

    def _save_chunks(self, block: int, first: int, count: int) -> None:
        """Chunks that are ours, next to each other."""
        view = self.views[block]
        content = read_chunks(self.job.blocks[block], first, count, self.buffer)
        if self.letting_go is not None:
            self.letting_go(block, first, count)
        view[first : first + count] = FREE
        self.keeper.keep(block, first, content)
        view[first : first + count] = SAVED


def stretches(chunks: list[int]) -> list[tuple[int, int]]:
    """First and number of those that follow each other."""
    starts, counts = runs_of(np.array(chunks, np.int64))
    return list(zip(starts.tolist(), counts.tolist(), strict=True))


def read_chunks(block: RamBlock, first: int, count: int, buffer: memoryview) -> memoryview:
    """Copy chunks of a block into `buffer`; that part of it, a last partial page padded with zeros.
    Read, not mapped: a hole that is looked at through a mapping becomes memory."""
    begin = first * CHUNK_BYTES
    length = min(count * CHUNK_BYTES, block.size - begin)
    view, at = buffer[:length], 0
    while at < length:
        n = os.preadv(block.file.fd, [view[at:]], block.start + begin + at)
        if n == 0:
            raise SourceError(f"{block.file.name} became shorter while it was saved")
        at += n
    whole = -(-length // PAGE_SIZE) * PAGE_SIZE
    buffer[length:whole] = bytes(whole - length)
    return buffer[:whole]


class LettingGo:
    """Lets the guest write chunks again, wherever it has them. `on_changing`: called while its map
    is changing, again and again."""

    def __init__(
        self, memory: ArmedMemory, on_changing: Callable[[], None] = lambda: time.sleep(_A_MOMENT)
    ) -> None:
        self._uffd = memory.uffd
        self._regions = memory.regions
        self._on_changing = on_changing
        by_block: dict[int, list[Region]] = {}
        for region in memory.regions:
            by_block.setdefault(region.block, []).append(region)
        self._by_block = by_block

    def __call__(self, block: int, first: int, count: int, *, on: bool = False) -> None:
        """`on`: protect them, instead."""
        for address, length in self.where(block, first, count):
            while not write_protect(self._uffd, address, length, on=on):
                self._on_changing()

    def where(self, block: int, first: int, count: int) -> list[tuple[int, int]]:
        """Addresses and lengths of those chunks."""
        begin, end = first * CHUNK_PAGES, (first + count) * CHUNK_PAGES
        found = []
        for region in self._by_block.get(block, ()):
            low, high = max(begin, region.first), min(end, region.first + region.pages)
            if low < high:
                address = region.address + (low - region.first) * PAGE_SIZE
                found.append((address, (high - low) * PAGE_SIZE))
        return found


class Keeper:
    """Writes copied chunks to the snapshot, with their digests and bits. Its caller owns them."""

    def __init__(self, job: SaverJob, row: Row) -> None:
        self._targets, self._row = job.targets, row
        self._digests = [job.tables.digests(i) for i in range(len(job.blocks))]
        self._bits = [job.tables.bits(i) for i in range(len(job.blocks))]

    def keep(self, block: int, first: int, content: memoryview) -> None:
        """Whole chunks from chunk `first`; only the last of a block may be shorter."""
        words = np.frombuffer(content, np.uint64).reshape(-1, WORDS)
        there = ~zero_pages(words)
        self._note(block, first, content, there)
        starts, counts = runs_of(np.flatnonzero(there))
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            begin = start * PAGE_SIZE
            part = content[begin : begin + count * PAGE_SIZE]
            self._targets[block].write(first * CHUNK_PAGES + start, part)
        pages = int(np.count_nonzero(there))
        self._row.add("normal", pages)
        self._row.add("duplicate", len(there) - pages)
        self._row.add("wire_bytes", pages * PAGE_SIZE)

    def _note(
        self, block: int, first: int, content: memoryview, there: npt.NDArray[np.bool_]
    ) -> None:
        count = -(-len(there) // CHUNK_PAGES)
        bits = np.zeros(count * CHUNK_PAGES, np.bool_)
        bits[: len(there)] = there
        packed = np.packbits(bits, bitorder="little").reshape(count, -1)
        self._bits[block][first : first + count] = packed
        full = np.asarray(bits.reshape(count, -1).any(axis=1))
        digests = []
        for i in range(count):
            part = content[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
            digests.append(form.digest(part) if full[i] else _zero_digest(len(part)))
        self._digests[block][first : first + count] = np.frombuffer(
            b"".join(digests), np.uint8
        ).reshape(count, -1)


def _zero_digest(length: int) -> bytes:
    if length not in _ZERO_DIGESTS:
        _ZERO_DIGESTS[length] = form.digest(bytes(length))
    return _ZERO_DIGESTS[length]
