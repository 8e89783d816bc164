"""Numbers each worker writes and the coordinator reads, in shared memory.

One row of 64-bit integers a worker, one writer a field (the heartbeat thread has its own),
aligned, so that a read is never torn.
Readers may see one field before another: these are statistics, not decisions.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from .segments import Segment
from .usage import cpu_ns, own_memory

if TYPE_CHECKING:
    from .tracing import Recorder, Rings, Writer

FIELDS = (
    "heartbeat_ns",  # CLOCK_MONOTONIC of the last sign of life
    "normal",  # pages sent or placed with their content
    "duplicate",  # zero pages
    "wire_bytes",  # frames as handed to ZeroMQ, headers included
    "frames",
    "lost_pages",  # of lost frames; they count twice in normal or duplicate
    "lost_frames",  # lost or damaged, sent again
    "stray_frames",  # from a connection that is not ours
    "raw_pages",  # of `normal`, those that travelled uncompressed
    "lz4_pages",
    "zstd_pages",
    "zlib_pages",
    "delta_pages",  # that travelled as what differs from the page sent before
    "xbzrle_pages",  # whose base the cache had; QEMU's XBZRLECacheStats, as what follows
    "xbzrle_bytes",  # of these as deltas, or whole, before another codec
    "xbzrle_misses",
    "xbzrle_overflow",
    "codec_ns",  # processor time spent in the codec
    "wait_ns",  # sender: waiting for credit, i.e. for the link or the destination
    "paced_ns",  # sender: waiting for max-bandwidth
    "cpu_ns",
    "peak_memory",  # bytes of its own, guest memory not counted
    "first_ns",  # CLOCK_MONOTONIC of the first frame
    # postcopy
    "paused_ns",  # sender: standing aside for requests
    "already_there",  # pages that somebody else had installed (EEXIST)
    "requests",  # urgent requests asked, or received
    "elsewhere",  # of these, answered "a multifd channel has it"
    "repeated",  # faults on a page that was asked for already
    "served_here",  # faults whose pages were read of a snapshot: nobody was asked
    "local_zero",  # faults on pages known to be zero: nobody was asked
    "asked_again",  # requests whose answer stayed away
    "resent",  # pages sent again
    "ask_ns",  # fault read to request sent, sum
    "held_ns",  # request received to answer sent, sum, as the source says
    "install_ns",  # answer received to page installed, sum
    "answered",  # what these three are sums of
    "on_wire_ns",  # request sent to answer received without held_ns, sum, as told to the source
    "on_wire",  # what this is a sum of
    "shortest_ns",  # the shortest of these
    "priority",  # priority.py
)
_INDEX = {name: i for i, name in enumerate(FIELDS)}


class Row:
    """One worker's numbers, for that worker to write."""

    def __init__(self, array: Any) -> None:
        self._array = memoryview(array)  # an item of it costs a tenth of one of numpy's
        self._peak = 0

    def add(self, field: str, amount: int) -> None:
        self._array[_INDEX[field]] += amount

    def set(self, field: str, value: int) -> None:
        self._array[_INDEX[field]] = value

    def beat(self) -> None:
        """A sign of life, with what this process has cost so far."""
        self.set("heartbeat_ns", time.monotonic_ns())
        self.set("cpu_ns", cpu_ns())
        self._peak = max(self._peak, own_memory())
        self.set("peak_memory", self._peak)


class Counters:
    """All rows. The coordinator owns the segment. With a `recorder` the workers are traced: then
    each has a ring as well, and the recorder reads it."""

    def __init__(self, workers: int, recorder: Recorder | None = None) -> None:
        self.workers = workers
        self.recorder = recorder
        self._segment = Segment(workers * len(FIELDS) * 8, "counters")
        self._rings: Rings | None = None
        if recorder is not None:
            from .tracing import Rings

            try:
                self._rings = Rings(workers)
            except BaseException:
                self._segment.close()
                raise

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"recorder": None}  # the coordinator's own

    def ring(self, worker: int) -> Writer | None:
        """Where that worker writes what it does, if it is traced."""
        return self._rings.writer(worker) if self._rings is not None else None

    def began(self, worker: int, name: str, pid: int | None) -> None:
        """The coordinator started a process for this row."""
        if self.recorder is not None and self._rings is not None and pid is not None:
            self.recorder.began(name, pid, self._rings.reader(worker))

    def ended(self, pid: int | None) -> None:
        """That process was waited for."""
        if self.recorder is not None and pid is not None:
            self.recorder.ended(pid)

    def row(self, worker: int) -> Row:
        return Row(self._segment.array(np.uint64, len(FIELDS), worker * len(FIELDS) * 8))

    def read(self, worker: int) -> dict[str, int]:
        array = self._segment.array(np.uint64, len(FIELDS), worker * len(FIELDS) * 8)
        return dict(zip(FIELDS, array.tolist(), strict=True))

    def total(self, field: str) -> int:
        array = self._segment.array(np.uint64, self.workers * len(FIELDS))
        return int(array[_INDEX[field] :: len(FIELDS)].sum())

    def freeze(self) -> FrozenCounters:
        """The numbers as they are now, for when the shared memory is gone."""
        return FrozenCounters([self.read(i) for i in range(self.workers)])

    def close(self) -> None:
        self._segment.close()
        if self._rings is not None:
            self._rings.close()


class FrozenCounters:
    """The last numbers of workers that are gone."""

    def __init__(self, rows: list[dict[str, int]]) -> None:
        self.workers = len(rows)
        self._rows = rows

    def read(self, worker: int) -> dict[str, int]:
        return self._rows[worker]

    def total(self, field: str) -> int:
        return sum(row[field] for row in self._rows)
