"""The coordinator on the destination host: listens, and gives each migration to its Arrival.

A Destination listens for as long as it is told to and takes one migration at a time; a second
Hello meanwhile is refused, anything else from a stranger is ignored. What one migration is:
arrival.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio

from ..transport import messages
from ..transport.doorkeeper import Doorkeeper
from ..transport.errors import (
    Cancelled,
    PeerLost,
    PeerRefused,
    RemoteProtocolError,
    UsageError,
)
from ..transport.keys import KeyDirectory
from ..transport.links import NOBLOCK, Endpoint, Gate, bind, sender_key, unbind
from ..transport.session import Role
from ..transport.vmstate import Section
from ..workers.reserve import Reserve
from ..workers.snapshot_file import CheckedBlock
from .agreement import check_hello, check_key
from .arrival import Arrival, OpenGuest, Progress
from .blocking import kept_up
from .callbacks import tell
from .control import Control
from .hooks import BeforeSwitchover
from .security import Peer, listening, same_peer
from .state import IN_POSTCOPY, Status

_log = logging.getLogger("pageferry")


class Destination:
    """Listens at an endpoint; one migration at a time.

    `open_guest(hello)` says into what; with `only` nobody but the source whose identity that
    is (a shared secret) is welcome. `reserve`: where receivers come from. `keys`: a directory of
    keys; without one it listens where other hosts reach it only if `insecure` says so.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        open_guest: OpenGuest,
        expected_kind: str | None = None,
        on_progress: Progress | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        only: bytes | None = None,
        reserve: Reserve | None = None,
        keys: str = "",
        insecure: bool = False,
    ) -> None:
        self._only = only
        self._reserve = reserve
        self._keys: KeyDirectory | None = listening(endpoint, keys, insecure=insecure)
        self._context = zmq.asyncio.Context()
        self._gate = Gate(self._context, self._keys) if self._keys is not None else None
        self._attending: list[asyncio.Future[None]] = []
        try:
            sock, self.endpoint = bind(
                self._context, endpoint, control=messages.MAX_TO_DESTINATION, gatekeeper=self._keys
            )
        except BaseException:
            if self._gate is not None:
                self._gate.close()
            self._context.term()
            raise
        self._socket: Any = sock
        self._doorkeeper = Doorkeeper(
            sock, self.endpoint, messages.MAX_TO_DESTINATION, messages.MAX_TO_DESTINATION,
            sealed=self._keys is not None, on_cut=_log.info,
        )  # fmt: skip
        self._incoming: asyncio.Future[list[bytes]] | None = None  # a message that is awaited
        self._open_guest = open_guest
        self._expected_kind = expected_kind
        self.on_progress = on_progress
        self.on_event = on_event or (lambda name, data: None)
        # told of each before it begins
        self.on_arrival: Callable[[Arrival], None] | None = None
        # What tools here wait for, loaded by each that arrives (device_state.py).
        self.sections: Sequence[Section] = ()
        # Blocks of the snapshot that is to arrive, if it is on this host (here.py).
        self.here: Sequence[CheckedBlock] = ()
        # makes this host ready for each: the source switches over when it has returned
        self.before_switchover: BeforeSwitchover | None = None
        self.arrival: Arrival | None = None
        self._last: dict[str, Any] = {"status": Status.NONE.value}
        # the last postcopy that is whole: its source may not have heard of it
        self._ended: tuple[str, bytes, messages.Ended] | None = None

    def __repr__(self) -> str:
        return f"<Destination {self.endpoint} {self.arrival!r}>"

    def query(self) -> dict[str, Any]:
        return self.arrival.query() if self.arrival is not None else self._last

    def query_parameters(self) -> dict[str, Any]:
        return {}

    def query_processes(self) -> list[dict[str, Any]]:
        return self.arrival.query_processes() if self.arrival is not None else []

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        raise PeerRefused("parameters are the source's to set: ask its monitor")

    def cancel(self) -> None:
        """End the migration that is under way, if one is. A postcopy is ended only when it is
        paused: its guest runs here, and goes with it."""
        if self.arrival is None:
            return
        if self.arrival.status is Status.POSTCOPY_PAUSED:
            self.arrival.abandon(Cancelled("given up while paused"))
        elif self.arrival.status in IN_POSTCOPY:
            _log.warning(
                "a postcopy cannot be cancelled: the guest runs here and its memory is arriving; "
                "asked again, both are thrown away"
            )
        else:
            self.arrival.fail(Cancelled("cancelled at the destination"))

    def can_be_yanked(self) -> bool:
        return self.arrival is not None

    def yank(self) -> None:
        """Cut the migration that is under way: it fails, or pauses if it is a postcopy."""
        if self.arrival is not None:
            self.arrival.yank()

    def start_postcopy(self) -> None:
        raise UsageError("the source says when a postcopy starts: ask its monitor")

    def go_on(self) -> None:
        raise UsageError("the source is who waits before a switchover: ask its monitor")

    def pause(self) -> None:
        """migrate-pause: drop the connection of a postcopy, to recover it later."""
        if self.arrival is None or self.arrival.status is not Status.POSTCOPY_ACTIVE:
            raise UsageError("only a postcopy that is active can be paused")
        self.arrival.fail(PeerLost("paused because somebody asked for it"))

    def recover(self, where: str | None) -> None:
        raise UsageError(
            f"this end waits at {self.endpoint}: `pageferry recover` the source's monitor"
        )

    async def receive(self) -> dict[str, Any]:
        """The next migration, from its Hello to its end: its report, or its error.

        The report of a guest that runs here has its `DestinationGuest` still open:
        `arrival.guest` is the caller's to conclude and close.
        """
        reading: asyncio.Task[Any] | None = None
        try:
            while self.arrival is None:
                self.arrival = self._greet(*await self._next_message())
            running = asyncio.ensure_future(self.arrival.run())
            reading = asyncio.ensure_future(self._dispatch())
            reading.add_done_callback(self._reading_ended)
            try:
                return await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def _reading_ended(self, reading: asyncio.Task[Any]) -> None:
        """Nobody would hear the source any more."""
        if not reading.cancelled() and (error := reading.exception()) is not None:
            assert self.arrival is not None
            self.arrival.fail(error)

    def forget(self) -> None:
        """Done with the last arrival: the next Hello is welcome. Closes its guest."""
        if self.arrival is not None:
            if not self.arrival.trial:
                self._last = self.arrival.query()
            if self.arrival.ended is not None:
                self._ended = (self.arrival.hello.uuid, self._identity[:16], self.arrival.ended)
            if self.arrival.guest is not None:
                self.arrival.guest.close()
            self.arrival = None

    async def _next_message(self) -> tuple[bytes, bytes, Peer | None]:
        """An identity, a message, and whose it is if there are keys."""
        if not self._attending:
            self._attending = [asyncio.ensure_future(kept_up(self._doorkeeper.attend))]
            if self._gate is not None:
                self._attending.append(asyncio.ensure_future(kept_up(self._gate.attend)))
        while True:
            await asyncio.sleep(0)  # all others have a turn, however much a stranger says
            if self._incoming is None:
                self._incoming = asyncio.ensure_future(self._socket.recv_multipart(copy=False))
            # Whoever waits may be cancelled when it has come already: then it is the next one's. It
            # may be the Hello of a source that knocked as the last migration ended.
            parts = await asyncio.shield(self._incoming)
            self._incoming = None
            self._doorkeeper.heard(parts)
            if len(parts) == 2 and self._only in (None, parts[0].bytes[:16]):
                keys = self._keys
                peer = Peer(keys, sender_key(parts[1])) if keys is not None else None
                return parts[0].bytes, parts[1].bytes, peer

    def _greet(self, identity: bytes, data: bytes, peer: Peer | None) -> Arrival | None:
        """The arrival that a Hello begins, or None for anything else."""

        async def transmit(answer: bytes) -> None:
            # At once or never: behind an answer that its peer does not take, all others would wait.
            try:
                await self._socket.send_multipart([identity, answer], NOBLOCK)
            except zmq.ZMQError as e:  # gone, or it takes nothing: heartbeats will tell
                control.cut |= e.errno == zmq.EHOSTUNREACH

        control = Control(Role.DESTINATION, transmit, "the source")
        try:
            hello = control.heard(data)
        except RemoteProtocolError:
            return None
        assert isinstance(hello, messages.Hello | messages.Resume)
        try:
            if peer is not None:
                peer.check()  # it may be connected for long
            check_key(hello, secured=peer is not None)
        except PeerRefused as e:
            self._refuse(control, e)
            return None
        if isinstance(hello, messages.Resume):
            self._resume(identity, hello, control, peer)
            return None
        if self._is_busy(hello):
            self._refuse(control, PeerRefused("the destination is busy", field="busy"))
            return None
        try:
            check_hello(hello, self._expected_kind)
        except PeerRefused as e:
            self._refuse(control, e)
            return None
        self._identity = identity
        self._doorkeeper.welcome()
        arrival = Arrival(
            hello, control, self.endpoint, self._open_guest,
            self._progress, self._event, self._reserve, peer,
        )  # fmt: skip
        arrival.before_switchover = self.before_switchover
        if not arrival.trial:  # nothing arrives, and nothing is told of its end
            arrival.sections, arrival.here = self.sections, self.here
            tell(self.on_arrival, arrival)
        return arrival

    def _is_busy(self, hello: messages.Hello) -> bool:
        return self.arrival is not None

    def _resume(
        self, identity: bytes, message: messages.Resume, control: Control, peer: Peer | None
    ) -> None:
        """The source of a postcopy is back: it is who begins with the same 16 secret bytes."""
        arrival = self.arrival
        if self._ended is not None and self._ended[:2] == (message.uuid, identity[:16]):
            self._answering = asyncio.ensure_future(control.say(self._ended[2]))
            return
        known = (
            arrival is not None
            and arrival.hello.uuid == message.uuid
            and arrival.status in IN_POSTCOPY
            and identity[:16] == self._identity[:16]
            and len(identity) > 16
            and same_peer(arrival.peer, peer)
        )
        if arrival is not None and arrival.hello.uuid == message.uuid and arrival.starting:
            self._refuse(control, PeerRefused(
                "the guest is just being started at the destination: recover again in a moment",
                field="uuid",
            ))  # fmt: skip
            return
        if not known or arrival is None:
            self._refuse(control, PeerRefused(
                "the destination knows of no postcopy that waits for this source: if the guest "
                "does not run there, resume it here",
                field="uuid",
            ))  # fmt: skip
            return
        if message.workers != arrival.hello.workers or message.protocol != messages.PROTOCOL:
            self._refuse(control, PeerRefused("resumed with other parameters", field="workers"))
            return
        self._identity = identity
        self._doorkeeper.welcome()
        arrival.resume(message, control)

    def _refuse(self, control: Control, error: PeerRefused) -> None:
        self._refusing = asyncio.ensure_future(control.say(messages.refusal(error)))

    def _progress(self, report: dict[str, Any]) -> None:
        if self.on_progress is not None:
            self.on_progress(report)

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self.on_event(name, data)

    async def _dispatch(self) -> None:
        """Give the source's messages to the arrival, turn others away."""
        while True:
            message = await self._next_message()
            assert self.arrival is not None
            try:
                self._take(self.arrival, *message)
            except Exception as e:
                _log.exception("while a message was taken")
                self.arrival.fail(e)  # but who is to recover it is heard

    def _take(self, arrival: Arrival, sender_: bytes, data: bytes, peer: Peer | None) -> None:
        if sender_ != self._identity:
            self._greet(sender_, data, peer)
        elif same_peer(arrival.peer, peer):
            self._doorkeeper.welcome()  # it may have had to connect again
            arrival.heard(data)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._socket is not None:
            self.forget()
            if self._incoming is not None:
                self._incoming.cancel()
                self._incoming = None
            for task in self._attending:
                task.cancel()
            self._doorkeeper.close()
            unbind(self._socket, self.endpoint)
            if self._gate is not None:
                self._gate.close()
            self._context.term()
            self._socket = None
