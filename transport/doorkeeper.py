"""Carries out strangers.py at a listening control link: asks libzmq who comes and goes, the kernel
how much it has received of each, and cuts connections that are libzmq's.

A connection is known by its descriptor, which libzmq may close at any moment and the kernel give to
something else. So it is looked at and cut through a duplicate, made for that moment and checked to
be the socket that was meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from socket import socket as Socket  # noqa: N812  a method of this name is for links alone
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from .links import NOBLOCK, QUEUE_MESSAGES, Endpoint, comings_and_goings
from .strangers import Strangers, on_the_wire

# How often it is looked while there are strangers (at 10 Gbit/s that is 60 MB), and while not.
_LOOK_SECONDS, _CALM_SECONDS = 0.05, 0.5
# Comings and goings that are taken in one turn of the event loop.
_EVENTS_AT_ONCE = 100
# That are taken before a message: whatever comes in between, it is not held up for long.
_EVENTS_AT_MOST = 5000
# struct tcp_info (<linux/tcp.h>): tcpi_bytes_received, since Linux 4.1
_BYTES_RECEIVED, _INFO_BYTES = 128, 136
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger
_COME = int(zmq.Event.ACCEPTED)


class Doorkeeper:
    """Of the ROUTER `sock` at `endpoint`, in a context of zmq.asyncio. `first`, `largest`: see
    Strangers. `sealed`: it has keys. `on_cut`: told why."""

    def __init__(
        self, sock: Any, endpoint: Endpoint, first: int, largest: int, *, sealed: bool,
        on_cut: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._socket, self._endpoint = sock, endpoint
        self._sealed = sealed
        self._on_cut = on_cut
        self._strangers = Strangers(first, largest, QUEUE_MESSAGES)
        self._inodes: dict[int, int] = {}
        self._last = -1  # whose message was heard last
        self._events: Any = comings_and_goings(sock)
        self._told: zmq.Socket[bytes] = zmq.Socket.shadow(self._events.underlying)
        # Looked at through a descriptor that is there already: when there are no more, as many
        # connections as that must be cut off all the same.
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._copy = os.dup(self._nothing)

    def __repr__(self) -> str:
        return f"<Doorkeeper {self._endpoint} {self._strangers!r}>"

    async def attend(self) -> None:
        """Until cancelled."""
        looked = time.monotonic()
        while True:
            pause = _LOOK_SECONDS if self._strangers.strangers else _CALM_SECONDS
            await self._events.poll(int(pause * 1000))
            self._take_events(_EVENTS_AT_ONCE)
            if time.monotonic() - looked >= _LOOK_SECONDS:
                self._look()
                looked = time.monotonic()
            await asyncio.sleep(0)  # all others have a turn, however many come and go

    def heard(self, parts: list[Any]) -> None:
        """A message has come, its sender's identity first (frames of pyzmq)."""
        self._take_events(_EVENTS_AT_MOST)  # libzmq told of its connection before it read of it
        try:
            self._last = int(parts[-1].get(zmq.SRCFD))
        except zmq.ZMQError:  # of a peer that speaks ZMTP 1, which is none of ours
            self._last = -1
        size = sum(on_the_wire(len(part), self._sealed) for part in parts[1:])
        self._strangers.heard(self._last, size)

    def welcome(self) -> None:
        """What was heard last has begun something here."""
        self._strangers.welcome(self._last)

    def close(self) -> None:
        """Before the socket's. Idempotent."""
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close(0)
            self._events = None
            os.close(self._copy)
            os.close(self._nothing)

    def _take_events(self, most: int) -> None:
        if self._events is None:
            return
        with contextlib.suppress(zmq.Again):
            for _ in range(most):
                self._happened(self._told.recv_multipart(NOBLOCK))

    def _happened(self, message: list[bytes]) -> None:
        event = parse_monitor_message(message)
        fd = event["value"]
        self._strangers.gone(fd)
        if event["event"] != _COME:
            return
        with contextlib.suppress(OSError):  # gone already
            self._inodes[fd] = os.fstat(fd).st_ino
            with self._borrowed(fd) as connection:
                # another file may have the descriptor by now; its owner is no business of ours
                if connection is not None and self._is_ours(connection):
                    self._strangers.connected(fd, time.monotonic())

    def _is_ours(self, connection: Socket) -> bool:
        if self._endpoint.scheme == "ipc":
            return connection.family == socket.AF_UNIX
        internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        return internet and connection.getsockname()[1] == self._endpoint.port

    def _look(self) -> None:
        received = {}
        if self._endpoint.scheme == "tcp":  # of others nothing is known
            for fd in self._strangers.numbers():
                with self._borrowed(fd) as connection:
                    if connection is not None:
                        received[fd] = _bytes_received(connection)
        for fd, why in self._strangers.to_cut(received, time.monotonic()).items():
            with self._borrowed(fd) as connection, contextlib.suppress(OSError):
                if connection is not None:
                    self._on_cut(f"a connection from {_name(connection)} {why}: it is cut off")
                    # Ends in a reset when libzmq closes it: a sender whose window is shut would
                    # not hear of a mere end before the kernel forgets the connection (60 s).
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _borrowed(self, fd: int) -> Iterator[Socket | None]:
        """The connection that was `fd` when it came; None if that is gone."""
        try:
            os.dup2(fd, self._copy, inheritable=False)
        except OSError:
            yield None
            return
        try:
            status = os.fstat(self._copy)
            if status.st_ino != self._inodes.get(fd) or not stat.S_ISSOCK(status.st_mode):
                yield None
                return
            connection = Socket(fileno=self._copy)
            try:
                yield connection
            finally:
                connection.detach()
        finally:
            os.dup2(self._nothing, self._copy, inheritable=False)


def _bytes_received(connection: Socket) -> int:
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        return int(struct.unpack_from("Q", info, _BYTES_RECEIVED)[0])
    except (OSError, struct.error):
        return 0


def _name(connection: Socket) -> str:
    try:
        return str(connection.getpeername()[0]) if connection.family != socket.AF_UNIX else "here"
    except (OSError, IndexError):
        return "somebody"
