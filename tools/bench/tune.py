"""`pageferry tune` against an exhaustive sweep: what each takes, and how fast what they name is.

The sweep tries every combination, three times, on the same sample over the same link. What the two
name is then measured side by side on the whole source, in turns, so that a host that becomes
faster or slower meanwhile does so for both: of some hundred noisy figures the largest is luck.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...transport.quantities import format_bytes
from . import content, pageferry
from .lab import BenchError, Lab, remove, say, wait_for
from .table import median, number, ratio, ratio_text, render

# A sweep takes minutes.
_SECONDS = 3600


@dataclass
class Plan:
    """What to measure. Sizes in bytes; lists as `pageferry tune` takes them, "" for its own."""

    size: int
    sample: int
    contents: Sequence[str]
    repeats: int
    reps: int
    workers: str
    codecs: str
    batches: str


@dataclass
class Row:
    """One content: both reports, and seconds of the migrations side by side, by round."""

    content: str
    sweep: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    named: dict[int, float] = field(default_factory=dict)
    goal: dict[int, float] = field(default_factory=dict)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All contents, one after the other."""
    rows = []
    for kind in plan.contents:
        source, destination = lab.path(f"source-{kind}"), lab.path("destination")
        content.make(source, kind, plan.size)
        row = Row(kind)
        rows.append(row)
        row.tuning = _tune(lab, plan, source, [])
        say(f"{kind}: tuned in {row.tuning['time'] / 1000:.1f} s: {_how(row.tuning)}")
        row.sweep = _tune(lab, plan, source, ["--exhaustive", "--repeats", str(plan.repeats)])
        say(f"{kind}: tried all in {row.sweep['time'] / 1000:.1f} s: {_how(row.sweep)}")
        for rep in range(plan.reps):
            turns = [
                (row.best, _options(row.sweep)), (row.named, _options(row.tuning)),
                (row.goal, ["--goal", "fastest"]),
            ]  # fmt: skip
            for times, options in turns if rep % 2 else reversed(turns):
                times[rep] = _move(lab, source, destination, options)
        remove(source)
    return _table(plan, rows), [row.__dict__ for row in rows]


def _tune(lab: Lab, plan: Plan, source: str, how: list[str]) -> dict[str, Any]:
    """One `pageferry tune` to a receiver over TCP; its report."""
    lists = (("--workers", plan.workers), ("--codecs", plan.codecs), ("--batches", plan.batches))
    options = [word for name, value in lists if value for word in (name, value)]
    into = lab.path("never")
    receive = lab.start(
        [*lab.pageferry, "receive", "--listen", "tcp://127.0.0.1:0", "--into", f"ram:{into}",
         "--once", "--json", "--quiet"]
    )  # fmt: skip
    try:
        endpoint = wait_for("the receiver to listen", lambda: pageferry.endpoint_of(receive))
        tuning = lab.start(
            [*lab.pageferry, "tune", f"image:{source}", endpoint, "--sample", str(plan.sample),
             *options, *how, "--json", "--quiet"]
        )  # fmt: skip
        tuning.join(_SECONDS)
        return pageferry.last_object(tuning)
    finally:
        receive.kill()


def _options(report: dict[str, Any]) -> list[str]:
    """What a report names, for `pageferry send`."""
    best = report["best"]["fastest"]
    options = ["--workers", str(best["workers"]), "--codec", best["codec"],
               "--batch-pages", str(best["batch-pages"])]  # fmt: skip
    return [*options, "--level", str(best["level"])] if "level" in best else options


def _move(lab: Lab, source: str, destination: str, options: list[str]) -> float:
    """The whole source; seconds without set-up."""
    remove(destination)
    outcome = pageferry.send(lab, f"image:{source}", f"ram:{destination}", options)
    if not content.same(source, destination, os.path.getsize(source)):
        raise BenchError("what arrived is not what was sent")
    remove(destination)
    return float(outcome.report["total-time"] - outcome.report["setup-time"]) / 1000


def _how(report: dict[str, Any]) -> str:
    best = report["best"]["fastest"]
    level = f" {best['level']}" if "level" in best else ""
    return f"{best['workers']} x {best['codec']}{level}, {best['batch-pages']} pages"


_HEADER = (
    "content", "sweep s", "trials", "names", "tune s", "trials", "names", "of its time", "GB/s",
    "named/best", "goal/best",
)  # fmt: skip

_LEGEND = """\
sweep         every combination of workers, codecs and batches, {repeats} times
of its time   what tuning took, by what the sweep took
GB/s          of what tuning named, whole source, without set-up, median of {reps} rounds
named/best    rate of what tuning named by the rate of the best of the sweep, measured in turns:
              median of the rounds (shortest times)
goal/best     the same of --goal fastest, which nobody has tuned for"""


def _table(plan: Plan, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(
            [
                row.content, number(row.sweep["time"] / 1000, 1), str(row.sweep["trials"]),
                _how(row.sweep), number(row.tuning["time"] / 1000, 1), str(row.tuning["trials"]),
                _how(row.tuning), f"{row.tuning['time'] / row.sweep['time']:.0%}",
                number(plan.size / median(list(row.named.values())) / 1e9),
                ratio_text(ratio(row.named, row.best)),
                ratio_text(ratio(row.goal, row.best)),
            ]
        )  # fmt: skip
    head = f"{format_bytes(plan.size)}, a sample of {format_bytes(plan.sample)}, over TCP"
    legend = _LEGEND.format(repeats=plan.repeats, reps=plan.reps)
    return f"{head}\n{render(_HEADER, lines)}\n\n{legend}"
