"""Worker processes that outlive a migration: one does a job after the other.

A process of a reserve runs one job (a target and its arguments, as any worker's) to its end, lets
go of everything that came with it, says so and waits for the next. Only one that was told to stop,
ended cleanly and has nothing left is used again: it looks itself, after each job, at what it has
open, mapped and running. Any other ends, and whoever needs one starts one.

A job brings everything along: pipe, descriptors, segments, locks, secrets. Nothing of a job is
known to the next, so that what comes late for one has nobody to take it (ARCHITECTURE.md).

Not for processes that change what they are for good: those of a postcopy have a priority and a
userfaultfd.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..transport.errors import WorkerDied
from ..transport.links import let_go_of_sent
from .forking import cause_of_death, let_the_server_end, start_process
from .kernel.libc import die_with_parent, set_process_name, trim_heap
from .kernel.task_facts import stat_of
from .leash import DONE, TAKEN, Leash, Parcel, hears, new_leash, take_job
from .usage import count_from_here

# A process that is told to end has this long before it is killed.
_END_SECONDS = 2.0
# What a thread that has ended needs to be gone.
_LEAVING_SECONDS = 0.1
# One that waits takes a job in microseconds, a new one in milliseconds; not on a host that is busy.
_TAKE_SECONDS, _BEGIN_SECONDS = 2.0, 20.0
_NAME = "pf-idle"


class Hand:
    """One process of a reserve, as its coordinator sees it."""

    def __init__(self) -> None:
        self.exitcode: int | None = None  # once it has ended
        self.late = False  # it was given a job and said nothing, though it had not ended
        self._leash, theirs = new_leash()
        try:
            self.process: BaseProcess = start_process(_serve, (theirs,), "pageferry-worker")
        except BaseException:
            self._leash.close()
            raise
        finally:
            theirs.close()

    def __repr__(self) -> str:
        return f"<Hand pid={self.process.pid}>"

    def give(self, target: Callable[..., object], args: tuple[Any, ...], seconds: float) -> bool:
        """Let it run `target(*args)`; False if it does not take that in time (`late`) or has ended,
        and is of no use any more."""
        parcel = Parcel(target, args)
        until = time.monotonic() + seconds
        taken = False
        with contextlib.suppress(OSError):
            parcel.send(self._leash, until)
            taken = self._says(TAKEN, until)
        self.late = not taken and time.monotonic() >= until
        return taken

    def done(self, seconds: float) -> bool:
        """Wait until its job is over; False if it has died of it, or takes longer."""
        return self._says(DONE, time.monotonic() + seconds)

    def _says(self, word: bytes, until: float) -> bool:
        wait([self._leash, self.process.sentinel], max(0.0, until - time.monotonic()))
        return hears(self._leash, word)

    @property
    def stopped(self) -> bool:
        """Somebody has stopped it (SIGSTOP, a debugger): it does nothing until he lets it go on."""
        return stat_of(f"/proc/{self.process.pid}")[0] in "Tt"

    def release(self) -> None:
        """Nobody needs it any more: it ends by itself, if it can."""
        self._leash.close()

    def end(self, until: float | None = None) -> None:
        """Until it is gone: by itself, if it can before `until` (monotonic). Idempotent."""
        self.release()
        with contextlib.suppress(ValueError):  # closed already
            if not self.late and not self.stopped:
                until = time.monotonic() + _END_SECONDS if until is None else until
                self.process.join(max(0.0, until - time.monotonic()))
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.exitcode = self.process.exitcode
            self.process.close()


class Reserve:
    """Processes that wait for a job. May be used by several threads.

    Never more than were at work at the same time (one is started only when none waits), and at
    most `most` of them wait: whoever comes back when so many do is ended.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._idle: list[Hand] = []
        self._closed = False
        self.started = self.jobs = 0

    def __repr__(self) -> str:
        return f"<Reserve {len(self._idle)} idle, {self.started} started, {self.jobs} jobs>"

    def hire(self, target: Callable[..., object], args: tuple[Any, ...]) -> Hand:
        """A process that runs `target(*args)`: the one that came back last, or a new one. Blocks
        until it exists."""
        while (hand := self._take()) is not None:
            if self._gave(hand, target, args, _TAKE_SECONDS):
                return hand
        hand = Hand()
        with self._lock:
            self.started += 1
        if not self._gave(hand, target, args, _BEGIN_SECONDS):
            died = f"{cause_of_death(hand.exitcode)} before it began"
            late = f"did not begin within {_BEGIN_SECONDS:.0f} s"
            raise WorkerDied(f"a worker process {late if hand.late else died}")
        return hand

    def _gave(
        self, hand: Hand, target: Callable[..., object], args: tuple[Any, ...], seconds: float
    ) -> bool:
        """Whoever does not take a job gets none any more."""
        given = False
        try:
            given = hand.give(target, args, seconds)
        finally:
            if not given:
                hand.end()
        with self._lock:
            self.jobs += given
        return given

    def _take(self) -> Hand | None:
        """One that waits, and can take a job. Whoever is stopped is not waited for."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                hand = self._idle.pop()
            if not hand.stopped:
                return hand
            hand.end()

    def give_back(self, hand: Hand) -> None:
        """One whose job is `done`. Blocks if it is one too many."""
        with self._lock:
            if not self._closed and len(self._idle) < self._most:
                self._idle.append(hand)
                return
        hand.end()

    @property
    def idle(self) -> list[Hand]:
        with self._lock:
            return list(self._idle)

    def close(self) -> None:
        """End all that wait; who comes back is ended too. Blocks; idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for hand in idle:
            hand.release()
        until = time.monotonic() + _END_SECONDS
        for hand in idle:
            hand.end(until)


# ---- in the process --------------------------------------------------------------------------


def _serve(leash: Leash) -> None:
    """One job after the other, until nobody gives any more, or one left something behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator alone acts on it
    die_with_parent(os.getppid())
    let_the_server_end()
    gc.collect()
    gc.freeze()  # what is there now is no job's: a collection after one is quick
    set_process_name(_NAME)
    before = belongings()
    while True:
        try:
            target, args = take_job(leash)
            leash.sendall(TAKEN)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        clean = target(*args)
        count_from_here()
        set_process_name(_NAME)
        let_go_of_sent()
        del target, args
        gc.collect()
        if clean is not True or not _has_again(before):
            return
        trim_heap()  # most of what is free: it may wait for long, and other jobs need it
        try:
            leash.sendall(DONE)
        except (BrokenPipeError, ConnectionResetError):
            return


def _has_again(before: tuple[list[str], list[str], int]) -> bool:
    """Whether it has what it had, in a moment: a thread that was waited for stays a little longer
    (the kernel tells who waits before it is gone)."""
    until = time.monotonic() + _LEAVING_SECONDS
    while belongings() != before:
        if time.monotonic() > until:
            return False
        time.sleep(0.0005)
    return True


def belongings() -> tuple[list[str], list[str], int]:
    """What a job could leave behind in this process: what its descriptors are, which memory it
    shares with others (guest memory, segments and locks are mapped so, libraries are not), how
    many threads it has."""
    descriptors = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            descriptors.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    shared = [line[-1] for line in maps if line[1][3] == "s"]
    return sorted(descriptors), sorted(shared), len(os.listdir("/proc/self/task"))
