"""The only file that opens ZeroMQ sockets: endpoints, options, the shape of each link.

A link's socket at the destination is a ROUTER, which tells peers apart; at the source it is a
DEALER. A channel's DEALER carries a secret token as its identity, handed out over the control
link: whatever comes from another identity is a stray and is dropped. ROUTERs drop at the
high-water mark and reconnects lose what was in flight (zguide, chapter 7), so nothing here is
taken for delivered: sessions and channels number and acknowledge.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from dataclasses import dataclass
from typing import Any

import zmq

from .errors import ConnectError, DestinationError, UsageError
from .messages import MAX_MESSAGE
from .wire import MAX_PAYLOAD

# Frames a socket queues before it pushes back; credit keeps far below it.
QUEUE_FRAMES = 64
# Left to libzmq after close: long enough for a last Abort, short enough for Ctrl-C.
LINGER_MS = 500
CONNECT_SECONDS = 5.0
# sun_path holds 108 bytes; channel sockets add a suffix to the path.
_MAX_IPC_PATH = 100


@dataclass(frozen=True)
class Endpoint:
    """Where a peer listens: tcp://HOST:PORT or ipc://PATH."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "ipc":
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    def sibling(self, where: str) -> Endpoint:
        """The channel endpoint `where` ("tcp:PORT", "ipc:PATH") beside this control endpoint."""
        scheme, _, rest = where.partition(":")
        port = re.fullmatch(r"\d{1,5}", rest)
        if scheme == "tcp" and self.scheme == "tcp" and port and int(rest) < 65536:
            return Endpoint("tcp", self.host, int(rest))
        if scheme == "ipc" and self.scheme == "ipc":
            return Endpoint("ipc", path=rest)
        raise ConnectError(f"the peer offers a channel at {where!r}, which is not beside {self}")


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
        if endpoint.scheme == "ipc":
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(CONNECT_SECONDS)
                path = endpoint.path
                s.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        else:
            address = (endpoint.host, endpoint.port)
            with socket.create_connection(address, timeout=CONNECT_SECONDS):
                pass
    except TimeoutError as e:
        raise ConnectError(f"{endpoint} does not answer: check the address and firewalls") from e
    except OSError as e:
        raise ConnectError(
            f"cannot connect to {endpoint} ({e.strerror or e}): is `pageferry receive` running "
            f"there?"
        ) from e


def _prepare(sock: zmq.Socket[bytes], max_message: int, endpoint: Endpoint | None) -> None:
    sock.linger = LINGER_MS
    sock.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
    sock.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
    sock.setsockopt(zmq.MAXMSGSIZE, max_message)
    if endpoint is not None and ":" in endpoint.host:
        sock.setsockopt(zmq.IPV6, 1)


def bind(context: Any, endpoint: Endpoint, *, control: bool) -> tuple[Any, Endpoint]:
    """A listening ROUTER at `endpoint`, and where it really listens (port 0: the kernel's pick)."""
    sock = context.socket(zmq.ROUTER)
    _prepare(sock, MAX_MESSAGE if control else MAX_PAYLOAD + 65536, endpoint)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A peer whose connection broke comes back under its own token.
    sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        if endpoint.scheme == "ipc":
            if not endpoint.path.startswith("@"):
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


def unbind(sock: zmq.Socket[bytes], endpoint: Endpoint) -> None:
    """Close a listening socket and remove its path. Idempotent."""
    sock.close()
    if endpoint.scheme == "ipc" and not endpoint.path.startswith("@"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(endpoint.path)


def connect(context: Any, endpoint: Endpoint, token: bytes, *, control: bool) -> Any:
    """A DEALER whose identity is `token`, connecting to `endpoint`."""
    sock = context.socket(zmq.DEALER)
    _prepare(sock, MAX_MESSAGE if control else 65536, endpoint)
    sock.setsockopt(zmq.ROUTING_ID, token)
    sock.connect(str(endpoint))
    return sock
