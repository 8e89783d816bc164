"""A userfaultfd inside another process, unmodified and unasked, and a duplicate of it here.

What is done with it is done here: registering, scanning, installing pages. The other process's own
descriptor is closed again for tracking and protecting (who does that may die: then the kernel lets
go of everything), and kept for missing pages: if it were gone as well, the guest would find zeros
where pages are yet to come; so it sleeps.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from ...transport.errors import AttachError, HostLacks
from . import userfaultfd
from .inject import NUMBERS, Injection

DEVICE = "/dev/userfaultfd"
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_USER_MODE_ONLY = 1
_IOCTL_NEW = 0xAA00  # USERFAULTFD_IOC_NEW, Linux 6.1


@dataclass(frozen=True, slots=True)
class Planted:
    """`uffd`: ours. `there`: the other process's descriptor of the same, -1 if it has none.
    `paused_seconds`: how long one thread of it stood still."""

    uffd: int
    there: int
    paused_seconds: float


def plant_tracking(pid: int) -> Planted:
    """A userfaultfd that tracks what process `pid` writes. Faults of the kernel are tracked too,
    also where it was permitted for those of user mode only: nobody has to be told of them.

    AttachError, or HostLacks: see inject.Injection and userfaultfd.create_tracking.
    """

    def create(target: Injection) -> int:
        try:
            return target.syscall(NUMBERS["userfaultfd"], _FLAGS)
        except PermissionError:
            return _create(target, _FLAGS | _USER_MODE_ONLY)

    return _plant(pid, create, userfaultfd.enable_tracking, keep=False)


def plant_protecting(pid: int, device: int = -1) -> Planted:
    """A userfaultfd that protects memory of process `pid` from writes, those of the kernel (system
    calls, KVM) included. If whoever holds ours dies, the kernel lets go of everything. `device`: as
    for `plant_missing`.

    AttachError, or HostLacks.
    """
    return _plant(
        pid, lambda target: _new(target, device), userfaultfd.enable_protecting, keep=False
    )


def plant_missing(pid: int, device: int = -1) -> Planted:
    """A userfaultfd that catches touches of missing pages in process `pid`, those of the kernel
    included: KVM's are. `device`: the other process's descriptor of DEVICE, which permits it
    where its user may not. Its own descriptor stays open: `uproot` closes it.

    AttachError, or HostLacks.
    """

    return _plant(pid, lambda target: _new(target, device), userfaultfd.enable_missing, keep=True)


def _new(target: Injection, device: int) -> int:
    if device >= 0:
        return target.syscall(NUMBERS["ioctl"], device, _IOCTL_NEW, _FLAGS)
    return _create(target, _FLAGS)


def _plant(
    pid: int, create: Callable[[Injection], int], enable: userfaultfd.Enable, *, keep: bool
) -> Planted:
    there = uffd = -1
    try:
        with Injection(pid) as target:
            there = create(target)
            uffd = target.take(there)
            if not keep:
                target.close_fd(there)
                there = -1
        enable(uffd)
    except BaseException:
        if uffd >= 0:
            os.close(uffd)
        if there >= 0:
            with contextlib.suppress(AttachError, HostLacks, OSError):
                uproot(pid, there)
        raise
    return Planted(uffd, there, target.paused_seconds)


def _create(target: Injection, flags: int) -> int:
    try:
        return target.syscall(NUMBERS["userfaultfd"], flags)
    except OSError as e:
        if e.errno == errno.ENOSYS:
            raise HostLacks("this kernel has no userfaultfd") from e
        raise HostLacks(
            f"process {target.pid} may not use userfaultfd ({e.strerror}): set "
            f"vm.unprivileged_userfaultfd=1"
        ) from e


def planted_in(pid: int) -> list[int]:
    """Descriptors of userfaultfds that process `pid` has."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == "anon_inode:[userfaultfd]":
                found.append(int(fd))
    return found


def uproot(pid: int, there: int) -> None:
    """Close the other process's descriptor. AttachError or OSError if that cannot be: it is then
    open until the process ends, and catches nothing any more."""
    with Injection(pid) as target:
        target.close_fd(there)
