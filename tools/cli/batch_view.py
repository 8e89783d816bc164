"""What a person sees of a batch: a live line for each item that runs and one of totals, or plain
lines without a terminal; the summary, failures first; and the table of `batch status`.

Reads what a batch tells; knows nothing of how it comes about.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from ...transport.quantities import format_bytes, format_rate, format_seconds
from .display import Display, LiveLines, PlainLines, bar
from .view import phase_line, phase_of

_BAR = 16
# More items than this have no line of their own.
_MOST_LINES = 16
_PLAIN_SECONDS = 2.0
_NAME = 24


def event_line(event: dict[str, Any]) -> str:
    """What became of an item, in a line."""
    name = event["name"]
    match event["event"]:
        case "started":
            again = f" again (attempt {event['attempts']})" if event["attempts"] > 1 else ""
            return f"{name}: started{again}"
        case "completed":
            report = event["report"]
            seconds = format_seconds(report["total-time"] / 1000)
            return f"{name}: completed, {format_bytes(report['memory-bytes'])} in {seconds}"
        case "failed":
            text = f"{name}: failed: {event['error']['message']}"
            if "again-in" in event:
                text += f"; tried again in {format_seconds(event['again-in'])}"
            return text
        case other:
            return f"{name}: {other}"


def totals_line(query: dict[str, Any]) -> str:
    """Items by state, bytes, rate, ETA."""
    parts = [f"{query['completed']} of {query['total']} completed"]
    parts += [
        f"{query[state]} {state}"
        for state in ("failed", "running", "waiting", "pending")
        if query[state]
    ]
    text = ", ".join(parts)
    if query["bytes"]:
        text += f"  {format_bytes(query['bytes-done'])} of {format_bytes(query['bytes'])}"
    text += f"  {format_rate(query['rate'])}"
    return text if query["eta"] is None else f"{text}  ETA {format_seconds(query['eta'])}"


class BatchView(Display):
    """Shows nothing: --quiet."""

    def item(self, event: dict[str, Any]) -> None:
        """Something became of an item."""

    def progress(self, query: dict[str, Any]) -> None:
        """How it goes."""


class PlainBatchView(PlainLines, BatchView):
    """Lines on stderr, for logs."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def item(self, event: dict[str, Any]) -> None:
        self.say(event_line(event))

    def progress(self, query: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last >= _PLAIN_SECONDS:
            self._last = now
            self.say(totals_line(query))


class LiveBatchView(LiveLines, BatchView):
    """Lines that are drawn anew, by rich. What has failed stays above them."""

    def item(self, event: dict[str, Any]) -> None:
        if event["event"] == "failed":
            self.say(event_line(event))

    def progress(self, query: dict[str, Any]) -> None:
        from rich.console import Group
        from rich.text import Text

        lines = [self._line(item) for item in query["items"][:_MOST_LINES]]
        if len(query["items"]) > _MOST_LINES:
            lines.append(Text(f"… and {len(query['items']) - _MOST_LINES} more"))
        total = Text(totals_line(query), "bold", overflow="ellipsis", no_wrap=True)
        self.draw(Group(*lines, total))

    def _line(self, item: dict[str, Any]) -> Any:
        report = item["migration"]
        share, phase, text = 0.0, "setting up", ""
        if report is not None:
            size = report.get("progress", {}).get("round-bytes", 0)
            share = 1 - report["ram"]["remaining"] / size if size else 0.0
            phase, text = phase_of(report), phase_line(report)
        return bar(f"{_short(item['name']):<{_NAME}} {phase:<11}", _BAR, share, text)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def make_batch_view(quiet: bool) -> BatchView:
    if quiet:
        return BatchView()
    return LiveBatchView() if sys.stderr.isatty() else PlainBatchView()


def batch_summary(report: dict[str, Any]) -> str:
    """A batch's report as a person reads it: what failed first."""
    lines = [
        f"{item['name']}: failed after {_times(item['attempts'])}: {item['error']['message']}"
        for item in report["items"]
        if item["state"] == "failed"
    ]
    counts = [f"{report['completed']} of {report['total']} completed"]
    counts += [
        f"{report[state]} {state}"
        for state in ("failed", "waiting", "pending", "running")
        if report[state]
    ]
    rows = [
        ("result", f"{report['status']}: {', '.join(counts)}"),
        ("time", format_seconds(report["total-time"] / 1000)),
        ("memory", f"{format_bytes(report['bytes'])}, {format_bytes(report['wire-bytes'])} "
                   f"on the wire"),
        ("state", report["state-file"]),
    ]  # fmt: skip
    return "\n".join([*lines, *(f"{name:<15}{text}" for name, text in rows)])


def _times(count: int) -> str:
    return "one attempt" if count == 1 else f"{count} attempts"


def status_table(rows: Iterable[dict[str, Any]]) -> str:
    """A line an item, for people."""
    table = [("item", "state", "attempts", "size", "time", "destination", "")]
    for row in rows:
        report = row.get("report", {})
        size, seconds = report.get("memory-bytes"), report.get("total-time")
        table.append((
            row["name"],
            row["state"],
            str(row["attempts"]),
            "" if size is None else format_bytes(size),
            "" if seconds is None else format_seconds(seconds / 1000),
            row["destination"],
            row.get("error", {}).get("message", ""),
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    return "\n".join(
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=False)), line[6]])
        .rstrip()
        for line in table
    )  # fmt: skip
