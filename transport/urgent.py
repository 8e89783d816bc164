"""The urgent channel of a postcopy: requests for pages one way, pages the other. Sans-IO.

A message is a fixed header and at most one page behind it: it is made and read once a fault, so
what multifd frames (wire.py) spend on run tables is left out. The counterpart of
MIG_RP_MSG_REQ_PAGES and of the postcopy-preempt channel in QEMU's migration/ (postcopy-ram.c,
ram.c).

    header   magic, version, kind, block, count, number, held, page, payload sum, header sum

    REQUEST     destination: the host page at `page` of `block` is waited for; `number` counts up,
                `held` is how long the last answer was on the wire
    PAGE        source: here it is, `count` pages of content; `number` is the request's
    ZERO        source: it is zero, all `count` pages
    ELSEWHERE   source: a multifd channel has it, or had it
    PLACED      destination: what answered these numbers is installed, and what answered any number
                below `page`; `count` numbers follow

Requests and answers may be lost with a connection: whoever waits asks again under a new number.
An answer is settled by PLACED; until then the page counts as not delivered. A PLACED that is lost
is made good by the next one. Every number is
bounded, every header and payload summed (xxh3-64, the payload's seeded with its header's).
No socket, clock, process or log in here.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import xxhash

from .errors import LocalProtocolError, RemoteProtocolError
from .pages import PAGE_SIZE
from .wire import Buffer

MAGIC = 0x5550  # "PU"
VERSION = 1
# A host page that travels in one message: 2 MiB.
MAX_HOST_PAGES = 512
# Numbers in one PLACED.
MAX_PLACED = 256
_HEAD = struct.Struct("<HBBHHIIQ")  # what both sums cover
_SUMS = struct.Struct("<QQ")
HEADER_SIZE = _HEAD.size + _SUMS.size
MAX_MESSAGE = HEADER_SIZE + MAX_HOST_PAGES * PAGE_SIZE
_MAX_NUMBER = 0xFFFFFFFF

T = TypeVar("T")
_digest = xxhash.xxh3_64_intdigest


class Kind(enum.IntEnum):
    REQUEST = 1
    PAGE = 2
    ZERO = 3
    ELSEWHERE = 4
    PLACED = 5


_REQUEST, _PAGE, _ZERO, _ELSEWHERE, _PLACED = (int(kind) for kind in Kind)


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message that is intact. `payload` points into what was received."""

    kind: int
    block: int
    page: int
    count: int
    number: int
    held: int
    payload: Any


def encode(
    kind: int, number: int, block: int = 0, page: int = 0, count: int = 0, held: int = 0,
    payload: Buffer = b"",
) -> bytes:  # fmt: skip
    """One message. `held`: nanoseconds since the request came, for the statistics."""
    head = _HEAD.pack(MAGIC, VERSION, kind, block, count, number, min(held, _MAX_NUMBER), page)
    total = _digest(payload, _digest(head)) if payload else 0
    sums = _SUMS.pack(total, _digest(head, total))
    return b"".join((head, sums, payload)) if payload else head + sums


def decode(data: Buffer) -> Message | None:
    """The message in `data`; None if it is damaged, and then it counts as lost.

    RemoteProtocolError if it is intact and makes no sense.
    """
    if len(data) < HEADER_SIZE:
        return None
    view = memoryview(data)
    head, payload = view[: _HEAD.size], view[HEADER_SIZE:]
    total, head_sum = _SUMS.unpack_from(view, _HEAD.size)
    if _digest(head, total) != head_sum:
        return None
    magic, version, kind, block, count, number, held, page = _HEAD.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise RemoteProtocolError(f"urgent message of version {version}, not {VERSION}")
    if kind == _PAGE:
        size, bound = count * PAGE_SIZE, MAX_HOST_PAGES
    elif kind == _PLACED:
        size, bound = count * 4, MAX_PLACED
    elif kind in (_REQUEST, _ZERO, _ELSEWHERE):
        size, bound = 0, MAX_HOST_PAGES
    else:
        raise RemoteProtocolError(f"urgent message of unknown kind {kind}")
    if count > bound or (kind == _PAGE and not count):
        raise RemoteProtocolError(f"urgent message of {count} pages")
    if len(payload) != size or (size and _digest(payload, _digest(head)) != total):
        return None
    return Message(kind, block, page, count, number, held, payload)


class Request(msgspec.Struct, frozen=True, gc=False):
    """The destination waits for the host page at `page` of `block`."""

    number: int
    block: int
    page: int
    took: int = 0  # nanoseconds the last answer was on the wire, there and back; 0: unknown


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """What was sent with these tokens is installed."""

    tokens: list[T]


class Answering(Generic[T]):
    """The source's half. `token` is whatever the caller wants back when a page is placed."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, T] = {}

    def __repr__(self) -> str:
        return f"<Answering next={self._next} waiting={len(self._waiting)}>"

    @property
    def idle(self) -> bool:
        """True if every page that was sent is placed."""
        return not self._waiting

    def receive(self, data: Buffer) -> Request | Placed[T] | None:
        """What the destination wants. An illegal message raises and changes nothing."""
        message = decode(data)
        if message is None:
            return None
        if message.kind == _REQUEST:
            if message.number < self._next:
                raise RemoteProtocolError(f"request {message.number} came again")
            self._next = message.number + 1
            return Request(message.number, message.block, message.page, message.held)
        if message.kind != _PLACED:
            raise RemoteProtocolError(f"unexpected {Kind(message.kind).name}")
        numbers = struct.unpack(f"<{message.count}I", message.payload)
        # `page` may be beyond what came: requests may have been lost
        if numbers and max(numbers) >= self._next:
            raise RemoteProtocolError(f"{max(numbers)} is placed and was never asked for")
        below = [n for n in self._waiting if n < message.page]
        settled = [n for n in numbers if n in self._waiting and n >= message.page]
        return Placed([self._waiting.pop(n) for n in (*below, *dict.fromkeys(settled))])

    def page(self, request: Request, token: T, content: Buffer, held: int) -> bytes:
        """The answer with the content of the host page; an empty one stands for zeros."""
        self._waiting[request.number] = token
        count = len(content) // PAGE_SIZE
        kind = _PAGE if count else _ZERO
        return encode(kind, request.number, request.block, request.page, count, held, content)

    def forget(self, number: int) -> None:
        """What answered `number` was lost, and goes again as the answer to another one."""
        self._waiting.pop(number, None)

    def elsewhere(self, request: Request) -> bytes:
        """The answer that a multifd channel has it."""
        return encode(_ELSEWHERE, request.number, request.block, request.page)


class Page(msgspec.Struct, Generic[T], frozen=True):
    """The host page that was asked for, with what `ask` was given. Empty `content`: zeros. Install
    it, then call `placed`."""

    number: int
    token: T
    block: int
    page: int
    content: Any  # a buffer
    held: int


@dataclass(frozen=True, slots=True)
class Elsewhere(Generic[T]):
    """It comes, or came, by a multifd channel."""

    token: T
    block: int
    page: int


class Requesting(Generic[T]):
    """The destination's half. `token` comes back with the answer."""

    def __init__(self) -> None:
        self._next = 0
        self._open: dict[int, tuple[int, int, T]] = {}
        self._late: dict[int, tuple[int, int, T]] = {}  # asked for again since
        self._installing: set[int] = set()
        self._first: dict[int, int] = {}  # open -> the first number for that page
        self._placed: list[int] = []

    def __repr__(self) -> str:
        return f"<Requesting next={self._next} open={len(self._open)}>"

    @property
    def last(self) -> int:
        """The number of the last request."""
        return self._next - 1

    def ask(self, block: int, page: int, token: T, instead: int = -1, took: int = 0) -> bytes:
        """Ask for the host page at `page`; `instead` of a number whose answer stays away."""
        number = self._next
        if number > _MAX_NUMBER:
            raise LocalProtocolError("more requests than there are numbers")
        self._next += 1
        first = self._first.pop(instead, number)
        self.forget(instead)
        self._open[number] = (block, page, token)
        self._first[number] = first
        return encode(_REQUEST, number, block, page, held=took)

    def forget(self, number: int) -> None:
        """Nobody waits for the answer to `number` any more; it may still come."""
        if number in self._open:
            self._late[number] = self._open.pop(number)
            self._first.pop(number, None)

    def receive(self, data: Buffer) -> Page[T] | Elsewhere[T] | None:
        """What the source answers; None if it is damaged: then it is asked for again.

        An illegal answer raises and changes nothing.
        """
        message = decode(data)
        if message is None:
            return None
        if message.kind not in (_PAGE, _ZERO, _ELSEWHERE):
            raise RemoteProtocolError(f"unexpected {Kind(message.kind).name}")
        asked = self._open.get(message.number) or self._late.get(message.number)
        if asked is None:
            raise RemoteProtocolError(f"answer {message.number}, which nobody waits for")
        block, page, token = asked
        if (message.block, message.page) != (block, page):
            raise RemoteProtocolError(f"answer {message.number} with another page")
        self._open.pop(message.number, None)
        self._first.pop(message.number, None)
        self._late.pop(message.number, None)
        if message.kind == _ELSEWHERE:
            return Elsewhere(token, block, page)
        self._installing.add(message.number)
        return Page(message.number, token, block, page, message.payload, message.held)

    def placed(self, number: int) -> None:
        """The page that answered `number` is installed."""
        self._installing.discard(number)
        self._placed.append(number)

    @property
    def unsaid(self) -> int:
        """Pages that were placed and not yet reported."""
        return len(self._placed)

    def report(self) -> bytes:
        """PLACED for pages that were not yet reported, and for all that were before."""
        numbers, self._placed = self._placed[:MAX_PLACED], self._placed[MAX_PLACED:]
        unsettled = [*self._installing, *self._placed, *self._first.values()]
        return encode(
            _PLACED, 0, page=min(unsettled, default=self._next), count=len(numbers),
            payload=struct.pack(f"<{len(numbers)}I", *numbers),
        )  # fmt: skip
