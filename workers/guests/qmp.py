"""A QEMU's monitor, from any thread: the package qemu.qmp on an event loop of its own.

Commands block until they are answered. Knows nothing of migration or memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from ...transport.errors import SourceError
from .base import Patience

_CONNECT_SECONDS = 5.0
# A monitor answers when its main loop comes round; a VM that is being stopped flushes its disks.
_ANSWER_SECONDS = 60.0
T = TypeVar("T")


class Monitor:
    """Connected to the monitor at a UNIX socket. `pid` is the process behind it.

    Raises SourceError if nobody is there, if it is taken (a monitor has one client at a time), or,
    later, if QEMU has gone.
    """

    def __init__(self, path: str, patience: Patience | None = None) -> None:
        self.path = path
        self.patience = patience if patience is not None else Patience()
        # its own log lines say what our errors say
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        sock = _connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid: int = struct.unpack("3i", credentials)[0]
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as e:
            sock.close()
            raise SourceError(
                f"the process behind {path} cannot be seen from here: run pageferry where QEMU "
                f"runs (same pid namespace)"
            ) from e
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = QMPClient("pageferry")
        self._resumed = EventListener(names=["RESUME"])
        self._client.register_listener(self._resumed)
        try:
            self._call(self._client.connect(sock), _CONNECT_SECONDS)
        except (QMPError, TimeoutError, asyncio.CancelledError) as e:
            self.close()
            sock.close()
            raise SourceError(
                f"the monitor at {path} does not answer: another client has it (a monitor has one "
                f"at a time; give QEMU a second -qmp for pageferry), or it is no QMP socket"
            ) from e

    def __repr__(self) -> str:
        return f"<Monitor {self.path} pid={self.pid}>"

    def _call(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        async def within() -> T:
            return await asyncio.wait_for(coroutine, seconds)

        future = asyncio.run_coroutine_threadsafe(within(), self._loop)
        began = time.monotonic()
        while not wait([future], Patience.LOOK_SECONDS).done:
            if self.patience.over(began, seconds):
                future.cancel()
                raise TimeoutError
        return future.result()

    def __call__(self, command: str, within: float = _ANSWER_SECONDS, **arguments: Any) -> Any:
        """Execute a command, answered `within` seconds; `_` in names of arguments is written `-`.
        SourceError, with QEMU's own words and `refused` in its data if it refuses."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._ask(command, self._client.execute(command, named or None), within)

    def begin(self, command: str) -> Pending:
        """Execute a command that may take long; ask what is returned for its answer."""
        coroutine = self._client.execute(command)
        return Pending(self, command, asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _ask(self, command: str, coroutine: Coroutine[Any, Any, T], within: float) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise SourceError(f"the monitor at {self.path} is closed")
        with self._as_ours(command):
            return self._call(coroutine, within)

    @contextlib.contextmanager
    def _as_ours(self, command: str) -> Iterator[None]:
        try:
            yield
        except ExecuteError as e:
            raise SourceError(f"QEMU refuses {command}: {e}", refused=True) from e
        except TimeoutError as e:
            raise SourceError(f"QEMU at {self.path} does not answer {command}") from e
        except (QMPError, EOFError, OSError) as e:
            raise SourceError(f"QEMU at {self.path} is gone") from e

    def give(self, name: str, fd: int) -> None:
        """QEMU gets a duplicate of `fd`, known to it as `name` (getfd)."""

        async def send() -> None:
            self._client.send_fd_scm(fd)

        self._ask("a descriptor", send(), _ANSWER_SECONDS)
        self("getfd", fdname=name)

    @contextlib.contextmanager
    def lent(self, fd: int) -> Iterator[int]:
        """QEMU gets a duplicate of `fd` for a while; its number there (add-fd)."""

        async def send() -> None:
            self._client.send_fd_scm(fd)

        self._ask("a descriptor", send(), _ANSWER_SECONDS)
        added = self("add-fd")
        try:
            yield int(added["fd"])
        finally:
            with contextlib.suppress(SourceError):
                self("remove-fd", fdset_id=added["fdset-id"])

    def take_resumes(self) -> int:
        """How often the VM was let go on since the last call (RESUME events)."""

        async def take() -> int:
            return len(self._resumed.clear())

        return self._call(take(), _ANSWER_SECONDS)

    def has_ended(self, seconds: float = 0) -> bool:
        """True if QEMU's process has ended, within `seconds` (pidfd_open(2))."""
        if self._pidfd < 0:
            return True  # closed: nobody's business any more
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def kill(self) -> None:
        """SIGKILL for QEMU."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Leave it to others. Idempotent; QEMU goes on."""
        if self._loop.is_closed():
            return
        for end in (self._client.disconnect(), _cancel_all()):
            with contextlib.suppress(Exception):
                self._call(end, _CONNECT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        os.close(self._pidfd)
        self._pidfd = -1


class Pending:
    """A command that was given and may not be answered yet."""

    def __init__(self, monitor: Monitor, command: str, future: Future[Any]) -> None:
        self._monitor = monitor
        self._command = command
        self._future = future

    def wait(self, seconds: float) -> bool:
        """Whether it is answered, within so long."""
        return bool(wait([self._future], seconds).done)

    def result(self) -> Any:
        """The answer; SourceError as when it is asked directly."""
        with self._monitor._as_ours(self._command):
            try:
                return self._future.result()
            except CancelledError as e:
                raise EOFError from e


def somebody_listens(path: str) -> bool:
    """Whether a connection is accepted at a UNIX socket; its file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError:
            return False
    return True


async def _cancel_all() -> None:
    """The client leaves tasks behind where QEMU died while it greeted it."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(_CONNECT_SECONDS)
        sock.connect(path)
    except OSError as e:
        sock.close()
        what = "there is no such socket" if not os.path.exists(path) else str(e.strerror or e)
        raise SourceError(
            f"cannot reach QEMU's monitor at {path}: {what} (start QEMU with -qmp "
            f"unix:{path},server=on,wait=off)"
        ) from e
    sock.setblocking(False)
    return sock
