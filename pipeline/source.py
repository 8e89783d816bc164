"""The coordinator on the source host: has carried out what migration.py decides.

One event loop, one queue of events. Instructions run one at a time, each by the part whose it is
("The source in parts", ARCHITECTURE.md); failures, cancels and the peer's messages come in between
as events. Blocking work on the guest runs in a thread, memory is touched only by the workers. Must
not know how a part does its work.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .._version import __version__
from ..transport import messages
from ..transport.errors import (
    Cancelled,
    LocalProtocolError,
    PageferryError,
    PeerLost,
    UsageError,
    as_ours,
)
from ..transport.links import Endpoint
from ..transport.pages import PAGE_SIZE
from ..transport.vmstate import Section
from ..workers import jobs
from ..workers.forking import end_a_hung_server
from ..workers.guests.base import TRACKING_HASH, SourceGuest
from ..workers.pool import Pool
from ..workers.reserve import Reserve
from . import migration as core
from . import narration
from .blocking import Blocking, to_its_end
from .callbacks import tell
from .carriage import Carriage
from .connection import Connection
from .convergence import Convergence
from .equipment import Equipment
from .initial import InitialPages
from .journal import Journal
from .measuring import RunningDirtyRate
from .parameters import NEVER, Parameters, changed
from .pressure import Pressure
from .releasing import Releasing
from .remainder import Remainder
from .rounds import Rounds
from .security import dialling
from .stalls import Stalls
from .state import FINAL, IN_POSTCOPY, Status
from .statistics import Statistics
from .switchover import Acknowledgement, Switchover, Waits
from .tasks import Tasks
from .verification import verify_digests, verify_sums

WATCH_SECONDS = 0.5
# What has not come to an end so long after a yank is ended by force.
_YANK_SECONDS = 1.0
_log = logging.getLogger("pageferry")


class Source:
    """One migration, on its source host."""

    # Set before run():
    # Awaited once before the guest is stopped, which may be some rounds later if that takes
    # long; if it raises, the guest goes on here.
    before_stop: Callable[[], Awaitable[None]] | None = None
    # What tools send beside memory (device_state.py).
    sections: Sequence[Section] = ()
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
        self.guest = guest
        self.parameters = parameters
        keys = dialling(parameters, endpoint)
        self.convergence = Convergence(
            parameters.downtime_limit, parameters.max_rounds, parameters.max_bandwidth
        )
        self._call = Blocking()
        # Memory that nobody writes is verified while it moves, unless that is not wanted; what
        # somebody writes only if it is asked for, for then it stands still meanwhile.
        static = not guest.live and parameters.postcopy == NEVER and guest.kind != messages.SAMPLE
        verify = static if parameters.verify is None else parameters.verify
        self._sums = static and verify
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
        self._events: asyncio.Queue[core.Event] = asyncio.Queue()
        self._tasks = Tasks(self._failed)
        self._connection = Connection(
            endpoint, keys, identity, self.journal, self._tasks, self._ack, self._needs_all,
            insecure=parameters.insecure,
        )  # fmt: skip
        self._equipment: Equipment | None = None
        self._remainder: Remainder | None = None
        self._initial = InitialPages(guest, self._call, self._connection.ask, self.statistics)
        self._rounds = Rounds(
            guest, self._call, self.statistics, self.journal, self.convergence, self._pressure,
            self._announce,
        )  # fmt: skip
        self._switchover = Switchover(
            guest, self._call, self.statistics, self._pressure, self._waits, self._ack,
            self._connection.say, self._connection.ask,
        )  # fmt: skip
        # processor seconds of the receivers, for whoever runs both ends
        self.receiver_cpu: Callable[[], float | None] = lambda: None
        self._status_told, self._driving = Status.NONE, False
        self.dirty_rates, self._stalls = RunningDirtyRate(guest, self._runs_here), Stalls()

    def __repr__(self) -> str:
        return f"<Source {self.guest.kind} to {self.endpoint} {self.core.status.value}>"

    @property
    def endpoint(self) -> Endpoint:
        return self._connection.endpoint

    @property
    def carriage(self) -> Carriage | None:
        """What makes connections over byte streams; to be set before run()."""
        return self._connection.carriage

    @carriage.setter
    def carriage(self, carriage: Carriage) -> None:
        self._connection.carriage = carriage

    def _needs_all(self) -> bool:
        """Once the destination was told to run, nothing here is needed but the link to it. In
        postcopy everything is needed to the end."""
        return not self.core.run_said or self.core.leaving

    # ---- what others may ask, at any time ------------------------------------------------

    def query(self) -> dict[str, Any]:
        """query-migrate."""
        report = self.statistics.report(self.core.status, self.convergence)
        report |= self._stalls.report()
        if self.guest.can_stop:
            report["downtime-limit"] = round(self.parameters.downtime_limit * 1000)
        if self._equipment is not None:
            report |= self._equipment.report()
        report |= self._pressure.report()
        report |= self._waits.report() | self._ack.report(self.statistics.stopped)
        if self._remainder is not None:
            report |= self._remainder.report()
        guest_rate, wire_rate = self.statistics.rates()
        report["progress"] = {
            "rate": round(guest_rate),
            "wire-rate": round(wire_rate),
            "dirty-rate": round(self.convergence.dirty_rate),
            "round-bytes": self.statistics.round_pages * PAGE_SIZE,
            "eta": self._rounds.eta(still=not self.core.live or self.core.stopped),
        }
        return report

    def _runs_here(self) -> bool:
        return not self.core.stopped

    def query_parameters(self) -> dict[str, Any]:
        return self.parameters.qmp()

    def query_processes(self) -> list[dict[str, Any]]:
        """What each process has cost so far, as `processes` of the result."""
        return self.statistics.processes_now(*self._pools())

    def _pools(self) -> tuple[Pool | None, Pool | None]:
        return self._equipment.pools() if self._equipment is not None else (None, None)

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        """migrate-set-parameters; takes effect with the next frame or decision."""
        before, p = self.parameters, changed(self.parameters, arguments)
        equipment = self._equipment
        if equipment is not None and "xbzrle-cache-size" in arguments:
            equipment.resize_cache(p.xbzrle_cache_size)  # first: it may not be possible
        self._slow_down(self._pressure.configure(p.throttle))
        if equipment is not None:
            equipment.set_rates(p, in_postcopy=self.core.status in IN_POSTCOPY)
        self.convergence.downtime_limit = p.downtime_limit
        # beside those that a wait has granted
        self.convergence.max_rounds += p.max_rounds - before.max_rounds
        self.convergence.max_bandwidth = p.max_bandwidth
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
        if self._equipment is not None:
            self._equipment.hurry()

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
        self._connection.check(where or "")
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
                        self._rounds.cut.set()
                    case core.Throttle():
                        self._slow_down(instruction.percentage)
                    case core.SendRun():
                        # Said here and now, not in a task that may never begin: the core and
                        # the session must agree on whether it was said.
                        if not self._connection.control.session.may_send(messages.Run):
                            # the destination gave up just now; its word for it is in the queue
                            continue
                        said = self._connection.control.say_now(messages.Run())
                        confirming = self.journal.during("SendRun", self._confirm, said)
                        self._tasks.start(confirming, link=True)
                        self._tasks.start(self._switchover.set_back())
                    case _:
                        name = type(instruction).__name__
                        self._tasks.start(self.journal.during(name, self._execute, instruction))

    def _end_early(self, event: core.Event, error: PageferryError) -> core.Finish:
        """What the core makes of an end that it did not decide on."""
        # a cancel that comes after Run changes nothing: then it is a failure to hear the end
        for what in (event, core.Abandoned(error)):
            for instruction in self.core.handle(what):
                if isinstance(instruction, core.Finish):
                    return instruction
        return core.Finish(None, resume=False)  # it had completed

    def _failed(self, error: BaseException, *, link: bool = False, by_peer: bool = False) -> None:
        if link or by_peer or self._needs_all():
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

    async def _execute(self, instruction: core.Instruction) -> None:
        """Carry out one instruction and report its result as an event."""
        match instruction:
            case core.OpenChannels():
                event: core.Event = await self._open_channels()
            case core.TakeInitial():
                event = await self._rounds.take_initial(self._equipped(), self._initial)
            case core.TakeDirty():
                stopped = self.core.stopped
                event = await self._rounds.take_dirty(self._equipped(), stopped=stopped)
            case core.SendRound():
                pages, still = self.core.remaining, self.core.live and self.core.stopped
                event = await self._rounds.send(self._equipped(), instruction, pages, still=still)
            case core.AskToStop():
                took = await self._switchover.may_stop(self.before_stop, core.SOON_SECONDS)
                event = core.MayStop(took)
            case core.StopGuest():
                await self._switchover.stop()
                event = core.GuestStopped()
            case core.Verify():
                event = await self._verify()
            case core.SendState():
                state = await self._switchover.save_state(self.sections)
                await self._switchover.send_state(state, postcopy=instruction.postcopy)
                self.guest.check()  # the last look: next is Run
                event = core.StateLoaded()
            case _:
                event = await self._execute_postcopy(instruction)
        self._events.put_nowait(event)

    async def _execute_postcopy(self, instruction: core.Instruction) -> core.Event:
        remainder = self._remainder
        assert remainder is not None
        match instruction:
            case core.TellMissing():
                self._rounds.cut.clear()
                await remainder.tell_missing()
                return core.MissingTold()
            case core.SendBackground():
                await remainder.send(self.core.round + 1)
                return core.BackgroundDone()
            case core.EndPostcopy():
                await remainder.end()
                return core.PostcopyEnded()
            case core.Reconnect():
                return await self._reconnect(instruction.where, remainder)
            case _:
                raise LocalProtocolError(f"unknown instruction {instruction!r}")

    async def _confirm(self, said: asyncio.Future[messages.AnyMessage]) -> None:
        await self._switchover.confirmed(said)
        self._events.put_nowait(core.Confirmed())

    # ---- setup ---------------------------------------------------------------------------

    async def _open_channels(self) -> core.Event:
        self.journal.info(narration.settings(self.parameters))
        await self._connection.find()
        equipment = self._equip()
        self._tasks.start(self._watch())
        starting = self._tasks.start(equipment.start(self.parameters))
        welcome = await self._greet(equipment)
        await starting
        specs = [block.spec for block in self.guest.blocks]
        self.journal.info(narration.connected(welcome, str(self.endpoint), self.guest.kind, specs))
        self._ack.promise(welcome.acks)
        await self._open(welcome)
        return core.ChannelsReady(welcome.acks)

    async def _open(self, offered: messages.Welcome | messages.Resumed) -> None:
        """Connect the processes that were started to the channels the destination offers."""
        equipment = self._equipped()
        equipment.check_offer(offered, self.parameters.workers)
        curve = await self._connection.channels(offered)
        await equipment.crew.gather(jobs.Ready)
        self._connection.opened = True
        equipment.dial(offered, self.endpoint, curve)

    def _equip(self) -> Equipment:
        p, guest = self.parameters, self.guest
        self._pressure.check()
        if p.quit_source and not guest.can_quit:
            raise UsageError("quit-source is for a VM (qemu:): leave it out")
        self.statistics.total_pages = sum(block.pages for block in guest.blocks)
        self.statistics.extra |= {"dirty-tracking": guest.tracking} | guest.facts()
        if guest.last_look_by_content:
            self.statistics.extra["last-look"] = TRACKING_HASH
        self.statistics.extra["codec"] = p.codec
        equipment = self._equipment = Equipment(
            guest, p, self.statistics, self.journal, self._failed,
            sums=self._sums, receiver_cpu=self.receiver_cpu, reserve=self._reserve,
        )  # fmt: skip
        if equipment.background is not None:
            releasing = Releasing(guest, equipment.table, self.core) if p.release_ram else None
            self._remainder = Remainder(
                guest, equipment, equipment.background, releasing, self.statistics, self.journal,
                self._tasks, self._connection.ask,
            )  # fmt: skip
        return equipment

    def _equipped(self) -> Equipment:
        """What there is from the first instruction on."""
        assert self._equipment is not None
        return self._equipment

    async def _greet(self, equipment: Equipment) -> messages.Welcome:
        hello = messages.Hello(
            messages.PROTOCOL, __version__, self.uuid, self.guest.kind,
            [block.spec for block in self.guest.blocks], self.parameters.workers,
            self.parameters.batch_pages, image_size=self.guest.image_size,
            capabilities=[
                *self.guest.capabilities,
                *([messages.PAGE_SUMS] if self._sums else ()),
                *([messages.READ_BACK] if self._sums and self.parameters.verify else ()),
                *equipment.capabilities,
            ],
            name=self.name,
            key=self._connection.new_channel_keys(),
            guest_uuid=self.guest.uuid,
            shared=list(self.guest.shared),
        )  # fmt: skip
        answer = await self._connection.first_words(hello)
        assert isinstance(answer, messages.Welcome)
        self._initial.offered(answer)
        return answer

    async def _watch(self) -> None:
        """Look after the workers and tell the display."""
        equipment = self._equipped()
        while True:
            equipment.crew.pool.check()
            if not self.core.run_said:
                self.guest.check()
            elif self.core.leaving:  # its memory is enough, if nobody writes it
                self.guest.check_stopped()
            if equipment.background is not None:
                equipment.background.check()
            if self._connection.opened:  # who is refused sees no progress
                self._slow_down(self._rounds.look_ahead())
                self._progress()
            await asyncio.sleep(WATCH_SECONDS / 2)

    def _slow_down(self, percentage: int | None) -> None:
        """The guest loses so much of its time, if that is another percentage than before."""
        if percentage is not None:
            self._tasks.start(self._pressure.set(percentage))

    def _progress(self) -> None:
        if self.on_progress is not None:
            tell(self.on_progress, self.query())

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        tell(self.on_event, name, data)

    async def _announce(self, number: int, pages: int) -> None:
        """A round begins."""
        self.statistics.begin_round(number, pages)
        self.journal.round_begins(number, pages)
        self._emit("MIGRATION_PASS", {"pass": number})
        await self._connection.say(
            messages.Round(number, pages, round(self.convergence.dirty_rate))
        )

    # ---- postcopy ------------------------------------------------------------------------

    async def _pause(self, error: PageferryError) -> None:
        """Drop the connection and everything that used it. The page table stays."""
        self.paused_by = error
        _log.warning("postcopy paused: %s", error)
        self.statistics.extra["paused-because"] = error.message
        await self._tasks.end()
        await self._connection.pause(error)
        await self._drop_connection()
        if self._equipment is not None:
            self.core.remaining = self._equipment.remaining()
            self.statistics.begin_round(self.statistics.rounds, self.core.remaining)
        asked = []
        while not self._events.empty():  # of the connection that is gone
            event = self._events.get_nowait()
            if isinstance(event, core.RecoverAsked | core.CancelAsked):
                asked.append(event)
        for event in asked:
            self._events.put_nowait(event)
        self._tasks.start(self._show_paused())
        self._progress()

    async def _show_paused(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._progress()

    async def _drop_connection(self) -> None:
        if self._equipment is not None:
            await self._equipment.stop()
        self._connection.close()

    async def _reconnect(self, where: str, remainder: Remainder) -> core.Event:
        """A new connection and new workers for the old page table."""
        equipment = self._equipped()
        await self._connection.locate(where)
        await self._connection.find()
        equipment.renew_locks()
        self._tasks.start(self._watch())
        starting = self._tasks.start(equipment.start(self.parameters))
        key = self._connection.new_channel_keys()
        answer = await self._connection.first_words(
            messages.Resume(messages.PROTOCOL, self.uuid, self.parameters.workers, key)
        )
        await starting
        if isinstance(answer, messages.Ended):  # its word for it was lost
            remainder.take_end(answer)
            return core.PostcopyEnded()
        assert isinstance(answer, messages.Resumed)
        remainder.resume(answer.received)
        await self._open(answer)
        self.statistics.extra.pop("paused-because", None)
        self.statistics.extra["recoveries"] = self.statistics.extra.get("recoveries", 0) + 1
        return core.Reconnected(equipment.remaining())

    # ---- the end -------------------------------------------------------------------------

    async def _verify(self) -> core.Event:
        ask, blocks = self._connection.ask, self.guest.blocks
        if self._sums:
            verdict = await verify_sums(ask, blocks, self._initial.kept)
        else:
            verdict = await verify_digests(ask, blocks, self._equipped().crew, self._tasks)
        if not verdict.wrong:
            self.statistics.extra["verified"] = verdict.digests
        return core.Verified(verdict.wrong)

    async def _close(self, finish: core.Finish) -> None:
        """Let go of everything; the guest resumes only if the core says so.

        Each step is taken whatever became of the others.
        """
        self.statistics.ended = time.monotonic()
        await self._tasks.end()
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
        if self._remainder is not None:
            self._remainder.close(arrived=self.core.status is Status.COMPLETED)
        if self._equipment is not None:
            self._equipment.close()

    async def _abort(self, finish: core.Finish) -> None:
        if finish.error is not None:
            await self._connection.abort(finish.error)

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
        if self._equipment is not None:
            if finish.error is not None:
                self._equipment.hurry()
            await self._equipment.stop()
        self.statistics.remember_processes(*self._pools())

    async def _hang_up(self, finish: core.Finish) -> None:
        self._connection.forget_the_lost()
        await self._drop_connection()

    async def _give_back(self, finish: core.Finish) -> None:
        """All memory, once the destination has all of it. That takes a while, in which it may
        leave: so not before it is over here, or that would be a postcopy that broke."""
        done = self.core.leaving and self.core.status is Status.COMPLETED
        if self._remainder is not None and self._remainder.releasing is not None and done:
            await self._call(self._remainder.releasing.everything)

    async def _last_words(self, finish: core.Finish) -> None:
        await self.dirty_rates.close()
        self.statistics.extra |= self.guest.describe()
        self._progress()
