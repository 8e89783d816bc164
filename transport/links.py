"""The only file that opens ZeroMQ sockets: endpoints, options, the shape of each link. (The urgent
channel is made of them in urgent_links.py; direct.py has one without ZeroMQ.)

A link's socket at the destination is a ROUTER, which tells peers apart; at the source it is a
DEALER. A channel's DEALER carries a secret token as its identity, handed out over the control
link: whatever comes from another identity is a stray and is dropped. ROUTERs drop at the
high-water mark and reconnects lose what was in flight (zguide, chapter 7), so nothing here is
taken for delivered: sessions and channels number and acknowledge.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import stat
import time
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import garbage

from .curve import CHANNEL_USER, Binds, Dials, Gatekeeper, Invites, password, zap_answer
from .errors import (
    ConnectError,
    DestinationError,
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
    already, for `bind` to take over; -1 if there is none. `stands_for`: of one that carries a
    stream, the path at the peer's host that it is in place of."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = field(default=-1, compare=False, repr=False)
    stands_for: str = field(default="", compare=False, repr=False)

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
        if scheme == "ipc" and self.stands_for and rest.startswith(f"{self.stands_for}."):
            return Endpoint("ipc", path=self.path + rest[len(self.stands_for) :])
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
    until = time.monotonic() + CONNECT_SECONDS
    with contextlib.suppress(OSError), _plain_connection(endpoint) as s:
        s.sendall(_GREETING)
        while len(greeting) < _SAYS_MECHANISM and (left := until - time.monotonic()) > 0:
            s.settimeout(left)
            if not (data := s.recv(_SAYS_MECHANISM)):
                break
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


def comings_and_goings(sock: Any) -> Any:
    """A socket that tells of who connects to the ROUTER `sock` and who goes, as messages for
    `parse_monitor_message`. Close it after `sock.disable_monitor()`. Its queue has no end: libzmq's
    thread, which fills it, would wait for us to read, and so would everything that waits for it."""
    where = f"inproc://comings-and-goings-{id(sock)}"
    sock.monitor(where, int(zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED))
    events = sock.context.socket(zmq.PAIR)
    events.linger = 0
    events.setsockopt(zmq.RCVHWM, 0)
    events.connect(where)
    return events


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
    gives to `stop_watching`."""
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


def stop_watching(sock: Any, watching: Any) -> None:
    """Close what `connect(watched=…)` gave for `sock`. In this order: libzmq's thread waits for
    somebody to read what it tells, holding a lock that `disable_monitor` wants."""
    sock.disable_monitor()
    watching.close()


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
