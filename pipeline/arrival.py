"""One migration that arrives: its control session, its receivers, its guest.

Checks, lays out, receives, runs the guest. A guest becomes whole or leaves nothing; after it runs
here nothing of the source matters any more. Must not know who listens (destination.py) and how
many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from .._version import __version__
from ..transport import messages
from ..transport.curve import Binds
from ..transport.errors import (
    Cancelled,
    DestinationError,
    GuestGone,
    LocalProtocolError,
    PageferryError,
    PeerLost,
    PeerRefused,
    PostcopyFailed,
    RemoteProtocolError,
    VerificationFailed,
    as_ours,
)
from ..transport.links import Endpoint
from ..transport.messages import (
    DIRECT,
    MAX_WORKERS,
    PAGE_SUMS,
    POSTCOPY,
    READ_BACK,
    SAMPLE,
    XBZRLE,
)
from ..transport.pages import PAGE_SIZE, Pages, Runs, total_pages
from ..transport.vmstate import Section
from ..workers import jobs, receiver
from ..workers.checks import Checks
from ..workers.content import (
    DIGEST_BYTES,
    asked_pages,
    equal_digests,
    sure_digests,
    take_digests,
)
from ..workers.counters import Counters
from ..workers.digest import block_digest, part_count
from ..workers.forking import context, end_a_hung_server
from ..workers.guests.base import DestinationGuest
from ..workers.guests.sample import SampleDestination, first_touch
from ..workers.pool import Pool, Worker
from ..workers.reserve import Reserve
from ..workers.snapshot_file import CheckedBlock
from . import narration
from .blocking import Blocking, MayHang, to_its_end
from .callbacks import tell
from .control import Control
from .device_state import HOOK_SECONDS, Arrived, take
from .faults import Faults
from .hooks import BeforeSwitchover
from .journal import Journal
from .security import LOOK_SECONDS, ChannelKeys, Peer
from .state import IN_POSTCOPY, Status, advance
from .statistics import Statistics

WATCH_SECONDS = 0.5
# Handing the last message to a link that may not take it any more.
_LAST_WORD_SECONDS = 0.3
# What has not come to an end so long after a yank is ended by force.
_YANK_SECONDS = 1.0
_log = logging.getLogger("pageferry")
# What a source says only when it switches over.
_SWITCHING = messages.DigestRequest | messages.Missing | messages.StatePart | messages.DeviceState
Progress = Callable[[dict[str, Any]], None]
OpenGuest = Callable[[messages.Hello], DestinationGuest]
OnEnd = Callable[[dict[str, Any] | None, PageferryError | None], None]


class Arrival:
    """One migration, on its destination host."""

    def __init__(
        self,
        hello: messages.Hello,
        control: Control,
        endpoint: Endpoint,
        open_guest: OpenGuest,
        on_progress: Progress | None,
        on_event: Callable[[str, dict[str, Any]], None],
        reserve: Reserve | None = None,
        peer: Peer | None = None,
    ) -> None:
        self._reserve = reserve
        self.hello = hello
        self.peer = peer
        self._channel_keys = ChannelKeys(peer is not None)
        self._their_key = hello.key
        self.journal = Journal("destination", hello.uuid)
        self.control = control
        control.note = self.journal.control
        self.endpoint = endpoint
        self.status = Status.NONE
        self.statistics = Statistics("destination")
        self.guest: DestinationGuest | None = None
        self.error: PageferryError | None = None
        self.paused_by: PageferryError | None = None  # the last pause; for others to read
        self.finished = asyncio.get_running_loop().create_future()
        self._open_guest = open_guest
        self.on_progress = on_progress
        self.on_event = on_event
        # with its report or its error, when its guest was let go; neither: it was stopped
        self.on_end: OnEnd | None = None
        self._counters: Counters | None = None
        self._pool: Pool | None = None
        self._tokens: list[bytes] = []
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._digests: asyncio.Queue[jobs.DigestDone | jobs.CheckDone] = asyncio.Queue()
        self._state = bytearray()  # parts of the device state that have come
        self.sections: Sequence[Section] = ()  # of tools here, to be loaded
        self.here: Sequence[CheckedBlock] = ()  # the source's blocks, if it is a snapshot here
        self._hooks = MayHang(HOOK_SECONDS)
        self._checks: Checks | None = None  # frames have sums of their pages
        self._checked = PAGE_SUMS not in hello.capabilities
        self._tasks: list[asyncio.Task[Any]] = []
        self._committed = self._runs = False
        self._call = Blocking()
        self._starting: asyncio.Task[None] | None = None
        self._faults: Faults | None = None
        self._postcopy = False  # the source named what is to come after the guest runs
        self._pausing: asyncio.Task[None] | None = None
        self._setting_back: asyncio.Task[None] | None = None
        self.resumed = False  # its source came back on another connection, once at least
        self._early: BaseException | None = None
        self.ended: messages.Ended | None = None
        self._dirty_rate = 0  # bytes a second, as the source says
        self._missing = 0  # pages that are to come after the guest runs
        self.slot = 0  # among those that arrive at the same time
        self.trial = hello.kind == SAMPLE
        # awaited before the source may switch over; if it raises, the migration has failed
        self.before_switchover: BeforeSwitchover | None = None
        self._acked = False
        self._cpu_at_start = 0.0  # of receivers

    def __repr__(self) -> str:
        return f"<Arrival {self.hello.uuid} {self.status.value}>"

    def query(self) -> dict[str, Any]:
        """query-migrate."""
        report = self.statistics.report(self.status, None)
        if self._faults is not None and self._postcopy:
            report |= self._faults.report()
        if self.trial:
            report["trial"] = True
        guest_rate, wire_rate = self.statistics.rates()
        report["progress"] = {
            "rate": round(guest_rate),
            "wire-rate": round(wire_rate),
            "dirty-rate": self._dirty_rate,
            "round-bytes": self.statistics.round_pages * PAGE_SIZE,
            "eta": None,
        }
        return report

    def query_parameters(self) -> dict[str, Any]:
        """What the source has said of them."""
        return {
            "multifd-channels": self.hello.workers,
            "batch-pages": self.hello.batch_pages,
            "capabilities": ", ".join(self.hello.capabilities),
        }

    def query_processes(self) -> list[dict[str, Any]]:
        """What each process has cost so far, as `processes` of the result."""
        return self.statistics.processes_now(*self._pools())

    def _pools(self) -> tuple[Pool | None, Pool | None]:
        return self._pool, self._faults.pool if self._faults is not None else None

    def _become(self, status: Status) -> None:
        self.status = advance(self.status, status)
        self._emit()

    def _emit(self) -> None:
        self.journal.became(self.status, str(self.error or ""))
        tell(self.on_event, "MIGRATION", {"status": self.status.value})

    def fail(self, error: BaseException) -> None:
        """End it. Once Run has come only the guest itself can still fail: it may be running,
        and the source has been told nothing to the contrary. In postcopy what breaks is a pause."""
        if not self._committed:
            self._end(error)
        elif self.status in IN_POSTCOPY and isinstance(error, GuestGone):
            self._end(_lost(error))
        elif self.status in (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER):
            self._pause(error)
        elif self.status is Status.DEVICE and self._early is None:
            self._early = error  # a pause, once it is known that the guest runs

    @property
    def starting(self) -> bool:
        """The guest was told to run, and has not said that it does."""
        return self._committed and self.status is Status.DEVICE

    def yank(self) -> None:
        """Cut everything that may hang. As if all of it had broken; nobody waits for a guest that
        is being started any longer either: it is ended, unless it says in time that it runs."""
        _log.warning("yanked: nothing is waited for any more")
        self.fail(PeerLost("yanked: somebody had it cut, because it hung"))
        self._hurry_workers()
        later = asyncio.get_running_loop().call_later
        later(_YANK_SECONDS, self._end_a_hung_start)
        if self.starting:  # a moment more, in which it may run
            later(_YANK_SECONDS, self._hurry_start)
        elif self.guest is not None and not self._committed:
            self.guest.yank()

    def _end_a_hung_start(self) -> None:
        """Others' processes end with the fork server: so only if we wait for it ourselves."""
        starting = any(pool is not None and pool.is_starting for pool in self._pools())
        if starting or self._call.busy:
            end_a_hung_server()

    def _hurry_start(self) -> None:
        if self.starting and not self._runs and self.guest is not None:
            self.guest.yank()

    def _hurry_workers(self) -> None:
        for pool in self._pools():
            if pool is not None:
                pool.hurry()

    def abandon(self, error: BaseException) -> None:
        """Nobody waits for the rest of a postcopy any more: the guest is thrown away."""
        if self.status in IN_POSTCOPY:
            self._end(_lost(error))
        else:
            self.fail(error)

    def _end(self, error: BaseException) -> None:
        if self.finished.done():
            return
        self.error = as_ours(error)
        self.finished.set_result(None)

    def _task(self, coroutine: Any) -> None:
        def done(task: asyncio.Task[Any]) -> None:
            with contextlib.suppress(ValueError):  # it may be of a connection that was dropped
                self._tasks.remove(task)  # a message is one, and a source may say any number
            if not task.cancelled() and (error := task.exception()) is not None:
                self.fail(error)

        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(done)
        self._tasks.append(task)

    # ---- the run -------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """From Hello to the end. Returns the report, raises the error."""
        self.journal.info(narration.arrived(self.hello))
        self._become(Status.SETUP)
        self._task(self._set_up())
        cancelled = False
        try:
            await self.finished
        except asyncio.CancelledError:
            cancelled = True
            self.error = self.error or Cancelled("the receiver was stopped")
        await to_its_end(self._close())
        report = self.query()
        report.pop("progress")
        self.journal.over(narration.ended(report))
        if cancelled:
            raise asyncio.CancelledError
        if self.error is not None:
            self.error.data["report"] = report
            raise self.error
        return report

    async def _set_up(self) -> None:
        # at once, so that the source knows whom it talks to, and then while memory is laid out
        await self.control.say(messages.Ping(0))
        self._keep_contact(self.control)
        try:
            # a trial run never meets what is to arrive here
            self.guest = SampleDestination() if self.trial else self._open_guest(self.hello)
            await self.journal.during("lay out", self._call, self.guest.lay_out, self.hello)
        except PageferryError as e:
            await self.control.say(messages.refusal(e))
            raise
        self.statistics.total_pages = sum(block.pages for block in self.guest.blocks)
        self._task(self._watch())
        urgent = await self._start_faults() if POSTCOPY in self.hello.capabilities else None
        self._counters = self.statistics.counters = Counters(self.hello.workers, self.journal.lane)
        if PAGE_SUMS in self.hello.capabilities:
            self._checks = Checks([block.pages for block in self.guest.blocks])
        endpoints = await self._start_receivers(installing=False)
        self.statistics.set_up = time.monotonic()
        assert self._pool is not None
        self._cpu_at_start = self._pool.cpu_seconds()
        self._become(Status.ACTIVE)
        hook = None if self.trial else self.before_switchover
        self._acked = hook is None
        await self.control.say(
            messages.Welcome(
                __version__,
                endpoints,
                self._tokens,
                self.guest.fresh,
                self.guest.kind,
                urgent,
                list(self.guest.have),
                self.guest.compares,
                self._channel_keys.public,
                acks=hook is not None,
            )
        )
        if hook is not None:
            self._task(self.journal.during("before the switchover", self._get_ready, hook))

    async def _get_ready(self, hook: BeforeSwitchover) -> None:
        """Until then the source does not stop its guest."""
        await hook(self.hello)
        self._acked = True
        await self.control.say(messages.SwitchoverAck())

    def _keep_contact(self, control: Control) -> None:
        self._task(control.keep_alive())
        if self.peer is not None:
            self._task(self._watch_key(self.peer))

    async def _watch_key(self, peer: Peer) -> None:
        """A source whose key is revoked is cut off: see `fail` for what becomes of its guest."""
        while True:
            peer.check()
            await asyncio.sleep(LOOK_SECONDS)

    async def _start_faults(self) -> tuple[str, bytes]:
        """The fault process, before anything can touch the memory."""
        assert self.guest is not None
        if self.guest.memory is None:
            error = PeerRefused(
                f"a {self.hello.kind}: guest does not run here, so that it cannot run before its "
                f"memory is there: leave --postcopy out",
                field=POSTCOPY,
            )
            await self.control.say(messages.refusal(error))
            raise error
        # A page that is brought without a claim, written and given back could be placed once more
        # by a receiver that was just about to.
        here = () if self.guest.gives_back else self.here
        self._faults = Faults(
            self.guest.blocks, self.guest.memory, self._listen_at(MAX_WORKERS), self.fail,
            direct=DIRECT in self.hello.capabilities, recorder=self.journal.lane, here=here,
        )  # fmt: skip
        self.statistics.urgent = self._faults.counters
        token = secrets.token_bytes(16)
        return await self._faults.start(token, curve=self._curve()), token

    def _curve(self) -> Binds | None:
        return self._channel_keys.binds(self._their_key, self.hello.uuid)

    async def _start_receivers(self, *, installing: bool) -> list[str]:
        assert self.guest is not None and self._counters is not None
        n = self._counters.workers
        self._ready = asyncio.Queue()
        self._tokens = [secrets.token_bytes(16) for _ in range(n)]
        # those of a postcopy lower their priority for good
        reserve = self._reserve if self._faults is None else None
        self._pool = Pool("receiver", self._counters, self._on_job, self.fail, reserve)
        writing, curve = context().Lock(), self._curve()
        payloads = [
            receiver.ReceiverJob(
                self.guest.blocks, self._counters, self._listen_at(i), self._tokens[i],
                self.guest.fresh, writing,
                self._faults.for_receivers() if self._faults is not None else None, installing,
                checks=self._checks, read_all=READ_BACK in self.hello.capabilities, curve=curve,
                deltas=XBZRLE in self.hello.capabilities, here=self.here,
            )
            for i in range(n)
        ]  # fmt: skip
        await self._pool.start(receiver.main, payloads)
        where = {}
        for _ in range(n):
            index, _, endpoint = (await self._ready.get()).partition(" ")
            where[int(index)] = endpoint
        return [where[i] for i in range(n)]

    def _listen_at(self, channel: int) -> str:
        if self.endpoint.scheme == "ipc":
            slot = f"{self.slot}-" if self.slot else ""
            return f"ipc://{self.endpoint.path}.{slot}{channel}"
        return str(Endpoint("tcp", self.endpoint.host, 0))

    def _on_job(self, worker: Worker, job: jobs.AnyJob) -> None:
        match job:
            case jobs.Ready():
                self._ready.put_nowait(f"{worker.index} {job.endpoint}")
            case jobs.DigestDone() | jobs.CheckDone():
                self._digests.put_nowait(job)
            case _:
                self.fail(LocalProtocolError(f"{worker!r} said {job!r}"))

    async def _watch(self) -> None:
        while True:
            if self._pool is not None:
                self._pool.check()
            if self._faults is not None:
                self._faults.check()
            assert self.guest is not None
            self.guest.check()
            if self.on_progress is not None and self.status is not Status.SETUP:
                tell(self.on_progress, self.query())
            await asyncio.sleep(WATCH_SECONDS / 2)

    async def _watch_guest(self) -> None:
        while True:
            assert self.guest is not None
            self.guest.check()
            await asyncio.sleep(WATCH_SECONDS)

    # ---- what the source says ------------------------------------------------------------

    def heard(self, data: bytes) -> None:
        """A message of the source; it is handled beside, so that heartbeats go on."""
        if self.finished.done() or self.status is Status.POSTCOPY_PAUSED:
            return  # over: above all no Run is taken up any more
        try:
            message = self.control.heard(data)
        except PageferryError as e:
            self.fail(e)
            return
        if isinstance(message, messages.Abort):
            self.fail(messages.error_of(message))
        elif not self._acked and isinstance(message, _SWITCHING):
            self.fail(RemoteProtocolError("the source did not wait for SwitchoverAck"))
        elif isinstance(message, messages.Paused):
            self.fail(PeerLost(f"the source paused: {message.message}"))
        elif isinstance(message, messages.Run):
            self._committed = True  # before anything else can happen
            starting = self.journal.during("start the guest", self._start_guest)
            self._starting = asyncio.get_running_loop().create_task(starting)
        elif isinstance(message, messages.StatePart):
            self._state += message.part
            if len(self._state) > messages.MAX_STATE:
                self.fail(RemoteProtocolError("a device state above the bound"))
        elif message is not None:
            name = type(message).__name__
            self._task(self.journal.during(name, self._handle, message))

    async def _handle(self, message: messages.AnyMessage) -> None:
        assert self.guest is not None
        match message:
            case messages.Round():
                self._dirty_rate = message.dirty_rate
                self.statistics.begin_round(message.number, message.pages)
                self.journal.round_begins(message.number, message.pages)
                tell(self.on_event, "MIGRATION_PASS", {"pass": message.number})
            case messages.Discard():
                await self._discard(message)
                await self.control.say(messages.Discarded())
            case messages.Contents():
                await self.control.say(messages.Held(await self._compare(message)))
            case messages.Missing():
                await self._expect(message)
                await self.control.say(messages.Discarded())
            case messages.PostcopyEnd():
                await self._end_postcopy()
            case messages.DigestRequest():
                await self.control.say(await self._verify(message))
            case messages.DeviceState():
                if not self._checked:
                    raise RemoteProtocolError("memory was to be verified, and was not")
                self._become(Status.DEVICE)
                if message.postcopy != self._postcopy:
                    raise RemoteProtocolError("pages are missing, and nobody says postcopy")
                if message.postcopy:
                    await self._install_from_now_on()
                elif self._faults is not None:
                    await self._faults.finish()  # all is here, and soon nobody serves it
                came = await self._take_state(message)
                await self._call(self.guest.load_state, message.kind, came.guest, came.running)
                await self.control.say(messages.StateLoaded())
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__}")

    async def _take_state(self, message: messages.DeviceState) -> Arrived:
        """What came of the guest. What tools here wait for is loaded: their hooks hold up nothing
        but this migration."""
        assert self.guest is not None
        state, keeps_all = bytes(self._state) + message.state, self.guest.keeps_sections
        self._state.clear()
        try:
            came = await self._hooks(
                take, state, message.kind, self.sections, keeps_all, self.finished.done
            )
        except TimeoutError as e:
            raise DestinationError(
                f"hooks of device state took more than {HOOK_SECONDS:.0f} s"
            ) from e
        self.statistics.extra["run-state"] = came.runstate
        return came

    async def _start_guest(self) -> None:
        """Run the guest. It runs or it does not: nothing interrupts this."""
        assert self.guest is not None
        try:
            detail = await self._call(self.guest.run)
        except Exception as e:
            self._end(e)
            return
        self._runs = True  # and is ended by nobody any more
        # Said only now: the guest is whole here, whatever happens to this message.
        with contextlib.suppress(PageferryError, zmq.ZMQError):
            await self.control.say(messages.Running(detail, self._cost()))
        self.statistics.extra["destination"] = detail
        if self._postcopy:
            self.statistics.running = time.monotonic()
            self._become(Status.POSTCOPY_ACTIVE)
            self._setting_back = asyncio.get_running_loop().create_task(self._set_back())
            if self._early is not None:
                self.fail(self._early)
            return
        await self._set_back()
        self._complete()

    def receiver_cpu(self) -> float | None:
        """Processor seconds of its receivers so far; None if there are none."""
        return self._pool.cpu_seconds() if self._pool is not None else None

    def _cost(self) -> dict[str, int]:
        """What a trial run cost here: microseconds of the receivers; what a MiB that is touched
        for the first time costs more, in nanoseconds; processors."""
        if not self.trial or self._pool is None:
            return {}
        return {
            "receivers-cpu-us": round((self._pool.cpu_seconds() - self._cpu_at_start) * 1e6),
            "first-touch-ns": round(first_touch() * (1 << 20) * 1e9),
            "processors": len(os.sched_getaffinity(0)),
        }

    async def _set_back(self) -> None:
        assert self.guest is not None
        try:
            await self._call(self.guest.started)
        except PageferryError as e:
            _log.warning("the guest's host is not set as before: %s", e)

    def _complete(self) -> None:
        self._become(Status.COMPLETED)
        self.statistics.ended = time.monotonic()
        if not self.finished.done():
            self.finished.set_result(None)

    async def _discard(self, message: messages.Discard) -> None:
        block, runs = self._runs_of(message)
        assert self.guest is not None
        await self._call(self.guest.blocks[block].clear, runs)

    async def _compare(self, message: messages.Contents) -> bytes:
        assert self.guest is not None
        if not self.guest.compares:
            raise RemoteProtocolError("nobody said that contents are compared here")
        index, runs = self._runs_of(message)
        # a last page that is partial has none; and a list of pages is as long as they are many
        if not 0 <= DIGEST_BYTES * total_pages(runs) - len(message.digests) <= DIGEST_BYTES:
            raise RemoteProtocolError("as many digests as pages were expected")
        pages = asked_pages(runs, self.guest.blocks[index])
        if {len(message.digests), len(message.sure or message.digests)} != {
            DIGEST_BYTES * len(pages)
        }:
            raise RemoteProtocolError("as many digests as pages were expected")
        if not message.sure:
            found = await self._call(self.guest.may_hold, index, pages, message.digests)
            return np.packbits(found).tobytes()
        have = await self._call(self.guest.held, index, pages, message.digests, message.sure)
        if READ_BACK in self.hello.capabilities:
            made = np.flatnonzero(have)
            await self._read_back(index, pages[made], take_digests(message.sure, made))
        if self._checks is not None:
            self._checks.view(index)[pages[have != 0]] = 1
        return np.packbits(have).tobytes()

    async def _read_back(self, index: int, pages: Pages, digests: bytes) -> None:
        """VerificationFailed if pages that were made here do not hold what they have to."""
        assert self.guest is not None
        block = self.guest.blocks[index]
        equal = equal_digests(digests, await self._call(sure_digests, block, pages))
        if not equal.all():
            raise VerificationFailed(
                f"{block.file.name} does not hold what was written to it, in "
                f"{len(pages) - int(equal.sum())} pages of {block.name} that other images had",
                blocks=[block.name],
            )

    def _runs_of(
        self, message: messages.Discard | messages.Missing | messages.Contents
    ) -> tuple[int, Runs]:
        """Block and pages that the source names, checked."""
        assert self.guest is not None
        if not 0 <= message.block < len(self.guest.blocks):
            raise RemoteProtocolError(f"pages of block {message.block}, which was not announced")
        block = self.guest.blocks[message.block]
        runs = messages.runs_of(message, block.pages)
        return message.block, runs

    # ---- postcopy ------------------------------------------------------------------------

    async def _expect(self, message: messages.Missing) -> None:
        """Throw away what we have of these pages: from now on they are missing."""
        if self._faults is None:
            raise RemoteProtocolError("pages are to come later, and nobody asked for postcopy")
        block, runs = self._runs_of(message)
        assert self.guest is not None
        host = self.guest.blocks[block].spec.page_size // PAGE_SIZE
        if host > 1 and ((runs[0] % host).any() or (runs[1] % host).any()):
            raise RemoteProtocolError("a part of a host page is to come later")
        if not self._postcopy:
            # between the hole and the note that it is no zero page nobody may be answered
            await self._faults.hold(True)
            self._postcopy = True
        await self._call(self._make_missing, block, runs)
        self._faults.received.expect(block, runs)
        self._missing += int(runs[1].sum())

    def _make_missing(self, block: int, runs: Runs) -> None:
        assert self.guest is not None
        ram = self.guest.blocks[block]
        ram.clear(runs)
        if ram.spec.page_size == PAGE_SIZE and self.guest.may_be_huge(block) and ram.has_data(runs):
            raise DestinationError(
                f"pages of {ram.name} stay there as zeros when they are given back: the memory is "
                f"on transparent huge pages; move it without --postcopy, or to a tmpfs that is "
                f"mounted with huge=never"
            )

    async def _install_from_now_on(self) -> None:
        """Receivers write no file any more: what comes is installed in the guest."""
        assert self._pool is not None
        self.statistics.postcopy = True
        self.statistics.stopped = time.monotonic()
        self.statistics.begin_round(self.statistics.rounds, self._missing)
        self._pool.say_all(jobs.Postcopy())
        for _ in self._pool.workers:
            await self._ready.get()
        assert self._faults is not None
        await self._faults.hold(False)

    async def _end_postcopy(self) -> None:
        assert self._faults is not None
        if missing := self._faults.received.missing():
            raise RemoteProtocolError(f"the source has sent all, and {missing} pages are missing")
        await self._faults.finish()
        self.statistics.finish_round()
        assert self.guest is not None
        await self._call(self.guest.arrived)
        self.ended = messages.Ended(self._faults.latency(), self._faults.statistics())
        with contextlib.suppress(PageferryError, zmq.ZMQError):  # it may ask again
            await self.control.say(self.ended)
        self._complete()

    def _pause(self, error: BaseException) -> None:
        """The connection is gone: the guest runs on and sleeps on what is missing."""
        _log.warning("postcopy paused: %s", error)
        self.paused_by = as_ours(error)
        self.statistics.extra["paused-because"] = str(error)
        self._become(Status.POSTCOPY_PAUSED)
        # what belongs to the connection is taken here and now: another may come at once
        tasks, self._tasks = self._tasks, []
        letting_go = self._let_go(str(error), self._pausing, tasks, self.control)
        self._pausing = asyncio.get_running_loop().create_task(letting_go)
        self._task(self._watch_guest())

    async def _let_go(
        self,
        reason: str,
        before: asyncio.Task[None] | None,
        tasks: list[asyncio.Task[Any]],
        control: Control,
    ) -> None:
        """Drop everything that used a connection, once the one before is dropped. A recovery that
        comes meanwhile waits for this, so that the pool is still the old connection's: one of its
        tasks may have started it after the pause was decided."""
        if before is not None:
            await before
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(PageferryError, zmq.ZMQError):
            await control.pause(PeerLost(reason))
        if self._faults is not None:
            self._faults.unlink()
        if self._pool is not None:
            await self._pool.close()

    def resume(self, message: messages.Resume, control: Control) -> None:
        """The source is back, on a new connection."""
        if self.status is Status.POSTCOPY_ACTIVE:
            self._pause(PeerLost("the source has connected again"))
        elif self.status is Status.POSTCOPY_RECOVER:
            self._pause(PeerLost("the source has connected once more"))
        self._become(Status.POSTCOPY_RECOVER)
        self.resumed = True
        self.journal.info("the source is back")
        self.control = control
        control.note = self.journal.control
        self._task(self.journal.during("resume", self._resume, message, control))

    async def _resume(self, message: messages.Resume, control: Control) -> None:
        assert self._faults is not None and self._counters is not None
        await control.say(messages.Ping(0))
        if self._pausing is not None:
            await asyncio.shield(self._pausing)
        self._keep_contact(control)
        self._channel_keys = ChannelKeys(self.peer is not None)
        self._their_key = message.key
        token = secrets.token_bytes(16)
        urgent = await self._faults.relink(token, curve=self._curve())
        self._task(self._watch())  # not before: one that stands still is replaced in there
        endpoints = await self._start_receivers(installing=True)
        if self.status is not Status.POSTCOPY_RECOVER or self.control is not control:
            return
        self.statistics.extra.pop("paused-because", None)
        self._become(Status.POSTCOPY_ACTIVE)
        await control.say(
            messages.Resumed(
                endpoints,
                self._tokens,
                (urgent, token),
                self._faults.received.packed(),
                self._channel_keys.public,
            )
        )

    async def _verify(self, message: messages.DigestRequest) -> messages.Digests:
        """Digests of all blocks; or, with page sums, how much is there that was not sent."""
        assert self.guest is not None
        parts = [part_count(block.pages) for block in self.guest.blocks]
        if (message.kept is not None) != (self._checks is not None):
            raise RemoteProtocolError("verification is not of the kind that was announced")
        if self._checks is None or message.kept is None:
            found = await self._by_part(jobs.Digest, parts)
            return messages.Digests([
                block_digest([done.digest for done in block if isinstance(done, jobs.DigestDone)])
                for block in found
            ])  # fmt: skip
        if any(map(any, message.kept)) and not self.guest.have:
            raise RemoteProtocolError("nobody said that anything is here already")
        self._checks.keep(message.kept)
        wrong = [
            sum(done.wrong for done in block if isinstance(done, jobs.CheckDone))
            for block in await self._by_part(jobs.Check, parts)
        ]
        self._checked = not any(wrong)
        return messages.Digests([], wrong)

    async def _by_part(
        self, kind: type[jobs.Digest] | type[jobs.Check], parts: list[int]
    ) -> list[list[jobs.DigestDone | jobs.CheckDone]]:
        """What the receivers say to a job of this kind for each part of each block."""
        assert self._pool is not None
        found: dict[tuple[int, int], jobs.DigestDone | jobs.CheckDone] = {}
        todo: Iterator[jobs.AnyJob] = (
            kind(i, n) for i in range(len(parts)) for n in range(parts[i])
        )
        for worker, job in zip(self._pool.workers, todo, strict=False):
            worker.say(job)
        turn = 0
        for _ in range(sum(parts)):
            done = await self._digests.get()
            found[done.block, done.part] = done
            job_ = next(todo, None)
            if job_ is not None:
                self._pool.workers[turn % len(self._pool.workers)].say(job_)
                turn += 1
        return [[found[i, n] for n in range(parts[i])] for i in range(len(parts))]

    # ---- the end -------------------------------------------------------------------------

    async def _close(self) -> None:
        """Let go of everything but a guest that runs. `heard` takes nothing up any more."""
        if self._starting is not None:
            await self._starting
        if self._pausing is not None:
            await asyncio.gather(self._pausing, return_exceptions=True)
        if self.status is Status.COMPLETED:
            self.error = None  # whatever came meanwhile came too late
        elif self._starting is None or self.status in IN_POSTCOPY:
            # before anything else: the source may be about to say Run
            await self._abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        steps = [self._stop_receivers]
        if self.status is not Status.COMPLETED:
            self.error = self.error or PageferryError("interrupted")
            self.status = Status.FAILED
            steps = [self._abort, self._discard_guest, self._stop_receivers]
            if self._starting is not None:
                steps = [self._discard_then_abort, self._stop_receivers]
        for step in (*steps, self._until_set_back):
            try:
                await step()
            except Exception as e:
                _log.warning("while ending a migration: %s", e)
        if self.status is Status.FAILED:
            self._emit()
        if self._counters is not None:
            self.statistics.counters = self._counters.freeze()
            self._counters.close()
        if self._checks is not None:
            self._checks.close()
        self._close_faults()

    def _close_faults(self) -> None:
        if self._faults is not None:
            self.statistics.extra |= self._faults.report() if self._postcopy else {}
            self.statistics.urgent = self._faults.close()
            self._faults = None

    async def _abort(self) -> None:
        with contextlib.suppress(PageferryError, zmq.ZMQError, TimeoutError):
            word = self.control.abort(self.error or PageferryError("interrupted"))
            await asyncio.wait_for(word, _LAST_WORD_SECONDS)

    async def _discard_guest(self) -> None:
        if self.guest is not None:
            self.guest.hurry()
        await self._call.idle()  # what is still being made would outlive its end
        if self.guest is not None:
            await self._call(self.guest.discard)

    async def _discard_then_abort(self) -> None:
        """It may have begun to run: the source is told that it does not when it cannot, and not
        told so if it may."""
        await self._discard_guest()
        await self._abort()

    async def _until_set_back(self) -> None:
        if self._setting_back is not None:
            await self._setting_back

    async def _stop_receivers(self) -> None:
        if self.status is Status.FAILED:
            self._hurry_workers()
        if self._pool is not None:
            await self._pool.close()
        if self._faults is not None:
            await self._faults.stop()
        self.statistics.remember_processes(*self._pools())


def _lost(error: BaseException) -> PostcopyFailed:
    return PostcopyFailed(f"the guest ran here and part of its memory never arrived: {error}")
