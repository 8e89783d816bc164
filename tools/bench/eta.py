"""Is the ETA right? Of migrations of several seconds: what it said at half time, and at a quarter
and three quarters, against the time that it then took.

Asked of the monitor, as any host tool would; knows nothing of how the ETA comes about.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from ...transport.quantities import format_bytes
from . import content
from .lab import BenchError, Lab, remove, say
from .qemu import Qmp
from .table import render

_LOOK_SECONDS = 0.05
_MOMENTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class _Case:
    """`content` of an image, or the options of a demo guest; and what is asked of pageferry."""

    name: str
    content: str = ""
    demo: str = ""
    options: tuple[str, ...] = ()


_SLOW = ("--codec", "none", "--max-bandwidth", "200MB")
_CASES = (
    _Case("image, random", content="random"),
    _Case("image, text, zstd 6", content="text", options=("--codec", "zstd", "--level", "6")),
    _Case("image, half zero, 200 MB/s", content="half", options=_SLOW),
    _Case("demo, writes 80 MB/s", demo="content=text&rate=20000"),
    _Case("demo, 80 of 200 MB/s", demo="content=random&rate=20000", options=_SLOW),
    _Case("demo, 140 of 200 MB/s", demo="content=random&rate=35000", options=_SLOW),
)


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int


@dataclass
class Row:
    """One migration. `looks`: seconds since it began, and the ETA then."""

    case: str
    rep: int
    seconds: float
    rounds: int
    looks: list[tuple[float, float | None]]

    def at(self, moment: float) -> tuple[float | None, float]:
        """What the ETA was at that share of the time, and what was left then."""
        when, eta = min(self.looks, key=lambda look: abs(look[0] - moment * self.seconds))
        return eta, self.seconds - when

    def error(self, moment: float) -> float | None:
        """As a share of what was left."""
        eta, left = self.at(moment)
        return None if eta is None else abs(eta - left) / left


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All cases in turn."""
    rows: list[Row] = []
    for kind in dict.fromkeys(case.content for case in _CASES if case.content):
        content.make(lab.path(kind), kind, plan.size)
    for rep in range(plan.reps):
        for case in _CASES:
            row = _one(lab, case, rep, plan.size)
            rows.append(row)
            eta, left = row.at(0.5)
            say(f"{case.name} {rep + 1}: {row.seconds:.2f} s; at half time {eta} for {left:.2f} s")
    title = f"{format_bytes(plan.size)}, both ends on this host; {plan.reps} rounds"
    return f"{title}\n{_table(rows)}", [asdict(row) for row in rows]


def _one(lab: Lab, case: _Case, rep: int, size: int) -> Row:
    source, destination = f"demo:?size={size}&{case.demo}", "demo:"
    copied = lab.path("copied")
    if case.content:
        source, destination = f"image:{lab.path(case.content)}", f"image:{copied}"
        remove(copied)
    monitor = os.path.join(lab.directory, "eta.sock")
    child = lab.start(
        [*lab.pageferry, "copy", source, destination, *case.options, "--monitor",
         f"unix:{monitor}", "--json", "--quiet"]
    )  # fmt: skip
    looks = _looks(child.running, monitor)
    child.join()
    report = json.loads(child.output().splitlines()[-1])
    if not looks:
        raise BenchError(f"{case.name}: over before anybody could ask: take a larger --size")
    return Row(
        case.name, rep, report["total-time"] / 1000, report["ram"]["dirty-sync-count"], looks
    )


def _looks(running: Any, monitor: str) -> list[tuple[float, float | None]]:
    """Until it is over."""
    looks: list[tuple[float, float | None]] = []
    qmp: Qmp | None = None
    try:
        while running():
            try:
                qmp = qmp or Qmp(monitor)
                report = qmp.ask("query-migrate")
            except (OSError, BenchError):
                if looks:
                    break  # it has ended
            else:
                if report["status"] in ("active", "device"):
                    looks.append((report["total-time"] / 1000, report["progress"]["eta"]))
            time.sleep(_LOOK_SECONDS)
    finally:
        if qmp is not None:
            qmp.close()
    return looks


def _table(rows: list[Row]) -> str:
    header = ("what moves", "s", "rounds", *(f"off at {m:.0%}, worst" for m in _MOMENTS))
    lines = []
    for name in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == name]
        errors = [[row.error(moment) for row in mine] for moment in _MOMENTS]
        lines.append(
            [
                name,
                " ".join(f"{row.seconds:.1f}" for row in mine),
                " ".join(str(row.rounds) for row in mine),
                *("none" if None in e else f"{max(x for x in e if x is not None):.0%}"
                  for e in errors),
            ]
        )  # fmt: skip
    return render(header, lines)
