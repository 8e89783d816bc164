"""What a worker writes into its trace ring: one record of fixed size an event. Pure.

64 bytes, little-endian: begin and duration (nanoseconds, CLOCK_MONOTONIC), the kind, and up to
six numbers, of which each kind uses those that its row in `SPECS` names. Knows no ring and no JSON.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

# begin, took, kind, block, page, pages, size, number, extra
RECORD = struct.Struct("<QQIIQQQQQ")
FIELDS = ("begin", "took", "kind", "block", "page", "pages", "size", "number", "extra")


class Kind(enum.IntEnum):
    """Which event it is. 0 is none: memory that nobody wrote."""

    # sender
    EXTENT = 1
    SCAN = 2
    DIGEST = 3
    BARRIER = 4
    BATCH = 5
    FIND_ZEROS = 6
    READ = 7
    ENCODE = 8
    FRAME = 9
    WAIT_FOR_CREDIT = 10
    WAIT_FOR_BANDWIDTH = 11
    STAND_ASIDE = 12
    IN_FLIGHT = 13
    LOST = 14
    # receiver
    PLACE = 20
    CHECK = 21
    DECODE = 22
    WAIT_FOR_TURN = 23
    WRITE = 24
    # postcopy process
    ANSWER = 30
    ELSEWHERE = 31
    CLAIM = 32
    SEND = 33
    # fault process
    FAULT = 40
    REQUEST = 41
    ASK_AGAIN = 42
    FAULT_AGAIN = 43
    KNOWN_PAGE = 44
    INSTALL = 45
    REMOVED = 46
    # savers and the guard of a snapshot; savers have EXTENT too
    KEEP = 50
    HELD_BACK = 51


class Shape(enum.Enum):
    """How it is drawn: a bar on its process's line; a mark; or a bar of its own, since many of
    them overlap."""

    SPAN = "X"
    MARK = "i"
    WAIT = "b"


class Flow(enum.Enum):
    """Its place on the arrow that follows a page from the request to the install."""

    NONE = ""
    FROM = "s"
    VIA = "t"
    TO = "f"


@dataclass(frozen=True)
class Spec:
    """How a kind is shown: its name, its category, and which fields it has by which names."""

    name: str
    category: str
    arguments: tuple[tuple[str, str], ...] = ()
    shape: Shape = Shape.SPAN
    flow: Flow = Flow.NONE


_BLOCK, _PAGE, _PAGES = ("block", "block"), ("page", "page"), ("pages", "pages")
_BYTES = ("size", "bytes")
_RANGE = (_BLOCK, _PAGE, _PAGES)
_FRAME = (*_RANGE, _BYTES, ("number", "frame"), ("extra", "round"))

SPECS: dict[Kind, Spec] = {
    Kind.EXTENT: Spec("extent", "sender", _RANGE),
    Kind.SCAN: Spec("scan", "sender", _RANGE),
    Kind.DIGEST: Spec("digest", "sender", (_BLOCK, ("number", "part"))),
    Kind.BARRIER: Spec("barrier", "sender", (("number", "round"),)),
    Kind.BATCH: Spec("batch", "sender", _RANGE),
    Kind.FIND_ZEROS: Spec("find zeros", "sender", _RANGE),
    Kind.READ: Spec("read", "sender", _RANGE),
    Kind.ENCODE: Spec("encode", "sender", (_PAGES, _BYTES)),
    Kind.FRAME: Spec("frame", "sender", _FRAME),
    Kind.WAIT_FOR_CREDIT: Spec("wait for credit", "wait", (_BYTES,)),
    Kind.WAIT_FOR_BANDWIDTH: Spec("wait for bandwidth", "wait"),
    Kind.STAND_ASIDE: Spec("stand aside", "wait"),
    Kind.IN_FLIGHT: Spec("in flight", "flight", _RANGE, Shape.WAIT),
    Kind.LOST: Spec("lost", "sender", _RANGE, Shape.MARK),
    Kind.PLACE: Spec("place", "receiver", _FRAME),
    Kind.CHECK: Spec("check", "receiver", (_BYTES,)),
    Kind.DECODE: Spec("decode", "receiver", (_BYTES,)),
    Kind.WAIT_FOR_TURN: Spec("wait for turn", "wait"),
    Kind.WRITE: Spec("write", "receiver"),
    Kind.ANSWER: Spec(
        "answer", "postcopy", (*_RANGE, _BYTES, ("number", "request")), flow=Flow.VIA
    ),
    Kind.ELSEWHERE: Spec("elsewhere", "postcopy", (_BLOCK, _PAGE, ("number", "request"))),
    Kind.CLAIM: Spec("claim", "postcopy", _RANGE),
    Kind.SEND: Spec("send", "postcopy", (_BYTES,)),
    Kind.FAULT: Spec("fault", "fault", (_BLOCK, _PAGE), Shape.WAIT),
    Kind.REQUEST: Spec(
        "request", "fault", (_BLOCK, _PAGE, ("number", "request")), flow=Flow.FROM
    ),
    Kind.ASK_AGAIN: Spec("ask again", "fault", (_BLOCK, _PAGE, ("number", "request"))),
    Kind.FAULT_AGAIN: Spec("fault again", "fault", (_BLOCK, _PAGE), Shape.MARK),
    Kind.KNOWN_PAGE: Spec("known page", "fault", (_BLOCK, _PAGE)),
    Kind.INSTALL: Spec(
        "install", "fault", (*_RANGE, _BYTES, ("number", "request")), flow=Flow.TO
    ),
    Kind.REMOVED: Spec("given back", "fault", (("page", "address"), _BYTES)),
    Kind.KEEP: Spec("keep", "saver", _RANGE),
    Kind.HELD_BACK: Spec("held back", "saver", _RANGE),
}  # fmt: skip
