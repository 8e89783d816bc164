"""Who is connected to a control link, and who of them is cut off: whoever says nothing that is
worth an answer for too long, or sends more than can be a message.

libzmq bounds each frame, not how many parts a message has, and keeps all of them until the last has
come; nor does it bound how many are connected. So what the kernel has received of a connection is
compared with what has come out of it as whole messages. Sans-IO: connections are numbers, bytes and
times are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Connections of strangers; one more, and the oldest goes. Who has business here says so at once.
MOST_STRANGERS = 64
STRANGER_SECONDS = 10.0
# But many may begin at once (a batch has 256 items): each has a second to say so.
NEW_SECONDS, MOST_NEW = 1.0, 512
# What all strangers together may have under way.
MOST_BYTES = 64 << 20
# A connection begins with less than this, and frames have heads.
_GREETING_BYTES = 64 << 10
# "MESSAGE" and its length, nonce, tag, flags
_SEAL = 8 + 8 + 16 + 1
_SHORT, _SHORT_HEAD, _LONG_HEAD = 255, 2, 9


@dataclass
class _Connection:
    since: float
    heard: int = 0  # bytes that have come out of it
    welcome: bool = False


def on_the_wire(size: int, sealed: bool = False) -> int:
    """Bytes of a message part of `size` bytes (ZMTP 3, RFC 23); `sealed`: with keys (RFC 26)."""
    size += _SEAL * sealed
    return size + (_SHORT_HEAD if size <= _SHORT else _LONG_HEAD)


class Strangers:
    """The connections of one link. `first`: bytes that a stranger's message may have, `largest`:
    that of somebody who is welcome, of whom so many may be `queued`."""

    def __init__(self, first: int, largest: int, queued: int) -> None:
        self._stranger_s = first + _GREETING_BYTES
        self._guest_s = (queued + 2) * largest + _GREETING_BYTES
        self._connections: dict[int, _Connection] = {}

    def __repr__(self) -> str:
        return f"<Strangers {self.strangers} of {len(self._connections)} connections>"

    def __contains__(self, number: int) -> bool:
        return number in self._connections

    def numbers(self) -> list[int]:
        return list(self._connections)

    @property
    def strangers(self) -> int:
        return sum(not c.welcome for c in self._connections.values())

    def connected(self, number: int, now: float) -> None:
        self._connections[number] = _Connection(now)

    def gone(self, number: int) -> None:
        self._connections.pop(number, None)

    def heard(self, number: int, size: int) -> None:
        """A whole message of `size` bytes on the wire has come out of it."""
        if number in self._connections:
            self._connections[number].heard += size

    def welcome(self, number: int) -> None:
        """It has begun something here: it may stay, and have more under way."""
        if number in self._connections:
            self._connections[number].welcome = True

    def to_cut(self, received: Mapping[int, int], now: float) -> dict[int, str]:
        """Who is to be cut off, and why; they are forgotten. `received`: bytes that the kernel has
        received of each, where that is known."""
        cut: dict[int, str] = {}
        under_way = {n: received.get(n, 0) - c.heard for n, c in self._connections.items()}
        strangers = [n for n, c in self._connections.items() if not c.welcome]
        for number, connection in self._connections.items():
            if under_way[number] > (self._guest_s if connection.welcome else self._stranger_s):
                cut[number] = f"sent {under_way[number]} bytes that are no message"
            elif not connection.welcome and now - connection.since > STRANGER_SECONDS:
                cut[number] = "has begun nothing"
        left = [n for n in strangers if n not in cut]  # the oldest first
        old = sum(now - self._connections[n].since > NEW_SECONDS for n in left)
        for number in left[: max(0, old - MOST_STRANGERS, len(left) - MOST_NEW)]:
            cut[number] = "is one of too many that have begun nothing"
        left = sorted((n for n in left if n not in cut), key=under_way.__getitem__)
        while left and sum(under_way[n] for n in left) > MOST_BYTES:
            cut[left.pop()] = "has most under way of all who have begun nothing"
        for number in cut:
            del self._connections[number]
        return cut
