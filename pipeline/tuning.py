"""Which settings to try next, and which is best: the core of `pageferry tune`. Pure.

A trial moves a part of a sample with one setting; `Tuner.next()` says which, `learn()` takes what
it was like. Factors are treated one after the other, since they hardly depend on each other: codec
and level first (they matter most), then workers and pages in a batch, each walked up and down from
where it is until it is clearly worse; then codecs that were close once more, where that led. What
is close is repeated, in turns, what is clearly worse is not (racing; Maron & Moore, Hoeffding
races, 1994, with the spread that the repeats show). Rates are compared as logarithms: noise is a
share.

Where a time is taken, or who moves what, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

# A trial is made so large that it takes this long: shorter ones show the start of the processes,
# longer ones cost without saying more.
TRIAL_SECONDS = 0.3
# The least that a trial moves: several extents for each of some workers.
LEAST_BYTES = 16 << 20
# Of a codec that nobody has tried: one at a high level takes a hundred times as long as another.
_PILOT_BYTES = 32 << 20
# A trial that took less of TRIAL_SECONDS than this, and was not all there is, says too little.
_TOO_SHORT = 0.5
# Spread of repeats before there were any, and how many repeats that counts for.
_PRIOR_SPREAD, _PRIOR_WEIGHT = 0.04, 4
# So many standard errors are "clear".
_CLEAR = 2.0
# By how much more a single trial must be worse to be believed.
_ONCE = math.log(2)
# What differs by less than this is the same to whoever asks.
_SAME = 0.02
# A codec this much slower than the best is not tried with other workers.
_FAR = math.log(1.3)
# Trials of one setting, at the most: in a walk, at the end.
_REPEATS, _LAST_REPEATS = 2, 4
# After so many trials two that are the same are not told apart any more.
_SETTLED = 3
# So many codecs that were close are tried again where the walks led.
_AGAIN = 3
# So many of the best are told apart at the end.
_LAST = 5
# What a guest has left to send when it is stopped, for the estimate of its downtime.
LEFT_BYTES = 16 << 20

FASTEST, LEAST_CPU, LEAST_DOWNTIME = "fastest", "least-cpu", "least-downtime"
GOALS = (FASTEST, LEAST_CPU, LEAST_DOWNTIME)


@dataclass(frozen=True)
class Setting:
    """What a migration is given. `level`: None for the codec's own."""

    workers: int
    codec: str
    level: int | None
    batch_pages: int

    def __str__(self) -> str:
        return f"{self.workers} x {self.how}, {self.batch_pages} pages"

    @property
    def how(self) -> str:
        return self.codec if self.level is None else f"{self.codec} {self.level}"


@dataclass(frozen=True)
class Space:
    """What is tried: numbers ascending, codecs as (name, level)."""

    workers: tuple[int, ...]
    codecs: tuple[tuple[str, int | None], ...]
    batches: tuple[int, ...]

    def all(self) -> list[Setting]:
        return [Setting(w, c, n, b) for w in self.workers for c, n in self.codecs
                for b in self.batches]  # fmt: skip

    def start(self, workers: int, batch: int) -> Setting:
        """The setting from which to look, near to these."""
        codec, level = self.codecs[0]
        return Setting(
            min(self.workers, key=lambda w: abs(w - workers)), codec, level,
            min(self.batches, key=lambda b: abs(b - batch)),
        )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """Move the first `share` (0..1] of the sample with this setting. `counts`: False for the one
    that only warms up."""

    setting: Setting
    share: float
    counts: bool = True


@dataclass(frozen=True)
class Measured:
    """A trial. `size`: bytes of guest memory, zero pages are in it, holes are not; `seconds`: while
    it was moved, set-up left out; `wire`: bytes. Processor seconds of all senders, of all receivers
    (None: unknown); `waited`: seconds all senders waited for link or receivers; `switchover`:
    seconds for which a guest would have stood still with nothing left to send (None: nothing
    runs); `touch`: processor seconds that a byte at the destination costs more when it is touched
    for the first time; `cpus`: of the destination. `whole`: all of the sample."""

    setting: Setting
    size: int
    seconds: float
    wire: int
    sender_cpu: float
    receiver_cpu: float | None
    waited: float
    switchover: float | None = None
    touch: float = 0.0
    cpus: int = 0
    whole: bool = False

    @property
    def rate(self) -> float:
        """Bytes of guest memory a second."""
        return self.size / max(self.seconds, 1e-6)

    @property
    def cpu(self) -> float:
        """Processor seconds a byte, of both ends as far as they are known."""
        return max(self.sender_cpu + (self.receiver_cpu or 0.0), 1e-9) / max(self.size, 1)

    @property
    def short(self) -> bool:
        return self.seconds < _TOO_SHORT * TRIAL_SECONDS and not self.whole


@dataclass
class Book:
    """What was measured, by setting, in the order in which each was first tried."""

    runs: dict[Setting, list[Measured]] = field(default_factory=dict)

    def add(self, measured: Measured) -> None:
        self.runs.setdefault(measured.setting, []).append(measured)

    def good(self, setting: Setting) -> list[Measured]:
        """Its trials; those that were long enough, if there is one."""
        runs = self.runs.get(setting, [])
        return [run for run in runs if not run.short] or runs

    def cost(self, setting: Setting, goal: str) -> float:
        """The less the better: the logarithm of what `goal` wants little of."""
        values = [self._cost(run, goal) for run in self.good(setting)]
        return median(values) if len(values) > 2 else fmean(values)

    def _cost(self, run: Measured, goal: str) -> float:
        if goal == FASTEST:
            return -math.log(run.rate)
        if goal == LEAST_CPU:
            return math.log(run.cpu)
        return math.log(self.downtime(run.setting) or 1.0)

    def rate(self, setting: Setting) -> float:
        return math.exp(-self.cost(setting, FASTEST))

    def cpu(self, setting: Setting) -> float:
        """Processor seconds a byte."""
        return math.exp(self.cost(setting, LEAST_CPU))

    def switchover(self, workers: int) -> float | None:
        """What it takes with nothing left: a matter of the number of channels alone."""
        found = [run.switchover for runs in self.runs.values() for run in runs
                 if run.setting.workers == workers and run.switchover is not None]  # fmt: skip
        return median(found) if found else None

    def downtime(self, setting: Setting) -> float | None:
        """The switchover, and LEFT_BYTES at the setting's rate; None if nothing runs."""
        fixed = self.switchover(setting.workers)
        return None if fixed is None else fixed + LEFT_BYTES / self.rate(setting)

    def spread(self, setting: Setting) -> float | None:
        """Standard deviation of its rates, as a share; None of a single trial."""
        values = [math.log(run.rate) for run in self.good(setting)]
        return _deviation(values) if len(values) > 1 else None

    def noise(self, goal: str) -> float:
        """The spread of repeats, of all settings together (in logarithms)."""
        weight, total = float(_PRIOR_WEIGHT), _PRIOR_WEIGHT * _PRIOR_SPREAD**2
        for setting in self.runs:
            values = [self._cost(run, goal) for run in self.good(setting)]
            if len(values) > 1:
                weight += len(values) - 1
                total += (len(values) - 1) * _deviation(values) ** 2
        return math.sqrt(total / weight)

    def clearly(self, a: Setting, b: Setting, goal: str) -> bool:
        """Is `b` worse than `a`, beyond what noise makes of equals?"""
        n, m = len(self.good(a)), len(self.good(b))
        limit = _CLEAR * self.noise(goal) * math.sqrt(1 / n + 1 / m)
        if m == 1:  # one trial may have met something else that ran just then
            limit += _ONCE
        return self.cost(b, goal) - self.cost(a, goal) > max(limit, _SAME)

    def best(self, goal: str, among: Iterable[Setting] | None = None) -> Setting:
        return min(among or self.runs, key=lambda setting: self.cost(setting, goal))


def _deviation(values: Sequence[float]) -> float:
    middle = fmean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))


Steps = Generator[Trial, Measured, None]


class Tuner:
    """Looks for the best settings of `space`. `size`: bytes of data of the whole sample; `start`:
    where to begin; `goals`: what is looked for beyond throughput."""

    def __init__(
        self, space: Space, size: int, start: Setting, goals: Sequence[str] = GOALS
    ) -> None:
        self.space, self.size, self.book = space, size, Book()
        self.done = 0
        self._goals = goals
        self._start = start
        self._steps = self._search()
        self._trial: Trial | None = next(self._steps)

    def __repr__(self) -> str:
        return f"<Tuner {self.done} trials, {len(self.book.runs)} settings>"

    def next(self) -> Trial | None:
        """The trial that is to be made now; None when it is over."""
        return self._trial

    def learn(self, measured: Measured) -> None:
        """What `next()` was like."""
        assert self._trial is not None
        self.done += 1
        if self._trial.counts:
            self.book.add(measured)
        try:
            self._trial = self._steps.send(measured)
        except StopIteration:
            self._trial = None

    def expected(self) -> int:
        """How many trials it will be in all, about: for a display."""
        few = 2 * (min(len(self.space.workers), 4) + min(len(self.space.batches), 4))
        guess = 2 + 2 * len(self.space.codecs) + few + 6 * (LEAST_CPU in self._goals)
        return self.done if self._trial is None else max(guess, self.done + 2)

    def best(self) -> dict[str, Setting]:
        """What is named, by goal."""
        return best_of(self.book)

    # ---- the search ----------------------------------------------------------------------

    def _search(self) -> Steps:
        start = self._start
        yield Trial(start, self._share(start), counts=False)
        yield from self._look(start, FASTEST)
        if LEAST_CPU in self._goals:
            # one worker wastes least: nobody waits for another
            cheap = self.book.best(LEAST_CPU)
            yield from self._walk_workers(cheap, LEAST_CPU)
            yield from self._walk_batches(self.book.best(LEAST_CPU), LEAST_CPU)
            yield from self._race(self._close(LEAST_CPU), LEAST_CPU, _REPEATS)

    def _look(self, start: Setting, goal: str) -> Steps:
        codecs = [self._with_codec(start, c) for c in self.space.codecs]
        yield from self._race(codecs, goal, _REPEATS)
        ranked = sorted(codecs, key=lambda s: self.book.cost(s, goal))
        close = [s for s in ranked
                 if self.book.cost(s, goal) - self.book.cost(ranked[0], goal) < _FAR]  # fmt: skip
        walked = set()
        for setting in close[:2]:
            walked.add((setting.codec, setting.level))
            yield from self._walk_from(setting, goal)
        # all that were close, where this led; and if another one wins, it is walked as well
        found = self.book.best(goal)
        again = [self._with_codec(found, (s.codec, s.level)) for s in close[:_AGAIN]]
        yield from self._race([found, *again], goal, _REPEATS)
        now = self.book.best(goal)
        if (now.codec, now.level) not in walked:
            yield from self._walk_from(now, goal)
        yield from self._race(self._close(goal), goal, _LAST_REPEATS)

    def _walk_from(self, start: Setting, goal: str) -> Steps:
        """Workers and batches of one codec."""
        yield from self._walk_workers(start, goal)
        mine = [s for s in self.book.runs if (s.codec, s.level) == (start.codec, start.level)]
        yield from self._walk_batches(self.book.best(goal, mine), goal)

    def _walk_workers(self, start: Setting, goal: str) -> Steps:
        steps = [Setting(w, start.codec, start.level, start.batch_pages)
                 for w in self.space.workers]  # fmt: skip
        yield from self._walk(steps, start, goal)

    def _walk_batches(self, start: Setting, goal: str) -> Steps:
        steps = [Setting(start.workers, start.codec, start.level, b) for b in self.space.batches]
        yield from self._walk(steps, start, goal)

    def _walk(self, steps: list[Setting], start: Setting, goal: str) -> Steps:
        """From `start` up and down its row, each way until it is clearly worse, or twice not
        better; then a race of all that were seen."""
        for way in (1, -1):
            at, patience = steps.index(start) + way, 2
            while 0 <= at < len(steps) and patience:
                yield from self._measure(steps[at])
                best = self.book.best(goal, [s for s in steps if s in self.book.runs])
                if best != steps[at]:
                    patience = 0 if self.book.clearly(best, steps[at], goal) else patience - 1
                at += way
        yield from self._race([s for s in steps if s in self.book.runs], goal, _REPEATS)

    def _race(self, settings: Iterable[Setting], goal: str, most: int) -> Steps:
        """Measure all, then again, in turns, those that may yet be the best."""
        field = list(dict.fromkeys(settings))
        for setting in field:
            if setting not in self.book.runs:
                yield from self._measure(setting)
        while len(field) > 1:
            best = self.book.best(goal, field)
            field = [s for s in field if s == best or not self.book.clearly(best, s, goal)]
            tired = [s for s in field if self._enough(s, most) or self._settled(s, best, goal)]
            if len(field) < 2 or len(tired) == len(field):
                return
            fewest = min(len(self.book.good(s)) for s in field if s not in tired)
            for setting in field:
                if setting not in tired and len(self.book.good(setting)) == fewest:
                    yield from self._measure(setting)

    def _enough(self, setting: Setting, most: int) -> bool:
        runs = self.book.good(setting)
        return len(runs) >= most and not runs[-1].short

    def _settled(self, setting: Setting, best: Setting, goal: str) -> bool:
        """Both were looked at more than once, and are as good: more would not tell them apart."""
        same = self.book.cost(setting, goal) - self.book.cost(best, goal) < _SAME
        return same and self._enough(setting, _SETTLED) and self._enough(best, _SETTLED)

    def _measure(self, setting: Setting) -> Steps:
        yield Trial(setting, self._share(setting))

    def _close(self, goal: str) -> list[Setting]:
        """The best so far."""
        return sorted(self.book.runs, key=lambda s: self.book.cost(s, goal))[:_LAST]

    def _with_codec(self, setting: Setting, codec: tuple[str, int | None]) -> Setting:
        return Setting(setting.workers, *codec, setting.batch_pages)

    def _share(self, setting: Setting) -> float:
        """How much of the sample takes TRIAL_SECONDS, by what is known of the codec."""
        return share(self.book, setting, self.size)


def share(book: Book, setting: Setting, size: int) -> float:
    """The part of a sample of `size` bytes that this setting moves in TRIAL_SECONDS, as far as that
    is known."""
    same = [s for s in book.runs if (s.codec, s.level) == (setting.codec, setting.level)]
    nearest = min(same, key=lambda s: abs(s.workers - setting.workers), default=None)
    wanted: float = _PILOT_BYTES
    if nearest is not None:
        wanted = book.rate(nearest) * TRIAL_SECONDS
    elif book.runs:  # no codec is faster by much than the fastest
        wanted = min(wanted, book.rate(book.best(FASTEST)) * TRIAL_SECONDS)
    return min(1.0, max(wanted, LEAST_BYTES) / size)


class Sweep:
    """Every setting of `space`, `repeats` times, in turns: asked as a Tuner is, and what that is
    compared with."""

    def __init__(self, space: Space, size: int, start: Setting, repeats: int) -> None:
        self.space, self.size, self.book = space, size, Book()
        self.done = 0
        turns = [Trial(s, 1.0) for _ in range(repeats) for s in space.all()]
        self._trials = [Trial(start, 1.0, counts=False), *turns]

    def __repr__(self) -> str:
        return f"<Sweep {self.done} of {len(self._trials)} trials>"

    def next(self) -> Trial | None:
        """The trial that is to be made now; None when it is over."""
        if self.done == len(self._trials):
            return None
        trial = self._trials[self.done]
        return replace(trial, share=share(self.book, trial.setting, self.size))

    def learn(self, measured: Measured) -> None:
        """What `next()` was like."""
        if self._trials[self.done].counts:
            self.book.add(measured)
        self.done += 1

    def expected(self) -> int:
        """How many trials it will be in all."""
        return len(self._trials)

    def best(self) -> dict[str, Setting]:
        """What is named, by goal."""
        return best_of(self.book)


Search = Tuner | Sweep


def best_of(book: Book) -> dict[str, Setting]:
    """The best by goal. Downtime only of what runs."""
    named = {goal: book.best(goal) for goal in (FASTEST, LEAST_CPU)}
    if book.downtime(named[FASTEST]) is not None:
        named[LEAST_DOWNTIME] = book.best(LEAST_DOWNTIME)
    return named


def worker_choices(cpus: int) -> tuple[int, ...]:
    """Numbers of workers worth a look on so many processors: up to twice as many."""
    steps = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    return tuple(n for n in steps if n <= max(2, 2 * cpus))
