"""`pageferry restore`: serves the page faults of a virtual machine monitor from a remote snapshot.

The monitor restores its guest with memory that is not there, and hands over a userfaultfd, as
Firecracker does. We dial a `pageferry serve`, say which pages are mapped, and fill them: faults
first, the background behind. The snapshot does not change, so that a connection that breaks is
simply dialled again, with what has arrived; the guest sleeps on what is missing until then.
Touches no memory itself, and knows no terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import zmq
import zmq.asyncio

from .._version import __version__
from ..transport import messages
from ..transport.errors import (
    ConnectError,
    GuestGone,
    PageferryError,
    PeerLost,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    as_ours,
)
from ..transport.handshake import refusal
from ..transport.links import TOKEN_BYTES, Endpoint, connect, stop_watching
from ..transport.messages import Block
from ..transport.pages import PAGE_SIZE, mark, runs_of
from ..transport.session import Role
from ..workers import jobs, receiver
from ..workers.counters import Counters
from ..workers.forking import context
from ..workers.guests.base import ArmedMemory, Region
from ..workers.guests.handover import HandoverListener, Mapping, VmmConnection
from ..workers.pool import Pool, Worker
from ..workers.ram import RamBlock, RamFile
from . import narration
from .blocking import to_its_end
from .callbacks import tell
from .control import Control, find
from .faults import Faults
from .journal import Journal
from .parameters import Parameters
from .security import LOOK_SECONDS, ChannelKeys, dialling
from .state import Status, advance
from .statistics import Statistics

_HELLO_SECONDS = 5.0
# Between two attempts to reach a source that is gone.
_RETRY_SECONDS = 1.0
_WATCH_SECONDS = 0.25
_MAX_MAPPINGS = 1024
_HUGE = 2 << 20
_log = logging.getLogger("pageferry")
M = TypeVar("M", bound=messages.Message)


def regions_of(mappings: list[Mapping], block: Block) -> tuple[list[Region], int]:
    """The mappings of a handover as regions of `block`, checked, and the host page size."""
    if not 1 <= len(mappings) <= _MAX_MAPPINGS:
        raise SourceError(f"the handover has {len(mappings)} mappings")
    sizes = {m.page_size for m in mappings}
    page_size = max(sizes)
    if not sizes <= {PAGE_SIZE, _HUGE} or len(sizes) != 1:
        raise SourceError(
            f"the handover has pages of {', '.join(map(str, sorted(sizes)))} bytes: 4096 or "
            f"{_HUGE} are possible, the same for all of it"
        )
    for m in mappings:
        fields = {"address": m.base_host_virt_addr, "size": m.size, "offset": m.offset}
        for name, value in fields.items():
            if value < 0 or value % page_size or value >= 1 << 63:
                raise SourceError(f"the handover has a mapping whose {name} is {value}")
        if m.size == 0 or m.offset + m.size > block.size:
            raise SourceError(
                f"the handover maps {m.size} bytes at {m.offset} of a snapshot of {block.size}: "
                f"is it the memory of this snapshot?"
            )
    _no_overlap([(m.offset, m.size) for m in mappings], "the snapshot")
    _no_overlap([(m.base_host_virt_addr, m.size) for m in mappings], "its memory")
    return [
        Region(0, m.offset // PAGE_SIZE, m.size // PAGE_SIZE, m.base_host_virt_addr, page_size)
        for m in mappings
    ], page_size


def _no_overlap(ranges: list[tuple[int, int]], of: str) -> None:
    end = 0
    for start, size in sorted(ranges):
        if start < end:
            raise SourceError(f"the handover maps a part of {of} twice")
        end = start + size


class Restoring:
    """One restore: one monitor, one snapshot."""

    def __init__(
        self,
        endpoint: Endpoint,
        uffd_socket: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        identity: bytes | None = None,
        parameters: Parameters | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._dialling = dialling(parameters or Parameters(), endpoint)
        self._channel_keys = ChannelKeys(False)
        self.journal = Journal("restore", "")
        self.status = Status.NONE
        self.statistics = Statistics("destination")
        self.statistics.postcopy = True
        self.on_progress = on_progress
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda name, data: None
        self._identity = identity or secrets.token_bytes(16)
        self._listener = HandoverListener(uffd_socket)
        self._vmm: VmmConnection | None = None
        self._pidfd = -1
        self._memory: ArmedMemory | None = None
        self._nothing = RamFile(os.memfd_create("pageferry-no-file", os.MFD_CLOEXEC), "guest")
        self._blocks: list[RamBlock] = []
        self._faults: Faults | None = None
        self._counters: Counters | None = None
        self._pool: Pool | None = None
        self._failure: asyncio.Future[None] | None = None
        self._dead: GuestGone | None = None  # the monitor has ended
        self._wake = asyncio.Event()
        self._snapshot = ""  # what the first offer was of
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._attempts = 0
        self._locks_may_be_held = False
        self._run: asyncio.Task[Any] | None = None

    def __repr__(self) -> str:
        return f"<Restoring {self.endpoint} {self.status.value}>"

    # ---- what others may ask -------------------------------------------------------------

    def query(self) -> dict[str, Any]:
        """query-migrate."""
        report = self.statistics.report(self.status, None)
        if self._faults is not None:
            report |= self._faults.report()
        guest_rate, wire_rate = self.statistics.rates()
        left = self.statistics.remaining_pages * PAGE_SIZE
        eta = round(left / guest_rate, 1) if guest_rate else None
        report["progress"] = {
            "rate": round(guest_rate), "wire-rate": round(wire_rate), "eta": eta,
            "round-bytes": self.statistics.round_pages * PAGE_SIZE,
        }  # fmt: skip
        return report

    def query_parameters(self) -> dict[str, Any]:
        return {}

    def query_processes(self) -> list[dict[str, Any]]:
        """What each process has cost so far, as `processes` of the result."""
        faults = self._faults.pool if self._faults is not None else None
        return self.statistics.processes_now(self._pool, faults)

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        raise PeerRefused("parameters are the source's to set")

    def cancel(self) -> None:
        """End it. A guest that has not got all of its memory stays without."""
        if self._run is not None:
            self._run.cancel()

    def can_be_yanked(self) -> bool:
        return self._failure is not None

    def yank(self) -> None:
        """Drop the connection, whatever hangs on it; it is dialled again."""
        for pool in (self._pool, self._faults.pool if self._faults is not None else None):
            if pool is not None:
                pool.hurry()
        self._fail(PeerLost("yanked: somebody had it cut, because it hung"))

    def start_postcopy(self) -> None:
        """It is nothing else."""

    def go_on(self) -> None:
        """It never waits."""

    def pause(self) -> None:
        """Drop the connection; it is dialled again."""
        self._fail(PeerLost("paused because somebody asked for it"))

    def recover(self, where: str | None) -> None:
        """It does so by itself."""

    # ---- the run -------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """To the last page. Returns the report, raises the error."""
        self._run = asyncio.current_task()
        self._become(Status.SETUP)
        try:
            await self._restore()
        except Exception as e:
            error = as_ours(e)
            self._end(error.message)
            await to_its_end(self._close())
            error.data["report"] = self._last_report()
            raise error from e
        except asyncio.CancelledError:
            self._end("interrupted")
            await to_its_end(self._close())
            self._last_report()
            raise
        self._become(Status.COMPLETED)
        self.statistics.ended = time.monotonic()
        await self._close()
        return self._last_report()

    def _last_report(self) -> dict[str, Any]:
        report = self.query()
        report.pop("progress")
        self.journal.over(narration.ended(report))
        return report

    def _end(self, why: str) -> None:
        self.status = Status.FAILED
        self.journal.became(self.status, why)

    def _become(self, status: Status) -> None:
        self.status = advance(self.status, status)
        self.journal.became(status)
        tell(self.on_event, "MIGRATION", {"status": status.value})

    def _fail(self, error: Exception) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _restore(self) -> None:
        while True:
            try:
                if self._dead is not None:
                    raise self._dead
                await self.journal.during("connection", self._connection)
                return
            except GuestGone:
                raise
            except PageferryError as e:
                if self._memory is None:
                    raise  # nobody depends on us yet
                self._pause(e)
                self.journal.info("%s is tried again in %.0f s", self.endpoint, _RETRY_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _RETRY_SECONDS)

    def _pause(self, error: PageferryError) -> None:
        if self.status is Status.POSTCOPY_RECOVER or self.status is Status.POSTCOPY_ACTIVE:
            self._become(Status.POSTCOPY_PAUSED)
            _log.warning("restore paused: %s", error)
        self.statistics.extra["paused-because"] = error.message
        self._progress()

    async def _connection(self) -> None:
        """One connection to the source: from Pull to Ended."""
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        self._failure.add_done_callback(lambda done: done.cancelled() or done.exception())
        finding = asyncio.ensure_future(find(self.endpoint))
        finding.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait([finding, self._failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            finding.cancel()
        if self._failure.done():
            self._failure.result()
        finding.result()
        zmq_context = zmq.asyncio.Context()
        # the first 16 bytes are who we are; each connection is a new one
        identity = self._identity + self._attempts.to_bytes(4, "big")
        self._attempts += 1
        curve = self._dialling.curve if self._dialling is not None else None
        self._channel_keys = ChannelKeys(curve is not None)
        watching: list[Any] = []
        sock = connect(
            zmq_context, self.endpoint, identity, control=True, curve=curve, watched=watching
        )
        control = Control(Role.DESTINATION, sock.send, f"the source at {self.endpoint}")
        control.note = self.journal.control
        heard: asyncio.Queue[messages.AnyMessage] = asyncio.Queue()
        tasks = [
            loop.create_task(c)
            for c in (self._read(sock, control, heard), self._conversation(control, heard))
        ]
        handshake = loop.create_task(self._watch_handshake(watching[0]))
        handshake.add_done_callback(self._ended)
        try:
            await asyncio.wait([*tasks, self._failure], return_when=asyncio.FIRST_COMPLETED)
            for task in (tasks[1], tasks[0]):
                if task.done():
                    task.result()
                    return
            self._failure.result()
        except PageferryError as e:
            with contextlib.suppress(PageferryError, zmq.ZMQError):
                await (control.pause(e) if control.session.may_pause else control.abort(e))
            raise
        finally:
            for task in (*tasks, handshake):
                task.cancel()
            await asyncio.gather(*tasks, handshake, return_exceptions=True)
            stop_watching(sock, watching[0])
            if self._failure.done():
                self._failure.exception()
            await self._drop_workers()
            sock.close()
            zmq_context.term()

    async def _watch_handshake(self, watching: Any) -> None:
        """Not to be let in, or to find somebody else, is an error; and so is a source whose key is
        revoked."""
        curve = self._dialling.curve if self._dialling is not None else None
        if (error := await refusal(watching, self.endpoint, curve)) is not None:
            raise error
        while self._dialling is not None:
            await asyncio.sleep(LOOK_SECONDS)
            self._dialling.check()

    async def _read(
        self, sock: Any, control: Control, heard: asyncio.Queue[messages.AnyMessage]
    ) -> None:
        while True:
            await asyncio.sleep(0)  # all others have a turn, however much the peer says
            message = control.heard(await sock.recv())
            if isinstance(message, messages.Abort):
                raise messages.error_of(message)
            if isinstance(message, messages.Paused):
                raise PeerLost(f"the source paused: {message.message}")
            if message is not None:
                heard.put_nowait(message)

    async def _conversation(
        self, control: Control, heard: asyncio.Queue[messages.AnyMessage]
    ) -> None:
        asking = asyncio.ensure_future(control.ask(messages.Pull(messages.PROTOCOL, __version__)))
        if not await control.first_sign(_HELLO_SECONDS):
            asking.cancel()
            raise ConnectError(
                f"something accepts connections at {self.endpoint} and does not answer as "
                f"`pageferry serve` does: check the address"
            )
        offer = await asking
        if isinstance(offer, messages.Refused):
            raise messages.error_of(offer)
        assert isinstance(offer, messages.Offer)
        self.journal.info(narration.offered(offer, str(self.endpoint)))
        alive = asyncio.ensure_future(control.keep_alive())
        alive.add_done_callback(self._ended)
        try:
            await self._fill(control, heard, offer)
        finally:
            alive.cancel()
            await asyncio.gather(alive, return_exceptions=True)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)

    async def _fill(
        self, control: Control, heard: asyncio.Queue[messages.AnyMessage], offer: messages.Offer
    ) -> None:
        self._check(offer)
        if self._memory is None:
            await self._meet_the_monitor(offer)
        layout = self._layout(first=self.status is Status.SETUP)
        if self.status is Status.POSTCOPY_PAUSED:
            self._become(Status.POSTCOPY_RECOVER)
        serving = await control.ask(layout)
        assert isinstance(serving, messages.Serving)
        if self.status is Status.SETUP:
            self._expect(serving)
            self.statistics.set_up = time.monotonic()
            self._become(Status.ACTIVE)
            self._become(Status.DEVICE)
        await self._start_workers(serving, offer.workers)
        assert self._faults is not None
        self.statistics.begin_round(1, self._faults.received.missing())
        self.journal.round_begins(1, self.statistics.round_pages)
        self.journal.info("%d pages are to come", self.statistics.round_pages)
        self._become(Status.POSTCOPY_ACTIVE)
        self.statistics.extra.pop("paused-because", None)
        await control.say(messages.Armed())
        watching = asyncio.ensure_future(self._watch())
        watching.add_done_callback(self._ended)
        try:
            message = await heard.get()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        if not isinstance(message, messages.PostcopyEnd):
            raise RemoteProtocolError(f"unexpected {type(message).__name__}")
        if missing := self._faults.received.missing():
            raise RemoteProtocolError(f"the source has sent all, and {missing} pages are missing")
        await self._faults.finish()
        await control.say(messages.Ended(self._faults.latency(), self._faults.statistics()))

    def _check(self, offer: messages.Offer) -> None:
        """An offer, and that it is of the snapshot that the guest began with."""
        if len(offer.blocks) != 1 or not 1 <= offer.blocks[0].size <= messages.MAX_BLOCK_SIZE:
            raise RemoteProtocolError("an offer of something that is no snapshot")
        if not 1 <= offer.workers <= messages.MAX_WORKERS:
            raise RemoteProtocolError(f"an offer of {offer.workers} channels")
        if self._snapshot and offer.uuid != self._snapshot:
            raise PeerRefused(
                f"{self.endpoint} serves another snapshot now: serve the one that the guest began "
                f"with there again",
                field="uuid",
            )
        self._snapshot = offer.uuid

    # ---- the monitor ---------------------------------------------------------------------

    async def _meet_the_monitor(self, offer: messages.Offer) -> None:
        """Wait until a monitor hands over its guest's memory; who hands over nonsense is turned
        away and the next is welcome."""
        spec = offer.blocks[0]
        while self._memory is None:
            connection = await self._accept()
            descriptors: list[int] = []
            try:
                mappings, descriptors = await self._handover(connection)
                regions, page_size = regions_of(mappings, spec)
            except SourceError as e:
                _log.warning("a monitor at %s was turned away: %s", self._listener.path, e)
                self.statistics.extra["turned-away"] = (
                    self.statistics.extra.get("turned-away", 0) + 1
                )
                for fd in descriptors:
                    os.close(fd)
                connection.close()
                continue
            for fd in descriptors[1:]:  # a memory file, which is not needed
                os.close(fd)
            self._vmm = connection
            self._memory = ArmedMemory(descriptors[0], regions)
            # there is no file to write: receivers install
            self._blocks = [RamBlock(Block("ram", spec.size, page_size), self._nothing, 0)]
            self._watch_the_monitor()
            self.journal.info(
                "a monitor (process %s) handed over its memory: %d regions, pages of %d bytes",
                connection.pid or "unknown", len(regions), page_size,
            )  # fmt: skip
        self._faults = Faults(
            self._blocks,
            self._memory,
            "",
            self._fail,
            direct=False,
            removing=context().Lock(),
            recorder=self.journal.lane,
        )
        self.statistics.urgent = self._faults.counters
        self.statistics.total_pages = sum(region.pages for region in self._memory.regions)

    async def _readable(self, fileno: int) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def readable() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(fileno, readable)
        try:
            await ready
        finally:
            loop.remove_reader(fileno)

    async def _accept(self) -> VmmConnection:
        while True:
            await self._readable(self._listener.fileno())
            connection = self._listener.accept()
            if connection is not None:
                return connection

    async def _handover(self, connection: VmmConnection) -> tuple[list[Mapping], list[int]]:
        while True:
            try:
                await asyncio.wait_for(self._readable(connection.fileno()), _HELLO_SECONDS)
            except TimeoutError as e:
                raise SourceError("it connected and handed nothing over") from e
            taken = connection.take()
            if taken is not None:
                return taken

    def _watch_the_monitor(self) -> None:
        """Its death ends everything, at once."""
        assert self._vmm is not None
        loop = asyncio.get_running_loop()
        if not self._vmm.pid:  # of another pid namespace: only its connection tells
            loop.add_reader(self._vmm.fileno(), self._monitor_died)
            return
        try:
            self._pidfd = os.pidfd_open(self._vmm.pid)
        except OSError as e:
            raise GuestGone("the monitor has ended right after its handover") from e
        loop.add_reader(self._pidfd, self._monitor_died)

    def _monitor_died(self) -> None:
        assert self._vmm is not None
        loop = asyncio.get_running_loop()
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
        else:
            loop.remove_reader(self._vmm.fileno())
        self._dead = GuestGone(
            f"the monitor (process {self._vmm.pid}) has ended before all of its memory was there"
        )
        self._wake.set()
        self._fail(self._dead)

    # ---- pages ---------------------------------------------------------------------------

    def _layout(self, *, first: bool) -> messages.Layout:
        assert self._memory is not None and self._faults is not None
        runs = sorted((r.first, r.pages) for r in self._memory.regions)
        return messages.Layout(
            self._memory.regions[0].page_size, [r[0] for r in runs], [r[1] for r in runs],
            b"" if first else self._faults.received.packed()[0], self._channel_keys.public,
        )  # fmt: skip

    def _expect(self, serving: messages.Serving) -> None:
        """What is to come; all else of what is mapped is zero."""
        assert self._memory is not None and self._faults is not None
        block = self._blocks[0]
        runs = messages.runs_of(serving, block.pages)
        mapped = np.zeros(block.pages, np.uint8)
        for region in self._memory.regions:
            mapped[region.first : region.first + region.pages] = 1
        wanted = np.zeros(block.pages, np.uint8)
        mark(wanted, runs, 1)
        if (wanted > mapped).any():
            raise RemoteProtocolError("pages that nobody asked for")
        host = block.spec.page_size // PAGE_SIZE
        if host > 1:
            groups = wanted[: len(wanted) // host * host].reshape(-1, host)
            if (groups.any(axis=1) != groups.all(axis=1)).any():
                raise RemoteProtocolError("parts of host pages")
        self._faults.received.expect(0, runs_of(np.flatnonzero(wanted)))

    async def _start_workers(self, serving: messages.Serving, workers: int) -> None:
        assert self._faults is not None
        n = len(serving.endpoints)
        if not 1 <= n == len(serving.tokens) == workers <= messages.MAX_WORKERS:
            raise RemoteProtocolError("the channels do not match what was offered")
        if any(len(token) != TOKEN_BYTES for token in (*serving.tokens, serving.urgent[1])):
            raise RemoteProtocolError("a channel's token is of another length than it can be")
        if self._counters is not None and self._counters.workers != n:
            raise RemoteProtocolError("the source has another number of channels than before")
        if self._counters is None:
            self._counters = self.statistics.counters = Counters(n, self.journal.lane)
        if self._locks_may_be_held:
            # a worker that was killed may have taken the lock along
            await self._faults.stop()
            self._faults.renew_lock(context().Lock())
            self._locks_may_be_held = False
        where = str(self.endpoint.sibling(serving.urgent[0]))
        curve = self._channel_keys.dials(serving.key)
        await self._faults.relink(serving.urgent[1], where, curve)
        self._pool = Pool("receiver", self._counters, self._on_job, self._fail)
        writing = context().Lock()
        self._ready = asyncio.Queue()
        await self._pool.start(
            receiver.main,
            [
                receiver.ReceiverJob(
                    self._blocks, self._counters, str(self.endpoint.sibling(endpoint)), token,
                    [True], writing, self._faults.for_receivers(), installing=True, dial=True,
                    curve=curve,
                )
                for endpoint, token in zip(serving.endpoints, serving.tokens, strict=True)
            ],
        )  # fmt: skip
        for _ in range(n):
            await self._ready.get()

    def _on_job(self, worker: Worker, job: jobs.AnyJob) -> None:
        if isinstance(job, jobs.Ready):
            self._ready.put_nowait(job.endpoint)
        else:
            self._fail(RemoteProtocolError(f"{worker!r} said {job!r}"))

    async def _watch(self) -> None:
        while True:
            assert self._pool is not None and self._faults is not None
            self._pool.check()
            self._faults.check()
            self._progress()
            await asyncio.sleep(_WATCH_SECONDS)

    def _progress(self) -> None:
        if self.on_progress is not None:
            tell(self.on_progress, self.query())

    async def _drop_workers(self) -> None:
        if self._pool is not None:
            await self._pool.close()
            self._locks_may_be_held |= self._pool.killed
        if self._faults is not None:
            self._locks_may_be_held |= self._faults.killed
            self._faults.unlink()

    async def _close(self) -> None:
        if self._vmm is not None:
            asyncio.get_running_loop().remove_reader(self._vmm.fileno())
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._listener.close()
        if self._pool is not None:
            await self._pool.close()
        if self._faults is not None:
            await self._faults.stop()
        faults = self._faults.pool if self._faults is not None else None
        self.statistics.remember_processes(self._pool, faults)
        if self._faults is not None:
            self.statistics.extra |= self._faults.report()
            self.statistics.urgent = self._faults.close()
            self._faults = None
        if self._counters is not None:
            self.statistics.counters = self._counters.freeze()
            self._counters.close()
        if self._memory is not None:
            self._memory.close()
        if self._vmm is not None:
            self._vmm.close()
        self._nothing.close()
