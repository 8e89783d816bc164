"""Is a plan right? For five guests: what `pageferry plan` says, and then what the migration that it
recommends takes. And is a dirty rate right, of a guest that writes so many pages a second?

Runs both as their users do; knows nothing of how either comes about.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ...transport.quantities import format_bytes
from . import pageferry
from .lab import Lab, Others, remove, say, wait_for
from .table import median, render

PARTS = ("plan", "dirtyrate")
_PAGE = 4096
# Below this a difference is the host's scheduler, and no share of anything (seconds).
_NOISE = 0.01

# A process that fills its memory with random bytes and then writes the first HOT pages over and
# over, RATE pages a second, one behind the other.
_WRITER = """
import mmap, os, sys, time
path, pages, hot, rate = sys.argv[1], *map(int, sys.argv[2:])
fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
os.ftruncate(fd, pages * 4096)
memory = mmap.mmap(fd, pages * 4096)
for at in range(0, pages * 4096, 1 << 20):
    memory[at:at + (1 << 20)] = os.urandom(1 << 20)
print("ready", flush=True)
begin, done = time.monotonic(), 0
while True:
    time.sleep(0.001)
    due = min(int((time.monotonic() - begin) * rate) - done, hot)
    for page in range(done, done + due):
        at = page % hot * 4096
        memory[at] = (memory[at] + 1) % 256
    done += due
"""


@dataclass(frozen=True)
class _Case:
    """A demo guest with these options, or a process with a hot spot of so many pages; the share of
    `size` that it has; and what link and downtime are planned for."""

    name: str
    demo: str = ""
    hot: int = 0
    share: float = 1.0
    bandwidth: str = ""
    limit: str = "300ms"

    @property
    def options(self) -> list[str]:
        link = ["--bandwidth", self.bandwidth] if self.bandwidth else []
        return [*link, "--downtime-limit", self.limit]


_CASES = (
    _Case("idle", "rate=1&content=text", bandwidth="200MB"),
    _Case("slow writer, 82 of 200 MB/s", "rate=20000&content=random", bandwidth="200MB"),
    _Case("hot spot of 16 MiB", hot=4096, share=0.5, bandwidth="200MB"),
    _Case("twice the link's 200 MB/s", "rate=100000&content=random", bandwidth="200MB"),
    _Case("random, large, no limit", "rate=5000&content=random", share=2.0),
)
_RATES = (1000, 5000, 20_000, 60_000)


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int
    parts: list[str]


@dataclass
class Row:
    """One plan, and one migration as it says. Seconds."""

    case: str
    rep: int
    mode: str
    settings: str
    predicted: float
    real: float
    predicted_downtime: float
    real_downtime: float
    predicted_rounds: int
    real_rounds: int
    planning: float
    others: float  # share of all processors that others took meanwhile


@dataclass
class RateRow:
    """One dirty rate. Pages a second; processor seconds; share of a processor."""

    mode: str
    rep: int
    known: int
    measured: int
    cpu: float
    slow_down: float
    others: float


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All cases in turn."""
    tables: list[str] = []
    rows: list[dict[str, Any]] = []
    if "plan" in plan.parts:
        plans = [_one(lab, case, rep, plan.size) for rep in range(plan.reps) for case in _CASES]
        title = f"{format_bytes(plan.size)} and shares of it, both ends on this host"
        tables.append(f"{title}; {plan.reps} rounds, medians\n{_table(plans)}")
        rows += map(asdict, plans)
    if "dirtyrate" in plan.parts:
        rates = [
            _rate(lab, rate, mode, rep, plan.size) for rep in range(plan.reps) for rate in _RATES
            for mode in ("dirty-bitmap", "page-sampling")
        ]  # fmt: skip
        tables.append(f"dirty rates over 1 s\n{_rate_table(rates)}")
        rows += map(asdict, rates)
    return "\n\n".join(tables), rows


def _one(lab: Lab, case: _Case, rep: int, size: int) -> Row:
    others = Others()
    with _guest(lab, case, size) as (source, destination):
        planned = _plan(lab, source, case)
    with _guest(lab, case, size) as (source, destination):
        outcome = pageferry.copy(lab, source, destination, planned["settings"])
    report = outcome.report
    row = Row(
        case.name, rep, planned["mode"], " ".join(planned["settings"]),
        planned["total-time"] / 1000, report.get("total-time", 0) / 1000,
        planned.get("downtime", 0) / 1000, report.get("downtime", 0) / 1000,
        planned["rounds"], report.get("ram", {}).get("dirty-sync-count", 0),
        planned["planning-time"] / 1000, others.share(),
    )  # fmt: skip
    if outcome.code:
        say(f"{case.name}: {outcome.message}")
    say(
        f"{case.name} {rep + 1}: {row.mode}: {row.predicted:.2f} s planned, {row.real:.2f} s; "
        f"downtime {row.predicted_downtime * 1000:.0f} ms planned, {row.real_downtime * 1000:.0f} "
        f"ms; others took {row.others:.0%}"
    )
    return row


def _plan(lab: Lab, source: str, case: _Case) -> dict[str, Any]:
    child = lab.start([*lab.pageferry, "plan", source, *case.options, "--json", "--quiet"])
    child.join()
    return pageferry.last_object(child)


@contextmanager
def _guest(lab: Lab, case: _Case, size: int) -> Iterator[tuple[str, str]]:
    """The source and the destination of one migration."""
    size = round(size * case.share)
    if case.demo:
        yield f"demo:?size={size}&{case.demo}", "demo:"
        return
    path, copied = lab.path("hot"), lab.path("hot-copy")
    remove(copied)
    writer = lab.start(
        [sys.executable, "-c", _WRITER, path, str(size // _PAGE), str(case.hot), "40000"]
    )
    try:
        wait_for("the writer to write", lambda: "ready" in writer.output())
        time.sleep(0.2)  # until it has been everywhere once
        yield f"pid:{writer.pid}?mapping={path}", f"ram:{copied}"
    finally:
        writer.kill()
        remove(path)
        remove(copied)


def _off(planned: float, real: float) -> float:
    """How far a plan is off, as a share of what came."""
    return abs(planned - real) / real if real and abs(planned - real) > _NOISE else 0.0


def _table(rows: list[Row]) -> str:
    header = (
        "guest", "mode", "s planned", "s", "off", "downtime ms planned", "ms", "off", "rounds",
        "planning s", "others",
    )  # fmt: skip
    lines = []
    for name in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == name]
        time_off = [_off(r.predicted, r.real) for r in mine]
        down_off = [_off(r.predicted_downtime, r.real_downtime) for r in mine]
        lines.append(
            [
                name,
                ", ".join(dict.fromkeys(r.mode for r in mine)),
                f"{median([r.predicted for r in mine]):.2f}",
                f"{median([r.real for r in mine]):.2f}",
                f"{median(time_off):.0%}",
                f"{median([r.predicted_downtime for r in mine]) * 1000:.0f}",
                f"{median([r.real_downtime for r in mine]) * 1000:.0f}",
                f"{median(down_off):.0%}",
                " ".join(f"{r.predicted_rounds}/{r.real_rounds}" for r in mine),
                f"{median([r.planning for r in mine]):.1f}",
                f"{median([r.others for r in mine]):.0%}",
            ]
        )
        lines.append(["", mine[-1].settings])
    return render(header, lines)


# ---- dirty rates -------------------------------------------------------------------------------


def _rate(lab: Lab, rate: int, mode: str, rep: int, size: int) -> RateRow:
    others = Others()
    source = f"demo:?size={size}&rate={rate}&content=zero"
    child = lab.start(
        [*lab.pageferry, "dirtyrate", source, "--seconds", "1", "--mode", mode, "--json"]
    )
    child.join()
    found = json.loads(child.output())
    return RateRow(
        mode, rep, rate, found["dirty-pages-rate"], found["cost"]["cpu-time"] / 1000,
        found["cost"]["guest-slow-down"], others.share(),
    )  # fmt: skip


def _rate_table(rows: list[RateRow]) -> str:
    header = ("mode", "pages/s written", "measured", "off", "CPU ms", "guest slower", "others")
    lines = []
    for mode, known in dict.fromkeys((row.mode, row.known) for row in rows):
        mine = [row for row in rows if (row.mode, row.known) == (mode, known)]
        lines.append(
            [
                mode,
                str(known),
                f"{median([r.measured for r in mine]):.0f}",
                f"{median([abs(r.measured - known) / known for r in mine]):.1%}",
                f"{median([r.cpu for r in mine]) * 1000:.0f}",
                f"{median([r.slow_down for r in mine]):.2%}",
                f"{median([r.others for r in mine]):.0%}",
            ]
        )
    return render(header, lines)
