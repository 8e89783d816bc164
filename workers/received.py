"""The destination's memory of a postcopy: which pages have arrived, and which are waited for.

Received, one byte a page. Before the guest is armed the coordinator alone writes: 0 for each page
that is still to come, 1 for every other (it is there, or it is a hole and reads as zero). From then
on a byte only goes from 0 to 1, after the page was installed; receivers and the fault process all
write it, and as they write the same value it does not matter who comes first.

Waiting, up to 1024 words: the pages that the fault process waits for, written by it alone. A
receiver that has installed pages looks for them here and tells the fault process, so that it knows
when a page came by a multifd channel. Order: the fault process stores the word, then asks the
source; a receiver (1) installs, (2) stores Received, (3) releases a lock, (4) reads Waiting. If it
reads too early, the source's answer ("elsewhere") finds (2) done. Only the statistics are at stake:
the kernel wakes who sleeps. Touches no guest memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..transport.errors import RemoteProtocolError
from ..transport.pages import Bytes8, Runs, mark
from .preemption import page_key
from .segments import Segment

WAITING_SLOTS = 1024


class Received:
    """One byte a page of all blocks."""

    def __init__(self, pages: list[int]) -> None:
        self.pages = pages
        self._offsets = np.concatenate(([0], np.cumsum(pages))).tolist()
        self._segment = Segment(max(1, sum(pages)), "received")
        self._segment.array(np.uint8, self._segment.size)[:] = 1

    def view(self, block: int) -> Bytes8:
        """The bytes of one block, writable."""
        view: Bytes8 = self._segment.array(np.uint8, self.pages[block], self._offsets[block])
        return view

    def expect(self, block: int, runs: Runs) -> None:
        """Coordinator, before anything is armed: these pages are to come."""
        mark(self.view(block), runs, 0)

    def missing(self) -> int:
        """Pages that have not arrived."""
        n = int(self._offsets[-1])
        return n - int(np.count_nonzero(self._segment.array(np.uint8, n)))

    def packed(self) -> list[bytes]:
        """A bit a page, a string a block."""
        return [np.packbits(self.view(i)).tobytes() for i in range(len(self.pages))]

    def close(self) -> None:
        self._segment.close()


def unpack(bits: bytes, pages: int) -> Bytes8:
    """What `packed` said of a block of `pages` pages; RemoteProtocolError if it cannot be that."""
    if len(bits) != -(-pages // 8):
        raise RemoteProtocolError(f"a received bitmap of {len(bits)} bytes for {pages} pages")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=pages)


class Waiting:
    """The words of the pages that are waited for."""

    def __init__(self) -> None:
        self._segment = Segment(WAITING_SLOTS * 8, "waiting")

    def words(self) -> Any:
        return self._segment.array(np.uint64, WAITING_SLOTS)

    def close(self) -> None:
        self._segment.close()


class WaitingWriter:
    """The fault process's."""

    def __init__(self, waiting: Waiting) -> None:
        words = waiting.words()
        words[:] = 0
        self._words = memoryview(words)
        self._free = list(range(WAITING_SLOTS - 1, -1, -1))
        self._slots: dict[int, int] = {}

    def add(self, block: int, page: int) -> None:
        """More than there are words are not told: a look from time to time finds them."""
        if self._free:
            key = page_key(block, page)
            slot = self._slots[key] = self._free.pop()
            self._words[slot] = key

    def remove(self, block: int, page: int) -> None:
        slot = self._slots.pop(page_key(block, page), None)
        if slot is not None:
            self._words[slot] = 0
            self._free.append(slot)
