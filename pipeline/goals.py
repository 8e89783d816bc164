"""`--goal`: how many senders work and with which codec, decided while memory moves. Pure.

A migration is cut into slices of some 100 ms, each with one choice. A new choice is tried for a
slice between two of the one that is in use (A, B, A): memory is not the same everywhere, and hosts
are not the same all the time, and what changes evenly meanwhile cancels out. Codecs are climbed
from the cheapest up, as long as that is better; then workers are parked, or added. What is left
then stays, until slices are so much unlike those it was chosen by that it is worth looking again,
or a long time has passed.

Slices in, choices out. Who measures, and who works, is not known here; nor does a choice say who
owns a page (ARCHITECTURE.md).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from statistics import fmean

from .tuning import worker_choices

FASTEST, LEAST_CPU, LEAST_WIRE = "fastest", "least-cpu", "least-wire"
GOALS = (FASTEST, LEAST_CPU, LEAST_WIRE)

# From the cheapest up. Others move least where compressing is for speed; where it is for the wire
# itself, zstd is at its best, and above level 9 it is ten times slower for 3 % more.
_FOR_SPEED = (("none", None), ("lz4", None), ("zstd", 1), ("zstd", 3))
_FOR_WIRE = (("zstd", 3), ("zstd", 6), ("zstd", 9))

# A slice: at least so many pages (8 MiB) in so many seconds; at the most so long. A choice that is
# far worse is seen sooner.
LEAST_PAGES, SLICE_SECONDS, LONGEST_SECONDS = 2048, 0.1, 1.0
_SOON_SECONDS, _FAR = 0.04, math.log(1.6)
# What differs by more is clear after one look; what does not is looked at so often; and has to save
# so much to be taken (as logarithms: shares).
_CLEAR, _LOOKS, _WORTH = math.log(1.12), 3, 0.02
# Codecs in a row that were no better: then heavier ones are not either.
_PATIENCE = 2
# Of their time senders wait at the least where fewer bytes could be faster.
_WAITING = 0.05
# Nothing is tried that costs a slice when all that is left takes less than so many of them.
_WORTHWHILE = 20
# Slices that are unlike what was chosen by, in a row, before all is looked at again; and how many
# there are at the least before that, twice as many each time.
_UNLIKE, _UNLIKE_WAITING, _IN_A_ROW, _HOLD = math.log(1.35), 0.3, 4, 16
# After so many slices all is looked at again in any case, and after twice as many the next time:
# what would be better now may not show in what is used.
_AGAIN = 150
# A guest that writes this much of what is moved would not converge.
_TOO_SLOW = 0.5


@dataclass(frozen=True)
class Choice:
    """So many senders work, with this codec. `level`: None for the codec's own."""

    workers: int
    codec: str
    level: int | None = None

    def __str__(self) -> str:
        level = "" if self.level is None else f" {self.level}"
        return f"{self.workers} x {self.codec}{level}"


@dataclass(frozen=True)
class Slice:
    """What was measured with one choice: seconds; pages, zero pages too; bytes on the wire;
    processor seconds of senders, of receivers (None: unknown); seconds that senders waited for link
    or receivers, all together. `left`: pages of this round that are still to be sent."""

    seconds: float
    pages: int
    wire: int
    sender_cpu: float
    receiver_cpu: float | None = None
    waited: float = 0.0
    left: int = 1 << 40


Moves = Generator[Choice, bool, None]


class Seeker:
    """Seeks one goal with up to `workers` senders. `codec`: the only one there may be, if somebody
    said so."""

    def __init__(
        self, goal: str, workers: int, codec: tuple[str, int | None] | None = None
    ) -> None:
        self.goal, self.most = goal, workers
        self._only = codec
        self._hold, self._again = _HOLD, _AGAIN
        self._restart()

    def __repr__(self) -> str:
        return f"<Seeker {self.goal} {self.choice}{' settled' if self.settled else ''}>"

    def _restart(self, start: Choice | None = None) -> None:
        ladder = _FOR_WIRE if self.goal == LEAST_WIRE else _FOR_SPEED
        self._ladder = (self._only,) if self._only is not None else ladder
        self.kept = start or Choice(1 if self.goal == LEAST_CPU else self.most, *self._ladder[0])
        self._trying: Choice | None = None
        self._before: Slice | None = None  # the last one of what is kept
        self._costs: list[float] = []  # of what is tried, less those around it
        self._last: Slice | None = None  # of what is tried
        self._moves: Moves | None = None  # once there is a slice to go by
        self._next: Choice | None = None
        self._reference: Slice | None = None
        self._unlike = self._slices = 0
        self.resting = False  # there is too little left to try anything

    @property
    def choice(self) -> Choice:
        """What to use now."""
        return self._trying or self.kept

    @property
    def settled(self) -> bool:
        """Nothing is being tried."""
        return self._next is None and self._moves is not None

    def drop(self) -> None:
        """A round is over: what is being tried was not seen to its end, and is tried again."""
        self._trying = self._before = self._last = None

    def hurry(self) -> bool:
        """The guest writes too fast for this goal: from now on the fastest, with all senders; True
        if that is new."""
        if self.goal == FASTEST:
            return False
        self.goal = FASTEST
        # Rounds may be too short for a slice from now on, and then nothing is found any more: what
        # compresses goes on doing so until something is seen to be faster.
        codec = (self.kept.codec, self.kept.level)
        if self._only is None and codec not in _FOR_SPEED:
            codec = _FOR_SPEED[-1]  # one for the wire: what is nearest to it
        self._restart(Choice(self.most, *codec))
        return True

    def too_slow(self, rate: float, dirty_rate: float, *, rounds: int, still: bool) -> bool:
        """Is `rate` (bytes a second) not enough for a guest that writes so much? Nobody knows
        before the second of `rounds`: the rate of the first is the link's, as if nothing were
        compressed. And when the guest stands `still`, what is left fits the downtime with what is
        used now."""
        if still or rounds < 2:
            return False
        return self.goal != FASTEST and dirty_rate > _TOO_SLOW * rate

    def enough(self, so_far: Slice) -> bool:
        """Is this slice long enough to learn of?"""
        if so_far.seconds >= LONGEST_SECONDS:
            return True
        if so_far.seconds >= SLICE_SECONDS:
            return so_far.pages >= LEAST_PAGES
        if self._trying is None or self._before is None or so_far.seconds < _SOON_SECONDS:
            return False
        return self.goal == FASTEST and self._cost(so_far) > self._cost(self._before) + _FAR

    def learn(self, done: Slice) -> None:
        """What a slice with `choice` was like. `choice` may be another one afterwards."""
        if self._trying is not None:
            self._last, self._trying = done, None
        elif self.settled:
            self._watch(done)
        else:
            before, self._before = self._before, done
            if self._moves is None:
                self._moves = self._search()
                self._next = next(self._moves, None)
            elif before is not None:
                self._compare(before, done)
            worth = done.left * done.seconds > _WORTHWHILE * SLICE_SECONDS * done.pages
            self.resting = not worth
            if worth:
                self._trying = self._next

    def _cost(self, done: Slice) -> float:
        """The less the better, as a logarithm."""
        pages = max(done.pages, 1)
        match self.goal:
            case "least-cpu":
                cost = (done.sender_cpu + (done.receiver_cpu or 0.0)) / pages
            case "least-wire":
                cost = done.wire / pages
            case _:
                cost = done.seconds / pages
        return math.log(max(cost, 1e-12))

    def _compare(self, before: Slice, after: Slice) -> None:
        """What was tried against those around it, and on to the next if that is clear."""
        if self._last is None:
            return
        around = (self._cost(before) + self._cost(after)) / 2
        self._costs.append(self._cost(self._last) - around)
        self._last = None
        saved = -fmean(self._costs)
        sure = abs(saved) > _CLEAR if self.goal != LEAST_WIRE else True
        if sure or len(self._costs) >= _LOOKS:
            self._decide(saved > _WORTH)

    def _decide(self, better: bool) -> None:
        assert self._next is not None and self._moves is not None
        if better:
            self.kept = self._next
        self._costs = []
        try:
            self._next = self._moves.send(better)
        except StopIteration:
            self._next = None

    def _watch(self, done: Slice) -> None:
        """All is chosen: look again once it is not what it was."""
        self._slices += 1
        if self._reference is None:  # the first with what was chosen last
            self._reference = done
        self._unlike = self._unlike + 1 if self._is_unlike(self._reference, done) else 0
        if self._unlike >= _IN_A_ROW and self._slices >= self._hold:
            self._hold *= 2
        elif self._slices >= self._again:
            self._again *= 2
        else:
            return
        self._restart(self.kept)

    def _is_unlike(self, then: Slice, now: Slice) -> bool:
        """Another content, another link, another host. On a link that has become a fast one a codec
        is not faster, but nobody waits any more."""
        if abs(self._cost(now) - self._cost(then)) > _UNLIKE:
            return True
        waited = now.waited / now.seconds - then.waited / then.seconds
        return self.goal == FASTEST and abs(waited) > _UNLIKE_WAITING * self.kept.workers

    # ---- what to try ---------------------------------------------------------------------

    def _search(self) -> Moves:
        yield from self._codecs()
        if self.goal == LEAST_WIRE:
            return  # as many bytes, however many make them
        yield from self._workers()

    def _codecs(self) -> Moves:
        at = self._place()
        if at > 0:  # not the first time: it may have become too heavy
            yield from self._climb(range(at - 1, -1, -1))
        yield from self._climb(range(self._place() + 1, len(self._ladder)))

    def _place(self) -> int:
        return self._ladder.index((self.kept.codec, self.kept.level))

    def _climb(self, places: range) -> Moves:
        failed = 0
        for place in places:
            if place > self._place() and not self._would_help():
                return
            codec, level = self._ladder[place]
            better = yield replace(self.kept, codec=codec, level=level)
            failed = 0 if better else failed + 1
            if failed == _PATIENCE:
                return

    def _would_help(self) -> bool:
        """Could a heavier codec? Not where nobody waits for link or receivers."""
        seen = self._before
        if self.goal != FASTEST or seen is None:
            return True
        return seen.waited > _WAITING * seen.seconds * self.kept.workers

    def _workers(self) -> Moves:
        steps = [n for n in worker_choices(self.most) if n < self.most] + [self.most]
        for way in (1, -1):
            at = steps.index(self.kept.workers) + way
            while 0 <= at < len(steps):
                better = yield replace(self.kept, workers=steps[at])
                if not better:
                    break
                at += way
