"""What is at the destination is what was read at the source: page sums (`--verify` of memory that
nobody writes).

All bytes are compared in the receiver: raw pages by the sum of the payload, packed ones, when they
are unpacked, by a sum that their sender took before it packed them. Then they are written, and
some of them are read back out of the file and compared: a piece of each frame, another one each
time, a sixteenth of all; or all of them, if that was asked for. Reading back finds what was written
to a wrong place, or not at all. It reads what is in the page cache, so that it says nothing of
storage. A sixteenth costs two or three hundredths of the processor time of the fastest moves (codec
none, in memory), all of it a tenth to a fifth.

What has been compared has a 1 in Checks, one byte a page. What has none in the end must read as
zeros, except what the source left out because both ends had the same digest of it; holes are known
without reading.

Checks: a page belongs to one sender in a round, and barriers lie between rounds, so its byte has
one writer at a time: that sender's receiver, before it acknowledges the frame; after the last
barrier the coordinator.
"""

from __future__ import annotations

import errno
import os

import numpy as np
import numpy.typing as npt
import xxhash

from ..transport.errors import DestinationError, RemoteProtocolError
from ..transport.pages import PAGE_SIZE, Bytes8, Runs, mark
from ..transport.wire import Buffer
from .digest import CHUNK_PAGES, PART_PAGES
from .ram import RamBlock
from .segments import Segment

# Read at a time; and read back of each frame, unless all is.
PIECE = 64 << 10
_PIECE_PAGES = PIECE // PAGE_SIZE
# Of Checks: an image of 256 GiB.
MOST_RESERVED = 64 << 20


class Checks:
    """One byte a page of all blocks: 1 for what was read back as the source had read it."""

    def __init__(self, pages: list[int]) -> None:
        self.pages = pages
        self._offsets = np.concatenate(([0], np.cumsum(pages))).tolist()
        size = max(1, sum(pages))
        # taken now where that is little: what a peer announces takes no memory by itself
        self._segment = Segment(size, "checks", reserve=size <= MOST_RESERVED)

    def view(self, block: int) -> Bytes8:
        """The bytes of one block, writable."""
        view: Bytes8 = self._segment.array(np.uint8, self.pages[block], self._offsets[block])
        return view

    def keep(self, kept: list[bytes]) -> None:
        """Coordinator: these chunks were left out, because they are here. RemoteProtocolError if
        that is not a bit a chunk."""
        if len(kept) != len(self.pages):
            raise RemoteProtocolError(f"what was kept of {len(kept)} blocks of {len(self.pages)}")
        for block, (bits, pages) in enumerate(zip(kept, self.pages, strict=True)):
            chunks = -(-pages // CHUNK_PAGES)
            if len(bits) != -(-chunks // 8):
                raise RemoteProtocolError(f"{len(bits)} bytes of bits for {chunks} chunks")
            view = self.view(block)
            which = np.unpackbits(np.frombuffer(bits, np.uint8), count=chunks)
            for chunk in np.flatnonzero(which).tolist():
                view[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES] = 1

    def close(self) -> None:
        self._segment.close()


class ReadBack:
    """A receiver's: reads pages of files that it has written. `all_of_it`: not only some."""

    def __init__(self, blocks: list[RamBlock], checks: Checks, all_of_it: bool) -> None:
        self._all = all_of_it
        self._blocks = blocks
        self._views = [checks.view(i) for i in range(len(blocks))]
        self._piece = memoryview(bytearray(PIECE))

    def same(self, block: int, runs: Runs, content: Buffer, number: int) -> bool:
        """True if the file holds `content` at the pages of `runs`, as far as is looked at.
        `number` of the frame says where that is."""
        view = memoryview(content)
        if not self._all:
            return not len(runs[0]) or self._same_piece(block, runs, view, number)
        at = 0
        for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
            for page in range(0, count, _PIECE_PAGES):
                n = min(_PIECE_PAGES, count - page) * PAGE_SIZE
                if not self._equal(block, first + page, view[at : at + n]):
                    return False
                at += n
        return True

    def _same_piece(self, block: int, runs: Runs, view: memoryview, number: int) -> bool:
        """One piece of one run."""
        number, which = divmod(number, len(runs[0]))
        before = int(runs[1][:which].sum()) if which else 0
        count = int(runs[1][which])
        page = number * _PIECE_PAGES % (-(-count // _PIECE_PAGES) * _PIECE_PAGES)
        at, n = (before + page) * PAGE_SIZE, min(_PIECE_PAGES, count - page) * PAGE_SIZE
        return self._equal(block, int(runs[0][which]) + page, view[at : at + n])

    def _equal(self, block: int, page: int, content: memoryview) -> bool:
        """True if the file holds this at `page`. Behind the end of a block nothing is held, and
        anything is equal."""
        ram = self._blocks[block]
        content = content[: ram.size - page * PAGE_SIZE]
        read = self._piece[: len(content)]
        read_block(ram, page * PAGE_SIZE, read)
        digest = xxhash.xxh3_64_intdigest  # of both: comparing two memoryviews is slow
        return digest(read) == digest(content)

    def note(self, block: int, runs: Runs, good: bool) -> None:
        """They were read back as the source had read them; or they are to be zero, and what was
        read back of them before counts no more."""
        mark(self._views[block], runs, int(good))

    def unsent(self, block: int, part: int) -> int:
        """How many pages of a part hold something that did not come with a sum."""
        first = part * PART_PAGES
        checked = self._views[block][first : first + PART_PAGES]
        gaps = _gaps(checked, self._blocks[block], first)
        return sum(self._not_zero(block, first + at, n) for at, n in gaps)

    def _not_zero(self, block: int, first: int, count: int) -> int:
        ram, wrong = self._blocks[block], 0
        for at in range(first, first + count, _PIECE_PAGES):
            view = self._piece[: min(_PIECE_PAGES, first + count - at) * PAGE_SIZE]
            there = min(len(view), ram.size - at * PAGE_SIZE)
            read_block(ram, at * PAGE_SIZE, view[:there])
            view[there:] = bytes(len(view) - there)
            pages = np.frombuffer(view, np.uint64).reshape(-1, PAGE_SIZE // 8)
            wrong += int(np.count_nonzero(pages.any(axis=1)))
        return wrong

    def close(self) -> None:
        self._views.clear()


def _gaps(checked: Bytes8, block: RamBlock, first: int) -> list[tuple[int, int]]:
    """Runs (start, count) of pages from `first` that were not checked and are no hole. One
    lseek(2) for each run that was not checked, at the most."""
    edges = np.flatnonzero(np.diff(np.concatenate(([1], checked, [1])).astype(np.int8)))
    found, data = [], -1
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if data < start:
            data = _next_data(block, first + start) - first
        if data < end:
            begin = max(start, data)
            found.append((begin, end - begin))
    return found


def _next_data(block: RamBlock, page: int) -> int:
    """The first page from `page` that holds data, or one behind the block."""
    offset = block.start + page * PAGE_SIZE
    try:
        return (os.lseek(block.file.fd, offset, os.SEEK_DATA) - block.start) // PAGE_SIZE
    except OSError as e:
        return block.pages if e.errno == errno.ENXIO else page


def read_block(block: RamBlock, offset: int, view: memoryview) -> None:
    """Fill `view` with the block from byte `offset`."""
    at = 0
    while at < len(view):
        try:
            n = os.preadv(block.file.fd, [view[at:]], block.start + offset + at)
        except OSError as e:
            raise DestinationError(f"cannot read {block.file.name}: {e.strerror}") from e
        if n == 0:
            raise DestinationError(f"{block.file.name} became shorter while it was written")
        at += n


def pack_chunks(equal: npt.NDArray[np.bool_] | list[bool]) -> bytes:
    """Which chunks of a block were left out, as DigestRequest says it."""
    return np.packbits(np.array(equal, np.uint8)).tobytes()
