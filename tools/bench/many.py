"""Many small images: what each costs beside its bytes. `pageferry batch` to a receiver of many,
over loopback; time, processor time and the worker processes that were started for it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...transport.quantities import format_bytes
from . import pageferry
from .content import same
from .lab import BenchError, Child, Lab, say, wait_for
from .table import median, number, render

_SECONDS = 600.0


@dataclass
class Plan:
    """What to measure. `size`: of an image, bytes; `workers`: of each, 0 for the default."""

    images: int
    size: int
    parallel: int
    workers: int
    directory: str
    reps: int


@dataclass
class Row:
    """One batch. Seconds; `processes`: that were started for images, at each end."""

    seconds: float
    source_cpu: float
    destination_cpu: float
    source_processes: int
    destination_processes: int
    equal: bool


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """The same images, `reps` times, into a new directory each time."""
    here = lab.path("images", plan.directory)
    _make(here, plan)
    rows = []
    try:
        for rep in range(plan.reps):
            rows.append(_one(lab, plan, here))
            say(f"round {rep + 1} of {plan.reps}: {rows[-1].seconds:.1f} s")
    finally:
        shutil.rmtree(here, ignore_errors=True)
    title = f"{plan.images} images of {format_bytes(plan.size)}, random, {plan.parallel} at once"
    return f"{title}\n{_table(rows, plan)}", [asdict(row) for row in rows]


def _make(directory: str, plan: Plan) -> None:
    os.mkdir(directory)
    draw = np.random.default_rng(11)
    for i in range(plan.images):
        Path(directory, f"vm{i:04}.mem").write_bytes(draw.bytes(plan.size))


def _one(lab: Lab, plan: Plan, here: str) -> Row:
    there, state = lab.path("there", plan.directory), lab.path("state", plan.directory)
    os.mkdir(there)
    receive = lab.start(
        [*lab.pageferry, "receive", "--listen", "tcp://127.0.0.1:0", "--into", f"image:{there}/",
         "--at-once", str(plan.parallel), "--json", "--quiet"]
    )  # fmt: skip
    try:
        endpoint = wait_for("the receiver to listen", lambda: pageferry.endpoint_of(receive))
        begin = time.monotonic()
        workers = ["--workers", str(plan.workers)] if plan.workers else []
        sending = lab.start(
            [*lab.pageferry, "batch", f"{here}/", endpoint, "--parallel", str(plan.parallel),
             *workers, "--state", state, "--json", "--quiet"]
        )  # fmt: skip
        source_cpu = sending.join(_SECONDS)
        seconds = time.monotonic() - begin
        receive.kill()
        names = os.listdir(here)
        equal = sorted(os.listdir(there)) == sorted(names) and all(
            same(f"{here}/{name}", f"{there}/{name}", plan.size) for name in names
        )
    finally:
        receive.kill()
        shutil.rmtree(there, ignore_errors=True)
        for suffix in ("", "-wal", "-shm"):
            Path(state + suffix).unlink(missing_ok=True)
    receivers, pids = _receivers(receive)
    report = pageferry.last_object(sending)
    # without a word of it each image had its own, as many as at the other end
    senders = report.get("worker-processes", receivers)
    return Row(seconds, source_cpu, receive.cpu, senders, pids, equal)


def _receivers(receive: Child) -> tuple[int, int]:
    """How many receivers images had in all, and how many processes these were."""
    lines = [json.loads(line) for line in receive.output().splitlines()]
    pids = [p["pid"] for line in lines for p in line.get("processes", []) if "wait-time" in p]
    if not pids:
        raise BenchError("the receiver says nothing of its processes")
    return len(pids), len(set(pids))


def _table(rows: list[Row], plan: Plan) -> str:
    header = ("", "s", "CPU s", "ms an image", "CPU ms an image", "processes", "equal")
    lines = []
    for row in rows:
        cpu = row.source_cpu + row.destination_cpu
        lines.append(
            ["batch", number(row.seconds), number(cpu), number(1000 * row.seconds / plan.images),
             number(1000 * cpu / plan.images),
             f"{row.source_processes} + {row.destination_processes}", "yes" if row.equal else "NO"]
        )  # fmt: skip
    middle = median([row.seconds for row in rows])
    return f"{render(header, lines)}\nmedian: {middle:.2f} s"
