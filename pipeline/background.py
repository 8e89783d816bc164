"""The source's part of a postcopy beside the senders: the postcopy process and the pace.

Source (source.py) says when; this knows what belongs to it: one process with its counters, the
words that it and the coordinator share with the senders, and the pacer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..transport.curve import Binds, Dials
from ..transport.errors import LocalProtocolError
from ..transport.links import TOS_BULK
from ..transport.messages import DIRECT, POSTCOPY
from ..workers import jobs, postcopy, sender
from ..workers.bandwidth import Bandwidth
from ..workers.counters import Counters, FrozenCounters
from ..workers.page_table import PageTable
from ..workers.pool import Pool, Worker
from ..workers.preemption import Preemption
from ..workers.ram import RamBlock
from .crew import Crew, extents
from .pacing import Pacer, Sample
from .parameters import Parameters

if TYPE_CHECKING:
    from ..workers.tracing import Recorder

TICK_SECONDS = 0.05


class Background:
    """What a migration that may end by postcopy has besides. Made once, started once a
    connection."""

    def __init__(
        self,
        blocks: list[RamBlock],
        table: PageTable,
        parameters: Parameters,
        on_failure: Callable[[Exception], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._blocks = blocks
        self._table = table
        self._preempt = parameters.preempt
        self._direct = parameters.postcopy_link == "direct"
        self._on_failure = on_failure
        self.counters = Counters(1, recorder)
        self.pacer = Pacer(
            parameters.workers, parameters.postcopy_latency_target,
            parameters.max_postcopy_bandwidth,
        )  # fmt: skip
        pace = self.pacer.tick(Sample(time.monotonic()))
        self._preemption = Preemption(pace.piece_pages, pace.credit)
        self._route: tuple[Connection, Connection] | None = None
        if not self._preempt:
            ends = os.pipe2(os.O_CLOEXEC)
            self._route = Connection(ends[0], writable=False), Connection(ends[1], readable=False)
        self.pool: Pool | None = None
        self._answers: asyncio.Queue[jobs.AnyJob] = asyncio.Queue()

    @property
    def capabilities(self) -> list[str]:
        """For Hello."""
        return [POSTCOPY, DIRECT] if self._direct else [POSTCOPY]

    def equip(self, job: sender.SenderJob) -> None:
        """Give a sender what it needs for postcopy."""
        job.tos = TOS_BULK
        job.preemption = self._preemption
        job.route = self._route[0] if self._route is not None else None

    async def start(self) -> None:
        """Start the postcopy process."""
        route = self._route[1] if self._route is not None else None
        job = postcopy.PostcopyJob(
            self._blocks, self._table, self.counters, self._preemption, route, self._direct,
        )  # fmt: skip
        self._answers = asyncio.Queue()
        self.pool = Pool("postcopy", self.counters, self._on_job, self._on_failure)
        await self.pool.start(postcopy.main, [job])
        await self._ready()

    def _on_job(self, worker: Worker, job: jobs.AnyJob) -> None:
        self._answers.put_nowait(job)

    async def _ready(self) -> str:
        answer = await self._answers.get()
        if not isinstance(answer, jobs.Ready):
            raise LocalProtocolError(f"the postcopy process said {answer!r}")
        return answer.endpoint

    def dial(self, endpoint: str, token: bytes, curve: Dials | None = None) -> None:
        """Connect it to the destination's fault process."""
        assert self.pool is not None
        self.pool.say_all(jobs.Open(endpoint, token, curve))

    async def listen(self, endpoint: str, token: bytes, curve: Binds | None = None) -> str:
        """Let the destination's fault process connect; where."""
        assert self.pool is not None
        self.pool.say_all(jobs.Listen(endpoint, token, curve))
        return await self._ready()

    async def drained(self) -> None:
        """Wait until everything that it sent is placed."""
        assert self.pool is not None
        self.pool.say_all(jobs.Finish())
        await self._ready()

    async def send_all(
        self, crew: Crew, workers: int, entered: Callable[[], object] = lambda: None
    ) -> None:
        """Send all dirty pages, by senders and postcopy process together, to the last one.
        `entered`: called when all senders have said that they are in postcopy."""
        pages = self._table.remaining()
        await crew.all(jobs.Postcopy(), jobs.Ready)
        entered()
        todo: Iterator[jobs.AnyJob] = (
            jobs.Extent(s.block, s.first, s.count, live=False)
            for s in extents(self._table, self._blocks, workers, pages)
        )
        await crew.distribute(todo, jobs.ExtentDone, lambda reply: None)
        await self.drained()
        # what senders did not count as part of an extent is behind the barrier as well
        await crew.all(jobs.Barrier(0), jobs.BarrierDone)
        if left := self._table.remaining():
            raise LocalProtocolError(f"{left} pages belong to nobody at the end of a postcopy")

    async def keep_pace(self, counters: Counters, bandwidth: Bandwidth) -> None:
        """Tell senders how fast to go. Runs until cancelled."""
        while True:
            pace = self.pacer.tick(
                Sample(
                    time.monotonic(),
                    counters.total("wire_bytes"),
                    counters.total("paused_ns") / 1e9,
                    self.counters.total("requests"),
                    self.counters.total("on_wire"),
                    self.counters.total("on_wire_ns") / 1e9,
                    self.counters.total("shortest_ns") / 1e9,
                )
            )
            bandwidth.set_rate(pace.rate if self._preempt else self.pacer.limit)
            self._preemption.pace(pace.piece_pages, pace.credit)
            await asyncio.sleep(TICK_SECONDS)

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
        for part in (self.counters, self._preemption):
            part.close()
        for end in self._route or ():
            end.close()
        return frozen

    def describe(self) -> dict[str, Any]:
        """For query-migrate."""
        return {
            "postcopy-preempt": self._preempt,
            "postcopy-link": "direct" if self._direct else "zmq",
        }
