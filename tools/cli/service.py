"""What the service manager is told, and what it hands over: sd_notify(3), sd_listen_fds(3).

Nothing without systemd: then its variables are not there.
"""

from __future__ import annotations

import os
import socket

from ...pipeline.carriage import local_endpoint
from ...transport.carrier import claim
from ...transport.errors import UsageError
from ...transport.links import Endpoint, parse_endpoint
from ...transport.stream_addresses import Stream, is_stream, parse_stream

ACTIVATED = "systemd"
_FIRST = 3  # SD_LISTEN_FDS_START


def ready() -> None:
    """We listen (Type=notify)."""
    where = os.environ.pop("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            s.connect(f"\0{where[1:]}" if where.startswith("@") else where)
            s.send(b"READY=1")
        except OSError:  # it finds out that nobody said so
            return


def where_to_receive(listen: str | None, stream: str | None) -> tuple[Endpoint, Stream | None]:
    """Where to listen, and the stream that the one source comes over, if there is one: then where
    nobody else needs to know of, if nothing is said. UsageError."""
    if stream is None and listen is not None and is_stream(listen):
        listen, stream = None, listen
    over = claim(parse_stream(stream)) if stream is not None else None
    if listen is None and over is None:
        raise UsageError("nothing to listen at: say --listen tcp://HOST:PORT, or a stream: fd:N, -")
    endpoint = where_to_listen(listen) if listen is not None else local_endpoint()
    if over is not None and endpoint.scheme != "ipc":
        raise UsageError(f"beside a stream it can listen at ipc://PATH, not at {endpoint}")
    return endpoint, over


def where_to_listen(text: str) -> Endpoint:
    """`text` as an endpoint; "systemd": the socket that its socket unit has opened. UsageError."""
    if text != ACTIVATED:
        return parse_endpoint(text)
    count, pid = (os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count != "1":
        raise UsageError(
            "--listen systemd takes the one socket of a .socket unit, and systemd has handed over "
            f"{count if count.isdecimal() and pid == str(os.getpid()) else 'none'}: say "
            "tcp://HOST:PORT, or start it by its unit"
        )
    return _endpoint_of(_FIRST)


def _endpoint_of(fd: int) -> Endpoint:
    """Where a listening socket is that was handed over."""
    os.set_inheritable(fd, False)
    try:
        given = socket.socket(fileno=fd)
    except OSError as e:
        raise UsageError(f"--listen systemd: descriptor {fd} is no socket") from e
    try:
        listens = given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if given.type != socket.SOCK_STREAM or not listens:
            raise UsageError("--listen systemd: a socket of ListenStream= is needed")
        given.setblocking(False)
        name = given.getsockname()
        if given.family == socket.AF_UNIX:
            path = name.decode() if isinstance(name, bytes) else name
            path = f"@{path[1:]}" if path.startswith("\0") else path
            return Endpoint("ipc", path=path, fd=fd)
        return Endpoint("tcp", name[0], name[1], fd=fd)
    finally:
        given.detach()
