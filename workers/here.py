"""Pages of a snapshot, read by whoever places them: where both ends of a restore are on one host.

A sender names the pages (a frame without content, HERE_ID), a receiver reads them from the file
itself: once, in large pieces, into a buffer that stays in the processor's cache. What was read is
compared with its digests there, and only then placed; so what is compared is what is placed,
whatever happens to the file. The fault process reads what somebody sleeps on in the same way.
Knows no socket, and nothing of who owns a page.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from ..transport.pages import PAGE_SIZE, Runs, pages_of, runs_of, total_pages
from ..transport.snapshot_format import CHUNK_BYTES, CHUNK_PAGES
from .ram import RamBlock
from .snapshot_file import CheckedBlock

# Read at once: as many as a frame has, if they lie together.
_CHUNKS = 16


def named(block: RamBlock) -> bytes:
    """What a frame says of a block that its receiver has as well; b"" if it is to be sent."""
    return block.stored.sum if isinstance(block, CheckedBlock) and block.here else b""


class HereReader:
    """Of one process. What it returns is good until it is asked again. VerificationFailed for what
    is damaged, SourceError for a file that became shorter."""

    def __init__(self, blocks: Sequence[CheckedBlock]) -> None:
        self._blocks = blocks
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # nothing shared is left behind (reserve.py)
        self._buffer = memoryview(mmap.mmap(-1, _CHUNKS * CHUNK_BYTES, flags))
        self._collected = bytearray()

    def has(self, block: int, name: memoryview) -> bool:
        """Whether that is what `named` says of the block."""
        return block < len(self._blocks) and named(self._blocks[block]) == name

    def stretch(self, block: int, first: int, count: int) -> memoryview:
        """`count` pages from `first`."""
        chunk = first // CHUNK_PAGES
        chunks = -(-(first + count) // CHUNK_PAGES) - chunk
        if chunks > _CHUNKS:
            return self._collect(block, (np.array([first]), np.array([count])))
        content = self._blocks[block].read_chunks(chunk, chunks, self._buffer)
        begin = (first - chunk * CHUNK_PAGES) * PAGE_SIZE
        return content[begin : begin + count * PAGE_SIZE]

    def read(self, block: int, runs: Runs) -> memoryview:
        """The pages of `runs`, one behind the other."""
        if not len(runs[0]):
            return memoryview(b"")
        if len(runs[0]) == 1:
            return self.stretch(block, int(runs[0][0]), int(runs[1][0]))
        return self._collect(block, runs)

    def _collect(self, block: int, runs: Runs) -> memoryview:
        """Where they do not lie together: read piece by piece, and put together."""
        size = total_pages(runs) * PAGE_SIZE
        if len(self._collected) < size:
            self._collected = bytearray(size)
        out = np.frombuffer(self._collected, np.uint8, size).reshape(-1, PAGE_SIZE)
        pages = pages_of(runs)
        starts, counts = runs_of(np.unique(pages // CHUNK_PAGES))
        at = 0
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            for chunk in range(start, start + count, _CHUNKS):
                n = min(_CHUNKS, start + count - chunk)
                content = self._blocks[block].read_chunks(chunk, n, self._buffer)
                there = np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)
                first, last = chunk * CHUNK_PAGES, (chunk + n) * CHUNK_PAGES
                mine = pages[at : np.searchsorted(pages, last)] - first
                np.take(there, mine, axis=0, out=out[at : at + len(mine)], mode="clip")
                at += len(mine)
        return out.reshape(-1).data
