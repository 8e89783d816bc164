"""What a migration would be like: predicted by the source's own decisions (migration.py, with the
rule of convergence.py), carried out on a simulated clock by a guest, a link and workers that are
curves and rates. Pure.

Nothing is decided here that those decide: a change of theirs changes the prediction. What a guest
writes in a round of so many seconds, its WorkingSet says; how fast that moves, trials said.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from ..transport.errors import PageferryError
from ..transport.pages import PAGE_SIZE
from . import migration as core
from . import pacing
from .convergence import Convergence
from .dirty_rate import WorkingSet
from .parameters import AUTO, NEVER
from .throttling import Rules, Throttling
from .tuning import Setting

PRECOPY, THROTTLED, POSTCOPY = "precopy", "auto-converge", "postcopy"
MODES = (PRECOPY, THROTTLED, POSTCOPY)

# Between two rounds: a barrier on every channel, and the workers' last extents and first ones.
_BETWEEN_SECONDS = 0.004
# The background of a postcopy leaves some of a link that is the bottleneck to faults.
_BACKGROUND = (pacing.LEAST + pacing.SHARE) / 2
# A bandwidth that would do is looked for so often, each time in half of what is left.
_HALVINGS = 24
LEAST_BANDWIDTH = 100_000  # parameters.py
# What needs more than this share of what it may take is not sure to fit.
_TIGHT = 0.9


@dataclass(frozen=True)
class Speed:
    """How memory of one kind moves. `rate`: bytes of it a second, zero pages are in it, with no
    limit but these hosts; `wire`: bytes on the wire for one of it; `zero`: share of its pages."""

    rate: float
    wire: float = 1.0
    zero: float = 0.0

    def seconds(self, size: float, bandwidth: int) -> float:
        """For `size` bytes, over a link of `bandwidth` bytes a second (0: none that limits)."""
        moving = size / max(self.rate, 1.0)
        return max(moving, size * self.wire / bandwidth) if bandwidth else moving

    def bound_by_link(self, bandwidth: int) -> bool:
        return bool(bandwidth) and self.wire * self.rate > bandwidth


@dataclass(frozen=True)
class Tried:
    """A setting, and what trials with it were like: of memory as it is, and of what the guest
    writes. Seconds: `setup`, until the first page; `switchover`, with no page left."""

    setting: Setting
    memory: Speed
    written: Speed
    setup: float
    switchover: float


@dataclass(frozen=True)
class Guest:
    """What is to be moved. `pages`: those that hold something; `curve`: what it writes; `take`:
    seconds that a look for written pages takes; `scan`: seconds more that one worker needs to
    compare all memory, the first time and when it stands still, or each time (`scan_always`);
    `discard`: seconds that the other end needs to forget a page, in a postcopy."""

    live: bool
    can_stop: bool
    can_throttle: bool
    can_leave: bool  # by postcopy
    pages: int
    curve: WorkingSet
    take: float = 0.0
    scan: float = 0.0
    scan_always: bool = False
    discard: float = 0.0


@dataclass(frozen=True)
class Goal:
    """What is asked for: bytes a second (0: as much as there is), seconds, rounds."""

    bandwidth: int = 0
    downtime_limit: float = 0.3
    max_rounds: int = 30


@dataclass(frozen=True)
class Round:
    """One round: pages sent, seconds, and pages that were written meanwhile. `live`: the guest ran
    here; in the last one it stands still, or runs at the other end."""

    pages: float
    seconds: float
    written: float = 0.0
    live: bool = True


@dataclass
class Prediction:
    """What would become of it. Seconds; `wire`: bytes; `throttle`: percent, at the end;
    `slow_down`: share of its time that the guest was held back while it was moved; `needed`: the
    shortest downtime with which it could have been stopped in any round; `why`: what it failed
    with, "" if it did not."""

    mode: str
    setting: Setting
    total: float = 0.0
    downtime: float | None = None
    wire: float = 0.0
    throttle: int = 0
    slow_down: float = 0.0
    needed: float | None = None
    dirty_rate: float = 0.0  # the last, as convergence.py has it
    rate: float = 0.0
    left: float = 0.0  # pages, at the end of precopy
    why: str = ""
    rounds: list[Round] = field(default_factory=list)

    @property
    def converges(self) -> bool:
        return not self.why

    @property
    def live_rounds(self) -> list[Round]:
        """Those in which the guest ran here."""
        return [one for one in self.rounds if one.live]


def predict(guest: Guest, tried: Tried, goal: Goal, mode: str = PRECOPY) -> Prediction:
    """What becomes of `guest` with these settings."""
    return _Run(guest, tried, goal, mode).to_its_end()


class _Run:
    """The runner of one migration: what source.py is in reality. Time is `now`."""

    def __init__(self, guest: Guest, tried: Tried, goal: Goal, mode: str) -> None:
        self.guest, self.tried, self.goal, self.mode = guest, tried, goal, mode
        self.found = Convergence(goal.downtime_limit, goal.max_rounds, goal.bandwidth)
        self.core = core.Migration(
            guest.live, guest.can_stop, False, self.found,
            postcopy=AUTO if mode == POSTCOPY else NEVER,
            throttling=Throttling(Rules(auto_converge=mode == THROTTLED)),
        )  # fmt: skip
        self.told = Prediction(mode, tried.setting)
        self.now = self.taken_at = self.stopped_at = 0.0
        self.pages = 0.0  # to be sent
        self.lost_time = 0.0  # of the guest's, by the throttle
        self.percent = 0  # that the guest loses of its time

    def to_its_end(self) -> Prediction:
        todo = deque(self.core.handle(core.Started()))
        while todo:
            instruction = todo.popleft()
            if isinstance(instruction, core.Finish):
                self._finish(instruction.error)
                break
            event = self._carry_out(instruction)
            if event is not None:
                todo.extend(self.core.handle(event))
        return self.told

    def _finish(self, error: PageferryError | None) -> None:
        told = self.told
        told.total, told.left = self.now, self.pages
        told.dirty_rate, told.rate = self.found.dirty_rate, self.found.rate
        if error is not None:
            told.why = error.message
        told.throttle = self.percent
        told.slow_down = self.lost_time / max(self.now, 1e-9)

    def _carry_out(self, instruction: core.Instruction) -> core.Event | None:
        """What comes of it; None if nothing does by itself."""
        match instruction:
            case core.OpenChannels():
                self.now += self.tried.setup
                return core.ChannelsReady()
            case core.TakeInitial():
                self.taken_at, self.pages = self.now, float(self.guest.pages)
                return core.Taken(self.guest.pages, self.guest.pages, 0.0, 0.0)
            case core.TakeDirty():
                return self._take()
            case core.SendRound():
                return self._send(instruction)
            case core.AskToStop():
                return core.MayStop(0.0)
            case core.StopGuest():
                self.stopped_at = self.now
                return core.GuestStopped()
            case core.Verify():
                return core.Verified()
            case core.SendState():
                return core.StateLoaded()
            case core.SendRun():
                return self._run()
            case _:
                return self._carry_out_postcopy(instruction)

    def _carry_out_postcopy(self, instruction: core.Instruction) -> core.Event | None:
        match instruction:
            case core.Throttle():
                self.percent = instruction.percentage
                return None
            case core.TellMissing():
                self.now += self.pages * self.guest.discard
                return core.MissingTold()
            case core.SendBackground():
                seconds = self._move(self.tried.written, _BACKGROUND)
                self.told.rounds.append(Round(self.pages, seconds, live=False))
                self.pages = 0.0
                return core.BackgroundDone()
            case core.EndPostcopy():
                return core.PostcopyEnded()
            case _:  # what changes nothing of this
                return None

    def _take(self) -> core.Event:
        since = (self.stopped_at if self.core.stopped else self.now) - self.taken_at
        written = self._curve().pages(since) if self.guest.live else 0.0
        self.taken_at = self.now
        # what is left of a round that was not sent may be written again
        self.pages = min(float(self.guest.curve.total), self.pages + written)
        self.now += self.guest.take
        if self.core.stopped or len(self.told.rounds) == 1 or self.guest.scan_always:
            self.now += self._scan
        if not self.core.stopped and self.told.rounds:
            last = self.told.rounds[-1]
            self.told.rounds[-1] = replace(last, written=written)
            self._note_needed(since, written)
        return core.Taken(round(self.pages), round(written), since, self._took)

    @property
    def _took(self) -> float:
        """What a look takes, as the source counts it: with what it will take in the end."""
        return self.guest.take + self._scan

    @property
    def _scan(self) -> float:
        return self.guest.scan / self.tried.setting.workers

    def _note_needed(self, since: float, written: float) -> None:
        """What a switchover would take now, by the rule that decides."""
        found = replace(self.found)
        found.dirty_taken(round(written), since, self._took)
        needed = found.expected_downtime(round(self.pages))
        self.told.needed = min(needed, self.told.needed or needed)

    def _curve(self) -> WorkingSet:
        return self.guest.curve.slowed(1 - self.percent / 100) if self.percent else self.guest.curve

    def _send(self, instruction: core.SendRound) -> core.Event:
        speed = self.tried.memory if instruction.number == 1 else self.tried.written
        pages = self.pages
        seconds = self._move(speed)
        self.told.rounds.append(Round(pages, seconds, live=instruction.live))
        if instruction.live:
            self.now += _BETWEEN_SECONDS
            self.lost_time += seconds * self.percent / 100
        self.pages = 0.0
        size = pages * PAGE_SIZE
        return core.RoundDone(
            round(pages), 0, seconds, zero=round(pages * speed.zero), wire=round(size * speed.wire)
        )

    def _move(self, speed: Speed, share: float = 1.0) -> float:
        """All that is to be sent, over `share` of the link."""
        size = self.pages * PAGE_SIZE
        seconds = speed.seconds(size, round(self.goal.bandwidth * share))
        self.now += seconds
        self.told.wire += size * speed.wire
        return seconds

    def _run(self) -> core.Event:
        self.now += self.tried.switchover
        if self.guest.live and self.guest.can_stop:
            self.told.downtime = self.now - self.stopped_at
        return core.Confirmed()


# ---- what would be needed ----------------------------------------------------------------------


def bandwidth_needed(guest: Guest, tried: Tried, goal: Goal) -> int | None:
    """The least bandwidth, bytes a second, with which precopy would do; None if none would."""
    enough = round(tried.memory.rate * max(tried.memory.wire, tried.written.wire, 1.0)) * 2
    if not _does(guest, tried, replace(goal, bandwidth=0)):
        return None
    low, high = LEAST_BANDWIDTH, enough
    for _ in range(_HALVINGS):
        middle = (low + high) // 2
        if _does(guest, tried, replace(goal, bandwidth=middle)):
            high = middle
        else:
            low = middle
    return high


def downtime_needed(guest: Guest, tried: Tried, goal: Goal) -> float | None:
    """The least downtime limit, seconds, with which precopy would do."""
    found = predict(guest, tried, replace(goal, downtime_limit=1e-6))
    return found.needed


def _does(guest: Guest, tried: Tried, goal: Goal) -> bool:
    return predict(guest, tried, goal).converges


def is_tight(found: Prediction, goal: Goal) -> bool:
    """Whether it fits so narrowly that it may not, or that a round more or less decides."""
    return found.needed is not None and found.needed > _TIGHT * goal.downtime_limit
