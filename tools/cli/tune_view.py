"""What a person sees of a tuning: one live line, or a line a trial; then a table, the best, what
bounds them, and the curves as bars. Reads reports (pipeline/tuning_report.py)."""

from __future__ import annotations

import io
import sys
import textwrap
from typing import Any

from ...pipeline.tuning import FASTEST, Measured, Search, Trial
from ...pipeline.tuning_report import GOAL_WORDS
from ...transport.quantities import format_bytes, format_rate, format_seconds
from ...workers.guests.sample import Sample
from .display import Display, LiveLines, PlainLines, bar

_BAR = 32
# Settings in the table; --json has all.
_ROWS = 12
_HEADER = ("workers", "codec", "batch", "rate", "±", "CPU s/GB", "senders", "receivers", "wire",
           "downtime", "trials", "best for")  # fmt: skip


class TuneView(Display):
    """Shows nothing: --quiet."""

    def begin(self, sample: Sample) -> None:
        """The sample was taken."""

    def trial(self, trial: Trial, found: Measured, tuner: Search, eta: float) -> None:
        """A trial is over; the others take `eta` seconds."""


class PlainTuneView(PlainLines, TuneView):
    """Lines on stderr."""

    def begin(self, sample: Sample) -> None:
        self.say(sample_line(sample))

    def trial(self, trial: Trial, found: Measured, tuner: Search, eta: float) -> None:
        self.say(trial_line(trial, found, tuner, eta))


class LiveTuneView(LiveLines, PlainTuneView):
    """One live line, drawn by rich."""

    def trial(self, trial: Trial, found: Measured, tuner: Search, eta: float) -> None:
        share = tuner.done / tuner.expected()
        self.draw(bar("", _BAR, share, trial_line(trial, found, tuner, eta)))


def make_tune_view(quiet: bool) -> TuneView:
    if quiet:
        return TuneView()
    return LiveTuneView() if sys.stderr.isatty() else PlainTuneView()


def sample_line(sample: Sample) -> str:
    return (
        f"sample: {format_bytes(sample.data)} of data, {sample.share:.0%} of the source's, "
        f"{sample.zero_share:.0%} of its pages zero"
    )


def trial_line(trial: Trial, found: Measured, tuner: Search, eta: float) -> str:
    line = f"trial {tuner.done} of about {tuner.expected()}: {trial.setting}: "
    line += format_rate(found.rate) if trial.counts else "warm"
    if tuner.next() is None:
        return line
    return f"{line}  ETA {format_seconds(eta)}"


# ---- the result ------------------------------------------------------------------------------


def tune_summary(report: dict[str, Any], *, fancy: bool) -> str:
    """All of it. `fancy`: for a terminal."""
    parts = [_table(report, fancy), _named(report), _charts(report)]
    return "\n\n".join(parts)


def _rows(report: dict[str, Any]) -> list[list[str]]:
    """The fastest settings, and all that are the best for something."""
    best: dict[str, list[str]] = {}
    for goal, row in report["best"].items():
        best.setdefault(_key(row), []).append(GOAL_WORDS[goal])
    settings = report["settings"]
    shown = [r for i, r in enumerate(settings) if i < _ROWS or _key(r) in best]
    return [_cells(row, ", ".join(best.get(_key(row), []))) for row in shown]


def _key(row: dict[str, Any]) -> str:
    return f"{row['workers']} {how(row)} {row['batch-pages']}"


def how(row: dict[str, Any]) -> str:
    """Codec and level."""
    return f"{row['codec']} {row['level']}" if "level" in row else str(row["codec"])


def _cells(row: dict[str, Any], best: str) -> list[str]:
    def number(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.2f}"

    return [
        str(row["workers"]), how(row), str(row["batch-pages"]), format_rate(row["rate"]),
        "-" if row["spread"] is None else f"{row['spread']:.0%}", number("cpu"),
        number("cpu-senders"), number("cpu-receivers"), number("wire-share"),
        "-" if row["downtime"] is None else f"{row['downtime']:.0f} ms", str(row["trials"]), best,
    ]  # fmt: skip


def _table(report: dict[str, Any], fancy: bool) -> str:
    rows = _rows(report)
    head = (
        f"{report['source']} to {report['destination']}: {report['trials']} trials of "
        f"{len(report['settings'])} settings in {format_seconds(report['time'] / 1000)}"
    )
    left = len(report["settings"]) - len(rows)
    tail = f"\n({left} slower ones: --json)" if left else ""
    return f"{head}\n\n{_rich(rows) if fancy else _plain(rows)}{tail}"


def _plain(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [list(_HEADER), *rows]) for i in range(len(_HEADER))]
    lines = [list(_HEADER), ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(w) if i in (1, len(_HEADER) - 1) else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip


def _rich(rows: list[list[str]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(_HEADER):
        table.add_column(name, justify="left" if i in (1, len(_HEADER) - 1) else "right")
    for row in rows:
        table.add_row(*row, style="bold green" if row[-1] else "")
    out = io.StringIO()
    Console(file=out, force_terminal=True).print(table)
    return out.getvalue().rstrip("\n")


def _named(report: dict[str, Any]) -> str:
    lines = []
    for goal, row in report["best"].items():
        level = f" --level {row['level']}" if "level" in row else ""
        lines.append(
            f"best for {GOAL_WORDS[goal] + ':':<13}--workers {row['workers']} --codec "
            f"{row['codec']}{level} --batch-pages {row['batch-pages']}"
        )
    return "\n".join([*lines, "", textwrap.fill(report["bound"][FASTEST]["text"], 100)])


def _charts(report: dict[str, Any]) -> str:
    """The fastest setting for each value of each factor, as bars."""
    parts = []
    for factor, points in report["curves"].items():
        top = max(point["rate"] for point in points)
        width = max(len(point["value"]) for point in points)
        lines = [f"{factor}: GB/s of the fastest that has it, and CPU s/GB"]
        for point in points:
            bar = "█" * max(1, round(_BAR * point["rate"] / top))
            lines.append(
                f"  {point['value']:>{width}}  {bar:<{_BAR}}  {point['rate'] / 1e9:5.2f}  "
                f"{point['cpu']:5.2f}"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
