"""What `--keys` costs: without, with, in turn.

Time and processor time of a transfer over TCP, one for each kind of content, and the latency of
faults in a postcopy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import content, pageferry
from .lab import BenchError, Lab, remove, say
from .table import median, megabytes, number, ratio, ratio_text, render

_VARIANTS = ("without", "with")
_GUEST = "demo:?size=64M&content=random&access=random&rate=0"
# Slow enough that the guest meets pages that have not come.
_POSTCOPY = ("--postcopy", "now", "--max-postcopy-bandwidth", "50MB", "--workers", "2")


@dataclass
class Plan:
    """What to measure. `size`: bytes."""

    size: int
    reps: int
    contents: Sequence[str]
    codec: str
    workers: str


@dataclass
class _Run:
    seconds: float
    cpu: float
    p50: float | None = None
    p99: float | None = None


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs: the table, and the single measurements."""
    with tempfile.TemporaryDirectory(prefix="pageferry-bench-") as folder:
        return _measure(lab, plan, *_directories(lab, folder))


def _measure(lab: Lab, plan: Plan, here: str, there: str) -> tuple[str, list[dict[str, Any]]]:
    options = {"without": ([], []), "with": (["--keys", here], ["--keys", there])}
    found: dict[tuple[str, str], dict[int, _Run]] = {}
    for kind in (*plan.contents, "postcopy"):
        source = lab.path("source")
        if kind != "postcopy":
            content.make(source, kind, plan.size)
        for rep in range(plan.reps):
            for name in _VARIANTS if rep % 2 == 0 else _VARIANTS[::-1]:
                run = _one(lab, plan, kind, source, *options[name])
                found.setdefault((kind, name), {})[rep] = run
                say(f"{kind} {name}: {run.seconds:.2f} s, {run.cpu:.2f} s of CPU")
        remove(source)
    rows = [
        {"what": kind, "keys": name, "rep": rep} | vars(run)
        for (kind, name), runs in found.items()
        for rep, run in runs.items()
    ]
    return _table(found, plan.size), rows


def _directories(lab: Lab, folder: str) -> tuple[str, str]:
    """Two directories of keys that allow each other, made as users make them."""
    here, there = f"{folder}/here", f"{folder}/there"
    shown = {}
    for path in (here, there):
        making = lab.start([*lab.pageferry, "keys", "new", "--keys", path])
        making.join()
        shown[path] = making.output().split()[-1]
    for path, peer in ((here, there), (there, here)):
        lab.start([*lab.pageferry, "keys", "allow", shown[peer], "--keys", path]).join()
    return here, there


def _one(
    lab: Lab, plan: Plan, kind: str, source: str, options: list[str], receive: list[str]
) -> _Run:
    if kind == "postcopy":
        outcome = pageferry.send(lab, _GUEST, "demo:", [*_POSTCOPY, *options], receive=receive)
        percentiles = outcome.report.get("postcopy-latency-percentiles")
        if not percentiles:
            raise BenchError("a postcopy had no faults")
        cpu = sum(outcome.cpu.values())
        return _Run(outcome.total, cpu, percentiles["p50"], percentiles["p99"])
    destination = lab.path("destination")
    remove(destination)
    outcome = pageferry.send(
        lab, f"image:{source}", f"ram:{destination}",
        ["--codec", plan.codec, "--workers", plan.workers, *options], receive=receive,
    )  # fmt: skip
    remove(destination)
    return _Run(outcome.total, sum(outcome.cpu.values()))


def _table(found: dict[tuple[str, str], dict[int, _Run]], size: int) -> str:
    lines = []
    for (kind, name), runs in found.items():
        seconds = {rep: run.seconds for rep, run in runs.items()}
        plain = {rep: run.seconds for rep, run in found[kind, "without"].items()}
        p50 = [run.p50 for run in runs.values() if run.p50 is not None]
        p99 = [run.p99 for run in runs.values() if run.p99 is not None]
        lines.append([
            f"{kind}, {name}", number(min(seconds.values())),
            number(median(list(seconds.values()))),
            "-" if p50 else megabytes(size / min(seconds.values())),
            ratio_text(ratio(seconds, plain)), number(min(run.cpu for run in runs.values())),
            number(median(p50), 0) if p50 else "-", number(median(p99), 0) if p99 else "-",
        ])  # fmt: skip
    header = (
        "what, keys", "s min", "median", "MB/s", "against without", "CPU s min", "fault p50 us",
        "p99 us",
    )  # fmt: skip
    return f"{render(header, lines)}\nratios: how many times faster, by round (by shortest)"
