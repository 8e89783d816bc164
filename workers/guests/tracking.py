"""Which pages of files another, unmodified process writes, as the kernel notes it: exact for what
goes through its page tables, a few milliseconds a GiB.

Knows processes and files, no kind of guest. What it does not see, whoever uses it has to exclude
or catch:

* Files written by others, or not through a mapping (write(2)).
* DMA. The kernel notes a page when a device is given it (it is pinned then), not when the device
  is done. A page that is read after it was taken from here and before its device is done is old,
  and nobody says so again. So: take, wait until all I/O that had begun has ended, and read then.
* Pages given back (a hole in the file): they read as zeros and count as not written.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import numpy as np

from ...transport.errors import HostLacks, SourceError
from ...transport.pages import NO_RUNS, PAGE_SIZE, Runs
from ..kernel.mappings import writable_mappings
from ..kernel.pagemap import PagemapScanner
from ..kernel.remote import plant_tracking
from ..kernel.userfaultfd import register_write_protect
from ..ram import RamFile


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes [offset, offset + length) of a file are at `address`."""

    address: int
    length: int
    offset: int


def windows(pid: int, file: RamFile) -> list[Window]:
    """Where process `pid` can write the file, lowest address first; SourceError if it has ended."""
    try:
        found = writable_mappings(pid, file.fd)
    except OSError as e:
        raise SourceError(f"cannot read what process {pid} maps: {e.strerror}") from e
    joined: list[Window] = []
    for m in found:
        last = joined[-1] if joined else Window(-1, 0, 0)
        if (m.start, m.offset) == (last.address + last.length, last.offset + last.length):
            # the kernel splits and joins what lies side by side as it likes
            joined[-1] = Window(last.address, last.length + m.end - m.start, last.offset)
        else:
            joined.append(Window(m.start, m.end - m.start, m.offset))
    return joined


class WriteTracker:
    """The writes of process `pid` to `files`, from `start` on.

    The order is: `start`, then for each file `written` again and again, each answer what was
    written since the one before. Raises AttachError or HostLacks if it cannot be.
    """

    def __init__(self, pid: int, files: list[RamFile]) -> None:
        self.pid = pid
        self._files = files
        self._windows: list[list[Window]] = []
        self._uffd = -1
        self._scanner = PagemapScanner(pid)
        try:
            planted = plant_tracking(pid)
        except BaseException:
            self.close()
            raise
        self._uffd, self.paused_seconds = planted.uffd, planted.paused_seconds

    def __repr__(self) -> str:
        return f"<WriteTracker pid={self.pid} {len(self._files)} files>"

    def prepare(self) -> None:
        """Have the kernel watch what is mapped now. HostLacks if it cannot watch such memory."""
        self._windows = [windows(self.pid, file) for file in self._files]
        for file, found in zip(self._files, self._windows, strict=True):
            for window in found:
                try:
                    register_write_protect(self._uffd, window.address, window.length)
                except OSError as e:
                    if e.errno == errno.EBUSY:
                        raise HostLacks(
                            f"writes to {file.name} are tracked by somebody else already: another "
                            f"pageferry?"
                        ) from e
                    raise HostLacks(
                        f"the kernel cannot track writes to {file.name} ({e.strerror}): it can for "
                        f"files in tmpfs (/dev/shm) and memfds"
                    ) from e

    def start(self) -> None:
        """From now on writes are noted."""
        for index in range(len(self._files)):
            self.written(index)

    def written(self, index: int) -> Runs:
        """Pages of a file that were written since the last call; pages from the file's beginning.

        SourceError if it is no longer mapped as it was: what was written meanwhile is not known.
        """
        if windows(self.pid, self._files[index]) != self._windows[index]:
            raise SourceError(
                f"process {self.pid} has changed how it maps {self._files[index].name} meanwhile: "
                f"start again"
            )
        parts = []
        for window in self._windows[index]:
            starts, counts = self._scanner.collect(window.address, window.length)
            parts.append((starts + window.offset // PAGE_SIZE, counts))
        if not parts:
            return NO_RUNS
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def close(self) -> None:
        """Track no more; the process is as it was. Idempotent."""
        self._scanner.close()
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1
