"""Guest memory to move: made by kind, compared, spoilt. Deterministic for a kind and a size.

Knows files only; nothing of what moves them.

    zero     zeros that were written, so that they occupy memory
    random   cannot be compressed
    text     words drawn by a Zipf law: compresses to about a third
    half     runs of 1 to 64 pages: every other one zero, the others text and random in turn
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from functools import cache

import numpy as np

from ...transport.pages import PAGE_SIZE

KINDS = ("zero", "random", "text", "half")

_CHUNK = 16 << 20
_WORDS = 4000
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_LONGEST_RUN = 64  # pages


@cache
def _text_chunk() -> bytes:
    """One chunk of lines of twelve words."""
    rng = np.random.default_rng(7)
    words = np.array(
        ["".join(rng.choice(list(_LETTERS), rng.integers(2, 10))) for _ in range(_WORDS)],
        dtype=object,
    )
    weight = 1 / np.arange(1, _WORDS + 1)
    out, size = [], 0
    while size < _CHUNK:
        drawn = words[rng.choice(_WORDS, (20_000, 12), p=weight / weight.sum())]
        part = "\n".join(" ".join(line) for line in drawn.tolist()) + "\n"
        out.append(part)
        size += len(part)
    return "".join(out).encode()[:_CHUNK]


def _text(index: int) -> bytes:
    """Chunk `index`: rotated, so that no page comes twice at the same place of a page."""
    at = index * 40_961 % _CHUNK
    return _text_chunk()[at:] + _text_chunk()[:at]


def _random(index: int) -> bytes:
    return np.random.default_rng(1000 + index).bytes(_CHUNK)


def _half(index: int) -> bytes:
    """Runs of random length: zero, text, zero, random, and again."""
    lengths = np.random.default_rng(2000 + index).integers(1, _LONGEST_RUN + 1, _CHUNK // PAGE_SIZE)
    sources = (None, _text(index), None, _random(index))
    out, at = bytearray(_CHUNK), 0
    for turn, pages in enumerate(lengths.tolist()):
        n = min(pages * PAGE_SIZE, _CHUNK - at)
        source = sources[turn % len(sources)]
        if source is not None:
            out[at : at + n] = source[at : at + n]
        at += n
        if at == _CHUNK:
            break
    return bytes(out)


def _chunks(kind: str, size: int, first: int = 0) -> Iterator[bytes]:
    for index in range(-(-size // _CHUNK)):
        match kind:
            case "random":
                chunk = _random(first + index)
            case "text":
                chunk = _text(first + index)
            case "half":
                chunk = _half(first + index)
            case _:
                chunk = bytes(_CHUNK)
        yield chunk[: size - index * _CHUNK]


def make(path: str, kind: str, size: int, first: int = 0) -> None:
    """A new file of `size` bytes of content `kind`. `first`: other content for another number."""
    with open(path, "wb") as f:
        for chunk in _chunks(kind, size, first):
            f.write(chunk)


def same(a: str, b: str, size: int, skip: int = 0) -> bool:
    """Are both files `size` bytes long and equal from byte `skip`?"""
    if not os.path.exists(b) or os.path.getsize(a) != size or os.path.getsize(b) != size:
        return False
    with open(a, "rb", buffering=0) as f, open(b, "rb", buffering=0) as g:
        f.seek(skip)
        g.seek(skip)
        while True:
            left, right = f.read(1 << 20), g.read(1 << 20)
            if left != right:
                return False
            if not left:
                return True


def spoil(path: str, size: int) -> None:
    """Change one byte of each page: the file keeps (or gets) all its pages, none is right.

    What is moved there next finds memory that was touched, and a run that moved nothing
    would not pass for a good one.
    """
    with open(path, "r+b") as f:
        f.truncate(size)
        with mmap.mmap(f.fileno(), size) as mapping:
            view = np.frombuffer(mapping, np.uint8)
            view[77::PAGE_SIZE] ^= 0x5A
            del view
