"""How a cooperating guest hands over its memory's userfaultfd: Firecracker's UFFD protocol.

The guest connects to a unix socket and sends one message: a JSON array of mappings with the
userfaultfd as SCM_RIGHTS ancillary data (Firecracker, docs/snapshotting/
handling-page-faults-on-snapshot-resume.md). A de-facto standard, so the only way in which
pageferry attaches a guest that cooperates.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable

import msgspec

from ...transport.errors import DestinationError, HostLacks, SourceError, UsageError
from ...transport.links import clear_dead_socket
from ...transport.messages import UNDECODABLE
from ..names import Folder

_MAX_MESSAGE = 1 << 20
_MAX_DESCRIPTORS = 2
_MAX_PATH = 100
HANDOVER_SECONDS = 20.0
_LOOK_SECONDS = 0.1
_TRANSFER_SECONDS = 5.0


class Mapping(msgspec.Struct, frozen=True):
    """A stretch of guest memory in the guest's address space. Bytes; `offset`: in the RAM. Fields
    that are not here (Firecracker once had page_size_kib, which holds bytes too) are ignored."""

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int


def hand_over(path: str, message: bytes, descriptors: list[int]) -> socket.socket:
    """Guest or monitor: connect to `path`, say `message`; the connection, to be kept or closed."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    if message:
        socket.send_fds(connection, [message], descriptors)
    return connection


def send_mappings(path: str, mappings: list[Mapping], descriptors: list[int]) -> None:
    """Guest: connect to `path` and hand over."""
    hand_over(path, msgspec.json.encode(mappings), descriptors).close()


def decode_mappings(data: bytes, descriptors: list[int]) -> list[Mapping]:
    """The mappings in a handover; SourceError, with the descriptors closed, if it is none."""
    try:
        mappings = msgspec.json.decode(data, type=list[Mapping])
        if not descriptors:
            raise SourceError("the guest's handover holds no userfaultfd")
        return mappings
    except UNDECODABLE as e:
        for fd in descriptors:
            os.close(fd)
        raise SourceError(f"the guest's handover makes no sense: {e}") from e


class HandoverListener:
    """Where a virtual machine monitor hands over its guest's memory, whenever it comes: a unix
    socket at a path that the user chose. Non-blocking; `fileno` becomes readable."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        if len(os.fsencode(self.path)) > _MAX_PATH:
            raise UsageError(f"the path {path} is too long for a unix socket: keep it below 100")
        clear_dead_socket(self.path, path)
        self._socket = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            self._socket.bind(self.path)
            self._socket.listen(4)
        except OSError as e:
            self._socket.close()
            raise DestinationError(f"cannot listen at {path}: {e.strerror}") from e
        finally:
            os.umask(before)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> VmmConnection | None:
        """Somebody who connected, or None."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return None
        connection.setblocking(False)
        return VmmConnection(connection)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class VmmConnection:
    """A connected monitor. It keeps the connection for as long as it lives, as Firecracker does;
    `pid` is who it is."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = int.from_bytes(credentials[:4], "little")

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> tuple[list[Mapping], list[int]] | None:
        """What it hands over: mappings and descriptors (the caller's from now on); None if nothing
        came yet. SourceError if it makes no sense or the monitor is gone."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_MESSAGE, _MAX_DESCRIPTORS)
        except BlockingIOError:
            return None
        except OSError as e:
            raise SourceError(f"the handover broke off: {e.strerror}") from e
        if not data:
            for fd in descriptors:
                os.close(fd)
            raise SourceError("it went away without handing anything over")
        mappings = decode_mappings(data, list(descriptors))
        if os.readlink(f"/proc/self/fd/{descriptors[0]}") != "anon_inode:[userfaultfd]":
            for fd in descriptors:
                os.close(fd)
            raise SourceError("the descriptor it handed over is no userfaultfd")
        os.set_blocking(descriptors[0], False)
        return mappings, list(descriptors)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


class HandoverSocket:
    """Coordinator: where one guest hands over. The path is private and short-lived."""

    def __init__(self) -> None:
        self._folder = Folder()
        self.path = os.path.join(self._folder.path, "uffd.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(self.path)
        except OSError as e:
            self.close()
            raise HostLacks(f"cannot open a socket at {self.path}: set TMPDIR ({e})") from e
        self._socket.listen(1)
        self._socket.settimeout(_LOOK_SECONDS)

    def accept(
        self, is_gone: Callable[[], bool] = lambda: False
    ) -> tuple[list[Mapping], list[int]]:
        """Mappings and descriptors of the guest that connects. The caller owns the latter.
        `is_gone`: nobody will come any more."""
        until = time.monotonic() + HANDOVER_SECONDS
        while True:
            try:
                connection, _ = self._socket.accept()
                break
            except TimeoutError as e:
                if is_gone() or time.monotonic() > until:
                    raise SourceError("the guest did not hand over its memory") from e
        with connection:
            connection.settimeout(_TRANSFER_SECONDS)  # it connects and sends in one breath
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    connection, _MAX_MESSAGE, _MAX_DESCRIPTORS
                )
            except TimeoutError as e:
                raise SourceError("the guest did not hand over its memory") from e
        try:
            return msgspec.json.decode(data, type=list[Mapping]), list(descriptors)
        except msgspec.DecodeError as e:
            for fd in descriptors:
                os.close(fd)
            raise SourceError(f"the guest's handover makes no sense: {e}") from e

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        self._folder.close()
