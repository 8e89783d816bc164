"""The process that slows another one down: by a quota of processor time, or by short stops.

It outlives its coordinator, to undo what it did: when the pipe to it closes it lifts all
(throttled.py) and ends. So nothing ends it along with its parent, and it is deaf to signals that
reach all of a terminal or service.

Stops are as QEMU's (softmmu/cpu-throttle.c): 10 ms of running, then so much standing still as makes
the percentage.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from .forking import let_the_server_end
from .kernel.cpu_quota import Group, enter_all
from .kernel.libc import set_process_name
from .kernel.tasks import began_at, cpu_seconds, threads_of
from .throttled import Note

RUN_SECONDS = 0.01


class Order(msgspec.Struct, frozen=True):
    """To it: so much from now on, 0 for nothing. `cpus`: what is left, for a quota. `ping`: nothing
    but whether it is there."""

    percentage: int = 0
    cpus: float = 0.0
    ping: bool = False


class Answer(msgspec.Struct, frozen=True):
    """To each order, and first of all when it is ready. `stopped`: seconds that the process was
    made to stand still so far."""

    stopped: float = 0.0
    error: str = ""


class _Means(Protocol):
    stopped: float

    def prepare(self) -> None: ...
    def obey(self, order: Order) -> None: ...
    def run(self, poll: select.poll, hear: Callable[[], None]) -> None:
        """Do it until `hear`, which obeys, raises."""


class _Quota:
    """By the groups of a note."""

    stopped = 0.0

    def __init__(self, note: Note, groups: dict[Group, list[int]], *, whole: bool) -> None:
        self._note, self._groups, self._whole = note, groups, whole
        # who has used more so far gets more
        spent = [cpu_seconds(note.pid, inside) + 1e-3 for inside in groups.values()]
        self._shares = [seconds / sum(spent) for seconds in spent]

    def prepare(self) -> None:
        for group in self._groups:
            group.make()
        pid, some = self._note.pid, [t for inside in self._groups.values() for t in inside]
        enter_all(self._groups, lambda: threads_of(pid) if self._whole else some)

    def obey(self, order: Order) -> None:
        for group, share in zip(self._groups, self._shares, strict=True):
            if order.percentage:
                group.limit(order.cpus * share)
            else:
                group.unlimited()

    def run(self, poll: select.poll, hear: Callable[[], None]) -> None:
        while True:
            hear()


class _Stops:
    """By SIGSTOP and SIGCONT."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._percentage = 0
        self._pidfd = -1
        self.stopped = 0.0

    def prepare(self) -> None:
        self._pidfd = os.pidfd_open(self._note.pid)
        if began_at(self._note.pid) != self._note.began:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, 0)  # whether we may

    def obey(self, order: Order) -> None:
        self._percentage = order.percentage

    def run(self, poll: select.poll, hear: Callable[[], None]) -> None:
        while True:
            if not self._percentage or poll.poll(RUN_SECONDS * 1000):
                hear()
            else:
                self._stand_still(poll, hear)

    def _stand_still(self, poll: select.poll, hear: Callable[[], None]) -> None:
        """For a while; or until it is another while."""
        began, percentage = time.monotonic(), self._percentage
        until = began + RUN_SECONDS * percentage / (100 - percentage)
        self._say(signal.SIGSTOP)
        try:
            while percentage == self._percentage and (left := until - time.monotonic()) > 0:
                if poll.poll(left * 1000):
                    hear()
        finally:
            self._say(signal.SIGCONT)
            self.stopped += time.monotonic() - began

    def _say(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(self._pidfd, number)


def main(pipe: Connection, note: Note, groups: dict[Group, list[int]], whole: bool) -> None:
    """The process. `groups`: of the note, and who is to be in each; `whole`: all threads of the
    process, also those that it makes meanwhile."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    let_the_server_end()
    set_process_name("pf-throttle")
    means: _Means = _Quota(note, groups, whole=whole) if groups else _Stops(note)
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLIN)
    try:
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            _serve(pipe, means, poll)
    finally:
        with contextlib.suppress(OSError):  # the note is there, and others look
            note.lift()


def _serve(pipe: Connection, means: _Means, poll: select.poll) -> None:
    """Until the coordinator closes the pipe, or something cannot be done."""

    def answer(error: str = "") -> None:
        pipe.send_bytes(msgspec.msgpack.encode(Answer(means.stopped, error)))

    def hear() -> None:
        order = msgspec.msgpack.decode(pipe.recv_bytes(), type=Order)
        if not order.ping:
            means.obey(order)
        answer()

    try:
        means.prepare()
        answer()
        means.run(poll, hear)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as e:
        answer(e.strerror or str(e))
