"""One end of the urgent channel, over ZeroMQ or a connection of its own (direct.py). Knows no
message and no page (urgent.py does)."""

from __future__ import annotations

import os
import select
from typing import Any, Protocol

import zmq

from .curve import Binds, Dials
from .direct import DirectLink
from .links import (
    EVENTS,
    NOBLOCK,
    POLLIN,
    SNDMORE,
    TOS_URGENT,
    Endpoint,
    Gate,
    connect,
    open_channel,
    unbind,
)


class UrgentLink(Protocol):
    """One end of the urgent channel (urgent.py): whole messages, at once, never blocking.

    `fd` becomes readable when something happens; its level is not kept: receive until None.
    `broken`: the connection is gone and does not come back.
    """

    broken: bool
    # Look even if `fd` is not readable: with ZeroMQ anything that is sent may hide what came.
    eager: bool

    @property
    def connected(self) -> bool:
        """True between `listen` or `dial` and `close`."""

    @property
    def fd(self) -> int: ...

    def listen(self, endpoint: Endpoint, token: bytes, curve: Binds | None = None) -> Endpoint:
        """Destination: take messages of the peer that knows `token`; where it listens. `curve`:
        only with keys; LocalProtocolError if there can be none."""

    def dial(self, endpoint: Endpoint, token: bytes, curve: Dials | None = None) -> None:
        """Source: connect to where the destination listens."""

    def send(self, data: bytes) -> bool:
        """Hand `data` over; False if the peer is not there (yet)."""

    def receive(self) -> bytes | None:
        """The next message, or None if none waits."""

    def flush(self) -> None:
        """Hand on what was taken and could not be handed on at once; `fd` says when."""

    def close(self) -> None:
        """Idempotent."""


class ZmqLink:
    """The urgent channel over ZeroMQ. Its context's threads run at real-time priority `priority`
    (0: as they are): two of their hand-overs are in every request."""

    broken = False  # libzmq connects again by itself
    eager = True

    def __init__(self, priority: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        if priority:
            self._context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_FIFO)
            self._context.set(zmq.THREAD_PRIORITY, priority)
        self._socket: Any = None
        self._endpoint: Endpoint | None = None
        self._token = b""
        self._gate: Gate | None = None
        self._both: select.epoll | None = None  # socket and gate

    @property
    def connected(self) -> bool:
        return self._socket is not None

    @property
    def fd(self) -> int:
        if self._both is not None:
            return self._both.fileno()
        return int(self._socket.getsockopt(zmq.FD))

    def listen(self, endpoint: Endpoint, token: bytes, curve: Binds | None = None) -> Endpoint:
        self._token = token
        self._gate, self._socket, self._endpoint = open_channel(
            self._context, endpoint, token, curve, TOS_URGENT
        )
        self._both = select.epoll()
        for fd in (int(self._socket.getsockopt(zmq.FD)), self._gate.fd):
            self._both.register(fd, select.EPOLLIN)
        return self._endpoint

    def dial(self, endpoint: Endpoint, token: bytes, curve: Dials | None = None) -> None:
        self._socket = connect(
            self._context, endpoint, token, control=False, tos=TOS_URGENT, data=True, curve=curve
        )

    def send(self, data: bytes) -> bool:
        try:
            if self._token:
                self._socket.send(self._token, SNDMORE | NOBLOCK)
            self._socket.send(data, NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def flush(self) -> None:
        """libzmq does; but a peer that comes back is let in here, if nobody receives meanwhile."""
        if self._gate is not None:
            self._gate.answer()

    def receive(self) -> bytes | None:
        sock = self._socket
        while sock.getsockopt(EVENTS) & POLLIN:
            if not self._token:
                return bytes(sock.recv(NOBLOCK))
            parts = sock.recv_multipart(NOBLOCK)
            if parts[0] == self._token and len(parts) == 2:
                return bytes(parts[1])
        if self._gate is not None:
            self._gate.answer()
        return None

    def close(self) -> None:
        if self._socket is not None:
            if self._endpoint is not None:
                unbind(self._socket, self._endpoint)
            else:
                self._socket.close(0)  # what counts was acknowledged
            self._socket = None
        if self._both is not None:
            self._both.close()
            self._both = None
        if self._gate is not None:
            self._gate.close()
        self._context.term()


def urgent_link(direct: bool, priority: int) -> UrgentLink:
    """An urgent link of either kind."""
    return DirectLink() if direct else ZmqLink(priority)
