"""The names that a process of ours gives to what outlives it if it is killed, and how others know
that it is dead.

    /dev/shm/pageferry-PID-TOKEN           the marker: empty, locked (flock(2)) while PID lives
    /dev/shm/pageferry-PID-TOKEN-R-WHAT    segments, and notes of whom it stopped; R is random, for
                                           TOKEN is there for others to see, and to take names of
    /dev/shm/sem.pageferry-PID-TOKEN-…     semaphores
    TMPDIR/pageferry-PID-TOKEN/            folders for sockets, each locked itself

A pid says nothing of who lives: it is used again, and another pid namespace may share /dev/shm. A
lock does: the kernel lets go of it when the last descriptor of it is closed, however its owner
ends, and it belongs to the file, so that containers, users and mounts see the same. What has a
lock of its own, or its marker, gets its name only when it is locked: the marker is made without a
name and linked (O_TMPFILE), a folder is renamed. So there is no moment in which a live owner's
name can be taken for a dead one's. The marker is there before the first name with its TOKEN and
goes after the last; TOKEN is random and of one process, so whoever finds a name and then no marker
knows that it is dead too.

A host that cannot lock or link gets names of another form, which nobody takes for leftovers. Knows
nothing of what is in the files; who looks for leftovers is leftovers.py.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker, util
from typing import Any

from .kernel.libc import lock_file

SHARED_MEMORY = "/dev/shm"
PREFIX = "pageferry-"
# Where the fork server finds the folder that it removes when its coordinator is gone.
FOLDER_VARIABLE = "PAGEFERRY_FOLDER"
_MOMENT_SECONDS = 0.001


class Marker:
    """That of this process: `stem` is what its names in shared memory begin with."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.stem = f"{PREFIX}{self.pid}-{secrets.token_hex(8)}"
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        self._fd = os.open(SHARED_MEMORY, flags, 0o600)
        try:
            if not lock_file(self._fd):
                raise OSError("nobody else can have locked it")
            # before it has its name: whoever is killed in between has left nothing
            resource_tracker.register(f"/{self.stem}", "shared_memory")
            _link(self._fd, SHARED_MEMORY, self.stem)
        except BaseException:
            os.close(self._fd)
            raise
        # the last of all that multiprocessing does at an end: its semaphores go before
        util.Finalize(None, self.close, exitpriority=-200)

    def close(self) -> None:
        """At the end of the process, when nothing else of it is left. Idempotent."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(f"{SHARED_MEMORY}/{self.stem}")
        with contextlib.suppress(Exception):  # the tracker may have ended
            resource_tracker.unregister(f"/{self.stem}", "shared_memory")
        os.close(self._fd)
        self._fd = -1


def _link(fd: int, directory: str, name: str) -> None:
    # linkat() follows the link in /proc only when it is given a directory
    where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", f"{directory}/{name}", src_dir_fd=where,
                follow_symlinks=True)  # fmt: skip
    finally:
        os.close(where)


class _Mine:
    """What this process has of it."""

    marker: Marker | None = None


def stem() -> str:
    """What names of this process in shared memory begin with. A process that was forked from one
    that had a marker gets its own."""
    if _Mine.marker is None or _Mine.marker.pid != os.getpid():
        try:
            _Mine.marker = Marker()
        except OSError:  # a form that nobody takes for a leftover's
            return f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}x"
    return _Mine.marker.stem


def shared_name(what: str) -> str:
    """A new name in /dev/shm."""
    return f"{stem()}-{secrets.token_hex(8)}-{what}"


def notes(what: str, pid: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Notes that end in `what` about process `pid`, which may be another number's, of whoever is
    alive or not: path, and what is in it. Anybody can write one: those are believed that are ours,
    root's, or of whose process it is, and no other's is as much as read (it may be a pipe)."""
    believed = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        believed.add(os.stat(f"/proc/{pid}").st_uid)
    for path in glob.glob(f"{SHARED_MEMORY}/{PREFIX}*-{what}"):
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode) or status.st_uid not in believed:
                    continue
                with open(fd, closefd=False) as file:  # which leaves a directory's to us
                    facts = json.loads(file.read())
            finally:
                os.close(fd)
            if isinstance(facts, dict):
                yield path, facts


class Folder:
    """A new folder for sockets, of this process' user alone. `fd` is locked: whoever holds it, or
    got it (a process that was started), keeps the folder from being taken for a leftover."""

    def __init__(self) -> None:
        where = tempfile.gettempdir()
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        self.path = os.path.join(where, name)
        hidden = os.path.join(where, f".{name}")
        os.mkdir(hidden, 0o700)
        self.fd = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then nobody has one
                while not lock_file(self.fd):  # somebody looks, for a moment
                    time.sleep(_MOMENT_SECONDS)
            os.rename(hidden, self.path)
        except BaseException:
            os.close(self.fd)
            os.rmdir(hidden)
            raise

    def close(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        if self.fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.fd)
            self.fd = -1
