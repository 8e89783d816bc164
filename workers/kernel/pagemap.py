"""PAGEMAP_SCAN (Linux 6.7): which pages of a process were written, and re-arm, in one call.

ioctl on /proc/PID/pagemap; struct pm_scan_arg in <linux/fs.h>. With PM_SCAN_WP_MATCHING the
kernel reports each written page and write-protects it again before the next instruction of
the guest can write it: no write falls between "get" and "clear".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

import numpy as np
import numpy.typing as npt

from ...transport.errors import HostLacks, SourceError
from ...transport.pages import NO_RUNS, PAGE_SIZE, Runs

_SCAN = 0xC0606610
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_PAGE_IS_WRITTEN = 1 << 1
# Regions a call can return: 24 bytes each.
_REGIONS = 16384


class NotTracked(Exception):
    """Part of the range is memory whose writes nobody notes."""


class PagemapScanner:
    """Reads and clears the written pages of process `pid`. The range must be registered WP."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = self._open()
        self._vector = (ctypes.c_uint64 * (3 * _REGIONS))()

    def __repr__(self) -> str:
        return f"<PagemapScanner pid={self.pid}>"

    def _open(self) -> int:
        try:
            return os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SourceError(
                f"cannot read the page map of process {self.pid}: {e.strerror}"
            ) from e

    def renew(self) -> None:
        """Read the memory that the process has now: after execve(2) it is another, and that of
        before has no page left."""
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

    def collect(self, start: int, length: int, *, complete: bool = False) -> Runs:
        """Runs of pages (from `start`) written since the last call; they are armed again.

        The kernel passes over memory that is not registered; with `complete` it raises NotTracked
        instead, and what was written in the rest may be lost. Where nothing is mapped is no memory.
        """
        parts: list[tuple[Runs, int]] = []
        at, end = start, start + length
        while at < end:
            found, at = self._scan(at, end, _WP_MATCHING | (_CHECK_WPASYNC if complete else 0))
            if len(found):
                starts = (found[:, 0].astype(np.int64) - start) // PAGE_SIZE
                counts = (found[:, 1] - found[:, 0]).astype(np.int64) // PAGE_SIZE
                parts.append(((starts, counts), at))
        if not parts:
            return NO_RUNS
        runs = [part[0] for part in parts]
        return np.concatenate([r[0] for r in runs]), np.concatenate([r[1] for r in runs])

    def count(self, start: int, length: int) -> int:
        """How many pages were written since the last `collect`, about; nothing is changed. In the
        same thread as `collect`, or not at the same time."""
        pages, at, end = 0, start, start + length
        while at < end:
            found, at = self._scan(at, end, 0)
            pages += int((found[:, 1] - found[:, 0]).sum()) // PAGE_SIZE
        return pages

    def _scan(self, at: int, end: int, flags: int) -> tuple[npt.NDArray[np.uint64], int]:
        # SAFETY: the kernel writes at most _REGIONS entries into self._vector, which outlives
        # the call; the argument is the 96-byte struct it declares.
        argument = bytearray(
            struct.pack(
                "12Q", 96, flags, at, end, 0, ctypes.addressof(self._vector), _REGIONS, 0,
                0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN,
            )
        )  # fmt: skip
        try:
            n = fcntl.ioctl(self._fd, _SCAN, argument)
        except OSError as e:
            if e.errno == errno.EPERM and flags & _CHECK_WPASYNC:
                raise NotTracked from e
            if e.errno in (errno.ENOTTY, errno.EINVAL):
                raise HostLacks("this kernel has no PAGEMAP_SCAN (Linux 6.7)") from e
            raise SourceError(f"scan of process {self.pid} failed: {e.strerror}") from e
        walked = struct.unpack_from("Q", argument, 32)[0]
        found: npt.NDArray[np.uint64] = np.ctypeslib.as_array(self._vector)[: 3 * n]
        return found.reshape(-1, 3).copy(), int(walked) or end

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
