"""Who saves which chunk of a guest that goes on writing: one byte a chunk, in shared memory.

    TODO       protected; nobody's
    CLAIMED    somebody's, for good; still protected
    FREE       copied by its owner, and no longer protected: the guest may write it
    SAVED      its owner has written it to the file, with digest and bits
    WRITTEN    before the instant that is saved: let go, to be protected once more

Who writes, and when, so that no two ever write the same byte:
  1. Before the instant the coordinator protects all memory once, while the guest runs and all
     bytes are TODO. The guard alone stores WRITTEN, then lets a chunk go that is written.
  2. At the instant the guest stands still and the guard is held: it has said so, and lets nothing
     go until it is told to. The coordinator alone protects what is WRITTEN, then stores TODO.
  3. From then on TODO becomes CLAIMED by `claim` alone, under one lock, for background savers and
     guard alike. The owner alone (a) copies, (b) lets go, (c) stores FREE, (d) writes the file,
     the digests and bits of the chunk, (e) stores SAVED.
So a chunk is copied before its first write (a before b; nobody else lets go of it), is copied once
(one claim finds it TODO), and what the guest writes after (b) is nobody's business. A writer that
slept before (b) is woken by (b); one that fell asleep just then has left a message, which the guard
reads: it wakes, but not before it sees (c), so that the writer finds the chunk let go.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..transport.errors import WorkerDied
from ..transport.pages import Bytes8
from .segments import Segment

TODO, CLAIMED, FREE, SAVED, WRITTEN = 0, 1, 2, 3, 4
# Claims take microseconds; one that died while it held the lock is seen by its coordinator.
_LOCK_SECONDS = 30.0


class Claims:
    """States of all chunks of all blocks. `lock`: one that processes share, if the guest writes."""

    def __init__(self, chunks: list[int], lock: Any = None) -> None:
        self._chunks = chunks
        self._lock = lock
        self._offsets = np.concatenate(([0], np.cumsum(chunks))).tolist()
        self._segment = Segment(max(1, sum(chunks)), "claims")

    def view(self, block: int) -> Bytes8:
        """The bytes of one block, writable. Mind the rules above."""
        view: Bytes8 = self._segment.array(np.uint8, self._chunks[block], self._offsets[block])
        return view

    def claim(self, view: Bytes8, first: int, count: int) -> list[int]:
        """Those of `count` chunks from `first` that are TODO, now CLAIMED and the caller's."""
        found = np.flatnonzero(view[first : first + count] == TODO) + first
        if not len(found):
            return []
        if self._lock is None:
            view[found] = CLAIMED
            return [int(chunk) for chunk in found]
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise WorkerDied("a process died while it claimed memory")
        try:
            found = found[view[found] == TODO]
            view[found] = CLAIMED
        finally:
            self._lock.release()
        return [int(chunk) for chunk in found]

    def all_saved(self) -> bool:
        return bool((self._segment.array(np.uint8, self._offsets[-1]) == SAVED).all())

    def close(self) -> None:
        self._segment.close()
