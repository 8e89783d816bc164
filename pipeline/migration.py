"""The source's decisions: events in, instructions out. Pure.

`handle(event)` returns what is to be done next; the coordinator does it and comes back with
the result as an event. No knowledge of sockets, processes, clocks or guests in here, so
every path, cancel and failure in every state included, is tested without any of them.

    greet → channels → initial set → rounds … → stop → last set → last round
          → verify → device state → run → confirmed

Until `Run` is said the source may resume. From then on only the destination's own word that
it does not run lets it: a lost answer leaves the source stopped (ConfirmationLost).
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
    VerificationFailed,
)
from ..transport.pages import PAGE_SIZE
from ..transport.quantities import format_rate, format_seconds
from .convergence import Convergence, Decision
from .state import FINAL, Status, advance

# A static source whose frames are lost this many rounds in a row has a broken link.
_RESENDS = 5

# ---- events -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """Somebody wants it."""


@dataclass(frozen=True)
class ChannelsReady:
    """The destination agreed, all senders are up and know their channel."""


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


Event = (
    Started | ChannelsReady | Taken | RoundDone | GuestStopped | Verified | StateLoaded
    | Confirmed | Failed | CancelAsked
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
class StopGuest:
    """Then: GuestStopped."""


@dataclass(frozen=True)
class Verify:
    """Compare the digests of all blocks. Then: Verified."""


@dataclass(frozen=True)
class SendState:
    """Then: StateLoaded."""


@dataclass(frozen=True)
class SendRun:
    """Then: Confirmed. From here on the source does not resume."""


@dataclass(frozen=True)
class Finish:
    """It is over. With `resume` the guest goes on here."""

    error: PageferryError | None
    resume: bool


Instruction = (
    OpenChannels | TakeInitial | TakeDirty | SendRound | StopGuest | Verify | SendState
    | SendRun | Finish
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
    status: Status = Status.NONE
    round: int = 0
    stopped: bool = False
    run_said: bool = False
    remaining: int = 0  # pages in the table
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
                self._become(Status.ACTIVE)
                return [TakeInitial()]
            case Taken():
                return self._taken(event)
            case RoundDone():
                return self._round_done(event)
            case GuestStopped():
                self.stopped = True
                return [TakeDirty()]
            case Verified():
                return self._verified(event)
            case StateLoaded():
                self.run_said = True
                return [SendRun()]
            case Confirmed():
                if not self.run_said:
                    raise LocalProtocolError("confirmed before it was told to run")
                self._become(Status.COMPLETED)
                return [Finish(None, resume=False)]
            case Failed():
                return self._failed(event)
            case CancelAsked():
                return self._cancel()

    def _become(self, status: Status) -> None:
        self.status = advance(self.status, status)

    def _taken(self, event: Taken) -> list[Instruction]:
        self.remaining = event.pages
        if self.round == 0 or self.stopped:
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
        if decision is Decision.GIVE_UP:
            return self._failed(Failed(self._not_converging()))
        return self._next_round()

    def _next_round(self) -> list[Instruction]:
        self.round += 1
        return [SendRound(self.round, live=self.live and not self.stopped)]

    def _switch_over(self) -> list[Instruction]:
        self._become(Status.DEVICE)
        if self.can_stop:
            return [StopGuest()]
        return self._complete()

    def _round_done(self, event: RoundDone) -> list[Instruction]:
        self.remaining = event.lost
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
        if self.status is Status.ACTIVE:  # nothing to stop
            self._become(Status.DEVICE)
        return self._complete()

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
            f"let the guest write less",
            rounds=c.rounds, dirty_rate=int(c.dirty_rate), rate=int(c.rate),
            remaining=self.remaining * PAGE_SIZE, expected_downtime_ms=round(needed * 1000),
        )  # fmt: skip

    def _failed(self, event: Failed) -> list[Instruction]:
        error = event.error
        if self.run_said and not event.by_peer:
            error = ConfirmationLost(
                "the destination was told to run and did not confirm it "
                f"({event.error}): the source stays stopped. If the guest does not run at the "
                "destination, resume it here; if it does, end it here",
            )
            self._become(Status.FAILED)
            return [Finish(error, resume=False)]
        self._become(Status.CANCELLED if self.status is Status.CANCELLING else Status.FAILED)
        return [Finish(error, resume=True)]

    def _cancel(self) -> list[Instruction]:
        if self.run_said:
            return []  # too late: the destination may be running
        if self.status is Status.NONE:
            self._become(Status.SETUP)
        self._become(Status.CANCELLING)
        self._become(Status.CANCELLED)
        return [Finish(Cancelled("cancelled; the source is as it was"), resume=True)]
