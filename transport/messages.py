"""Control messages between the two coordinators, and what both ends must agree on.

msgpack through msgspec: typed, bounded, no code in it. A message that does not decode is a
RemoteProtocolError that names the field. Which message may come when: session.py.
"""

from __future__ import annotations

import msgspec
import numpy as np

from .errors import PageferryError, RemoteProtocolError, by_name
from .pages import Runs, check_runs

# A session of another number is refused: both ends say theirs first.
PROTOCOL = 4
# What a destination says: a bit a page at the most.
MAX_MESSAGE = 256 << 20
# What anybody may say to somebody who listens: libzmq keeps that much of each stranger.
MAX_TO_DESTINATION, MAX_TO_SERVER = 8 << 20, 64 << 20
# Device state and ELF headers are small; more than this is not a guest we know. In parts of:
MAX_STATE = 256 << 20
STATE_PART = 4 << 20
MAX_BLOCKS = 65535
MAX_WORKERS = 64
# 64 TiB. Nothing larger has been built.
MAX_BLOCK_SIZE = 1 << 46


# Capabilities in a Hello: the guest may start before its memory has arrived; the urgent channel
# is a connection of its own, not ZeroMQ's.
POSTCOPY, DIRECT = "postcopy-ram", "postcopy-direct"
# Frames have sums of their pages, and the destination reads back some of what it places; or all.
PAGE_SUMS, READ_BACK = "page-sums", "read-back"
# A kind, and a capability, so that a receiver that does not know it refuses it: a trial run, which
# goes into memory that is thrown away. No more than this, holes included.
SAMPLE = "sample"
MAX_SAMPLE = 1 << 30


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all control messages."""


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block as both ends see it. `offset`: its place in an image file, bytes."""

    name: str
    size: int
    page_size: int = 4096
    offset: int = 0


class Hello(Message, frozen=True, tag="hello", omit_defaults=True):
    """Source: what is about to come. The destination checks every field. `key`: only with keys,
    here and in all other messages that have one: the public key that this end has on the channels
    of this connection, made for them alone."""

    protocol: int
    version: str
    uuid: str
    kind: str
    blocks: list[Block]
    workers: int
    batch_pages: int
    capabilities: list[str] = []
    image_size: int = 0
    name: str = ""  # what it is to be called, where many arrive
    key: bytes = b""


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """Destination: RAM is laid out, receivers listen. One endpoint and one token a channel.

    An endpoint is "tcp:PORT" (the host is the one the source dialled) or "ipc:PATH".
    `fresh[i]`: block i reads as zero everywhere, so its zero pages need not travel.
    `urgent`: endpoint and token of the urgent channel, if postcopy was asked for. `have`: digests
    of what the blocks hold already, 16 bytes (xxh3-128) for each MiB, a string a block; or empty.
    `compares`: it answers Contents.
    """

    version: str
    endpoints: list[str]
    tokens: list[bytes]
    fresh: list[bool]
    kind: str = ""
    urgent: tuple[str, bytes] | None = None
    have: list[bytes] = []
    compares: bool = False
    key: bytes = b""


class Refused(Message, frozen=True, tag="refused"):
    """Destination: no. `field` is what does not match."""

    error: str
    field: str
    message: str


class Discard(Message, frozen=True, tag="discard"):
    """Source: these pages of `block` are zero, whatever they were."""

    block: int
    starts: list[int]
    counts: list[int]


class Contents(Message, frozen=True, tag="contents"):
    """Source: these pages of `block` have these digests (xxh3-128, 16 bytes a page); which of them
    may you have? With `sure` (half a SHA-256 each): make those that you have."""

    block: int
    starts: list[int]
    counts: list[int]
    digests: bytes
    sure: bytes = b""


class Held(Message, frozen=True, tag="held"):
    """Destination: a bit for each page of Contents (numpy's packbits order): it may be here
    somewhere; with `sure`: it is there now."""

    bits: bytes


class Missing(Message, frozen=True, tag="missing"):
    """Source: these pages of `block` come only after the guest runs: throw away what you have of
    them, and catch who touches them (QEMU: MIG_CMD_POSTCOPY_RAM_DISCARD)."""

    block: int
    starts: list[int]
    counts: list[int]


class Discarded(Message, frozen=True, tag="discarded"):
    """Destination: done."""


class Round(Message, frozen=True, tag="round"):
    """Source, for the destination's display: a round begins."""

    number: int
    pages: int
    dirty_rate: int = 0


class DigestRequest(Message, frozen=True, tag="digest-request"):
    """Source: what do your blocks hold? With page sums: do they hold what was sent, and zeros else?
    `kept`: a bit for each MiB (numpy's packbits order), a string a block: it was left out, because
    the digests in Welcome say that it is there."""

    kept: list[bytes] | None = None


class Digests(Message, frozen=True, tag="digests"):
    """Destination: one digest a block; or, with page sums, how many pages of each block hold
    something that was not sent."""

    digests: list[bytes]
    wrong: list[int] = []


class StatePart(Message, frozen=True, tag="state-part"):
    """Source: so much of a device state that is too large for one message."""

    part: bytes


class DeviceState(Message, frozen=True, tag="device-state"):
    """Source: everything of a guest of `kind` that is not RAM (its last part), sections in a row
    (vmstate/, pipeline/device_state.py): whether it was running is one of them."""

    kind: str
    state: bytes
    postcopy: bool = False


class StateLoaded(Message, frozen=True, tag="state-loaded"):
    """Destination: the guest is whole and durable here, ready to run."""


class Run(Message, frozen=True, tag="run"):
    """Source: run. After this the source never resumes on its own."""


class Running(Message, frozen=True, tag="running", omit_defaults=True):
    """Destination: it runs here; `detail` says where. `statistics`: what a trial run cost here."""

    detail: str = ""
    statistics: dict[str, int] = {}


class PostcopyEnd(Message, frozen=True, tag="postcopy-end"):
    """Source: every page has been sent and acknowledged."""


class Ended(Message, frozen=True, tag="ended"):
    """Destination: every page is here, nothing is caught any more; the source may go.

    `latency`: the histogram of faults (workers/latency.py), `statistics`: numbers by name.
    """

    latency: list[int] = []
    statistics: dict[str, int] = {}


class Resume(Message, frozen=True, tag="resume", omit_defaults=True):
    """Source: the connection of a postcopy broke; go on with `workers` channels."""

    protocol: int
    uuid: str
    workers: int
    key: bytes = b""


class Resumed(Message, frozen=True, tag="resumed", omit_defaults=True):
    """Destination: new channels, as in Welcome, and what has arrived: a bit a page, a string a
    block (numpy's packbits order)."""

    endpoints: list[str]
    tokens: list[bytes]
    urgent: tuple[str, bytes]
    received: list[bytes]
    key: bytes = b""


class Pull(Message, frozen=True, tag="pull"):
    """Destination, which dials here: what do you have? (`pageferry serve`)"""

    protocol: int
    version: str


class Offer(Message, frozen=True, tag="offer"):
    """Source: this memory, over so many channels."""

    version: str
    uuid: str
    blocks: list[Block]
    workers: int


class Layout(Message, frozen=True, tag="layout", omit_defaults=True):
    """Destination: these pages of block 0, on host pages of `page_size` bytes; `received`: those
    that are here already, a bit a page (numpy's packbits order), empty for none."""

    page_size: int
    starts: list[int]
    counts: list[int]
    received: bytes = b""
    key: bytes = b""


class Serving(Message, frozen=True, tag="serving", omit_defaults=True):
    """Source: where to connect, as in Welcome; these pages hold something, all others are zero."""

    endpoints: list[str]
    tokens: list[bytes]
    urgent: tuple[str, bytes]
    starts: list[int]
    counts: list[int]
    key: bytes = b""


class Armed(Message, frozen=True, tag="armed"):
    """Destination: connected, and faults are caught: send."""


class Paused(Message, frozen=True, tag="paused"):
    """Either end, in postcopy: this connection is over, and why; to be recovered on another."""

    message: str


class Abort(Message, frozen=True, tag="abort"):
    """Either end: stop, and why."""

    error: str
    message: str


class Ping(Message, frozen=True, tag="ping"):
    """Either end: still here, having said `said` messages so far (pings not counted)."""

    said: int = 0


AnyMessage = (
    Hello | Welcome | Refused | Discard | Missing | Discarded | Round | DigestRequest | Digests
    | DeviceState | StateLoaded | Run | Running | PostcopyEnd | Ended | Resume | Resumed
    | Paused | Abort | Ping | Pull | Offer | Layout | Serving | Armed | Contents | Held
    | StatePart
)  # fmt: skip

# What a person reads of a peer's messages. Block names are compared, and checked (agreement.py).
_TEXTS: dict[type[Message], tuple[str, ...]] = {
    Hello: ("version", "kind", "name"),
    Welcome: ("version", "kind"),
    Refused: ("error", "field", "message"),
    Running: ("detail",),
    Offer: ("version",),
    Paused: ("message",),
    Abort: ("error", "message"),
}
# Characters of one of these.
MAX_TEXT = 4000


def printable(text: str) -> str:
    """`text` without what a terminal would act on, and not longer than anybody reads."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:MAX_TEXT])


def _readable(message: AnyMessage) -> AnyMessage:
    texts = {name: getattr(message, name) for name in _TEXTS.get(type(message), ())}
    clean = {name: printable(text) for name, text in texts.items()}
    return message if clean == texts else msgspec.structs.replace(message, **clean)


# What msgspec raises for bytes that are no message: a text that is not UTF-8, and values nested
# deeper than the stack, are no DecodeError.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """The message in `data`, or RemoteProtocolError with the field that is wrong."""
    if len(data) > MAX_MESSAGE:
        raise RemoteProtocolError(f"control message of {len(data)} bytes")
    try:
        return _readable(_decoder.decode(data))
    except UNDECODABLE as e:
        raise RemoteProtocolError(f"control message that makes no sense: {e}") from e


def abort_for(error: PageferryError) -> Abort:
    return Abort(type(error).__name__, error.message)


def refusal(error: PageferryError) -> Refused:
    """`error` as a Refused that names its field."""
    return Refused(type(error).__name__, str(error.data.get("field", "destination")), error.message)


def runs_of(message: Discard | Missing | Layout | Serving | Contents, pages: int) -> Runs:
    """The pages that a message names, of a block of `pages`; RemoteProtocolError if they are none
    of its."""
    try:
        runs: Runs = (np.array(message.starts, np.int64), np.array(message.counts, np.int64))
    except OverflowError as e:
        raise RemoteProtocolError("pages that make no sense") from e
    if len(runs[0]) != len(runs[1]) or not check_runs(runs, pages):
        raise RemoteProtocolError(f"{type(message).__name__} of pages outside of the block")
    return runs


def error_of(message: Abort | Refused) -> PageferryError:
    """The peer's reason as an error of ours."""
    field = getattr(message, "field", "")
    data = {"field": field} if field else {}
    return by_name(message.error, message.message, **data)
