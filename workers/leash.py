"""The socket pair between a coordinator and a process that it uses again: jobs one way, words the
other.

A job is a target and its arguments: a header, its descriptors (SCM_RIGHTS), its bytes. Whoever
sends one has a deadline for all of it: a process that is stopped reads nothing, and the pair holds
200 KiB.

Knows nothing of what a job is, and of processes no more than that they may be gone.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import struct
import time
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.context import set_spawning_popen
from typing import Any

Leash = socket.socket
TAKEN, DONE = b"took", b"done"
_HEADER = struct.Struct("<IQ")  # how many descriptors, how many bytes
_MOST_AT_ONCE = 253  # descriptors in one message: SCM_MAX_FD, <net/scm.h>

# Of the job that is being taken, in the order in which they came.
_given: list[int] = []


def new_leash() -> tuple[Leash, Leash]:
    """The coordinator's end and the process'."""
    return socket.socketpair()


class _Given:
    """A descriptor that travels beside a job."""

    def __init__(self, place: int) -> None:
        self.place = place

    def detach(self) -> int:
        return _given[self.place]


class Parcel:
    """A job as bytes and descriptors. Stands where multiprocessing has the process that it starts:
    what can be given to a new process (locks, descriptors) can be given to one that is there."""

    DupFd = _Given

    def __init__(self, target: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._descriptors: list[int] = []
        buffer = io.BytesIO()
        set_spawning_popen(self)  # type: ignore[arg-type]  # this thread's alone
        try:
            reduction.dump((target, args), buffer)
        finally:
            set_spawning_popen(None)
        self._data = buffer.getbuffer()

    def duplicate_for_child(self, fd: int) -> int:
        self._descriptors.append(fd)
        return len(self._descriptors) - 1

    def send(self, leash: Leash, until: float) -> None:
        """Send all of it before `until` (monotonic). TimeoutError if that was too short, OSError if
        nobody is there; then a part of it may be, and the leash is of no use any more."""

        def in_time() -> Leash:
            leash.settimeout(max(0.001, until - time.monotonic()))
            return leash

        fds = self._descriptors
        in_time().sendall(_HEADER.pack(len(fds), len(self._data)))
        for at in range(0, len(fds), _MOST_AT_ONCE):
            socket.send_fds(in_time(), [b"d"], fds[at : at + _MOST_AT_ONCE])
        in_time().sendall(self._data)


def take_job(leash: Leash) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """Wait for a job. EOFError if there is none any more, or not all of it."""
    count, size = _HEADER.unpack(_exactly(leash, _HEADER.size))
    while len(_given) < count:
        most = min(_MOST_AT_ONCE, count - len(_given))
        said, fds, _, _ = socket.recv_fds(leash, 1, most)
        _given.extend(fds)
        if not said:
            raise EOFError
        if len(fds) < most:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    try:
        target, args = pickle.loads(_exactly(leash, size))
    finally:
        _given.clear()
    return target, args


def _exactly(leash: Leash, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        got = leash.recv_into(rest)
        if not got:
            raise EOFError
        rest = rest[got:]
    return data


def hears(leash: Leash, word: bytes) -> bool:
    """Whether the process has said `word` (which is there at once or not at all)."""
    leash.settimeout(0.0)
    try:
        return leash.recv(len(word)) == word
    except OSError:
        return False
