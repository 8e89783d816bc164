"""Carries out what throttling.py decides: tells it what is written and moved, and the guest how
much of its time it loses.

`stop` of a guest lifts it, and so does whoever ends a migration; if it cannot be done at all the
migration goes on without.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from ..transport.errors import HostLacks, SourceError, UsageError
from ..transport.pages import PAGE_SIZE
from ..workers.guests.base import SourceGuest
from .blocking import Blocking
from .journal import Journal
from .throttling import Rules, Throttling

_log = logging.getLogger("pageferry")


class Pressure:
    """That on one guest."""

    def __init__(self, guest: SourceGuest, rules: Rules, call: Blocking, journal: Journal) -> None:
        self._guest, self._call, self._journal = guest, call, journal
        self.throttling = Throttling(rules)
        self._now = 0  # what the guest was told
        self._standing = False  # or lifted for good
        self._told = False  # anything, ever: also by a call that nobody waited for
        self._eased = False
        self._because = ""

    def __repr__(self) -> str:
        return f"<Pressure {self._now} %>"

    def check(self) -> None:
        """Before anything moves: UsageError if there is nobody to slow down."""
        self.throttling.total_bytes = sum(block.size for block in self._guest.blocks)
        self._check(self.throttling.rules)

    def _check(self, rules: Rules) -> None:
        if rules.on and self._guest.live and not self._guest.can_throttle:
            raise UsageError(
                "auto-converge and dirty-limit need a guest that can be slowed down: a VM, a "
                "process, a demo: guest, or memory whose writer is named (ram:PATH?pid=PID)"
            )

    def configure(self, rules: Rules) -> int | None:
        """Other rules from now on; the percentage if that is another one."""
        self._check(rules)
        return self.throttling.percentage if self.throttling.configure(rules) else None

    def look(self, written: int, moved: int, seconds: float) -> int | None:
        """In a round that has taken so long: pages written and moved in it. The percentage if that
        is another one."""
        changed = self.throttling.looked(written * PAGE_SIZE, moved * PAGE_SIZE, seconds)
        return self.throttling.percentage if changed else None

    async def set(self, percentage: int) -> None:
        """The guest loses so much of its time from now on."""
        if self._standing or (self._eased and percentage):
            return
        self._told = True
        try:
            await self._call(self._guest.throttle, percentage)
        except (HostLacks, SourceError) as e:
            self._guest.check()  # its end explains it better
            self._give_up(e.message)
            return
        if percentage != self._now:
            self._journal.info("the guest is slowed down by %d %%", percentage)
        self._now = percentage

    @contextlib.asynccontextmanager
    async def eased(self, after: float) -> AsyncIterator[None]:
        """Around a wait for somebody who may take long: after so many seconds the guest has all of
        its time, and when it is over it loses again what it lost."""
        easing = asyncio.get_running_loop().create_task(self._ease(after))
        try:
            yield
        finally:
            easing.cancel()
            await asyncio.wait([easing])
        if not easing.cancelled():
            easing.result()
        eased, self._eased = self._eased, False
        # what it was told last may have been given up half way: so it is told once more
        if eased and (self.throttling.percentage or self._now):
            await self.set(self.throttling.percentage)

    async def _ease(self, after: float) -> None:
        await asyncio.sleep(after)
        self._eased = True
        if self._now:
            await self.set(0)

    def _give_up(self, because: str) -> None:
        """It goes on as fast as it likes."""
        self.throttling.works = False
        self.throttling.percentage = self._now = 0
        self._because = because
        _log.warning("the guest cannot be slowed down: %s", because)

    def stopped(self) -> None:
        """It stands still, and `stop` has lifted it."""
        self._standing = True
        self._now = 0

    async def lift(self) -> None:
        """At the end of a migration, however that is. Idempotent."""
        self._standing = True
        if self._told:
            self._told, self._now = False, 0
            try:
                await self._call(self._guest.throttle, 0)
            except (HostLacks, SourceError) as e:  # it may have ended; else `close` tries it again
                _log.warning("while giving the guest all of its time: %s", e)

    def report(self) -> dict[str, Any]:
        """For query-migrate: QEMU's `cpu-throttle-percentage` while there is one, and what it was
        like, if it ever was."""
        said: dict[str, Any] = {"cpu-throttle-percentage": self._now} if self._now else {}
        if slowed := self._guest.slowed():
            said["throttle"] = slowed
        if self._because:
            said["throttle-because"] = self._because
        return said
