"""A sample of a source, for trial runs: some of its memory, copied into memory of our own, and a
destination that throws away what it gets.

The source is read and neither stopped nor changed. What the sample has of data and of holes is what
the source has; its pieces lie in an order in which every beginning of it is spread over the whole
source as well, so that a shorter trial takes the beginning. Knows nothing of why it is tried.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...transport.errors import HostLacks, SourceError
from ...transport.messages import MAX_SAMPLE, SAMPLE, Block, Hello
from ...transport.pages import NO_RUNS, PAGE_SIZE, Runs
from ..ram import RamBlock, RamFile
from ..segments import Segment
from .base import TRACKING_HASH, TRACKING_PAGEMAP, DestinationGuest, SourceGuest, layout_size
from .uri import GuestUri

PIECE_PAGES = 512  # 2 MiB: as the groups that extents are made of
# Written to see what the first touch of memory costs, so often.
_TOUCHED, _TOUCHES = 8 << 20, 5
# Kinds whose tracking attaches to a process: to be read they need not be.
_ATTACHED = ("qemu", "pid")


def readable(uri: GuestUri) -> GuestUri:
    """`uri`, opened so that nobody is attached to: a sample needs no tracking."""
    if uri.kind not in _ATTACHED:
        return uri
    return GuestUri(uri.kind, uri.rest, {**uri.options, "tracking": TRACKING_HASH})


@dataclass(frozen=True)
class _Piece:
    """Pages [first, first + pages) of the source's data, as if that had no holes."""

    first: int
    pages: int


def spread(data_pages: int, wanted: int) -> list[_Piece]:
    """Pieces of `data_pages` pages of data, `wanted` pages in all at the most (one piece at the
    least), evenly spread, in the order of their reversed bits: every beginning of the list is
    evenly spread, too (van der Corput's sequence)."""
    if wanted >= data_pages:
        count = -(-data_pages // PIECE_PAGES)
        starts = [i * PIECE_PAGES for i in range(count)]
    else:
        count = max(1, wanted // PIECE_PAGES)
        starts = [i * data_pages // count for i in range(count)]
    bits = max(1, (count - 1).bit_length())
    order = sorted(range(count), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [_Piece(starts[i], min(PIECE_PAGES, data_pages - starts[i])) for i in order]


class Sample:
    """Some memory of a source, in a shared-memory file of our own. Sizes in bytes.

    `size`: with holes; `data`: without; `share`: of the source's data that is in it.
    """

    def __init__(
        self, source: SourceGuest, limit: int, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Copy up to `limit` bytes of data; blocks for that long. `stop`: asked in between; if it
        says yes, Cancelled is for the caller to raise, and the sample is cut short."""
        self.live = source.live
        self.by_content = source.last_look_by_content or (
            source.tracking == TRACKING_HASH and source.kind in ("ram", "shm")
        )
        blocks = source.blocks
        runs = [source.initial_pages(i) for i in range(len(blocks))]
        data_pages = sum(int(counts.sum()) for _, counts in runs)
        all_pages = sum(block.pages for block in blocks)
        if data_pages == 0:
            raise SourceError("the source is all holes: there is nothing to try settings on")
        pieces = spread(data_pages, max(1, min(limit, MAX_SAMPLE) // PAGE_SIZE))
        kept = sum(piece.pages for piece in pieces)
        # holes behind each piece, in the proportion that the source has them
        room = MAX_SAMPLE // PAGE_SIZE // len(pieces) - PIECE_PAGES
        share = (all_pages - data_pages) / data_pages
        self._hole = max(0, min(round(PIECE_PAGES * share), room))
        self._stride = PIECE_PAGES + self._hole
        self.pieces = len(pieces)
        self.size = self.pieces * self._stride * PAGE_SIZE
        self.data, self.share = kept * PAGE_SIZE, kept / data_pages
        self.zero_share = 0.0
        self._segment = Segment(self.size, "sample", reserve=False)
        self._fd = -1
        try:
            self._fd = os.open(f"/dev/shm/{self._segment.name}", os.O_RDWR | os.O_CLOEXEC)
            self._fill(blocks, runs, pieces, stop)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Sample {self.data >> 20} MiB of data, {self.size >> 20} MiB>"

    def _fill(
        self,
        blocks: list[RamBlock],
        runs: list[Runs],
        pieces: list[_Piece],
        stop: Callable[[], bool],
    ) -> None:
        where = [
            (i, int(s), int(n)) for i, run in enumerate(runs) for s, n in zip(*run, strict=True)
        ]
        ends = np.cumsum([n for _, _, n in where])
        zero = 0
        for number, piece in enumerate(pieces):
            if stop():
                return
            content = b"".join(_read(blocks, where, ends, piece))
            words = np.frombuffer(content, np.uint64).reshape(-1, PAGE_SIZE // 8)
            zero += int(np.count_nonzero(~words.any(axis=1)))
            self._write(number * self._stride * PAGE_SIZE, content)
        self.zero_share = zero * PAGE_SIZE / self.data

    def _write(self, at: int, content: bytes) -> None:
        # by write(2): a full /dev/shm is an error here, and SIGBUS through a mapping
        view = memoryview(content)
        try:
            while view:
                n = os.pwrite(self._fd, view, at)
                view, at = view[n:], at + n
        except OSError as e:
            raise HostLacks(
                f"/dev/shm has no room for a sample of {self.data} bytes ({e.strerror}): enlarge "
                f"it, or ask for a smaller --sample"
            ) from e

    def guest(self, share: float = 1.0) -> SampleSource:
        """A source of the first `share` of it, a piece at the least."""
        pieces = min(self.pieces, max(1, round(self.pieces * share)))
        file = RamFile(os.dup(self._fd), "the sample")
        size = pieces * self._stride * PAGE_SIZE
        return SampleSource(file, size, live=self.live, by_content=self.by_content)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._segment.close()


def _read(blocks: list[RamBlock], where: Any, ends: Any, piece: _Piece) -> list[bytes]:
    """The content of a piece, padded with zeros to whole pages."""
    parts, at, end = [], piece.first, piece.first + piece.pages
    index = int(np.searchsorted(ends, at, side="right"))
    while at < end:
        block, first, count = where[index]
        inside = at - (int(ends[index]) - count)
        n = min(count - inside, end - at)
        data = blocks[block].read((first + inside) * PAGE_SIZE, n * PAGE_SIZE)
        parts.append(data.ljust(n * PAGE_SIZE, b"\0"))
        at, index = at + n, index + 1
    return parts


class SampleSource(SourceGuest):
    """A sample that leaves as its source would: copied before it is sent if that may be written
    meanwhile, hashed if that is. Nobody writes it."""

    kind = SAMPLE
    capabilities = (SAMPLE,)

    def __init__(self, file: RamFile, size: int, *, live: bool, by_content: bool) -> None:
        self._file = file
        self.blocks = [RamBlock(Block(SAMPLE, size), file, 0)]
        self.image_size = size
        self.live = self.can_stop = self.running = live
        if live:
            self.tracking = TRACKING_HASH if by_content else TRACKING_PAGEMAP

    def dirty_pages(self, block: int) -> Runs:
        return NO_RUNS

    def close(self) -> None:
        self._file.close()


class SampleDestination(DestinationGuest):
    """Anonymous memory, which goes with this object."""

    kind = SAMPLE

    def __init__(self) -> None:
        self._file: RamFile | None = None

    def lay_out(self, hello: Hello) -> None:
        first_touch()
        try:
            fd = os.memfd_create("pageferry-sample", os.MFD_CLOEXEC)
        except OSError as e:
            raise HostLacks(f"no memory for a trial run: {e.strerror}") from e
        self._file = RamFile(fd, "the trial's memory")
        os.ftruncate(fd, layout_size(hello.blocks, hello.image_size))
        self.blocks = [RamBlock(spec, self._file, spec.offset) for spec in hello.blocks]
        self.fresh = [True] * len(self.blocks)

    def run(self) -> str:
        return "thrown away"

    def discard(self) -> None:
        """Nothing looks whole; and a receiver may be starting, which takes the file along."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@functools.cache
def first_touch() -> float:
    """What a byte of memory costs more when it is written for the first time: seconds of
    processor time. Measured once a process, in about 30 ms; the least of some, since who shares
    the caches with us only adds."""
    chunk = bytes(1 << 20)
    return max(0.0, min(_write_twice(chunk) for _ in range(_TOUCHES)))


def _write_twice(chunk: bytes) -> float:
    """What new memory costs more than the same memory again, a byte."""
    fd = os.memfd_create("pageferry-touch", os.MFD_CLOEXEC)
    try:
        took = []
        for _ in range(2):
            begin = time.thread_time_ns()
            for at in range(0, _TOUCHED, len(chunk)):
                os.pwrite(fd, chunk, at)
            took.append(time.thread_time_ns() - begin)
    finally:
        os.close(fd)
    return (took[0] - took[1]) / 1e9 / _TOUCHED
