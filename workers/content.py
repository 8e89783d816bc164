"""Pages by their content: what a receiver of many images has already, so that equal pages travel
once.

A page is looked for by its xxh3-128. The index has half of it (a key) and where the page was; it is
a hint and no more. Whoever can write into the memory of a guest can make a page that has the
xxh3-128 of another one, and wait for that in somebody else's image: so what is found is read, and
taken only if its SHA-256 (the first half) is right. That is slow, and asked only of what was found.
An image that changed or went away since costs a miss and nothing else. Zero pages are in no index:
they cost nothing as it is, and are to stay holes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from ..transport.errors import SourceError
from ..transport.pages import PAGE_SIZE, Bytes8, Pages, Runs, pages_of
from ..transport.wire import Buffer
from .ram import RamBlock

DIGEST_BYTES = 16
# Pages that an index knows: 12 bytes each, of 16 GiB of images.
MOST_PAGES = 4 << 20
# Pages that are read together.
_STEP = 256

Keys = npt.NDArray[np.uint64]


def page_digests(block: RamBlock, pages: Pages) -> bytes:
    """Of whole pages of a block, in order: to look for them."""
    return _digests(block, pages, xxhash.xxh3_128_digest)


def sure_digests(block: RamBlock, pages: Pages) -> bytes:
    """Of whole pages of a block, in order: pages that have the same are the same."""
    return _digests(block, pages, sure_digest)


def both_digests(block: RamBlock, pages: Pages, sure: bool) -> tuple[bytes, bytes]:
    """To look for them and, if `sure`, those that decide too."""
    return page_digests(block, pages), sure_digests(block, pages) if sure else b""


def sure_digest(data: Buffer) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _digests(block: RamBlock, pages: Pages, digest: Callable[[Buffer], bytes]) -> bytes:
    found = []
    for first, count in _stretches(pages):
        if block.file.given_up:
            raise SourceError(f"reading {block.file.name} was given up")
        at = block.start + first * PAGE_SIZE
        data = memoryview(os.pread(block.file.fd, count * PAGE_SIZE, at))
        if len(data) < count * PAGE_SIZE:
            raise SourceError(f"{block.file.name} became shorter while it was read")
        found += [digest(data[n : n + PAGE_SIZE]) for n in range(0, len(data), PAGE_SIZE)]
    return b"".join(found)


def equal_digests(ours: bytes, theirs: bytes) -> Bytes8:
    """1 for each digest that is the same in both."""
    a, b = (np.frombuffer(d, "<u8").reshape(-1, 2) for d in (ours, theirs))
    equal: Bytes8 = (a == b).all(axis=1).astype(np.uint8)
    return equal


def take_digests(digests: bytes, which: npt.NDArray[np.int64]) -> bytes:
    """Some of many digests."""
    return np.frombuffer(digests, "<u8").reshape(-1, 2)[which].tobytes()


def _stretches(pages: Pages) -> list[tuple[int, int]]:
    """Consecutive pages, at most _STEP together: first and count."""
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    found = []
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(pages)], strict=True):
        for at in range(begin, end, _STEP):
            found.append((int(pages[at]), min(_STEP, end - at)))
    return found


def _keys(digests: bytes) -> Keys:
    """The first half of each digest."""
    return np.frombuffer(digests, "<u8").reshape(-1, 2)[:, 0].astype(np.uint64)


_ZERO_KEY = _keys(xxhash.xxh3_128_digest(bytes(PAGE_SIZE)))[0]


@dataclass(frozen=True, slots=True)
class _Known:
    """Pages of one file: `keys` in order, `places` where each is, in pages from byte `start`."""

    path: str
    start: int
    keys: Keys
    places: npt.NDArray[np.uint32]


class ContentIndex:
    """What many files hold. Bounded: what was neither added nor of use for longest goes first. May
    be used by several threads."""

    def __init__(self, most: int = MOST_PAGES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, int], _Known] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ContentIndex {len(self._known)} files>"

    def __len__(self) -> int:
        """Pages that it knows."""
        return sum(len(known.keys) for known in self._known.values())

    def add(self, path: str, start: int, pages: Pages, digests: bytes) -> None:
        """The file at `path` has these pages, counted from byte `start` of it."""
        keys = _keys(digests)
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != _ZERO_KEY][: self._most]
        known = _Known(path, start, keys[order], pages[order].astype(np.uint32))
        with self._lock:
            self._known.pop((path, start), None)
            self._known[path, start] = known
            while len(self) > self._most:
                self._known.popitem(last=False)

    def knows(self, digests: bytes) -> Bytes8:
        """1 for each that some file may have."""
        keys, found = _keys(digests), np.zeros(len(digests) // DIGEST_BYTES, np.uint8)
        with self._lock:
            files = list(self._known.values())
        for known in files:
            left = np.flatnonzero(found == 0)
            if len(left) and len(known.keys):
                at = np.minimum(np.searchsorted(known.keys, keys[left]), len(known.keys) - 1)
                found[left] = known.keys[at] == keys[left]
        return found

    def fetch(self, block: RamBlock, pages: Pages, digests: bytes, sure: bytes) -> Bytes8:
        """Write those of `pages` that are in some file into `block`; 1 for each that is there now.
        Only what has the `sure` digest that is asked for."""
        have = np.zeros(len(pages), np.uint8)
        keys = _keys(digests)
        with self._lock:
            files = list(self._known.items())[::-1]
        for name, known in files:
            left = np.flatnonzero(have == 0)
            if not len(left):
                break
            if not len(known.keys):
                continue
            at = np.minimum(np.searchsorted(known.keys, keys[left]), len(known.keys) - 1)
            hits = known.keys[at] == keys[left]
            if hits.any():
                found = left[hits]
                if self._take(known, known.places[at[hits]], block, pages, sure, found, have):
                    with self._lock:
                        if name in self._known:
                            self._known.move_to_end(name)
        return have

    def _take(
        self,
        known: _Known,
        places: npt.NDArray[np.uint32],
        block: RamBlock,
        pages: Pages,
        sure: bytes,
        found: npt.NDArray[np.int64],
        have: Bytes8,
    ) -> bool:
        """Read pages from a file and write them where they are wanted; `found`: which of `pages`
        these are. True if one was right."""
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(known.path, flags)
        except OSError:
            return False
        right = False
        try:
            begin = 0
            while begin < len(found):
                end = _end_of_stretch(found, places, pages, begin)
                offset = known.start + int(places[begin]) * PAGE_SIZE
                try:
                    data = memoryview(os.pread(fd, (end - begin) * PAGE_SIZE, offset))
                except OSError:  # no file any more, or a bad disk
                    break
                for n in range(len(data) // PAGE_SIZE):
                    which = int(found[begin + n])
                    page = data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE]
                    wanted = sure[which * DIGEST_BYTES : (which + 1) * DIGEST_BYTES]
                    have[which] = sure_digest(page) == wanted
                right |= _write(block, pages, found[begin:end], have, data)
                begin = end
        finally:
            os.close(fd)
        return right


def _end_of_stretch(
    found: npt.NDArray[np.int64], places: npt.NDArray[np.uint32], pages: Pages, begin: int
) -> int:
    """How far pages follow each other here and there."""
    end = begin + 1
    while (
        end < len(found)
        and end - begin < _STEP
        and int(places[end]) == int(places[end - 1]) + 1
        and int(pages[found[end]]) == int(pages[found[end - 1]]) + 1
    ):
        end += 1
    return end


def _write(
    block: RamBlock, pages: Pages, found: npt.NDArray[np.int64], have: Bytes8, data: memoryview
) -> bool:
    """Write those of consecutive pages that are right."""
    good = have[found] != 0
    if good.all():
        block.write(int(pages[found[0]]), data)
        return True
    for n in np.flatnonzero(good).tolist():
        block.write(int(pages[found[n]]), data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE])
    return bool(good.any())


def asked_pages(runs: Runs, block: RamBlock) -> Pages:
    """The whole pages of `runs`: a last partial one has no digest."""
    pages = pages_of(runs)
    return pages[pages < block.size // PAGE_SIZE]
