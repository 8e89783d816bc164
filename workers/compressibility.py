"""How well some memory compresses, and how fast: a sample of it, through the codecs. Reads only."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..transport.codecs import make_codec
from ..transport.pages import PAGE_SIZE, WORDS, Runs
from .inspection import zero_pages
from .ram import RamBlock

CODECS = ("lz4", "zstd")
# Pages that are compressed together, as senders do; and at the most in all.
_BATCH, _MOST = 256, 2048


@dataclass(frozen=True)
class Compressed:
    """`ratio`: bytes that come out for one that goes in; `rate`: bytes that go in, a second of one
    processor."""

    codec: str
    ratio: float
    rate: float


def compressed(block: RamBlock, runs: Runs) -> list[Compressed]:
    """What the codecs make of the pages `runs` of `block`, zero pages left out; empty if all are
    zero. Some milliseconds."""
    batches = _batches(block, runs)
    plain = sum(len(batch) for batch in batches)
    if not plain:
        return []
    found = []
    for name in CODECS:
        codec = make_codec(name)
        begin = time.thread_time()
        packed = sum(len(codec.compress(batch)) for batch in batches)
        took = max(time.thread_time() - begin, 1e-9)
        found.append(Compressed(name, packed / plain, plain / took))
    return found


def _batches(block: RamBlock, runs: Runs) -> list[bytes]:
    """Batches evenly spread over the runs."""
    starts = [
        first + at
        for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True)
        for at in range(0, count, _BATCH)
    ]
    found = []
    for first in starts[:: max(1, len(starts) * _BATCH // _MOST)]:
        data = block.read(first * PAGE_SIZE, _BATCH * PAGE_SIZE)
        words = np.frombuffer(data[: len(data) // PAGE_SIZE * PAGE_SIZE], np.uint64)
        pages = words.reshape(-1, WORDS)
        content = pages[~zero_pages(pages)] if len(pages) else pages
        if len(content):
            found.append(content.tobytes())
    return found
