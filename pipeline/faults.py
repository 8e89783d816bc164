"""The destination's part of a postcopy beside the receivers: the fault process and what it shares.

Arrival (arrival.py) says when; this knows what belongs to it: one process with its counters and
histogram, the map of what was received, and the pipe on which receivers tell it what came.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..transport.curve import Binds, Dials
from ..transport.errors import LocalProtocolError, PeerLost
from ..workers import fault, jobs
from ..workers.counters import Counters, FrozenCounters
from ..workers.guests.base import ArmedMemory
from ..workers.latency import Latency
from ..workers.latency import report as latency_report
from ..workers.pool import Pool, Worker
from ..workers.ram import RamBlock
from ..workers.received import Received, Waiting
from ..workers.receiver import ArmedGuest
from ..workers.segments import Segment
from ..workers.snapshot_file import CheckedBlock

if TYPE_CHECKING:
    from ..workers.tracing import Recorder

# A fault process that does not answer for this long is replaced.
RELINK_SECONDS = 5.0


class Faults:
    """What an arrival that may run before its memory is there has besides."""

    def __init__(
        self,
        blocks: list[RamBlock],
        memory: ArmedMemory,
        listen: str,
        on_failure: Callable[[Exception], None],
        *,
        direct: bool,
        removing: Any = None,
        recorder: Recorder | None = None,
        here: Sequence[CheckedBlock] = (),
    ) -> None:
        """`here`: blocks of the snapshot, if it is on this host: faults are served from it."""
        self._blocks = blocks
        self._memory = memory
        self._listen = listen
        self._on_failure = on_failure
        self._direct = direct
        self._removing = removing
        self._here = here
        self.counters = Counters(1, recorder)
        self.received = Received([block.pages for block in blocks])
        self._waiting = Waiting()
        self._latency = Latency()
        # not 0 while what the guest gave back is read and not yet marked
        self._reading = Segment(8, "reading")
        ends = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ends[1], False)
        self._arrivals = Connection(ends[0], writable=False)
        self._tell = Connection(ends[1], readable=False)
        self.pool: Pool | None = None
        self._answers: asyncio.Queue[jobs.AnyJob] = asyncio.Queue()

    def for_receivers(self) -> ArmedGuest:
        return ArmedGuest(self._memory, self.received, self._waiting, self._tell, self._removing)

    async def start(self, token: bytes, dial: str = "", curve: Binds | Dials | None = None) -> str:
        """Start the fault process; where it listens, unless it is to `dial`. Also after it died:
        nothing is forgotten that the guest does not ask for again. `curve`: only with keys."""
        job = fault.FaultJob(
            self._blocks, self._memory, self.received, self._waiting, self._arrivals,
            self._latency, self.counters, dial or self._listen, token,
            self._direct, bool(dial), self._removing,
            self._reading, curve, self._here,
        )  # fmt: skip
        self._answers = asyncio.Queue()
        self.pool = Pool("fault", self.counters, self._on_job, self._on_failure)
        await self.pool.start(fault.main, [job])
        return await self._ready(token)

    def _on_job(self, worker: Worker, job: jobs.AnyJob) -> None:
        if isinstance(job, jobs.Unlink):
            self._on_failure(PeerLost("the urgent channel broke"))
        else:
            self._answers.put_nowait(job)

    async def _ready(self, token: bytes) -> str:
        """Wait for the answer to the job with `token`; others are of jobs that nobody waits for any
        more."""
        while True:
            answer = await self._answers.get()
            if not isinstance(answer, jobs.Ready):
                raise LocalProtocolError(f"the fault process said {answer!r}")
            if answer.token == token:
                return answer.endpoint

    @property
    def killed(self) -> bool:
        return self.pool is not None and self.pool.killed

    @property
    def alive(self) -> bool:
        return self.pool is not None and self.pool.alive

    def renew_lock(self, lock: Any) -> None:
        """While there is no receiver and no fault process: whoever held the old one may be dead."""
        self._removing = lock

    def unlink(self) -> None:
        """The source is gone: go on with what can be done alone."""
        if self.alive and self.pool is not None:
            self.pool.say_all(jobs.Unlink())

    async def relink(self, token: bytes, dial: str = "", curve: Binds | Dials | None = None) -> str:
        """Listen (or dial) again, with a new process if the old one is gone."""
        if not self.alive:
            await self.stop()
            return await self.start(token, dial, curve)
        assert self.pool is not None
        self.pool.say_all(jobs.Relink(token, dial, curve))
        try:
            return await asyncio.wait_for(self._ready(token), RELINK_SECONDS)
        except TimeoutError:
            await self.stop()  # it does not move any more: another one takes its place
            return await self.start(token, dial, curve)

    async def hold(self, on: bool) -> None:
        """Leave who touches a missing page asleep while it is said which are missing; or serve
        them again."""
        assert self.pool is not None
        token = secrets.token_bytes(8)
        self.pool.say_all(jobs.Hold(token, on))
        await self._ready(token)

    async def finish(self) -> None:
        """All pages are here: catch nothing any more."""
        assert self.pool is not None
        token = secrets.token_bytes(8)
        self.pool.say_all(jobs.Finish(token))
        await self._ready(token)
        self._memory.armed = False

    def latency(self) -> list[int]:
        return self._latency.numbers()

    def statistics(self) -> dict[str, int]:
        """Numbers that only this end knows, by the names of query-migrate."""
        row = self.counters.read(0)
        answered = max(1, row["answered"])
        here = {"postcopy-served-here": row["served_here"]} if self._here else {}
        return here | {
            "postcopy-duplicates": row["repeated"],
            "postcopy-zero-faults": row["local_zero"],
            "postcopy-asked-again": row["asked_again"],
            "postcopy-fault-to-request-ns": row["ask_ns"] // max(1, row["requests"]),
            "postcopy-at-source-ns": row["held_ns"] // answered,
            "postcopy-answer-to-installed-ns": row["install_ns"] // answered,
        }

    def report(self) -> dict[str, Any]:
        return latency_report(self.latency()) | self.statistics()

    def check(self) -> None:
        """Raise WorkerDied if its process has been silent for too long."""
        if self.pool is not None:
            self.pool.check()

    async def stop(self) -> None:
        """End the process. Idempotent."""
        if self.pool is not None:
            await self.pool.close()

    def close(self) -> FrozenCounters:
        """Give the shared memory back; the last numbers."""
        frozen = self.counters.freeze()
        parts = (self.counters, self.received, self._waiting, self._latency, self._reading)
        for part in parts:
            part.close()
        self._arrivals.close()
        self._tell.close()
        return frozen
