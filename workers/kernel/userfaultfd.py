"""userfaultfd(2): create, register, and serve: track writes, or supply missing pages.

Numbers from <linux/userfaultfd.h>. Three uses:

* Write tracking. WP_ASYNC (Linux 6.7) lets the kernel resolve write-protect faults by itself and
  remember the write; PAGEMAP_SCAN then reads and re-arms in one call
  (Documentation/admin-guide/mm/pagemap.rst). Nobody has to serve anything.
* Missing pages (postcopy). Who touches a page that is not there sleeps until somebody installs it
  with UFFDIO_COPY. The kernel makes each install happen once: the second gets EEXIST. In QEMU,
  migration/postcopy-ram.c.
* Write protection (live snapshots). Who writes a page that is protected sleeps until it is let go
  (UFFDIO_WRITEPROTECT): somebody copies the page before that. If all descriptors are closed, the
  kernel lets go of everything and wakes everybody. In QEMU, ram_write_tracking_start.

A descriptor acts on the address space of the process that created it, whoever holds it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...transport.errors import DestinationError, GuestGone, HostLacks, SourceError
from .libc import ioctl_raw, syscall

SYSCALL = {"x86_64": 323, "aarch64": 282}
_API, _REGISTER, _UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_COPY, _ZEROPAGE, _WAKE = 0xC028AA03, 0xC020AA04, 0x8010AA02
_WRITEPROTECT = 0xC018AA06
_API_VERSION = 0xAA
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM = 1 << 4, 1 << 5
_FEATURE_WP_HUGETLBFS_SHMEM, _FEATURE_WP_UNPOPULATED, _FEATURE_WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_MODE_MISSING, _MODE_WP = 1, 2
_USER_MODE_ONLY = 1

# struct uffd_msg: event, then a union; 32 bytes
_MESSAGE = struct.Struct("<BxxxxxxxQQQ")
_EVENT_PAGEFAULT, _EVENT_REMOVE, _EVENT_UNMAP = 0x12, 0x15, 0x16
# Messages a read takes.
READ_MESSAGES = 64
Enable = Callable[[int], None]


def create(*, user_mode_only: bool = False) -> int:
    """A new userfaultfd of this process, restricted to user-mode faults if the host insists."""
    number = SYSCALL.get(platform.machine())
    if number is None:
        raise HostLacks(f"userfaultfd is not wired up for {platform.machine()}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if not user_mode_only:
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


def features(uffd: int, wanted: int) -> int:
    """Enable `wanted` features of a new descriptor; what the kernel has besides. OSError EINVAL
    if it lacks one; after that the descriptor is of no use."""
    argument = bytearray(struct.pack("QQQ", _API_VERSION, wanted, 0))
    fcntl.ioctl(uffd, _API, argument)
    return int(struct.unpack("QQQ", argument)[1])


def enable_tracking(uffd: int) -> None:
    """A new descriptor tracks writes by itself (WP_ASYNC); HostLacks before Linux 6.7."""
    try:
        features(uffd, _FEATURE_WP_HUGETLBFS_SHMEM | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_ASYNC)
    except OSError as e:
        raise HostLacks("this kernel cannot track writes (userfaultfd WP_ASYNC, Linux 6.7)") from e


def enable_missing(uffd: int, extra: int = 0) -> None:
    """A new descriptor catches missing pages of shared memory and hugetlbfs; HostLacks without."""
    try:
        features(uffd, FEATURE_MISSING_SHMEM | FEATURE_MISSING_HUGETLBFS | extra)
    except OSError as e:
        raise HostLacks(
            "this kernel cannot catch missing pages of shared memory (userfaultfd "
            "MISSING_SHMEM, Linux 4.11): postcopy is not possible here"
        ) from e


def enable_protecting(uffd: int) -> None:
    """A new descriptor protects shared memory from writes, and says when its owner gives some back
    by madvise; HostLacks before Linux 5.19."""
    try:
        features(uffd, _FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_EVENT_REMOVE)
    except OSError as e:
        raise HostLacks(
            "this kernel cannot protect shared memory from writes (userfaultfd "
            "WP_HUGETLBFS_SHMEM, Linux 5.19): take the snapshot without --live"
        ) from e


def create_protecting() -> int:
    """A userfaultfd of this process that protects memory from writes. HostLacks."""
    return _create(enable_protecting)


def create_tracking() -> int:
    """A userfaultfd of this process that tracks writes. HostLacks."""
    return _create(enable_tracking)


def create_missing(extra: int = 0) -> int:
    """A userfaultfd of this process for missing pages. HostLacks."""
    return _create(lambda uffd: enable_missing(uffd, extra))


def _create(enable: Enable) -> int:
    uffd = create()
    try:
        enable(uffd)
    except BaseException:
        os.close(uffd)
        raise
    return uffd


def register_write_protect(uffd: int, start: int, length: int) -> None:
    """Register [start, start + length) of the owner's memory for write-protect tracking.

    SAFETY: the range must be mapped, and stay mapped while it is tracked; page-aligned.
    """
    fcntl.ioctl(uffd, _REGISTER, bytearray(struct.pack("QQQQ", start, length, _MODE_WP, 0)))


def register_missing(uffd: int, start: int, length: int) -> None:
    """From now on who touches a page of [start, start + length) that is not there sleeps.

    SAFETY: as above. Somebody must serve the descriptor, or touching threads sleep for ever.
    """
    fcntl.ioctl(uffd, _REGISTER, bytearray(struct.pack("QQQQ", start, length, _MODE_MISSING, 0)))


def write_protect(uffd: int, start: int, length: int, *, on: bool) -> bool:
    """Who writes to the range sleeps from now on; or, with `on` False, does not any more, and who
    slept is woken. False if the owner's memory map is changing: read events, and again.

    GuestGone if it has ended; SourceError if it does not map all of the range any more.
    SAFETY: registered for write protection. With `on` somebody must serve the descriptor.
    """
    argument = bytearray(struct.pack("QQQ", start, length, int(on)))
    try:
        fcntl.ioctl(uffd, _WRITEPROTECT, argument)
    except OSError as e:
        if e.errno == errno.EAGAIN:
            return False
        if e.errno == errno.ESRCH:
            raise GuestGone("the guest has ended while its memory was being saved") from e
        raise SourceError(
            f"the guest's memory at {start:#x} is not mapped as it was ({e.strerror}): start again"
        ) from e
    return True


def unregister(uffd: int, start: int, length: int) -> None:
    """Nothing is caught any more; who sleeps on the range wakes."""
    fcntl.ioctl(uffd, _UNREGISTER, bytearray(struct.pack("QQ", start, length)))


def wake(uffd: int, start: int, length: int) -> None:
    """Wake who sleeps on the range: they touch again, and sleep again if the page is missing."""
    fcntl.ioctl(uffd, _WAKE, bytearray(struct.pack("QQ", start, length)))


@dataclass(frozen=True, slots=True)
class Fault:
    """Somebody sleeps on the page at `address`."""

    address: int


@dataclass(frozen=True, slots=True)
class Removed:
    """The owner gave [start, end) back (madvise MADV_DONTNEED, MADV_REMOVE) or unmapped it: it
    reads as zero from now on. The owner sleeps until this message was read."""

    start: int
    end: int


def read_messages(uffd: int) -> list[Fault | Removed]:
    """What waits at the descriptor; empty if nothing does. Fewer than READ_MESSAGES are all."""
    try:
        data = os.read(uffd, _MESSAGE.size * READ_MESSAGES)
    except BlockingIOError:
        return []
    found: list[Fault | Removed] = []
    for event, first, second, _ in _MESSAGE.iter_unpack(data):
        if event == _EVENT_PAGEFAULT:
            found.append(Fault(second))  # flags, address
        elif event in (_EVENT_REMOVE, _EVENT_UNMAP):
            found.append(Removed(first, second))
    return found


class MemoryChanging(Exception):
    """The owner's memory map is changing (a REMOVE waits to be read): read events, go on behind the
    `done` bytes that were installed."""

    def __init__(self, done: int) -> None:
        super().__init__(f"memory is changing, {done} bytes were installed")
        self.done = done


class Installer:
    """Installs pages in the address space behind one descriptor."""

    def __init__(self, uffd: int) -> None:
        self.uffd = uffd
        # struct uffdio_copy: dst, src, len, mode, copy; uffdio_zeropage: start, len, mode, zeroed
        self._copy = (ctypes.c_uint64 * 5)()
        self._copy_at = ctypes.addressof(self._copy)

    def copy(self, address: int, source: int, length: int, step: int) -> int:
        """Install `length` bytes from our address `source`; who sleeps on them wakes.

        Returns the bytes that were there already (EEXIST): these are left as they are, `step`
        (the host page) at a time. Raises MemoryChanging where the owner is changing its map.
        SAFETY: [source, source + length) must be ours and stay so; multiples of `step`.
        """
        return self._all(_COPY, address, source, length, step)

    def changing(self, address: int) -> bool:
        """True while somebody is changing the owner's memory map and waits for its event to be
        read. `address`: a page of a range that is no longer registered: nothing is installed.

        The kernel counts such a change up before it lets go of the map, and looks at the count
        before anything else: so once the range is unregistered and this says False, no event
        comes any more, and nobody waits for one to be read.
        """
        return self._once(_COPY, address, self._copy_at, 4096)[1] == errno.EAGAIN

    def zero(self, address: int, length: int, step: int) -> int:
        """Install zero pages. As `copy`; not for hugetlbfs."""
        return self._all(_ZEROPAGE, address, 0, length, step)

    def _all(self, request: int, address: int, source: int, length: int, step: int) -> int:
        there = done = 0
        while done < length:
            n, error = self._once(request, address + done, source + done, length - done)
            done += n
            if error == 0:
                continue
            if error == errno.EEXIST:
                # somebody else installed it; who came to sleep in between is woken here
                wake(self.uffd, address + done, step)
                there, done = there + step, done + step
            elif error == errno.EAGAIN:
                if n == 0:
                    raise MemoryChanging(done)
            elif error == errno.ESRCH:
                raise GuestGone("the guest has ended: its memory cannot be filled any more")
            else:
                raise DestinationError(
                    f"cannot install guest memory at {address + done:#x}: {os.strerror(error)}"
                )
        return there

    def _once(self, request: int, address: int, source: int, length: int) -> tuple[int, int]:
        """One ioctl: bytes installed, errno."""
        argument: Any = self._copy
        if request == _COPY:
            argument[0], argument[1], argument[2], argument[3], argument[4] = (
                address, source, length, 0, 0,
            )  # fmt: skip
            result_at = 4
        else:
            argument[0], argument[1], argument[2], argument[3] = address, length, 0, 0
            result_at = 3
        error = ioctl_raw(self.uffd, request, self._copy_at)
        if error == 0:
            return length, 0
        result = ctypes.c_int64(argument[result_at]).value
        return (result, error) if result > 0 else (0, error)
