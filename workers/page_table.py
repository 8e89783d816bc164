"""One byte a page, in shared memory: what still has to travel.

    CLEAN      the destination has this page as it was when last taken
    DIRTY      must be sent
    IN_FLIGHT  a sender has begun to send it; nobody has acknowledged it

Who writes, and when, so that no two ever write the same byte:
  1. Between rounds, after the barrier, only the coordinator writes: DIRTY, from the tracker.
  2. During a round each page belongs to one extent and each extent to one sender, handed over
     by a message. That sender alone writes: IN_FLIGHT before the frame's first byte is
     sent, CLEAN when the receiver acknowledges it, DIRTY again when the frame is lost.
So at the end of a round every page that is not CLEAN is still to be sent, whatever happened
to the sender. Extents begin and end at host-page boundaries: a host page has one owner.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..transport.pages import Bytes8, Runs, mark
from .segments import Segment

CLEAN, DIRTY, IN_FLIGHT = 0, 1, 2
# An extent covers whole groups of this many pages: 2 MiB, the usual host huge page.
GROUP = 512
# Pages counted at a time, so that 64 GiB of memory cost no 16 MiB temporary.
_STEP = GROUP * 2048


class PageTable:
    """States of all pages of all blocks, in the order of the blocks."""

    def __init__(self, pages: list[int]) -> None:
        self.pages = pages
        self._offsets = np.concatenate(([0], np.cumsum(pages))).tolist()
        self._segment = Segment(max(1, sum(pages)), "pagetable")

    def view(self, block: int) -> Bytes8:
        """The bytes of one block, writable. Mind the rules above."""
        view: Bytes8 = self._segment.array(np.uint8, self.pages[block], self._offsets[block])
        return view

    def mark_dirty(self, block: int, runs: Runs) -> None:
        """Coordinator, between rounds."""
        mark(self.view(block), runs, DIRTY)

    def remaining(self) -> int:
        """Pages of all blocks that still have to travel."""
        return int(np.count_nonzero(self._segment.array(np.uint8, self._offsets[-1])))

    def group_counts(self, block: int, group: int = GROUP) -> npt.NDArray[np.int64]:
        """Dirty pages in each group of `group` pages of a block."""
        table = self.view(block)
        counts = []
        step = max(group, _STEP // group * group)
        for at in range(0, len(table), step):
            part = table[at : at + step] != CLEAN
            edges = np.arange(0, len(part), group)
            counts.append(np.add.reduceat(part, edges, dtype=np.int64))
        return np.concatenate(counts) if counts else np.empty(0, np.int64)

    def close(self) -> None:
        self._segment.close()
