"""How much a guest is slowed down that writes faster than its memory moves. Pure.

Two ways, each QEMU's by name and by what it asks for:

* auto-converge goes up in steps (migration_trigger_throttle and mig_throttle_guest_down in
  migration/ram.c): where more than `threshold` % of what was moved was written in two periods of a
  second at least, the guest loses `initial` % of its time, and `increment` % more each such time.
* dirty-limit follows what is measured (softmmu/dirtylimit.c): so much that the guest writes what it
  may, `limit`, or if there is none `threshold` % of what the link moves; less again when it
  writes less. It looks once a `period`, in the middle of a round too.

What is written and what is moved are pages, before any codec: a guest does not lose time because
its memory compresses well. QEMU compares with the bytes on the wire.

Says how much; who does it is workers/guests/slowing.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..transport.errors import UsageError
from ..transport.quantities import parse_duration, parse_rate

# QEMU looks once a second at the most, however short the rounds are.
_PERIOD_SECONDS = 1.0
# dirty-limit leaves it at what it is while the guest writes from 4 to 11 tenths of what it may.
_TOO_MUCH, _TOO_LITTLE = 1.1, 0.4
# A throttle that was just raised has so many rounds to show what it does, max-rounds or not.
_PATIENCE_ROUNDS = 10
# For a postcopy that waits for it, so many.
_SHOWN_ROUNDS = 3
_ON, _OFF = ("on", "true", "yes", "1"), ("off", "false", "no", "0")


@dataclass(frozen=True)
class Rules:
    """What a user may say. Percentages; `limit`: bytes a second, 0 follows the link; `period`:
    seconds."""

    auto_converge: bool = False
    dirty_limit: bool = False
    initial: int = 20
    increment: int = 10
    tailslow: bool = False
    maximum: int = 99
    threshold: int = 50
    limit: int = 0
    period: float = 1.0

    @property
    def on(self) -> bool:
        return self.auto_converge or self.dirty_limit

    def checked(self) -> Rules:
        """UsageError that names the parameter (QEMU: migrate_params_check, migrate_caps_check)."""
        if self.auto_converge and self.dirty_limit:
            raise UsageError("auto-converge and dirty-limit: leave one of them out")
        _within("cpu-throttle-initial", self.initial, 1, 99)
        _within("cpu-throttle-increment", self.increment, 1, 99)
        _within("max-cpu-throttle", self.maximum, self.initial, 99)
        _within("throttle-trigger-threshold", self.threshold, 1, 100)
        _within("vcpu-dirty-limit (bytes a second)", self.limit, 0, 1 << 50)
        _within("vcpu-dirty-limit-period (ms)", self.period * 1000, 1, 1000)
        return self

    def qmp(self) -> dict[str, Any]:
        """As query-migrate-parameters says them, and the two capabilities."""
        return {
            "auto-converge": self.auto_converge,
            "dirty-limit": self.dirty_limit,
            "cpu-throttle-initial": self.initial,
            "cpu-throttle-increment": self.increment,
            "cpu-throttle-tailslow": self.tailslow,
            "max-cpu-throttle": self.maximum,
            "throttle-trigger-threshold": self.threshold,
            "vcpu-dirty-limit": self.limit >> 20,
            "x-vcpu-dirty-limit-period": round(self.period * 1000),
        }


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low} to {high}, not {value:g}")


# QEMU's names, and ours of the fields in Parameters.
FIELDS = {
    "auto-converge": "auto_converge",
    "dirty-limit": "dirty_limit",
    "cpu-throttle-initial": "cpu_throttle_initial",
    "cpu-throttle-increment": "cpu_throttle_increment",
    "cpu-throttle-tailslow": "cpu_throttle_tailslow",
    "max-cpu-throttle": "max_cpu_throttle",
    "throttle-trigger-threshold": "throttle_trigger_threshold",
    "vcpu-dirty-limit": "vcpu_dirty_limit",
    "vcpu-dirty-limit-period": "vcpu_dirty_limit_period",
    "x-vcpu-dirty-limit-period": "vcpu_dirty_limit_period",
}


def field_of(name: str, value: object) -> tuple[str, Any]:
    """Field and value of what migrate-set-parameters says, as text or JSON; UsageError if that is
    none."""
    field, text = FIELDS[name], str(value).lower()
    if field in ("auto_converge", "dirty_limit", "cpu_throttle_tailslow"):
        if text not in _ON + _OFF:
            raise UsageError(f"{name} is on or off, not {value!r}")
        return field, text in _ON
    if field == "vcpu_dirty_limit_period":
        return field, parse_duration(text)
    # isdigit() takes "²" too, and int() does not
    whole = text.isdecimal() and len(text) < 10
    if field == "vcpu_dirty_limit":
        return field, int(text) << 20 if whole else parse_rate(text)  # QEMU's numbers are MB
    if not whole:
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    return field, int(text)


class Throttling:
    """One migration's. `percentage`: what the guest is to lose of its time, 0 for nothing.

    Told what is written and moved as it is found, in any pieces: `found`. It says True when
    `percentage` is another one then.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.percentage = 0
        self.works = True  # False: the guest cannot be slowed down after all
        self.total_bytes = 0  # of the guest, 0 if that is not known
        self._high = 0  # periods with too much in them
        self._written = self._moved = 0
        self._seconds = 0.0
        self._round_written = 0  # in this round
        self._round_seconds = 0.0
        self._round_moved = 0
        self._rounds = 0  # that are over
        self._raised = 0  # in which round it was last raised to what it never was before
        self._most = 0

    def __repr__(self) -> str:
        return f"<Throttling {self.percentage} %>"

    @property
    def on(self) -> bool:
        return self.rules.on and self.works

    def configure(self, rules: Rules) -> bool:
        """Other rules from now on; True if the percentage is another one."""
        before, self.rules = self.percentage, rules
        self.percentage = min(before, rules.maximum) if self.on else 0
        return self.percentage != before

    def looked(self, written: int, moved: int, seconds: float) -> bool:
        """In the middle of a round: so many bytes written and moved in its `seconds` so far."""
        if not (self.on and self.rules.dirty_limit):
            return False
        self._add(written, moved, seconds)
        return self._evaluate(self._rounds + 1)

    def round_ended(self, written: int, moved: int, seconds: float, number: int) -> bool:
        """Round `number` is over, and what was written in it is taken."""
        self._add(written, moved, seconds)
        changed = self.on and self._evaluate(number)
        self._round_written = self._round_moved = 0
        self._round_seconds = 0.0
        self._rounds = number
        return changed

    def _add(self, written: int, moved: int, seconds: float) -> None:
        """What is known of a round, less what was known of it before."""
        self._written += max(0, written - self._round_written)
        self._moved += max(0, moved - self._round_moved)
        self._seconds += max(0.0, seconds - self._round_seconds)
        self._round_written, self._round_moved = written, moved
        self._round_seconds = seconds

    def _evaluate(self, number: int) -> bool:
        # a link that carries nothing says nothing of the guest
        if self._seconds < self._period or not self._moved:
            return False
        written, allowed = self._written, self._allowed()
        self._written = self._moved = 0
        self._seconds = 0.0
        before = self.percentage
        if self.rules.auto_converge:
            self._step_if_high(written, allowed)
        else:
            self._follow(written, allowed)
        self._note(number)
        return self.percentage != before

    @property
    def _period(self) -> float:
        return self.rules.period if self.rules.dirty_limit else _PERIOD_SECONDS

    def _allowed(self) -> int:
        """Bytes that may be written in the time that they were counted in."""
        if self.rules.dirty_limit and self.rules.limit:
            return int(self.rules.limit * self._seconds)
        return self._moved * self.rules.threshold // 100

    def _step_if_high(self, written: int, allowed: int) -> None:
        if written <= allowed:
            return
        self._high += 1
        if self._high >= 2:
            self._high = 0
            self._step(written, allowed)

    def _step(self, written: int, allowed: int) -> None:
        """One step up (mig_throttle_guest_down)."""
        rules, now = self.rules, self.percentage
        if not now:
            self.percentage = rules.initial
            return
        step = rules.increment
        if rules.tailslow and written:
            left = 100 - now
            step = min(left - int(left * (allowed / written)), step)
        self.percentage = min(now + max(step, 0), rules.maximum)

    def _follow(self, written: int, allowed: int) -> None:
        """The share of time with which it would write what it may: at once if that is less than it
        has, half the way if it is more."""
        share = 100 - self.percentage
        if written > allowed * _TOO_MUCH:
            wanted = math.ceil(100 - share * allowed / written)
            self.percentage = min(max(wanted, self.percentage), self.rules.maximum)
        elif written < allowed * _TOO_LITTLE and not self._is_saturated:
            wanted = max(0, 100 - math.ceil(share * allowed / max(written, 1)))
            self.percentage = (self.percentage + wanted) // 2

    @property
    def _is_saturated(self) -> bool:
        """Pages that are written once more in a round do not count again: when most are, a guest
        seems to write less than it does."""
        return bool(self.total_bytes) and 2 * self._round_written > self.total_bytes

    def _note(self, number: int) -> None:
        if self.percentage > self._most:
            self._most = self.percentage
            self._raised = max(self._raised, number)

    # ---- what else could be done: postcopy, or to give up --------------------------------

    def may_still_help(self, number: int) -> bool:
        """After round `number` of a guest that does not converge: it can be slowed down more, or
        was just now."""
        return self.on and (
            self.percentage < self.rules.maximum or number - self._raised < _SHOWN_ROUNDS
        )

    def last_resort(self, number: int) -> bool:
        """The rounds that there may be are over: whether to go on all the same, because the guest
        is slowed down more now, or was a few rounds ago. In all there are at most ten rounds for
        each percentage, and percentages only go up here."""
        if not self.on:
            return False
        if self._most and number - self._raised < _PATIENCE_ROUNDS:
            return True
        if self.percentage >= self.rules.maximum:
            return False
        # to what it never was before: what comes and goes would go on for ever
        self.percentage = max(self.percentage, self._most)
        if self.percentage >= self.rules.maximum:
            return False
        if self.rules.auto_converge:
            self._step(0, 0)
        else:
            more = max(1, (100 - self.percentage) // 2)
            self.percentage = min(self.percentage + more, self.rules.maximum)
        self._note(number)
        return True
