"""Shared-memory segments between one coordinator and its workers.

One owner creates and unlinks; the others attach. Names are unguessable and say whose they are
(names.py), mode 0600 (the stdlib's default). Workers share the owner's resource
tracker (multiprocessing starts them), so a segment goes even if the owner is killed; before
Python 3.13 an attach registers once more, which in one tracker changes nothing
(python/cpython issue 82300).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from ..transport.errors import HostLacks
from .kernel.libc import punch_hole
from .names import shared_name


def attach(name: str) -> SharedMemory:
    """Map a segment somebody else owns, without becoming responsible for it."""
    if sys.version_info >= (3, 13):
        return SharedMemory(name, track=False)
    return SharedMemory(name)


class Segment:
    """`size` bytes of shared memory. Pickles into workers as an attachment."""

    def __init__(self, size: int, what: str, *, reserve: bool = True) -> None:
        """`reserve`: take the memory now, so that a full /dev/shm is an error here and not
        SIGBUS at some store."""
        self.size = size
        self._owner = True
        name = shared_name(what)
        # before there is one: whoever is killed in between has left nothing
        resource_tracker.register(f"/{name}", "shared_memory")
        try:
            self._shm: SharedMemory | None = SharedMemory(name, create=True, size=size)
        except BaseException:
            resource_tracker.unregister(f"/{name}", "shared_memory")
            raise
        if reserve:
            self._reserve()

    def _reserve(self) -> None:
        try:
            self.take(0, self.size)
        except HostLacks:
            self.close()
            raise

    def take(self, offset: int, length: int) -> None:
        """Owner: take the memory of a part now; HostLacks, and nothing has changed, if there is
        none. Of a segment that was made without `reserve`."""
        if length <= 0:
            return
        try:
            with self._opened() as fd:
                os.posix_fallocate(fd, offset, length)
        except OSError as e:
            raise _no_room(length) from e

    def look_for_room(self, length: int) -> None:
        """HostLacks if so many bytes more could not be taken now."""
        with self._opened() as fd:
            info = os.fstatvfs(fd)
        if info.f_blocks and length > info.f_bavail * info.f_frsize:  # 0 blocks: no limit
            raise _no_room(length)

    def give_back(self, offset: int, length: int) -> None:
        """Owner: the memory of a part is not needed, and reads as zero."""
        if length > 0:
            with self._opened() as fd:
                punch_hole(fd, offset, length)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(f"/dev/shm/{self.name}", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attach_segment, (self.name, self.size))

    def __repr__(self) -> str:
        return f"<Segment {self.name if self._shm else 'closed'}>"

    @property
    def name(self) -> str:
        assert self._shm is not None
        return self._shm.name

    def array(self, dtype: Any, count: int, offset: int = 0) -> Any:
        """`count` numbers of `dtype` from byte `offset`, as a view."""
        assert self._shm is not None and self._shm.buf is not None
        return np.frombuffer(self._shm.buf, dtype, count, offset)

    def close(self) -> None:
        """Unmap; the owner also unlinks. Idempotent. Where somebody still has a view, the mapping
        goes with the last one."""
        if self._shm is None:
            return
        shm, self._shm = self._shm, None
        if self._owner:
            shm.unlink()
        try:
            shm.close()
        except BufferError:
            _leave_to_its_views(shm)


def _no_room(length: int) -> HostLacks:
    return HostLacks(f"/dev/shm has no room for {length} bytes: enlarge it")


def _leave_to_its_views(shm: Any) -> None:
    """Take from a segment what it would try to close once more, and complain, when it is collected:
    each view holds the mapping, and that unmaps itself."""
    fd, shm._fd = shm._fd, -1
    shm._buf = shm._mmap = None
    if fd >= 0:
        os.close(fd)


def _attach_segment(name: str, size: int) -> Segment:
    segment = Segment.__new__(Segment)
    segment.size = size
    segment._owner = False
    segment._shm = attach(name)
    return segment
