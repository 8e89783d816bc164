"""What verification costs: off, by default (sums of all pages, a sixteenth read back), and with
all of it read back.

All variants take turns within a round, both ends on this host. Time is total-time as the report has
it. Processor time is of senders and receivers, as they count it themselves: it says more than
seconds where others work on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import content, pageferry, sparse
from .lab import BenchError, Lab, remove, say
from .table import median, number, ratio, render

VARIANTS = {"off": ["--no-verify"], "default": [], "all": ["--verify"]}
# What the memory holds, and the codec it travels with.
CASES = {
    "random": "none",
    "text": "zstd",
    "half": "auto",
    "zero": "auto",
    "sparse": "auto",
}
# Of a sparse image, the share that is no hole.
_DATA_SHARE = 16


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int
    contents: Sequence[str]
    directory: str


@dataclass
class _Run:
    seconds: float
    cpu: float


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs: the table, and the single measurements."""
    found: dict[tuple[str, str], dict[int, _Run]] = {}
    names = list(VARIANTS)
    source, destination = (lab.path(name, plan.directory) for name in ("source", "copy"))
    for kind in plan.contents:
        _make(source, kind, plan)
        for rep in range(plan.reps):
            turn = rep % len(names)
            for name in (*names[turn:], *names[:turn]):
                run = _one(lab, source, destination, ["--codec", CASES[kind], *VARIANTS[name]])
                found.setdefault((kind, name), {})[rep] = run
                say(f"{kind} {name}: {run.seconds:.2f} s, {run.cpu:.2f} s of CPU")
        remove(source)
    rows = [
        {"what": kind, "verify": name, "rep": rep} | vars(run)
        for (kind, name), runs in found.items()
        for rep, run in runs.items()
    ]
    return f"images in {plan.directory}\n{_table(found)}", rows


def _make(path: str, kind: str, plan: Plan) -> None:
    if kind == "sparse":
        sparse.make(path, plan.size, plan.size // _DATA_SHARE, plan.directory)
    else:
        content.make(path, kind, plan.size)


def _one(lab: Lab, source: str, destination: str, options: list[str]) -> _Run:
    outcome = pageferry.copy(lab, f"image:{source}", f"image:{destination}", options)
    remove(destination)
    if outcome.code:
        raise BenchError(outcome.message)
    workers = [
        process["cpu-time"]
        for process in outcome.report["processes"]
        if not process["name"].endswith("coordinator")
    ]
    return _Run(outcome.report["total-time"] / 1000, sum(workers) / 1000)


def _table(found: dict[tuple[str, str], dict[int, _Run]]) -> str:
    lines = []
    for (kind, name), runs in found.items():
        off = found[kind, "off"]
        seconds, cpu = [r.seconds for r in runs.values()], [r.cpu for r in runs.values()]
        lines.append(
            [
                kind, CASES[kind], name, number(min(seconds)), number(median(seconds)),
                _cost(off, runs, "seconds"), number(median(cpu)), _cost(off, runs, "cpu"),
            ]
        )  # fmt: skip
    header = ("content", "codec", "verify", "s min", "median", "more", "CPU s", "more")
    return f"{render(header, lines)}\nmore: than off, median by round (by shortest)"


def _cost(off: dict[int, _Run], runs: dict[int, _Run], what: str) -> str:
    """By how much more it is than without."""
    pair = ratio(
        {rep: getattr(run, what) for rep, run in runs.items()},
        {rep: getattr(run, what) for rep, run in off.items()},
    )
    return "-" if pair is None else f"{100 / pair[0] - 100:+.1f} % ({100 / pair[1] - 100:+.1f} %)"
