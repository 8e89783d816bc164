"""Many images of few families, from one directory into another: `pageferry batch` into a receiver
of many, one `pageferry copy` after the other, and rsync. Over loopback; all files compared.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...transport.quantities import format_bytes
from . import pageferry
from .content import same
from .lab import BenchError, Lab, loopback_bytes, say, wait_for
from .peers import rsync_daemon
from .table import megabytes, number, render

_PAGE = 4096
_COPY_SECONDS = 600.0


@dataclass
class Plan:
    """What to measure. `size`: of an image, bytes; `changed`: pages of a clone that are its own;
    `together`: clones follow one another by name, instead of families taking turns."""

    images: int
    families: int
    size: int
    changed: int
    directory: str
    parallel: int = 4
    together: bool = False


@dataclass
class Row:
    """One method. Seconds and bytes; `wire`: what the loopback interface counted, or what the
    copies themselves say."""

    method: str
    seconds: float = 0.0
    cpu: float = 0.0
    wire: int = 0
    equal: bool = False
    problem: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """Each method once, into a directory of its own."""
    here = lab.path("images", plan.directory)
    _make(here, plan)
    rows = []
    methods: dict[str, Callable[[Lab, Plan, str, str, Row], None]] = {
        "pageferry batch": _batch,
        "pageferry copy, one by one": _copies,
        "rsync": _rsync,
    }
    for name, method in methods.items():
        there = lab.path("there", plan.directory)
        os.mkdir(there)
        row = Row(name)
        rows.append(row)
        try:
            method(lab, plan, here, there, row)
            row.equal = _equal(here, there, plan)
        except BenchError as e:
            row.problem = str(e)
        finally:
            shutil.rmtree(there, ignore_errors=True)
        say(f"{name}: {row.problem or f'{row.seconds:.1f} s, {megabytes(row.wire)} MB'}")
    shutil.rmtree(here, ignore_errors=True)
    title = (
        f"{plan.images} images of {format_bytes(plan.size)} of {plan.families} families, random; "
        f"{plan.changed} pages of each clone are its own; in {plan.directory}"
    )
    return f"{title}\n{_table(rows)}", [asdict(row) for row in rows]


def _make(directory: str, plan: Plan) -> None:
    os.mkdir(directory)
    draw = np.random.default_rng(7)
    pages = plan.size // _PAGE
    number = 0
    for family in range(plan.families):
        base = np.frombuffer(bytearray(draw.bytes(pages * _PAGE)), np.uint8).reshape(-1, _PAGE)
        for i in range(family, plan.images, plan.families):
            image = base.copy()
            own = draw.choice(pages, min(plan.changed, pages), replace=False)
            image[own] = np.frombuffer(draw.bytes(len(own) * _PAGE), np.uint8).reshape(-1, _PAGE)
            name = f"vm{number if plan.together else i:03}.mem"
            number += 1
            try:
                image.tofile(Path(directory, name))
            except OSError as e:
                raise BenchError(f"no space in {directory}: {e}") from e


def _names(directory: str) -> list[str]:
    return sorted(os.listdir(directory))


def _batch(lab: Lab, plan: Plan, here: str, there: str, row: Row) -> None:
    receive = lab.start(
        [*lab.pageferry, "receive", "--listen", "tcp://127.0.0.1:0", "--into", f"image:{there}/",
         "--at-once", str(plan.parallel), "--json", "--quiet"]
    )  # fmt: skip
    try:
        endpoint = wait_for("the receiver to listen", lambda: pageferry.endpoint_of(receive))
        before, begin = loopback_bytes(), time.monotonic()
        sending = lab.start(
            [*lab.pageferry, "batch", f"{here}/", endpoint, "--parallel", str(plan.parallel),
             "--state", lab.path("state", plan.directory), "--json", "--quiet"]
        )  # fmt: skip
        row.cpu = sending.join(_COPY_SECONDS)
        row.seconds = time.monotonic() - begin
        row.wire = loopback_bytes() - before
    finally:
        receive.kill()
    row.cpu += receive.cpu


def _copies(lab: Lab, plan: Plan, here: str, there: str, row: Row) -> None:
    for name in _names(here):
        outcome = pageferry.copy(lab, f"image:{here}/{name}", f"image:{there}/{name}", [])
        if outcome.code:
            raise BenchError(outcome.message)
        row.seconds += outcome.wall
        row.cpu += outcome.cpu["both"]
        row.wire += int(outcome.report["wire-bytes"])


def _rsync(lab: Lab, plan: Plan, here: str, there: str, row: Row) -> None:
    if shutil.which("rsync") is None:
        raise BenchError("not installed: rsync")
    daemon, where = rsync_daemon(lab, there)
    try:
        before, begin = loopback_bytes(), time.monotonic()
        sending = lab.start(["rsync", "--recursive", "--whole-file", "--fsync", f"{here}/", where])
        row.cpu = sending.join(_COPY_SECONDS)
        row.seconds = time.monotonic() - begin
        row.wire = loopback_bytes() - before
    finally:
        daemon.kill()
    row.cpu += daemon.cpu


def _equal(here: str, there: str, plan: Plan) -> bool:
    names = _names(here)
    return _names(there) == names and all(
        same(f"{here}/{name}", f"{there}/{name}", plan.size) for name in names
    )


def _table(rows: list[Row]) -> str:
    header = ("method", "s", "CPU s", "wire MB", "time of rsync's", "equal")
    reference = next((r.seconds for r in rows if r.method == "rsync" and not r.problem), None)
    lines = []
    for row in rows:
        if row.problem:
            lines.append([row.method, f"left out: {row.problem}"])
            continue
        ratio = number(row.seconds / reference) if reference else ""
        lines.append(
            [row.method, number(row.seconds), number(row.cpu), megabytes(row.wire), ratio,
             "yes" if row.equal else "NO"]
        )  # fmt: skip
    return render(header, lines)
