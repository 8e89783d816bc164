"""ram:PATH and shm:NAME, live memory in a shared-memory file.

Nobody tells who writes it, so changes are found by content: senders note a hash of each page
they sent, and a scan compares. `?pid=PID` names the process that writes: it is stopped with
SIGSTOP for the switchover and stays stopped afterwards. Without it nothing can be stopped,
and the memory has moved when a whole scan finds it as it was sent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import time
from typing import Any

from ...transport.errors import (
    DestinationError,
    DestinationTooSmall,
    PeerRefused,
    SourceError,
    UsageError,
)
from ...transport.messages import Block, Hello
from ..ram import RamBlock, RamFile
from .base import TRACKING_HASH, DestinationGuest, SourceGuest, layout_size
from .files import NewFile, open_to_read
from .uri import GuestUri

_STOP_SECONDS = 2.0


def path_of(uri: GuestUri) -> str:
    """Where the memory's file is."""
    return uri.rest if uri.kind == "ram" else f"/dev/shm/{uri.rest.strip('/')}"


class WriterProcess:
    """The process that writes the memory: stopped and continued by signal."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._gone = psutil.NoSuchProcess
        self._denied = psutil.AccessDenied
        try:
            self._process = psutil.Process(pid)
        except self._gone as e:
            raise SourceError(f"there is no process {pid}") from e
        if pid == os.getpid():
            raise UsageError("pid= must name the process that writes the memory, not pageferry")
        self.stopped = False

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread has stopped."""
        try:
            if self._all_stopped():
                return  # somebody stopped it before us, and it stays so
            self.stopped = True
            self._process.send_signal(signal.SIGSTOP)
            until = time.monotonic() + _STOP_SECONDS
            while not self._all_stopped():
                if time.monotonic() > until:
                    raise SourceError(f"process {self._process.pid} does not stop")
                time.sleep(0.0005)
        except self._gone:
            pass  # it ended: nobody writes any more
        except self._denied as e:
            raise SourceError(f"not allowed to stop process {self._process.pid}") from e

    def _all_stopped(self) -> bool:
        pid = self._process.pid
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return True  # it ended
        for task in tasks:
            try:
                with open(f"/proc/{pid}/task/{task}/stat") as f:
                    state = f.read().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state not in "TtZX":
                return False
        return True

    def resume(self) -> None:
        if self.stopped:
            self.stopped = False
            with contextlib.suppress(self._gone):
                self._process.send_signal(signal.SIGCONT)


class RamSource(SourceGuest):
    """Memory in a shared-memory file."""

    kind = "ram"
    tracking = TRACKING_HASH
    live = True
    running = True

    def __init__(self, uri: GuestUri) -> None:
        path = path_of(uri)
        fd, size = open_to_read(path, "shared memory")
        self._file = RamFile(fd, path)
        self.blocks = [RamBlock(Block("ram", size), self._file, 0)]
        self.image_size = size
        self._writer: WriterProcess | None = None
        if "pid" in uri.options:
            try:
                self._writer = WriterProcess(uri.integer("pid", 0))
            except BaseException:
                self.close()
                raise
            self.can_stop = True

    def stop(self) -> None:
        if self._writer is not None:
            self._writer.stop()

    def resume(self) -> None:
        if self._writer is not None:
            self._writer.resume()

    def describe(self) -> dict[str, Any]:
        if self._writer is None or not self._writer.stopped:
            return {}
        return {"source-process": "stopped (SIGSTOP); SIGCONT would let it run a second time"}

    def close(self) -> None:
        self._file.close()


class RamDestination(DestinationGuest):
    """A shared-memory file: a new one, or one that is there and large enough."""

    kind = "ram"

    def __init__(self, uri: GuestUri) -> None:
        self._path = path_of(uri)
        self._uri = uri
        self._new: NewFile | None = None
        self._file: RamFile | None = None

    def lay_out(self, hello: Hello) -> None:
        size = layout_size(hello.blocks, hello.image_size)
        if hello.kind == "image" and sum(block.size for block in hello.blocks) != size:
            raise PeerRefused(
                "an ELF core is more than memory (headers, notes): move it to image:PATH",
                field="kind",
            )
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._new = NewFile(self._path, size)
            self._file = RamFile(os.dup(self._new.fd), self._path)
            fresh = True
        except OSError as e:
            raise DestinationError(f"cannot open {self._path}: {e.strerror}") from e
        else:
            self._file = RamFile(fd, self._path)
            fresh = self._check_existing(size)
        self.blocks = [RamBlock(spec, self._file, spec.offset) for spec in hello.blocks]
        self.fresh = [fresh] * len(self.blocks)

    def _check_existing(self, size: int) -> bool:
        assert self._file is not None
        status = os.fstat(self._file.fd)
        if not stat.S_ISREG(status.st_mode):
            raise DestinationError(f"cannot write {self._path}: it is no regular file")
        if status.st_size < size:
            raise DestinationTooSmall(
                f"{self._path} has {status.st_size} bytes, the source has {size}: enlarge it, or "
                f"remove it and it will be made"
            )
        try:
            os.lseek(self._file.fd, 0, os.SEEK_DATA)
        except OSError as e:
            return e.errno == errno.ENXIO
        return False

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        assert self._file is not None
        os.fsync(self._file.fd)

    def run(self) -> str:
        if self._new is not None:
            self._new.publish()
        return str(self._uri)

    def discard(self) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._new is not None:
            self._new.discard()
