"""Many connections over one byte stream (exec:, fd:, stdin and stdout): a multiplexer, sans-IO.

Both ends are a Mux: bytes and events go in, frames and events come out. One end dials: it alone
opens connections, each to a name beside the other end's, by which its rank is known:

    urgent    pages that a guest waits for, and the requests for them
    control   the control link
    bulk      all other channels

A frame is a header and what belongs to it. What goes first is decided frame by frame: what keeps
the stream going, then urgent, control and bulk, within a rank in turn. So an urgent page waits
behind one frame of bulk, and behind what lies in the stream already: therefore bulk that the other
end has not yet taken off the stream (SEEN) is bounded, tightly if a guest may wait for pages. Each
connection has a window (CREDIT) as well: one whose reader is slow holds up nobody, and fills no
memory. What is read off a stream is never trusted further than these bounds.

Before the first frame there may be text (a login's banner): it is skipped, up to a bound, and kept
to be shown. Knows no socket, process or clock; times are told (seconds, of any clock that goes one
way).
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from .errors import LocalProtocolError, PeerRefused, RemoteProtocolError
from .messages import MAX_WORKERS, UNDECODABLE, printable

VERSION = 1
MAGIC = b"\0pageferry-stream\0"
# Kind, connection, and how many bytes follow; of CREDIT and SEEN what they say, and nothing does.
HEADER = struct.Struct("<B3xIQ")
# Text before the first frame: what a login prints, and more than anybody configures.
MOST_NOISE = 64 << 10
# Of one frame, which is 64 KiB then: half a millisecond at 1 Gbit/s. And where nobody waits for
# pages: what a pipe takes at once, if it is as large as we make it.
CHUNK, LARGE_CHUNK = (64 << 10) - HEADER.size, (256 << 10) - HEADER.size
# Of a connection, under way or not yet taken by its reader: 100 MB/s at 20 ms.
WINDOW = 2 << 20
# Two of them, while a source connects again, with all channels there can be.
MAX_CONNECTIONS = 2 * (MAX_WORKERS + 2)
# Bulk that the other end has not taken off the stream: as much as the round trip needs, and no less
# than the first (it is 2 ms at 1 Gbit/s, 0.2 at 10); where there is no connection for urgent pages
# what the link takes in half a second besides: the control link, which is behind it, may not be
# silent for four.
LEAST_BULK, MOST_BULK = 256 << 10, 32 << 20
QUEUE_SECONDS = 0.5
# How often what was taken off the stream is said, if the stream is not idle.
SEEN_EVERY = 64 << 10
# Over so long the rate of bulk is measured.
_RATE_SECONDS = 0.5
_MOST_SMALL = 8192  # of a frame that is no DATA
# Of what is to be said before data, while the other end takes nothing: many times what there is.
_MOST_OUT = 1 << 20


class Kind(IntEnum):
    GREETING = 1
    OPEN = 2  # a connection, to the name that follows
    DATA = 3
    CREDIT = 4  # so many bytes of it were taken by the reader
    CLOSE = 5  # a connection: nothing comes on it any more, and nothing is taken
    SEEN = 6  # so many bytes of bulk were taken off the stream, since it began
    BYE = 7  # the stream ends, as it is meant to


class Rank(IntEnum):
    URGENT = 0
    CONTROL = 1
    BULK = 2


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """Who is at this end. `name`: the path of the endpoint that is behind it, "" if none is."""

    version: int
    dials: bool
    name: str


# ---- what comes out ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Greeted:
    """The other end is there."""

    name: str


@dataclass(frozen=True, slots=True)
class Opened:
    """Connect to the name with this suffix, "" for the control link."""

    connection: int
    suffix: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """For a connection's reader; `data` is valid until the next `receive`. `taken` is to follow."""

    connection: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Closed:
    """Give the reader what has arrived, then close."""

    connection: int


@dataclass(frozen=True, slots=True)
class Left:
    """The other end says that the stream ends now. `reason`: why, if it is none of the usual."""

    reason: str


Event = Greeted | Opened | Arrived | Closed | Left

_SUFFIX = re.compile(r"(?:\.(?:\d{1,5}-)?(\d{1,5}))?")


def rank_of(suffix: str) -> Rank:
    """What a connection to this name is for. RemoteProtocolError if there is no such name."""
    match = _SUFFIX.fullmatch(suffix)
    if match is None or (match[1] is not None and int(match[1]) > MAX_WORKERS):
        raise RemoteProtocolError(f"a stream has no connection named {printable(suffix)[:80]!r}")
    if match[1] is None:
        return Rank.CONTROL
    return Rank.URGENT if int(match[1]) == MAX_WORKERS else Rank.BULK


@dataclass(slots=True)
class _Connection:
    rank: Rank
    credit: int = WINDOW  # what we may still send
    room: int = WINDOW  # what the other end may still send
    owed: int = 0  # was taken by the reader, and is not told
    closed_here: bool = False
    closed_there: bool = False


class Flow:
    """How much bulk may lie in the stream. Fed with what was sent and what was seen."""

    def __init__(self) -> None:
        self.sent = self.seen = 0
        self._marks: deque[tuple[int, float]] = deque()  # sent so far, when
        self._seen: deque[tuple[int, float]] = deque()  # the same of what was seen
        self._shortest = 0.0  # round trip, of the whole life: later ones have a queue in them
        self.urgent = 0  # connections for urgent pages

    @property
    def under_way(self) -> int:
        return self.sent - self.seen

    def went(self, size: int, now: float) -> None:
        self.sent += size
        self._marks.append((self.sent, now))

    def was_seen(self, seen: int, now: float) -> None:
        """RemoteProtocolError if that cannot be."""
        if not self.seen <= seen <= self.sent:
            raise RemoteProtocolError(f"{seen} bytes were seen of {self.sent} that were sent")
        self.seen = seen
        while self._marks and self._marks[0][0] <= seen:
            trip = now - self._marks.popleft()[1]
            self._shortest = min(self._shortest or trip, trip)
        self._seen.append((seen, now))
        while len(self._seen) > 2 and now - self._seen[1][1] > _RATE_SECONDS:
            self._seen.popleft()

    @property
    def chunk(self) -> int:
        """The most of a frame."""
        return LARGE_CHUNK if not self.urgent and self.limit >= 4 * LARGE_CHUNK else CHUNK

    @property
    def limit(self) -> int:
        """The most of bulk that is under way."""
        if not self._seen:
            return LEAST_BULK
        (first, began), (last, ended) = self._seen[0], self._seen[-1]
        rate = (last - first) / (ended - began) if ended > began else 0.0
        seconds = 2 * self._shortest + (0.0 if self.urgent else QUEUE_SECONDS)
        return min(MOST_BULK, max(LEAST_BULK, int(rate * seconds)))


class Mux:
    """One end of a stream. `dials`: it opens connections, the other end makes them. `name`: the
    path of what is behind it."""

    def __init__(self, *, dials: bool, name: str = "") -> None:
        self.dials = dials
        self.name = name
        self.greeted = False
        self.left = False  # the other end has said that it is about to end
        self.ended = False  # we have
        self.noise = bytearray()  # before the first frame
        self._looking = True  # for that
        self.flow = Flow()
        self._connections: dict[int, _Connection] = {}
        self._opened = 0  # the highest number there was
        self._ready: list[dict[int, None]] = [{}, {}, {}]  # by rank, who has something, in turn
        self._stalled: set[int] = set()  # the same, but without credit
        self._out = bytearray(MAGIC)
        self._put(Kind.GREETING, msgspec.msgpack.encode(Greeting(VERSION, dials, name)))
        self._owing: set[int] = set()
        self._bulk_in = self._bulk_told = 0
        # of the frame that is being received
        self._head = bytearray()
        self._small: tuple[Kind, int, int] | None = None
        self._left_of_data = 0
        self._data_of = 0

    def __repr__(self) -> str:
        side = "dials" if self.dials else "answers"
        return f"<Mux {side} connections={len(self._connections)} greeted={self.greeted}>"

    @property
    def connections(self) -> int:
        return len(self._connections)

    # ---- what comes from the stream --------------------------------------------------------

    def receive(self, data: bytes | memoryview, now: float) -> list[Event]:
        """What the other end says. RemoteProtocolError, PeerRefused: nothing can follow."""
        events: list[Event] = []
        view = memoryview(data)
        if self._looking:
            view = self._skip(view)
        while len(view):
            view = self._step(view, events, now)
        return events

    def _skip(self, view: memoryview) -> memoryview:
        """Look for where the frames begin; what is behind that."""
        self.noise += view
        at = self.noise.find(MAGIC)
        if (at if at >= 0 else len(self.noise)) > MOST_NOISE:
            del self.noise[MOST_NOISE:]
            raise RemoteProtocolError(
                f"{MOST_NOISE >> 10} KiB came over the stream that are not pageferry's: "
                f"{self.heard()}"
            )
        if at < 0:
            return memoryview(b"")
        self._looking = False
        rest = bytes(self.noise[at + len(MAGIC) :])
        del self.noise[at:]
        return memoryview(rest)

    def heard(self) -> str:
        """What came before the first frame, the last of it, for a person."""
        text = bytes(self.noise[-2000:]).decode(errors="replace").strip()
        return printable(" ".join(text.split()))[-400:] or "nothing"

    def _step(self, view: memoryview, events: list[Event], now: float) -> memoryview:
        """A part of a frame; what is left of `view`."""
        if self._left_of_data:
            piece = view[: self._left_of_data]
            self._left_of_data -= len(piece)
            self._data(piece, events)
            return view[len(piece) :]
        wanted = HEADER.size if self._small is None else self._small[2]
        piece = view[: wanted - len(self._head)]
        self._head += piece
        if len(self._head) == wanted:
            whole = bytes(self._head)
            self._head.clear()
            if self._small is None:
                self._begin(whole, events, now)
            else:
                kind, number, _ = self._small
                self._small = None
                self._handle(kind, number, whole, events)
        return view[len(piece) :]

    def _begin(self, head: bytes, events: list[Event], now: float) -> None:
        """A frame's header."""
        code, number, size = HEADER.unpack(head)
        try:
            kind = Kind(code)
        except ValueError:
            raise RemoteProtocolError(f"a frame of kind {code} on the stream") from None
        if (kind is Kind.GREETING) == self.greeted:
            raise RemoteProtocolError(f"{kind.name} on the stream, out of turn")
        match kind:
            case Kind.DATA:
                self._begin_data(number, size)
            case Kind.CREDIT:
                self._credit(number, size)
            case Kind.SEEN:
                self.flow.was_seen(size, now)
            case Kind.CLOSE:
                self._closed(number, events)
            case _ if size > _MOST_SMALL:
                raise RemoteProtocolError(f"{kind.name} with {size} bytes on the stream")
            case _ if size:
                self._small = (kind, number, size)
            case _:
                self._handle(kind, number, b"", events)

    def _known(self, number: int) -> _Connection | None:
        """None: it was there once. RemoteProtocolError if it never was."""
        if not 0 < number <= self._opened:
            raise RemoteProtocolError(f"connection {number} of the stream was never opened")
        return self._connections.get(number)

    def _begin_data(self, number: int, size: int) -> None:
        connection = self._known(number)
        if connection is None or connection.closed_there or size > connection.room or not size:
            raise RemoteProtocolError(f"{size} bytes on connection {number}: it has no room")
        connection.room -= size
        self._left_of_data, self._data_of = size, number

    def _data(self, piece: memoryview, events: list[Event]) -> None:
        connection = self._connections[self._data_of]
        if connection.rank is Rank.BULK:
            self._bulk_in += len(piece)
        if not connection.closed_here:
            events.append(Arrived(self._data_of, piece))

    def _credit(self, number: int, size: int) -> None:
        connection = self._known(number)
        if connection is None:
            return
        connection.credit += size
        if connection.credit > WINDOW:
            raise RemoteProtocolError(f"connection {number}: more was taken than was sent")
        if number in self._stalled:
            self._stalled.remove(number)
            self._ready[connection.rank][number] = None

    def _closed(self, number: int, events: list[Event]) -> None:
        connection = self._known(number)
        if connection is None or connection.closed_there:
            raise RemoteProtocolError(f"connection {number} of the stream was closed twice")
        connection.closed_there = True
        if not connection.closed_here:
            events.append(Closed(number))
            self._close(number, connection)
        self._forget(number, connection)

    def _handle(self, kind: Kind, number: int, payload: bytes, events: list[Event]) -> None:
        """A small frame that is there as a whole."""
        try:
            match kind:
                case Kind.GREETING:
                    events.append(self._greet(msgspec.msgpack.decode(payload, type=Greeting)))
                case Kind.OPEN:
                    events.append(self._open(number, payload.decode()))
                case _:
                    self.left = True
                    events.append(Left(printable(payload.decode())))
        except UNDECODABLE as e:
            raise RemoteProtocolError(f"{kind.name} on the stream that is none: {e}") from e

    def _greet(self, greeting: Greeting) -> Greeted:
        if greeting.version != VERSION:
            raise PeerRefused(
                f"the other end speaks version {greeting.version} over a stream, this one "
                f"{VERSION}: use the same pageferry at both ends",
                field="protocol",
            )
        if greeting.dials == self.dials:
            raise RemoteProtocolError(
                "both ends of the stream are "
                + ("a source, or it gives back what it gets" if self.dials else "a receiver")
                + ": `pageferry send` belongs to one end, `pageferry receive` to the other"
            )
        if not greeting.dials and (not greeting.name or len(greeting.name.encode()) > 107):
            raise RemoteProtocolError("the other end of the stream has no name")
        if not greeting.name.isprintable():  # a person reads it, and pastes it
            raise RemoteProtocolError("the other end of the stream has a name that cannot be shown")
        self.greeted = True
        return Greeted(greeting.name)

    def _open(self, number: int, suffix: str) -> Opened:
        if self.dials or number <= self._opened:
            raise RemoteProtocolError(f"connection {number} is not the other end's to open")
        if len(self._connections) >= MAX_CONNECTIONS:
            raise RemoteProtocolError(f"more than {MAX_CONNECTIONS} connections over one stream")
        if len(self._out) > _MOST_OUT:  # each is closed again, which is to be said
            raise RemoteProtocolError("the other end opens connections, and takes no answer")
        self._add(number, suffix)
        self._opened = number
        return Opened(number, suffix)

    # ---- what connections do ---------------------------------------------------------------

    def open(self, suffix: str) -> int:
        """Somebody here has connected to the name with this suffix; 0 if there are too many."""
        if not (self.dials and self.greeted):
            raise LocalProtocolError("this end of the stream does not dial")
        if len(self._connections) >= MAX_CONNECTIONS or self._opened == 0xFFFFFFFF:
            return 0
        self._opened += 1
        self._add(self._opened, suffix)
        self._put(Kind.OPEN, suffix.encode(), self._opened)
        return self._opened

    def _add(self, number: int, suffix: str) -> None:
        rank = rank_of(suffix)
        self._connections[number] = _Connection(rank)
        self.flow.urgent += rank is Rank.URGENT

    def readable(self, number: int) -> None:
        """There is something to be read of a connection, as far as anybody knows."""
        connection = self._connections.get(number)
        if connection is None or connection.closed_here:
            return
        if connection.credit:
            self._ready[connection.rank][number] = None
        else:
            self._stalled.add(number)

    def drained(self, number: int) -> None:
        """There is not, for now."""
        connection = self._connections.get(number)
        if connection is not None:
            self._unready(number, connection)

    def _unready(self, number: int, connection: _Connection) -> None:
        self._ready[connection.rank].pop(number, None)
        self._stalled.discard(number)

    def choose(self) -> tuple[int, int] | None:
        """Which connection is to be read now, and how much of it at most; None: of none."""
        if not self.greeted or self.ended:
            return None
        chunk, limit = self.flow.chunk, self.flow.limit
        for rank in (Rank.URGENT, Rank.CONTROL):
            for number in self._ready[rank]:
                return number, min(chunk, self._connections[number].credit)
        for number in self._ready[Rank.BULK]:
            most = min(chunk, self._connections[number].credit)
            # whole chunks: a limit that is nearly reached makes no crumbs
            return (number, most) if self.flow.under_way + most <= limit else None
        return None

    def data(self, number: int, size: int, now: float) -> bytes:
        """The header of `size` bytes that were read of the connection that was chosen. They
        belong behind what `output` has."""
        connection = self._connections[number]
        if connection.closed_here or not 0 < size <= connection.credit:
            raise LocalProtocolError(f"{size} bytes of connection {number} are not to be sent")
        connection.credit -= size
        ready = self._ready[connection.rank]
        ready.pop(number, None)
        if connection.credit:
            ready[number] = None  # the last in turn
        else:
            self._stalled.add(number)
        if connection.rank is Rank.BULK:
            self.flow.went(size, now)
        return HEADER.pack(Kind.DATA, number, size)

    def taken(self, number: int, size: int) -> None:
        """A connection's reader has taken so much of what arrived."""
        connection = self._connections.get(number)
        if connection is None:
            return
        connection.owed += size
        if connection.owed >= WINDOW // 4:
            self._owing.add(number)

    def close(self, number: int) -> None:
        """A connection was closed here. Idempotent."""
        connection = self._connections.get(number)
        if connection is not None and not connection.closed_here:
            self._close(number, connection)
            self._forget(number, connection)

    def _close(self, number: int, connection: _Connection) -> None:
        connection.closed_here = True
        self._unready(number, connection)
        self._put(Kind.CLOSE, number=number, size=0)

    def _forget(self, number: int, connection: _Connection) -> None:
        if connection.closed_here and connection.closed_there:
            self._unready(number, connection)
            del self._connections[number]
            self.flow.urgent -= connection.rank is Rank.URGENT
            self._owing.discard(number)

    def end(self, reason: str = "") -> None:
        """Say that the stream ends; nothing is said after it. Idempotent."""
        if not self.ended:
            self.ended = True
            self._put(Kind.BYE, printable(reason).encode())

    def _put(
        self, kind: Kind, payload: bytes = b"", number: int = 0, size: int | None = None
    ) -> None:
        self._out += HEADER.pack(kind, number, len(payload) if size is None else size) + payload

    def output(self, *, idle: bool) -> bytes:
        """What goes onto the stream before anything else; b"" if nothing does. `idle`: nothing
        more has come just now."""
        if self.greeted and not self.ended:
            self._settle(idle=idle)
        if not self._out:
            return b""
        out = bytes(self._out)
        self._out.clear()
        return out

    def _settle(self, *, idle: bool) -> None:
        news = self._bulk_in - self._bulk_told
        if news >= SEEN_EVERY or (idle and news):
            self._bulk_told = self._bulk_in
            self._put(Kind.SEEN, size=self._bulk_in)
        for number in self._owing:
            connection = self._connections[number]
            connection.room += connection.owed
            self._put(Kind.CREDIT, number=number, size=connection.owed)
            connection.owed = 0
        self._owing.clear()


def ends_of(names: Iterable[str], base: str) -> list[str]:
    """The suffixes of channels' names to that of their endpoint. RemoteProtocolError."""
    found = []
    for name in names:
        if not name.startswith(base):
            raise RemoteProtocolError(f"{printable(name)[:80]} is not beside {base}")
        rank_of(name[len(base) :])
        found.append(name[len(base) :])
    return found
