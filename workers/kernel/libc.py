"""Calls into the C library that Python's os module lacks. Thin, checked, nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import signal
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.syscall.restype = ctypes.c_long
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_NO_NEW_PRIVS = 38
_SCHED_SETATTR = 274 if platform.machine() == "aarch64" else 314
_FALLOC_PUNCH_HOLE = 0x02 | 0x01  # with KEEP_SIZE, as fallocate(2) demands
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
FUSE = 0x65735546
TMPFS = 0x01021994  # <linux/magic.h>; memfds are in one too
# mallopt takes an int; buffers of this size or more still go back to the kernel.
_KEEP_BELOW = 32 << 20


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return int(result)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make `length` bytes of a file from `offset` read as zero and cost nothing (fallocate(2))."""
    _check(_libc.fallocate(fd, _FALLOC_PUNCH_HOLE, offset, length), "fallocate")


def grow_pipe(fd: int, size: int) -> None:
    """Let a pipe hold `size` bytes, if that may be (F_SETPIPE_SZ). Others are left alone."""
    with contextlib.suppress(OSError):
        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < size:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)


def lock_file(fd: int) -> bool:
    """Lock a file as long as this descriptor, or one of the same (a child's), is open (flock(2));
    False if somebody else has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_system(fd: int) -> int:
    """Which kind of file system a file is in, by its magic number (<linux/magic.h>); O_PATH will
    do. OSError (fstatfs(2))."""
    # SAFETY: struct statfs has 120 bytes and begins with f_type, a long
    raw = ctypes.create_string_buffer(512)
    _check(_libc.fstatfs(fd, ctypes.addressof(raw)), "fstatfs")
    return int(ctypes.c_long.from_buffer(raw).value)


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the process `parent` ends, which started it (prctl(2))."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def forbid_new_privileges() -> None:
    """No program that this thread, or what it starts, executes gains anything by being setuid
    (prctl(2)). For good."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def set_process_name(name: str) -> None:
    """What ps and top show, 15 bytes at most (prctl(2))."""
    raw = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(_PR_SET_NAME, ctypes.addressof(raw), 0, 0, 0)


def keep_buffers() -> None:
    """Tell malloc to keep freed batch buffers instead of giving them back (mallopt(3)).

    libzmq allocates each received frame. glibc begins by mapping and unmapping one that
    large, so that the kernel zeroes fresh pages for each frame, and learns only by and by.
    """
    mallopt = getattr(_libc, "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BELOW)
        mallopt(_M_ARENA_MAX, 2)


def trim_heap() -> None:
    """Give the kernel what malloc keeps and nobody uses (malloc_trim(3))."""
    trim = getattr(_libc, "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def syscall(number: int, *args: int) -> int:
    """A raw system call with integer arguments; OSError if it fails (syscall(2))."""
    return _check(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args)), "syscall")


def set_nice_and_slice(thread: int, nice: int, slice_ns: int) -> None:
    """SCHED_OTHER with this nice value and time slice for one thread (sched_setattr(2)).

    The slice counts since Linux 6.12 (100 us to 100 ms); older kernels pass over it.
    """
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
    attributes = ctypes.create_string_buffer(
        struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0), 48
    )
    syscall(_SCHED_SETATTR, thread, ctypes.addressof(attributes), 0)


def ioctl_raw(fd: int, request: int, address: int) -> int:
    """ioctl(2) on a structure at `address`; 0 or the errno. fcntl.ioctl copies the structure and
    raises, which costs more than the call."""
    if _libc.ioctl(fd, request, address) == 0:
        return 0
    return ctypes.get_errno()


_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def store_byte(address: int, value: int) -> None:
    """One store to memory, without the interpreter's lock: a page fault holds up this thread
    alone (memset(3)).

    SAFETY: `address` must be mapped, writable and stay so.
    """
    _libc.memset(address, value, 1)
