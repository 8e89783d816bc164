"""Pages as what differs from what the destination has (`--codec xbzrle`): made here, read there.

The sender takes a page once; its delta, its sum and what the cache keeps all come of that copy,
whatever the guest writes meanwhile. The base is a page that the destination said it placed
(page_cache.py). Should it hold another one all the same, the sum of what comes of the delta tells:
nothing of the frame is placed, it counts as lost, and its pages travel whole the next time.
Knows no socket. In QEMU: save_xbzrle_page and load_xbzrle in migration/ram.c.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import xxhash

from ..transport.codecs import Codec, Decoders, xbzrle
from ..transport.errors import RemoteProtocolError
from ..transport.pages import NO_RUNS, PAGE_SIZE, Bytes8, Pages, Runs, runs_of, total_pages
from ..transport.wire import Buffer, Delta
from .batches import MUST_SAVE, Batch, BatchMaker, flat
from .checks import read_block
from .counters import Row
from .page_cache import PageCache, Slots
from .ram import RamBlock

# A delta has its length in front of it, and is to be shorter than its page.
_LENGTH = 2
_LONGEST = PAGE_SIZE - _LENGTH - 1
# Not worth a codec's time.
_LEAST = 256


class DeltaMaker:
    """A sender's: makes batches with deltas. `first_page`: of each block, its first page's number
    among all."""

    def __init__(self, cache: PageCache, first_page: list[int], row: Row) -> None:
        self._cache, self._first, self._row = cache, first_page, row

    def zero(self, block: int, pages: Pages, keep: bool) -> Slots | None:
        """Zero pages are about to be sent; the slots that an acknowledgement makes valid. `keep`:
        they may be sent once more."""
        slots, own, _ = self._cache.find(pages + self._first[block])
        slots = slots[own]
        if len(slots):
            self._cache.store(slots, np.zeros((1, PAGE_SIZE // 8), np.uint64) if keep else None)
        return slots if keep else None

    def make(
        self, maker: BatchMaker, block: int, pages: Pages, content: npt.NDArray[np.uint64],
        *, keep: bool, first_round: bool,
    ) -> Batch:  # fmt: skip
        """As BatchMaker.make, which gets what does not travel as a delta. `content` is a copy: it
        must not change any more."""
        slots, own, known = self._cache.find(pages + self._first[block])
        if not first_round:
            self._row.add("xbzrle_misses", len(pages) - int(np.count_nonzero(known)))
        delta, packed = None, b""
        if known.any():
            delta, packed, whole = self._deltas(maker, pages, content, slots, known)
        else:
            whole = np.ones(len(pages), np.bool_)
        self._cache.store(slots[own], content[own] if keep else None)  # when the base was read
        if whole.all():
            batch = maker.make(pages, content)
        elif whole.any():
            batch = maker.make(pages[whole], content[whole])
        else:
            batch = Batch(0, NO_RUNS, NO_RUNS, NO_RUNS, [])
        batch.delta, batch.packed_delta = delta, packed
        batch.slots = slots[own] if keep else None
        return batch

    def _deltas(
        self, maker: BatchMaker, pages: Pages, content: npt.NDArray[np.uint64],
        slots: Slots, known: npt.NDArray[np.bool_],
    ) -> tuple[Delta | None, bytes, npt.NDArray[np.bool_]]:  # fmt: skip
        """The deltas of those pages whose base is `known`, packed, and which travel whole."""
        begin = time.thread_time_ns()
        everything = bool(known.all())
        new = content if everything else content[known]
        lengths, encodings = xbzrle.encode(self._cache.content(slots[known]), new)
        short = (lengths != xbzrle.OVERFLOW) & (lengths <= _LONGEST)
        if (lengths > _LONGEST).any():  # as long as their page: they are not sent
            encodings = encodings[np.repeat(short[lengths > 0], lengths[lengths > 0])]
        sent = lengths[short]
        self._row.add("xbzrle_pages", len(new))
        self._row.add("xbzrle_overflow", len(new) - len(sent))
        plain = sent.astype("<u2").tobytes() + encodings.tobytes()
        self._row.add("xbzrle_bytes", len(plain) + (len(new) - len(sent)) * PAGE_SIZE)
        self._row.add("codec_ns", time.thread_time_ns() - begin)
        whole = ~known
        whole[known] = ~short
        if not len(sent):
            return None, b"", whole
        layer, packed = self._pack(maker.layer(), plain)
        self._row.add("delta_pages", len(sent))
        made = new if len(sent) == len(new) else new[short]
        delta = Delta(runs_of(pages[~whole]), layer, len(packed), len(plain), _sum(flat(made)))
        return delta, packed, whole

    def _pack(self, codec: Codec | None, plain: bytes) -> tuple[int, bytes]:
        """Wire id of the layer, and the deltas in it; none if it does not pay."""
        if codec is None or len(plain) < _LEAST:
            return 0, plain
        begin = time.thread_time_ns()
        packed = bytes(codec.compress(plain))
        self._row.add("codec_ns", time.thread_time_ns() - begin)
        if len(packed) > (1 - MUST_SAVE) * len(plain):
            return 0, plain
        return codec.wire_id, packed

    def acknowledge(self, slots: Slots) -> None:
        """The destination has placed what was sent of these."""
        self._cache.acknowledge(slots)


def restore(block: RamBlock, delta: Delta, data: Buffer, decoders: Decoders) -> memoryview | None:
    """The pages that `data` makes of those in the block; None if these are not what it was made
    for. RemoteProtocolError if it is no delta at all. `delta.pages` are within the block."""
    n = total_pages(delta.pages)
    plain = data
    if delta.layer:
        plain = decoders.get(delta.layer).decompress(data, delta.plain_size)
    lengths = np.frombuffer(plain, "<u2", n).astype(np.int64)
    if int(lengths.max()) > PAGE_SIZE:
        raise RemoteProtocolError("a delta that is longer than its page")
    pages = np.empty((n, PAGE_SIZE), np.uint8)
    _read(block, delta.pages, pages)
    xbzrle.decode(pages, lengths, memoryview(plain)[n * _LENGTH :])
    content = pages.reshape(-1).data
    return content if _sum(content) == delta.content_sum else None


def _read(block: RamBlock, runs: Runs, pages: Bytes8) -> None:
    """The pages of `runs` as they are in the block; behind its end are zeros."""
    view, at = pages.reshape(-1).data, 0
    for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
        there = min(count * PAGE_SIZE, block.size - first * PAGE_SIZE)
        read_block(block, first * PAGE_SIZE, view[at : at + there])
        view[at + there : at + count * PAGE_SIZE] = bytes(count * PAGE_SIZE - there)
        at += count * PAGE_SIZE


def _sum(content: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(content)
