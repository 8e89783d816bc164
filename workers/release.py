"""Gives a guest's memory back at its source as it arrives elsewhere (QEMU: release-ram).

Only what the page table says is CLEAN, and only once the guest runs at the destination: before
that it may have to go on here. Order, for each page: (1) the destination installs it, (2) notes it
as received, (3) acknowledges its frame, or says PLACED; (4) whoever claimed the page stores CLEAN;
(5) the coordinator, alone, looks, (6) punches it out. So what is not here any more is received
there, whatever is killed in between, and a recovery, which makes DIRTY what is not received, never
makes it of such a page. Where host pages are above 4 KiB, receivers acknowledge parts of one that
they have put by and not installed: a host page is given back when all of it is CLEAN.

Knows no link and no migration. Nothing is shared: the coordinator calls it in its event loop.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from ..transport.pages import PAGE_SIZE, Bytes8, runs_of
from .page_table import CLEAN, PageTable
from .ram import RamBlock

# Pages looked at together: 1 GiB, some hundred microseconds.
_WINDOW = 1 << 18
# Pages punched between two looks at the clock.
_PIECE = 1 << 12


def may_go(states: Bytes8, host: int) -> npt.NDArray[np.bool_]:
    """Which pages may be given back, by their states in the page table: those of host pages (of
    `host` pages) that are CLEAN as a whole."""
    clean: npt.NDArray[np.bool_] = states == CLEAN
    return clean if host == 1 else np.repeat(clean.reshape(-1, host).all(axis=1), host)


class Release:
    """What of some blocks was given back. A byte a page."""

    def __init__(self, blocks: list[RamBlock], table: PageTable) -> None:
        self._blocks = blocks
        self._table = table
        self._gone: list[npt.NDArray[np.bool_]] = [np.zeros(b.pages, np.bool_) for b in blocks]
        self._windows = [
            (i, at) for i, block in enumerate(blocks) for at in range(0, block.pages, _WINDOW)
        ]
        self._next = 0
        self.pages = 0

    def __repr__(self) -> str:
        return f"<Release {self.pages} pages>"

    def some(self, seconds: float) -> bool:
        """Give back what can be, for so long at the most; False if there was nothing."""
        until, before = time.monotonic() + seconds, self.pages
        for _ in self._windows:
            if not self._of_window(*self._windows[self._next], until):
                break  # there is more in there
            self._next = (self._next + 1) % len(self._windows)
            if time.monotonic() > until:
                break
        return self.pages > before

    def _of_window(self, index: int, first: int, until: float) -> bool:
        """True if all that can be given back of a window is."""
        block, gone = self._blocks[index], self._gone[index]
        part = slice(first, first + _WINDOW)
        may = may_go(self._table.view(index)[part], block.spec.page_size // PAGE_SIZE)
        pages = np.flatnonzero(may & ~gone[part]) + first
        for at in range(0, len(pages), _PIECE):
            if at and time.monotonic() > until:
                return False
            piece = pages[at : at + _PIECE]
            gone[piece] = True  # first: if that fails, some of it may have gone
            self.pages += len(piece)
            block.clear(runs_of(piece))
        return True

    def everything(self) -> None:
        """The destination has said that it has all of it."""
        for block, gone in zip(self._blocks, self._gone, strict=True):
            block.clear((np.array([0], np.int64), np.array([block.pages], np.int64)))
            gone[:] = True
        self.pages = sum(len(gone) for gone in self._gone)

    def lacking(self) -> int:
        """Pages that were given back and are to be sent all the same: none, if the destination
        keeps its word."""
        return sum(
            int(np.count_nonzero(gone & (self._table.view(i) != CLEAN)))
            for i, gone in enumerate(self._gone)
        )
