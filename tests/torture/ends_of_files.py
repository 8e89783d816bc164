"""Ends of the matrix that save a guest to a file, or restore one from it (see ends.py)."""

from __future__ import annotations

import asyncio

from telling import HELD_SECONDS, End

from pageferry.pipeline import api, snapshot
from pageferry.pipeline.parameters import Parameters
from pageferry.tools.cli.running import Interrupts
from pageferry.transport.errors import Cancelled
from pageferry.transport.snapshot_format import CHUNK_PAGES
from pageferry.workers import jobs
from pageferry.workers.guests import parse_guest

_EXTENT_PAGES = 4 * CHUNK_PAGES


class _Cancellable(End):
    """As the command line has it."""

    async def run(self):
        self.interrupts = Interrupts()
        await self.stay(await self.until_over(self._unless_cancelled))

    async def _unless_cancelled(self):
        try:
            with self.interrupts.installed():
                return await self.move()
        except asyncio.CancelledError:
            raise Cancelled("interrupted") from None

    def act(self, what, **data):
        match what:
            case "cancel":
                self.interrupts()
            case "set":
                self.set(data["arguments"])

    def set(self, arguments):
        """Nothing is paced here."""


class SavingEnd(_Cancellable):
    """`pageferry snapshot`. With `hold` it goes no further when half of the memory is saved."""

    async def move(self):
        if self.spec.get("hold"):
            api.Snapshot = self.held()
        guest, into = parse_guest(self.spec["guest"]), parse_guest(self.spec["into"])
        how = {"workers": self.spec["workers"], "live": self.spec["live"]}
        try:
            return await api.snapshot(guest, into, on_started=self.started, **how)
        finally:
            api.Snapshot = snapshot.Snapshot

    def started(self, taking):
        self.interrupts.attach(taking)

    def held(self):
        """A snapshot that is held."""
        snapshot._EXTENT_PAGES = _EXTENT_PAGES

        class Held(snapshot.Snapshot):
            async def _instant(taking):  # noqa: N805
                return await self.half_of(taking, await super()._instant())

            async def _stand_still(taking):  # noqa: N805
                return await self.half_of(taking, await super()._stand_still())

            def _extents(taking):  # noqa: N805
                return iter(taking.rest)

        return Held

    async def half_of(self, taking, state):
        extents = list(snapshot.Snapshot._extents(taking))
        half, taking.rest = extents[: len(extents) // 2], extents[len(extents) // 2 :]
        await taking._crew.distribute(iter(half), jobs.ExtentDone, lambda reply: None)
        self.wire.say("held")
        await asyncio.to_thread(self.gate.open.wait, HELD_SECONDS)
        return state


class RestoringEnd(_Cancellable):
    """`pageferry restore --into`."""

    async def move(self):
        source, into = parse_guest(self.spec["guest"]), parse_guest(self.spec["into"])
        parameters = Parameters(**self.spec["parameters"])
        return await api.restore_into(source, into, parameters, on_started=self.started)

    def started(self, migration):
        self.moving = migration
        self.interrupts.attach(migration)
        migration.on_event = self.event
        self.telling = asyncio.ensure_future(self.say_when_pages_move(migration))

    async def say_when_pages_move(self, migration):
        while not migration.statistics.pages_done:
            await asyncio.sleep(0.02)
        self.wire.say("moving", round=migration.statistics.rounds)

    def set(self, arguments):
        self.moving.set_parameters(arguments)


ENDS = {"saving": SavingEnd, "restoring": RestoringEnd}
