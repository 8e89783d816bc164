"""What `--trace` costs: off, on, and against another version.

All variants take turns within a round. Time and processor time of a transfer over TCP, the latency
of faults in a postcopy, and in a process of its own what one record costs: written into its
ring, and made into text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import content, pageferry
from .lab import BenchError, Lab, remove, say
from .table import median, number, ratio, ratio_text, render

_GUEST = "demo:?size=64M&content=random&access=random&rate=0"
# Slow enough that the guest meets pages that have not come.
_POSTCOPY = ("--postcopy", "now", "--max-postcopy-bandwidth", "50MB", "--workers", "2")
_RECORDS = 200_000
# Processor time, the shortest of many turns: other processes of the host are not measured.
_ALONE = f"""
from time import process_time
from pageferry.pipeline.trace_events import worker_events
from pageferry.workers.trace_records import Kind
from pageferry.workers.tracing import Rings

rings = Rings(1)
writer, reader = rings.writer(0), rings.reader(0)
write = text = 1.0
for _ in range({_RECORDS} // 2000):
    begin = process_time()
    for i in range(2000):
        writer.add(Kind.FRAME, 1, block=0, page=i, pages=256, size=1 << 20, number=i)
    write = min(write, process_time() - begin)
    records = reader.take(ended=True)
    begin = process_time()
    size = len(",".join(worker_events(records, 1, "x")))
    text = min(text, process_time() - begin)
assert reader.dropped == 0
del writer, reader
rings.close()
print(write / 2000 * 1e9, text / 2000 * 1e9, size / 2000)
"""


@dataclass
class Plan:
    """What to measure. `before`: how to run another version, or nothing."""

    size: int
    reps: int
    contents: Sequence[str]
    before: list[str]


@dataclass
class _Run:
    seconds: float
    cpu: float
    p50: float | None = None
    p99: float | None = None
    events: int = 0
    bytes: int = 0


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs: the tables, and the single measurements."""
    found: dict[tuple[str, str], dict[int, _Run]] = {}
    ours = lab.pageferry
    variants = {"off": ours, "on": ours} | ({"before": plan.before} if plan.before else {})
    for kind in (*plan.contents, "postcopy"):
        source = lab.path("source")
        if kind != "postcopy":
            content.make(source, kind, plan.size)
        for rep in range(plan.reps):
            for name in _turns(list(variants), rep):
                lab.pageferry = variants[name]
                try:
                    run = _one(lab, kind, source, traced=name == "on")
                finally:
                    lab.pageferry = ours
                found.setdefault((kind, name), {})[rep] = run
                say(f"{kind} {name}: {run.seconds:.2f} s, {run.cpu:.2f} s of CPU")
        remove(source)
    rows = [
        {"what": kind, "trace": name, "rep": rep} | vars(run)
        for (kind, name), runs in found.items()
        for rep, run in runs.items()
    ]
    return f"{_table(found)}\n\n{_alone()}", rows


def _turns(names: list[str], rep: int) -> list[str]:
    return [*names[rep % len(names) :], *names[: rep % len(names)]]


def _one(lab: Lab, kind: str, source: str, *, traced: bool) -> _Run:
    file = lab.path("trace.json")
    options = ["--trace", file] if traced else []
    if kind == "postcopy":
        outcome = pageferry.copy(lab, _GUEST, "demo:", [*_POSTCOPY, *options])
        if outcome.code:
            raise BenchError(outcome.message)
    else:
        destination = lab.path("destination")
        remove(destination)
        outcome = pageferry.send(
            lab, f"image:{source}", f"ram:{destination}",
            ["--codec", "none", "--workers", "2", *options], receive=_there(lab, traced),
        )  # fmt: skip
    run = _Run(outcome.total, sum(outcome.cpu.values()))
    percentiles = outcome.report.get("postcopy-latency-percentiles")
    if percentiles:
        run.p50, run.p99 = percentiles["p50"], percentiles["p99"]
    if traced:
        run.bytes = os.path.getsize(file)
        with open(file) as f:
            run.events = len(json.load(f))
        remove(file)
    return run


def _there(lab: Lab, traced: bool) -> list[str]:
    return ["--trace", lab.path("there.json")] if traced else []


def _table(found: dict[tuple[str, str], dict[int, _Run]]) -> str:
    lines = []
    for (kind, name), runs in found.items():
        seconds = {rep: run.seconds for rep, run in runs.items()}
        cpu = {rep: run.cpu for rep, run in runs.items()}
        off = found[kind, "off"]
        p50 = [run.p50 for run in runs.values() if run.p50 is not None]
        lines.append([
            f"{kind}, {name}",
            number(min(seconds.values())), number(median(list(seconds.values()))),
            ratio_text(ratio(seconds, {rep: run.seconds for rep, run in off.items()})),
            number(min(cpu.values())),
            ratio_text(ratio(cpu, {rep: run.cpu for rep, run in off.items()})),
            number(median(p50), 0) if p50 else "-",
            str(max(run.events for run in runs.values()) or "-"),
        ])  # fmt: skip
    header = (
        "what, trace", "s min", "median", "against off", "CPU s min", "against off", "fault p50 us",
        "events",
    )  # fmt: skip
    return f"{render(header, lines)}\nratios: how many times faster, by round (by shortest)"


def _alone() -> str:
    done = subprocess.run(
        [sys.executable, "-c", _ALONE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(done.stderr)
    write, text, size = map(float, done.stdout.split())
    return (
        f"one record: {write:.0f} ns to write into its ring, {text:.0f} ns to make {size:.0f} "
        f"bytes of text of"
    )
