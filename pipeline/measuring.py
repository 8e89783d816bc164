"""Measures dirty rates: of a source that is not migrating, and of one that is (the monitor's
calc-dirty-rate).

Opens, looks, waits, and lets go, however it ends; what the figures mean is dirty_rate.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from ..transport.errors import UsageError, as_ours
from ..workers.dirty import Counting, SampledPages, TrackedPages
from ..workers.forking import warm_up
from ..workers.guests import GuestUri, open_source
from ..workers.guests.base import TRACKING_PAGEMAP, SourceGuest
from ..workers.guests.sample import readable
from .blocking import Blocking, to_its_end
from .dirty_rate import (
    DIRTY_BITMAP,
    PAGE_SAMPLING,
    Asked,
    Cost,
    Look,
    Measurement,
    WorkingSet,
    asked,
    information,
    sampled,
    unfinished,
)

# When is looked, as shares of the whole time. A look by hashes takes a while.
_TRACKED_LOOKS = (0.05, 0.1, 0.2, 0.5, 1.0)
_SAMPLED_LOOKS = (0.25, 0.5, 1.0)
T = TypeVar("T")
_log = logging.getLogger("pageferry")


class Opened:
    """A source that is looked at and not moved; with `async with`. It is let go of at the end, also
    of one that is cancelled while it is opened."""

    def __init__(self, source: GuestUri) -> None:
        self._source = source
        self.call = Blocking()
        self.guest: SourceGuest | None = None

    async def __aenter__(self) -> SourceGuest:
        if self._source.kind == "demo":
            warm_up()
        try:
            self.guest = await self.call(open_source, self._source)
        except asyncio.CancelledError:
            self.guest = await to_its_end(self.call.idle())
            await self.close()
            raise
        return self.guest

    async def __aexit__(self, *rest: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Idempotent."""
        guest, self.guest = self.guest, None
        if guest is not None:
            await to_its_end(self._close(guest))

    async def _close(self, guest: SourceGuest) -> None:
        await self.call.idle()
        await self.call(guest.close)


async def dirty_rate(source: GuestUri, request: Asked) -> dict[str, Any]:
    """query-dirty-rate of `source`, which is neither stopped nor changed."""
    request = request.checked()
    if request.mode == PAGE_SAMPLING:
        source = readable(source)  # nobody has to be attached to
    async with Opened(source) as guest:
        return information(await measure(guest, request))


async def measure(guest: SourceGuest, request: Asked) -> Measurement:
    """What `guest`, which no migration is looking at, writes."""
    mode = mode_of(guest, request.mode)
    total = sum(block.pages for block in guest.blocks)
    if not mode:
        still = WorkingSet(total, (Look(request.seconds, 0.0),))
        return Measurement(request, "", time.monotonic(), still, Cost(0.0))
    began = time.monotonic()
    async with Measuring(guest, request, mode) as measuring:
        return measuring.measured(began, await measuring.curve(request.seconds))


def mode_of(guest: SourceGuest, wanted: str) -> str:
    """The mode in which `guest` is measured; "" if nobody writes it. UsageError."""
    if not guest.live:
        return ""
    tracked = guest.tracking == TRACKING_PAGEMAP
    if wanted == DIRTY_BITMAP and not tracked:
        because = guest.facts().get("dirty-tracking-because", f"{guest.kind}: memory has no owner")
        raise UsageError(
            f"the kernel does not track who writes this memory ({because}): take --mode "
            f"{PAGE_SAMPLING}"
        )
    return wanted or (DIRTY_BITMAP if tracked else PAGE_SAMPLING)


class Measuring:
    """One way of counting, carried out in threads; with `async with`."""

    def __init__(self, guest: SourceGuest, request: Asked, mode: str) -> None:
        self.call = Blocking()
        self._request, self._mode, self._facts = request, mode, dict(guest.facts())
        self._wanted = True
        if mode == DIRTY_BITMAP:
            self.counting: Counting = TrackedPages(guest)
            self._shares: tuple[float, ...] = _TRACKED_LOOKS
        else:
            sizes = [sampled(block.pages, request.sample_pages) for block in guest.blocks]
            seed = secrets.randbits(64)
            self.counting = SampledPages(guest.blocks, sizes, seed, lambda: self._wanted)
            self._shares = _SAMPLED_LOOKS

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *rest: Any) -> None:
        await to_its_end(self._close())

    async def _close(self) -> None:
        """Waits for a look that is under way, which ends soon."""
        self._wanted = False
        await self.call.idle()
        self.counting.close()

    async def curve(self, seconds: float) -> WorkingSet:
        """What is written from now on, in so many seconds."""
        began, _ = await self._timed(self.counting.begin)
        looks = []
        for share in self._shares:
            await asyncio.sleep(max(0.0, began + share * seconds - time.monotonic()))
            at, pages = await self._timed(self.counting.look)
            looks.append(Look(at - began, pages))
        return WorkingSet(self.counting.total, tuple(looks))

    async def _timed(self, what: Callable[[], T]) -> tuple[float, T]:
        """When it was done, and its answer. Memory is looked at from one end to the other: in the
        middle of it, on average."""
        before = time.monotonic()
        answer = await self.call(what)
        return (before + time.monotonic()) / 2, answer

    def measured(self, began: float, curve: WorkingSet) -> Measurement:
        """What was found in `curve`, begun at `began`."""
        counting = self.counting
        cost = Cost(counting.cpu, counting.faults, counting.fault)
        return Measurement(
            self._request, self._mode, began, curve, cost, counting.sample, self._facts
        )


class RunningDirtyRate:
    """calc-dirty-rate and query-dirty-rate of a guest that is being migrated.

    By sampling: the kernel's tracking belongs to the migration, and whoever took pages from it here
    would lose them there. A measurement that fails harms nobody but who asked.
    """

    def __init__(self, guest: SourceGuest, here: Callable[[], bool] = lambda: True) -> None:
        """`here`: whether the guest runs here still."""
        self._guest, self._here = guest, here
        self._task: asyncio.Task[None] | None = None
        self._asked: Asked | None = None
        self._began = 0.0
        self._answer: dict[str, Any] = {}
        self._pages = 0

    def start(self, arguments: dict[str, Any]) -> None:
        """calc-dirty-rate: begins, and returns at once. UsageError."""
        request = asked(arguments)
        if self._task is not None and not self._task.done():
            raise UsageError("the dirty rate is being measured already: query-dirty-rate")
        if not self._here():
            raise UsageError("the guest does not run here any more: there is nothing to measure")
        if request.mode == DIRTY_BITMAP and self._guest.live:
            raise UsageError(
                f"this migration tracks the guest's writes itself: take mode {PAGE_SAMPLING}; what "
                f"it finds is ram.dirty-pages-rate of query-migrate"
            )
        self._asked, self._began, self._answer = request, time.monotonic(), {}
        self._pages = sum(block.pages for block in self._guest.blocks)
        self._task = asyncio.get_running_loop().create_task(self._measure(request))

    async def _measure(self, request: Asked) -> None:
        try:
            self._answer = information(await measure(self._guest, request))
        except Exception as e:
            error = as_ours(e)
            _log.warning("the dirty rate was not measured: %s", error)
            self._answer = unfinished(request, self._began, self._pages, error.message)

    def query(self) -> dict[str, Any]:
        """query-dirty-rate."""
        return self._answer or unfinished(self._asked, self._began, self._pages)

    async def close(self) -> None:
        """Idempotent. What it had not measured stays unmeasured."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            if not self._answer:
                gone = "the guest is not here any more"
                self._answer = unfinished(self._asked, self._began, self._pages, gone)
