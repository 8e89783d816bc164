"""How fast a guest writes: pages that are written at least once in so much time. Pure.

Names are QEMU's: calc-dirty-rate and DirtyRateInfo in qapi/migration.json, migration/dirtyrate.c.

A page that is written again within the interval counts once, as it is sent once. So a dirty rate
belongs to an interval, and a guest that writes the same pages over and over has a lower one in a
longer interval. `WorkingSet` is that curve; one rate is a point of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..transport.errors import UsageError
from ..transport.pages import PAGE_SIZE

PAGE_SAMPLING, DIRTY_BITMAP, DIRTY_RING = "page-sampling", "dirty-bitmap", "dirty-ring"
UNSTARTED, MEASURING, MEASURED = "unstarted", "measuring", "measured"
# QEMU's bounds (MIN_CALC_TIME_MS, MAX_CALC_TIME_MS, MIN_ and MAX_SAMPLE_PAGE_COUNT) and default.
_LEAST_SECONDS, _MOST_SECONDS = 0.05, 60.0
_LEAST_SAMPLE, _MOST_SAMPLE, _SAMPLE = 128, 16384, 512
# A small guest has more than so many a GiB: the error goes by how many there are in all.
_IN_ALL = 16384
_UNITS = {"second": 1.0, "millisecond": 0.001}
_MIB = 1 << 20
# From this share of all pages on most of what is written was written before.
_SATURATED = 0.8
# Two standard errors: 95 of 100 measurements are within.
_ERRORS = 2.0


@dataclass(frozen=True)
class Asked:
    """What is to be measured. `mode`: "" for tracking where that can be; `sample_pages`: a GiB, 0
    for the default."""

    seconds: float
    mode: str = ""
    sample_pages: int = 0
    unit: str = "second"

    def checked(self) -> Asked:
        """Itself, or UsageError that names what is wrong."""
        if self.mode == DIRTY_RING:
            raise UsageError(
                f"mode {DIRTY_RING} is KVM's, inside QEMU: take {DIRTY_BITMAP}, which is as exact"
            )
        if self.mode not in ("", PAGE_SAMPLING, DIRTY_BITMAP):
            raise UsageError(f"mode is {PAGE_SAMPLING} or {DIRTY_BITMAP}, not {self.mode!r}")
        if not _LEAST_SECONDS <= self.seconds <= _MOST_SECONDS:
            raise UsageError(f"calc-time must be from 50 ms to 60 s, not {self.seconds:g} s")
        if self.sample_pages and self.mode == DIRTY_BITMAP:
            raise UsageError(f"sample-pages is for mode {PAGE_SAMPLING}: leave it out")
        if self.sample_pages and not _LEAST_SAMPLE <= self.sample_pages <= _MOST_SAMPLE:
            raise UsageError(
                f"sample-pages must be from {_LEAST_SAMPLE} to {_MOST_SAMPLE} a GiB, "
                f"not {self.sample_pages}"
            )
        return self


def asked(arguments: dict[str, Any]) -> Asked:
    """The arguments of calc-dirty-rate; UsageError for what they cannot be."""
    known = {"calc-time", "calc-time-unit", "sample-pages", "mode"}
    if unknown := sorted(set(arguments) - known):
        raise UsageError(f"calc-dirty-rate has no argument {unknown[0]!r}")
    unit, mode = arguments.get("calc-time-unit", "second"), arguments.get("mode", PAGE_SAMPLING)
    if unit not in _UNITS:
        raise UsageError(f"calc-time-unit is {' or '.join(_UNITS)}, not {unit!r}")
    if not isinstance(mode, str) or not mode:
        raise UsageError(f"mode is {PAGE_SAMPLING} or {DIRTY_BITMAP}, not {mode!r}")
    numbers = {}
    for name in ("calc-time", "sample-pages"):
        value = arguments.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{name} must be a whole number, not {value!r}")
        numbers[name] = value
    if "calc-time" not in arguments:
        raise UsageError("calc-dirty-rate needs calc-time")
    seconds = numbers["calc-time"] * _UNITS[unit]
    return Asked(seconds, mode, numbers["sample-pages"], unit).checked()


def sampled(pages: int, per_gib: int) -> int:
    """How many of `pages` pages are looked at, where `per_gib` of a GiB are to be; 0 for QEMU's
    default, but in a small guest enough to say something."""
    wanted = math.ceil(pages * (per_gib or _SAMPLE) * PAGE_SIZE / (1 << 30))
    return min(pages, wanted if per_gib else max(wanted, _IN_ALL))


@dataclass(frozen=True)
class Look:
    """So many pages were written in the `seconds` before it."""

    seconds: float
    pages: float


@dataclass(frozen=True)
class WorkingSet:
    """How many pages are written at least once, by the length of the interval. `total`: pages that
    there are; `looks`: ascending."""

    total: int
    looks: tuple[Look, ...] = ()

    def pages(self, seconds: float) -> float:
        """Pages in so many seconds: between two looks on the line between them, after the last as
        fast as since half of its time."""
        before = Look(0.0, 0.0)
        for look in self.looks:
            if seconds <= look.seconds:
                share = (seconds - before.seconds) / max(look.seconds - before.seconds, 1e-9)
                return before.pages + max(0.0, share) * (look.pages - before.pages)
            before = look
        more = (seconds - before.seconds) * self._slope()
        return min(float(self.total), before.pages + more)

    def _slope(self) -> float:
        """Pages a second, in the second half of what was looked at."""
        if not self.looks:
            return 0.0
        last = self.looks[-1]
        half = last.seconds / 2
        middle = self.pages(half)
        return max(0.0, last.pages - middle) / max(last.seconds - half, 1e-9)

    def slowed(self, share: float) -> WorkingSet:
        """Of the same guest, running for `share` of the time."""
        if share <= 0:
            return WorkingSet(self.total)
        return WorkingSet(self.total, tuple(Look(k.seconds / share, k.pages) for k in self.looks))

    @property
    def rate(self) -> float:
        """Bytes a second, in the whole of the time."""
        if not self.looks:
            return 0.0
        return self.looks[-1].pages * PAGE_SIZE / max(self.looks[-1].seconds, 1e-9)

    @property
    def write_rate(self) -> float:
        """Bytes a second, in the interval in which most were written a second: nearest to what the
        guest writes without counting what it writes again."""
        return max((k.pages * PAGE_SIZE / k.seconds for k in self.looks if k.seconds), default=0.0)

    @property
    def saturated(self) -> bool:
        """So much of memory was written that the guest may be writing faster than that."""
        return bool(self.looks) and self.looks[-1].pages >= _SATURATED * self.total


def together(runs: Sequence[WorkingSet]) -> WorkingSet:
    """What several runs of the same looks say: the means."""
    looks = tuple(
        Look(
            sum(k.seconds for k in same) / len(same), sum(k.pages for k in same) / len(same)
        )
        for same in zip(*(run.looks for run in runs), strict=True)
    )  # fmt: skip
    return WorkingSet(max((run.total for run in runs), default=0), looks)


def margin(share: float, sample: int, of: int) -> float:
    """By how much a rate may be off, as a share of itself, if `share` of `sample` pages out of `of`
    had changed: two standard errors of a random sample. That is taken one from each of as many
    equal parts of memory, so where written pages lie together it is off by less."""
    if share <= 0 or sample >= of:
        return 0.0
    finite = (of - sample) / max(of - 1, 1)
    return _ERRORS * math.sqrt((1 - share) / (share * sample) * finite)


@dataclass(frozen=True)
class Cost:
    """What a measurement cost. `cpu`: processor seconds of ours; `faults`: first writes to a page
    that the kernel noted, each of which took the guest `fault` seconds more."""

    cpu: float
    faults: int = 0
    fault: float = 0.0

    def slow_down(self, seconds: float) -> float:
        """The share of one processor of the guest that the noting took."""
        return self.faults * self.fault / max(seconds, 1e-9)


@dataclass(frozen=True)
class Measurement:
    """A measurement that is over. `began`: CLOCK_MONOTONIC seconds; `mode`: "" if nobody writes
    that memory; `sample`: pages that were looked at, 0 for all."""

    asked: Asked
    mode: str
    began: float
    curve: WorkingSet
    cost: Cost
    sample: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def information(found: Measurement) -> dict[str, Any]:
    """query-dirty-rate: QEMU's DirtyRateInfo, and what is ours. `dirty-rate`: MiB a second;
    `dirty-pages-rate`: pages a second; times of `working-set`: milliseconds; of `cost`:
    milliseconds of processor time, and the guest's slow-down as a share of a processor."""
    looks = found.curve.looks
    seconds = looks[-1].seconds if looks else 0.0
    rate, pages = found.curve.rate, looks[-1].pages if looks else 0.0
    told: dict[str, Any] = {
        **_frame(found.asked, found.mode, MEASURED, found.began, found.curve.total),
        "dirty-rate": round(rate / _MIB),
        "dirty-pages-rate": round(rate / PAGE_SIZE),
        "write-pages-rate": round(found.curve.write_rate / PAGE_SIZE),
        "measured-time": round(seconds * 1000),
        "pages": found.curve.total,
        "saturated": found.curve.saturated,
        "working-set": [
            {"time": round(look.seconds * 1000), "pages": round(look.pages)} for look in looks
        ],
        "cost": {
            "cpu-time": round(found.cost.cpu * 1000, 1),
            "faults": found.cost.faults,
            "fault-ns": round(found.cost.fault * 1e9),
            "guest-slow-down": round(found.cost.slow_down(seconds), 5),
        },
    }
    if found.sample:
        share = pages / max(found.curve.total, 1)
        told["sampled-pages"] = found.sample
        told["margin"] = round(margin(share, found.sample, found.curve.total), 3)
    return told | found.facts


def unfinished(request: Asked | None, began: float, pages: int, error: str = "") -> dict[str, Any]:
    """query-dirty-rate of what has not begun, or has not ended, or ended with an `error`."""
    if request is None:
        return _frame(Asked(0.0), PAGE_SAMPLING, UNSTARTED, 0.0, 0)
    status = UNSTARTED if error else MEASURING
    told = _frame(request, request.mode or PAGE_SAMPLING, status, began, pages)
    return told | ({"error": error} if error else {})


def _frame(request: Asked, mode: str, status: str, began: float, pages: int) -> dict[str, Any]:
    per_gib, time = 0, round(request.seconds / _UNITS[request.unit], 3)
    if mode == PAGE_SAMPLING and request.seconds and pages:
        per_gib = round(sampled(pages, request.sample_pages) * (1 << 30) / PAGE_SIZE / pages)
    return {
        "status": status,
        "start-time": int(began),
        "calc-time": int(time) if time.is_integer() else time,
        "calc-time-unit": request.unit,
        "sample-pages": per_gib,
        "mode": mode or "none",
    }
