"""A command of the operator's that makes this host ready for a guest (--before-switchover).

Run without a shell, in a session of its own, which ends when we do, however that is
(workers/tended.py); what the peer said of itself is in its environment and
nowhere else. Its success is the destination's acknowledgement (switchover-ack), its failure ends
the migration with the last that it wrote to stderr. Knows nothing of how memory arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import IO

from ..transport.errors import DestinationError, UsageError
from ..transport.messages import Hello, printable
from ..workers import tended
from .blocking import to_its_end

# Makes this host ready for what Hello announced, or raises.
BeforeSwitchover = Callable[[Hello], Awaitable[None]]
# Bytes and lines of what a command said that are shown.
_SAID, _LINES = 2000, 5
# One that is to end is asked to first. What ends it is done soon after, or is ended itself.
_END_SECONDS, _ENDED_SECONDS = 1.0, 10.0


def command(text: str) -> BeforeSwitchover:
    """What runs `text`, split as a shell would; UsageError if that is no command."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise UsageError(f"--before-switchover has quotes that do not match: {e}") from e
    if not words or shutil.which(words[0]) is None:
        raise UsageError(
            f"--before-switchover: there is no command {words[0] if words else text!r}; it is run "
            f"without a shell (sh -c '…' is one)"
        )

    async def run(hello: Hello) -> None:
        about = {"UUID": hello.uuid, "KIND": hello.kind, "NAME": hello.name}
        await _run(words, {f"PAGEFERRY_{name}": value for name, value in about.items()})

    return run


async def _run(words: list[str], environment: dict[str, str]) -> None:
    """To its end; DestinationError if that is not 0. Cancelled, it is ended."""
    log = os.memfd_create("pageferry-hook", os.MFD_CLOEXEC)
    leash, end = os.pipe()
    held = open(end, "wb", buffering=0)  # noqa: SIM115 - closed below, or sooner
    try:
        starting = asyncio.ensure_future(asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", tended.__file__, str(_END_SECONDS), *words,
            stdin=leash, stdout=subprocess.DEVNULL, stderr=log,
            start_new_session=True, env=os.environ | environment,
        ))  # fmt: skip
        try:
            # asyncio would kill one whose start is cancelled, and not what that has started
            code = await (await asyncio.shield(starting)).wait()
        except OSError as e:
            raise DestinationError(f"cannot run {words[0]}: {e.strerror}") from e
        except asyncio.CancelledError:
            await to_its_end(_end(starting, held))
            raise
        if code:
            ended = f"ended with {code}" if code > 0 else f"was ended by signal {-code}"
            raise DestinationError(
                f"the destination does not become ready: {words[0]} {ended}: {_said(log)}"
            )
    finally:
        held.close()
        for fd in (log, leash):
            os.close(fd)


async def _end(starting: asyncio.Future[asyncio.subprocess.Process], held: IO[bytes]) -> None:
    """End it and what it has started: asked first, then by force (tended.py)."""
    try:
        process = await starting
    except OSError:
        return
    held.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _END_SECONDS + _ENDED_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _said(log: int) -> str:
    """The last lines that it wrote to stderr."""
    size = os.fstat(log).st_size
    text = os.pread(log, _SAID, max(0, size - _SAID)).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable("; ".join(lines[-_LINES:])) or "it said nothing"
