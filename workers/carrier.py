"""The process that carries a migration over one byte stream, and the command at its other end if
there is one.

Bulk goes through here, so that it does not go through the coordinator's event loop; of the memory
that it is this process knows nothing. It says Ready when the other end has answered (its name is
the endpoint), then what the command writes to stderr; Failed is that the stream broke, with all
that is known of why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

from ..transport.carrier import Carrier
from ..transport.errors import ConnectError, LocalProtocolError, PageferryError, PeerLost
from ..transport.streams import HEADER, LARGE_CHUNK, Mux
from . import jobs
from .command import Command, how_it_ended
from .counters import Counters
from .forking import let_the_server_end
from .kernel.libc import die_with_parent, grow_pipe
from .priority import CARRIER_PRIORITY, become_urgent, collect_seldom
from .process import Desk, run_worker

# A login over a slow network and the start of pageferry behind it; somebody may type a PIN.
GREETING_SECONDS = 30.0
# What the stream delivered before it ended is handed over, and a command says how it ended.
_LAST_SECONDS = 1.0
# After all was said: until connections here have ended, and what is left is sent; then for a
# command whose stdin has ended, which has a receiver to end. The same in a hurry.
_FLUSH_SECONDS, _COMMAND_SECONDS = 2.0, 10.0
_FLUSH_SOON, _COMMAND_SOON = 0.5, 2.0
FINISH_SECONDS = 3 * _FLUSH_SECONDS + _COMMAND_SECONDS
HURRY_SECONDS = 3 * _FLUSH_SOON + _COMMAND_SOON
HURRY = b"hurry"
_SILENT_SECONDS = 3.0
_LOOK_SECONDS = 0.1
# As much as a frame has: a pipe of 64 KiB is a change of processes for each.
PIPE = LARGE_CHUNK + HEADER.size


class Descriptors:
    """What a stream is read from and written to; travels into the process."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes

    def __repr__(self) -> str:
        return f"<Descriptors {self.reads} {self.writes}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attach, (DupFd(self.reads), DupFd(self.writes)))

    def close(self) -> None:
        """Idempotent."""
        for fd in (self.reads, self.writes):
            if fd >= 0:
                os.close(fd)
        self.reads = self.writes = -1


def _attach(reads: Any, writes: Any) -> Descriptors:
    return Descriptors(reads.detach(), writes.detach())


@dataclass(frozen=True)
class CarrierJob:
    """`command`, or `descriptors` of a stream that is there; `shown`: what it is called. `dials`:
    it listens at `path` for our workers; else it connects to what listens beside `path`."""

    counters: Counters
    shown: str
    command: str
    descriptors: Descriptors | None
    environment: dict[str, str]
    directory: str
    dials: bool
    path: str
    patience: float | None  # seconds until the other end must have answered


def main(pipe: Connection, index: int, job: CarrierJob) -> None:
    """The process."""
    die_with_parent(os.getppid())  # whatever comes of what is started now
    let_the_server_end()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what the command finds
    command, error = None, None
    try:
        if job.command:  # while this process has no threads
            command = Command(job.command, job.environment, job.directory)
    except OSError as e:
        error = ConnectError(f"cannot start {job.shown}: {e.strerror or e}")
    try:
        run_worker("pf-carrier", pipe, job.counters, index, lambda desk: _run(desk, job, command,
                                                                               error))  # fmt: skip
    finally:
        if command is not None:
            command.end()


def _run(
    desk: Desk, job: CarrierJob, command: Command | None, error: PageferryError | None
) -> None:
    if error is not None:
        raise error
    _Carrying(desk, job, command).run()


class _Carrying:
    """The process's one object."""

    def __init__(self, desk: Desk, job: CarrierJob, command: Command | None) -> None:
        self.desk, self.job, self.command = desk, job, command
        self.mux = Mux(dials=job.dials, name="" if job.dials else job.path)
        given = job.descriptors if command is None else command
        assert given is not None
        for fd in (given.reads, given.writes):
            grow_pipe(fd, PIPE)
        self.carrier = Carrier(self.mux, given.reads, given.writes, job.path)
        self.carrier.watch(desk.pipe.fileno(), self._commands)
        if command is not None:
            self.carrier.watch(command.errors, self._hear)
        self._raised = False
        self._finishing = self._hurry = self._stopped = self._told = False
        self._deadline = time.monotonic() + job.patience if job.patience is not None else None

    def run(self) -> None:
        try:
            while not self._finishing and not self._stopped:
                self.carrier.step(_LOOK_SECONDS)
                self._look()
            if not self._stopped:
                self._end()
            while not self._stopped:
                self._commands()
        finally:
            self.carrier.close()

    def _commands(self) -> None:
        match self.desk.take():
            case jobs.Names(suffixes):
                for suffix in suffixes:
                    self.carrier.listen(suffix)
                self.desk.say(jobs.Ready())
            case jobs.Finish(token):
                self._finishing = True
                self._hurry = token == HURRY
            case jobs.Stop():
                self._stopped = True
            case other:
                raise LocalProtocolError(f"a carrier was told {other!r}")

    def _hear(self) -> None:
        """The command's stderr."""
        assert self.command is not None
        lines, more = self.command.listen()
        for line in lines:
            self.desk.say(jobs.Said(line))
        if not more:
            self.carrier.unwatch(self.command.errors)

    def _look(self) -> None:
        """At what has become of the stream."""
        if self.mux.flow.urgent and not self._raised:
            self._raised = True
            become_urgent(CARRIER_PRIORITY)
            collect_seldom()
        if self.mux.greeted and not self._told:
            self._told = True
            if self.job.dials:
                self.carrier.listen("")
            self.desk.say(jobs.Ready(self.carrier.name))
        if self.carrier.eof or self.carrier.broken:
            self._broke()
        late = self._deadline is not None and time.monotonic() > self._deadline
        if late and not self.mux.greeted:
            raise ConnectError(
                f"nothing of pageferry came over {self.job.shown} within {self.job.patience:.0f} "
                f"s. {self._what_to_do()}{self._noise()}{self._last_words()}"
            )

    def _what_to_do(self) -> str:
        whom = "receive" if self.job.dials else "send"
        if not self.command:
            return f"A `pageferry {whom} -` must be at its other end, and answer"
        return (
            f"The command must run `pageferry {whom} … -` at the other host, its stdin and stdout "
            f"the stream (exec:ssh HOST pageferry {whom} … -), and start it without asking anything"
            + ("; into a file goes image:PATH, a snapshot file:PATH" if self.job.dials else "")
        )

    def _steps(self, seconds: float, enough: Any) -> None:
        """Go on until `enough()`, or so long."""
        until = time.monotonic() + seconds
        while not (enough() or self._stopped) and (left := until - time.monotonic()) > 0:
            self.carrier.step(min(left, 0.02))

    def _broke(self) -> None:
        """The stream is over, and nobody has told us to end it: why."""
        self.carrier.stop_listening()
        command = self.command

        def enough() -> bool:
            if self._finishing:
                return True
            ended = command is None or command.status is not None
            return ended and self.carrier.delivered and self.carrier.eof and not self.mux.left

        self._steps(_LAST_SECONDS, enough)
        if self.mux.left:  # as it is meant to end, if only sooner than here
            self._finishing = True
        if not self._finishing and not self._stopped:
            raise self._why()

    def _why(self) -> PageferryError:
        shown, words = self.job.shown, self._noise() + self._last_words()
        status = self.command.status if self.command is not None else None
        if not self.mux.greeted:
            if status is not None:
                return ConnectError(f"{shown} {how_it_ended(status)}, before a pageferry answered"
                                    f"{words}")  # fmt: skip
            if self.command is not None and self.carrier.eof:
                return ConnectError(
                    f"{shown} has closed its stdout: it goes one way, and both ends of a migration "
                    f"talk to each other. It must run `pageferry receive … -`; into a file goes "
                    f"image:PATH{words}"
                )
            return ConnectError(f"{shown} has ended before a pageferry answered{words}")
        if status is not None:
            return PeerLost(f"{shown} {how_it_ended(status)} in the middle{words}")
        why = f" ({self.carrier.broken})" if self.carrier.broken else ""
        return PeerLost(f"{shown} broke in the middle{why}{words}")

    def _noise(self) -> str:
        if self.mux.greeted or not self.mux.noise:
            return ""
        return f"; what came was no pageferry's: {self.mux.heard()}"

    def _last_words(self) -> str:
        return self.command.last_words() if self.command is not None else ""

    def _end(self) -> None:
        """All was said: hand over what there is, end the stream, see how the command ends."""
        carrier = self.carrier
        flush = _FLUSH_SOON if self._hurry else _FLUSH_SECONDS
        # in a hurry nobody waits for whoever is silent: both ends speak each second
        silent = self._hurry and time.monotonic() - carrier.heard > _SILENT_SECONDS
        if silent:
            flush = 0.0
        over = carrier.eof or carrier.broken
        carrier.stop_listening()
        if not over:
            with contextlib.suppress(PageferryError):  # whatever it says now
                self._steps(flush, lambda: carrier.idle or carrier.eof or carrier.broken)
                carrier.end()
                self._steps(flush, lambda: carrier.flushed or carrier.broken)
        carrier.shut()
        # the other end has something to say yet, and no use for a broken pipe
        with contextlib.suppress(PageferryError):
            self._steps(flush, lambda: carrier.eof or carrier.broken)
        status, command = None, self.command
        if command is not None and not silent:
            with contextlib.suppress(PageferryError):
                patience = _COMMAND_SOON if self._hurry else _COMMAND_SECONDS
                self._steps(patience, lambda: command.status is not None)
        if command is not None:
            status = command.status
        self.desk.say(jobs.StreamEnded(status, self._last_words() if status else ""))
