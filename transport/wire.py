"""Frames on a multifd channel: bytes in, frames out. No socket, clock, process or log inside.

A message on a channel has one or two parts. Part one is the *meta*: a fixed header and the
run tables that say which pages the frame holds. Part two, the *payload*, is one large buffer,
so that ZeroMQ sends it without a copy (below 64 KiB it copies all the same). The counterpart
of MultiFDPacket_t in QEMU's migration/multifd.h, with runs in place of single offsets.

    header   magic, version, kind, codec, flags, block, round, seq,
             zero/raw/packed/delta run counts, payload size, payload sum, meta sum
    runs     starts (u64 each), then counts (u32 each): zero, raw, packed and delta runs
    sum      if flags say so: xxh3-64 of the frame's pages as they were read, raw ones, then packed
    delta    if there are such runs: what those pages are made of, and their sum
    payload  the raw pages, then the packed pages as one output of the codec, then the deltas: the
             length of each (u16), then all of them (codecs/xbzrle.py), as one output of their layer

The meta has a checksum of its own (xxh3-64), so that a frame whose payload is damaged can
still be named in a NACK. The payload's sum is seeded with the meta's: a payload under
somebody else's meta does not pass. Every number is bounded before anything is allocated.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from .errors import RemoteProtocolError
from .pages import NO_RUNS, PAGE_SIZE, Runs, total_pages

Buffer = bytes | bytearray | memoryview

MAGIC = 0x4650  # "PF"
VERSION = 1
# Pages with content in one frame: 8 MiB, the largest batch a user may ask for. And as many zero
# ones: they cost no payload, but a receiver of a postcopy has a list of all pages of a frame.
MAX_BATCH_PAGES = 2048
# Runs in one table: a full batch of single pages, or that many holes.
MAX_RUNS = MAX_BATCH_PAGES
# A codec that cannot shrink a batch adds a little; such a batch travels raw.
MAX_PAYLOAD = MAX_BATCH_PAGES * PAGE_SIZE
_HEADER = struct.Struct("<HBBBBHIQHHHHIQQ")
_SUM = struct.Struct("<Q")
# Codec that the deltas are packed with, their bytes with and without it, sum of what they make.
_DELTA = struct.Struct("<BxxxIIQ")
_LENGTH = 2  # bytes that say how long a delta is
HEADER_SIZE = _HEADER.size
MAX_META = HEADER_SIZE + 4 * MAX_RUNS * 12 + _SUM.size + _DELTA.size
# The only flag: a sum of the pages stands behind the runs.
_HAS_CONTENT_SUM = 1


class Kind(enum.IntEnum):
    """DATA and SYNC go from source to destination, the others come back."""

    DATA = 1
    SYNC = 2
    ACK = 3
    NACK = 4
    SYNC_ACK = 5


_KINDS = {int(kind): kind for kind in Kind}


class Damaged(Exception):
    """A frame whose checksum does not match: it is lost, the connection is not."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Pages of a DATA frame that travel as what differs from what the destination has. `layer`: the
    codec that it is packed with; `size`, `plain_size`: bytes with and without it, lengths included;
    `content_sum`: xxh3-64 of the pages that are made of it. It tells another base."""

    pages: Runs
    layer: int
    size: int
    plain_size: int
    content_sum: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `seq` counts per channel; the meaning of the rest depends on `kind`.

    DATA: `zero`, `raw`, `packed` and `delta` are the pages of `block`, `payload_size` bytes follow.
    `content_sum`: of the pages themselves, as they were before they were packed.
    SYNC, SYNC_ACK: `frames` and `pages` of `round` that were acknowledged / placed.
    ACK, NACK: the frames from `seq` to `last`.
    """

    kind: Kind
    seq: int
    round: int = 0
    block: int = 0
    codec: int = 0
    zero: Runs = NO_RUNS
    raw: Runs = NO_RUNS
    packed: Runs = NO_RUNS
    payload_size: int = 0
    payload_sum: int = 0
    meta_sum: int = 0
    frames: int = 0
    pages: int = 0
    last: int = 0
    content_sum: int | None = None
    delta: Delta | None = None

    @property
    def raw_size(self) -> int:
        return total_pages(self.raw) * PAGE_SIZE

    @property
    def packed_size(self) -> int:
        """Bytes of the packed part of the payload."""
        return self.payload_size - self.raw_size - self.delta_size

    @property
    def delta_size(self) -> int:
        return self.delta.size if self.delta is not None else 0

    @property
    def tables(self) -> tuple[Runs, ...]:
        """Its pages by how they travel: zero, raw, packed, delta."""
        delta = self.delta.pages if self.delta is not None else NO_RUNS
        return self.zero, self.raw, self.packed, delta

    @property
    def page_total(self) -> int:
        return sum(map(total_pages, self.tables))


def _pack_runs(tables: Iterable[Runs]) -> bytes:
    parts = []
    for starts, counts in tables:
        if len(starts):
            parts += [starts.astype("<u8").tobytes(), counts.astype("<u4").tobytes()]
    return b"".join(parts)


def encode_data(frame: Frame, payload: Iterable[Buffer] = ()) -> bytes:
    """The meta of a DATA frame whose payload is the concatenation of `payload`."""
    runs = _pack_runs(frame.tables)
    flags = 0
    if frame.content_sum is not None:
        flags, runs = _HAS_CONTENT_SUM, runs + _SUM.pack(frame.content_sum)
    if (delta := frame.delta) is not None:
        runs += _DELTA.pack(delta.layer, delta.size, delta.plain_size, delta.content_sum)
    lengths = [len(starts) for starts, _ in frame.tables]
    size = sum(len(memoryview(part)) for part in payload)

    def head(payload_sum: int, meta_sum: int) -> bytes:
        return _HEADER.pack(
            MAGIC, VERSION, Kind.DATA, frame.codec, flags, frame.block, frame.round, frame.seq,
            *lengths, size, payload_sum, meta_sum,
        )  # fmt: skip

    total = payload_digest(payload, xxhash.xxh3_64_intdigest(head(0, 0) + runs)) if size else 0
    return head(total, xxhash.xxh3_64_intdigest(head(total, 0) + runs)) + runs


def payload_digest(payload: Iterable[Buffer], identity: int) -> int:
    """The payload's sum: xxh3-64 seeded with the sum of the meta that announces it."""
    state = xxhash.xxh3_64(seed=identity)
    for part in payload:
        state.update(part)
    return state.intdigest()


def encode_control(frame: Frame) -> bytes:
    """SYNC, ACK, NACK or SYNC_ACK: one part, no payload."""
    body = struct.pack("<QQQ", frame.frames, frame.pages, frame.last)

    def head(meta_sum: int) -> bytes:
        return _HEADER.pack(
            MAGIC, VERSION, frame.kind, 0, 0, 0, frame.round, frame.seq, 0, 0, 0, 0, 0, 0, meta_sum
        )

    return head(xxhash.xxh3_64_intdigest(head(0) + body)) + body


def decode(meta: Buffer) -> Frame:
    """The frame that `meta` announces.

    Raises Damaged if its checksum does not match, RemoteProtocolError if it is intact and
    still nonsense: then the peer speaks another protocol or means harm.
    """
    view = memoryview(meta)
    if not HEADER_SIZE <= len(view) <= MAX_META:
        raise Damaged(f"{len(view)} bytes are no frame")
    fields = _HEADER.unpack_from(view)
    magic, version, kind, codec, flags, block, round_, seq = fields[:8]
    n_zero, n_raw, n_packed, n_delta, size, payload_sum, meta_sum = fields[8:]
    blank = bytes(view[: HEADER_SIZE - 8]) + bytes(8)
    if xxhash.xxh3_64_intdigest(blank + bytes(view[HEADER_SIZE:])) != meta_sum:
        raise Damaged("checksum of a frame header")
    if magic != MAGIC or version != VERSION or flags & ~_HAS_CONTENT_SUM:
        raise RemoteProtocolError(f"frame of version {version}, not {VERSION}")
    if kind != Kind.DATA:
        if flags:
            raise RemoteProtocolError("a control frame with flags")
        return _decode_control(view, kind, round_, seq, meta_sum)
    if max(n_zero, n_raw, n_packed, n_delta) > MAX_RUNS or size > MAX_PAYLOAD:
        raise RemoteProtocolError(f"frame of {size} bytes is above the bound of {MAX_PAYLOAD}")
    end = HEADER_SIZE + 12 * (n_zero + n_raw + n_packed + n_delta)
    delta_at = end + (_SUM.size if flags else 0)
    if len(view) != delta_at + (_DELTA.size if n_delta else 0):
        raise RemoteProtocolError("frame whose run tables do not match its length")
    raw_at = HEADER_SIZE + 12 * n_zero
    packed_at = raw_at + 12 * n_raw
    delta = None
    if n_delta:
        runs = _unpack_runs(view, packed_at + 12 * n_packed, n_delta)
        delta = Delta(runs, *_DELTA.unpack_from(view, delta_at))
    frame = Frame(
        Kind.DATA, seq, round_, block, codec,
        _unpack_runs(view, HEADER_SIZE, n_zero),
        _unpack_runs(view, raw_at, n_raw),
        _unpack_runs(view, packed_at, n_packed),
        payload_size=size, payload_sum=payload_sum, meta_sum=meta_sum,
        content_sum=_SUM.unpack_from(view, end)[0] if flags else None, delta=delta,
    )  # fmt: skip
    return _check_sizes(frame)


def _unpack_runs(view: memoryview, at: int, n: int) -> Runs:
    if n == 0:
        return NO_RUNS
    starts = np.frombuffer(view, "<u8", n, at).astype(np.int64)
    counts = np.frombuffer(view, "<u4", n, at + 8 * n).astype(np.int64)
    return starts, counts


def _check_sizes(frame: Frame) -> Frame:
    content = sum(map(total_pages, frame.tables[1:]))
    if (most := max(content, total_pages(frame.zero))) > MAX_BATCH_PAGES:
        raise RemoteProtocolError(f"frame of {most} pages is above {MAX_BATCH_PAGES}")
    packed = len(frame.packed[0]) > 0
    if frame.packed_size < 0 or (frame.packed_size > 0) != packed:
        raise RemoteProtocolError("frame whose payload does not match its pages")
    if (delta := frame.delta) is not None:
        n, plain = total_pages(delta.pages), delta.plain_size
        packed = delta.layer != 0 and delta.size > 0
        if not n * _LENGTH <= plain <= n * (_LENGTH + PAGE_SIZE) or (
            not packed and delta.size != plain
        ):
            raise RemoteProtocolError("frame whose deltas do not match their pages")
    return frame


def _decode_control(view: memoryview, kind: int, round_: int, seq: int, meta_sum: int) -> Frame:
    if kind not in _KINDS or len(view) != HEADER_SIZE + 24:
        raise RemoteProtocolError(f"frame of unknown kind {kind}")
    frames, pages, last = struct.unpack_from("<QQQ", view, HEADER_SIZE)
    return Frame(
        _KINDS[kind], seq, round_, meta_sum=meta_sum, frames=frames, pages=pages, last=last
    )


def payload_matches(meta: Buffer, frame: Frame, payload: Buffer) -> bool:
    """True if `payload` is what the sender of `meta` announced."""
    if len(payload) != frame.payload_size:
        return False
    if frame.payload_size == 0:
        return True
    head = bytearray(meta)
    head[HEADER_SIZE - 16 : HEADER_SIZE] = bytes(16)
    return payload_digest((payload,), xxhash.xxh3_64_intdigest(head)) == frame.payload_sum


def content_matches(frame: Frame, content: Iterable[Buffer]) -> bool:
    """True if `content`, the pages of a frame, raw ones, then packed, is what was read at the
    source. One whose pages are all raw needs no sum of its own: the payload's is theirs."""
    if frame.content_sum is None:
        return not len(frame.packed[0])
    return payload_digest(content, 0) == frame.content_sum
