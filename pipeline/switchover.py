"""What a migration waits for before its switchover: the destination's acknowledgement (QEMU:
switchover-ack), and somebody who says that it may go on (QEMU: pause-before-switchover).

Knows how long it waited, and what a peer may say of it; when it is waited for is migration.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from ..transport.errors import RemoteProtocolError
from .state import Status

# What query-migrate calls the two.
ACK, CONTINUE = "switchover-ack", "migrate-continue"
_TIMES = {ACK: "switchover-ack-time", CONTINUE: "pre-switchover-time"}


class Waits:
    """How long was waited for what. Times: CLOCK_MONOTONIC seconds."""

    def __init__(self) -> None:
        self.waiting_for = ""
        self._since = 0.0
        self._spent: dict[str, float] = {}

    def became(self, status: Status) -> None:
        """The migration is in another state."""
        if status is Status.PRE_SWITCHOVER:
            self._begin(CONTINUE)
        elif self.waiting_for == CONTINUE:
            self._end()

    @contextlib.contextmanager
    def acknowledgement(self) -> Iterator[None]:
        """Around waiting for it."""
        self._begin(ACK)
        try:
            yield
        finally:
            self._end()

    def _begin(self, what: str) -> None:
        self.waiting_for, self._since = what, time.monotonic()
        self._spent.setdefault(what, 0.0)

    def _end(self) -> None:
        self._spent[self.waiting_for] += time.monotonic() - self._since
        self.waiting_for = ""

    def report(self) -> dict[str, Any]:
        """For query-migrate: milliseconds, and what is waited for just now."""
        found: dict[str, Any] = {"waiting-for": self.waiting_for} if self.waiting_for else {}
        for what, spent in self._spent.items():
            more = time.monotonic() - self._since if what == self.waiting_for else 0.0
            found[_TIMES[what]] = round((spent + more) * 1000)
        return found


class Acknowledgement:
    """The destination's word that it is ready, at the source: once, and only if it was promised.
    It may be heard before the promise is read, which came before it."""

    def __init__(self) -> None:
        self._promised: bool | None = None
        self._heard, self._at = asyncio.Event(), 0.0

    @property
    def heard(self) -> bool:
        return self._heard.is_set()

    @property
    def awaited(self) -> bool:
        return bool(self._promised) and not self.heard

    def promise(self, promised: bool) -> None:
        """What Welcome said."""
        self._promised = promised
        if self.heard and not promised:
            raise RemoteProtocolError("SwitchoverAck came, and nobody had said that it would")

    def hear(self) -> None:
        """It came; RemoteProtocolError if it should not have."""
        if self.heard or self._promised is False:
            raise RemoteProtocolError("nobody asked for SwitchoverAck")
        self._heard.set()
        self._at = time.monotonic()

    def report(self, stopped: float | None) -> dict[str, Any]:
        """For query-migrate: milliseconds from it until the guest was `stopped` (CLOCK_MONOTONIC
        seconds), which is how much earlier it might have come, or how late it came. QEMU has no
        name for it."""
        if not self.heard or stopped is None:
            return {}
        return {"switchover-ack-to-stop-time": round(max(0.0, stopped - self._at) * 1000)}

    async def wait(self) -> None:
        """Until it is there; at once if none will come."""
        if self._promised:
            await self._heard.wait()
