"""Fuzz targets: what the coordinators say to each other, and what is checked of it afterwards.

As in fuzz_channels.py, a target raises nothing but what it asserts.
"""

from __future__ import annotations

import contextlib
import typing

import numpy as np
from fuzz_draw import Draw

from pageferry.pipeline import agreement, narration
from pageferry.transport import curve, keys, messages
from pageferry.transport.errors import (
    ConnectError,
    LocalProtocolError,
    PageferryError,
    PeerRefused,
    RemoteProtocolError,
    UsageError,
)
from pageferry.transport.links import Endpoint, parse_endpoint
from pageferry.transport.messages import Block
from pageferry.transport.quantities import parse_duration, parse_rate, parse_size
from pageferry.transport.session import TRANSITIONS, Phase, Role, Session
from pageferry.workers import latency
from pageferry.workers.content import DIGEST_BYTES, equal_digests
from pageferry.workers.guests import parse_guest
from pageferry.workers.guests.base import layout_size
from pageferry.workers.received import unpack

_PAGES = 1000
_TURNS = 64
_TCP, _IPC = Endpoint("tcp", "192.0.2.7", 4444), Endpoint("ipc", path="/run/pageferry/s")


def message(data: bytes) -> None:
    """A control message: it decodes or is refused; what it says is checked before it is used."""
    try:
        said = messages.decode(data)
    except RemoteProtocolError:
        return
    assert messages.decode(messages.encode(said)) == said
    for name in messages._TEXTS.get(type(said), ()):
        text = getattr(said, name)
        assert len(text) <= messages.MAX_TEXT and (text.isprintable() or not text)
    with contextlib.suppress(RemoteProtocolError):
        _use(said)


def _use(said: messages.AnyMessage) -> None:
    """As the ends do; RemoteProtocolError for what is refused."""
    match said:
        case messages.Hello():
            _greet(said)
        case messages.Resume():
            with contextlib.suppress(PeerRefused):
                agreement.check_key(said, secured=True)
        case messages.Abort() | messages.Refused():
            assert isinstance(messages.error_of(said), PageferryError)
        case messages.Ended():
            latency.report(said.latency)
        case messages.Offer():
            assert narration.offered(said, "there").isprintable()
        case messages.Welcome():
            for where in said.endpoints:
                for endpoint in (_TCP, _IPC):
                    with contextlib.suppress(ConnectError):
                        assert endpoint.sibling(where).scheme == endpoint.scheme
        case messages.Held():
            assert set(unpack(said.bits, _PAGES).tolist()) <= {0, 1}
        case _:
            _name_pages(said)


def _name_pages(said: messages.AnyMessage) -> None:
    match said:
        case (messages.Discard() | messages.Missing() | messages.Serving() | messages.Layout()
              | messages.Contents()):  # fmt: skip
            starts, counts = messages.runs_of(said, _PAGES)
            table = np.zeros(_PAGES, np.uint8)
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                assert 0 <= start < start + count <= _PAGES
                assert not table[start : start + count].any()
                table[start : start + count] = 1
            if isinstance(said, messages.Contents):
                pages = int(counts.sum())
                if len(said.digests) == DIGEST_BYTES * pages:
                    assert equal_digests(said.digests, said.digests).all()


def _greet(hello: messages.Hello) -> None:
    try:
        for secured in (False, True):
            with contextlib.suppress(PeerRefused):
                agreement.check_key(hello, secured=secured)
        agreement.check_hello(hello, None)
    except PeerRefused as e:
        refused = messages.decode(messages.encode(messages.refusal(e)))
        assert isinstance(refused, messages.Refused) and refused.message.isprintable()
        return
    end = 0
    for block in hello.blocks:
        assert end <= block.offset and block.size > 0 and block.name.isprintable()
        end = block.offset + block.size
    assert 0 < layout_size(hello.blocks, hello.image_size) <= 2 * messages.MAX_BLOCK_SIZE
    assert narration.arrived(hello).isprintable()


# ---- the session ---------------------------------------------------------------------------

_EXAMPLES: list[messages.AnyMessage] = [
    messages.Hello(1, "0", "id", "demo", [Block("ram", 4096)], 1, 128),
    messages.Welcome("0", ["tcp:1"], [b"a"], [True]), messages.Refused("PeerRefused", "kind", "no"),
    messages.Discard(0, [1], [2]), messages.Missing(0, [7], [8]), messages.Discarded(),
    messages.Round(1, 1), messages.DigestRequest(), messages.Digests([b"x"]),
    messages.Contents(0, [1], [1], b"x" * 16), messages.Held(b"\x80"), messages.StatePart(b"p"),
    messages.DeviceState("demo", b""), messages.StateLoaded(), messages.Run(), messages.Running(),
    messages.PostcopyEnd(), messages.Ended(), messages.Resume(1, "id", 1),
    messages.Resumed(["tcp:1"], [b"a"], ("tcp:3", b"u"), [b""]), messages.Paused("a cable"),
    messages.Abort("PeerLost", "silence"), messages.Ping(), messages.Pull(1, "0"),
    messages.Offer("0", "id", [Block("ram", 4096)], 1), messages.Layout(4096, [0], [1]),
    messages.Serving(["tcp:1"], [b"a"], ("tcp:3", b"u"), [0], [1]), messages.Armed(),
    messages.SwitchoverAck(),
]  # fmt: skip
assert {type(example) for example in _EXAMPLES} == set(typing.get_args(messages.AnyMessage))
EXAMPLES = [messages.encode(example) for example in _EXAMPLES]


def _refused(end: Session, which: int, speaks: bool) -> str:
    """Why it may not be said, or heard; empty if it may."""
    if speaks:
        try:
            end.send(_EXAMPLES[which])
        except LocalProtocolError as e:
            return str(e)
        return ""
    try:
        end.receive(EXAMPLES[which])
    except RemoteProtocolError as e:
        return str(e)
    return ""


def session(data: bytes) -> None:
    """One end: any message said or heard in any order. It moves as the table says, or raises and
    does not move; RemoteProtocolError if it was heard, LocalProtocolError if it was said."""
    draw = Draw(data)
    role = draw.one_of(tuple(Role))
    end, said = Session(role), 0
    for _ in range(_TURNS):
        if not draw:
            break
        before, which = end.phase, draw.below(len(EXAMPLES))
        kind, speaks = type(_EXAMPLES[which]), draw.byte() % 2
        speaker = role if speaks else next(other for other in Role if other is not role)
        following = TRANSITIONS.get((before, speaker, kind))
        refused = _refused(end, which, bool(speaks))
        if following is None:
            assert end.phase is before and before.value in refused
            continue
        assert not refused
        assert end.phase is following
        said += kind is messages.Run and bool(speaks)
        if said and role is Role.SOURCE:
            assert not end.may_abort and end.phase not in (Phase.IDLE, Phase.MOVING, Phase.LOADED)


# ---- keys and addresses --------------------------------------------------------------------


class _One:
    """A gatekeeper that admits one key."""

    secret, domain, mechanism = b"", "pageferry", "CURVE"
    key = curve.as_text(bytes(range(32)))

    def admits(self, key: bytes) -> bool:
        return key == self.key


def zap(data: bytes) -> None:
    """What libzmq asks of a connection, in parts: nobody gets in but who is listed."""
    request = data.split(b"\n") if b"\n" in data else [data]
    answer = curve.zap_answer(request, _One())
    assert len(answer) == 6 and answer[0] == b"1.0"
    right = [b"1.0", b"pageferry", b"CURVE", bytes(range(32))]
    is_right = len(request) == 7 and [request[i] for i in (0, 2, 5, 6)] == right
    assert (answer[2] == b"200") == is_right


def key_file(data: bytes) -> None:
    """A file with a key, and a key as somebody types it."""
    with contextlib.suppress(ValueError):
        assert curve.is_key(keys.parse_key(data))
    with contextlib.suppress(UsageError):
        assert curve.is_key(keys.public_key(data.decode(errors="replace")))
    if len(data) >= 32:
        assert curve.is_key(curve.as_text(data[:32]))


def address(data: bytes) -> None:
    """Addresses, guests, sizes, rates and durations as people write them."""
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(UsageError):
        endpoint = parse_endpoint(text)
        assert parse_endpoint(str(endpoint)) == endpoint
    with contextlib.suppress(UsageError):
        guest = parse_guest(text)
        assert parse_guest(str(guest)) == guest
        for name in guest.options:
            with contextlib.suppress(UsageError):
                assert guest.integer(name, 0) >= 0
    for parse in (parse_size, parse_rate, parse_duration):
        with contextlib.suppress(UsageError):
            assert 0 <= parse(text) < 1e40


TARGETS = {f.__name__.replace("_", "-"): f for f in (message, session, zap, key_file, address)}
