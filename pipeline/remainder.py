"""What a postcopy sends after the guest: told as missing, sent in the background, ended; and, when
the connection was made anew, taken up from what the destination says it has.

Knows the page table and who sends. Must not know how a connection comes to be, and when which of
these is done (migration.py). The process that answers requests, and the pace: background.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np

from ..transport import messages
from ..transport.errors import RemoteProtocolError
from ..transport.pages import PAGE_SIZE, runs_of
from ..workers.guests.base import SourceGuest
from ..workers.latency import report as latency_report
from ..workers.page_table import CLEAN
from ..workers.received import unpack
from .background import Background
from .control import Ask
from .equipment import Equipment
from .initial import DISCARD_RUNS
from .journal import Journal
from .releasing import Releasing
from .statistics import Statistics
from .tasks import Tasks

_log = logging.getLogger("pageferry")


class Remainder:
    """One migration's. `releasing`: gives memory back that has arrived, if that is wanted."""

    def __init__(
        self,
        guest: SourceGuest,
        equipment: Equipment,
        background: Background,
        releasing: Releasing | None,
        statistics: Statistics,
        journal: Journal,
        tasks: Tasks,
        ask: Ask,
    ) -> None:
        self._guest, self._equipment, self._background = guest, equipment, background
        self.releasing = releasing
        self._statistics, self._journal = statistics, journal
        self._tasks, self._ask = tasks, ask

    def __repr__(self) -> str:
        return f"<Remainder {self._equipment!r}>"

    async def tell_missing(self) -> None:
        """The destination throws away what it has of all that is dirty."""
        table = self._equipment.table
        for i, block in enumerate(self._guest.blocks):
            host = block.spec.page_size // PAGE_SIZE
            if host > 1:
                table.whole_host_pages(i, host)
            starts, counts = runs_of(np.flatnonzero(table.view(i) != CLEAN))
            for at in range(0, len(starts), DISCARD_RUNS):
                part = slice(at, at + DISCARD_RUNS)
                await self._ask(messages.Missing(i, starts[part].tolist(), counts[part].tolist()))

    async def send(self, number: int) -> None:
        """All dirty pages, by senders and postcopy process together, as round `number`."""
        equipment = self._equipment
        self._statistics.postcopy = True
        self._statistics.extra |= self._background.describe()
        self._statistics.begin_round(number, equipment.remaining())
        self._journal.round_begins(number, self._statistics.round_pages)
        pace = self._background.keep_pace(equipment.counters, equipment.bandwidth)
        beside = [self._tasks.start(pace)]
        if self.releasing is not None:  # the guest runs there: it has been confirmed
            beside.append(self._tasks.start(self.releasing.keep_on()))
        await self._background.send_all(
            equipment.crew,
            equipment.counters.workers,
            lambda: self._tasks.start(self._drop_deltas()),
        )
        for task in beside:
            task.cancel()

    async def _drop_deltas(self) -> None:
        if self._equipment.deltas is None:
            return
        try:
            for _ in self._equipment.deltas.drop():
                await asyncio.sleep(0)
        except OSError as e:  # it goes at the end: no reason to pause
            _log.warning("memory of deltas is kept to the end of the postcopy: %s", e.strerror)

    async def end(self) -> None:
        """The destination has everything, and says what it was like."""
        self._guest.check_stopped()  # the last look: all has been read by now
        ended = await self._ask(messages.PostcopyEnd())
        assert isinstance(ended, messages.Ended)
        self.take_end(ended)

    def take_end(self, ended: messages.Ended) -> None:
        """Its last word."""
        self._statistics.finish_round()
        self._statistics.extra |= latency_report(ended.latency)
        # what only that end knows; it may not say anything else of this migration
        known = {k: v for k, v in ended.statistics.items() if k.startswith("postcopy-")}
        self._statistics.extra |= known

    def resume(self, received: list[bytes]) -> None:
        """The page table anew, from what the destination has: bits of each block, as in Resumed."""
        blocks, table = self._guest.blocks, self._equipment.table
        if len(received) != len(blocks):
            raise RemoteProtocolError("Resumed does not match what was asked for")
        for i, bits in enumerate(received):
            block = blocks[i]
            table.resume(i, unpack(bits, block.pages))
            if block.spec.page_size > PAGE_SIZE:
                table.whole_host_pages(i, block.spec.page_size // PAGE_SIZE)
        if self.releasing is not None:
            self.releasing.check()

    def close(self, *, arrived: bool) -> None:
        """It is over, or was never begun. `arrived`: the destination has all of it."""
        if self.releasing is not None:
            self.releasing.close(arrived=arrived)

    def report(self) -> dict[str, Any]:
        """For query-migrate."""
        return self.releasing.report() if self.releasing is not None else {}
