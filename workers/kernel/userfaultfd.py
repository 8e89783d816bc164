"""userfaultfd(2): create one, register a range for asynchronous write protection.

Numbers from <linux/userfaultfd.h>. WP_ASYNC (Linux 6.7) lets the kernel resolve
write-protect faults by itself and remember the write; PAGEMAP_SCAN then reads and re-arms
in one call (Documentation/admin-guide/mm/pagemap.rst). Nobody has to serve anything.
"""

from __future__ import annotations

import fcntl
import os
import platform
import struct

from ...transport.errors import HostLacks
from .libc import syscall

_SYSCALL = {"x86_64": 323, "aarch64": 282}
_API, _REGISTER = 0xC018AA3F, 0xC020AA00
_API_VERSION = 0xAA
_FEATURE_WP_HUGETLBFS_SHMEM, _FEATURE_WP_UNPOPULATED, _FEATURE_WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_MODE_WP = 2
_USER_MODE_ONLY = 1


def create() -> int:
    """A new userfaultfd of this process, restricted to user-mode faults if the host insists."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise HostLacks(f"userfaultfd is not wired up for {platform.machine()}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return syscall(number, flags)
    except PermissionError:
        pass
    except OSError as e:
        raise HostLacks(f"this kernel has no userfaultfd: {e.strerror}") from e
    try:
        return syscall(number, flags | _USER_MODE_ONLY)
    except OSError as e:
        raise HostLacks(
            "userfaultfd is forbidden here: set vm.unprivileged_userfaultfd=1 or grant "
            "CAP_SYS_PTRACE"
        ) from e


def create_tracking() -> int:
    """A userfaultfd that tracks writes by itself (WP_ASYNC); HostLacks before Linux 6.7."""
    uffd = create()
    features = _FEATURE_WP_HUGETLBFS_SHMEM | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_ASYNC
    try:
        fcntl.ioctl(uffd, _API, bytearray(struct.pack("QQQ", _API_VERSION, features, 0)))
    except OSError as e:
        os.close(uffd)
        raise HostLacks("this kernel cannot track writes (userfaultfd WP_ASYNC, Linux 6.7)") from e
    return uffd


def register_write_protect(uffd: int, start: int, length: int) -> None:
    """Register [start, start + length) of the owner's memory for write-protect tracking.

    SAFETY: the range must be mapped, and stay mapped while it is tracked; page-aligned.
    """
    fcntl.ioctl(uffd, _REGISTER, bytearray(struct.pack("QQQQ", start, length, _MODE_WP, 0)))
