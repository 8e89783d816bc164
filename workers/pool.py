"""The worker processes of one coordinator: start, talk, watch, stop, and the cause of death.

Runs in the coordinator's event loop. How a process comes to be: forking.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ..transport.errors import WorkerDied
from . import jobs
from .counters import Counters
from .forking import cause_of_death, start_process
from .reserve import Hand, Reserve
from .usage import cpu_ns_of

# Silence of a worker for this long is a stall; workers beat every quarter of a second.
STALL_SECONDS = 4.0
# A worker told to stop has this long before it is killed.
STOP_SECONDS = 2.0
# Where the migration has failed: an error is to be there within two seconds.
HURRY_SECONDS = 0.5
# From its own start on: those before it may have taken long, where the host is busy.
START_SECONDS = 20.0
_log = logging.getLogger("pageferry.workers")


class Worker:
    """One worker process as the coordinator sees it. `hand`: where it has other jobs too."""

    def __init__(
        self,
        name: str,
        index: int,
        process: BaseProcess,
        pipe: Connection,
        counters: Counters,
        hand: Hand | None = None,
    ) -> None:
        self.name = name
        self._counters = counters
        self.index = index
        self.process = process
        self.pipe = pipe
        self.hand = hand
        self.began = time.monotonic()
        self.cause = ""
        self.free = False  # of its job: the process waits for another

    def __repr__(self) -> str:
        return f"<Worker {self.name} pid={self.process.pid}>"

    def numbers(self) -> dict[str, int]:
        """Its row of counters."""
        return self._counters.read(self.index)

    def silent(self, now: int) -> float:
        """The seconds within which it should have given a sign of life, and has not; else 0."""
        beat, limit = self.numbers()["heartbeat_ns"], STALL_SECONDS
        if beat == 0:
            beat, limit = int(self.began * 1e9), START_SECONDS
        return limit if now - beat > limit * 1e9 else 0.0

    def say(self, job: jobs.AnyJob) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(jobs.encode(job))  # its death is told by its sentinel

    def over(self, seconds: float) -> bool:
        """Wait until its process has ended, or is free; False if it takes longer."""
        until = time.monotonic() + seconds
        self.free = self.hand is not None and self.hand.done(seconds)
        if self.free:
            return True
        self.process.join(max(0.0, until - time.monotonic()))
        return not self.process.is_alive()


class Pool:
    """The workers of one role in one migration.

    `on_job(worker, job)` and `on_failure(error)` are called in the event loop. `reserve`: where
    the processes come from, and where those go that ended as they were told to.
    """

    def __init__(
        self,
        role: str,
        counters: Counters,
        on_job: Callable[[Worker, jobs.AnyJob], None],
        on_failure: Callable[[Exception], None],
        reserve: Reserve | None = None,
    ) -> None:
        self.role = role
        self.counters = counters
        self.workers: list[Worker] = []
        self._on_job = on_job
        self._on_failure = on_failure
        self._reserve = reserve
        self._closing = False
        self.hurried = False
        self.killed = False  # a worker did not end by itself, and may have held a lock
        # name, pid and last numbers of each worker, once closed
        self.costs: list[tuple[str, int | None, dict[str, int]]] = []
        self._starting: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.role} {self.workers}>"

    async def start(self, target: Callable[..., object], payloads: list[Any]) -> None:
        """Start one process a payload; each says Ready through `on_job`."""
        loop = asyncio.get_running_loop()
        for index, payload in enumerate(payloads):
            self.counters.row(index).set("heartbeat_ns", 0)  # of a process before this one
            # Not to be cancelled half-way: `close` waits for it and ends what it started.
            self._starting = loop.run_in_executor(None, self._start_one, target, index, payload)
            await asyncio.shield(self._starting)
            worker = self.workers[-1]
            loop.add_reader(worker.pipe.fileno(), self._readable, worker)
            loop.add_reader(worker.process.sentinel, self._ended, worker)

    def _start_one(self, target: Callable[..., object], index: int, payload: Any) -> None:
        ours, theirs = multiprocessing.Pipe()
        name = f"{self.role}-{index}"
        arguments = (theirs, index, payload)
        hand = None
        try:
            if self._reserve is not None:
                hand = self._reserve.hire(target, arguments)
                process = hand.process
            else:
                process = start_process(target, arguments, f"pageferry-{name}")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.workers.append(Worker(name, index, process, ours, self.counters, hand))
        self.counters.began(index, name, process.pid)
        _log.debug("%s started, process %s", name, process.pid)

    def _readable(self, worker: Worker) -> None:
        try:
            while worker.pipe.poll(0):
                job = jobs.decode(worker.pipe.recv_bytes(1 << 20))
                if isinstance(job, jobs.Failed):
                    worker.cause = job.message
                    self._fail(jobs.error_of(job))
                    return
                self._on_job(worker, job)
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(worker.pipe.fileno())

    def _ended(self, worker: Worker) -> None:
        asyncio.get_running_loop().remove_reader(worker.process.sentinel)
        worker.process.join()
        if worker.pipe.poll(0):  # its last words come first
            self._readable(worker)
        if not worker.cause:
            worker.cause = cause_of_death(worker.process.exitcode)
            self.killed = True
            self._fail(WorkerDied(f"{worker.name} {worker.cause}", worker=worker.name))

    def _fail(self, error: Exception) -> None:
        if not self._closing:
            self._on_failure(error)

    @property
    def alive(self) -> bool:
        """True if it was started, and no worker has ended."""
        return bool(self.workers) and all(
            not w.cause and w.process.is_alive() for w in self.workers
        )

    def cpu_seconds(self) -> float:
        """Processor time of its workers that are there, now."""
        return sum(cpu_ns_of(worker.process.pid or 0) for worker in self.workers) / 1e9

    def check(self) -> None:
        """Raise WorkerDied if a worker has been silent for too long."""
        now = time.monotonic_ns()
        for worker in self.workers:
            limit = worker.silent(now)
            if limit and worker.process.is_alive():
                raise WorkerDied(
                    f"{worker.name} (process {worker.process.pid}) has not answered for "
                    f"{limit:.0f} s",
                    worker=worker.name,
                )

    def rows(self) -> list[tuple[str, int | None, dict[str, int]]]:
        """Name, pid and numbers of each worker; once closed, the last ones."""
        if not self.workers:
            return self.costs
        return [(w.name, w.process.pid, w.numbers()) for w in self.workers]

    def say_all(self, job: jobs.AnyJob) -> None:
        for worker in self.workers:
            worker.say(job)

    @property
    def is_starting(self) -> bool:
        """True while one of its processes is being started."""
        return self._starting is not None and not self._starting.done()

    def hurry(self) -> None:
        """It is over in failure: workers that do not stop soon are killed."""
        self.hurried = True

    async def close(self) -> None:
        """Stop all workers, kill those that do not stop, reap or give back the others.
        Idempotent."""
        self._closing = True
        loop = asyncio.get_running_loop()
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        workers, self.workers = self.workers, []
        if not workers:
            return
        for worker in workers:
            if not worker.pipe.closed:
                loop.remove_reader(worker.pipe.fileno())
            loop.remove_reader(worker.process.sentinel)
            worker.say(jobs.Stop())
        until = time.monotonic() + (HURRY_SECONDS if self.hurried else STOP_SECONDS)
        self.costs = []
        for worker in workers:
            left = max(0.0, until - time.monotonic())
            # Who is still silent does not do as it is told. (A fault process in the middle of a
            # read takes the guest along: it is given the time.)
            if self.hurried and self.role != "fault" and worker.silent(time.monotonic_ns()):
                left = 0.0
            if not await loop.run_in_executor(None, worker.over, left):
                self.killed = True
                worker.process.kill()
                await loop.run_in_executor(None, worker.process.join)
            self.counters.ended(worker.process.pid)
            _log.debug("%s ended, process %s%s", worker.name, worker.process.pid,
                       f": {worker.cause}" if worker.cause else "")  # fmt: skip
            self.costs.append((worker.name, worker.process.pid, worker.numbers()))
            worker.pipe.close()
            if worker.hand is None:
                worker.process.close()
            elif worker.free and self._reserve is not None:
                await loop.run_in_executor(None, self._reserve.give_back, worker.hand)
            else:
                await loop.run_in_executor(None, worker.hand.end)
