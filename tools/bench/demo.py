"""A guest that runs and writes while it moves: is the downtime within its limit, are its bytes
right, and does pageferry give up, and say why, when the guest writes faster than the link?
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...transport.quantities import format_bytes
from . import pageferry
from .lab import Lab, say
from .table import render

_NOT_CONVERGING = 10


@dataclass(frozen=True)
class _Case:
    """A guest that writes `rate` pages a second, and what is asked of pageferry."""

    rate: int
    limit: int  # milliseconds
    options: tuple[str, ...] = ()
    expected: int = 0  # exit code


_CASES = (
    _Case(20_000, 300),
    _Case(20_000, 100),
    _Case(
        100_000, 300, ("--max-bandwidth", "100MB", "--max-rounds", "5", "--codec", "none"),
        expected=_NOT_CONVERGING,
    ),
)  # fmt: skip


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int


@dataclass
class Row:
    """One migration."""

    case: _Case
    rep: int
    outcome: pageferry.Outcome


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All cases in turn."""
    rows: list[Row] = []
    for rep in range(plan.reps):
        for case in _CASES:
            outcome = pageferry.copy(
                lab, f"demo:?size={plan.size}&rate={case.rate}", "demo:",
                ["--downtime-limit", f"{case.limit}ms", *case.options],
            )  # fmt: skip
            rows.append(Row(case, rep, outcome))
            say(f"{case.rate} pages/s, {case.limit} ms, {rep + 1}: exit code {outcome.code}")
    title = f"demo guest of {format_bytes(plan.size)} of random bytes, both ends on this host"
    return f"{title}\n{_table(rows)}", [asdict(row) for row in rows]


def _table(rows: list[Row]) -> str:
    header = (
        "guest writes", "options", "limit ms", "downtime ms", "of limit", "rounds", "total s",
        "oracle", "exit code",
    )  # fmt: skip
    lines: list[list[str]] = []
    for row in sorted(rows, key=lambda r: _CASES.index(r.case)):
        case, outcome, report = row.case, row.outcome, row.outcome.report
        downtime = report.get("downtime") if outcome.code == 0 else None
        expected = "" if outcome.code == case.expected else f" (expected {case.expected})"
        lines.append(
            [
                f"{case.rate} pages/s",
                " ".join(case.options) or "-",
                str(case.limit),
                "-" if downtime is None else str(downtime),
                "-" if downtime is None else f"{downtime / case.limit:.2f}",
                str(report.get("ram", {}).get("dirty-sync-count", "-")),
                f"{report.get('total-time', 0) / 1000:.2f}",
                _verdict(report.get("oracle")),
                f"{outcome.code}{expected}",
            ]
        )
        if outcome.code:
            lines.append(["", outcome.message])
    return render(header, lines)


def _verdict(oracle: dict[str, Any] | None) -> str:
    if oracle is None:
        return "-"
    return f"{'right' if oracle['ok'] else 'WRONG'}: {oracle['pages']} pages"
