"""How many pages of a guest's memory were written at least once since `begin`: counted by the
kernel, or found on some pages by their hashes.

Reads; changes nothing of the guest. Knows nothing of rates, and of no migration: whoever measures
beside one takes SampledPages, which has descriptors of its own and leaves the tracking alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from ..transport.pages import PAGE_SIZE, Pages, Runs, runs_of
from .guests.base import SourceGuest
from .kernel.tracking_cost import fault_seconds
from .ram import RamBlock

# Pages that are hashed between two looks whether anybody still wants to know.
_PATIENCE = 1024
T = TypeVar("T")


class Interrupted(Exception):
    """Nobody wants to know any more."""


class Counting:
    """What both have in common: what it costs. `cpu`: processor seconds of whoever called."""

    sample = 0  # pages that are looked at, 0 for all
    total: int  # pages that there are

    def __init__(self) -> None:
        self.cpu = 0.0
        self.faults = 0
        self.fault = 0.0  # seconds a fault
        self._calls = 0

    def begin(self) -> None:
        """From now on it is counted: nothing is written yet. Blocks for as long as a look."""
        self._timed(self._begin)

    def look(self) -> float:
        """Pages written since `begin`. Blocks: some milliseconds a GiB by the kernel, some
        microseconds a page by hashes."""
        return self._timed(self._look)

    def written(self) -> list[Runs]:
        """Pages of each block that were found to be written, all or some of them. After that it
        has to `begin` anew."""
        raise NotImplementedError

    def _timed(self, what: Callable[[], T]) -> T:
        cpu = time.thread_time()
        self._calls += 1
        try:
            return what()
        finally:
            self.cpu += time.thread_time() - cpu

    @property
    def look_seconds(self) -> float:
        """What a look takes on average: others that run on this host only add to it."""
        return self.cpu / max(self._calls, 1)

    def _begin(self) -> None:
        raise NotImplementedError

    def _look(self) -> float:
        raise NotImplementedError

    def close(self) -> None:
        """Idempotent. The guest is the caller's."""


class TrackedPages(Counting):
    """By the kernel, all of them: for a guest that is tracked by it (TRACKING_PAGEMAP) and that no
    migration is looking at. Each page costs the guest a fault when it is first written."""

    def __init__(self, guest: SourceGuest) -> None:
        super().__init__()
        self._guest = guest
        self._begun = False
        self._seen = 0
        self.total = sum(block.pages for block in guest.blocks)
        self.fault = fault_seconds()

    def _begin(self) -> None:
        if self._begun:
            self.written()
        else:
            self._begun = True
            self._guest.start_tracking()
        self._seen = 0

    def _look(self) -> float:
        found = self._guest.written_so_far() or 0
        self.faults += max(0, found - self._seen)
        self._seen = max(found, self._seen)
        return float(found)

    def written(self) -> list[Runs]:
        return [self._guest.dirty_pages(i) for i in range(len(self._guest.blocks))]


class SampledPages(Counting):
    """By their hashes (xxh3-64), some of them: one from each of `sizes[i]` equal parts of block i,
    where it is drawn by `seed`. What is written as it was before is not seen."""

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        sizes: Sequence[int],
        seed: int,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`wanted`: asked now and then; once it says no, begin and look raise Interrupted."""
        super().__init__()
        self._wanted = wanted
        self._starts = [block.start for block in blocks]
        self._pages = [block.pages for block in blocks]
        self.total, self.sample = sum(self._pages), sum(sizes)
        draw = np.random.Generator(np.random.PCG64(seed))
        self._places = [_places(n, k, draw) for n, k in zip(self._pages, sizes, strict=True)]
        self._first: list[npt.NDArray[np.uint64]] = []
        self._last: list[npt.NDArray[np.uint64]] = []
        # A block's file may be closed, and its number used again, while it is read here.
        self._files: list[int] = []
        try:
            for block in blocks:
                self._files.append(os.dup(block.file.fd))
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self._first = self._last = self._hashes()

    def _look(self) -> float:
        self._last, changed = self._hashes(), 0.0
        for pages, first, now in zip(self._pages, self._first, self._last, strict=True):
            if len(first):
                changed += pages * float(np.count_nonzero(first != now)) / len(first)
        return changed

    def written(self) -> list[Runs]:
        return [
            runs_of(places[first != now])
            for places, first, now in zip(self._places, self._first, self._last, strict=True)
        ]

    def _hashes(self) -> list[npt.NDArray[np.uint64]]:
        found = []
        for fd, start, places in zip(self._files, self._starts, self._places, strict=True):
            parts = []
            for at in range(0, len(places), _PATIENCE):
                if not self._wanted():
                    raise Interrupted
                parts.append(_hashed(fd, start, places[at : at + _PATIENCE]))
            found.append(np.concatenate(parts) if parts else np.empty(0, np.uint64))
        return found

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def _places(pages: int, wanted: int, draw: np.random.Generator) -> Pages:
    """One page from each of `wanted` equal parts of `pages` pages."""
    parts = np.arange(wanted) + draw.random(wanted)
    places: Pages = np.minimum((parts * pages / max(wanted, 1)).astype(np.int64), pages - 1)
    return places


def _hashed(fd: int, start: int, places: Pages) -> npt.NDArray[np.uint64]:
    # By pread(2): a load through a mapping would fill the holes of shared memory.
    digest = xxhash.xxh3_64_intdigest
    return np.array(
        [digest(os.pread(fd, PAGE_SIZE, start + p * PAGE_SIZE)) for p in places.tolist()],
        np.uint64,
    )


class WrittenPart(SourceGuest):
    """The pages `runs` of `guest`, as if there was nothing else in it: for samples of what a guest
    writes. It is the caller's."""

    def __init__(self, guest: SourceGuest, runs: Sequence[Runs]) -> None:
        self.kind, self.blocks = guest.kind, guest.blocks
        self.live, self.tracking = guest.live, guest.tracking
        self.last_look_by_content = guest.last_look_by_content
        self._runs = runs

    def initial_pages(self, block: int) -> Runs:
        return self._runs[block]

    def close(self) -> None:
        """Nothing is its own."""
