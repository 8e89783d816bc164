"""A guest that writes four times faster than the link carries: what it costs to make it converge,
by each way of slowing it down, and by those that do not.

Runs pageferry by its command line; knows nothing of how a guest is slowed down.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...transport.pages import PAGE_SIZE
from ...transport.quantities import format_bytes, format_rate
from . import pageferry
from .lab import Lab, say
from .table import render

_WAYS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "auto-converge": ("--auto-converge",),
    "auto-converge, tailslow": ("--auto-converge", "--cpu-throttle-tailslow"),
    "dirty-limit": ("--dirty-limit",),
    "postcopy auto": ("--postcopy", "auto"),
}


@dataclass
class Plan:
    """What to measure. Sizes in bytes, rates in bytes a second; the guest writes `times` the
    `link`."""

    size: int
    link: int
    times: float
    limit: int  # milliseconds
    reps: int


@dataclass
class Row:
    """One migration."""

    way: str
    rep: int
    outcome: pageferry.Outcome


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All ways in turn."""
    rows: list[Row] = []
    rate = round(plan.times * plan.link / PAGE_SIZE)
    source = f"demo:?size={plan.size}&rate={rate}&content=random"
    options = [
        "--codec", "none", "--max-bandwidth", str(plan.link), "--downtime-limit", f"{plan.limit}ms",
    ]  # fmt: skip
    for rep in range(plan.reps):
        for way, more in _WAYS.items():
            rounds = ["--max-rounds", "5"] if not more else []
            outcome = pageferry.copy(lab, source, "demo:", [*options, *more, *rounds])
            rows.append(Row(way, rep, outcome))
            say(f"{way}, {rep + 1}: exit code {outcome.code}, {outcome.wall:.1f} s")
    title = (
        f"demo guest of {format_bytes(plan.size)} that writes {format_rate(rate * PAGE_SIZE)} over "
        f"a link of {format_rate(plan.link)}, downtime limit {plan.limit} ms"
    )
    return f"{title}\n{_table(rows)}", [asdict(row) for row in rows]


def _table(rows: list[Row]) -> str:
    header = (
        "way", "total s", "rounds", "downtime ms", "slowed down s", "% mean / most",
        "it did % less", "wire", "oracle",
    )  # fmt: skip
    lines = []
    for row in sorted(rows, key=lambda r: list(_WAYS).index(r.way)):
        report = row.outcome.report
        if row.outcome.code:
            lines.append([row.way, f"exit code {row.outcome.code}", *[""] * 7])
            continue
        slowed = report.get("throttle", {})
        lines.append(
            [
                row.way,
                f"{row.outcome.total:.1f}",
                str(report["ram"]["dirty-sync-count"]),
                str(report["downtime"]),
                f"{slowed['time'] / 1000:.1f}" if slowed else "",
                f"{slowed['mean-percentage']:.0f} / {slowed['max-percentage']}" if slowed else "",
                f"{slowed['slow-down']:.0f}" if "slow-down" in slowed else "",
                format_bytes(report["wire-bytes"]),
                "right" if report["oracle"]["ok"] else "WRONG",
            ]
        )
    return render(header, lines)
