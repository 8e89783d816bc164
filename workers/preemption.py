"""What the postcopy process and the coordinator tell senders while the guest runs elsewhere.

Shared memory, 64-bit words, aligned, so that a read is never torn:

    open    requests that are being answered right now           written by the postcopy process
    front   the last host pages that were asked for while a       written by the postcopy process
            sender had them: that sender goes on with its page
    piece   pages in a frame; credit: bytes in flight a channel   written by the coordinator

Nothing here decides who sends a page (page_table.py does): a sender that reads an old word sends a
piece too early or too late, and that is all. Knows no socket and no page table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .segments import Segment

FRONT = 16
_OPEN, _FRONT, _PIECE, _CREDIT, _WORDS = 0, 1, 1 + FRONT, 2 + FRONT, 3 + FRONT


def page_key(block: int, page: int) -> int:
    """One word for a page of a block; never 0."""
    return (block << 40 | page) + 1


class Preemption:
    """The words. The coordinator owns the segment."""

    def __init__(self, piece_pages: int, credit: int) -> None:
        self._segment = Segment(_WORDS * 8, "preemption")
        self.pace(piece_pages, credit)

    def words(self) -> Any:
        return self._segment.array(np.uint64, _WORDS)

    def pace(self, piece_pages: int, credit: int) -> None:
        """Coordinator only."""
        words = self.words()
        words[_PIECE], words[_CREDIT] = piece_pages, credit

    def close(self) -> None:
        self._segment.close()


class Reader:
    """A sender's look at it."""

    def __init__(self, preemption: Preemption) -> None:
        self._words = memoryview(preemption.words().data)

    @property
    def request_open(self) -> bool:
        return bool(self._words[_OPEN])

    def in_front(self, key: int) -> bool:
        """True if somebody waits for this host page."""
        return key in self._words[_FRONT : _FRONT + FRONT].tolist()

    @property
    def piece_pages(self) -> int:
        return int(self._words[_PIECE])

    @property
    def credit(self) -> int:
        return int(self._words[_CREDIT])


class Writer:
    """The postcopy process's."""

    def __init__(self, preemption: Preemption) -> None:
        self._words = memoryview(preemption.words())
        self._next = 0
        self.open(0)  # a process before this one may have been killed while it answered

    def open(self, requests: int) -> None:
        self._words[_OPEN] = requests

    def to_front(self, key: int) -> None:
        self._words[_FRONT + self._next % FRONT] = key
        self._next += 1
