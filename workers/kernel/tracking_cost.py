"""What the first write to a page that is tracked costs whoever writes it, and what making a hole of
it does: measured, on memory of our own. Facts only.
"""

from __future__ import annotations

import functools
import mmap
import os
import time

import numpy as np
import numpy.typing as npt

from ...transport.errors import HostLacks, SourceError
from ...transport.pages import PAGE_SIZE
from .libc import punch_hole
from .pagemap import PagemapScanner
from .userfaultfd import create_tracking, register_write_protect

# Enough to be measured, and a few milliseconds; the least of some, since others only add.
_PAGES, _TIMES = 2048, 3


@functools.cache
def fault_seconds() -> float:
    """Seconds a page, in shared memory, once a process; 0 where the kernel tracks nothing. A guest
    under KVM leaves its processor for it, and pays some microseconds more."""
    try:
        return _measured()
    except (HostLacks, SourceError, OSError):
        return 0.0


def _measured() -> float:
    memory = mmap.mmap(-1, _PAGES * PAGE_SIZE)  # shared and anonymous: in tmpfs
    pages = np.frombuffer(memory, np.uint8).reshape(_PAGES, PAGE_SIZE)
    pages[:, 0] = 1  # they are there
    address = int(pages.ctypes.data)
    uffd = create_tracking()
    try:
        # SAFETY: the mapping outlives the descriptor.
        register_write_protect(uffd, address, pages.nbytes)
        scanner = PagemapScanner(os.getpid())
        try:
            scanner.collect(address, pages.nbytes)
            took = []
            for _ in range(_TIMES):
                first, again = _write(pages), _write(pages)
                scanner.collect(address, pages.nbytes)
                took.append(first - again)
        finally:
            scanner.close()
    finally:
        os.close(uffd)
    return max(0.0, min(took)) / _PAGES


def _write(pages: npt.NDArray[np.uint8]) -> float:
    begin = time.perf_counter()
    pages[:, 1] += 1
    return time.perf_counter() - begin


@functools.cache
def hole_seconds() -> float:
    """Seconds a page that is in memory and becomes a hole, once a process."""
    fd = os.memfd_create("pageferry-holes", os.MFD_CLOEXEC)
    try:
        return min(_punch(fd) for _ in range(_TIMES)) / _PAGES
    finally:
        os.close(fd)


def _punch(fd: int) -> float:
    os.pwrite(fd, bytes(_PAGES * PAGE_SIZE), 0)
    begin = time.perf_counter()
    punch_hole(fd, 0, _PAGES * PAGE_SIZE)
    return time.perf_counter() - begin
