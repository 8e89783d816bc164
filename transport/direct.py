"""The urgent channel over a plain connection. It is not encrypted: who has keys must not come here.
Knows no message and no page (urgent.py does)."""

from __future__ import annotations

import contextlib
import hmac
import os
import select
import socket
from typing import Any

from .curve import Binds, Dials
from .errors import ConnectError, DestinationError, LocalProtocolError, RemoteProtocolError
from .links import CONNECT_SECONDS, TOS_URGENT, Endpoint, clear_dead_socket
from .wire import MAX_PAYLOAD

# A read, and what is kept for a peer that does not take it.
_READ = 1 << 18
_MOST_OUTPUT = 8 << 20
_MOST_STRANGERS = 16


class DirectLink:
    """The urgent channel over a connection of its own, without libzmq's threads in between: each
    message a length (u32) and its bytes. The peer says the token first; who does not is dropped."""

    eager = False

    def __init__(self) -> None:
        self.broken = False
        self._drained = False  # the last read took all there was
        self._epoll = select.epoll()
        self._listening: socket.socket | None = None
        self._endpoint: Endpoint | None = None
        self._peer: socket.socket | None = None
        self._token = b""
        self._known = False  # the peer has said the token
        self._strangers: dict[socket.socket, bytearray] = {}  # connected, token not yet said
        self._input = bytearray()
        self._output = bytearray()

    @property
    def connected(self) -> bool:
        return self._listening is not None or self._peer is not None

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    def listen(self, endpoint: Endpoint, token: bytes, curve: Binds | None = None) -> Endpoint:
        _no_keys(curve)
        self._token = token
        family, address = _socket_address(endpoint)
        if endpoint.scheme == "ipc" and not endpoint.path.startswith("@"):
            clear_dead_socket(endpoint.path, str(endpoint))
        self._listening = socket.socket(family)
        before = os.umask(0o177)  # the path is ours alone before anybody can connect
        try:
            self._listening.bind(address)
            self._listening.listen(4)
        except OSError as e:
            self._listening.close()
            self._listening = None
            raise DestinationError(f"cannot listen at {endpoint}: {e.strerror}") from e
        finally:
            os.umask(before)
        self._listening.setblocking(False)
        self._epoll.register(self._listening.fileno(), select.EPOLLIN)
        self._endpoint = endpoint
        if endpoint.scheme == "tcp":
            self._endpoint = Endpoint("tcp", endpoint.host, self._listening.getsockname()[1])
        return self._endpoint

    def dial(self, endpoint: Endpoint, token: bytes, curve: Dials | None = None) -> None:
        _no_keys(curve)
        family, address = _socket_address(endpoint)
        peer = socket.socket(family)
        peer.settimeout(CONNECT_SECONDS)
        try:
            peer.connect(address)
            peer.sendall(token)
        except OSError as e:
            peer.close()
            raise ConnectError(f"cannot connect to {endpoint} ({e.strerror or e})") from e
        self._known = True
        self._take(peer)

    def _take(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        if peer.family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if peer.family == socket.AF_INET:
                peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS_URGENT)
        self._peer = peer
        self._epoll.register(peer.fileno(), select.EPOLLIN)

    def _drop(self) -> None:
        """The peer is gone."""
        assert self._peer is not None
        self._epoll.unregister(self._peer.fileno())
        self._peer.close()
        self._peer = None
        self.broken = self.broken or self._known
        self._known = False
        self._input.clear()
        self._output.clear()

    def send(self, data: bytes) -> bool:
        if self._peer is None or not self._known:
            return False
        framed = len(data).to_bytes(4, "little") + data
        if self._output:
            if len(self._output) > _MOST_OUTPUT:
                return False
            self._output += framed
            return True
        try:
            sent = self._peer.send(framed)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop()
            return False
        if sent < len(framed):
            self._output += framed[sent:]
            self._watch(select.EPOLLIN | select.EPOLLOUT)
        return True

    def _watch(self, events: int) -> None:
        """`fd` becomes readable when the kernel takes more, as well."""
        if self._peer is not None:
            self._epoll.modify(self._peer.fileno(), events)

    def flush(self) -> None:
        if not self._output:
            return
        while self._output and self._peer is not None:
            try:
                sent = self._peer.send(self._output)
            except BlockingIOError:
                return
            except OSError:
                self._drop()
                return
            del self._output[:sent]
        self._watch(select.EPOLLIN)

    def receive(self) -> bytes | None:
        self.flush()
        while True:
            message = self._next()
            if message is not None:
                return message
            if self._drained:
                self._drained = False
                return None
            if self._peer is None:
                self._accept()
            if self._peer is None or not self._read():
                return None

    def _accept(self) -> None:
        """Take as the peer who says the token; others wait beside, so that nobody who says nothing
        keeps it out."""
        if self._listening is None or self.broken:
            return
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                stranger, _ = self._listening.accept()
                stranger.setblocking(False)
                self._strangers[stranger] = bytearray()
                self._epoll.register(stranger.fileno(), select.EPOLLIN)
                if len(self._strangers) > _MOST_STRANGERS:
                    self._turn_away(next(iter(self._strangers)))
        for stranger, said in list(self._strangers.items()):
            self._hear(stranger, said)
            if self._peer is not None:
                return

    def _hear(self, stranger: socket.socket, said: bytearray) -> None:
        try:
            data = stranger.recv(len(self._token) - len(said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said += data
        if not data:
            self._turn_away(stranger)
        elif len(said) == len(self._token):
            if not hmac.compare_digest(said, self._token):
                self._turn_away(stranger)
                return
            del self._strangers[stranger]
            self._epoll.unregister(stranger.fileno())
            for other in list(self._strangers):
                self._turn_away(other)
            self._stop_listening()
            self._known = True
            self._take(stranger)

    def _stop_listening(self) -> None:
        if self._listening is None or self._endpoint is None:
            return
        self._epoll.unregister(self._listening.fileno())
        self._listening.close()
        self._listening = None
        path = self._endpoint.path
        if path and not path.startswith("@"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _turn_away(self, stranger: socket.socket) -> None:
        del self._strangers[stranger]
        self._epoll.unregister(stranger.fileno())
        stranger.close()

    def _read(self) -> bool:
        """More bytes of the peer; False if there are none now."""
        assert self._peer is not None
        try:
            data = self._peer.recv(_READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._drop()
            return False
        self._input += data
        self._drained = len(data) < _READ
        return True

    def _next(self) -> bytes | None:
        """A whole message of what was read."""
        if len(self._input) < 4:
            return None
        size = int.from_bytes(self._input[:4], "little")
        if size > MAX_PAYLOAD:
            raise RemoteProtocolError(f"an urgent message of {size} bytes")
        if len(self._input) < 4 + size:
            return None
        message = bytes(self._input[4 : 4 + size])
        del self._input[: 4 + size]
        return message

    def close(self) -> None:
        self._stop_listening()
        for sock in (self._peer, *self._strangers):
            if sock is not None:
                sock.close()
        self._peer = None
        self._strangers.clear()
        self._epoll.close()


def _no_keys(curve: Binds | Dials | None) -> None:
    """Whoever has keys must not come here: Parameters and Hello are checked."""
    if curve is not None:
        raise LocalProtocolError("a direct link is not encrypted")


def _socket_address(endpoint: Endpoint) -> tuple[socket.AddressFamily, Any]:
    if endpoint.scheme == "ipc":
        path = endpoint.path
        return socket.AF_UNIX, f"\0{path[1:]}" if path.startswith("@") else path
    host = "0.0.0.0" if endpoint.host == "*" else endpoint.host
    try:
        found = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise ConnectError(f"cannot find {endpoint.host}: {e.strerror}") from e
    return found[0], found[4]
