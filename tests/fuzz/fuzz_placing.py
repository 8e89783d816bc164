"""Fuzz target: a receiver's whole way from a frame to the file, without its socket and its process.

The file has memory around its blocks; a model says what must be in every byte of it. As in
fuzz_channels.py, the target raises nothing but what it asserts.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import xxhash
from fuzz_draw import Draw

from pageferry.transport import wire
from pageferry.transport.channel import ReceivingChannel
from pageferry.transport.codecs import CODECS, make_codec
from pageferry.transport.errors import RemoteProtocolError, VerificationFailed
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE, Runs, apart, check_runs, pages_of, total_pages
from pageferry.transport.wire import Delta, Frame, Kind, encode_data
from pageferry.workers.checks import Checks
from pageferry.workers.counters import FIELDS, Counters, Row
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.receiver import Receiver, ReceiverJob

_FRAMES = 6
_GUARD = 2
# pages, and bytes that the last one lacks
_BLOCKS = ((8, 0), (6, 100))
_SIZE = (_GUARD + sum(pages + _GUARD for pages, _ in _BLOCKS)) * PAGE_SIZE
_BEFORE = bytes(range(1, 255)) * (_SIZE // 254 + 1)


class _Desk:
    """What a receiver needs of its own: a row of numbers."""

    row = Row(np.zeros(len(FIELDS), np.uint64))


class _Bench:
    """A receiver at a file. What it costs to make one is paid once."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _SIZE)
        file, at, self.blocks = RamFile(self.fd, "fuzz"), _GUARD, []
        for number, (pages, less) in enumerate(_BLOCKS):
            spec = Block(f"ram{number}", pages * PAGE_SIZE - less)
            self.blocks.append(RamBlock(spec, file, at * PAGE_SIZE))
            at += pages + _GUARD
        self.counters = Counters(1)
        self.checks = Checks([block.pages for block in self.blocks])
        job = ReceiverJob(
            self.blocks, self.counters, "", b"", [True, False], threading.Lock(),
            checks=self.checks, read_all=True, deltas=True,
        )  # fmt: skip
        self.receiver = Receiver(_Desk(), job)  # type: ignore[arg-type]

    def begin(self) -> None:
        self.receiver.channel = ReceivingChannel()
        os.pwrite(self.fd, _BEFORE[:_SIZE], 0)

    def held(self) -> bytes:
        return os.pread(self.fd, _SIZE, 0)

    def close(self) -> None:
        self.receiver.read_back = None
        self.receiver.context.term()
        self.checks.close()
        self.counters.close()
        self.blocks[0].file.close()


_bench: _Bench | None = None


def close() -> None:
    """Give back what the target keeps between two inputs. Idempotent."""
    global _bench  # noqa: PLW0603
    if _bench is not None:
        _bench.close()
    _bench = None


def _runs(draw: Draw) -> Runs:
    """Mostly runs that there could be."""
    found, at = [], 0
    for _ in range(draw.below(3)):
        start = draw.number(64, at)
        count = draw.number(32, 1)
        found.append((start, count))
        at = start + count
    table = np.array(found, np.uint64).reshape(-1, 2)
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)


def _frame(
    draw: Draw, channel: ReceivingChannel, bench: _Bench
) -> tuple[bytes, bytes, bytes, bytes]:
    """Meta and payload of a frame, the pages that it is about, and those that its deltas make."""
    tables = [_runs(draw), _runs(draw), _runs(draw)]
    raw, packed = (min(total_pages(runs), 2 * _SIZE // PAGE_SIZE) for runs in tables[1:])
    seed = draw.byte()
    content = bytes((seed + n // 64) % 256 for n in range((raw + packed) * PAGE_SIZE))
    name = draw.one_of(tuple(CODECS))
    payload = content[: raw * PAGE_SIZE]
    if packed:
        payload += bytes(make_codec(name).compress(content[raw * PAGE_SIZE :]))
    if (how := draw.byte()) < 64 and payload:
        at = draw.below(min(len(payload), 65536))
        payload = payload[:at] + bytes([how]) + payload[at + 1 :]
    elif how < 80:
        payload = payload[: -1 - draw.byte()]
    total = wire.payload_digest((content,), 0) ^ (draw.byte() == 255)
    frame = Frame(
        Kind.DATA, draw.number(64, channel._expected), channel.round, draw.number(16, 0),
        CODECS[name].wire_id if draw.byte() < 240 else draw.byte(), *tables,
        content_sum=total if draw.byte() < 128 else None,
    )  # fmt: skip
    made = b""
    if draw.byte() >= 128 and frame.block < len(bench.blocks):
        delta, data, made = _delta(draw, bench.blocks[frame.block])
        frame, payload = replace(frame, delta=delta), payload + data
    return encode_data(frame, (payload,) if payload else ()), payload, content, made


def _delta(draw: Draw, block: RamBlock) -> tuple[Delta, bytes, bytes]:
    """Pages of a block with some bytes changed, how they travel, and what is to come of it."""
    runs = _runs(draw)
    pages = pages_of(runs)[:8].tolist() if check_runs(runs, block.pages) else []
    lengths, data, made = b"", b"", b""
    for page in pages:
        at, other = 128 + draw.below(3900), bytes([draw.byte()]) * (1 + draw.below(60))
        encoding = bytes([at & 0x7F | 0x80, at >> 7, len(other)]) + other
        base = bytearray(block.read(page * PAGE_SIZE, PAGE_SIZE).ljust(PAGE_SIZE, b"\0"))
        base[at : at + len(other)] = other
        lengths, data = lengths + len(encoding).to_bytes(2, "little"), data + encoding
        made += base[:PAGE_SIZE]
    data = lengths + data
    if data and draw.byte() >= 192:
        place = draw.below(len(data))
        data = data[:place] + bytes([draw.byte()]) + data[place + 1 :]
    name = draw.one_of(tuple(CODECS))
    packed = bytes(make_codec(name).compress(data)) if data else b""
    total = xxhash.xxh3_64_intdigest(made) ^ (draw.byte() >= 240)
    return Delta(runs, CODECS[name].wire_id, len(packed), len(data), total), packed, made


def _store(model: bytearray, block: RamBlock, runs: Runs, content: bytes | None) -> None:
    """As the file is to be afterwards; None: zeros."""
    at = 0
    for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
        n = min(count * PAGE_SIZE, block.size - first * PAGE_SIZE)
        data = bytes(n) if content is None else content[at : at + n]
        begin = block.start + first * PAGE_SIZE
        model[begin : begin + n] = data
        at += count * PAGE_SIZE


def placing(data: bytes) -> None:
    """Frames of a hostile source, one after the other: every byte of the file is as the frames that
    were taken say, and none outside of their pages was touched."""
    global _bench  # noqa: PLW0603
    bench = _bench = _bench or _Bench()
    bench.begin()
    draw, model, receiver = Draw(data), bytearray(_BEFORE[:_SIZE]), bench.receiver
    for _ in range(_FRAMES):
        if not draw:
            break
        meta, payload, content, made = _frame(draw, receiver.channel, bench)
        if draw.byte() < 16:
            meta = wire.encode_control(
                Frame(Kind.SYNC, receiver.channel._expected, receiver.channel.round)
            )
        try:
            found = receiver.channel.receive(meta, payload)
        except RemoteProtocolError:
            break
        if found is None:
            continue
        frame = found.frame
        try:
            placed = receiver._place(frame, payload)
        except (RemoteProtocolError, VerificationFailed):
            _zeros_may_be_there(bench, model, frame)
            break
        if not placed:
            assert frame.delta is not None
            receiver.channel.not_placed(frame)
            continue
        receiver.channel.placed(frame)
        block, raw = bench.blocks[frame.block], frame.raw_size
        if receiver.channel.round > 1 or not bench.receiver.job.fresh[frame.block]:
            _store(model, block, frame.zero, None)
        _store(model, block, frame.raw, payload[:raw])
        if len(frame.packed[0]):
            # without a sum of the pages, what comes out of the codec is its word
            out = receiver.decoders.get(frame.codec).decompress(
                payload[raw : raw + frame.packed_size], total_pages(frame.packed) * PAGE_SIZE
            )
            assert frame.content_sum is None or bytes(out) == content[raw:]
            _store(model, block, frame.packed, bytes(out))
        if frame.delta is not None:
            _store(model, block, frame.delta.pages, made)
    assert bench.held() == model


def _zeros_may_be_there(bench: _Bench, model: bytearray, frame: Frame) -> None:
    """A frame that is refused may have had its zero pages cleared, and nothing else."""
    if frame.block >= len(bench.blocks):
        return
    block, held = bench.blocks[frame.block], bench.held()
    tables = frame.tables
    if all(check_runs(runs, block.pages) for runs in tables) and apart(tables):
        cleared = bytearray(model)
        _store(cleared, block, frame.zero, None)
        if held == cleared:
            model[:] = cleared


TARGETS = {"placing": placing}
