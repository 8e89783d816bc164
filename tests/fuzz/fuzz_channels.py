"""Fuzz targets: what comes on channels (frames, urgent messages) and the machines that take it.

Each target may raise nothing: what the code under it may raise is caught where it is called, and is
RemoteProtocolError, or Damaged where a frame is one. Everything else that it promises is asserted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from fuzz_draw import Draw

from pageferry.transport import urgent, wire
from pageferry.transport.channel import (
    MAX_IN_FLIGHT,
    Acked,
    Lost,
    ReceivingChannel,
    SendingChannel,
    Synced,
)
from pageferry.transport.codecs import BY_WIRE_ID, CODECS, Decoders
from pageferry.transport.errors import PeerLost, RemoteProtocolError
from pageferry.transport.pages import NO_RUNS, PAGE_SIZE
from pageferry.transport.wire import Damaged, Frame, Kind

_TURNS = 64
_decoders = Decoders()


def _state(machine: object) -> str:
    return repr(sorted(vars(machine).items()))


# ---- frames --------------------------------------------------------------------------------


def sealed(meta: bytes) -> bytes:
    """With the checksum that it should have: bytes at random never get beyond it."""
    at = wire.HEADER_SIZE - 8
    if len(meta) < wire.HEADER_SIZE:
        return meta
    blank = meta[:at] + bytes(8) + meta[at + 8 :]
    return meta[:at] + wire.xxhash.xxh3_64_digest(blank)[::-1] + meta[at + 8 :]


def _same(a: Frame, b: Frame) -> bool:
    """But for sums of headers and payloads."""
    plain = {"payload_sum": 0, "meta_sum": 0, "zero": NO_RUNS, "raw": NO_RUNS, "packed": NO_RUNS}
    bare = [replace(f, **plain, delta=f.delta and replace(f.delta, pages=NO_RUNS)) for f in (a, b)]
    return bare[0] == bare[1] and all(
        np.array_equal(x, y)
        for one, other in zip(a.tables, b.tables, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def frame(data: bytes) -> None:
    """A frame's meta, as it is and with the right checksum."""
    for meta in (data, sealed(data)):
        try:
            found = wire.decode(meta)
        except (Damaged, RemoteProtocolError):
            continue
        assert found.page_total <= 2 * wire.MAX_BATCH_PAGES
        assert 0 <= found.packed_size <= found.payload_size <= wire.MAX_PAYLOAD
        assert 0 <= found.delta_size <= found.payload_size
        if found.kind is not Kind.DATA:
            assert _same(wire.decode(wire.encode_control(found)), found)
            continue
        assert wire.content_matches(found, (b"",)) in (True, False)
        if found.payload_size > 1 << 16:
            continue
        payload = b"\x5a" * found.payload_size
        again = wire.encode_data(found, (payload,))
        assert _same(wire.decode(again), found)
        assert wire.payload_matches(again, wire.decode(again), payload)
        if payload:
            assert not wire.payload_matches(again, wire.decode(again), b"\x5b" + payload[1:])


def codec(data: bytes) -> None:
    """Decompression: exactly what was announced, or an error; and what was packed comes back."""
    draw = Draw(data)
    wire_id = draw.byte()
    size = draw.one_of((1, 2, 3, 16, 256, wire.MAX_BATCH_PAGES)) * PAGE_SIZE
    body = draw.rest()
    try:
        out = _decoders.get(wire_id).decompress(memoryview(body), size)
    except RemoteProtocolError:
        pass
    else:
        assert len(out) == size
    packing = CODECS[BY_WIRE_ID[wire_id % len(BY_WIRE_ID)].name]()
    content = body.ljust(-(-max(len(body), 1) // PAGE_SIZE) * PAGE_SIZE, b"\0")
    assert bytes(packing.decompress(packing.compress(content), len(content))) == content


def _frame_of(draw: Draw, kinds: tuple[Kind, ...], next_: int, round_: int) -> bytes:
    """A frame that may be next, or anything."""
    kind = draw.one_of(kinds)
    seq = draw.number(64, next_)
    if kind is not Kind.DATA:
        return wire.encode_control(
            Frame(kind, seq, draw.number(32, round_), frames=draw.number(64, 1),
                  pages=draw.number(64, 1), last=draw.number(64, seq))
        )  # fmt: skip
    pages = np.arange(draw.below(4), dtype=np.int64)
    runs = (pages * 2, np.ones(len(pages), np.int64))
    payload = bytes(len(pages) * PAGE_SIZE)
    return wire.encode_data(
        Frame(Kind.DATA, seq, draw.number(32, round_), raw=runs), (payload,) if payload else ()
    )


def receiving(data: bytes) -> None:
    """The destination's half of a channel, fed by a source that says anything."""
    draw, channel = Draw(data), ReceivingChannel()
    placed: set[int] = set()
    answered: set[int] = set()
    expected, round_ = 0, 1
    for _ in range(_TURNS):
        if not draw:
            break
        meta = _frame_of(draw, tuple(Kind), expected, round_)
        payload = bytes(draw.below(4) * PAGE_SIZE)
        if draw.byte() % 8 == 0:
            meta = meta[: draw.byte()]
        before = _state(channel)
        try:
            found = channel.receive(meta, payload)
        except RemoteProtocolError:
            assert _state(channel) == before
            continue
        if found is not None:
            assert found.frame.round == channel.round and found.frame.seq >= expected
            placed.add(found.frame.seq)
            channel.placed(found.frame)
        expected = max(expected, channel._expected)
        round_ = channel.round
        assert 0 <= channel.lost <= MAX_IN_FLIGHT * _TURNS
        for answer in channel.answers(idle=bool(draw.byte() & 1)):
            said = wire.decode(answer)
            if said.kind is Kind.SYNC_ACK:
                continue
            assert said.seq <= said.last < expected
            numbers = set(range(said.seq, said.last + 1))
            assert not numbers & answered
            assert numbers <= placed if said.kind is Kind.ACK else not numbers & placed
            answered |= numbers


def sending(data: bytes) -> None:
    """The source's half of a channel, answered by a destination that says anything."""
    draw, channel = Draw(data), SendingChannel[int](4 << 20)
    waiting: dict[int, int] = {}
    syncing = False
    for _ in range(_TURNS):
        if not draw:
            break
        match draw.byte() % 4:
            case 0 if not syncing:
                size = draw.below(4) * PAGE_SIZE
                if channel.may_send(size):
                    waiting[channel.next_seq()] = size
                    channel.sent(channel.next_seq(), size, size // PAGE_SIZE)
            case 1 if channel.idle and not syncing:
                assert wire.decode(channel.sync()).kind is Kind.SYNC
                syncing = True
            case _:
                syncing = _answer_anything(draw, channel, waiting, syncing)
        assert channel.in_flight == sum(waiting.values()) and channel.idle == (not waiting)


def _answer_anything(
    draw: Draw, channel: SendingChannel[int], waiting: dict[int, int], syncing: bool
) -> bool:
    """Whether the barrier is still waited for."""
    near = min(waiting, default=channel.next_seq() - 1)
    meta = _frame_of(draw, tuple(Kind), max(near, 0), channel.round)
    if draw.byte() % 8 == 0:
        meta = meta[: draw.byte()]
    before, round_ = _state(channel), channel.round
    try:
        events = channel.receive(meta)
    except (RemoteProtocolError, PeerLost):
        assert _state(channel) == before
        return syncing
    for event in events:
        match event:
            case Acked() | Lost():
                del waiting[event.token]  # once, and only what was sent
            case Synced():
                assert syncing and not waiting and event.round == round_
                syncing = False
    return syncing


# ---- urgent --------------------------------------------------------------------------------


def sealed_urgent(message: bytes) -> bytes:
    """With the sums that it should have."""
    head, payload = message[: urgent._HEAD.size], message[urgent.HEADER_SIZE :]
    if len(message) < urgent.HEADER_SIZE:
        return message
    total = urgent._digest(payload, urgent._digest(head)) if payload else 0
    return head + urgent._SUMS.pack(total, urgent._digest(head, total)) + payload


def urgent_message(data: bytes) -> None:
    """An urgent message, as it is and with the right sums."""
    for message in (data, sealed_urgent(data)):
        try:
            found = urgent.decode(message)
        except RemoteProtocolError:
            continue
        if found is None:
            continue
        assert found.count <= urgent.MAX_HOST_PAGES
        assert len(found.payload) <= urgent.MAX_HOST_PAGES * PAGE_SIZE
        again = urgent.encode(
            found.kind, found.number, found.block, found.page, found.count, found.held,
            bytes(found.payload),
        )  # fmt: skip
        assert again == bytes(message)


def _urgent_of(draw: Draw, number: int, page: int) -> bytes:
    kind = draw.one_of((1, 2, 3, 4, 5))
    number = draw.number(32, number)
    if kind == urgent.Kind.PAGE:
        count = draw.below(3)
        payload = bytes(count * PAGE_SIZE)
    elif kind == urgent.Kind.PLACED:
        count = draw.below(5)
        payload = b"".join(draw.number(32, number).to_bytes(4, "little") for _ in range(count))
    else:
        count, payload = draw.number(16, 1), b""
    whole = urgent.encode(
        kind, number, draw.number(16, 0), draw.number(64, page), count, draw.number(32), payload
    )
    return whole if draw.byte() % 8 else whole[: draw.byte()]


def answering(data: bytes) -> None:
    """The source's half of the urgent channel: each page is placed once, if it was sent."""
    draw, session = Draw(data), urgent.Answering[int]()
    asked, sent = -1, set()
    for _ in range(_TURNS):
        if not draw:
            break
        before = _state(session)
        try:
            event = session.receive(_urgent_of(draw, max(asked + draw.below(2), 0), 0))
        except RemoteProtocolError:
            assert _state(session) == before
            continue
        if isinstance(event, urgent.Request):
            assert event.number > asked
            asked = event.number
            match draw.byte() % 3:
                case 0:
                    session.elsewhere(event)
                case 1:
                    assert urgent.decode(session.page(event, event.number, b"", 0)) is not None
                    sent.add(event.number)
        elif isinstance(event, urgent.Placed):
            assert len(event.tokens) == len(set(event.tokens))
            assert sent.issuperset(event.tokens)
            sent.difference_update(event.tokens)
        assert session.idle == (not sent)


def requesting(data: bytes) -> None:
    """The destination's half: what comes was asked for, and each request is answered once."""
    draw, session = Draw(data), urgent.Requesting[int]()
    asked: dict[int, tuple[int, int]] = {}
    for _ in range(_TURNS):
        if not draw:
            break
        if draw.byte() % 3 == 0:
            block, page = draw.below(2), draw.below(8)
            instead = draw.number(32, session.last) if draw.byte() % 2 else -1
            session.ask(block, page, session.last + 1, instead=instead)
            asked[session.last] = (block, page)
            continue
        before = _state(session)
        try:
            event = session.receive(_urgent_of(draw, max(session.last, 0), draw.below(8)))
        except RemoteProtocolError:
            assert _state(session) == before
            continue
        if isinstance(event, urgent.Page | urgent.Elsewhere):
            assert asked.pop(event.token) == (event.block, event.page)
        if isinstance(event, urgent.Page):
            session.placed(event.number)
        if draw.byte() % 4 == 0:
            report = urgent.decode(session.report())
            assert report is not None and report.count <= urgent.MAX_PLACED


TARGETS = {
    f.__name__.replace("_", "-"): f
    for f in (frame, codec, receiving, sending, urgent_message, answering, requesting)
}
