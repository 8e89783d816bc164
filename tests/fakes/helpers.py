"""What several test files need: content, the command line as a process, waiting without sleep."""

import asyncio
import contextlib
import json
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pageferry.workers import leftovers

PAGE = 4096
GIVE_UP = 60.0


def pattern(pages: int, seed: int = 1) -> bytes:
    """Pages of mixed content: zero, text-like, random, all of one byte."""
    draw = random.Random(seed)
    text = ("the quick brown fox jumps over the lazy dog %d " * 100).encode()
    out = bytearray()
    while len(out) < pages * PAGE:
        run = draw.randint(1, 40) * PAGE
        match draw.randrange(4):
            case 0:
                out += bytes(run)
            case 1:
                out += (text * (run // len(text) + 1))[:run]
            case 2:
                out += draw.randbytes(run)
            case 3:
                out += bytes([draw.randrange(1, 256)]) * run
    return bytes(out[: pages * PAGE])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pageferry", *arguments]


def pageferry(*arguments: str, timeout: float = GIVE_UP) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, check=False
    )


class Running:
    """A pageferry process that can be talked to line by line. `within`: what to put before its
    command, say `ip netns exec NAME`, which becomes it."""

    def __init__(self, *arguments: str, within: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*within, *command(*arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def line(self) -> str:
        """The next line of stdout."""
        ready, _, _ = select.select([self.process.stdout], [], [], GIVE_UP)
        assert ready, "it says nothing"
        return self.process.stdout.readline()

    def error_line(self, containing: str) -> str:
        """Read stderr until a line contains `containing`."""
        for line in self.process.stderr:
            if containing in line:
                return line
        raise AssertionError(f"{containing!r} was never said")

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=GIVE_UP)
        return self.process.returncode, out, err

    def kill(self) -> None:
        self.process.kill()
        self.finish()

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate()


@contextlib.contextmanager
def receiver(*arguments: str, listen: str = "tcp://127.0.0.1:0", within: tuple[str, ...] = ()):
    """`pageferry receive --json`, listening; yields it with `.endpoint`."""
    with Running("receive", "--listen", listen, "--json", *arguments, within=within) as running:
        running.endpoint = json.loads(running.line())["endpoint"]
        yield running


def ask(monitor: str, command: str, **arguments):
    """One QMP command to a monitor (unix:PATH); what it returns."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rw") as talk:
        sock.settimeout(GIVE_UP)
        sock.connect(monitor.removeprefix("unix:"))
        talk.readline()  # greeting
        for execute, given in (("qmp_capabilities", {}), (command, arguments)):
            talk.write(json.dumps({"execute": execute, "arguments": given}))
            talk.flush()
            answer = json.loads(talk.readline())
            while "event" in answer:
                answer = json.loads(talk.readline())
        return answer["return"]


def until(condition, what: str, limit: float = GIVE_UP) -> None:
    """Poll `condition`; there is no event to wait for in another process's state."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def same_file(a: Path | str, b: Path | str) -> bool:
    return Path(a).read_bytes() == Path(b).read_bytes()


def blocks_on_disk(path: Path | str) -> int:
    return os.stat(path).st_blocks * 512


def sweep(pid: int) -> None:
    """Remove what a pageferry has left that was killed with all its helpers."""

    def swept() -> bool:
        leftovers.sweep()
        names = (*os.listdir("/dev/shm"), *os.listdir(tempfile.gettempdir()))
        return not any(f"pageferry-{pid}-" in name for name in names)

    until(swept, f"what {pid} has left is removed")


async def until_async(condition, what: str, limit: float = GIVE_UP) -> None:
    """`until`, for a condition that changes in this event loop."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        await asyncio.sleep(0.002)
