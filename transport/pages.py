"""Pages and runs of pages: the arithmetic every other module shares.

A page is 4096 bytes, whatever the host's page size: it is the unit of the dirty bitmap and
of the wire. A run is `count` pages from page `start`; sets of pages travel as two arrays,
starts and counts, sorted and free of overlap. Nothing here touches memory or a socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_SIZE = 4096
WORDS = PAGE_SIZE // 8

Pages = npt.NDArray[np.int64]  # page numbers, ascending
Starts = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]
Runs = tuple[Starts, Counts]
Bytes8 = npt.NDArray[np.uint8]

NO_RUNS: Runs = (np.empty(0, np.int64), np.empty(0, np.int64))
# Runs are expanded to page numbers this many pages at a time: 8 MiB of int64.
_EXPAND = 1 << 20


def page_count(size: int) -> int:
    """Pages that hold `size` bytes; a tail that is no whole page counts as one."""
    return -(-size // PAGE_SIZE)


def runs_of(pages: npt.NDArray[Any]) -> Runs:
    """Runs that hold exactly `pages` (ascending page numbers)."""
    n = len(pages)
    if n == 0:
        return NO_RUNS
    first, last = int(pages[0]), int(pages[-1])
    if last - first + 1 == n:
        return np.array([first], np.int64), np.array([n], np.int64)
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = pages[np.concatenate(([0], breaks))].astype(np.int64)
    counts = np.diff(np.concatenate(([0], breaks, [n]))).astype(np.int64)
    return starts, counts


def pages_of(runs: Runs) -> Pages:
    """Page numbers that `runs` hold, ascending: 8 bytes a page, so keep `runs` bounded."""
    starts, counts = runs
    if len(starts) == 1:
        return np.arange(int(starts[0]), int(starts[0]) + int(counts[0]), dtype=np.int64)
    total = int(counts.sum())
    offsets = np.repeat(starts - np.concatenate(([0], np.cumsum(counts)[:-1])), counts)
    return offsets + np.arange(total, dtype=np.int64)


def total_pages(runs: Runs) -> int:
    counts = runs[1]
    if len(counts) <= 1:  # nearly always: a sum in numpy costs ten times as much
        return int(counts[0]) if len(counts) else 0
    return int(counts.sum())


def runs_from_bytes(ranges: list[tuple[int, int]]) -> Runs:
    """Runs of the pages that byte ranges [start, end) touch; touching ranges are merged."""
    if not ranges:
        return NO_RUNS
    merged: list[list[int]] = []
    for start, end in ranges:
        first, last = start // PAGE_SIZE, page_count(end)
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(last, merged[-1][1])
        else:
            merged.append([first, last])
    array = np.array(merged, np.int64)
    return array[:, 0].copy(), array[:, 1] - array[:, 0]


def union(parts: list[Runs]) -> Runs:
    """Runs of the pages that any of `parts` holds; theirs may come in any order and overlap."""
    starts = np.concatenate([NO_RUNS[0], *(part[0] for part in parts)])
    counts = np.concatenate([NO_RUNS[1], *(part[1] for part in parts)])
    if len(starts) <= 1:
        return starts, counts
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    reach = np.maximum.accumulate(starts + counts[order])
    first = np.flatnonzero(np.concatenate(([True], starts[1:] > reach[:-1])))
    last = np.concatenate((first[1:], [len(starts)])) - 1
    return starts[first], reach[last] - starts[first]


def complement(runs: Runs, pages: int) -> Runs:
    """Runs of the pages below `pages` that `runs` do not hold."""
    starts, counts = runs
    begin = np.concatenate(([0], starts + counts))
    end = np.concatenate((starts, [pages]))
    keep = end > begin
    return begin[keep].astype(np.int64), (end - begin)[keep].astype(np.int64)


def mark(table: Bytes8, runs: Runs, value: int) -> None:
    """Store `value` for every page of `runs`: slices for few runs, vectorised for many."""
    starts, counts = runs
    if len(starts) <= 1024:
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            table[start : start + count] = value
        return
    edges = np.concatenate(([0], np.cumsum(counts)))
    low = 0
    while low < len(starts):
        high = max(low + 1, int(np.searchsorted(edges, edges[low] + _EXPAND)))
        table[pages_of((starts[low:high], counts[low:high]))] = value
        low = high


def apart(tables: Sequence[Runs]) -> bool:
    """True if no page is in two of `tables`, each of which is as `check_runs` wants it."""
    some = [runs for runs in tables if len(runs[0])]
    if len(some) <= 1:  # nearly always
        return True
    starts, counts = (np.concatenate([runs[i] for runs in some]) for i in (0, 1))
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    return bool((starts[1:] >= (starts + counts[order])[:-1]).all())


def check_runs(runs: Runs, pages: int) -> bool:
    """True if `runs` are sorted, free of overlap, not empty and within `pages` pages."""
    starts, counts = runs
    if len(starts) == 0:
        return True
    if len(starts) == 1:
        first = int(starts[0])
        return first >= 0 and 1 <= int(counts[0]) <= pages - first
    if int(counts.min()) < 1 or int(starts[0]) < 0:
        return False
    ends = starts + counts
    if int(counts.max()) > pages or int(starts.max()) >= pages or int(ends[-1]) > pages:
        return False
    return bool((starts[1:] >= ends[:-1]).all())
