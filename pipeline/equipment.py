"""What a source works with: the memory that its processes share, and the senders and the postcopy
process themselves. Made once; the processes are started once a connection; given back at the end.

Knows what belongs together. Must not know when a page is sent, and what is said to the destination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..transport import messages
from ..transport.curve import Dials
from ..transport.errors import RemoteProtocolError, UsageError
from ..transport.links import TOKEN_BYTES, Endpoint
from ..workers import jobs, sender
from ..workers.bandwidth import Bandwidth
from ..workers.counters import Counters
from ..workers.forking import context
from ..workers.guests.base import TRACKING_HASH, SourceGuest
from ..workers.page_table import PageTable
from ..workers.pool import Pool
from ..workers.reserve import Reserve
from ..workers.segments import Segment
from .background import Background
from .crew import Crew
from .deltas import Deltas
from .goals import Seeker
from .journal import Journal
from .parameters import NEVER, Parameters
from .statistics import Statistics
from .steering import Steering


class Equipment:
    """One migration's. `sums`: senders take a sum of each frame's pages. `receiver_cpu`: processor
    seconds of the receivers, if that is known here. `failed`: told of a process that broke.

    `background` is there if it may end by postcopy, `hashes` if pages are looked at by content,
    `deltas` if what was sent before is kept, `steering` if there is a goal.
    """

    def __init__(
        self,
        guest: SourceGuest,
        parameters: Parameters,
        statistics: Statistics,
        journal: Journal,
        failed: Callable[[Exception], None],
        *,
        sums: bool,
        receiver_cpu: Callable[[], float | None],
        reserve: Reserve | None,
    ) -> None:
        """UsageError, HostLacks: it cannot be, and nothing is left of it."""
        p, pages = parameters, [block.pages for block in guest.blocks]
        self._guest, self._statistics, self._failed = guest, statistics, failed
        self._sums, self._reserve = sums, reserve
        self.background: Background | None = None
        self.hashes: Segment | None = None
        self.deltas: Deltas | None = None
        self._closed = False
        with contextlib.ExitStack() as made:
            self.table = PageTable(pages, context().Lock())
            made.callback(self.table.close)
            self.counters = statistics.counters = Counters(p.workers, journal.lane)
            made.callback(self._freeze_counters)
            self.bandwidth = Bandwidth(p.max_bandwidth)
            made.callback(self.bandwidth.close)
            if p.postcopy != NEVER:
                if not guest.can_stop:
                    raise UsageError(
                        "postcopy needs a guest that can be stopped: a demo: guest, or memory "
                        "whose writer is named (ram:PATH?pid=PID)"
                    )
                background = Background(guest.blocks, self.table, p, failed, journal.lane)
                made.callback(self._freeze_background, background)
                self.background, statistics.urgent = background, background.counters
            if guest.tracking == TRACKING_HASH or guest.last_look_by_content:
                self.hashes = Segment(8 * statistics.total_pages, "hashes")
                made.callback(self.hashes.close)
            if p.deltas and guest.live:  # what nobody writes is sent once
                self.deltas = Deltas(pages, p.xbzrle_cache_size)
                made.callback(self.deltas.close)
            self.steering = self._steered(p, receiver_cpu)
            self.crew = self._new_crew()
            self._made = made.pop_all()

    def __repr__(self) -> str:
        return f"<Equipment {self.table!r} {self.crew!r}>"

    def _steered(self, p: Parameters, receiver_cpu: Callable[[], float | None]) -> Steering | None:
        """Workers and codec are chosen while it runs, if there is a goal."""
        if not p.goal:
            return None
        only = None if p.page_codec == "auto" else (p.page_codec, p.level)
        seeker = Seeker(p.goal, p.workers, only)
        return Steering(seeker, self.counters, receiver_cpu, deltas=p.deltas)

    def _new_crew(self) -> Crew:
        # with a postcopy process beside them senders lower their priority for good
        reserve = self._reserve if self.background is None else None
        return Crew(self.counters, self._failed, reserve)

    # ---- the processes -------------------------------------------------------------------

    async def start(self, p: Parameters) -> None:
        """Start all processes, for a connection that begins."""
        job = sender.SenderJob(
            self._guest.blocks, self.table, self.counters, self.bandwidth, self.hashes,
            p.page_codec, p.level, p.batch_pages, sums=self._sums,
            cache=self.deltas.cache if self.deltas is not None else None,
        )  # fmt: skip
        if self.background is not None:
            self.background.equip(job)
            await self.background.start()
        self.crew = self._new_crew()
        await self.crew.start(job, p.workers)

    @property
    def capabilities(self) -> list[str]:
        """For Hello."""
        return [
            *([messages.XBZRLE] if self.deltas is not None else ()),
            *(self.background.capabilities if self.background is not None else ()),
        ]

    def check_offer(self, offered: messages.Welcome | messages.Resumed, workers: int) -> None:
        """RemoteProtocolError if these are not channels for what there is."""
        endpoints, tokens, urgent = offered.endpoints, offered.tokens, offered.urgent
        if not len(endpoints) == len(tokens) == workers or (urgent is None) != (
            self.background is None
        ):
            raise RemoteProtocolError("the channels do not match what was asked for")
        if any(len(token) != TOKEN_BYTES for token in [*tokens, *([urgent[1]] if urgent else [])]):
            raise RemoteProtocolError("a channel's token is of another length than it can be")

    def dial(
        self,
        offered: messages.Welcome | messages.Resumed,
        endpoint: Endpoint,
        curve: Dials | None,
    ) -> None:
        """Connect the processes, which are ready, to the channels offered at `endpoint`."""
        workers = self.crew.pool.workers
        for worker, where, token in zip(workers, offered.endpoints, offered.tokens, strict=True):
            worker.say(jobs.Open(str(endpoint.sibling(where)), token, curve))
        urgent = offered.urgent
        if self.background is not None and urgent is not None:
            self.background.dial(str(endpoint.sibling(urgent[0])), urgent[1], curve)

    def pools(self) -> tuple[Pool, Pool | None]:
        return self.crew.pool, self.background.pool if self.background is not None else None

    def hurry(self) -> None:
        """It is over in failure: nobody is waited for."""
        for pool in self.pools():
            if pool is not None:
                pool.hurry()

    async def stop(self) -> None:
        """End all processes. Idempotent."""
        await self.crew.pool.close()
        if self.background is not None:
            await self.background.stop()

    # ---- the memory ----------------------------------------------------------------------

    def remaining(self) -> int:
        """Pages that are still to be sent, or to be confirmed."""
        return self.table.remaining()

    def waited(self) -> float:
        """Seconds that senders waited for link, receivers or max-bandwidth, all together."""
        return (self.counters.total("wait_ns") + self.counters.total("paced_ns")) / 1e9

    def renew_locks(self) -> None:
        """A worker that was killed may have taken one along."""
        self.table.renew_lock(context().Lock())
        self.bandwidth.renew_lock(context().Lock())

    def resize_cache(self, size: int) -> None:
        """Of pages sent before, if they are kept. HostLacks, and nothing has changed, if there is
        no room."""
        if self.deltas is not None and not self._closed:
            self.deltas.resize(size)

    def set_rates(self, p: Parameters, *, in_postcopy: bool) -> None:
        """As `p` says from now on; in a postcopy the pacer says how fast senders go."""
        if self._closed:
            return
        if not in_postcopy:
            self.bandwidth.set_rate(p.max_bandwidth)
        if self.background is not None:
            self.background.pacer.limit = p.max_postcopy_bandwidth

    def report(self) -> dict[str, Any]:
        """For query-migrate."""
        steering = self.steering.report() if self.steering is not None else {}
        deltas = self.deltas.report(self._statistics.counters) if self.deltas is not None else {}
        return steering | deltas

    def close(self) -> None:
        """Keep the numbers, give the shared memory back. Idempotent."""
        self._closed = True
        self._made.close()

    def _freeze_counters(self) -> None:
        self._statistics.counters = self.counters.freeze()
        self.counters.close()

    def _freeze_background(self, background: Background) -> None:
        self._statistics.urgent = background.close()
