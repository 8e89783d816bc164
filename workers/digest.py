"""Digests of RAM blocks, the same at both ends whatever the file behind them looks like.

A tree of xxh3-128: a chunk of 1 MiB has the digest of its bytes, a part of 64 MiB the digest
of its chunks' digests, a block that of its parts'. Chunks without data are known without
reading. Reading goes by pread: a hole in shared memory read through a mapping would become
memory.

That finds what went wrong. Where digests decide that something need not be sent, somebody may have
made what is there: these are of SHA-256, one a chunk.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable

import xxhash

from ..transport.errors import RemoteProtocolError, SourceError
from ..transport.pages import PAGE_SIZE, page_count
from .ram import RamBlock

CHUNK_PAGES = 256
PART_PAGES = 64 * CHUNK_PAGES
CHUNK_BYTES = CHUNK_PAGES * PAGE_SIZE


def part_count(pages: int) -> int:
    return -(-pages // PART_PAGES)


Digest = Callable[[bytes | memoryview], bytes]
_SURE_BYTES = 16


def _sure(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:_SURE_BYTES]


@functools.lru_cache(maxsize=8)
def _zero_digest(length: int, digest: Digest = xxhash.xxh3_128_digest) -> bytes:
    return digest(bytes(length))


def part_digest(block: RamBlock, part: int, buffer: bytearray) -> bytes:
    """Digest of one part of `block`. `buffer` is scratch space of CHUNK_BYTES."""
    first, last = part * PART_PAGES, min((part + 1) * PART_PAGES, block.pages)
    with_data = _chunks_with_data(block, first, last)
    state = xxhash.xxh3_128()
    for page in range(first, last, CHUNK_PAGES):
        offset = page * PAGE_SIZE
        length = min(CHUNK_BYTES, block.size - offset)
        if page // CHUNK_PAGES in with_data:
            state.update(_chunk_digest(block, offset, memoryview(buffer)[:length]))
        else:
            state.update(_zero_digest(length))
    return state.digest()


def _chunks_with_data(block: RamBlock, first: int, last: int) -> set[int]:
    starts, counts = block.data_runs(first, last - first)
    chunks: set[int] = set()
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        chunks.update(range(start // CHUNK_PAGES, -(-(start + count) // CHUNK_PAGES)))
    return chunks


def _chunk_digest(
    block: RamBlock, offset: int, view: memoryview, digest: Digest = xxhash.xxh3_128_digest
) -> bytes:
    if block.file.given_up:
        raise SourceError(f"reading {block.file.name} was given up")
    block.check(range(offset // PAGE_SIZE, page_count(offset + len(view))))
    at = 0
    while at < len(view):
        n = os.preadv(block.file.fd, [view[at:]], block.start + offset + at)
        if n == 0:
            raise SourceError(f"{block.file.name} became shorter while it was read")
        at += n
    return digest(view)


def chunk_digests(block: RamBlock) -> bytes:
    """16 bytes for each chunk of a block, in order: half its SHA-256. What is a hole costs no more
    than these."""
    buffer, size = memoryview(bytearray(CHUNK_BYTES)), _SURE_BYTES
    whole, rest = divmod(block.size, CHUNK_BYTES)
    last = _zero_digest(rest, _sure) if rest else b""
    found = bytearray(_zero_digest(CHUNK_BYTES, _sure) * whole + last)
    for chunk in _chunks_with_data(block, 0, block.pages):
        offset = chunk * CHUNK_BYTES
        view = buffer[: block.size - offset]
        found[chunk * size : (chunk + 1) * size] = _chunk_digest(block, offset, view, _sure)
    return bytes(found)


def equal_chunks(block: RamBlock, theirs: bytes) -> list[bool]:
    """Which chunks of a block have these digests (as above). RemoteProtocolError if they are of
    another block."""
    ours = chunk_digests(block)
    if len(theirs) != len(ours):
        raise RemoteProtocolError(f"{len(theirs)} bytes of digests, expected {len(ours)}")
    size = _SURE_BYTES
    return [ours[at : at + size] == theirs[at : at + size] for at in range(0, len(ours), size)]


def block_digest(parts: list[bytes]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(parts))
