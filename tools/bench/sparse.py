"""An image that is mostly holes: do holes stay holes, and cost nothing? Beside cp.

Both are measured until the copy is on the disk: pageferry syncs by itself, for cp we do.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...transport.quantities import format_bytes
from . import pageferry
from .lab import BenchError, Lab, PeakMemory, remove, say
from .table import mebibytes, median, number, render

_PIECE = 1 << 20


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    data: int
    reps: int
    directory: str


@dataclass
class Row:
    """One copy."""

    method: str
    rep: int
    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    on_disk: int = 0
    equal: bool = False
    problem: str = ""


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """Copies of one image by both methods in turn."""
    source, destination = lab.path("sparse", plan.directory), lab.path("copy", plan.directory)
    make(source, plan.size, plan.data, plan.directory)
    rows: list[Row] = []
    methods: dict[str, Callable[[Lab, str, str, Row], None]] = {"pageferry copy": _pageferry}
    if shutil.which("cp") is not None:
        methods["cp --sparse=auto, sync"] = _cp
    for rep in range(plan.reps):
        for name, method in methods.items():
            remove(destination)
            row = Row(name, rep)
            rows.append(row)
            try:
                method(lab, source, destination, row)
                row.on_disk = os.stat(destination).st_blocks * 512
                row.equal = _same(source, destination)
            except BenchError as e:
                row.problem = str(e)
            say(f"{name} {rep + 1}: {row.problem or f'{row.seconds:.2f} s'}")
    on_disk = os.stat(source).st_blocks * 512
    title = (
        f"image of {format_bytes(plan.size)}, {format_bytes(on_disk)} of it on disk, in pieces of "
        f"{format_bytes(_PIECE)}, in {plan.directory}; {plan.reps} rounds"
    )
    return f"{title}\n{_table(rows)}", [asdict(row) for row in rows]


def make(path: str, size: int, data: int, directory: str) -> None:
    """`data` random bytes in equal distances over `size`."""
    pieces = max(1, data // _PIECE)
    rng = np.random.default_rng(11)
    try:
        with open(path, "wb") as f:
            f.truncate(size)
            for i in range(pieces):
                f.seek(i * (size // pieces) // _PIECE * _PIECE)
                f.write(rng.bytes(_PIECE))
            os.fsync(f.fileno())
    except OSError as e:
        raise BenchError(f"cannot make a sparse file in {directory}: {e.strerror}") from e


def _pageferry(lab: Lab, source: str, destination: str, row: Row) -> None:
    outcome = pageferry.copy(lab, f"image:{source}", f"image:{destination}", [])
    if outcome.code:
        raise BenchError(outcome.message)
    row.seconds, row.cpu = outcome.wall, outcome.cpu["both"]
    row.peak = outcome.peak.get("both", 0)


def _cp(lab: Lab, source: str, destination: str, row: Row) -> None:
    with PeakMemory() as memory:
        begin = time.monotonic()
        child = lab.start(["cp", "--reflink=never", "--sparse=auto", source, destination])
        memory.watch("both", child)
        row.cpu = child.join()
        with open(destination, "rb") as f:
            os.fsync(f.fileno())
        row.seconds = time.monotonic() - begin
    row.peak = memory.peak.get("both", 0)


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch that is no hole."""
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin, at


def _same(a: str, b: str) -> bool:
    """Are both files equal? Only what is no hole in one of them is read."""
    with open(a, "rb") as f, open(b, "rb") as g:
        if os.fstat(f.fileno()).st_size != os.fstat(g.fileno()).st_size:
            return False
        for one in (f, g):
            for begin, end in _data(one.fileno()):
                for at in range(begin, end, _PIECE):
                    n = min(_PIECE, end - at)
                    if os.pread(f.fileno(), n, at) != os.pread(g.fileno(), n, at):
                        return False
    return True


def _table(rows: list[Row]) -> str:
    header = ("method", "s min", "median", "CPU s", "own memory MiB", "copy on disk MiB", "equal")
    lines = []
    for name in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == name and not row.problem]
        if not mine:
            lines.append([name, next(row.problem for row in rows if row.method == name)])
            continue
        seconds = [row.seconds for row in mine]
        lines.append(
            [
                name, number(min(seconds)), number(median(seconds)),
                number(median([row.cpu for row in mine])),
                mebibytes(max(row.peak for row in mine)),
                mebibytes(max(row.on_disk for row in mine)),
                "yes" if all(row.equal for row in mine) else "NO",
            ]
        )  # fmt: skip
    return render(header, lines)
