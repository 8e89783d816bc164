"""The command of an exec: stream: a shell's child in a session of its own, with pipes to its stdin,
stdout and stderr.

A session of its own: Ctrl-C is for us to act on, and who ends it ends all that it has started. It
gets SIGKILL when the process that started it ends, however that ends; what it has started in its
turn sees the end of its pipes. Knows nothing of what goes through them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque

from ..transport.messages import printable
from .kernel.libc import die_with_parent

# For those that the command has left behind; then SIGTERM.
_ALONE_SECONDS = 1.0
# After SIGTERM; then SIGKILL.
_TERM_SECONDS = 1.0
# Lines of its stderr that an error shows, and characters of one.
_KEPT, _LINE = 6, 400
# Lines that are shown a second; and bytes without an end of line that count as one.
_LINES_A_SECOND, _MOST_LINE = 50, 4096
# What is read of its stderr for an error, at the most, in parts of 64 KiB: a pipe holds one.
_LAST_READS = 16
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


class Command:
    """One that runs. `reads` is its stdout, `writes` its stdin, `errors` its stderr: ours to close,
    but for the last."""

    def __init__(self, text: str, environment: dict[str, str], directory: str) -> None:
        parent = os.getpid()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0, cwd=directory, env=environment,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509  no thread is here yet
        )  # fmt: skip
        streams = (self._process.stdout, self._process.stdin, self._process.stderr)
        self.reads, self.writes, self.errors = (
            os.dup(stream.fileno()) for stream in streams if stream is not None
        )
        for stream in streams:
            if stream is not None:
                stream.close()
        os.set_blocking(self.errors, False)
        self._partial = b""
        self._last: deque[str] = deque(maxlen=_KEPT)
        self._window = (0, 0)  # a second, and how many lines were shown in it
        self._hidden = 0

    def __repr__(self) -> str:
        return f"<Command pid={self._process.pid}>"

    @property
    def status(self) -> int | None:
        """Its exit status, negative: a signal; None while it runs."""
        # not waited for: as long as it is not, nobody else can have its number
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def listen(self) -> tuple[list[str], bool]:
        """What it has written to stderr since: lines to be shown; and whether it may write more."""
        data = self._take()
        return self._shown(self._lines(data or b"", over=data == b"")), data != b""

    def _take(self) -> bytes | None:
        """None: nothing now; b"": nothing any more."""
        try:
            return os.read(self.errors, 65536)
        except BlockingIOError:
            return None

    def _lines(self, data: bytes, *, over: bool) -> list[str]:
        """Those that `data` ends."""
        *whole, self._partial = (self._partial + data).replace(b"\r", b"\n").split(b"\n")
        if over or len(self._partial) > _MOST_LINE:
            whole, self._partial = [*whole, self._partial], b""
        lines = [printable(line.decode(errors="replace"))[:_LINE].rstrip() for line in whole]
        lines = [line for line in lines if line]
        self._last.extend(lines)
        return lines

    def _shown(self, lines: list[str]) -> list[str]:
        """So many of `lines` as a person may read; of the others their number, a second later."""
        second = int(time.monotonic())
        if self._window[0] != second:
            self._window = (second, 0)
            if self._hidden:
                lines = [f"({self._hidden} lines are not shown)", *lines]
                self._hidden = 0
        room = max(0, _LINES_A_SECOND - self._window[1])
        self._window = (second, self._window[1] + len(lines))
        self._hidden += max(0, len(lines) - room)
        return lines[:room]

    def last_words(self) -> str:
        """The last of its stderr, for an error."""
        for _ in range(_LAST_READS):
            if not (data := self._take()):
                break
            self._lines(data, over=False)
        if self._partial:
            self._lines(b"", over=True)
        return "; it said: " + " | ".join(self._last) if self._last else ""

    def end(self) -> None:
        """End it and all in its session, and wait for it. Idempotent."""
        if self._process.returncode is None:
            if self.status is not None:
                # a pageferry that was killed has helpers: they see that, tidy up and end
                self._gone_after(_ALONE_SECONDS)
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # what stands still hears of it then
            self._gone_after(_TERM_SECONDS)
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self.errors >= 0:
            os.close(self.errors)
        self.errors = -1

    def _gone_after(self, seconds: float) -> None:
        """Wait until all have ended, but no longer."""
        until = time.monotonic() + seconds
        while (self.status is None or self._others()) and time.monotonic() < until:
            time.sleep(0.01)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _others(self) -> bool:
        """Whether something that it has started is there still."""
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(ProcessLookupError):
                if int(name) != self._process.pid and os.getpgid(int(name)) == self._process.pid:
                    return True
        return False


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status == _NOT_FOUND:
        return "ended with status 127: there is no such command"
    if status == _NOT_EXECUTABLE:
        return "ended with status 126: it cannot be executed"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
