"""From page numbers to frames: copy, find zeros, choose a codec, compress, lay out.

Works on whole batches with numpy; no Python per page. Knows memory and codecs, no socket.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from ..transport.codecs import CODECS, Codec, make_codec
from ..transport.codecs.choice import CodecChoice
from ..transport.pages import NO_RUNS, PAGE_SIZE, WORDS, Pages, Runs, runs_of
from ..transport.wire import Buffer, Delta
from .counters import Row
from .inspection import compressible_pages, zero_pages
from .page_cache import Slots
from .ram import RamBlock

# A codec must save at least this share, or the pages travel raw.
MUST_SAVE = 0.03


@dataclass(slots=True)
class Batch:
    """A batch as it will travel. `payload` may point into guest memory. `plain`: its packed pages
    before they were packed. `delta`, `packed_delta`: pages that travel as what differs; `slots`: of
    the page cache, what an acknowledgement makes valid (deltas.py); `named`: bytes of pages that
    the receiver reads itself (here.py)."""

    codec: int
    zero: Runs
    raw: Runs
    packed: Runs
    payload: list[Buffer]
    plain: Buffer = b""
    delta: Delta | None = None
    packed_delta: bytes = b""
    slots: Slots | None = None
    named: int = 0

    @property
    def size(self) -> int:
        """Bytes that it keeps a channel busy with."""
        return sum(len(part) for part in self.payload) + len(self.packed_delta) + self.named

    @property
    def parts(self) -> list[Buffer]:
        """All of its payload."""
        return [*self.payload, self.packed_delta] if self.packed_delta else self.payload


class BlockReader:
    """Reads pages of one block."""

    def __init__(self, block: RamBlock) -> None:
        self._pages = block.whole_pages()
        self._words = block.words() if block.aligned else None
        self._block = block

    def read(self, pages: Pages, copy: bool) -> npt.NDArray[np.uint64]:
        """The content of `pages`, shape (n, 512): in place if it may be and can be."""
        if (verified := self._block.verified(pages)) is not None:
            return verified.copy() if copy else verified
        first, n = int(pages[0]), len(pages)
        together = int(pages[-1]) - first + 1 == n
        whole = int(pages[-1]) < len(self._pages)
        if together and whole and not copy and self._words is not None:
            return self._words[first : first + n]
        out = np.empty((n, PAGE_SIZE), np.uint8)
        inside = pages if whole else pages[:-1]
        if together:
            out[: len(inside)] = self._pages[first : first + len(inside)]
        else:
            # mode="clip": "raise" would buffer the whole output once more
            np.take(self._pages, inside, axis=0, out=out[: len(inside)], mode="clip")
        if not whole:
            out[-1] = np.frombuffer(self._block.tail(), np.uint8)
        return out.view(np.uint64)

    def zero(self, pages: Pages) -> npt.NDArray[np.bool_]:
        """Which of `pages` are zero now, without copying what is not.

        A guest may be writing: a page that was zero when it was looked at and is not any more
        was written after the dirty set was taken, and is in the next one.
        """
        if (verified := self._block.verified(pages)) is not None:
            return zero_pages(verified)
        first, n = int(pages[0]), len(pages)
        if self._words is None or int(pages[-1]) >= len(self._pages):
            step = 256  # what is copied to be looked at stays in the cache
            parts = [pages[at : at + step] for at in range(0, n, step)]
            return np.concatenate([zero_pages(self.read(part, copy=True)) for part in parts])
        if int(pages[-1]) - first + 1 == n:
            return zero_pages(self._words[first : first + n])
        found: npt.NDArray[np.bool_] = (
            self._words[pages, 0] | self._words[pages, 256] | self._words[pages, 511]
        ) == 0
        if found.any():
            found[found] = ~self._words[pages[found]].any(axis=1)
        return found


class BatchMaker:
    """Makes batches for one channel."""

    def __init__(self, codec: str, level: int | None, row: Row) -> None:
        self.choice = CodecChoice() if codec == "auto" else None
        self._codecs: dict[tuple[str, int | None], Codec] = {}
        self._first = self._name, self._level = codec, level
        self._row = row
        if codec != "auto":
            self._codec(codec)

    def use(self, codec: str, level: int | None) -> None:
        """From the next batch on; "" is what it was made with."""
        self._name, self._level = (codec, level) if codec else self._first
        if self._name != "auto":
            self.choice = None
        elif self.choice is None:
            self.choice = CodecChoice()

    def _codec(self, name: str) -> Codec:
        key = name, self._level if name == self._name else None
        if key not in self._codecs:
            self._codecs[key] = make_codec(*key)
        return self._codecs[key]

    def layer(self) -> Codec | None:
        """What deltas are packed with: as pages that look compressible are."""
        name = self._name if self.choice is None else self.choice.choose(1.0)
        return None if name == "none" else self._codec(name)

    def make(self, pages: Pages, content: npt.NDArray[np.uint64]) -> Batch:
        """The batch of `pages` (ascending) whose content has shape (n, 512)."""
        zeros = zero_pages(content)
        n_zero = int(np.count_nonzero(zeros))
        if n_zero == len(pages):
            return Batch(0, runs_of(pages), NO_RUNS, NO_RUNS, [])
        zero_runs = NO_RUNS
        if n_zero:
            zero_runs = runs_of(pages[zeros])
            pages, content = pages[~zeros], content[~zeros]
        if self._name == "none":
            return self._raw(zero_runs, pages, content)
        return self._packed(zero_runs, pages, content)

    def _raw(self, zero: Runs, pages: Pages, content: npt.NDArray[np.uint64]) -> Batch:
        self._row.add("raw_pages", len(pages))
        return Batch(0, zero, runs_of(pages), NO_RUNS, [flat(content)])

    def _packed(self, zero: Runs, pages: Pages, content: npt.NDArray[np.uint64]) -> Batch:
        if self.choice is not None and self.choice.choose(1.0) == "none":
            return self._raw(zero, pages, content)  # whatever they look like
        good = compressible_pages(content.view(np.uint8).reshape(-1, PAGE_SIZE))
        n_good = int(np.count_nonzero(good))
        name = self._name
        if self.choice is not None:
            name = self.choice.choose(n_good / len(pages))
        if n_good == 0 or name == "none":
            return self._raw(zero, pages, content)
        everything = n_good == len(pages)
        plain = flat(content if everything else content[good])
        codec = self._codec(name)
        begin = time.thread_time_ns()
        packed = codec.compress(plain)
        spent = time.thread_time_ns() - begin
        self._row.add("codec_ns", spent)
        if self.choice is not None:
            self.choice.learn(name, len(plain), len(packed), spent / 1e9)
        if len(packed) > (1 - MUST_SAVE) * len(plain):
            return self._raw(zero, pages, content)
        self._row.add(f"{name}_pages", n_good)
        wire_id = CODECS[name].wire_id
        if everything:
            return Batch(wire_id, zero, NO_RUNS, runs_of(pages), [packed], plain)
        self._row.add("raw_pages", len(pages) - n_good)
        raw, rest = pages[~good], flat(content[~good])
        return Batch(wire_id, zero, runs_of(raw), runs_of(pages[good]), [rest, packed], plain)


def flat(content: npt.NDArray[np.uint64]) -> memoryview:
    """The bytes of pages of shape (n, 512), as one flat buffer."""
    return content.reshape(len(content) * WORDS).data.cast("B")


def page_hashes(content: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each page, 0 for a zero page (the table of what was sent begins as zeros).

    The one loop over pages there is: 8 GB/s, and only where memory is tracked by content.
    """
    view, digest = flat(content), xxhash.xxh3_64_intdigest
    out = np.array(
        [digest(view[at : at + PAGE_SIZE]) for at in range(0, len(view), PAGE_SIZE)], np.uint64
    )
    out[zero_pages(content)] = 0
    return out
