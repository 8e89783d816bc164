"""Digests of RAM blocks, the same at both ends whatever the file behind them looks like.

A block is cut into parts of 64 MiB. A part's digest is the xxh3-128 of its bytes; the
block's digest is the xxh3-128 of its parts' digests. Parts without data are known without
reading, and reading goes by pread: a hole in shared memory read through a mapping would
become memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import xxhash

from ..transport.errors import SourceError
from ..transport.pages import PAGE_SIZE
from .ram import RamBlock

PART_PAGES = 16384  # 64 MiB
_CHUNK = 1 << 20


def part_count(pages: int) -> int:
    return -(-pages // PART_PAGES)


@functools.lru_cache(maxsize=8)
def _zero_digest(length: int) -> bytes:
    state, zeros = xxhash.xxh3_128(), bytes(_CHUNK)
    for at in range(0, length, _CHUNK):
        state.update(zeros[: min(_CHUNK, length - at)])
    return state.digest()


def part_digest(block: RamBlock, part: int, buffer: bytearray, alive: Callable[[], None]) -> bytes:
    """Digest of one part of `block`; `buffer` is scratch space, `alive` is called as it goes."""
    first = part * PART_PAGES
    offset = first * PAGE_SIZE
    length = min(PART_PAGES * PAGE_SIZE, block.size - offset)
    if len(block.data_runs(first, PART_PAGES)[0]) == 0:
        return _zero_digest(length)
    state, view = xxhash.xxh3_128(), memoryview(buffer)
    while length > 0:
        n = os.preadv(block.file.fd, [view[: min(length, len(view))]], block.start + offset)
        if n == 0:
            raise SourceError(f"{block.file.name} became shorter while it was read")
        state.update(view[:n])
        alive()
        offset, length = offset + n, length - n
    return state.digest()


def block_digest(parts: list[bytes]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(parts))
