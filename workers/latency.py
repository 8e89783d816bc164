"""How long faults waited: a histogram in shared memory, one writer, fine enough for percentiles.

Each power of two of microseconds has 32 buckets, so that a percentile read off it is within 3 %;
summed by power of two it is `postcopy-latency-dist` of QEMU 10.1 (qapi/migration.json).
Knows nothing of faults: nanoseconds in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .segments import Segment

_SUB = 32
_OCTAVES = 32  # up to 71 minutes
_COUNT, _SUM, _MAX = _OCTAVES * _SUB, _OCTAVES * _SUB + 1, _OCTAVES * _SUB + 2
LENGTH = _MAX + 1


def bucket(ns: int) -> int:
    """The bucket of a latency in nanoseconds."""
    octave = min(max((ns // 1000).bit_length() - 1, 0), _OCTAVES - 1)
    sub = ns * _SUB // (1000 << octave) - _SUB
    return octave * _SUB + min(max(sub, 0), _SUB - 1)


def middle(index: int) -> float:
    """The middle of a bucket, microseconds."""
    octave, sub = divmod(index, _SUB)
    return float((1 << octave) * (1 + (sub + 0.5) / _SUB))


class Latency:
    """The histogram. The coordinator owns the segment, the fault process writes."""

    def __init__(self) -> None:
        self._segment = Segment(LENGTH * 8, "latency")

    def writer(self) -> LatencyWriter:
        return LatencyWriter(self._segment.array(np.uint64, LENGTH))

    def numbers(self) -> list[int]:
        found: list[int] = self._segment.array(np.uint64, LENGTH).tolist()
        return found

    def close(self) -> None:
        self._segment.close()


class LatencyWriter:
    """For the one process that writes."""

    def __init__(self, array: Any) -> None:
        self._array = memoryview(array)

    def add(self, ns: int) -> None:
        array = self._array
        array[bucket(ns)] += 1
        array[_COUNT] += 1
        array[_SUM] += ns
        array[_MAX] = max(array[_MAX], ns)


def report(numbers: Sequence[int]) -> dict[str, Any]:
    """What query-migrate says: mean in nanoseconds, distribution, percentiles in microseconds."""
    if len(numbers) != LENGTH or not numbers[_COUNT]:
        return {}
    counts, total = numbers[:_COUNT], numbers[_COUNT]
    octaves = [sum(counts[i * _SUB : (i + 1) * _SUB]) for i in range(_OCTAVES)]
    while octaves and not octaves[-1]:
        octaves.pop()
    longest = numbers[_MAX] / 1000
    percentiles: dict[str, float] = {}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        percentiles[name] = round(min(_percentile(counts, total, share), longest), 1)
    percentiles["max"] = round(longest, 1)
    return {
        "postcopy-latency": numbers[_SUM] // total,
        "postcopy-latency-dist": octaves,
        "postcopy-latency-percentiles": percentiles,
    }


def _percentile(counts: Sequence[int], total: int, share: float) -> float:
    seen = 0
    for index, count in enumerate(counts):
        seen += count
        if count and seen >= share * total:
            return middle(index)
    return 0.0
