"""The control link as the coordinators use it: a session over a ZeroMQ socket, with heartbeats.

Both ends say something at least every second; four seconds of silence mean that the peer is
lost. Runs in the coordinator's event loop; nothing that blocks may run there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ..transport import messages
from ..transport.errors import PageferryError, PeerLost
from ..transport.session import Phase, Role, Session

PING_SECONDS = 1.0
LOST_SECONDS = 4.0


class Control:
    """One end of a control session. `transmit` puts bytes on the wire."""

    def __init__(self, role: Role, transmit: Callable[[bytes], Awaitable[Any]], peer: str) -> None:
        self.session = Session(role)
        self.peer = peer
        self._transmit = transmit
        self._heard = self._said = time.monotonic()
        self._waiting: asyncio.Future[messages.AnyMessage] | None = None

    def __repr__(self) -> str:
        return f"<Control {self.session!r} peer={self.peer}>"

    async def say(self, message: messages.AnyMessage) -> None:
        data = self.session.send(message)
        self._said = time.monotonic()
        await self._transmit(data)

    async def ask(self, message: messages.AnyMessage) -> messages.AnyMessage:
        """Say `message` and wait for the answer; the caller handles loss by `silent`."""
        self._waiting = asyncio.get_running_loop().create_future()
        await self.say(message)
        return await self._waiting

    def heard(self, data: bytes | memoryview) -> messages.AnyMessage | None:
        """A message of the peer, if it is not the answer that `ask` waits for."""
        message = self.session.receive(data)
        self._heard = time.monotonic()
        if isinstance(message, messages.Ping):
            return None
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.done():
            return message
        if isinstance(message, messages.Abort):
            waiting.cancel()
            return message
        waiting.set_result(message)
        return None

    async def keep_alive(self) -> None:
        """Ping, and raise PeerLost when the peer is silent. Runs until cancelled."""
        while True:
            await asyncio.sleep(PING_SECONDS / 2)
            phase = self.session.phase
            if phase in (Phase.IDLE, Phase.RUNNING, Phase.CLOSED):
                continue
            now = time.monotonic()
            if now - self._heard > LOST_SECONDS:
                raise PeerLost(f"{self.peer} has been silent for {LOST_SECONDS:.0f} s")
            if now - self._said > PING_SECONDS and phase is not Phase.GREETING:
                await self.say(messages.Ping())

    async def abort(self, error: PageferryError) -> None:
        """Tell the peer that it is over, if it may be told."""
        if self.session.may_abort:
            await self.say(messages.abort_for(error))
