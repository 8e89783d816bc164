"""A QEMU started for a VM that is to arrive, by a command of the operator's: it gets the memory
that the source announced, waits for the rest, and outlives us.

What is added to the command: `-incoming defer`, a monitor of ours, and for each memory that the
source has a `-object memory-backend-file` of its name, unless the command has one. That memory has
no name in any file system: it goes when QEMU goes. Knows how QEMU is started, not how a VM is
loaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import time

from ...transport.errors import DestinationError, PeerRefused, UsageError
from ...transport.messages import Block, Hello
from ..names import Folder
from .qemu import QemuDestination
from .qmp import somebody_listens
from .uri import GuestUri

_START_SECONDS = 30.0
_POLL_SECONDS = 0.005
# One that does not start closes its monitor this long before it has ended.
_END_SECONDS = 1.0
# QEMU's descriptors of its memory, far above its own.
_FIRST_FD = 500
_FOLDER_FD = _FIRST_FD - 1
# Commas and more would be further options.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_SAID = 2000
# Those that run on after their migration: whoever started them has to ask how they ended.
_started: set[int] = set()


class QemuProcess:
    """One QEMU, in a session of its own. `monitor`: where it answers."""

    def __init__(self, command: str, blocks: list[Block]) -> None:
        _reap()
        self._words = _words(command)
        self._check(blocks)
        self._folder = Folder()
        self.monitor = os.path.join(self._folder.path, "qmp")
        self._log = os.memfd_create("qemu-log")
        self._memory: list[int] = []
        self.pid = 0
        try:
            for block in blocks:
                self._memory.append(_memory(self._words, block))
            self._start(blocks)
            self._wait_until_it_listens()
        except BaseException:
            self.end()
            raise

    def __repr__(self) -> str:
        return f"<QemuProcess {self._words[0]} pid={self.pid}>"

    def _check(self, blocks: list[Block]) -> None:
        for block in blocks:
            if not _NAME.fullmatch(block.name):
                raise PeerRefused(f"memory named {block.name!r}", field="blocks")

    def _start(self, blocks: list[Block]) -> None:
        words = [*self._words, "-incoming", "defer"]
        words += ["-qmp", f"unix:{self.monitor},server=on,wait=off"]
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, self._log, 2),
            # its monitor is in there: nobody takes the folder for a leftover while it lives
            (os.POSIX_SPAWN_DUP2, self._folder.fd, _FOLDER_FD),
        ]
        for number, (block, fd) in enumerate(zip(blocks, self._memory, strict=True), _FIRST_FD):
            if fd >= 0:
                actions.append((os.POSIX_SPAWN_DUP2, fd, number))
                words += ["-object", _backend(block, number)]
        try:
            self.pid = os.posix_spawnp(
                words[0], words, os.environ, file_actions=actions, setsid=True,
                setsigmask=(), setsigdef=(signal.SIGINT, signal.SIGPIPE),
            )  # fmt: skip
        except OSError as e:
            raise DestinationError(f"cannot start {words[0]}: {e.strerror}") from e
        _started.add(self.pid)

    def _wait_until_it_listens(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while True:
            if somebody_listens(self.monitor):
                return
            self.check()
            if time.monotonic() > until:
                raise DestinationError(
                    f"QEMU does not open its monitor: is --qemu-command a QEMU? {self.said()}"
                )
            time.sleep(_POLL_SECONDS)

    def check(self, within: float = 0) -> None:
        """DestinationError, with its own words, if it has ended or does so `within` seconds."""
        until = time.monotonic() + within
        while not (ended := _has_ended(self.pid)) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        if ended:
            raise DestinationError(f"QEMU did not start: {self.said()}")

    def said(self) -> str:
        """The last of what it wrote to stderr."""
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, _SAID, max(0, size - _SAID)).decode(errors="replace")
        return "; ".join(text.split("\n")).strip("; ") or "it said nothing"

    def let_go(self) -> None:
        """It goes on alone. Idempotent, also after `end`."""
        for fd in [*self._memory, self._log]:
            if fd >= 0:
                os.close(fd)
        self._memory, self._log = [], -1
        self._folder.close()

    def end(self) -> None:
        """End it, by force: nobody needs it. Idempotent."""
        if self.pid:
            if not _has_ended(self.pid):
                os.kill(self.pid, signal.SIGKILL)
            _started.discard(self.pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0
        self.let_go()


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise UsageError(f"--qemu-command has quotes that do not match: {e}") from e
    if not words:
        raise UsageError("--qemu-command is empty: write qemu-system-x86_64 and its options")
    if "-incoming" in words:
        raise UsageError("--qemu-command: leave -incoming out, pageferry adds it")
    return words


def _memory(words: list[str], block: Block) -> int:
    """A descriptor of new memory for a block; -1 if the command has its own."""
    if any(f"id={block.name}" in word.split(",") for word in words):
        return -1
    fd = os.memfd_create(f"pageferry-{block.name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, block.size)
    except OSError as e:
        os.close(fd)
        raise DestinationError(f"no memory of {block.size} bytes: {e.strerror}") from e
    return fd


def _backend(block: Block, number: int) -> str:
    path = f"/proc/self/fd/{number}"
    return f"memory-backend-file,id={block.name},size={block.size},mem-path={path},share=on"


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _reap() -> None:
    """Those that have ended since."""
    for pid in list(_started):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _started.discard(pid)


class StartedQemu(QemuDestination):
    """A VM that arrives in a QEMU of its own."""

    def __init__(self, command: str) -> None:
        super().__init__(GuestUri("qemu", "(not started)"))
        self._command = command
        self._process: QemuProcess | None = None

    def lay_out(self, hello: Hello) -> None:
        if hello.kind == "qemu":
            self._process = QemuProcess(self._command, hello.blocks)
            self._path = self._process.monitor
        try:
            super().lay_out(hello)
        except DestinationError:
            if self._process is not None:
                self._process.check(_END_SECONDS)  # its monitor opens before its devices
            raise

    def run(self) -> str:
        super().run()
        assert self._process is not None
        return f"QEMU process {self._process.pid}"

    def discard(self) -> None:
        try:
            super().discard()
        finally:
            if self._process is not None:
                self._process.end()

    def close(self) -> None:
        super().close()
        if self._process is not None:
            self._process.let_go()
