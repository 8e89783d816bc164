"""Cutting a round into extents: who sends what. Pure.

Extents cover whole groups of pages (a host page, or 2 MiB), so that a host page never gets
two owners. They are handed out as senders get free, so a slow one holds nobody up; small
enough that the last ones end together, large enough that handing out costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# Dirty pages in an extent: 2 MiB to 32 MiB of memory.
_SMALLEST, _LARGEST = 512, 8192
# Extents a sender should get in a round, so that they end about together.
_TURNS = 16


@dataclass(frozen=True)
class Span:
    """Pages [first, first + count) of a block, of which `dirty` must be sent."""

    block: int
    first: int
    count: int
    dirty: int


def extent_target(dirty: int, workers: int) -> int:
    """Dirty pages that an extent should hold."""
    return int(np.clip(dirty // (workers * _TURNS), _SMALLEST, _LARGEST))


def cut(block: int, pages: int, group: int, counts: Any, target: int) -> Iterator[Span]:
    """Extents of a block of `pages` pages with `counts[i]` dirty pages in group i."""
    first = dirty = 0
    last = -1
    for index in np.flatnonzero(counts).tolist():
        n = int(counts[index])
        # a gap ends an extent: what lies in it would be scanned for nothing
        if dirty and (dirty + n > target or index > last + 1):
            yield _span(block, pages, group, first, last, dirty)
            dirty = 0
        if dirty == 0:
            first = index
        last, dirty = index, dirty + n
    if dirty:
        yield _span(block, pages, group, first, last, dirty)


def _span(block: int, pages: int, group: int, first: int, last: int, dirty: int) -> Span:
    begin = first * group
    return Span(block, begin, min((last + 1) * group, pages) - begin, dirty)
