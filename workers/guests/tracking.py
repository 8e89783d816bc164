"""Which pages of files another, unmodified process writes, as the kernel notes it: exact for what
goes through its page tables, a few milliseconds a GiB.

Knows processes and files, no kind of guest. What it does not see, whoever uses it has to exclude
or catch:

* Files written by others, or not through a mapping (write(2)).
* DMA. The kernel notes a page when a device is given it (it is pinned then), not when the device
  is done. A page that is read after it was taken from here and before its device is done is old,
  and nobody says so again. So: take, wait until all I/O that had begun has ended, and read then.
  A process that is stopped or frozen has no system call under way, but what it handed over and does
  not wait for (io_uring, libaio, RDMA) goes on, and of those nobody can be asked.
* Pages given back (a hole in the file): they read as zeros and count as not written.
* Mappings that come and go between two looks; children, who have mappings of their own.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import numpy as np

from ...transport.errors import HostLacks, SourceError
from ...transport.pages import PAGE_SIZE, Runs, page_count, union
from ..kernel.mappings import writable_mappings
from ..kernel.pagemap import NotTracked, PagemapScanner
from ..kernel.remote import plant_tracking
from ..kernel.userfaultfd import register_write_protect
from ..ram import RamFile

# A process that maps and unmaps while it is looked at: so many looks, then an error.
_LOOKS = 8
# What register says of a mapping that was there when /proc was read, and is not any more.
_GONE = (errno.EINVAL, errno.ENOENT, errno.EPERM, errno.ESRCH)


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes [offset, offset + length) of a file are at `address`."""

    address: int
    length: int
    offset: int

    @property
    def end(self) -> int:
        return self.address + self.length

    def part(self, start: int, end: int) -> Window:
        """What of it is at [start, end), which lies within."""
        return Window(start, end - start, self.offset + start - self.address)

    def pages(self) -> Runs:
        """All pages of the file that it shows."""
        return np.array([self.offset // PAGE_SIZE]), np.array([self.length // PAGE_SIZE])


def windows(pid: int, file: RamFile) -> list[Window]:
    """Where process `pid` can write the file, lowest address first; SourceError if it has ended."""
    return joined(_mapped(pid, file))


def _mapped(pid: int, file: RamFile) -> list[Window]:
    """The same, each mapping by itself."""
    try:
        found = writable_mappings(pid, file.fd)
    except OSError as e:
        raise SourceError(f"cannot read what process {pid} maps: {e.strerror}") from e
    return [Window(m.start, m.end - m.start, m.offset) for m in found]


def joined(parts: list[Window]) -> list[Window]:
    """`parts`, in the order of addresses, as few as there can be: the kernel splits and joins what
    lies side by side as it likes."""
    found: list[Window] = []
    for part in parts:
        last = found[-1] if found else Window(-1, 0, 0)
        if (part.address, part.offset) == (last.end, last.offset + last.length):
            found[-1] = Window(last.address, last.length + part.length, last.offset)
        else:
            found.append(part)
    return found


def common(one: list[Window], other: list[Window]) -> list[Window]:
    """Where both show the same bytes of the file at the same addresses. Each of them, and the
    answer, in the order of addresses and without overlap."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        a, b = one[i], other[j]
        start, end = max(a.address, b.address), min(a.end, b.end)
        if start < end and a.address - a.offset == b.address - b.offset:
            found.append(a.part(start, end))
        if a.end < b.end:
            i += 1
        else:
            j += 1
    return found


def without(whole: list[Window], parts: list[Window]) -> list[Window]:
    """`whole` but for `parts` of it; as above."""
    found, left = [], iter([*parts, Window(1 << 64, 0, 0)])
    part = next(left)
    for window in whole:
        at = window.address
        while part.address < window.end:
            if at < part.address:
                found.append(window.part(at, part.address))
            at, part = part.end, next(left)
        if at < window.end:
            found.append(window.part(at, window.end))
    return found


class WriteTracker:
    """The writes of process `pid` to `files`, from `start` on.

    The order is: `prepare`, `start`, then for each file `written` again and again, each answer what
    was written since the one before. Raises AttachError or HostLacks if it cannot be.

    `moving`: the process may change how it maps the files. What it maps anew counts as written
    throughout, and so does what it maps no more; changed mappings are both, where they changed.
    Otherwise a change is an error.
    """

    def __init__(self, pid: int, files: list[RamFile], *, moving: bool = False) -> None:
        self.pid = pid
        self._files = files
        self._moving = moving
        # of each file: registered, and armed since the last look
        self._windows: list[list[Window]] = [[] for _ in files]
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
        for index in range(len(self._files)):
            self._look(index, may_change=True)

    def start(self) -> None:
        """From now on writes are noted."""
        for index in range(len(self._files)):
            self.written(index)

    def written(self, index: int) -> Runs:
        """Pages of a file that were written since the last call; pages from the file's beginning.

        SourceError if it is no longer mapped as it was and that is not expected: what was written
        meanwhile is not known. With `moving`: if it changes faster than it can be looked at, and
        HostLacks if it was mapped anew in a way that cannot be watched.
        """
        return self._look(index, may_change=self._moving)

    def so_far(self) -> int:
        """How many pages `written` would have, about: what was mapped meanwhile is not in it. Not
        at the same time as any other call."""
        return sum(self._scanner.count(w.address, w.length) for ws in self._windows for w in ws)

    def _look(self, index: int, *, may_change: bool) -> Runs:
        """A mapping may come and go between any two of these steps: then they are taken again.

        What is unmapped behind our back is found to be gone next time; what took its place is
        memory that is not registered, and the scan says so. A new mapping is registered and armed
        first and counts as written then: what is written before that is in this set, and what comes
        after it in the next.
        """
        file, found, error = self._files[index], list[Runs](), OSError()
        for _ in range(_LOOKS):
            known, now = self._windows[index], _mapped(self.pid, file)
            if joined(now) != known and not may_change:
                break
            self._scanner.renew()
            # One by one as the kernel has them: each of them is registered as a whole or not at
            # all, and a scan that meets one that is not loses what it has found before.
            kept = common(known, now)
            found += [window.pages() for window in without(known, kept)]
            watched = []
            for window in kept:
                try:
                    found.append(self._collect(window))
                    watched.append(window)
                except NotTracked:
                    found.append(window.pages())
            for window in without(now, kept):
                found.append(window.pages())
                try:
                    self._watch(window, file.name)
                    watched.append(window)
                except NotTracked:
                    pass
                except OSError as e:
                    error = e
            self._windows[index] = joined(sorted(watched, key=lambda window: window.address))
            if self._windows[index] == joined(now):
                return within(union(found), page_count(os.fstat(file.fd).st_size))
        if may_change and error.errno and windows(self.pid, file) == joined(now):
            raise _not_trackable(file.name, error)
        raise SourceError(
            f"process {self.pid} has changed how it maps {file.name} meanwhile: start again"
        )

    def _collect(self, window: Window) -> Runs:
        starts, counts = self._scanner.collect(window.address, window.length, complete=True)
        return starts + window.offset // PAGE_SIZE, counts

    def _watch(self, window: Window, name: str) -> None:
        """Register and arm. OSError or NotTracked if it is not there any more; HostLacks."""
        try:
            register_write_protect(self._uffd, window.address, window.length)
        except OSError as e:
            if e.errno in _GONE:
                raise
            if e.errno == errno.ENOMEM:  # the memory that the descriptor is for has ended
                raise SourceError(
                    f"process {self.pid} has become another program (execve): start again"
                ) from e
            raise _not_trackable(name, e) from e
        self._collect(window)

    def close(self) -> None:
        """Track no more; the process is as it was. Idempotent."""
        self._scanner.close()
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1


def within(runs: Runs, pages: int) -> Runs:
    """`runs` but for what is behind the first `pages` pages: mappings may be longer than a file."""
    starts, counts = runs
    keep = starts < pages
    return starts[keep], np.minimum(starts + counts, pages)[keep] - starts[keep]


def _not_trackable(name: str, error: OSError) -> HostLacks:
    if error.errno == errno.EBUSY:
        return HostLacks(
            f"writes to {name} are tracked by somebody else already: another pageferry?",
            reason="busy",
        )
    return HostLacks(
        f"the kernel cannot track writes to {name} ({error.strerror}): it can for files in tmpfs "
        f"(/dev/shm) and memfds"
    )
