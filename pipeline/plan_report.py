"""Which mode and which settings a plan recommends, and why, in words and as what --json prints.
Pure: predictions (plan.py) in, a report out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..transport.pages import PAGE_SIZE
from ..transport.quantities import format_bytes, format_rate, format_seconds
from .plan import (
    MODES,
    POSTCOPY,
    PRECOPY,
    THROTTLED,
    Goal,
    Guest,
    Prediction,
    Tried,
    bandwidth_needed,
    downtime_needed,
    is_tight,
    predict,
)

# A setting that costs more is worth it from this gain on.
_WORTH = 0.07
# A guest may be held back for so much of the time before postcopy is the better way.
_MOST_SLOW_DOWN = 0.2
# What is advised is this much more than what would just do.
_MARGIN = 1.15
# From so many processes for each processor on, speeds are what others leave.
_BUSY = 1.5
# What options are called on the command line.
_OPTIONS = {PRECOPY: "", THROTTLED: "--auto-converge", POSTCOPY: "--postcopy auto"}


@dataclass(frozen=True)
class Choice:
    """What is recommended; `modes`: what each would be like with these settings, `others`: the
    recommended mode with the other settings that were tried."""

    tried: Tried
    modes: dict[str, Prediction]
    mode: str
    others: list[Prediction]

    @property
    def found(self) -> Prediction:
        return self.modes[self.mode]


def choose(guest: Guest, tried: Sequence[Tried], goal: Goal) -> Choice:
    """`tried`: the cheapest first; at least one."""
    choices = [_choice(guest, one, goal) for one in tried]
    best = choices[0]
    for other in choices[1:]:
        if _better(other.found, best.found):
            best = other
    others = [c.modes[best.mode] for c in choices if c is not best]
    return replace(best, others=others)


def _choice(guest: Guest, tried: Tried, goal: Goal) -> Choice:
    modes = {mode: predict(guest, tried, goal, mode) for mode in MODES if _can(guest, mode)}
    return Choice(tried, modes, _mode(modes), [])


def _can(guest: Guest, mode: str) -> bool:
    if mode == PRECOPY:
        return True
    can = guest.can_throttle if mode == THROTTLED else guest.can_leave
    return guest.live and guest.can_stop and can


def _mode(modes: dict[str, Prediction]) -> str:
    if modes[PRECOPY].converges:
        return PRECOPY
    throttled, postcopy = modes.get(THROTTLED), modes.get(POSTCOPY)
    gentle = throttled is not None and throttled.converges
    if throttled is not None and gentle and throttled.slow_down <= _MOST_SLOW_DOWN:
        return THROTTLED
    if postcopy is not None and postcopy.converges:
        return POSTCOPY
    return THROTTLED if gentle else PRECOPY


def _better(one: Prediction, other: Prediction) -> bool:
    rank_one, rank_other = _rank(one), _rank(other)
    if rank_one != rank_other:
        return rank_one < rank_other
    return one.total < (1 - _WORTH) * other.total


def _rank(found: Prediction) -> int:
    return MODES.index(found.mode) if found.converges else len(MODES)


# ---- what is said ------------------------------------------------------------------------------


def options_of(choice: Choice, goal: Goal, bandwidth: str = "") -> list[str]:
    """What `pageferry send` is to be given. `bandwidth`: as the user wrote it."""
    setting = choice.tried.setting
    words = ["--workers", str(setting.workers), "--codec", setting.codec]
    if setting.level is not None:
        words += ["--level", str(setting.level)]
    if goal.bandwidth:
        words += ["--max-bandwidth", bandwidth or f"{goal.bandwidth}"]
        if choice.mode == POSTCOPY:
            words += ["--max-postcopy-bandwidth", bandwidth or f"{goal.bandwidth}"]
    if choice.found.downtime is not None or choice.found.why:
        words += ["--downtime-limit", f"{round(goal.downtime_limit * 1000)}ms"]
    return words + _OPTIONS[choice.mode].split()


def report_of(
    choice: Choice, guest: Guest, goal: Goal, *, bandwidth: str = "", load: float = 0.0
) -> dict[str, Any]:
    """Times: milliseconds; sizes and rates: bytes (a second). `load`: processes that wanted each
    processor of this host before it was begun."""
    needs = _needs(choice, guest, goal)
    return {
        **_told(choice.found),
        "converges": choice.modes[PRECOPY].converges,  # by itself, that is
        "mode": choice.mode,
        "settings": options_of(choice, goal, bandwidth),
        "modes": {mode: _told(found) for mode, found in choice.modes.items()},
        "others": [_told(found) for found in choice.others],
        "needed": needs,
        "load": round(load, 2),
        "why": why(choice, guest, goal, needs) + _busy(load),
    }


def _told(found: Prediction) -> dict[str, Any]:
    told: dict[str, Any] = {
        "converges": found.converges,
        "workers": found.setting.workers,
        "codec": found.setting.codec,
        "total-time": round(found.total * 1000),
        "rounds": len(found.rounds),
        "wire-bytes": round(found.wire),
    }
    if found.downtime is not None:
        told["downtime"] = round(found.downtime * 1000)
    if found.throttle:
        told["cpu-throttle-percentage"] = found.throttle
        told["guest-slow-down"] = round(found.slow_down, 3)
    if not found.converges:
        told["because"] = found.why
        told["dirty-rate"], told["rate"] = round(found.dirty_rate), round(found.rate)
        told["remaining"] = round(found.left * PAGE_SIZE)
    return told


def _needs(choice: Choice, guest: Guest, goal: Goal) -> dict[str, int]:
    """With what precopy would do, if it does not."""
    if choice.modes[PRECOPY].converges or not guest.can_stop:
        return {}
    needs = {}
    limit = downtime_needed(guest, choice.tried, goal)
    if limit is not None:
        needs["downtime-limit"] = math.ceil(limit * _MARGIN * 100) * 10
    link = bandwidth_needed(guest, choice.tried, goal) if goal.bandwidth else None
    if link is not None:
        needs["bandwidth"] = math.ceil(link * _MARGIN)
    return needs


def why(choice: Choice, guest: Guest, goal: Goal, needs: dict[str, int]) -> list[str]:
    """Sentences, in the order in which one asks."""
    said = [_first_round(choice, guest, goal)]
    if not guest.live:
        return [*said, "Nobody writes this memory: one round, and nothing stands still."]
    said.append(_verdict(choice, guest, goal))
    if not choice.modes[PRECOPY].converges:
        said += _ways_out(choice, goal, needs)
    elif is_tight(choice.modes[PRECOPY], goal):
        said.append("That is near to the limit: a guest that writes a little more needs a round "
                    "more, or does not fit.")  # fmt: skip
    if guest.curve.saturated:
        said.append("It wrote most of its memory while it was looked at, so it may write faster.")
    said += _too_short(choice, guest)
    return said


def _first_round(choice: Choice, guest: Guest, goal: Goal) -> str:
    speed = choice.tried.memory
    size = guest.pages * PAGE_SIZE
    seconds = speed.seconds(size, goal.bandwidth)
    by = "the link" if speed.bound_by_link(goal.bandwidth) else "these hosts"
    how = "as they are" if speed.wire > 0.97 else f"as {speed.wire:.0%} of that"
    return (
        f"{format_bytes(size)} hold something, {speed.zero:.0%} of it zero pages, and travel {how} "
        f"in {format_seconds(seconds)} ({format_rate(size / max(seconds, 1e-9))}, bound by {by})."
    )


def _verdict(choice: Choice, guest: Guest, goal: Goal) -> str:
    found, curve = choice.modes[PRECOPY], guest.curve
    writes = f"The guest writes {format_rate(curve.write_rate)}"
    if not curve.looks or curve.looks[-1].pages < 1:
        writes = "The guest writes next to nothing"
    rate = choice.tried.written.rate
    if goal.bandwidth:
        rate = min(rate, goal.bandwidth / max(choice.tried.written.wire, 1e-3))
    text = f"{writes}, of which {format_rate(rate)} can be moved: "
    limit = format_seconds(goal.downtime_limit)
    if not guest.can_stop:
        ends = "which would be" if found.converges else "which would not be"
        return (
            f"{text}nobody can stop it, so it has moved when a look finds nothing written, {ends} "
            f"so in {goal.max_rounds} rounds."
        )
    if found.converges:
        downtime = format_seconds(found.downtime or 0.0)
        rounds = f"{len(found.rounds)} rounds"
        return f"{text}precopy converges in {rounds}, downtime {downtime} of {limit}."
    return (
        f"{text}precopy does not converge: {format_bytes(_least_left(found) * PAGE_SIZE)} stay to "
        f"be sent, a downtime of {format_seconds(found.needed or 0.0)} where {limit} are allowed."
    )


def _least_left(found: Prediction) -> float:
    return min((r.written for r in found.live_rounds), default=found.left)


def _ways_out(choice: Choice, goal: Goal, needs: dict[str, int]) -> list[str]:
    said = []
    throttled, postcopy = choice.modes.get(THROTTLED), choice.modes.get(POSTCOPY)
    if throttled is not None and throttled.converges:
        said.append(
            f"--auto-converge would slow it down by up to {throttled.throttle} %, "
            f"{throttled.slow_down:.0%} of the time in all, and need "
            f"{format_seconds(throttled.total)}."
        )
    elif throttled is not None:
        said.append("--auto-converge would not slow it down enough.")
    if postcopy is not None and postcopy.converges:
        before = len(postcopy.live_rounds)
        said.append(
            f"--postcopy auto would start it there after {before} rounds and need "
            f"{format_seconds(postcopy.total)}; until its end the guest waits for pages that it "
            f"touches, and needs both hosts."
        )
    if "downtime-limit" in needs:
        said.append(f"--downtime-limit {needs['downtime-limit']}ms would do.")
    if "bandwidth" in needs:
        said.append(f"So would a link of {needs['bandwidth'] * 8 / 1e9:.2g} Gbit/s.")
    elif goal.bandwidth:
        said.append("No faster link would: these hosts are the bound.")
    return said


def _busy(load: float) -> list[str]:
    if load < _BUSY:
        return []
    return [
        f"This host is busy ({load:.1f} processes for each processor): what its workers and the "
        f"guest would do with less beside them may be another thing."
    ]


def _too_short(choice: Choice, guest: Guest) -> list[str]:
    seen = guest.curve.looks[-1].seconds if guest.curve.looks else 0.0
    longest = max((r.seconds for r in choice.found.rounds), default=0.0)
    if not seen or longest <= 4 * seen:
        return []
    return [
        f"The longest round takes {format_seconds(longest)}, and writes were looked at for "
        f"{format_seconds(seen)}: --seconds {min(60, math.ceil(longest / 2))} says more."
    ]
