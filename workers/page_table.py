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

In postcopy the postcopy process takes pages out of the extents that senders work on, so
extents give no ownership any more. Then:
  3. DIRTY becomes IN_FLIGHT by `claim` alone, which senders and the postcopy process call under
     one lock, a whole host page at a time. Whoever claimed a page owns it for good: it alone
     writes CLEAN when the page was placed, and if a frame is lost it sends the page again
     itself; no page becomes DIRTY again. A page that is not DIRTY is somebody else's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..transport.errors import WorkerDied
from ..transport.pages import Bytes8, Pages, Runs, mark
from .segments import Segment

CLEAN, DIRTY, IN_FLIGHT = 0, 1, 2
# An extent covers whole groups of this many pages: 2 MiB, the usual host huge page.
GROUP = 512
# Pages counted at a time, so that 64 GiB of memory cost no 16 MiB temporary.
_STEP = GROUP * 2048
# Claims take microseconds, but the holder may be one that nobody lets run. One that died is seen
# by its coordinator, who ends the others.
_LOCK_SECONDS = 30.0
_CLAIMED = bytes([IN_FLIGHT]) * 512


class PageTable:
    """States of all pages of all blocks, in the order of the blocks. `lock`: a lock that
    processes share; needed for `claim` only."""

    def __init__(self, pages: list[int], lock: Any = None) -> None:
        self.pages = pages
        self._lock = lock
        self._offsets = np.concatenate(([0], np.cumsum(pages))).tolist()
        self._segment = Segment(max(1, sum(pages)), "pagetable")
        self._views: dict[int, Bytes8] = {}  # of a process that claims

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": {}}

    def view(self, block: int) -> Bytes8:
        """The bytes of one block, writable. Mind the rules above."""
        view: Bytes8 = self._segment.array(np.uint8, self.pages[block], self._offsets[block])
        return view

    def mark_dirty(self, block: int, runs: Runs) -> None:
        """Coordinator, between rounds."""
        mark(self.view(block), runs, DIRTY)

    def claim(self, block: int, first: int, count: int, most: int) -> Pages:
        """The first `most` DIRTY pages of [first, first + count), now IN_FLIGHT and the caller's.

        With host pages above 4 KiB, `first` and `most` are multiples of one, and the states of
        its pages are always the same.
        """
        view = self._views.get(block)
        if view is None:
            view = self._views[block] = self.view(block)
        # Looked for without the lock: held by somebody whom nobody lets run, it would stop the
        # postcopy process. What is DIRTY may be taken meanwhile; nothing becomes DIRTY again.
        found = candidates(view, first, count, most)
        if not len(found):
            return found
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise WorkerDied("a process died while it claimed pages")
        try:
            if not (view[found] == DIRTY).all():  # somebody was faster: look again
                found = candidates(view, first, count, most)
                if not len(found):
                    return found
            return claim(view, found)
        finally:
            self._lock.release()

    def claim_one(self, view: memoryview, page: int, count: int) -> bool:
        """Claim the host page of `count` pages at `page`, or none of it. `view`: the bytes of its
        block. What `claim` does, at a tenth of the cost."""
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise WorkerDied("a process died while it claimed pages")
        try:
            if view[page] != DIRTY:
                return False
            view[page : page + count] = _CLAIMED[:count]
            return True
        finally:
            self._lock.release()

    def renew_lock(self, lock: Any) -> None:
        """Coordinator, while there is no worker: whoever held the old one may be dead."""
        self._lock = lock

    def resume(self, block: int, received: Bytes8) -> None:
        """Coordinator, while nobody sends: what the destination has is CLEAN, the rest DIRTY."""
        self.view(block)[:] = np.where(received != 0, CLEAN, DIRTY)

    def whole_host_pages(self, block: int, host: int) -> None:
        """Coordinator, between rounds: a host page of `host` pages that is dirty anywhere is
        dirty everywhere, because it is installed whole."""
        view = self.view(block)
        whole = len(view) // host * host
        groups = view[:whole].reshape(-1, host)
        groups[(groups != CLEAN).any(axis=1)] = DIRTY
        if (view[whole:] != CLEAN).any():
            view[whole:] = DIRTY

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
        self._views.clear()
        self._segment.close()
        self._lock = None  # its name goes with the last who has it


def candidates(table: Bytes8, first: int, count: int, most: int) -> Pages:
    """The first `most` DIRTY pages of a stretch, as they are now."""
    # nearly always they are the next ones
    if (table[first : first + min(most, count)] == DIRTY).all():
        return np.arange(first, first + min(most, count), dtype=np.int64)
    return np.flatnonzero(table[first : first + count] == DIRTY)[:most] + first


def claim(table: Bytes8, found: Pages) -> Pages:
    """The claim itself, on the bytes of one block; the caller holds the lock. Those of `found` that
    are still DIRTY, now IN_FLIGHT."""
    first, last = int(found[0]), int(found[-1]) + 1
    if last - first == len(found):
        part = table[first:last]
        if (part == DIRTY).all():
            part[:] = IN_FLIGHT
            return found
    found = found[table[found] == DIRTY]
    table[found] = IN_FLIGHT
    return found
