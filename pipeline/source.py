"""The coordinator on the source host: carries out what migration.py decides.

One event loop, one queue of events. Instructions run one at a time; failures, cancels and
the peer's messages come in between as events. Blocking work on the guest runs in a thread,
memory is touched only by the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import zmq
import zmq.asyncio

from .._version import __version__
from ..transport import messages
from ..transport.errors import (
    Cancelled,
    ConnectError,
    LocalProtocolError,
    PageferryError,
    PeerLost,
    RemoteProtocolError,
    SourceError,
    UsageError,
    as_ours,
)
from ..transport.handshake import refusal
from ..transport.links import TOKEN_BYTES, Endpoint, connect, parse_endpoint, stop_watching
from ..transport.pages import PAGE_SIZE, Bytes8, Pages, Runs, complement, runs_of, total_pages
from ..transport.session import Phase, Role
from ..transport.stream_addresses import is_stream, parse_stream
from ..transport.vmstate import Section
from ..workers import jobs, sender
from ..workers.bandwidth import Bandwidth
from ..workers.checks import pack_chunks
from ..workers.content import both_digests, sure_digests, take_digests
from ..workers.counters import Counters
from ..workers.digest import CHUNK_PAGES, block_digest, equal_chunks, part_count
from ..workers.forking import context, end_a_hung_server
from ..workers.guests.base import TRACKING_HASH, SourceGuest
from ..workers.latency import report as latency_report
from ..workers.page_table import CLEAN, PageTable
from ..workers.pool import Pool
from ..workers.received import unpack
from ..workers.reserve import Reserve
from ..workers.segments import Segment
from . import migration as core
from . import narration
from .background import Background
from .blocking import Blocking, MayHang, to_its_end
from .callbacks import tell
from .carriage import Carriage
from .control import Control, find
from .convergence import Convergence
from .crew import Crew, extents
from .deltas import Deltas
from .device_state import HOOK_SECONDS, compose, run_state
from .goals import Seeker
from .journal import Journal
from .measuring import RunningDirtyRate
from .parameters import NEVER, Parameters, changed
from .pressure import Pressure
from .releasing import Releasing
from .security import LOOK_SECONDS, ChannelKeys, check_open, dialling
from .stalls import Stalls
from .state import FINAL, IN_POSTCOPY, Status
from .statistics import RoundCost, Statistics
from .steering import Steering
from .switchover import Acknowledgement, Waits

HELLO_SECONDS = 5.0
# A destination that has everything needs this long at the most to say that it runs.
CONFIRM_SECONDS = 30.0
WATCH_SECONDS = 0.5
# Handing the last message to a link that may not take it any more.
_LAST_WORD_SECONDS = 0.3
# What has not come to an end so long after a yank is ended by force.
_YANK_SECONDS = 1.0
# Pages in a Scan job.
_SCAN_PAGES = 16384
# Pages in one Contents message.
_COMPARED_PAGES = 8192
# Runs in one Discard message.
_DISCARD_RUNS = 65536
# A block above 32 GiB is looked at in a thread: the control link must not fall silent.
_PAGES_IN_LOOP = 8 << 20
# Looking how much was written meanwhile costs at most one part in so many.
_LOOK_AHEAD_SHARE = 50
# A settle that took less had nothing to wait for.
_NOTHING_SECONDS = 0.0005

T = TypeVar("T")
_log = logging.getLogger("pageferry")


class Source:
    """One migration, on its source host."""

    # Set before run():
    # Awaited once before the guest is stopped, which may be some rounds later if that takes
    # long; if it raises, the guest goes on here.
    before_stop: Callable[[], Awaitable[None]] | None = None
    # What tools send beside memory (device_state.py).
    sections: Sequence[Section] = ()
    # What makes connections over byte streams, and carries the one there is.
    carriage: Carriage | None = None
    paused_by: PageferryError | None = None  # the last pause; for others to read

    def __init__(
        self,
        guest: SourceGuest,
        endpoint: Endpoint,
        parameters: Parameters,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        identity: bytes | None = None,
        name: str = "",
        reserve: Reserve | None = None,
    ) -> None:
        self.name, self._reserve = name, reserve
        self._identity = identity or secrets.token_bytes(16)
        self.guest = guest
        self.endpoint = endpoint
        self.parameters = parameters
        self._dialling = dialling(parameters, endpoint)
        self._channel_keys = ChannelKeys(False)
        self.convergence = Convergence(
            parameters.downtime_limit, parameters.max_rounds, parameters.max_bandwidth
        )
        self._call = Blocking()
        # Memory that nobody writes is verified while it moves, unless that is not wanted; what
        # somebody writes only if it is asked for, for then it stands still meanwhile.
        static = not guest.live and parameters.postcopy == NEVER and guest.kind != messages.SAMPLE
        verify = static if parameters.verify is None else parameters.verify
        self._sums = static and verify
        self._kept: list[list[bool]] = []  # chunks of each block that the destination has
        self.core = core.Migration(
            guest.live, guest.can_stop, verify, self.convergence,
            parameters.postcopy, parameters.postcopy_rounds,
            pauses=parameters.pause_before_switchover,
        )  # fmt: skip
        self._waits, self._ack = Waits(), Acknowledgement()
        self.statistics = Statistics("source", guest.helpers)
        self.uuid = str(uuid.uuid4())
        self.journal = Journal("source", self.uuid)
        self._pressure = Pressure(guest, parameters.throttle, self._call, self.journal)
        self.core.throttling = self._pressure.throttling
        self.on_progress = on_progress
        self.on_event = on_event or (lambda name, data: None)
        self._hooks = MayHang(HOOK_SECONDS)
        self._events: asyncio.Queue[core.Event] = asyncio.Queue()
        self._tasks: list[asyncio.Task[Any]] = []
        self._table: PageTable | None = None
        self._counters: Counters | None = None
        self._bandwidth: Bandwidth | None = None
        self._hashes: Segment | None = None
        self._deltas: Deltas | None = None
        self._scan_seconds = 0.0  # what the last scan of all memory took
        self._crew: Crew | None = None
        self._background: Background | None = None
        self._releasing: Releasing | None = None
        self._steering: Steering | None = None
        # processor seconds of the receivers, for whoever runs both ends
        self.receiver_cpu: Callable[[], float | None] = lambda: None
        self._cut = asyncio.Event()  # hand out no more of this round
        self._connections, self._opened = 0, False
        self._socket: Any = None
        self._context: zmq.asyncio.Context | None = None
        self._watching: list[Any] = []  # a socket that says what becomes of the handshake
        self._fresh: list[bool] = []
        self._have: list[bytes] = []  # digests of what the destination has already
        self._compares = False
        self._taken_at = time.monotonic()
        self._sending = False  # a round goes on, so nobody takes dirty pages
        self._written = (0, 0.0)  # pages dirty again, after so many seconds of a round
        self._written_due = 0.0
        self._status_told, self._driving = Status.NONE, False
        self.dirty_rates, self._stalls = RunningDirtyRate(guest, self._runs_here), Stalls()

    def __repr__(self) -> str:
        return f"<Source {self.guest.kind} to {self.endpoint} {self.core.status.value}>"

    # ---- what others may ask, at any time ------------------------------------------------

    def query(self) -> dict[str, Any]:
        """query-migrate."""
        report = self.statistics.report(self.core.status, self.convergence)
        report |= self._stalls.report()
        if self.guest.can_stop:
            report["downtime-limit"] = round(self.parameters.downtime_limit * 1000)
        if self._steering is not None:
            report |= self._steering.report()
        report |= self._pressure.report()
        if self._deltas is not None:
            report |= self._deltas.report(self.statistics.counters)
        report |= self._waits.report() | self._ack.report(self.statistics.stopped)
        if self._releasing is not None:
            report |= self._releasing.report()
        guest_rate, wire_rate = self.statistics.rates()
        report["progress"] = {
            "rate": round(guest_rate),
            "wire-rate": round(wire_rate),
            "dirty-rate": round(self.convergence.dirty_rate),
            "round-bytes": self.statistics.round_pages * PAGE_SIZE,
            "eta": self._eta(),
        }
        return report

    def _runs_here(self) -> bool:
        return not self.core.stopped

    def _eta(self) -> float | None:
        """Seconds, to the end: when the guest runs there, or all of its memory has come."""
        left, rate = self.statistics.remaining_pages, self.statistics.steady_rate()
        if rate <= 0:
            return None
        if not self.core.live or self.core.stopped:
            return round(left * PAGE_SIZE / rate, 1)
        written, since = self._written
        dirty_rate = self.convergence.dirty_rate_now(written, since)
        eta = self.convergence.eta(left, rate, written, dirty_rate, self.statistics.total_pages)
        return None if eta is None else round(eta, 1)

    def query_parameters(self) -> dict[str, Any]:
        return self.parameters.qmp()

    def query_processes(self) -> list[dict[str, Any]]:
        """What each process has cost so far, as `processes` of the result."""
        return self.statistics.processes_now(*self._pools())

    def _pools(self) -> tuple[Pool | None, Pool | None]:
        return (
            self._crew.pool if self._crew is not None else None,
            self._background.pool if self._background is not None else None,
        )

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        """migrate-set-parameters; takes effect with the next frame or decision."""
        before, p = self.parameters, changed(self.parameters, arguments)
        if self._deltas is not None and "xbzrle-cache-size" in arguments:
            self._deltas.resize(p.xbzrle_cache_size)  # first: it may not be possible
        self._slow_down(self._pressure.configure(p.throttle))
        if self._bandwidth is not None and self.core.status not in IN_POSTCOPY:
            self._bandwidth.set_rate(p.max_bandwidth)
        self.convergence.downtime_limit = p.downtime_limit
        # beside those that a wait has granted
        self.convergence.max_rounds += p.max_rounds - before.max_rounds
        self.convergence.max_bandwidth = p.max_bandwidth
        if self._background is not None:
            self._background.pacer.limit = p.max_postcopy_bandwidth
        self.parameters = p

    def cancel(self) -> None:
        """migrate_cancel. Without effect once the destination was told to run, but for a postcopy
        that is paused: that is given up."""
        if self.core.status is Status.POSTCOPY_ACTIVE:
            _log.warning(
                "a postcopy cannot be cancelled: the guest runs at the destination and needs this "
                "end; asked again, it is given up and the guest lost"
            )
        self._events.put_nowait(core.CancelAsked())

    def can_be_yanked(self) -> bool:
        """Whether there is something to cut: from the start until everything is let go of."""
        return self._driving

    def yank(self) -> None:
        """Cut everything that may hang: link, workers, the guest's monitor. As if all of it had
        broken: it fails, and the source goes on unless the destination was told to run; a postcopy
        pauses. It may have failed before, and hang on its way to the end."""
        _log.warning("yanked: nothing is waited for any more")
        self._hurry()
        asyncio.get_running_loop().call_later(_YANK_SECONDS, self._end_a_hung_start)
        if self.core.status not in (Status.POSTCOPY_PAUSED, *FINAL):
            self._failed(PeerLost("yanked: somebody had it cut, because it hung"), link=True)

    def _end_a_hung_start(self) -> None:
        """Others' processes end with the fork server: so only if we wait for it ourselves."""
        starting = any(pool is not None and pool.is_starting for pool in self._pools())
        if starting or self._call.busy:
            end_a_hung_server()

    def _hurry(self) -> None:
        # in a postcopy the guest has left, and what is left of it here is asked for nothing
        if not (self.core.run_said and self.core.leaving):
            self.guest.yank()
        for pool in self._pools():
            if pool is not None:
                pool.hurry()

    def link_broke(self, error: PageferryError) -> None:
        """What the connection is made over has ended."""
        if self.core.status in IN_POSTCOPY and self.carriage is not None:
            _log.warning("the guest runs at the destination: %s", self.carriage.recovery())
        if self._driving and self.core.status not in (Status.POSTCOPY_PAUSED, *FINAL):
            self._failed(error, link=True)

    def start_postcopy(self) -> None:
        """migrate-start-postcopy: the guest starts there as soon as it can."""
        if self.parameters.postcopy == NEVER:
            raise UsageError(
                "this migration was started without postcopy: start it with --postcopy manual"
            )
        self._events.put_nowait(core.PostcopyAsked())

    def go_on(self) -> None:
        """migrate-continue: the pause before the switchover is over."""
        self._events.put_nowait(core.ContinueAsked())

    def pause(self) -> None:
        """migrate-pause: drop the connection of a postcopy, to recover it later."""
        if self.core.status is not Status.POSTCOPY_ACTIVE:
            raise UsageError("only a postcopy that is active can be paused")
        self._failed(PeerLost("paused because somebody asked for it"), link=True)

    def recover(self, where: str | None) -> None:
        """migrate-recover: connect a paused postcopy again, at `where` if that is given."""
        if self.core.status is not Status.POSTCOPY_PAUSED:
            raise UsageError(
                f"there is nothing to recover: the migration is {self.core.status.value}"
            )
        if where and is_stream(where):
            parse_stream(where)
        elif where:
            there = parse_endpoint(where)
            if self._dialling is None:
                check_open(there, insecure=self.parameters.insecure, listens=False)
        self._events.put_nowait(core.RecoverAsked(where or ""))

    # ---- the run -------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Migrate. Returns the report, raises the error; the report is then in its data."""
        self._driving = True
        try:
            return await self._run()
        finally:
            self._driving = False

    async def _run(self) -> dict[str, Any]:
        cancelled = False
        try:
            finish = await self._drive()
        except asyncio.CancelledError:
            cancelled = True
            finish = self._end_early(core.CancelAsked(), Cancelled("interrupted"))
        except Exception as e:
            finish = self._end_early(core.Failed(as_ours(e)), as_ours(e))
        self._tell_status(str(finish.error or ""))
        await to_its_end(self._close(finish))
        report = self.query()
        report.pop("progress")
        self.journal.over(narration.ended(report))
        if cancelled and finish.resume:
            raise asyncio.CancelledError
        if finish.error is not None:
            finish.error.data["report"] = report
            raise finish.error
        return report

    async def _drive(self) -> core.Finish:
        """Events in, instructions out, until the core says that it is over."""
        self.core.asks = self.before_stop is not None
        self._events.put_nowait(core.Started())
        while True:
            event = await self._events.get()
            instructions = self.core.handle(event)
            for text in narration.narrate(self.core, event, instructions):
                self.journal.info(text)
            if (notice := self._stalls.after(event, self.core)) is not None:
                self.journal.info(notice.text)
                self._emit("MIGRATION_STALL", notice.data)
            self._tell_status(narration.why(instructions))
            for instruction in instructions:
                match instruction:
                    case core.Finish():
                        return instruction
                    case core.Pause():
                        await self._pause(instruction.error)
                    case core.CutRound():
                        self.journal.mark("CutRound")
                        self._cut.set()
                    case core.Throttle():
                        self._slow_down(instruction.percentage)
                    case core.SendRun():
                        # Said here and now, not in a task that may never begin: the core and
                        # the session must agree on whether it was said.
                        if not self._control.session.may_send(messages.Run):
                            # the destination gave up just now; its word for it is in the queue
                            continue
                        said = self._control.say_now(messages.Run())
                        confirming = self.journal.during("SendRun", self._confirm, said)
                        self._task(confirming, link=True)
                        self._task(self._set_back())
                    case _:
                        name = type(instruction).__name__
                        self._task(self.journal.during(name, self._execute, instruction))

    def _end_early(self, event: core.Event, error: PageferryError) -> core.Finish:
        """What the core makes of an end that it did not decide on."""
        # a cancel that comes after Run changes nothing: then it is a failure to hear the end
        for what in (event, core.Abandoned(error)):
            for instruction in self.core.handle(what):
                if isinstance(instruction, core.Finish):
                    return instruction
        return core.Finish(None, resume=False)  # it had completed

    def _task(self, coroutine: Coroutine[Any, Any, T], *, link: bool = False) -> asyncio.Task[T]:
        """Run `coroutine` beside; what it raises becomes an event. `link`: it speaks for the
        control link, and is listened to after the destination was told to run as well."""

        def done(task: asyncio.Task[T]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._failed(error, link=link)

        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(done)
        self._tasks.append(task)
        return task

    def _failed(self, error: BaseException, *, link: bool = False, by_peer: bool = False) -> None:
        # Once the destination was told to run, nothing here is needed but the link to it.
        # In postcopy everything is needed to the end.
        if link or by_peer or not self.core.run_said or self.core.leaving:
            self._events.put_nowait(core.Failed(as_ours(error), by_peer))

    def _tell_status(self, why: str = "") -> None:
        if self.core.status is not self._status_told:
            self._status_told = self.core.status
            self._waits.became(self.core.status)
            if self.core.status is Status.ACTIVE:
                self.statistics.set_up = time.monotonic()
            if self.statistics.stopped is not None and self.statistics.running is not None:
                self.journal.stood_still(self.statistics.running - self.statistics.stopped)
            self.journal.became(self.core.status, why)
            self._emit("MIGRATION", {"status": self.core.status.value})

    async def _ask_to_stop(self) -> None:
        if self._ack.awaited:
            with self._waits.acknowledgement():
                await self._ack.wait()
        if self.before_stop is not None and self.guest.can_stop:
            await self.before_stop()

    async def _execute(self, instruction: core.Instruction) -> None:
        """Carry out one instruction and report its result as an event."""
        match instruction:
            case core.OpenChannels():
                event: core.Event = await self._open_channels()
            case core.TakeInitial():
                event = await self._take_initial()
            case core.TakeDirty():
                event = await self._take_dirty()
            case core.SendRound():
                event = await self._send_round(instruction)
            case core.AskToStop():
                asked = time.monotonic()
                async with self._pressure.eased(core.SOON_SECONDS):
                    await self._ask_to_stop()
                event = core.MayStop(time.monotonic() - asked)
            case core.StopGuest():
                begin = time.monotonic()
                await self._call(self.guest.stop)
                self._pressure.stopped()
                self.statistics.stopped = self.guest.stopped_at or begin
                event = core.GuestStopped()
            case core.Verify():
                event = await self._verify()
            case core.SendState():
                await self._send_state(await self._save_state(), instruction.postcopy)
                self.guest.check()  # the last look: next is Run
                event = core.StateLoaded()
            case _:
                event = await self._execute_postcopy(instruction)
        self._events.put_nowait(event)

    async def _save_state(self) -> bytes:
        """Of the guest, and of tools: their hooks may take as long as they like, and hold up
        nothing but this migration."""
        state = await self._call(self.guest.save_state)
        runs = run_state(live=self.guest.live, running=self.guest.running)
        self.statistics.extra["run-state"] = runs
        try:
            return await self._hooks(compose, state, runs, self.sections)
        except TimeoutError as e:
            raise SourceError(f"hooks of device state took more than {HOOK_SECONDS:.0f} s") from e

    async def _send_state(self, state: bytes, postcopy: bool) -> None:
        """All of it, the last part with what makes the destination load it."""
        if len(state) > messages.MAX_STATE:
            raise SourceError(f"a device state of {len(state)} bytes is above the bound")
        cut = max(0, len(state) - 1) // messages.STATE_PART * messages.STATE_PART
        for at in range(0, cut, messages.STATE_PART):
            await self._control.say(messages.StatePart(state[at : at + messages.STATE_PART]))
        await self._control.ask(messages.DeviceState(self.guest.kind, state[cut:], postcopy))
        self.statistics.control_bytes += len(state)

    async def _execute_postcopy(self, instruction: core.Instruction) -> core.Event:
        match instruction:
            case core.TellMissing():
                return await self._tell_missing()
            case core.SendBackground():
                return await self._send_background()
            case core.EndPostcopy():
                return await self._end_postcopy()
            case core.Reconnect():
                return await self._reconnect(instruction.where)
            case _:
                raise LocalProtocolError(f"unknown instruction {instruction!r}")

    async def _set_back(self) -> None:
        try:
            await self._call(self.guest.moved)
        except PageferryError as e:
            _log.warning("the source is not set as before: %s", e)

    async def _confirm(self, said: asyncio.Future[messages.AnyMessage]) -> None:
        """Wait for the destination's word that the guest runs there."""
        try:
            running = await asyncio.wait_for(said, CONFIRM_SECONDS)
        except TimeoutError as e:
            raise PeerLost("the destination does not answer") from e
        self.statistics.running = time.monotonic()
        assert isinstance(running, messages.Running)
        self.statistics.extra["destination"] = running.detail
        self.statistics.peer = running.statistics
        self._events.put_nowait(core.Confirmed())

    # ---- setup ---------------------------------------------------------------------------

    async def _open_channels(self) -> core.Event:
        self.journal.info(narration.settings(self.parameters))
        await find(self.endpoint)
        self._make_shared_memory()
        self._task(self._watch())
        starting = self._task(self._start_senders())
        welcome = await self._greet()
        await starting
        specs = [block.spec for block in self.guest.blocks]
        self.journal.info(narration.connected(welcome, str(self.endpoint), self.guest.kind, specs))
        self._fresh, self._have = welcome.fresh, welcome.have
        self._compares = welcome.compares
        self._ack.promise(welcome.acks)
        await self._open(welcome.endpoints, welcome.tokens, welcome.urgent, welcome.key)
        return core.ChannelsReady(welcome.acks)

    async def _open(
        self,
        endpoints: list[str],
        tokens: list[bytes],
        urgent: tuple[str, bytes] | None,
        key: bytes,
    ) -> None:
        """Connect the processes that were started to the channels the destination offers."""
        assert self._crew is not None
        if not len(endpoints) == len(tokens) == self.parameters.workers or (urgent is None) != (
            self._background is None
        ):
            raise RemoteProtocolError("the channels do not match what was asked for")
        if any(len(token) != TOKEN_BYTES for token in [*tokens, *([urgent[1]] if urgent else [])]):
            raise RemoteProtocolError("a channel's token is of another length than it can be")
        curve = self._channel_keys.dials(key)
        if self.carriage is not None:  # it listens where workers will dial
            offered = [*endpoints, *([urgent[0]] if urgent is not None else [])]
            await self.carriage.listen([self.endpoint.sibling(where) for where in offered])
        await self._crew.gather(jobs.Ready)
        self._opened = True
        workers = self._crew.pool.workers
        for worker, where, token in zip(workers, endpoints, tokens, strict=True):
            worker.say(jobs.Open(str(self.endpoint.sibling(where)), token, curve))
        if self._background is not None and urgent is not None:
            self._background.dial(str(self.endpoint.sibling(urgent[0])), urgent[1], curve)

    def _make_shared_memory(self) -> None:
        p = self.parameters
        blocks = self.guest.blocks
        self._pressure.check()
        if p.quit_source and not self.guest.can_quit:
            raise UsageError("quit-source is for a VM (qemu:): leave it out")
        self.statistics.total_pages = sum(block.pages for block in blocks)
        self._table = PageTable([block.pages for block in blocks], context().Lock())
        self._counters = self.statistics.counters = Counters(p.workers, self.journal.lane)
        self._bandwidth = Bandwidth(p.max_bandwidth)
        if p.postcopy != NEVER:
            if not self.guest.can_stop:
                raise UsageError(
                    "postcopy needs a guest that can be stopped: a demo: guest, or memory whose "
                    "writer is named (ram:PATH?pid=PID)"
                )
            self._background = Background(blocks, self._table, p, self._failed, self.journal.lane)
            self.statistics.urgent = self._background.counters
            if p.release_ram:
                self._releasing = Releasing(self.guest, self._table, self.core)
        if self.guest.tracking == TRACKING_HASH or self.guest.last_look_by_content:
            self._hashes = Segment(8 * self.statistics.total_pages, "hashes")
        self.statistics.extra |= {"dirty-tracking": self.guest.tracking} | self.guest.facts()
        if self.guest.last_look_by_content:
            self.statistics.extra["last-look"] = TRACKING_HASH
        if p.deltas and self.guest.live:  # what nobody writes is sent once
            self._deltas = Deltas([block.pages for block in blocks], p.xbzrle_cache_size)
        self.statistics.extra["codec"] = p.codec
        self._start_steering()

    async def _start_senders(self) -> None:
        assert self._table and self._counters and self._bandwidth
        p = self.parameters
        job = sender.SenderJob(
            self.guest.blocks, self._table, self._counters, self._bandwidth, self._hashes,
            p.page_codec, p.level, p.batch_pages, sums=self._sums,
            cache=self._deltas.cache if self._deltas is not None else None,
        )  # fmt: skip
        reserve = self._reserve
        if self._background is not None:
            self._background.equip(job)
            await self._background.start()
            reserve = None  # these lower their priority for good
        self._crew = Crew(self._counters, self._failed, reserve)
        await self._crew.start(job, p.workers)

    def _start_steering(self) -> None:
        """Workers and codec are chosen while it runs, if there is a goal."""
        p = self.parameters
        if p.goal:
            assert self._counters is not None
            only = None if p.page_codec == "auto" else (p.page_codec, p.level)
            self._steering = Steering(
                Seeker(p.goal, p.workers, only), self._counters, self.receiver_cpu,
                deltas=p.deltas,
            )  # fmt: skip

    async def _greet(self) -> messages.Welcome:
        hello = messages.Hello(
            messages.PROTOCOL, __version__, self.uuid, self.guest.kind,
            [block.spec for block in self.guest.blocks], self.parameters.workers,
            self.parameters.batch_pages, image_size=self.guest.image_size,
            capabilities=[
                *self.guest.capabilities,
                *([messages.PAGE_SUMS] if self._sums else ()),
                *([messages.READ_BACK] if self._sums and self.parameters.verify else ()),
                *([messages.XBZRLE] if self._deltas is not None else ()),
                *(self._background.capabilities if self._background is not None else ()),
            ],
            name=self.name,
            key=self._new_channel_keys(),
            guest_uuid=self.guest.uuid,
            shared=list(self.guest.shared),
        )  # fmt: skip
        answer = await self._first_words(hello)
        assert isinstance(answer, messages.Welcome)
        n = len(self.guest.blocks)
        if len(answer.fresh) != n or len(answer.have) not in (0, n):
            raise RemoteProtocolError("Welcome does not match what was asked for")
        return answer

    def _new_channel_keys(self) -> bytes:
        """For a connection that begins; what the destination is to know of them."""
        self._channel_keys = ChannelKeys(self._dialling is not None)
        return self._channel_keys.public

    async def _first_words(self, message: messages.Hello | messages.Resume) -> messages.AnyMessage:
        """Connect the control link, say `message`; its answer, or the error in it."""
        self._context = zmq.asyncio.Context()
        # the first 16 bytes are who we are; a connection that broke is not to be taken up again
        identity = self._identity + bytes([self._connections % 256] if self._connections else [])
        self._connections += 1
        curve = self._dialling.curve if self._dialling is not None else None
        self._watching = []
        self._socket = connect(
            self._context, self.endpoint, identity, control=True, curve=curve,
            watched=self._watching,
        )  # fmt: skip
        self._control = Control(Role.SOURCE, self._socket.send, f"the receiver at {self.endpoint}")
        self._control.note = self.journal.control
        self._task(self._read_control(), link=True)
        self._task(self._watch_handshake(self._socket, self._watching[0]), link=True)
        asking = self._task(self._control.ask(message))
        if not await self._control.first_sign(HELLO_SECONDS):
            raise self._no_pageferry()
        # it is one; laying out memory may take it a while, and it says that it lives
        self._task(self._control.keep_alive(), link=True)
        answer = await asking
        if isinstance(answer, messages.Refused):
            raise messages.error_of(answer)
        return answer

    async def _watch_handshake(self, sock: Any, watching: Any) -> None:
        """Not to be let in, or to find somebody else, is an error; and so is a peer whose key is
        revoked, for as long as the connection is needed."""
        curve = self._dialling.curve if self._dialling is not None else None
        try:
            error = await refusal(watching, self.endpoint, curve)
        finally:
            stop_watching(sock, watching)
        if error is not None:
            raise error
        while self._dialling is not None:
            await asyncio.sleep(LOOK_SECONDS)
            if not self.core.run_said or self.core.leaving:
                self._dialling.check()

    def _no_pageferry(self) -> ConnectError:
        return ConnectError(
            f"something accepts connections at {self.endpoint} and does not answer as "
            f"`pageferry receive` does: check the address"
        )

    async def _read_control(self) -> None:
        while True:
            await asyncio.sleep(0)  # all others have a turn, however much the peer says
            data = await self._socket.recv()
            try:
                message = self._control.heard(data)
            except RemoteProtocolError as e:
                if self._control.session.phase in (Phase.IDLE, Phase.GREETING):
                    raise self._no_pageferry() from e
                raise
            if isinstance(message, messages.Abort):
                self._failed(messages.error_of(message), by_peer=True)
                return
            if isinstance(message, messages.Paused):
                reason = f"the destination paused: {message.message}"
                self._failed(PeerLost(reason), link=True)
                return
            if isinstance(message, messages.SwitchoverAck):
                self._ack.hear()
            elif message is not None:
                raise RemoteProtocolError(f"nobody asked for {type(message).__name__}")

    async def _watch(self) -> None:
        """Look after the workers and tell the display."""
        while True:
            if self._crew is not None:
                self._crew.pool.check()
            if not self.core.run_said:
                self.guest.check()
            elif self.core.leaving:  # its memory is enough, if nobody writes it
                self.guest.check_stopped()
            if self._background is not None:
                self._background.check()
            if self._opened:  # who is refused sees no progress
                self._look_ahead()
                self._progress()
            await asyncio.sleep(WATCH_SECONDS / 2)

    def _look_ahead(self) -> None:
        """How much the guest has written in this round, for the ETA. In the event loop, and never
        while pages are taken."""
        now = time.monotonic()
        if not self._sending or now < self._written_due:
            return
        if self.statistics.total_pages > _PAGES_IN_LOOP:
            return
        with contextlib.suppress(PageferryError):  # whoever takes them says it
            if (pages := self.guest.written_so_far()) is not None:
                self._written = pages, now - self._taken_at
                moved = self.statistics.pages_done - self.statistics.round_base
                self._slow_down(self._pressure.look(pages, moved, now - self._taken_at))
        self._written_due = now + _LOOK_AHEAD_SHARE * (time.monotonic() - now)

    def _slow_down(self, percentage: int | None) -> None:
        """The guest loses so much of its time, if that is another percentage than before."""
        if percentage is not None:
            self._task(self._pressure.set(percentage))

    def _progress(self) -> None:
        if self.on_progress is not None:
            tell(self.on_progress, self.query())

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        tell(self.on_event, name, data)

    # ---- rounds --------------------------------------------------------------------------

    async def _take_initial(self) -> core.Event:
        assert self._table is not None
        begin = time.monotonic()
        await self._call(self.guest.start_tracking)
        self._taken_at = time.monotonic()
        self._kept = [[False] * -(-block.pages // CHUNK_PAGES) for block in self.guest.blocks]
        for i, block in enumerate(self.guest.blocks):
            runs = await self._call(self.guest.initial_pages, i)
            self._table.mark_dirty(i, runs)
            self.statistics.hole_pages += block.pages - total_pages(runs)
            there = self._fresh[i]
            if self._have and not self.guest.live:
                there = await self._leave_out_what_is_there(i, runs)
            if not there:
                await self._discard(i, complement(runs, block.pages))
            if self._compares and not self.guest.live:
                await self._leave_out_what_is_elsewhere(i)
        if self.guest.live:
            begin += await self._settle()
            self.journal.info("writes are tracked by %s", self.guest.tracking)
        if there := self.statistics.extra.get("pages-already-there", 0):
            self.journal.info("%d pages are there already, and left out", there)
        pages = self._remaining()
        return core.Taken(pages, pages, 0.0, time.monotonic() - begin)

    async def _settle(self) -> float:
        """Before pages that were taken are read. Seconds; in the statistics, because the guest's
        disks stand still meanwhile."""
        begin = time.monotonic()
        await self._call(self.guest.settle)
        took = time.monotonic() - begin
        known = self.statistics.extra.get("disks-drained-us", 0)
        if took > _NOTHING_SECONDS:
            self.statistics.extra["disks-drained-us"] = max(known, round(took * 1e6))
        return took

    async def _leave_out_what_is_there(self, index: int, runs: Runs) -> bool:
        """Chunks that the destination has, by their digests, are not sent; True if that is all."""
        assert self._table is not None
        block = self.guest.blocks[index]
        equal = self._kept[index] = await self._call(equal_chunks, block, self._have[index])
        before, view = self._remaining(), self._table.view(index)
        for chunk, same in enumerate(equal):
            if same:
                view[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES] = CLEAN
        known = self.statistics.extra.get("pages-already-there", 0)
        self.statistics.extra["pages-already-there"] = known + before - self._remaining()
        return all(equal)

    async def _leave_out_what_is_elsewhere(self, index: int) -> None:
        """Pages that the destination can find among other images are not sent."""
        assert self._table is not None
        block = self.guest.blocks[index]
        # no view of the table is kept: an error of the peer would keep it beyond the table
        dirty = np.flatnonzero(self._table.view(index) != CLEAN)
        dirty = dirty[dirty < block.size // PAGE_SIZE]
        known = self.statistics.extra.get("pages-already-there", 0)
        parts = [dirty[at : at + _COMPARED_PAGES] for at in range(0, len(dirty), _COMPARED_PAGES)]
        ahead = await self._call(both_digests, block, dirty[:_COMPARED_PAGES], False)
        for pages, following in zip_longest(parts, parts[1:], fillvalue=dirty[:0]):
            digests, sure = ahead
            found = np.flatnonzero(await self._ask_for(index, pages, digests))
            sure = take_digests(sure, found) if sure else b""
            if len(found) and not sure:
                sure = await self._call(sure_digests, block, pages[found])
            # while the destination makes those, we look at what follows: more of the same, if any
            look = self._call(both_digests, block, following, 2 * len(found) > len(pages))
            if not len(found):
                ahead = await look
                continue
            held, ahead = await asyncio.gather(
                self._ask_for(index, pages[found], take_digests(digests, found), sure), look
            )
            self._table.view(index)[pages[found[held != 0]]] = CLEAN
            known += int(np.count_nonzero(held))
        self.statistics.extra["pages-already-there"] = known

    async def _ask_for(self, index: int, pages: Pages, digests: bytes, sure: bytes = b"") -> Bytes8:
        """Which of these pages the destination may have; with `sure`, has."""
        starts, counts = runs_of(pages)
        held = await self._control.ask(
            messages.Contents(index, starts.tolist(), counts.tolist(), digests, sure)
        )
        assert isinstance(held, messages.Held)
        if len(held.bits) != -(-len(pages) // 8):
            raise RemoteProtocolError("Held does not match what was asked for")
        return np.unpackbits(np.frombuffer(held.bits, np.uint8), count=len(pages))

    async def _discard(self, block: int, runs: tuple[Any, Any]) -> None:
        starts, counts = runs
        for at in range(0, len(starts), _DISCARD_RUNS):
            part = slice(at, at + _DISCARD_RUNS)
            await self._control.ask(
                messages.Discard(block, starts[part].tolist(), counts[part].tolist())
            )

    def _remaining(self) -> int:
        assert self._table is not None
        return self._table.remaining()

    async def _take_dirty(self) -> core.Event:
        assert self._table is not None
        begin = time.monotonic()
        before = self._remaining()
        scan, ahead = self._hashes is not None, 0.0
        if self.guest.live and self.guest.tracking != TRACKING_HASH:
            # all memory is looked at once, to know what that takes, and when the guest is stopped
            scan = scan and (self.core.stopped or not self._scan_seconds)
            ahead = 0.0 if scan else self._scan_seconds
            for i, block in enumerate(self.guest.blocks):
                if block.pages > _PAGES_IN_LOOP:
                    runs = await self._call(self.guest.dirty_pages, i)
                else:  # a few ms, and a switchover has no time for a thread
                    runs = self.guest.dirty_pages(i)
                self._table.mark_dirty(i, runs)
            if not self.core.stopped:
                begin += await self._settle()  # no part of a switchover
        if scan:
            scan_began = time.monotonic()
            await self._scan()
            self._scan_seconds = time.monotonic() - scan_began
        pages = self._remaining()
        now = time.monotonic()
        since, self._taken_at = begin - self._taken_at, begin
        return core.Taken(pages, pages - before, since, now - begin + ahead)

    async def _scan(self) -> None:
        assert self._crew is not None
        todo: Iterator[jobs.AnyJob] = (
            jobs.Scan(i, first, min(_SCAN_PAGES, block.pages - first))
            for i, block in enumerate(self.guest.blocks)
            for first in range(0, block.pages, _SCAN_PAGES)
        )
        await self._crew.distribute(todo, jobs.ScanDone, lambda reply: None)

    async def _send_round(self, instruction: core.SendRound) -> core.Event:
        assert self._table is not None and self._crew is not None
        assert self._counters is not None
        begin, pages = time.monotonic(), self.core.remaining
        zero, wire = self._counters.total("duplicate"), self._counters.total("wire_bytes")
        cpu, waited = self._crew.pool.cpu_seconds(), self._waited()
        self.statistics.begin_round(instruction.number, pages)
        self.journal.round_begins(instruction.number, pages)
        self._emit("MIGRATION_PASS", {"pass": instruction.number})
        await self._control.say(
            messages.Round(instruction.number, pages, round(self.convergence.dirty_rate))
        )
        spans = extents(self._table, self.guest.blocks, self.parameters.workers, pages)
        todo: Iterator[jobs.AnyJob] = (
            jobs.Extent(s.block, s.first, s.count, instruction.live) for s in spans
        )
        self._cut.clear()
        if self._deltas is not None and instruction.live:
            for _ in self._deltas.begin_round(instruction.number, self._table, self._counters):
                await asyncio.sleep(0)
        self._written, self._sending = (0, 0.0), instruction.live
        steering = self._steer(begin_round=True)
        if steering is not None:
            todo = steering.pieces(todo, self._host_pages)
        try:
            await self._crew.distribute(
                todo, jobs.ExtentDone, lambda reply: None, self._cut, steering
            )
            self._steer(begin_round=False)
            await self._crew.all(jobs.Barrier(instruction.number), jobs.BarrierDone)
        finally:
            self._sending = False
        lost = self._remaining()
        done = core.RoundDone(
            pages - lost, lost, time.monotonic() - begin,
            zero=self._counters.total("duplicate") - zero,
            wire=self._counters.total("wire_bytes") - wire,
        )  # fmt: skip
        self.journal.round_ends(pages=pages, lost=lost, zero=done.zero, wire=done.wire)
        if instruction.number == 1:
            self.statistics.first_round = RoundCost(
                done.pages, done.wire, done.seconds, self._crew.pool.cpu_seconds() - cpu,
                self._waited() - waited,
            )  # fmt: skip
        return done

    def _waited(self) -> float:
        """Seconds that senders waited for link, receivers or max-bandwidth, all together."""
        assert self._counters is not None
        return (self._counters.total("wait_ns") + self._counters.total("paced_ns")) / 1e9

    def _steer(self, *, begin_round: bool) -> Steering | None:
        """The steering, told that a round begins or ends. While the guest stands still nothing is
        tried."""
        steering, found = self._steering, self.convergence
        if steering is None or self._crew is None:
            return None
        if begin_round:
            still = self.core.live and self.core.stopped
            if steering.seeker.too_slow(
                found.rate, found.dirty_rate, rounds=found.rounds, still=still
            ):
                steering.hurry()
            steering.begin_round(self._crew.pool, self._remaining(), learning=not still)
        else:
            steering.end_round()
        return steering

    def _host_pages(self, block: int) -> int:
        return self.guest.blocks[block].spec.page_size // PAGE_SIZE

    # ---- postcopy ------------------------------------------------------------------------

    async def _tell_missing(self) -> core.Event:
        assert self._table is not None
        self._cut.clear()
        for i, block in enumerate(self.guest.blocks):
            host = block.spec.page_size // PAGE_SIZE
            if host > 1:
                self._table.whole_host_pages(i, host)
            starts, counts = runs_of(np.flatnonzero(self._table.view(i) != CLEAN))
            for at in range(0, len(starts), _DISCARD_RUNS):
                part = slice(at, at + _DISCARD_RUNS)
                await self._control.ask(
                    messages.Missing(i, starts[part].tolist(), counts[part].tolist())
                )
        return core.MissingTold()

    async def _send_background(self) -> core.Event:
        """All dirty pages, by senders and postcopy process together."""
        assert self._crew is not None and self._background is not None
        assert self._counters is not None and self._bandwidth is not None
        self.statistics.postcopy = True
        self.statistics.extra |= self._background.describe()
        self.statistics.begin_round(self.core.round + 1, self._remaining())
        self.journal.round_begins(self.core.round + 1, self.statistics.round_pages)
        beside = [self._task(self._background.keep_pace(self._counters, self._bandwidth))]
        if self._releasing is not None:  # the guest runs there: it has been confirmed
            beside.append(self._task(self._releasing.keep_on()))
        await self._background.send_all(
            self._crew, self.parameters.workers, lambda: self._task(self._drop_deltas())
        )
        for task in beside:
            task.cancel()
        return core.BackgroundDone()

    async def _drop_deltas(self) -> None:
        if self._deltas is None:
            return
        try:
            for _ in self._deltas.drop():
                await asyncio.sleep(0)
        except OSError as e:  # it goes at the end: no reason to pause
            _log.warning("memory of deltas is kept to the end of the postcopy: %s", e.strerror)

    async def _end_postcopy(self) -> core.Event:
        self.guest.check_stopped()  # the last look: all has been read by now
        ended = await self._control.ask(messages.PostcopyEnd())
        assert isinstance(ended, messages.Ended)
        await self._take_end(ended)
        return core.PostcopyEnded()

    async def _take_end(self, ended: messages.Ended) -> None:
        self.statistics.finish_round()
        self.statistics.extra |= latency_report(ended.latency)
        # what only that end knows; it may not say anything else of this migration
        known = {k: v for k, v in ended.statistics.items() if k.startswith("postcopy-")}
        self.statistics.extra |= known

    async def _pause(self, error: PageferryError) -> None:
        """Drop the connection and everything that used it. The page table stays."""
        self.paused_by = error
        _log.warning("postcopy paused: %s", error)
        self.statistics.extra["paused-because"] = error.message
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._socket is not None:
            with contextlib.suppress(PageferryError, zmq.ZMQError, TimeoutError):
                await asyncio.wait_for(self._control.pause(error), _LAST_WORD_SECONDS)
        await self._drop_connection()
        if self._table is not None:
            self.core.remaining = self._remaining()
            self.statistics.begin_round(self.statistics.rounds, self.core.remaining)
        asked = []
        while not self._events.empty():  # of the connection that is gone
            event = self._events.get_nowait()
            if isinstance(event, core.RecoverAsked | core.CancelAsked):
                asked.append(event)
        for event in asked:
            self._events.put_nowait(event)
        self._task(self._show_paused())
        self._progress()

    async def _show_paused(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._progress()

    async def _drop_connection(self) -> None:
        if self._crew is not None:
            await self._crew.pool.close()
        if self._background is not None:
            await self._background.stop()
        for watching in self._watching:  # its task may have been cancelled before it began
            watching.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None

    async def _reconnect(self, where: str) -> core.Event:
        """A new connection and new workers for the old page table."""
        assert self._table is not None and self._background is not None
        if self.carriage is not None:
            self.endpoint = await self.carriage.locate(where, self.endpoint)
        elif where:
            self.endpoint = parse_endpoint(where)
        await find(self.endpoint)
        # a worker that was killed may have taken a lock along
        self._table.renew_lock(context().Lock())
        assert self._bandwidth is not None
        self._bandwidth.renew_lock(context().Lock())
        self._task(self._watch())
        starting = self._task(self._start_senders())
        answer = await self._first_words(
            messages.Resume(
                messages.PROTOCOL, self.uuid, self.parameters.workers, self._new_channel_keys()
            )
        )
        await starting
        if isinstance(answer, messages.Ended):  # its word for it was lost
            await self._take_end(answer)
            return core.PostcopyEnded()
        assert isinstance(answer, messages.Resumed)
        if len(answer.received) != len(self.guest.blocks):
            raise RemoteProtocolError("Resumed does not match what was asked for")
        for i, bits in enumerate(answer.received):
            block = self.guest.blocks[i]
            self._table.resume(i, unpack(bits, block.pages))
            if block.spec.page_size > PAGE_SIZE:
                self._table.whole_host_pages(i, block.spec.page_size // PAGE_SIZE)
        if self._releasing is not None:
            self._releasing.check()
        await self._open(answer.endpoints, answer.tokens, answer.urgent, answer.key)
        self.statistics.extra.pop("paused-because", None)
        self.statistics.extra["recoveries"] = self.statistics.extra.get("recoveries", 0) + 1
        return core.Reconnected(self._remaining())

    # ---- the end -------------------------------------------------------------------------

    async def _verify(self) -> core.Event:
        return await (self._verify_sums() if self._sums else self._verify_digests())

    async def _verify_sums(self) -> core.Event:
        """Each frame was compared when it was placed: what is left is what no frame was of."""
        answer = await self._control.ask(
            messages.DigestRequest([pack_chunks(kept) for kept in self._kept])
        )
        assert isinstance(answer, messages.Digests)
        if len(answer.wrong) != len(self.guest.blocks):
            raise RemoteProtocolError("Digests does not match what was asked for")
        wrong = tuple(b.name for b, n in zip(self.guest.blocks, answer.wrong, strict=True) if n)
        if not wrong:
            self.statistics.extra["verified"] = [messages.PAGE_SUMS] * len(answer.wrong)
        return core.Verified(wrong)

    async def _verify_digests(self) -> core.Event:
        theirs = self._task(self._control.ask(messages.DigestRequest()))
        parts = [[b""] * part_count(block.pages) for block in self.guest.blocks]
        todo: Iterator[jobs.AnyJob] = (
            jobs.Digest(i, part) for i, digests in enumerate(parts) for part in range(len(digests))
        )

        def keep(reply: jobs.DigestDone) -> None:
            parts[reply.block][reply.part] = reply.digest

        assert self._crew is not None
        await self._crew.distribute(todo, jobs.DigestDone, keep)
        answer = await theirs
        assert isinstance(answer, messages.Digests)
        ours = [block_digest(digests) for digests in parts]
        if len(answer.digests) != len(ours):
            raise RemoteProtocolError(f"{len(answer.digests)} digests for {len(ours)} blocks")
        wrong = tuple(
            block.name
            for block, a, b in zip(self.guest.blocks, ours, answer.digests, strict=True)
            if a != b
        )
        if not wrong:
            self.statistics.extra["verified"] = [digest.hex() for digest in ours]
        return core.Verified(wrong)

    async def _close(self, finish: core.Finish) -> None:
        """Let go of everything; the guest resumes only if the core says so.

        Each step is taken whatever became of the others.
        """
        self.statistics.ended = time.monotonic()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        steps = (
            self._abort, self._lift, self._resume, self._quit_source, self._stop_workers,
            self._hang_up, self._give_back, self._last_words,
        )  # fmt: skip
        for step in steps:
            try:
                await step(finish)
            except Exception as e:
                _log.warning("while ending a migration: %s", e)
                if finish.error is not None:
                    finish.error.message += f"; and then: {e}"
        self._freeze()

    async def _abort(self, finish: core.Finish) -> None:
        if finish.error is not None and self._socket is not None:
            with contextlib.suppress(zmq.ZMQError, TimeoutError):  # nobody may take it
                await asyncio.wait_for(self._control.abort(finish.error), _LAST_WORD_SECONDS)

    async def _lift(self, finish: core.Finish) -> None:
        await self._pressure.lift()

    async def _resume(self, finish: core.Finish) -> None:
        await self._call.idle()  # a stop that is under way would undo it
        if finish.resume:
            await self._call(self.guest.resume)

    async def _quit_source(self, finish: core.Finish) -> None:
        if self.parameters.quit_source and self.core.status is Status.COMPLETED:
            await self._call(self.guest.quit)

    async def _stop_workers(self, finish: core.Finish) -> None:
        if finish.error is not None:
            for pool in self._pools():
                if pool is not None:
                    pool.hurry()
        if self._crew is not None:
            await self._crew.pool.close()
        if self._background is not None:
            await self._background.stop()
        self.statistics.remember_processes(*self._pools())

    async def _hang_up(self, finish: core.Finish) -> None:
        if self._socket is not None and self._opened and self._control.lost:
            self._socket.linger = 0  # there is nobody whom the last word could reach
        await self._drop_connection()

    async def _give_back(self, finish: core.Finish) -> None:
        """All memory, once the destination has all of it. That takes a while, in which it may
        leave: so not before it is over here, or that would be a postcopy that broke."""
        done = self.core.leaving and self.core.status is Status.COMPLETED
        if self._releasing is not None and done:
            await self._call(self._releasing.everything)

    async def _last_words(self, finish: core.Finish) -> None:
        await self.dirty_rates.close()
        self.statistics.extra |= self.guest.describe()
        self._progress()

    def _freeze(self) -> None:
        """Keep the numbers, give the shared memory back."""
        if self._releasing is not None:
            self._releasing.close(arrived=self.core.status is Status.COMPLETED)
        if self._counters is not None:
            self.statistics.counters = self._counters.freeze()
        if self._background is not None:
            self.statistics.urgent = self._background.close()
            self._background = None
        for part in (self._counters, self._table, self._bandwidth, self._hashes):
            if part is not None:
                part.close()
        self._counters = self._table = self._bandwidth = self._hashes = None
        if self._deltas is not None:
            self.statistics.extra |= self._deltas.report(self.statistics.counters)
            self._deltas.close()
            self._deltas = None
