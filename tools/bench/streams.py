"""What a byte stream costs against TCP: how fast memory moves, and how long faults wait while the
background goes at full rate.

Both ends are here; `exec:` is a receiver at the other end of two pipes, or behind `--through`, a
command that runs another one (ssh -p 2222 localhost).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import content, pageferry
from .lab import BenchError, Lab, remove, say
from .table import median, megabytes, number, ratio, ratio_text, render

_WAIT_SECONDS = 120.0


@dataclass
class Plan:
    """What to measure. `size`: bytes; `guest`: of the one whose faults are measured."""

    size: int
    guest: int
    reps: int
    contents: Sequence[str]
    codec: str
    workers: str
    through: str


@dataclass
class _Run:
    seconds: float
    cpu: float  # of all processes at the source's end, the carrier's in it
    carrier: float
    p50: float | None = None
    p99: float | None = None
    faults: int = 0


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs: the table, and the single measurements."""
    variants = ["tcp", "exec", *(["through"] if plan.through else [])]
    found: dict[tuple[str, str], dict[int, _Run]] = {}
    for kind in (*plan.contents, "postcopy"):
        source = lab.path("source")
        if kind != "postcopy":
            content.make(source, kind, plan.size)
        for rep in range(plan.reps):
            for name in variants if rep % 2 == 0 else variants[::-1]:
                run = _one(lab, plan, kind, source, name)
                found.setdefault((kind, name), {})[rep] = run
                waited = f", faults {run.p50:.0f} / {run.p99:.0f} us" if run.faults else ""
                say(f"{kind} {name}: {run.seconds:.2f} s{waited}")
        remove(source)
    rows = [
        {"what": kind, "over": name, "rep": rep} | vars(run)
        for (kind, name), runs in found.items()
        for rep, run in runs.items()
    ]
    return _table(found, plan), rows


def _one(lab: Lab, plan: Plan, kind: str, source: str, name: str) -> _Run:
    options = ["--workers", plan.workers]
    into = lab.path("destination")
    if kind == "postcopy":
        guest, there = f"demo:?size={plan.guest}&content=random&access=random&rate=0", "demo:"
        options += ["--postcopy", "now"]
    else:
        guest, there = f"image:{source}", f"ram:{into}"
        options += ["--codec", plan.codec]
        remove(into)
    if name == "tcp":
        report = pageferry.send(lab, guest, there, options).report
    else:
        report = _over_a_stream(lab, plan, guest, there, options, name)
    remove(into)
    return _read(report, kind)


def _over_a_stream(
    lab: Lab, plan: Plan, guest: str, there: str, options: list[str], name: str
) -> dict[str, Any]:
    words = [*lab.pageferry, "receive", "--quiet", "--into", there, "-"]
    command = shlex.join(words)
    if name == "through":
        command = f"{plan.through} {shlex.quote(command)}"
    sending = lab.start(
        [*lab.pageferry, "send", guest, f"exec:{command}", *options, "--json", "--quiet"]
    )
    try:
        sending.join(_WAIT_SECONDS)
    finally:
        sending.kill()
    return pageferry.last_object(sending)


def _read(report: dict[str, Any], kind: str) -> _Run:
    cost = {p["name"]: p["cpu-time"] / 1000 for p in report["processes"]}
    run = _Run(report["total-time"] / 1000, sum(cost.values()), cost.get("carrier-0", 0.0))
    if kind == "postcopy":
        percentiles = report.get("postcopy-latency-percentiles")
        if not percentiles:
            raise BenchError("a postcopy had no faults")
        run.p50, run.p99 = percentiles["p50"], percentiles["p99"]
        run.faults = report["postcopy-requests"]
    return run


def _table(found: dict[tuple[str, str], dict[int, _Run]], plan: Plan) -> str:
    lines = []
    for (kind, name), runs in found.items():
        seconds = {rep: run.seconds for rep, run in runs.items()}
        plain = {rep: run.seconds for rep, run in found[kind, "tcp"].items()}
        size = plan.guest if kind == "postcopy" else plan.size
        p50 = [run.p50 for run in runs.values() if run.p50 is not None]
        p99 = [run.p99 for run in runs.values() if run.p99 is not None]
        lines.append([
            f"{kind}, {name}", number(min(seconds.values())),
            number(median(list(seconds.values()))), megabytes(size / min(seconds.values())),
            ratio_text(ratio(seconds, plain)), number(min(run.cpu for run in runs.values())),
            number(min(run.carrier for run in runs.values())),
            number(median(p50), 0) if p50 else "-", number(median(p99), 0) if p99 else "-",
        ])  # fmt: skip
    header = (
        "what, over", "s min", "median", "MB/s", "against tcp", "source's CPU s", "its carrier",
        "fault p50 us", "p99 us",
    )  # fmt: skip
    return f"{render(header, lines)}\nratios: how many times faster, by round (by shortest)"
