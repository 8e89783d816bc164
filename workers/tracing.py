"""Trace rings: shared memory in which each worker writes what it did, and its coordinator reads it.

One ring a worker. Its words and records have one writer each:

| what | written by | when |
|---|---|---|
| record | the worker | (1) before head |
| head | the worker | (2) after the record; it only grows |
| dropped | the worker | in place of (1) and (2) when the ring is full |
| tail | the coordinator | when the records below it are copied; it only grows |

Nobody waits: a ring that is full loses the new record, and counts it. A processor that lets a later
store be seen first (aarch64) must not show a head without its record, and there is no barrier to be
had here: so each side believes the other's word one look later. What head was at a look is read at
the next, and what was copied at a look is given back at the next. When the worker has ended (it was
waited for), all is there and is read to the end.

Knows nothing of what a record means. Where tracing is off there is no ring, and no worker looks for
one while it works (traced.py).
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from .segments import Segment
from .trace_records import RECORD, Kind

# 1 MiB a worker. Looked at ten times a second: 160000 events a second and worker.
RING_RECORDS = 16384
# head and dropped in one cache line, tail in another
_HEAD, _DROPPED, _TAIL, _WORDS = 0, 1, 8, 16
_HEADER = _WORDS * 8


class Rings:
    """The rings of all workers of a role. The coordinator owns the segment."""

    def __init__(self, workers: int, records: int = RING_RECORDS) -> None:
        self.records = records
        self._size = _HEADER + records * RECORD.size
        self._segment = Segment(workers * self._size, "trace")

    def writer(self, worker: int) -> Writer:
        return Writer(*self._parts(worker))

    def reader(self, worker: int) -> Reader:
        return Reader(*self._parts(worker))

    def _parts(self, worker: int) -> tuple[memoryview, memoryview]:
        at = worker * self._size
        words = self._segment.array(np.uint64, _WORDS, at)
        records = self._segment.array(np.uint8, self.records * RECORD.size, at + _HEADER)
        return memoryview(words), memoryview(records)

    def close(self) -> None:
        self._segment.close()


class Writer:
    """A worker's side of its ring."""

    def __init__(self, words: memoryview, records: memoryview) -> None:
        self._words, self._records = words, records
        self._capacity = len(records) // RECORD.size
        # a process before this one may have written
        self._head, self._tail = int(words[_HEAD]), int(words[_TAIL])

    def add(
        self, kind: Kind, begin: int, *, block: int = 0, page: int = 0, pages: int = 0,
        size: int = 0, number: int = 0, extra: int = 0,
    ) -> None:  # fmt: skip
        """What began at `begin` (CLOCK_MONOTONIC, ns) and ends now."""
        took = time.monotonic_ns() - begin
        head = self._head
        if head - self._tail >= self._capacity:
            self._tail = int(self._words[_TAIL])
            if head - self._tail >= self._capacity:
                self._words[_DROPPED] += 1
                return
        RECORD.pack_into(
            self._records, head % self._capacity * RECORD.size,
            begin, took, kind, block, page, pages, size, number, extra,
        )  # fmt: skip
        self._head = self._words[_HEAD] = head + 1


class Reader:
    """The coordinator's side."""

    def __init__(self, words: memoryview, records: memoryview) -> None:
        self._words, self._records = words, records
        self._capacity = len(records) // RECORD.size
        self._read = self._seen = int(words[_TAIL])

    @property
    def dropped(self) -> int:
        """Records that found no room, all told."""
        return int(self._words[_DROPPED])

    def take(self, *, ended: bool = False) -> bytes:
        """The records that are certainly there, in order; with `ended`, all: nobody writes any
        more."""
        head = int(self._words[_HEAD])
        end = head if ended else self._seen
        # what is copied below is given back at the next look; nobody is there to overwrite it if
        # the worker has ended, and whoever comes after it begins behind it
        self._words[_TAIL] = end if ended else self._read
        self._seen = head
        first, last = self._read % self._capacity, end % self._capacity
        many, self._read = end - self._read, end
        if many == 0:
            return b""
        size = RECORD.size
        if first < last:
            return bytes(self._records[first * size : last * size])
        return bytes(self._records[first * size :]) + bytes(self._records[: last * size])


class Recorder(Protocol):
    """Who reads rings, as far as a pool of workers needs it."""

    def began(self, name: str, pid: int, ring: Reader) -> None:
        """A worker was started."""
        ...

    def ended(self, pid: int) -> None:
        """It was waited for: take the rest of its ring now, before the memory goes."""
        ...
