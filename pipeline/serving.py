"""`pageferry serve`: a snapshot's memory, pulled by any number of destinations at once.

The destination dials here, says which pages it maps, and gets channels; from then on it is the
background and the faults of a postcopy (background.py) over an image that nobody writes. A
destination that comes back says what it has. One Pulled a destination; one that fails ends alone.
Touches no memory itself, and knows nothing of the monitors at the other ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import numpy as np
import xxhash
import zmq
import zmq.asyncio

from .._version import __version__
from ..transport import messages
from ..transport.doorkeeper import Doorkeeper
from ..transport.errors import (
    PageferryError,
    PeerLost,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    as_ours,
)
from ..transport.keys import KeyDirectory
from ..transport.links import NOBLOCK, Endpoint, Gate, bind, sender_key, unbind
from ..transport.messages import MAX_WORKERS
from ..transport.pages import NO_RUNS, PAGE_SIZE, Runs, mark, runs_of
from ..transport.session import Role
from ..transport.urgent import MAX_HOST_PAGES
from ..workers import jobs, sender
from ..workers.bandwidth import Bandwidth
from ..workers.counters import Counters
from ..workers.forking import context
from ..workers.guests.base import SourceGuest
from ..workers.page_table import DIRTY, PageTable
from ..workers.ram import RamBlock
from ..workers.received import unpack
from . import narration
from .background import Background
from .blocking import kept_up, to_its_end
from .control import Control
from .crew import Crew
from .journal import Journal
from .parameters import Parameters
from .security import LOOK_SECONDS, ChannelKeys, Peer, listening, same_peer
from .state import Status
from .statistics import Statistics

# Destinations at once; each has processes of its own.
MAX_DESTINATIONS = 64
# A destination that was offered memory may wait for its monitor for as long as it says that it
# lives; one that says nothing at all is gone.
WATCH_SECONDS = 0.25
_SAMPLED_PAGES = 2048
_log = logging.getLogger("pageferry")
M = TypeVar("M", bound=messages.Message)


def snapshot_id(block: RamBlock) -> str:
    """What tells one snapshot from another: of its size and of pages all over it, so that a copy of
    it on another host has the same."""
    state = xxhash.xxh3_128(str(block.size).encode())
    step = max(1, block.pages // _SAMPLED_PAGES)
    for page in range(0, block.pages, step):
        state.update(block.read(page * PAGE_SIZE, PAGE_SIZE))
    return str(uuid.UUID(bytes=state.digest()))


class Pulled:
    """One destination."""

    def __init__(
        self,
        name: str,
        guest: SourceGuest,
        endpoint: Endpoint,
        parameters: Parameters,
        control: Control,
        snapshot: str,
        peer: Peer | None = None,
    ) -> None:
        self.name = name
        self.peer = peer
        self._channel_keys = ChannelKeys(peer is not None)
        self._their_key = b""
        self.journal = Journal("source", "", f"destination {name}")
        control.note = self.journal.control
        self._snapshot = snapshot
        self.endpoint = endpoint
        self.parameters = parameters
        self.control = control
        self.statistics = Statistics("source")
        self._guest = guest
        self._heard: asyncio.Queue[messages.AnyMessage] = asyncio.Queue()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[Any]] = []
        self._table: PageTable | None = None
        self._counters: Counters | None = None
        self._bandwidth: Bandwidth | None = None
        self._background: Background | None = None
        self._crew: Crew | None = None

    def __repr__(self) -> str:
        return f"<Pulled {self.name}>"

    def heard(self, data: bytes) -> None:
        """A message of the destination."""
        try:
            message = self.control.heard(data)
        except PageferryError as e:
            self._fail(e)
            return
        if isinstance(message, messages.Abort):
            self._fail(messages.error_of(message))
        elif isinstance(message, messages.Paused):
            self._fail(PeerLost(f"the destination paused: {message.message}"))
        elif message is not None:
            self._heard.put_nowait(message)

    def _fail(self, error: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    def _task(self, coroutine: Any) -> None:
        def done(task: asyncio.Task[Any]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error if isinstance(error, Exception) else PageferryError(repr(error)))

        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(done)
        self._tasks.append(task)

    async def run(self) -> dict[str, Any]:
        """Serve it, to the last page. Returns the report, raises the error."""
        self.journal.became(Status.SETUP)
        serving = asyncio.get_running_loop().create_task(self._serve())
        both: list[asyncio.Future[Any]] = [serving, self._failure]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                self._failure.result()
            return serving.result()
        except PageferryError as e:
            with contextlib.suppress(PageferryError, zmq.ZMQError):
                await self._say(e)
            raise
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            if self._failure.done():
                self._failure.exception()
            await to_its_end(self._close())

    async def _say(self, error: PageferryError) -> None:
        """Tell the destination that this connection is over."""
        if self.control.session.may_pause:
            await self.control.pause(error)
        else:
            await self.control.abort(error)

    def end(self) -> None:
        """The server ends."""
        self._fail(PeerLost("the server has ended"))

    async def _next(self, kind: type[M]) -> M:
        message = await self._heard.get()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"unexpected {type(message).__name__}")
        return message

    async def _serve(self) -> dict[str, Any]:
        self._task(self.control.keep_alive())
        if self.peer is not None:
            self._task(self._watch_key(self.peer))
        await self.control.say(
            messages.Offer(
                __version__, self._snapshot, [b.spec for b in self._guest.blocks],
                self.parameters.workers,
            )
        )  # fmt: skip
        missing = await self._lay_out(await self._next(messages.Layout))
        self.statistics.set_up = time.monotonic()
        endpoints, tokens, urgent = await self._start()
        await self.control.say(
            messages.Serving(
                endpoints, tokens, urgent, missing[0].tolist(), missing[1].tolist(),
                self._channel_keys.public,
            )
        )  # fmt: skip
        await self._next(messages.Armed)
        self.journal.became(Status.POSTCOPY_ACTIVE)
        await self.journal.during("SendBackground", self._send)
        await self.control.ask(messages.PostcopyEnd())
        self.statistics.ended = time.monotonic()
        self.journal.became(Status.COMPLETED)
        return self.statistics.report(Status.COMPLETED, None)

    async def _watch_key(self, peer: Peer) -> None:
        """A destination whose key is revoked is cut off; its guest sleeps on what is missing."""
        while True:
            peer.check()
            await asyncio.sleep(LOOK_SECONDS)

    async def _lay_out(self, layout: messages.Layout) -> Runs:
        """Take its pages into the table; those that hold something."""
        self._their_key = layout.key
        host = layout.page_size // PAGE_SIZE
        if layout.page_size not in (PAGE_SIZE, MAX_HOST_PAGES * PAGE_SIZE):
            raise RemoteProtocolError(f"host pages of {layout.page_size} bytes")
        block = self._guest.blocks[0]
        runs = messages.runs_of(layout, block.pages)
        spec = msgspec.structs.replace(block.spec, page_size=layout.page_size)
        self._blocks = [block.with_spec(spec)]
        self._table = PageTable([block.pages], context().Lock())
        view = self._table.view(0)
        data = await asyncio.to_thread(self._guest.initial_pages, 0)
        mapped = np.zeros(block.pages, np.uint8)
        mark(mapped, runs, 1)
        mark(view, data, DIRTY)
        view[mapped == 0] = 0
        if host > 1:
            self._table.whole_host_pages(0, host)
        if layout.received:
            view[unpack(layout.received, block.pages) != 0] = 0
        self.statistics.total_pages = int(np.count_nonzero(mapped))
        found = runs_of(np.flatnonzero(view))
        del view
        return found if len(found[0]) else NO_RUNS

    async def _start(self) -> tuple[list[str], list[bytes], tuple[str, bytes]]:
        """Start the processes; the channels they listen at."""
        assert self._table is not None
        p = self.parameters
        self._counters = self.statistics.counters = Counters(p.workers, self.journal.lane)
        self._bandwidth = Bandwidth(p.max_postcopy_bandwidth)
        self._background = Background(self._blocks, self._table, p, self._fail, self.journal.lane)
        self.statistics.urgent = self._background.counters
        self.statistics.postcopy = True
        job = sender.SenderJob(
            self._blocks, self._table, self._counters, self._bandwidth, None, p.page_codec, p.level,
            p.batch_pages,
        )  # fmt: skip
        self._background.equip(job)
        await self._background.start()
        self._crew = Crew(self._counters, self._fail)
        await self._crew.start(job, p.workers)
        await self._crew.gather(jobs.Ready)
        self._task(self._watch())
        tokens = [secrets.token_bytes(16) for _ in range(p.workers)]
        curve = self._channel_keys.binds(self._their_key, self._snapshot)
        for worker, token in zip(self._crew.pool.workers, tokens, strict=True):
            worker.say(jobs.Listen(self._listen_at(worker.index), token, curve))
        where = await self._crew.gather(jobs.Ready)
        key = secrets.token_bytes(16)
        urgent = await self._background.listen(self._listen_at(MAX_WORKERS), key, curve)
        return [where[i].endpoint for i in range(p.workers)], tokens, (urgent, key)

    def _listen_at(self, channel: int) -> str:
        if self.endpoint.scheme == "ipc":
            return f"ipc://{self.endpoint.path}.{self.name}.{channel}"
        return str(Endpoint("tcp", self.endpoint.host, 0))

    async def _send(self) -> None:
        assert self._crew is not None and self._background is not None
        assert self._counters is not None and self._bandwidth is not None
        assert self._table is not None
        self.statistics.begin_round(1, self._table.remaining())
        self.journal.round_begins(1, self.statistics.round_pages)
        self._task(self._background.keep_pace(self._counters, self._bandwidth))
        await self._background.send_all(self._crew, self.parameters.workers)

    async def _watch(self) -> None:
        while True:
            assert self._crew is not None and self._background is not None
            self._crew.pool.check()
            self._background.check()
            await asyncio.sleep(WATCH_SECONDS)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._crew is not None:
            await self._crew.pool.close()
        if self._background is not None:
            await self._background.stop()
            self.statistics.urgent = self._background.close()
        if self._counters is not None:
            self.statistics.counters = self._counters.freeze()
        for part in (self._counters, self._bandwidth, self._table):
            if part is not None:
                part.close()
        completed = self.statistics.ended is not None
        status = Status.COMPLETED if completed else Status.FAILED
        self.journal.became(status)
        self.journal.over(narration.ended(self.statistics.report(status, None)))


class Server:
    """Listens at an endpoint; serves `guest`'s memory to whoever pulls. With `only` nobody but the
    destination that knows that secret."""

    def __init__(
        self,
        endpoint: Endpoint,
        guest: SourceGuest,
        parameters: Parameters,
        on_end: Callable[[str, dict[str, Any] | None, PageferryError | None], None] | None = None,
        only: bytes | None = None,
    ) -> None:
        if len(guest.blocks) != 1 or guest.live:
            raise SourceError("only a raw memory image that nobody writes can be served")
        self._only = only
        self._guest = guest
        self._snapshot = snapshot_id(guest.blocks[0])
        self._parameters = replace(parameters, postcopy="now").checked()
        self._on_end = on_end or (lambda name, report, error: None)
        self._pulled: dict[bytes, Pulled] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._count = 0
        self._keys: KeyDirectory | None = listening(
            endpoint, parameters.keys, insecure=parameters.insecure
        )
        self._context = zmq.asyncio.Context()
        self._gate = Gate(self._context, self._keys) if self._keys is not None else None
        try:
            self._socket: Any
            self._socket, self.endpoint = bind(
                self._context, endpoint, control=messages.MAX_TO_SERVER, gatekeeper=self._keys
            )
        except BaseException:
            if self._gate is not None:
                self._gate.close()
            self._context.term()
            raise

        self._doorkeeper = Doorkeeper(
            self._socket, self.endpoint, _MAX_PULL, messages.MAX_TO_SERVER,
            sealed=self._keys is not None, on_cut=_log.info,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Server {self.endpoint} {len(self._pulled)} destinations>"

    @property
    def destinations(self) -> list[Pulled]:
        return list(self._pulled.values())

    async def run(self) -> None:
        """Serve until cancelled."""
        attending = [asyncio.ensure_future(kept_up(self._doorkeeper.attend))]
        if self._gate is not None:
            attending.append(asyncio.ensure_future(kept_up(self._gate.attend)))
        try:
            while True:
                await asyncio.sleep(0)  # all others have a turn, however much a stranger says
                parts = await self._socket.recv_multipart(copy=False)
                self._doorkeeper.heard(parts)
                if len(parts) != 2 or self._only not in (None, parts[0].bytes[:16]):
                    continue
                identity, data = parts[0].bytes, parts[1].bytes
                peer = Peer(self._keys, sender_key(parts[1])) if self._keys is not None else None
                if identity not in self._pulled:
                    await self._greet(identity, data, peer)
                elif same_peer(self._pulled[identity].peer, peer):
                    self._doorkeeper.welcome()  # it may have had to connect again
                    self._pulled[identity].heard(data)
        finally:
            for task in attending:
                task.cancel()
            for pulled in self.destinations:
                pulled.end()
            await to_its_end(self._wait_for_all())

    async def _wait_for_all(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _greet(self, identity: bytes, data: bytes, peer: Peer | None) -> None:
        async def transmit(answer: bytes) -> None:
            # At once or never: behind an answer that its peer does not take, all others would wait.
            with contextlib.suppress(zmq.ZMQError):  # gone: heartbeats will tell
                await self._socket.send_multipart([identity, answer], NOBLOCK)

        control = Control(Role.SOURCE, transmit, "the destination")
        try:
            message = control.heard(data[:_MAX_PULL])
        except PageferryError:
            return
        assert isinstance(message, messages.Pull)
        problem = ""
        if message.protocol != messages.PROTOCOL:
            problem = f"this end speaks protocol {messages.PROTOCOL} (pageferry {__version__})"
        elif len(self._pulled) >= MAX_DESTINATIONS:
            problem = f"{MAX_DESTINATIONS} destinations are served already"
        try:
            if peer is not None:
                peer.check()  # it may be connected for long
        except PeerRefused as e:
            problem = e.message
        if problem:
            await control.say(messages.Refused(PeerRefused.__name__, "serve", problem))
            return
        self._count += 1
        pulled = Pulled(
            str(self._count), self._guest, self.endpoint, self._parameters, control,
            self._snapshot, peer,
        )  # fmt: skip
        self._pulled[identity] = pulled
        self._doorkeeper.welcome()
        task = asyncio.get_running_loop().create_task(self._serve(identity, pulled))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, identity: bytes, pulled: Pulled) -> None:
        """One destination; its failure is its own."""
        report, error = None, None
        try:
            report = await pulled.run()
        except PageferryError as e:
            error = e
        except Exception as e:
            _log.exception("while serving a destination")
            error = as_ours(e)
        finally:
            del self._pulled[identity]
        self._on_end(pulled.name, report, error)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._socket is not None:
            self._doorkeeper.close()
            unbind(self._socket, self.endpoint)
            if self._gate is not None:
                self._gate.close()
            self._context.term()
            self._socket = None


# A Pull is a few bytes.
_MAX_PULL = 4096
