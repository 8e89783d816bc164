"""max-bandwidth: one virtual clock that all senders share.

The generic cell rate algorithm (ITU-T I.371): the clock says when the link is free again;
a frame moves it on by its size over the rate. Senders that have nothing to send take
nothing, so the others get it all, and the sum is exact whatever their number.

Shared memory, in order, under one lock held for microseconds: read rate, read clock, write
clock. A sender killed inside the lock is a dead worker, and the migration ends with it; the
others give up on the lock after a second and say so.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..transport.errors import UsageError, WorkerDied
from .forking import context
from .segments import Segment

# The clock may lag by this much: what a sender may send at once after a pause.
BURST_NS = 5_000_000
_LOCK_SECONDS = 1.0


class Bandwidth:
    """A rate in bytes a second; 0 means no limit."""

    def __init__(self, rate: int) -> None:
        self._lock: Any = context().Lock()
        if not 0 <= rate < 1 << 60:
            raise UsageError("max-bandwidth is out of range")
        self._segment = Segment(16, "bandwidth")
        self._words: Any = None
        self.set_rate(rate)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_words": None}

    def _clock(self) -> Any:
        """Rate and clock, mapped once: a memoryview costs a tenth of an array."""
        if self._words is None:
            self._words = memoryview(self._segment.array(np.int64, 2).data)
        return self._words

    def set_rate(self, rate: int) -> None:
        """Coordinator only. Takes effect with the next frame."""
        self._clock()[0] = rate

    def renew_lock(self, lock: Any) -> None:
        """Coordinator, while there is no sender: whoever held the old one may be dead."""
        self._lock = lock

    @property
    def rate(self) -> int:
        return int(self._clock()[0])

    def reserve(self, size: int, burst_ns: int = BURST_NS) -> int:
        """Nanoseconds to wait before `size` bytes may be sent; they are booked already."""
        rate = self.rate
        if rate == 0:
            return 0
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise WorkerDied("a sender died while it held the bandwidth lock")
        try:
            words = self._clock()
            now = time.monotonic_ns()
            begin = max(words[1], now - burst_ns)
            words[1] = begin + size * 1_000_000_000 // rate
        finally:
            self._lock.release()
        return max(0, int(begin) - now)

    def close(self) -> None:
        self._words = None
        self._segment.close()
        self._lock = None  # its name goes with the last who has it
