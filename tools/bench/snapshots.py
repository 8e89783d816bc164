"""Snapshots: memory into a file and back, against cp, dd and QEMU's own migration to a file; how
long a guest stands still that goes on meanwhile; how soon one runs that is restored, lazily or not.

Files are on disk (`directory`), memory in /dev/shm. All writers sync; what is read back is in the
page cache, for all of them. "Runs after": of pageferry from its start (the process' own is not in
it) to the guest's; of QEMU until it has loaded all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...transport.quantities import format_bytes
from .content import make, same
from .lab import BenchError, Lab, remove, say, wait_for
from .qemu import SKIP, Machine, Qemu
from .table import number, render

_SECONDS = 600.0


@dataclass
class Plan:
    """What to measure. `size`, `live_size`, `lazy_size`: bytes; `rate`: pages a second that the
    live guest writes."""

    size: int
    live_size: int
    lazy_size: int
    content: str
    rate: int
    directory: str
    reps: int
    accel: str
    cpu: str


@dataclass
class Row:
    """One method, once. Seconds; `pause` in milliseconds."""

    what: str
    method: str
    size: int
    seconds: float = 0.0
    runs_after: float | None = None
    pause: float | None = None
    problem: str = ""
    notes: str = ""


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All of it, method by method, `reps` times."""
    rows: list[Row] = []
    ram = lab.path("ram")
    make(ram, plan.content, plan.size)
    qemu = Qemu(lab, plan.accel.split(","), plan.cpu)
    for _ in range(plan.reps):
        for name, save in _saving(lab, plan, qemu).items():
            _one(lab, rows, Row("save", name, plan.size), partial(save, ram))
        for name, restore in _restoring(lab, plan, qemu).items():
            _one(lab, rows, Row("restore", name, plan.size), partial(restore, ram))
    remove(ram)
    for name in ("raw", "snap", "direct", "qemu"):
        remove(lab.path(name, plan.directory))
    for _ in range(plan.reps):
        _live(lab, plan, rows)
        _lazy(lab, plan, rows)
    title = (
        f"{format_bytes(plan.size)} of {plan.content} memory in /dev/shm, files in {plan.directory}"
    )
    return f"{title}\n{_table(rows)}", [asdict(row) for row in rows]


def _one(lab: Lab, rows: list[Row], row: Row, act: Callable[[Row], None]) -> None:
    rows.append(row)
    _take_memory(lab, row.size)
    begin = time.monotonic()
    try:
        act(row)
    except BenchError as e:
        row.problem = str(e)
    row.seconds = row.seconds or time.monotonic() - begin
    say(f"{row.what} {row.method}: {row.problem or f'{row.seconds:.2f} s'}")


def _take_memory(lab: Lab, size: int) -> None:
    """Have so much memory that is free, and this machine's: what a virtual machine has not used for
    a while its host may have taken back, and to get it again takes several times as long as to
    write it. Who comes first must not pay that for all others."""
    path, piece = lab.path("taken"), b"\1" * (1 << 20)
    with open(path, "wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(piece)
    remove(path)


def _do(lab: Lab, *argv: str) -> str:
    child = lab.start(list(argv))
    child.join(_SECONDS)
    return child.output()


# ---- memory that stands still ---------------------------------------------------------------


def _saving(lab: Lab, plan: Plan, qemu: Qemu) -> dict[str, Callable[[str, Row], None]]:
    def at(name: str) -> str:
        path = lab.path(name, plan.directory)
        remove(path)
        return path

    def cp(ram: str, row: Row) -> None:
        path = at("raw")
        _do(lab, "sh", "-c", f"cp {ram} {path} && sync {path}")

    def dd(ram: str, row: Row) -> None:
        _do(lab, "dd", f"if={ram}", f"of={at('direct')}", "bs=1M", "oflag=direct", "conv=fsync")

    def ours(option: str, name: str) -> Callable[[str, Row], None]:
        def save(ram: str, row: Row) -> None:
            target = f"file:{at(name)}{option}"
            said = _do(lab, *lab.pageferry, "snapshot", f"image:{ram}", target, "--json")
            row.notes = f"{json.loads(said)['total-time'] / 1000:.2f} s by its own clock"

        return save

    def qemus(ram: str, row: Row) -> None:
        path = at("qemu")
        with _machine(lab, plan, qemu, ram) as machine:
            machine.set_up(0, "none")
            begin = time.monotonic()
            machine.qmp.ask("migrate", uri=f"exec:cat > {path}")
            wait_for("QEMU's migration", machine.ended, 300, every=0.01)
            _do(lab, "sync", path)
            row.seconds = time.monotonic() - begin

    return {
        "cp, sync": cp,
        "dd, direct": dd,
        "pageferry": ours("", "snap"),
        "pageferry, direct": ours("?direct=on", "direct"),
        "QEMU exec:cat, sync": qemus,
    }


def _restoring(lab: Lab, plan: Plan, qemu: Qemu) -> dict[str, Callable[[str, Row], None]]:
    def file(name: str) -> str:
        return lab.path(name, plan.directory)

    def checked(ram: str, there: str) -> None:
        equal = same(ram, there, plan.size, SKIP)
        remove(there)
        if not equal:
            raise BenchError("what was restored is not what was saved")

    def cp(ram: str, row: Row) -> None:
        there, begin = lab.path("there"), time.monotonic()
        _do(lab, "cp", file("raw"), there)
        row.seconds = time.monotonic() - begin
        checked(ram, there)

    def ours(ram: str, row: Row) -> None:
        there, begin = lab.path("there"), time.monotonic()
        _do(lab, *lab.pageferry, "restore", f"file:{file('snap')}", "--into", f"ram:{there}",
            "--json", "--quiet")  # fmt: skip
        row.seconds = time.monotonic() - begin
        checked(ram, there)

    def qemus(ram: str, row: Row) -> None:
        there = lab.path("there")
        with _machine(lab, plan, qemu, there, incoming=True) as machine:
            machine.set_up(0, "none")
            begin = time.monotonic()
            machine.qmp.ask("migrate-incoming", uri=f"exec:cat {file('qemu')}")
            wait_for("QEMU's destination", machine.ready, 300)
            row.seconds = row.runs_after = time.monotonic() - begin
        checked(ram, there)

    return {"cp": cp, "pageferry": ours, "QEMU exec:cat": qemus}


def _machine(lab: Lab, plan: Plan, qemu: Qemu, ram: str, *, incoming: bool = False) -> Machine:
    if problem := qemu.missing():
        raise BenchError(problem)
    return Machine(
        lab, "incoming" if incoming else "saved", ram, plan.size, qemu.accel, qemu.cpu,
        ready_memory=not incoming, incoming=incoming,
    )  # fmt: skip


# ---- guests that run ------------------------------------------------------------------------


def _live(lab: Lab, plan: Plan, rows: list[Row]) -> None:
    """A guest that writes, saved live and standing still."""
    for how in ((), ("--live",)):

        def act(row: Row, how: tuple[str, ...] = how) -> None:
            path = lab.path("live", plan.directory)
            guest = f"demo:?size={plan.live_size}&rate={plan.rate}&content=random&access=random"
            said = _do(lab, *lab.pageferry, "snapshot", guest, f"file:{path}", *how, "--json")
            report = json.loads(said)
            row.seconds, row.pause = report["total-time"] / 1000, report["downtime"]
            if how:
                row.notes = (
                    f"{report['writes-held-back']} writes held back, {report['held-back-us']} us "
                    f"each on average; protected again: {report['protected-again']} chunks"
                )
            remove(path)

        _one(
            lab, rows, Row("guest that writes", " ".join(how) or "standing still", plan.live_size),
            act,
        )  # fmt: skip


def _lazy(lab: Lab, plan: Plan, rows: list[Row]) -> None:
    """A guest of `lazy_size`, restored."""
    path = lab.path("lazy", plan.directory)
    guest = f"demo:?size={plan.lazy_size}&rate={plan.rate}&content=random&access=random"
    try:
        _do(lab, *lab.pageferry, "snapshot", guest, f"file:{path}", "--json", "--live")
    except BenchError as e:
        rows.append(Row("first instruction", "-", plan.lazy_size, problem=str(e)))
        return
    for how in ((), ("--lazy",)):

        def act(row: Row, how: tuple[str, ...] = how) -> None:
            report = json.loads(
                _do(lab, *lab.pageferry, "restore", f"file:{path}", "--into", "demo:", *how,
                    "--json", "--quiet")
            )  # fmt: skip
            if not report["oracle"]["ok"]:
                raise BenchError("the oracle found wrong pages")
            row.seconds = row.runs_after = report["total-time"] / 1000
            if how:  # it is stopped, so to say, when all is set up, and runs some ms later
                row.runs_after = (report["setup-time"] + report["downtime"]) / 1000

        _one(lab, rows, Row("first instruction", " ".join(how) or "full", plan.lazy_size), act)
    os.unlink(path)


def _table(rows: list[Row]) -> str:
    header = ("what", "how", "size", "s", "GB/s", "runs after s", "pause ms", "")
    lines = []
    for row in rows:
        rate = row.size / row.seconds / 1e9 if row.seconds and not row.problem else None
        lines.append([
            row.what, row.method, format_bytes(row.size),
            "-" if row.problem else number(row.seconds), number(rate), number(row.runs_after),
            "-" if row.pause is None else str(row.pause), row.problem or row.notes,
        ])  # fmt: skip
    return render(header, lines)
