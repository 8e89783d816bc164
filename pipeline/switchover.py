"""A source's switchover: what is waited for before it, which is the destination's acknowledgement
(QEMU: switchover-ack) and somebody who says that it may go on (QEMU: pause-before-switchover); and
the guest's going, until it runs there.

Knows how long it waited, what a peer may say of it, and each step. Which is next, and whether, is
migration.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from ..transport import messages
from ..transport.errors import PageferryError, PeerLost, RemoteProtocolError, SourceError
from ..transport.vmstate import Section
from ..workers.guests.base import SourceGuest
from .blocking import Blocking, MayHang
from .control import Ask, Say
from .device_state import HOOK_SECONDS, compose, run_state
from .pressure import Pressure
from .state import Status
from .statistics import Statistics

# What query-migrate calls the two.
ACK, CONTINUE = "switchover-ack", "migrate-continue"
# A destination that has everything needs this long at the most to say that it runs.
CONFIRM_SECONDS = 30.0
_TIMES = {ACK: "switchover-ack-time", CONTINUE: "pre-switchover-time"}
_log = logging.getLogger("pageferry")


class Waits:
    """How long was waited for what. Times: CLOCK_MONOTONIC seconds."""

    def __init__(self) -> None:
        self.waiting_for = ""
        self._since = 0.0
        self._spent: dict[str, float] = {}

    def became(self, status: Status) -> None:
        """The migration is in another state."""
        if status is Status.PRE_SWITCHOVER:
            self._begin(CONTINUE)
        elif self.waiting_for == CONTINUE:
            self._end()

    @contextlib.contextmanager
    def acknowledgement(self) -> Iterator[None]:
        """Around waiting for it."""
        self._begin(ACK)
        try:
            yield
        finally:
            self._end()

    def _begin(self, what: str) -> None:
        self.waiting_for, self._since = what, time.monotonic()
        self._spent.setdefault(what, 0.0)

    def _end(self) -> None:
        self._spent[self.waiting_for] += time.monotonic() - self._since
        self.waiting_for = ""

    def report(self) -> dict[str, Any]:
        """For query-migrate: milliseconds, and what is waited for just now."""
        found: dict[str, Any] = {"waiting-for": self.waiting_for} if self.waiting_for else {}
        for what, spent in self._spent.items():
            more = time.monotonic() - self._since if what == self.waiting_for else 0.0
            found[_TIMES[what]] = round((spent + more) * 1000)
        return found


class Acknowledgement:
    """The destination's word that it is ready, at the source: once, and only if it was promised.
    It may be heard before the promise is read, which came before it."""

    def __init__(self) -> None:
        self._promised: bool | None = None
        self._heard, self._at = asyncio.Event(), 0.0

    @property
    def heard(self) -> bool:
        return self._heard.is_set()

    @property
    def awaited(self) -> bool:
        return bool(self._promised) and not self.heard

    def promise(self, promised: bool) -> None:
        """What Welcome said."""
        self._promised = promised
        if self.heard and not promised:
            raise RemoteProtocolError("SwitchoverAck came, and nobody had said that it would")

    def hear(self) -> None:
        """It came; RemoteProtocolError if it should not have."""
        if self.heard or self._promised is False:
            raise RemoteProtocolError("nobody asked for SwitchoverAck")
        self._heard.set()
        self._at = time.monotonic()

    def report(self, stopped: float | None) -> dict[str, Any]:
        """For query-migrate: milliseconds from it until the guest was `stopped` (CLOCK_MONOTONIC
        seconds), which is how much earlier it might have come, or how late it came. QEMU has no
        name for it."""
        if not self.heard or stopped is None:
            return {}
        return {"switchover-ack-to-stop-time": round(max(0.0, stopped - self._at) * 1000)}

    async def wait(self) -> None:
        """Until it is there; at once if none will come."""
        if self._promised:
            await self._heard.wait()


class Switchover:
    """The guest's going, step by step. `call`: for what blocks; `say`, `ask`: the destination."""

    def __init__(
        self,
        guest: SourceGuest,
        call: Blocking,
        statistics: Statistics,
        pressure: Pressure,
        waits: Waits,
        acknowledgement: Acknowledgement,
        say: Say,
        ask: Ask,
    ) -> None:
        self._guest, self._call, self._statistics = guest, call, statistics
        self._pressure, self._waits, self._ack = pressure, waits, acknowledgement
        self._say, self._ask = say, ask
        self._hooks = MayHang(HOOK_SECONDS)

    async def may_stop(
        self, before_stop: Callable[[], Awaitable[None]] | None, soon: float
    ) -> float:
        """Until all who are asked agree; the seconds that took. After `soon` seconds the guest has
        all of its time meanwhile."""
        asked = time.monotonic()
        async with self._pressure.eased(soon):
            if self._ack.awaited:
                with self._waits.acknowledgement():
                    await self._ack.wait()
            if before_stop is not None and self._guest.can_stop:
                await before_stop()
        return time.monotonic() - asked

    async def stop(self) -> None:
        """The guest stands still."""
        begin = time.monotonic()
        await self._call(self._guest.stop)
        self._pressure.stopped()
        self._statistics.stopped = self._guest.stopped_at or begin

    async def save_state(self, sections: Sequence[Section]) -> bytes:
        """Of the guest, and of tools: their hooks may take as long as they like, and hold up
        nothing but this migration."""
        state = await self._call(self._guest.save_state)
        runs = run_state(live=self._guest.live, running=self._guest.running)
        self._statistics.extra["run-state"] = runs
        try:
            return await self._hooks(compose, state, runs, sections)
        except TimeoutError as e:
            raise SourceError(f"hooks of device state took more than {HOOK_SECONDS:.0f} s") from e

    async def send_state(self, state: bytes, *, postcopy: bool) -> None:
        """All of it, the last part with what makes the destination load it."""
        if len(state) > messages.MAX_STATE:
            raise SourceError(f"a device state of {len(state)} bytes is above the bound")
        cut = max(0, len(state) - 1) // messages.STATE_PART * messages.STATE_PART
        for at in range(0, cut, messages.STATE_PART):
            await self._say(messages.StatePart(state[at : at + messages.STATE_PART]))
        await self._ask(messages.DeviceState(self._guest.kind, state[cut:], postcopy))
        self._statistics.control_bytes += len(state)

    async def confirmed(self, said: asyncio.Future[messages.AnyMessage]) -> None:
        """Wait for the destination's word that the guest runs there."""
        try:
            running = await asyncio.wait_for(said, CONFIRM_SECONDS)
        except TimeoutError as e:
            raise PeerLost("the destination does not answer") from e
        self._statistics.running = time.monotonic()
        assert isinstance(running, messages.Running)
        self._statistics.extra["destination"] = running.detail
        self._statistics.peer = running.statistics

    async def set_back(self) -> None:
        """The guest's host is as it was before, but for the guest."""
        try:
            await self._call(self._guest.moved)
        except PageferryError as e:
            _log.warning("the source is not set as before: %s", e)
