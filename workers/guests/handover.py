"""How a cooperating guest hands over its memory's userfaultfd: Firecracker's UFFD protocol.

The guest connects to a unix socket and sends one message: a JSON array of mappings with the
userfaultfd as SCM_RIGHTS ancillary data (Firecracker, docs/snapshotting/
handling-page-faults-on-snapshot-resume.md). A de-facto standard, so the only way in which
pageferry attaches a guest that cooperates.
"""

from __future__ import annotations

import os
import socket
import tempfile

import msgspec

from ...transport.errors import HostLacks, SourceError

_MAX_MESSAGE = 1 << 20
_MAX_DESCRIPTORS = 2
HANDOVER_SECONDS = 20.0


class Mapping(msgspec.Struct, frozen=True):
    """A stretch of guest memory in the guest's address space. Bytes; `offset`: in the RAM."""

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int


def send_mappings(path: str, mappings: list[Mapping], descriptors: list[int]) -> None:
    """Guest: connect to `path` and hand over."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        socket.send_fds(s, [msgspec.json.encode(mappings)], descriptors)


class HandoverSocket:
    """Coordinator: where one guest hands over. The path is private and short-lived."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix=f"pageferry-{os.getpid()}-")
        self.path = os.path.join(self._directory, "uffd.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(self.path)
        except OSError as e:
            self.close()
            raise HostLacks(f"cannot open a socket at {self.path}: set TMPDIR ({e})") from e
        self._socket.listen(1)
        self._socket.settimeout(HANDOVER_SECONDS)

    def accept(self) -> tuple[list[Mapping], list[int]]:
        """Mappings and descriptors of the guest that connects. The caller owns the latter."""
        try:
            connection, _ = self._socket.accept()
        except TimeoutError as e:
            raise SourceError("the guest did not hand over its memory") from e
        with connection:
            connection.settimeout(HANDOVER_SECONDS)
            data, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, _MAX_DESCRIPTORS)
        try:
            mappings = msgspec.json.decode(data, type=list[Mapping])
        except msgspec.DecodeError as e:
            for fd in descriptors:
                os.close(fd)
            raise SourceError(f"the guest's handover makes no sense: {e}") from e
        return mappings, list(descriptors)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        if os.path.exists(self.path):
            os.unlink(self.path)
        if os.path.isdir(self._directory):
            os.rmdir(self._directory)
