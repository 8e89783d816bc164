"""Tries what the kernel lets this process do; whatever is opened or set is gone afterwards.

Facts only: what they mean is judged in workers/host.py.
"""

from __future__ import annotations

import errno
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ...transport.errors import HostLacks
from ...transport.pages import PAGE_SIZE
from .libc import syscall
from .pagemap import PagemapScanner
from .userfaultfd import SYSCALL, create, features

# Whom userfaultfd(2) and the rest are wired up for.
ARCHITECTURES = tuple(SYSCALL)
# The lowest nice level there is (setpriority(2)).
_LOWEST_NICE = -20


@dataclass(frozen=True, slots=True)
class Userfaultfd:
    """What userfaultfd(2) answers. `error`: why not all faults (of kernel and user) are caught, as
    an errno, 0 if they are. `user_mode`: whether those from user mode are."""

    error: int
    user_mode: bool
    features: int


def probe_userfaultfd() -> Userfaultfd:
    """Ask for all faults first, then for those from user mode alone."""
    error, uffd = _open_full()
    if uffd < 0:
        try:
            uffd = create(user_mode_only=True)
        except HostLacks:
            return Userfaultfd(error, False, 0)
    try:
        return Userfaultfd(error, True, features(uffd, 0))
    finally:
        os.close(uffd)


def _open_full() -> tuple[int, int]:
    """An errno and -1, or 0 and a descriptor. create() would settle for user mode in silence."""
    number = SYSCALL.get(platform.machine())
    if number is None:
        return errno.ENOSYS, -1
    try:
        return 0, syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        return e.errno or errno.EPERM, -1


def scan_own_page() -> None:
    """One PAGEMAP_SCAN of a page of ours; HostLacks or SourceError if it does not work.

    SAFETY: the memory is registered with no userfaultfd, so the kernel passes over it and
    write-protects nothing.
    """
    memory = np.ones(2 * PAGE_SIZE, np.uint8)
    start = -(-memory.ctypes.data // PAGE_SIZE) * PAGE_SIZE
    scanner = PagemapScanner(os.getpid())
    try:
        scanner.collect(start, PAGE_SIZE)
    finally:
        scanner.close()


def probe_priorities() -> tuple[bool, int]:
    """Whether a thread may run in real time, and the lowest nice level that it can have.

    Limits, capabilities and control groups all have a say, so it is tried: by a thread that ends
    at once. In Linux both calls act on the calling thread alone (sched(7), setpriority(2)).
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try_priorities).result()


def _try_priorities() -> tuple[bool, int]:
    nice = _try_nice()
    lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO))
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, lowest)
    except OSError:
        return False, nice
    return True, nice


def _try_nice() -> int:
    now = os.getpriority(os.PRIO_PROCESS, 0)
    for level in range(_LOWEST_NICE, now):
        try:
            os.setpriority(os.PRIO_PROCESS, 0, level)
        except OSError:
            continue
        return level
    return now
