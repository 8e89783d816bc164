"""A receiver of many: several migrations at a time at one endpoint, each into a guest of its own.

For images that go to a directory (image:DIR/). What one migration is: arrival.py. A postcopy
that pauses is not taken up again here: nothing that runs is received so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Any

from ..transport import messages
from ..transport.errors import Cancelled, PageferryError, PeerLost, PeerRefused
from ..transport.links import Endpoint
from ..transport.messages import SAMPLE
from ..workers.reserve import Reserve
from .arrival import Arrival, OpenGuest
from .blocking import to_its_end
from .callbacks import tell
from .control import Control
from .destination import Destination
from .parameters import default_workers
from .security import Peer, same_peer
from .state import Status

# Report or error, and what the source calls it.
OnEnd = Callable[[dict[str, Any] | None, PageferryError | None, str], None]


class Reception(Destination):
    """Listens at an endpoint; up to `at_once` migrations at a time, more are refused as busy."""

    def __init__(
        self,
        endpoint: Endpoint,
        open_guest: OpenGuest,
        on_end: OnEnd,
        *,
        at_once: int,
        keys: str = "",
        insecure: bool = False,
    ) -> None:
        # as many as these have by default (batch.py), however many they had at some time
        self._workers = Reserve(max(at_once, default_workers()))
        super().__init__(endpoint, open_guest, reserve=self._workers, keys=keys, insecure=insecure)
        self._on_end = on_end
        self._at_once = at_once
        self._arrivals: dict[bytes, Arrival] = {}
        self._tasks: dict[Arrival, asyncio.Task[None]] = {}
        self._received = self._failed = 0

    def __repr__(self) -> str:
        return f"<Reception {self.endpoint} {len(self._arrivals)} of {self._at_once}>"

    def query(self) -> dict[str, Any]:
        return {
            "status": (Status.ACTIVE if self._arrivals else Status.NONE).value,
            "received": self._received,
            "failed": self._failed,
            "arrivals": [
                {"name": arrival.hello.name} | arrival.query()
                for arrival in self._arrivals.values()
            ],
        }

    def cancel(self) -> None:
        """End all that are under way."""
        for arrival in self._arrivals.values():
            arrival.fail(Cancelled("cancelled at the destination"))

    def can_be_yanked(self) -> bool:
        return bool(self._arrivals)

    def yank(self) -> None:
        """Cut all that are under way."""
        for arrival in self._arrivals.values():
            arrival.yank()

    def _is_busy(self, hello: messages.Hello) -> bool:
        if hello.kind != SAMPLE and any(
            arrival.hello.name == hello.name and not arrival.trial
            for arrival in self._arrivals.values()
        ):
            return False  # it may take that one's place, or finds the file locked
        return len(self._arrivals) >= self._at_once

    def _resume(
        self, identity: bytes, message: messages.Resume, control: Control, peer: Peer | None
    ) -> None:
        self._refuse(control, PeerRefused("nothing that was paused is known here", field="uuid"))

    async def serve(self) -> None:
        """Receive until cancelled; then what is under way is ended, each with its report."""
        try:
            while True:
                identity, data, peer = await self._next_message()
                known = self._arrivals.get(identity)
                if known is not None:
                    if same_peer(known.peer, peer):
                        self._doorkeeper.welcome()  # it may have had to connect again
                        known.heard(data)
                elif (arrival := self._greet(identity, data, peer)) is not None:
                    arrival.slot = self._free_slot()
                    self._arrivals[identity] = arrival
                    task = asyncio.get_running_loop().create_task(self._receive(identity, arrival))
                    self._tasks[arrival] = task
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            await to_its_end(asyncio.to_thread(self._workers.close))

    def _free_slot(self) -> int:
        taken = {arrival.slot for arrival in self._arrivals.values()}
        return next(slot for slot in itertools.count() if slot not in taken)

    async def _replace(self, arrival: Arrival) -> None:
        """A source that was killed may be back before its silence has shown. Whoever has no
        connection any more makes room for one that sends the same; one that has keeps its place,
        and the newcomer finds the file locked."""
        if arrival.trial:
            return  # it sends nothing that anybody else does
        await arrival.control.say(messages.Ping(0))  # somebody is here
        for other, task in list(self._tasks.items()):
            if other is arrival or other.trial or other.hello.name != arrival.hello.name:
                continue
            if not same_peer(other.peer, arrival.peer):
                continue  # of another's nobody makes room
            if not await other.control.reaches():
                other.fail(PeerLost("the source was gone, and one that sends the same has come"))
                await asyncio.wait([task])

    async def _receive(self, identity: bytes, arrival: Arrival) -> None:
        report: dict[str, Any] | None = None
        error: PageferryError | None = None
        try:
            await self._replace(arrival)
            report = await arrival.run()
            self._received += not arrival.trial
        except asyncio.CancelledError:
            error = Cancelled("the receiver was stopped")
        except PageferryError as e:
            error = e
        finally:
            del self._arrivals[identity], self._tasks[arrival]
            if arrival.guest is not None:
                arrival.guest.close()
        if arrival.trial:
            return
        self._failed += error is not None
        tell(arrival.on_end, report, error)
        with contextlib.suppress(Exception):  # a display that breaks ends no migration
            self._on_end(report, error, arrival.hello.name)
