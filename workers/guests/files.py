"""Files that become whole at once or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable

from ...transport.errors import DestinationError, NoSpace, PeerRefused, SourceError
from ..kernel.libc import lock_file

# Who looks whether somebody holds a lock (`pageferry clean`) holds it for a moment.
_LOOKS, _LOOK_SECONDS = 5, 0.05
# Copied at a time.
_STEP = 16 << 20


def open_to_read(path: str, what: str) -> tuple[int, int]:
    """Descriptor and size of a regular file, or SourceError that says what is wrong."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise SourceError(f"cannot open the {what} {path}: {e.strerror}") from e
    status = os.fstat(fd)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "it is no regular file"
    elif status.st_size == 0:
        problem = "it is empty"
    if problem:
        os.close(fd)
        raise SourceError(f"cannot read the {what} {path}: {problem}")
    return fd, status.st_size


class NewFile:
    """A file without a name until `publish`: a crash, even kill -9, leaves nothing.

    O_TMPFILE where the file system has it, else a hidden temporary name beside the target.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = os.path.realpath(path)
        self.fd = -1
        self._temporary = ""
        directory = os.path.dirname(self.path)
        if os.path.isdir(self.path):
            raise DestinationError(f"cannot write {path}: it is a directory; name a file in it")
        self._check_replaceable()
        try:
            self.fd = self._open(directory)
            os.ftruncate(self.fd, size)
        except OSError as e:
            self.discard()
            if e.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise NoSpace(f"no space for a file of {size} bytes at {path}") from e
            raise DestinationError(f"cannot create {path}: {e.strerror}") from e

    def _check_replaceable(self) -> None:
        """Only a regular file may be replaced: never a device, a pipe, a socket."""
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise DestinationError(f"cannot replace {self.path}: it is no regular file")

    def _open(self, directory: str) -> int:
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        self._temporary = self._hidden_name()
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        fd = os.open(self._temporary, flags, 0o600)
        with contextlib.suppress(OSError):  # nobody takes it for a leftover, however long it takes
            lock_file(fd)
        return fd

    def _hidden_name(self) -> str:
        # a name takes 255 bytes, a character up to four
        directory, name = os.path.split(self.path)
        return os.path.join(directory, f".{name[:50]}.{secrets.token_hex(4)}.pageferry")

    def publish(self) -> None:
        """Give it its name, in place of what had it. Its content must be synced already."""
        self._check_replaceable()
        directory = os.path.dirname(self.path)
        try:
            where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise DestinationError(f"cannot name {self.path}: {e.strerror}") from e
        try:
            if not self._temporary:
                self._temporary = self._hidden_name()
                # linkat() follows the link in /proc only when it is given a directory
                os.link(
                    f"/proc/self/fd/{self.fd}", self._temporary,
                    src_dir_fd=where, follow_symlinks=True,
                )  # fmt: skip
            os.rename(self._temporary, self.path)
            self._temporary = ""
            os.fsync(where)
        except OSError as e:
            raise DestinationError(f"cannot name {self.path}: {e.strerror}") from e
        finally:
            os.close(where)

    def discard(self) -> None:
        """Forget it; without effect on a published file. Idempotent."""
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = ""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class PartialFile(NewFile):
    """A file that has a hidden name of its own until `publish`, and keeps it if that never comes:
    whoever wants to write the same file again goes on with what is there.

    `begun`: it holds something, if only what the file of that name held. One at a time may have it.
    """

    begun = False

    def __init__(
        self, path: str, size: int, is_given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """`is_given_up`: nobody waits for it any more. DestinationError then."""
        self._is_given_up = is_given_up
        super().__init__(path, size)

    def _open(self, directory: str) -> int:
        hidden = os.path.join(directory, f".{os.path.basename(self.path)}.pageferry-part")
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        for look in range(_LOOKS):
            fd = os.open(hidden, flags, 0o600)
            if lock_file(fd) and _is_named(fd, hidden):
                break
            os.close(fd)
            if look == _LOOKS - 1:
                raise PeerRefused(f"{self.path} is being received already", field="busy")
            time.sleep(_LOOK_SECONDS)
        self._temporary = hidden
        self.begun = os.fstat(fd).st_blocks > 0
        if not self.begun:
            try:
                self._begin_with_what_is_there(fd)
            except BaseException:
                os.close(fd)  # and with it the lock
                raise
        return fd

    def _begin_with_what_is_there(self, fd: int) -> None:
        """Of an image that is there most may be the same."""
        try:
            old = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return
        try:
            for at, end in _data_ranges(old):
                done = at
                while n := os.copy_file_range(old, fd, min(end - done, _STEP), done, done):
                    done += n
                    if self._is_given_up():
                        raise DestinationError(f"copying {self.path} was given up")
            self.begun = True
        finally:
            os.close(old)

    def discard(self) -> None:
        self._temporary = ""  # it stays, for the next attempt
        super().discard()


def _is_named(fd: int, path: str) -> bool:
    """Whether this file still has that name: somebody may have published it before we locked it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _data_ranges(fd: int) -> list[tuple[int, int]]:
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            return [(0, size)]
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at))
    return found
