"""The control link as the coordinators use it: a session over a ZeroMQ socket, with heartbeats.

Both ends say something at least every second; four seconds of silence mean that the peer is
lost. ZeroMQ reconnects in silence and loses what was under way: each ping
says how many messages went before it, and one that is missing means that the peer is lost as
well. Runs in the coordinator's event loop; nothing that blocks may run there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ..transport import messages
from ..transport.errors import ConnectError, PageferryError, PeerLost
from ..transport.links import Endpoint, probe
from ..transport.session import Phase, Role, Session
from .blocking import MayHang

PING_SECONDS = 1.0
LOST_SECONDS = 4.0
# ZeroMQ takes a message at once, or does not as long as nobody can be connected.
LAST_SECONDS = 1.0
# A name with many addresses, of which none answers, takes longer to try (CONNECT_SECONDS each).
_FIND_SECONDS = 30.0
# So long after the peer counts as lost it is looked again.
_GRACE_SECONDS = 0.02

# Says a message to the peer; and one that is answered.
Say = Callable[[messages.AnyMessage], Coroutine[Any, Any, None]]
Ask = Callable[[messages.AnyMessage], Coroutine[Any, Any, messages.AnyMessage]]


async def find(endpoint: Endpoint) -> None:
    """ConnectError if nobody accepts connections at `endpoint`. Whoever is cancelled meanwhile is
    so at once."""
    try:
        await MayHang(_FIND_SECONDS)(probe, endpoint)
    except TimeoutError as e:
        raise ConnectError(f"{endpoint} does not answer: check the address and firewalls") from e


class Control:
    """One end of a control session. `transmit` puts bytes on the wire."""

    def __init__(self, role: Role, transmit: Callable[[bytes], Awaitable[Any]], peer: str) -> None:
        self.session = Session(role)
        self.peer = peer
        # told of each message: "said" or "heard", the message, its bytes
        self.note: Callable[[str, messages.AnyMessage, int], None] | None = None
        self._transmit = transmit
        self._heard = self._said = time.monotonic()
        self._said_count = self._heard_count = 0  # messages, pings not counted
        self.cut = False  # something could not be handed on: nobody is connected
        self.lost = False  # it was silent for too long
        self._sign = asyncio.Event()
        self._waiting: asyncio.Future[messages.AnyMessage] | None = None

    def __repr__(self) -> str:
        return f"<Control {self.session!r} peer={self.peer}>"

    def _pack(self, message: messages.AnyMessage) -> bytes:
        data = self.session.send(message)
        self._said = time.monotonic()
        if not isinstance(message, messages.Ping):
            self._said_count += 1
        if self.note is not None:
            self.note("said", message, len(data))
        return data

    async def say(self, message: messages.AnyMessage) -> None:
        await self._transmit(self._pack(message))

    def say_now(self, message: messages.AnyMessage) -> asyncio.Future[messages.AnyMessage]:
        """Hand `message` to ZeroMQ before this returns; the future is the answer."""
        self._waiting = asyncio.get_running_loop().create_future()
        sent = asyncio.ensure_future(self._transmit(self._pack(message)))
        # what goes wrong with it shows as silence
        sent.add_done_callback(lambda future: future.cancelled() or future.exception())
        return self._waiting

    async def ask(self, message: messages.AnyMessage) -> messages.AnyMessage:
        """Say `message` and wait for the answer; the caller handles loss by `silent`."""
        self._waiting = asyncio.get_running_loop().create_future()
        await self.say(message)
        return await self._waiting

    def heard(self, data: bytes | memoryview) -> messages.AnyMessage | None:
        """A message of the peer, if it is not the answer that `ask` waits for."""
        message = self.session.receive(data)
        self._heard = time.monotonic()
        self._sign.set()
        if self.note is not None:
            self.note("heard", message, len(data))
        if isinstance(message, messages.Ping):
            if message.said > self._heard_count:
                raise PeerLost(
                    f"the connection to {self.peer} broke and a message was lost with it"
                )
            return None
        self._heard_count += 1
        if isinstance(message, messages.SwitchoverAck):
            return message  # no answer to anything
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.done():
            return message
        if isinstance(message, messages.Abort | messages.Paused):
            waiting.cancel()
            return message
        waiting.set_result(message)
        return None

    async def first_sign(self, seconds: float) -> bool:
        """Wait until the peer has said anything at all; False if it does not in time."""
        try:
            await asyncio.wait_for(self._sign.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _is_silent(self) -> bool:
        return time.monotonic() - self._heard >= LOST_SECONDS

    async def keep_alive(self) -> None:
        """Ping, and raise PeerLost when the peer is silent. Runs until cancelled."""
        while True:
            left = self._heard + LOST_SECONDS - time.monotonic()
            await asyncio.sleep(min(PING_SECONDS / 2, left) if left > 0 else PING_SECONDS / 2)
            phase = self.session.phase
            if phase in (Phase.IDLE, Phase.CLOSED):
                continue
            if self._is_silent():
                # after a moment in which we ourselves stood still its word may wait to be read
                await asyncio.sleep(_GRACE_SECONDS)
            if self._is_silent():
                self.lost = True
                raise PeerLost(f"{self.peer} has been silent for {LOST_SECONDS:.0f} s")
            if time.monotonic() - self._said > PING_SECONDS:
                await self.say(messages.Ping(self._said_count))

    async def reaches(self) -> bool:
        """Whether the peer is connected just now, as far as this end's `transmit` knows."""
        if self.session.phase in (Phase.IDLE, Phase.CLOSED):
            return False
        self.cut = False
        await self.say(messages.Ping(self._said_count))
        return not self.cut

    async def pause(self, error: PageferryError) -> None:
        """Tell the peer that this connection is over, if it may be told."""
        if self.session.may_pause:
            await self._say_last(messages.Paused(error.message))

    async def abort(self, error: PageferryError) -> None:
        """Tell the peer that it is over, if it may be told."""
        if self.session.may_abort:
            await self._say_last(messages.abort_for(error))

    async def _say_last(self, message: messages.AnyMessage) -> None:
        """A peer that wants other keys has no queue for what is said to it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.say(message), LAST_SECONDS)
