"""pageferry with 1, 2, 3, 4 … workers: where the curve bends, and what is busy there.

Processor time by group of processes says why: once all of them together use every CPU, one
more worker only shares what there is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...transport.quantities import format_bytes
from . import content, pageferry
from .lab import BenchError, Lab, remove, say
from .table import median, number, ratio, ratio_text, render

_CODECS = {"none": ["--codec", "none"], "zstd-1": ["--codec", "zstd", "--level", "1"]}
_GROUPS = ("sender", "receiver", "source coordinator", "destination coordinator", "other")


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int
    contents: Sequence[str]
    workers: Sequence[str]


@dataclass
class Row:
    """One run."""

    content: str
    codec: str
    workers: str
    rep: int
    outcome: pageferry.Outcome | None = None
    problem: str = ""


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs of the plan, numbers of workers taking turns."""
    rows: list[Row] = []
    for kind in plan.contents:
        source, destination = lab.path(f"source-{kind}"), lab.path("destination")
        content.make(source, kind, plan.size)
        for rep in range(plan.reps):
            for codec, options in _CODECS.items():
                for workers in plan.workers:
                    remove(destination)
                    row = Row(kind, codec, workers, rep)
                    rows.append(row)
                    _run(lab, row, source, destination, [*options, "--workers", workers])
        remove(source)
        remove(destination)
    return _tables(plan, rows), [asdict(row) for row in rows]


def _run(lab: Lab, row: Row, source: str, destination: str, options: list[str]) -> None:
    what = f"{row.content} {row.codec} {row.rep + 1}: {row.workers} workers"
    try:
        row.outcome = pageferry.send(lab, f"image:{source}", f"ram:{destination}", options)
        say(f"{what}: {row.outcome.total:.2f} s")
    except BenchError as e:
        row.problem = str(e)
        say(f"{what}: {row.problem}")


_HEADER = (
    "workers", "s min", "median", "GB/s", "speed-up", "CPU s", "senders", "receivers",
    "source coord.", "dest. coord.", "other", "codec", "senders wait", "CPUs busy",
)  # fmt: skip

_LEGEND = """\
s             total-time; GB/s of guest memory by its median
speed-up      against the first line: median of the rounds (minima)
CPU s         all processes of both ends, from their start, and by group, medians;
              other: the fork servers, and what the reports do not count
codec         seconds in the codec, sum of the senders; includes waiting for a CPU
senders wait  seconds a sender waited for credit, that is for the link or the receiver, mean
CPUs busy     CPU s while `send` ran, by its seconds: at {cpus} nothing is left to share"""


def _tables(plan: Plan, rows: list[Row]) -> str:
    parts = []
    for kind in plan.contents:
        for codec in _CODECS:
            mine = [row for row in rows if (row.content, row.codec) == (kind, codec)]
            parts.append(
                f"{kind}, codec {codec}, {format_bytes(plan.size)}, {plan.reps} rounds\n"
                f"{render(_HEADER, _lines(plan, mine))}"
            )
    return "\n\n".join([*parts, _LEGEND.format(cpus=len(os.sched_getaffinity(0)))])


def _lines(plan: Plan, rows: list[Row]) -> list[list[str]]:
    lines = []
    first: dict[int, float] = {}
    for workers in plan.workers:
        good = {r.rep: r.outcome for r in rows if r.workers == workers and r.outcome is not None}
        if not good:
            lines.append([workers, next(r.problem for r in rows if r.workers == workers)])
            continue
        times = {rep: outcome.total for rep, outcome in good.items()}
        first = first or times
        lines.append(_line(plan, workers, list(good.values()), ratio_text(ratio(times, first))))
    return lines


def _line(plan: Plan, workers: str, runs: list[pageferry.Outcome], speed_up: str) -> list[str]:
    seconds = [run.total for run in runs]
    cpu = [sum(run.cpu.values()) for run in runs]
    groups = [median([run.groups.get(group, 0.0) for run in runs]) for group in _GROUPS]
    busy = [(sum(run.cpu.values()) - run.cpu_before) / run.wall for run in runs]
    return [
        workers, number(min(seconds)), number(median(seconds)),
        number(plan.size / median(seconds) / 1e9), speed_up, number(median(cpu)),
        *map(number, groups),
        number(median([_of_senders(run, "codec-time") for run in runs])),
        number(median([_of_senders(run, "wait-time") for run in runs]) / int(workers)),
        number(median(busy), 1),
    ]  # fmt: skip


def _of_senders(run: pageferry.Outcome, what: str) -> float:
    """Seconds, the sum over the senders."""
    return sum(float(p.get(what, 0)) for p in run.report.get("processes", [])) / 1000
