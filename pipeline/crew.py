"""The senders of one source, as a crew: hand out work as they get free, gather their answers.

Knows jobs and workers; nothing of why something is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from ..transport.errors import LocalProtocolError
from ..transport.pages import PAGE_SIZE
from ..workers import jobs, sender
from ..workers.counters import Counters
from ..workers.page_table import GROUP, PageTable
from ..workers.pool import Pool, Worker
from ..workers.ram import RamBlock
from ..workers.reserve import Reserve
from .partition import Span, cut, extent_target
from .steering import Steering

# Extents a sender has at a time: one under way, one waiting, so that it never idles.
_AHEAD = 2


def extents(table: PageTable, blocks: list[RamBlock], workers: int, pages: int) -> Iterator[Span]:
    """The dirty pages of all blocks (`pages` in all), cut for `workers` senders."""
    target = extent_target(pages, workers)
    for i, block in enumerate(blocks):
        group = max(GROUP, block.spec.page_size // PAGE_SIZE)
        yield from cut(i, block.pages, group, table.group_counts(i, group), target)


class Crew:
    """All senders of a migration."""

    def __init__(
        self,
        counters: Counters,
        on_failure: Callable[[Exception], None],
        reserve: Reserve | None = None,
    ) -> None:
        self.pool = Pool("sender", counters, self._on_job, on_failure, reserve)
        self._replies: asyncio.Queue[tuple[Worker, jobs.AnyJob]] = asyncio.Queue()

    def __repr__(self) -> str:
        return f"<Crew {self.pool!r}>"

    def _on_job(self, worker: Worker, reply: jobs.AnyJob) -> None:
        self._replies.put_nowait((worker, reply))

    async def start(self, job: sender.SenderJob, workers: int) -> None:
        """Start the processes; `gather(Ready)` waits until they are up."""
        await self.pool.start(sender.main, [job] * workers)

    async def all(self, job: jobs.AnyJob, answer: type[jobs.AnyJob]) -> dict[int, Any]:
        """Tell all of them; their answers by worker."""
        self.pool.say_all(job)
        return await self.gather(answer)

    async def gather(self, answer: type[jobs.AnyJob]) -> dict[int, Any]:
        """One answer of each, by worker."""
        found: dict[int, Any] = {}
        for _ in self.pool.workers:
            worker, reply = await self._replies.get()
            if not isinstance(reply, answer) or worker.index in found:
                raise LocalProtocolError(f"{worker!r} answered {reply!r}")
            found[worker.index] = reply
        return found

    async def distribute(
        self,
        todo: Iterator[jobs.AnyJob],
        answer: type[jobs.AnyJob],
        on_answer: Callable[[Any], None],
        stop: asyncio.Event | None = None,
        steering: Steering | None = None,
    ) -> None:
        """Give jobs to the workers as they get free; return when all are answered. Once `stop` is
        set no more are given. `steering`: says who gets any."""
        has = {worker.index: 0 for worker in self.pool.workers}

        def give(worker: Worker) -> None:
            parked = steering is not None and not steering.may_work(worker.index)
            if parked or has[worker.index] >= _AHEAD or (stop is not None and stop.is_set()):
                return
            if (job := next(todo, None)) is not None:
                worker.say(job if steering is None else steering.give(worker.index, job))
                has[worker.index] += 1

        def give_all() -> None:
            for _ in range(_AHEAD):
                for worker in self.pool.workers:
                    give(worker)

        give_all()
        while any(has.values()):
            worker, reply = await self._replies.get()
            if not isinstance(reply, answer):
                raise LocalProtocolError(f"{worker!r} answered {reply!r}")
            on_answer(reply)
            has[worker.index] -= 1
            if steering is not None and steering.answered(worker.index):
                give_all()  # somebody may have been parked
            else:
                give(worker)
