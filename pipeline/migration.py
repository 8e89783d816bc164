"""The source's decisions: events in, instructions out. Pure.

`handle(event)` returns what is to be done next; the coordinator does it and comes back with
the result as an event. No knowledge of sockets, processes, clocks or guests in here, so
every path, cancel and failure in every state included, is tested without any of them.

    greet → channels → initial set → rounds, throttled … → (ask) → stop → (wait) → last set
          → last round → verify → device state → run → confirmed
    postcopy:                                 … → stop → last set → say what is missing
          → device state → run → confirmed → background → end

Until `Run` is said the source may resume. From then on only the destination's own word that
it does not run lets it: a lost answer leaves the source stopped (ConfirmationLost). In postcopy
whatever breaks from then on pauses both ends until somebody asks to recover.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..transport.errors import (
    Cancelled,
    ConfirmationLost,
    LocalProtocolError,
    NotConverging,
    PageferryError,
    PeerLost,
    PostcopyFailed,
    VerificationFailed,
)
from ..transport.pages import PAGE_SIZE
from ..transport.quantities import format_rate, format_seconds
from .convergence import Convergence, Decision
from .parameters import AUTO, NEVER, NOW
from .state import FINAL, IN_POSTCOPY, Status, advance
from .throttling import Throttling

# A static source whose frames are lost this many rounds in a row has a broken link.
_RESENDS = 5
# Whoever is asked may take so long; after that the guest has written more than was decided on.
SOON_SECONDS = 0.05

# ---- events -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """Somebody wants it."""


@dataclass(frozen=True)
class ChannelsReady:
    """The destination agreed, all senders are up and know their channel. `acks`: it says when it
    is ready for the switchover, and is to be waited for."""

    acks: bool = False


@dataclass(frozen=True)
class Taken:
    """The pages that must be sent were taken into the table: `pages` in all, of which
    `written` were written in the last `since` seconds; that took `took` seconds."""

    pages: int
    written: int
    since: float
    took: float


@dataclass(frozen=True)
class RoundDone:
    """A round is over and confirmed on every channel; `lost` pages must go again. `zero` of its
    pages were zero, and `wire` bytes were sent."""

    pages: int
    lost: int
    seconds: float
    zero: int = 0
    wire: int = 0


@dataclass(frozen=True)
class MayStop:
    """The guest may be stopped; the answer took so many seconds."""

    seconds: float


@dataclass(frozen=True)
class ContinueAsked:
    """migrate-continue: the pause before the switchover is over."""


@dataclass(frozen=True)
class GuestStopped:
    """The guest stands still."""


@dataclass(frozen=True)
class Verified:
    """Digests were compared; `wrong` names the blocks that differ."""

    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class StateLoaded:
    """The destination has everything and is durable."""


@dataclass(frozen=True)
class Confirmed:
    """The guest runs at the destination."""


@dataclass(frozen=True)
class Failed:
    """Something broke. `by_peer`: the destination said so itself."""

    error: PageferryError
    by_peer: bool = False


@dataclass(frozen=True)
class CancelAsked:
    """Somebody does not want it any more."""


@dataclass(frozen=True)
class PostcopyAsked:
    """migrate-start-postcopy."""


@dataclass(frozen=True)
class MissingTold:
    """The destination knows which pages are to come after the guest runs."""


@dataclass(frozen=True)
class BackgroundDone:
    """Every page was sent and is placed."""


@dataclass(frozen=True)
class PostcopyEnded:
    """The destination has everything."""


@dataclass(frozen=True)
class RecoverAsked:
    """migrate-recover. `where`: another address of the destination; "" for the same."""

    where: str = ""


@dataclass(frozen=True)
class Reconnected:
    """The destination said what it has; `pages` are still to be sent."""

    pages: int


@dataclass(frozen=True)
class Abandoned:
    """Nobody waits for the end of it any more."""

    error: PageferryError


Event = (
    Started | ChannelsReady | Taken | RoundDone | MayStop | GuestStopped | Verified | StateLoaded
    | Confirmed | Failed | CancelAsked | PostcopyAsked | MissingTold | BackgroundDone
    | PostcopyEnded | RecoverAsked | Reconnected | Abandoned | ContinueAsked
)  # fmt: skip

# ---- instructions -----------------------------------------------------------------------


@dataclass(frozen=True)
class OpenChannels:
    """Say Hello, start the senders, connect them. Then: ChannelsReady."""


@dataclass(frozen=True)
class TakeInitial:
    """Start tracking and take every page that holds something. Then: Taken."""


@dataclass(frozen=True)
class TakeDirty:
    """Take what was written. Then: Taken."""


@dataclass(frozen=True)
class SendRound:
    """Send all dirty pages, then the barrier. Then: RoundDone."""

    number: int
    live: bool


@dataclass(frozen=True)
class Throttle:
    """The guest is to lose so much of its time, 0 for nothing. Nothing follows: rounds go on."""

    percentage: int


@dataclass(frozen=True)
class AskToStop:
    """Ask whoever wants to be asked, while the guest runs. Then: MayStop."""


@dataclass(frozen=True)
class StopGuest:
    """Then: GuestStopped."""


@dataclass(frozen=True)
class Verify:
    """Compare the digests of all blocks. Then: Verified."""


@dataclass(frozen=True)
class SendState:
    """Then: StateLoaded. In postcopy the destination arms its memory first."""

    postcopy: bool = False


@dataclass(frozen=True)
class CutRound:
    """Hand out no more of the round that is under way: what is left goes by postcopy."""


@dataclass(frozen=True)
class TellMissing:
    """Name all dirty pages to the destination. Then: MissingTold."""


@dataclass(frozen=True)
class SendBackground:
    """Send all dirty pages while faults are answered. Then: BackgroundDone."""


@dataclass(frozen=True)
class EndPostcopy:
    """Then: PostcopyEnded."""


@dataclass(frozen=True)
class Pause:
    """Drop the connection and the workers; keep the page table. Nothing follows by itself."""

    error: PageferryError


@dataclass(frozen=True)
class Reconnect:
    """Connect again, learn what arrived. Then: Reconnected."""

    where: str


@dataclass(frozen=True)
class SendRun:
    """Then: Confirmed. From here on the source does not resume."""


@dataclass(frozen=True)
class Finish:
    """It is over. With `resume` the guest goes on here."""

    error: PageferryError | None
    resume: bool


Instruction = (
    OpenChannels | TakeInitial | TakeDirty | SendRound | AskToStop | StopGuest | Verify | SendState
    | SendRun | Finish | CutRound | TellMissing | SendBackground | EndPostcopy | Pause | Reconnect
    | Throttle
)  # fmt: skip

# ---- the core ---------------------------------------------------------------------------


@dataclass
class Migration:
    """One migration, seen from its source. `live`: the guest may be writing; `can_stop`: and
    can be stopped; otherwise it has moved when a scan finds nothing changed."""

    live: bool
    can_stop: bool
    verify: bool
    convergence: Convergence
    postcopy: str = NEVER  # parameters.py
    after: int | None = None  # N of after=N
    asks: bool = False
    pauses: bool = False  # before the switchover, until ContinueAsked
    acks: bool = False  # the destination has still to say that it is ready
    status: Status = Status.NONE
    round: int = 0
    stopped: bool = False
    run_said: bool = False
    remaining: int = 0  # pages in the table
    asked: bool = False  # for postcopy
    leaving: bool = False  # by postcopy: decided
    throttling: Throttling | None = None
    _moved: int = field(default=0, repr=False)  # bytes, in the last round
    released: int = 0  # pages that were given back here
    _resends: int = field(default=0, repr=False)

    def handle(self, event: Event) -> list[Instruction]:
        """What to do after `event`. After the end, nothing any more."""
        if self.status in FINAL:
            return []
        match event:
            case Started():
                self._become(Status.SETUP)
                return [OpenChannels()]
            case ChannelsReady():
                self.acks = event.acks
                self._become(Status.ACTIVE)
                return [TakeInitial()]
            case Taken():
                return self._taken(event)
            case RoundDone():
                return self._round_done(event)
            case MayStop() | GuestStopped() | ContinueAsked():
                return self._stopping(event)
            case Verified():
                return self._verified(event)
            case StateLoaded():
                self.run_said = True
                return [SendRun()]
            case Failed():
                return self._failed(event)
            case CancelAsked():
                return self._cancel()
            case Abandoned():
                return self._abandoned(event.error)
            case _:
                return self._handle_postcopy(event)

    def _handle_postcopy(self, event: Event) -> list[Instruction]:
        match event:
            case PostcopyAsked():
                self.asked = True
                in_round = self.status is Status.ACTIVE and self.round > 0
                return [CutRound()] if in_round and not self.leaving else []
            case MissingTold():
                return [SendState(postcopy=True)]
            case Confirmed():
                return self._confirmed()
            case RecoverAsked():
                if self.status is not Status.POSTCOPY_PAUSED:
                    return []
                self._become(Status.POSTCOPY_RECOVER)
                return [Reconnect(event.where)]
            case Reconnected():
                self._become(Status.POSTCOPY_ACTIVE)
                self.remaining = event.pages
                return [SendBackground()]
            case BackgroundDone() if self.status is Status.POSTCOPY_ACTIVE:
                return [EndPostcopy()]
            case PostcopyEnded() if self.status is not Status.POSTCOPY_PAUSED:
                self._become(Status.COMPLETED)
                return [Finish(None, resume=False)]
            case BackgroundDone() | PostcopyEnded():
                return []  # of a connection that is gone
            case _:
                raise LocalProtocolError(f"unknown event {event!r}")

    def _confirmed(self) -> list[Instruction]:
        if not self.run_said:
            raise LocalProtocolError("confirmed before it was told to run")
        if self.status in IN_POSTCOPY:
            return []  # it broke meanwhile
        if self.leaving:
            self._become(Status.POSTCOPY_ACTIVE)
            return [SendBackground()]
        self._become(Status.COMPLETED)
        return [Finish(None, resume=False)]

    def _become(self, status: Status) -> None:
        self.status = advance(self.status, status)

    def _taken(self, event: Taken) -> list[Instruction]:
        self.remaining = event.pages
        if self.stopped:
            return [TellMissing()] if self.leaving and event.pages else self._complete_last()
        if self.round == 0:
            if self.postcopy == NOW or (self.asked and self.postcopy != NEVER):
                return self._leave()
            return self._next_round()
        self.convergence.dirty_taken(event.written, event.since, event.took)
        if not self.can_stop:
            if event.pages == 0:
                return self._switch_over()
            if self.convergence.rounds >= self.convergence.max_rounds:
                return self._failed(Failed(self._not_converging()))
            return self._next_round()
        decision = self.convergence.decide(event.pages)
        if decision is Decision.SWITCH_OVER:
            return self._switch_over()
        before, decision = self._slow_down(event, decision)
        if self._postcopy_due(decision):
            return self._leave()
        if decision is Decision.GIVE_UP:
            return self._failed(Failed(self._not_converging()))
        return [*before, *self._next_round()]

    def _slow_down(self, event: Taken, decision: Decision) -> tuple[list[Instruction], Decision]:
        """How much the guest is slowed down from now on, if that is another percentage; and what is
        decided then: who can still be slowed down is not given up."""
        throttling = self.throttling
        if throttling is None:
            return [], decision
        before = throttling.percentage
        throttling.round_ended(event.written * PAGE_SIZE, self._moved, event.since, self.round)
        if decision is Decision.GIVE_UP and throttling.last_resort(self.round):
            decision = Decision.NEXT_ROUND
        now = throttling.percentage
        return [Throttle(now)] if now != before else [], decision

    def _complete_last(self) -> list[Instruction]:
        """The guest stands still: the last round, whatever there is in it."""
        self.leaving = False  # nothing is left that postcopy could bring later
        return self._next_round()

    def _postcopy_due(self, decision: Decision) -> bool:
        """True if it is time to start the guest before its memory is there."""
        if self.postcopy == NEVER:
            return False
        if self.asked or (self.after is not None and self.round >= self.after):
            return True
        if self.postcopy != AUTO:
            return False
        if decision is Decision.GIVE_UP:
            return True
        throttled = self.throttling is not None and self.throttling.may_still_help(self.round)
        return self.round >= 2 and self.convergence.hopeless and not throttled

    def _leave(self) -> list[Instruction]:
        self.leaving = True
        return self._stop()

    def _stop(self) -> list[Instruction]:
        if self.asks or self.acks:
            return [AskToStop()]
        if not self.pauses:  # else it is in pre-switchover only when it stands still, as in QEMU
            self._become(Status.DEVICE)
        return [StopGuest()]

    def _stopping(self, event: MayStop | GuestStopped | ContinueAsked) -> list[Instruction]:
        match event:
            case MayStop():
                return self._may_stop(event)
            case GuestStopped():
                self.stopped = True
                return self._reached_switchover()
            case ContinueAsked():
                return self._continue()

    def _may_stop(self, event: MayStop) -> list[Instruction]:
        """It is stopped at once if the answer came soon; else what was written meanwhile is looked
        at first, and has rounds if it is too much: as many as there were, be it above max-rounds.
        Memory that nobody can stop is looked at in any case."""
        self.asks = self.acks = False
        if not self.live:
            return self._all_is_there()
        if self.can_stop and (self.leaving or event.seconds <= SOON_SECONDS):
            return self._stop()
        self._grant_rounds()
        return [TakeDirty()]

    def _grant_rounds(self) -> None:
        """After a wait that is nobody's fault: they are counted anew."""
        self.convergence.max_rounds += max(1, self.convergence.rounds)

    def _reached_switchover(self) -> list[Instruction]:
        """The guest stands still, or all is there of memory that nobody stops."""
        if not self.pauses:
            return self._into_device()
        self._become(Status.PRE_SWITCHOVER)
        return []

    def _continue(self) -> list[Instruction]:
        """In any other state it comes too late, or too early, and is forgotten, as in QEMU."""
        if self.status is not Status.PRE_SWITCHOVER:
            return []
        if self.live and not self.stopped:  # somebody may have written meanwhile
            self._become(Status.DEVICE)
            self._grant_rounds()
            return [TakeDirty()]
        return self._into_device()

    def _into_device(self) -> list[Instruction]:
        if self.status is not Status.DEVICE:
            self._become(Status.DEVICE)
        return [TakeDirty()] if self.stopped else self._complete()

    def _next_round(self) -> list[Instruction]:
        self.round += 1
        return [SendRound(self.round, live=self.live and not self.stopped)]

    def _switch_over(self) -> list[Instruction]:
        return self._stop() if self.can_stop else self._all_is_there()

    def _all_is_there(self) -> list[Instruction]:
        """Of memory that nobody stops."""
        if self.status is Status.DEVICE:  # it waited already
            return self._complete()
        return [AskToStop()] if self.acks else self._reached_switchover()

    def _round_done(self, event: RoundDone) -> list[Instruction]:
        self.remaining = event.lost
        self._moved = event.pages * PAGE_SIZE
        self.convergence.round_done(event.pages, event.seconds, event.zero, event.wire)
        if self.live and not self.stopped:
            return [TakeDirty()]
        if event.lost:
            self._resends += 1
            if self._resends > _RESENDS:
                return self._failed(Failed(PeerLost(
                    f"frames were lost in each of {_RESENDS} rounds: the link damages what it "
                    "carries"
                )))  # fmt: skip
            return self._next_round()
        return self._complete() if self.stopped else self._all_is_there()

    def _complete(self) -> list[Instruction]:
        return [Verify()] if self.verify else [SendState()]

    def _verified(self, event: Verified) -> list[Instruction]:
        if event.wrong:
            return self._failed(Failed(VerificationFailed(
                f"digests differ for {', '.join(event.wrong)}: the destination was thrown away",
                blocks=list(event.wrong),
            )))  # fmt: skip
        return [SendState()]

    def _not_converging(self) -> NotConverging:
        c = self.convergence
        needed = c.expected_downtime(self.remaining)
        return NotConverging(
            f"not converging after {c.rounds} rounds: the guest writes at least "
            f"{format_rate(c.dirty_rate)}, "
            f"{format_rate(c.rate)} are moved, {self.remaining * PAGE_SIZE >> 20} MiB are left; "
            f"a switchover now would take {format_seconds(needed)} and the limit is "
            f"{format_seconds(c.downtime_limit)}: raise --downtime-limit or --max-bandwidth, or "
            f"let the guest write less{self._how_to_slow_it()}",
            rounds=c.rounds, dirty_rate=int(c.dirty_rate), rate=int(c.rate),
            remaining=self.remaining * PAGE_SIZE, expected_downtime_ms=round(needed * 1000),
        )  # fmt: skip

    def _how_to_slow_it(self) -> str:
        if self.throttling is None or not self.can_stop:
            return ""
        if self.throttling.percentage:
            return f" (it had lost {self.throttling.percentage} % of its time already)"
        return "" if self.throttling.on else " (--auto-converge or --dirty-limit slow it down)"

    def _failed(self, event: Failed) -> list[Instruction]:
        error = event.error
        if self.run_said and self.leaving and not event.by_peer:
            if self.status is Status.POSTCOPY_PAUSED:
                return []
            self._become(Status.POSTCOPY_PAUSED)
            return [Pause(error)]
        if self.run_said and not event.by_peer:
            error = ConfirmationLost(
                "the destination was told to run and did not confirm it "
                f"({event.error}): the source stays stopped. If the guest does not run at the "
                "destination, resume it here; if it does, end it here",
            )
            self._become(Status.FAILED)
            return [Finish(error, resume=False)]
        if self.status in IN_POSTCOPY:
            # the destination's own word that it gave up the guest
            self._become(Status.FAILED)
            return [Finish(self._lost(error), resume=False)]
        self._become(Status.CANCELLED if self.status is Status.CANCELLING else Status.FAILED)
        return [Finish(error, resume=True)]

    def _lost(self, error: PageferryError) -> PageferryError:
        if not self.remaining:
            return PostcopyFailed(
                f"all memory was sent, and the destination did not confirm that it came ({error}): "
                f"look there whether the guest is whole",
                remaining=0,
            )
        here = "its memory here is as it was when it left"
        if self.released:
            here = (
                f"{self.released * PAGE_SIZE >> 20} MiB of its memory here were given back "
                f"(--release-ram), so that nothing of it can be started any more"
            )
        return PostcopyFailed(
            f"the guest was started at the destination and {self.remaining * PAGE_SIZE >> 20} MiB "
            f"of its memory never arrived ({error}): end it there; {here}",
            remaining=self.remaining * PAGE_SIZE,
        )

    def _abandoned(self, error: PageferryError) -> list[Instruction]:
        if not (self.run_said and self.leaving):
            return self._failed(Failed(error))
        if self.status is Status.DEVICE:
            self._become(Status.POSTCOPY_PAUSED)
        self._become(Status.FAILED)
        return [Finish(self._lost(error), resume=False)]

    def _cancel(self) -> list[Instruction]:
        if self.status is Status.POSTCOPY_PAUSED:
            return self._abandoned(Cancelled("given up while paused"))
        if self.run_said:
            return []  # too late: the destination may be running
        if self.status is Status.NONE:
            self._become(Status.SETUP)
        self._become(Status.CANCELLING)
        self._become(Status.CANCELLED)
        return [Finish(Cancelled("cancelled; the source is as it was"), resume=True)]
