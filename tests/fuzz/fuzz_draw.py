"""What the fuzz targets share: numbers out of bytes, and a mutator that needs no coverage.

A target is a function of bytes. Where what it drives is a conversation, `Draw` reads the bytes as
choices: short inputs are whole conversations, and a changed byte is another turn of one. `mutants`
makes inputs of seeds, always the same ones for a seed of its own, so that a run can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# What bounds are made of, and one off.
INTERESTING = tuple(
    sorted(
        {
            value
            for power in (0, 4, 7, 8, 11, 12, 13, 15, 16, 20, 23, 31, 32, 46, 47, 52, 63, 64)
            for value in ((1 << power) - 1, 1 << power, (1 << power) + 1)
        }
    )
)
_MOST_BYTES = 1 << 16


class Draw:
    """Reads choices off the front of an input; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, n: int) -> bytes:
        part = self._data[self._at : self._at + n]
        self._at += n
        return part.ljust(n, b"\0")

    def rest(self) -> bytes:
        return self._data[self._at :]

    def below(self, n: int) -> int:
        """A number below `n`, at most 65536."""
        return int.from_bytes(self.take(1 if n <= 256 else 2), "little") % n

    def one_of(self, choices: Sequence):
        return choices[self.below(len(choices))]

    def number(self, bits: int, near: int = 0) -> int:
        """A number of `bits`: one near `near`, one that bounds are made of, or any."""
        how = self.byte()
        if how < 160:
            found = near + how % 4 - (1 if how < 16 else 0)
        elif how < 240:
            found = INTERESTING[self.byte() % len(INTERESTING)]
        else:
            found = int.from_bytes(self.take(bits // 8), "little")
        return max(found, 0) % (1 << bits)


def mutate(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Another input, some changes away."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        _change(draw, out, others)
    return bytes(out[:_MOST_BYTES])


def _change(draw: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    at = draw.randrange(len(out) + 1)
    end = min(len(out), at + draw.choice((1, 1, 2, 4, 8, 64)))
    match draw.randrange(8):
        case 0 if at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        case 1 if at < len(out):
            out[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        case 2:
            size = draw.choice((1, 2, 4, 8))
            value = draw.choice(INTERESTING) % (1 << 8 * size)
            out[at : at + size] = value.to_bytes(size, draw.choice(("little", "big")))
        case 3:
            del out[at:end]
        case 4:
            out[at:at] = draw.randbytes(draw.choice((1, 2, 4, 16)))
        case 5:
            out[at:at] = out[at:end] * draw.choice((1, 2, 16))
        case 6 if others:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            out[at : draw.choice((at, end))] = other[begin : begin + draw.choice((1, 4, 16, 256))]
        case 7:
            del out[at:]


def mutants(seeds: Sequence[bytes], seed: int = 0) -> Iterator[bytes]:
    """Inputs made of `seeds`, without an end."""
    draw = random.Random(seed)
    while True:
        yield mutate(draw, draw.choice(seeds) if seeds else b"", seeds)
