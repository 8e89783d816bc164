"""The source's connection to the destination: dialled, greeted, listened to, dropped, made anew.

Knows addresses, keys and the control link, and what carries them. Must not know of guests, pages
and workers, nor what is said over it. What breaks it becomes an event by way of `tasks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from ..transport import messages
from ..transport.curve import Dials
from ..transport.errors import ConnectError, PageferryError, PeerLost, RemoteProtocolError
from ..transport.handshake import refusal
from ..transport.links import Endpoint, connect, parse_endpoint, stop_watching
from ..transport.session import Phase, Role
from ..transport.stream_addresses import is_stream, parse_stream
from .carriage import Carriage
from .control import Control, find
from .journal import Journal
from .security import LOOK_SECONDS, ChannelKeys, Dialling, check_open
from .switchover import Acknowledgement
from .tasks import Tasks

_HELLO_SECONDS = 5.0
# Handing the last message to a link that may not take it any more.
_LAST_WORD_SECONDS = 0.3


class Connection:
    """One at a time. `identity`: 16 secret bytes that say who we are. `needed()`: whether it still
    matters that the peer's key is listed. `insecure`: it may leave this host without keys."""

    control: Control  # from the first words on
    # What makes connections over byte streams, and carries the one there is.
    carriage: Carriage | None = None

    def __init__(
        self,
        endpoint: Endpoint,
        keys: Dialling | None,
        identity: bytes | None,
        journal: Journal,
        tasks: Tasks,
        acknowledgement: Acknowledgement,
        needed: Callable[[], bool],
        *,
        insecure: bool,
    ) -> None:
        self.endpoint = endpoint
        self.identity = identity or secrets.token_bytes(16)
        self.made = 0  # so many, up to now
        self.opened = False  # its channels were, once
        self._insecure = insecure
        self._dialling = keys
        self._channel_keys = ChannelKeys(False)
        self._journal, self._tasks, self._ack = journal, tasks, acknowledgement
        self._needed = needed
        self._socket: Any = None
        self._context: zmq.asyncio.Context | None = None
        self._watching: list[Any] = []  # a socket that says what becomes of the handshake

    def __repr__(self) -> str:
        return f"<Connection {self.made} to {self.endpoint}>"

    @property
    def is_open(self) -> bool:
        """There is one, to whomever."""
        return self._socket is not None

    # ---- how it comes to be --------------------------------------------------------------

    def check(self, where: str) -> None:
        """UsageError if one cannot be made anew at `where`."""
        if where and is_stream(where):
            parse_stream(where)
        elif where:
            there = parse_endpoint(where)
            if self._dialling is None:
                check_open(there, insecure=self._insecure, listens=False)

    async def locate(self, where: str) -> None:
        """The next one is at `where`; "" for as before."""
        if self.carriage is not None:
            self.endpoint = await self.carriage.locate(where, self.endpoint)
        elif where:
            self.endpoint = parse_endpoint(where)

    async def find(self) -> None:
        """ConnectError if nobody accepts connections there."""
        await find(self.endpoint)

    def new_channel_keys(self) -> bytes:
        """For a connection that begins; what the destination is to know of them."""
        self._channel_keys = ChannelKeys(self._dialling is not None)
        return self._channel_keys.public

    async def first_words(self, message: messages.Hello | messages.Resume) -> messages.AnyMessage:
        """Connect the control link, say `message`; its answer, or the error in it."""
        self._context = zmq.asyncio.Context()
        # the first 16 bytes are who we are; a connection that broke is not to be taken up again
        identity = self.identity + bytes([self.made % 256] if self.made else [])
        self.made += 1
        curve = self._dialling.curve if self._dialling is not None else None
        self._watching = []
        self._socket = connect(
            self._context, self.endpoint, identity, control=True, curve=curve,
            watched=self._watching,
        )  # fmt: skip
        self.control = Control(Role.SOURCE, self._socket.send, f"the receiver at {self.endpoint}")
        self.control.note = self._journal.control
        self._tasks.start(self._read_control(), link=True)
        self._tasks.start(self._watch_handshake(self._socket, self._watching[0]), link=True)
        asking = self._tasks.start(self.control.ask(message))
        if not await self.control.first_sign(_HELLO_SECONDS):
            raise self._no_pageferry()
        # it is one; laying out memory may take it a while, and it says that it lives
        self._tasks.start(self.control.keep_alive(), link=True)
        answer = await asking
        if isinstance(answer, messages.Refused):
            raise messages.error_of(answer)
        return answer

    async def channels(self, offered: messages.Welcome | messages.Resumed) -> Dials | None:
        """The keys to dial the channels with that the destination offers, which are reached from
        here when this returns."""
        curve, urgent = self._channel_keys.dials(offered.key), offered.urgent
        if self.carriage is not None:  # it listens where workers will dial
            there = [*offered.endpoints, *([urgent[0]] if urgent is not None else [])]
            await self.carriage.listen([self.endpoint.sibling(where) for where in there])
        return curve

    # ---- while it is there ---------------------------------------------------------------

    async def say(self, message: messages.AnyMessage) -> None:
        await self.control.say(message)

    async def ask(self, message: messages.AnyMessage) -> messages.AnyMessage:
        """Say `message` and wait for the answer."""
        return await self.control.ask(message)

    async def _watch_handshake(self, sock: Any, watching: Any) -> None:
        """Not to be let in, or to find somebody else, is an error; and so is a peer whose key is
        revoked, for as long as the connection is needed."""
        curve = self._dialling.curve if self._dialling is not None else None
        try:
            error = await refusal(watching, self.endpoint, curve)
        finally:
            stop_watching(sock, watching)
        if error is not None:
            raise error
        while self._dialling is not None:
            await asyncio.sleep(LOOK_SECONDS)
            if self._needed():
                self._dialling.check()

    def _no_pageferry(self) -> ConnectError:
        return ConnectError(
            f"something accepts connections at {self.endpoint} and does not answer as "
            f"`pageferry receive` does: check the address"
        )

    async def _read_control(self) -> None:
        while True:
            await asyncio.sleep(0)  # all others have a turn, however much the peer says
            data = await self._socket.recv()
            try:
                message = self.control.heard(data)
            except RemoteProtocolError as e:
                if self.control.session.phase in (Phase.IDLE, Phase.GREETING):
                    raise self._no_pageferry() from e
                raise
            if isinstance(message, messages.Abort):
                self._tasks.failed(messages.error_of(message), by_peer=True)
                return
            if isinstance(message, messages.Paused):
                reason = f"the destination paused: {message.message}"
                self._tasks.failed(PeerLost(reason), link=True)
                return
            if isinstance(message, messages.SwitchoverAck):
                self._ack.hear()
            elif message is not None:
                raise RemoteProtocolError(f"nobody asked for {type(message).__name__}")

    # ---- how it ends ---------------------------------------------------------------------

    async def pause(self, error: PageferryError) -> None:
        """The last word of a connection that is to be made anew."""
        if self._socket is not None:
            with contextlib.suppress(PageferryError, zmq.ZMQError, TimeoutError):
                await asyncio.wait_for(self.control.pause(error), _LAST_WORD_SECONDS)

    async def abort(self, error: PageferryError) -> None:
        """The last word of a migration that failed."""
        if self._socket is not None:
            with contextlib.suppress(zmq.ZMQError, TimeoutError):  # nobody may take it
                await asyncio.wait_for(self.control.abort(error), _LAST_WORD_SECONDS)

    def forget_the_lost(self) -> None:
        """Closing it holds up nobody for a word that cannot arrive."""
        if self._socket is not None and self.opened and self.control.lost:
            self._socket.linger = 0  # there is nobody whom the last word could reach

    def close(self) -> None:
        """Drop what there is of it; another may be made. Idempotent."""
        for watching in self._watching:  # its task may have been cancelled before it began
            watching.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None
