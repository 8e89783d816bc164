"""The only file that opens ZeroMQ sockets: endpoints, options, the shape of each link.

A link's socket at the destination is a ROUTER, which tells peers apart; at the source it is a
DEALER. A channel's DEALER carries a secret token as its identity, handed out over the control
link: whatever comes from another identity is a stray and is dropped. ROUTERs drop at the
high-water mark and reconnects lose what was in flight (zguide, chapter 7), so nothing here is
taken for delivered: sessions and channels number and acknowledge.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import re
import select
import socket
import stat
from dataclasses import dataclass, field
from typing import Any, Protocol

import zmq
from zmq.utils import garbage

from .curve import CHANNEL_USER, Binds, Dials, Gatekeeper, Invites, password, zap_answer
from .errors import (
    ConnectError,
    DestinationError,
    LocalProtocolError,
    RemoteProtocolError,
    UsageError,
)
from .messages import MAX_MESSAGE
from .wire import MAX_PAYLOAD

# libzmq's numbers as plain integers: what pyzmq has are enums, and an operation on one costs as
# much as the call that it is for.
POLLIN, EVENTS = int(zmq.POLLIN), int(zmq.EVENTS)
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)
# What a channel's peer says it is: secret.
TOKEN_BYTES = 16
# Frames a socket queues before it pushes back; credit keeps far below it.
QUEUE_FRAMES = 64
# Control messages that wait of one peer, whoever that is, and the time it has to say who it is.
QUEUE_MESSAGES = 16
HANDSHAKE_MS = 5000
# Left to libzmq after close: long enough for a last Abort, short enough for Ctrl-C.
LINGER_MS = 500
CONNECT_SECONDS = 5.0
# A direct link's read, and what it keeps for a peer that does not take it.
_READ = 1 << 18
_MOST_OUTPUT = 8 << 20
_MOST_STRANGERS = 16
# Where libzmq asks who may connect (RFC 27).
_ZAP = "inproc://zeromq.zap.01"
# How ZMTP's greeting begins (RFC 23): signature and version. Who hears that says the mechanism that
# it wants (20 bytes), and hangs up if ours, which would follow, is another one.
_GREETING, _SAYS_MECHANISM = b"\xff" + bytes(8) + b"\x7f\x03\x00", 32
# What routers and queues on the way may go by (RFC 4594): bulk is AF11, urgent AF22. Linux' own
# pfifo_fast and prio put the first behind everything and the second before (bits 0x08 and 0x10).
TOS_BULK, TOS_URGENT = 0x28, 0x50
# sun_path holds 108 bytes; channel sockets add a suffix to the path.
_SUN_PATH, _MAX_IPC_PATH = 107, 100


@dataclass(frozen=True)
class Endpoint:
    """Where a peer listens: tcp://HOST:PORT or ipc://PATH. `fd`: a socket that listens there
    already, for `bind` to take over; -1 if there is none."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = field(default=-1, compare=False, repr=False)

    def __str__(self) -> str:
        if self.scheme == "ipc":
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    @property
    def local(self) -> bool:
        """Nobody at another host reaches it: a unix socket, or loopback."""
        if self.scheme == "ipc" or self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False

    def sibling(self, where: str) -> Endpoint:
        """The channel endpoint `where` ("tcp:PORT", "ipc:PATH") beside this control endpoint."""
        scheme, _, rest = where.partition(":")
        port = re.fullmatch(r"\d{1,5}", rest)
        if scheme == "tcp" and self.scheme == "tcp" and port and 0 < int(rest) < 65536:
            return Endpoint("tcp", self.host, int(rest))
        if scheme == "ipc" and self.scheme == "ipc" and _beside(self.path, rest):
            return Endpoint("ipc", path=rest)
        raise ConnectError(f"the peer offers a channel at {where!r}, which is not beside {self}")


def _beside(path: str, other: str) -> bool:
    """True if `other` is `path` with a suffix, wherever links lead; abstract ones have none."""
    if len(other.encode()) > _SUN_PATH or "\0" in other:
        return False
    if not path.startswith("@"):
        path, other = os.path.realpath(path), os.path.realpath(other)
    return other.startswith(f"{path}.")


def parse_endpoint(text: str) -> Endpoint:
    """`text` as an endpoint, or UsageError that shows the form."""
    try:
        text.encode()
    except UnicodeEncodeError as e:  # libzmq and messages carry it as UTF-8
        raise UsageError(f"{text!r} is no address: it must be UTF-8") from e
    if text.startswith("ipc://") and len(text) > 6:
        # "@name" is Linux's abstract namespace: a socket without a file (unix(7))
        path = text[6:] if text[6] == "@" else os.path.abspath(text[6:])
        if len(path.encode()) > _MAX_IPC_PATH:
            raise UsageError(f"the path of {text} is too long for a unix socket: keep it below 100")
        return Endpoint("ipc", path=path)
    match = re.fullmatch(r"tcp://(?:\[([0-9a-fA-F:]+)\]|([^:/\[\]]+)):(\d{1,5})", text)
    if match and int(match[3]) < 65536:
        return Endpoint("tcp", match[1] or match[2], int(match[3]))
    raise UsageError(f"{text!r} is no address: write tcp://HOST:PORT or ipc://PATH")


def probe(endpoint: Endpoint) -> None:
    """Raise ConnectError if nobody accepts connections at `endpoint`.

    ZeroMQ retries for ever and does not say why; a plain connect does.
    """
    try:
        _plain_connection(endpoint).close()
    except TimeoutError as e:
        raise ConnectError(f"{endpoint} does not answer: check the address and firewalls") from e
    except OSError as e:
        raise ConnectError(
            f"cannot connect to {endpoint} ({e.strerror or e}): is `pageferry receive` running "
            f"there?"
        ) from e


def _plain_connection(endpoint: Endpoint) -> socket.socket:
    if endpoint.scheme != "ipc":
        return socket.create_connection((endpoint.host, endpoint.port), timeout=CONNECT_SECONDS)
    s = socket.socket(socket.AF_UNIX)
    try:
        s.settimeout(CONNECT_SECONDS)
        path = endpoint.path
        s.connect(f"\0{path[1:]}" if path.startswith("@") else path)
    except BaseException:
        s.close()
        raise
    return s


def mechanism(endpoint: Endpoint) -> str:
    """What the ZeroMQ there wants of who connects: CURVE, NULL; "" if it is none or is silent."""
    greeting = b""
    with contextlib.suppress(OSError), _plain_connection(endpoint) as s:
        s.sendall(_GREETING)
        while len(greeting) < _SAYS_MECHANISM and (data := s.recv(_SAYS_MECHANISM)):
            greeting += data
    if len(greeting) < _SAYS_MECHANISM or greeting[:1] + greeting[9:10] != b"\xff\x7f":
        return ""
    return greeting[12:_SAYS_MECHANISM].rstrip(b"\0").decode(errors="replace")


def _prepare(
    sock: zmq.Socket[bytes], max_message: int, endpoint: Endpoint | None, tos: int = 0
) -> None:
    sock.linger = LINGER_MS
    if tos:
        sock.setsockopt(zmq.TOS, tos)
    sock.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
    sock.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
    sock.setsockopt(zmq.MAXMSGSIZE, max_message)
    if endpoint is not None and ":" in endpoint.host:
        sock.setsockopt(zmq.IPV6, 1)


class Gate:
    """Says, in a context that does not listen to everybody, who may connect: libzmq asks it of each
    connection, and refuses where there is none (ZAP_ENFORCE_DOMAIN). Make it before `bind`."""

    def __init__(self, context: Any, gatekeeper: Gatekeeper) -> None:
        self._gatekeeper = gatekeeper
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP)

    @property
    def fd(self) -> int:
        return int(self.socket.getsockopt(zmq.FD))

    def answer(self) -> None:
        """Answer what was asked; never blocks. For sockets that are polled."""
        while int(self.socket.getsockopt(EVENTS)) & POLLIN:
            request = self.socket.recv_multipart(NOBLOCK)
            self.socket.send_multipart(zap_answer(request, self._gatekeeper))

    async def attend(self) -> None:
        """Answer, until cancelled. For sockets of zmq.asyncio."""
        while True:
            request = await self.socket.recv_multipart()
            await self.socket.send_multipart(zap_answer(request, self._gatekeeper))

    def close(self) -> None:
        """Idempotent."""
        self.socket.close()


def sender_key(frame: Any) -> bytes:
    """Who sent a message on a socket that has a Gate: its key, which the handshake has proved."""
    return str(frame.get("User-Id")).encode()


def bind(
    context: Any,
    endpoint: Endpoint,
    *,
    control: int = 0,
    tos: int = 0,
    gatekeeper: Gatekeeper | None = None,
) -> tuple[Any, Endpoint]:
    """A listening ROUTER at `endpoint`, and where it really listens (port 0: the kernel's pick).
    `control`: it is a control link's, with messages of so many bytes at the most; `gatekeeper`: who
    may join, and the context has a Gate; None: everybody (a control link without keys)."""
    sock = context.socket(zmq.ROUTER)
    _prepare(sock, control or MAX_PAYLOAD + 65536, endpoint, tos)
    if control:
        sock.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if gatekeeper is not None:
        if gatekeeper.mechanism == "CURVE":
            sock.setsockopt(zmq.CURVE_SERVER, 1)
            sock.setsockopt(zmq.CURVE_SECRETKEY, gatekeeper.secret)
        else:
            sock.setsockopt(zmq.PLAIN_SERVER, 1)
        sock.setsockopt(zmq.ZAP_DOMAIN, gatekeeper.domain.encode())
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A peer whose connection broke comes back under its own token.
    sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if endpoint.fd >= 0:
        sock.setsockopt(zmq.USE_FD, endpoint.fd)
    try:
        if endpoint.scheme == "ipc":
            # an abstract name has no mode: whose process it is, is asked of the kernel
            for uid in {os.geteuid(), 0}:
                sock.setsockopt(zmq.IPC_FILTER_UID, uid)
            if not endpoint.path.startswith("@") and endpoint.fd < 0:
                clear_dead_socket(endpoint.path, str(endpoint))
            # the umask makes the socket ours alone before anybody can connect
            before = os.umask(0o177)
            try:
                sock.bind(str(endpoint))
            finally:
                os.umask(before)
            return sock, endpoint
        port = endpoint.port or "*"
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        sock.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as e:
        sock.close(0)
        raise DestinationError(f"cannot listen at {endpoint}: {e.strerror}") from e
    last = sock.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(last, bytes)
    bound = int(last.rstrip(b"\0").decode().rpartition(":")[2])
    return sock, Endpoint("tcp", endpoint.host, bound)


def open_channel(
    context: Any, endpoint: Endpoint, token: bytes, curve: Binds | None, tos: int = 0
) -> tuple[Gate, Any, Endpoint]:
    """`bind` for whoever was told `token` and has the key, if there are keys; nobody else gets a
    byte in. The caller closes gate and socket, and has the gate answer."""
    gatekeeper: Gatekeeper = Invites(token) if curve is None else curve
    gate = Gate(context, gatekeeper)
    try:
        return gate, *bind(context, endpoint, tos=tos, gatekeeper=gatekeeper)
    except BaseException:
        gate.close()
        raise


def clear_dead_socket(path: str, what: str) -> None:
    """Remove the socket of a process that is gone; refuse to take a living one's place."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise DestinationError(f"cannot listen at {what}: {e.strerror}") from e
    if not stat.S_ISSOCK(mode):
        raise DestinationError(f"cannot listen at {what}: a file that is no socket is there")
    try:
        probe(Endpoint("ipc", path=path))
    except ConnectError:
        os.unlink(path)
        return
    raise DestinationError(f"cannot listen at {what}: somebody else does")


def short(endpoint: Endpoint) -> str:
    """The endpoint as messages carry it: the peer knows the host better than we do."""
    if endpoint.scheme == "ipc":
        return f"ipc:{endpoint.path}"
    return f"tcp:{endpoint.port}"


def unbind(sock: zmq.Socket[bytes], endpoint: Endpoint) -> None:
    """Close a listening socket and remove its path. Idempotent."""
    sock.close()
    if endpoint.scheme == "ipc" and not endpoint.path.startswith("@") and endpoint.fd < 0:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(endpoint.path)


def connect(
    context: Any,
    endpoint: Endpoint,
    token: bytes,
    *,
    control: bool,
    tos: int = 0,
    data: bool = False,
    curve: Dials | None = None,
    watched: list[Any] | None = None,
) -> Any:
    """A DEALER whose identity is `token`, connecting to `endpoint`; `data`: pages come on it;
    `curve`: only with keys. `watched`: gets a socket for `refusal` (handshake.py), which the caller
    closes."""
    sock = context.socket(zmq.DEALER)
    largest = MAX_PAYLOAD + 65536 if data else 65536
    _prepare(sock, MAX_MESSAGE if control else largest, endpoint, tos)
    sock.setsockopt(zmq.ROUTING_ID, token)
    if curve is not None:
        sock.setsockopt(zmq.CURVE_SERVERKEY, curve.server)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
    elif not control:
        sock.setsockopt(zmq.PLAIN_USERNAME, CHANNEL_USER)
        sock.setsockopt(zmq.PLAIN_PASSWORD, password(token))
    if watched is not None:
        watched.append(sock.get_monitor_socket(_HANDSHAKES))
    sock.connect(str(endpoint))
    return sock


_HANDSHAKES = int(
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


def let_go_of_sent() -> None:
    """After all contexts have ended: end what pyzmq has for sends without a copy (a thread, a
    context, and references to what was sent, until the thread gets round to them)."""
    garbage.gc.stop()


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
                self._socket.close()
            self._socket = None
        if self._both is not None:
            self._both.close()
            self._both = None
        if self._gate is not None:
            self._gate.close()
        self._context.term()


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


def urgent_link(direct: bool, priority: int) -> UrgentLink:
    """An urgent link of either kind."""
    return DirectLink() if direct else ZmqLink(priority)
