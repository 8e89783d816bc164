"""ram:PATH and shm:NAME, live memory in a shared-memory file.

Nobody tells who writes it, so changes are found by content: senders note a hash of each page
they sent, and a scan compares. `?pid=PID` names the process that writes: it is stopped for the
switchover (stopping.py) and stays so afterwards. Without it nothing can be stopped, and the memory
has moved when a whole scan finds it as it was sent.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from ...transport.errors import (
    DestinationError,
    DestinationTooSmall,
    PeerRefused,
)
from ...transport.messages import Block, Hello
from ..ram import RamBlock, RamFile
from .base import TRACKING_HASH, ArmedMemory, DestinationGuest, SourceGuest, layout_size
from .files import NewFile, open_to_read
from .process_memory import path_of_memory
from .protecting import protect_process
from .slowing import MEANS, Slowing
from .stopping import WriterProcess
from .uri import GuestUri


def path_of(uri: GuestUri) -> str:
    """Where the file is that holds the memory of a ram:, shm: or pid: guest. SourceError if a
    process has none."""
    if uri.kind == "pid":
        return path_of_memory(int(uri.rest), uri.options.get("mapping", ""))
    return uri.rest if uri.kind == "ram" else f"/dev/shm/{uri.rest.strip('/')}"


class RamSource(SourceGuest):
    """Memory in a shared-memory file."""

    kind = "ram"
    tracking = TRACKING_HASH
    live = True
    running = True

    def __init__(self, uri: GuestUri) -> None:
        by = uri.choice("throttle", MEANS)
        path = path_of(uri)
        fd, size = open_to_read(path, "shared memory")
        self._file = RamFile(fd, path)
        self.blocks = [RamBlock(Block("ram", size), self._file, 0)]
        self.image_size = size
        self._writer: WriterProcess | None = None
        self._slowing: Slowing | None = None
        if "pid" in uri.options:
            try:
                self._writer = WriterProcess(uri.integer("pid", 0))
            except BaseException:
                self.close()
                raise
            self.can_stop = self.can_throttle = True
            self.process = self._writer.pid
            self._slowing = Slowing(self.process, by)

    def start_tracking(self) -> None:
        if self._slowing is not None:
            self._slowing.begin()

    def throttle(self, percentage: int) -> None:
        assert self._writer is not None and self._slowing is not None
        if not self._writer.stands_still:
            self._slowing.set(percentage)

    def slowed(self) -> dict[str, Any]:
        return self._slowing.meter.report() if self._slowing is not None else {}

    def protect(self) -> ArmedMemory:
        if self._writer is None:
            return super().protect()
        return protect_process(self._writer.pid, self.blocks)

    def stop(self) -> None:
        if self._writer is not None and self._slowing is not None:
            self._slowing.release()
            self._writer.stays = self.stays
            self._writer.stop()
            self._slowing.lift()
            self.running = self._writer.ran

    def resume(self) -> None:
        if self._writer is not None:
            self._writer.resume()

    def check(self) -> None:
        if self._writer is not None and self._slowing is not None:
            self._writer.check()
            self._slowing.check()

    def describe(self) -> dict[str, Any]:
        if self._writer is None or not self._writer.stands_still:
            return {}
        return {"source-process": self._writer.describe()}

    def close(self) -> None:
        self._file.close()
        if self._slowing is not None:
            self._slowing.close()
        if self._writer is not None:
            self._writer.close()


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
