"""A process that writes guest memory, slowed down: how, by whom, and what that did to it.

By a quota of processor time, in a cgroup made for this below the one that it is in
(kernel/cpu_quota.py), where one can be made; else by short stops (SIGSTOP, SIGCONT). A process of
ours does it (slower.py), so that it ends with us, however we end. Knows nothing of memory, nor why
it is slowed down.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec

from ...transport.errors import HostLacks, SourceError, WorkerDied
from ..forking import start_process
from ..kernel import cpu_quota
from ..kernel.tasks import cpu_seconds, is_stopped, threads_of
from ..names import stem
from ..slower import Answer, Order
from ..slower import main as slower_main
from ..throttled import Note, note_of, stopped_now_and_then
from ..usage import cpu_ns_of, own_memory

QUOTA, STOPS, ASKED = "cgroup", "signal", "guest"
MEANS = (QUOTA, STOPS)
_ANSWER_SECONDS = 2.0
_START_SECONDS = 10.0
# It answers at once, unless somebody has stopped it.
_STALL_SECONDS, _LOOK_SECONDS = 4.0, 0.5
_POLL_SECONDS = 0.0005
# How long it was stopped in all is good to know, and no more.
_SOON_SECONDS = 0.05
# A process that did next to nothing gets this much of a processor to take a share of.
_LEAST_CPUS = 0.05
_log = logging.getLogger("pageferry.workers")


class Meter:
    """What being slowed down did: what was done before and meanwhile, in processor seconds or
    pages. Times: CLOCK_MONOTONIC seconds."""

    def __init__(self, by: str, unit: str) -> None:
        self.by, self.unit = by, unit
        self._since = time.monotonic()
        self._work: float | None = None  # then
        self._percentage = 0
        self._free = [0.0, 0.0]  # seconds, work
        self._slowed = [0.0, 0.0]
        self._weighed = 0.0  # percentages, by how long
        self._most = 0
        self.stopped = 0.0

    def change(self, percentage: int, work: float) -> None:
        """So much from now on; `work` was done in all."""
        now = time.monotonic()
        if self._work is not None:
            kept = self._slowed if self._percentage else self._free
            if self._percentage or not self._most:  # what comes after does not count
                kept[0] += now - self._since
                kept[1] += work - self._work
            self._weighed += self._percentage * (now - self._since)
        self._since, self._work, self._percentage = now, work, percentage
        self._most = max(self._most, percentage)

    def free_rate(self, work: float) -> float:
        """What it does a second when nobody slows it down."""
        seconds, done = self._free
        if not self._most and self._work is not None:
            seconds += time.monotonic() - self._since
            done += work - self._work
        return done / max(seconds, 1e-3)

    def report(self) -> dict[str, Any]:
        """Nothing, if it never was. Times: milliseconds; `slow-down`: how much less it did, as a
        percentage."""
        if not self._most:
            return {}
        now = time.monotonic()
        under_way = (now - self._since) if self._percentage else 0.0
        seconds = self._slowed[0] + under_way
        weighed = self._weighed + self._percentage * under_way
        said: dict[str, Any] = {
            "by": self.by,
            "time": round(seconds * 1000),
            "mean-percentage": round(weighed / max(seconds, 1e-6), 1),
            "max-percentage": self._most,
        }
        if self.by == STOPS:
            said["stopped-time"] = round(self.stopped * 1000)
        if self._slowed[0] > 0 and self._free[0] > 0 and self._free[1] > 0:
            before = self._free[1] / self._free[0]
            meanwhile = self._slowed[1] / self._slowed[0]
            said["slow-down"] = round(max(0.0, 100 * (1 - meanwhile / before)), 1)
            said[f"{self.unit}-before"] = round(before, 3)
            said[f"{self.unit}-throttled"] = round(meanwhile, 3)
        return said


class Slowing:
    """That of process `pid`. `threads`: those that run the guest, where that is not all of it; they
    are asked for when they are needed. `how`: one of MEANS, or "" for the first that can be.

    From any thread. `release` before the process is stopped for good, which would be let go on
    otherwise; `lift` afterwards.
    """

    def __init__(
        self, pid: int, how: str = "", threads: Callable[[], list[int]] | None = None
    ) -> None:
        self._pid, self._how, self._find_threads = pid, how, threads
        self._threads: list[int] | None = None
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._note: Note | None = None
        self._asked: list[float] = []  # when, of what is not answered
        self._looked = 0.0
        self._ending: list[BaseProcess] = []  # told to, or seen to have lifted
        self._percentage = 0
        self._pids: dict[int, int] = {}  # who did it, and the processor time of each, ns
        self._memory = 0
        self.meter = Meter("", "processors")

    def __repr__(self) -> str:
        return f"<Slowing {self._pid} {self._percentage} %>"

    def processes(self) -> list[dict[str, Any]]:
        """What it costs to slow it down, as in `processes` of a report: one row for all that did
        it, one after the other. Nothing, if nobody did. Quick."""
        self._look_what_it_costs(self._process)
        if not self._pids:
            return []
        return [{
            "name": "throttle",
            "pid": list(self._pids)[-1],
            "cpu-time": sum(list(self._pids.values())) // 1_000_000,
            "peak-memory": self._memory,
        }]  # fmt: skip

    def _look_what_it_costs(self, process: BaseProcess | None) -> None:
        if process is None or process.pid is None:
            return
        with contextlib.suppress(OSError):  # it has ended: what it was at the last look
            self._memory = max(self._memory, own_memory(process.pid))
            spent = cpu_ns_of(process.pid)
            self._pids[process.pid] = max(spent, self._pids.get(process.pid, 0))

    @property
    def stops_all(self) -> bool:
        """All of the process stands still now and then, whatever else it has to do."""
        return self._note is not None and not self._note.groups

    def begin(self) -> None:
        """From now on what it does is measured."""
        if self._threads is None and self._find_threads is not None:
            self._threads = self._find_threads()
        with self._lock:
            self.meter.change(self._percentage, self._spent())

    def _spent(self) -> float:
        return cpu_seconds(self._pid, self._threads)

    def set(self, percentage: int) -> None:
        """It loses so much of its time; 0: nothing. HostLacks if that cannot be done here,
        WorkerDied if who does it has ended."""
        if not percentage:
            self.lift()
            return
        with self._lock:
            if percentage == self._percentage:
                return
            try:
                self._set(percentage)
            except OSError as e:
                self._end()
                why = e.strerror or str(e)
                raise HostLacks(f"process {self._pid} cannot be slowed down: {why}") from e
            except BaseException:
                self._end(kill=True)
                raise

    def _set(self, percentage: int) -> None:
        if self._process is None:
            self._start()
        spent = self._spent()
        usual = max(self.meter.free_rate(spent), _LEAST_CPUS)
        usual = min(usual, float(os.cpu_count() or 1))
        self._ask(Order(percentage, usual * (100 - percentage) / 100))
        self._hear(_STALL_SECONDS)
        self.meter.change(percentage, spent)
        self._percentage = percentage

    # ---- the process that does it --------------------------------------------------------

    def _start(self) -> None:
        """By the first means that works."""
        if is_stopped(self._pid):
            raise HostLacks(f"process {self._pid} stands still")
        error: OSError | None = None
        for means in (self._how,) if self._how else MEANS:
            try:
                self._start_one(means)
            except OSError as e:
                error = e
                _log.info("process %d is not slowed down by %s: %s", self._pid, means, e)
                self._end()
            else:
                self.meter.by = means
                return
        assert error is not None
        raise error

    def _start_one(self, means: str) -> None:
        groups: dict[cpu_quota.Group, list[int]] = {}
        if means == QUOTA:
            wanted = threads_of(self._pid) if self._threads is None else self._threads
            groups = cpu_quota.plan(self._pid, wanted, stem())
            if not groups:
                raise ProcessLookupError("it has ended")
        elif note := stopped_now_and_then(self._pid):
            raise OSError(f"somebody else does ({note})")
        self._note = note_of(self._pid, tuple(groups))
        self._note.write()
        ours, theirs = multiprocessing.Pipe()
        self._pipe = ours
        try:
            arguments = (theirs, self._note, groups, self._threads is None)
            self._process = start_process(slower_main, arguments, "pageferry-throttle")
        finally:
            theirs.close()
        self._asked.append(time.monotonic())
        self._hear(_START_SECONDS)

    def _ask(self, order: Order) -> None:
        assert self._pipe is not None
        self._asked.append(time.monotonic())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end says so
            self._pipe.send_bytes(msgspec.msgpack.encode(order))

    def _hear(self, seconds: float) -> None:
        """Until all is answered. OSError with what it cannot do; WorkerDied."""
        assert self._pipe is not None
        end = time.monotonic() + seconds
        while self._asked:
            # who does not answer what was asked before does not answer
            until = min(end, self._asked[0] + max(seconds, _STALL_SECONDS))
            if not self._pipe.poll(max(0.0, until - time.monotonic())):
                raise WorkerDied("the process that slows down the guest does not answer")
            self._take()

    def _take(self) -> None:
        assert self._pipe is not None
        try:
            answer = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=Answer)
        except (EOFError, OSError) as e:
            raise WorkerDied("the process that slows down the guest has ended") from e
        del self._asked[:1]
        self.meter.stopped = answer.stopped
        if answer.error:
            raise OSError(0, answer.error)

    def check(self) -> None:
        """Whoever slows it down lives and answers; else it has all of its time again, and
        WorkerDied. Quick: asked several times a second, in the event loop."""
        if self._process is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self._process is not None:
                self._look()
        except (WorkerDied, OSError) as e:
            self._end(kill=True)
            raise WorkerDied(f"throttle: {e}", worker="throttle") from e
        finally:
            self._lock.release()

    def _look(self) -> None:
        assert self._pipe is not None
        while self._pipe.poll(0):  # also when it has closed it
            self._take()
        now = time.monotonic()
        if self._asked and now - self._asked[0] > _STALL_SECONDS:
            raise WorkerDied(f"it has not answered for {_STALL_SECONDS:.0f} s")
        if not self._asked and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._ask(Order(ping=True))

    # ---- the end of it -------------------------------------------------------------------

    def release(self) -> None:
        """It has all of its time, at once, and may be stopped. Idempotent. SourceError if that is
        not certain: a process that stands still for good might be let go on by somebody who finds
        the note."""
        with self._lock:
            if self._note is None:
                return
            self._measure()
            if self._note.groups:  # that is quickest, and stopping it does not contradict the note
                with contextlib.suppress(WorkerDied, OSError):
                    self._ask(Order(0))
                    self._hear(_ANSWER_SECONDS)
                    return
            self._end()

    def lift(self) -> None:
        """The same, and nothing is left of it. Idempotent."""
        with self._lock:
            self._measure()
            self._end()

    def _measure(self) -> None:
        if not self._percentage:
            return
        self.meter.change(0, self._spent())
        self._percentage = 0
        if self.stops_all and self._pipe is not None:
            with contextlib.suppress(WorkerDied, OSError):
                self._ask(Order(ping=True))
                self._hear(_SOON_SECONDS)

    def _end(self, *, kill: bool = False) -> None:
        """By the process that slows it down, which does so when its pipe closes; else by us."""
        process, self._process = self._process, None
        pipe, self._pipe = self._pipe, None
        note, self._note = self._note, None
        self._asked.clear()
        self._measure()  # if nobody has
        self._look_what_it_costs(process)
        if pipe is not None:
            pipe.close()
        if process is not None:
            self._ending.append(process)
            if kill:
                process.kill()
            elif note is not None:
                _wait_for_the_end_of(note, process)
            if note is not None and os.path.exists(note.path):
                process.kill()  # before us: it may be about to stop it once more
                process.join()
        if note is not None:
            self._make_sure(note)

    def _make_sure(self, note: Note) -> None:
        try:
            note.lift()
        except OSError as e:
            if not note.groups:
                raise SourceError(f"the throttle of process {note.pid} is not lifted: {e}") from e
            # it has its time again, and a sweep removes the rest
            _log.warning("a cgroup of process %d is left: %s", note.pid, e)

    def close(self) -> None:
        """Idempotent; of use no more."""
        try:
            self.lift()
        finally:
            ending, self._ending = self._ending, []
            for process in ending:
                process.join(_ANSWER_SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()


def _wait_for_the_end_of(note: Note, process: BaseProcess) -> None:
    """Its process removes it first, and then takes its time to end."""
    until = time.monotonic() + _ANSWER_SECONDS
    while os.path.exists(note.path) and time.monotonic() < until:
        if multiprocessing.connection.wait([process.sentinel], _POLL_SECONDS):
            return
