"""What a person sees: one live line a phase, then a summary. Plain lines without a terminal.

Reads reports (query-migrate's names); knows nothing of how they come about.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ...transport.quantities import format_bytes, format_rate, format_seconds
from .display import Display, LiveLines, PlainLines, bar

_BAR = 24
# Without a terminal: a line when the phase changes, and at most this often in between.
_PLAIN_SECONDS = 2.0


def phase_of(report: dict[str, Any]) -> str:
    """What is going on, in a few words."""
    match report["status"]:
        case "none" | "setup":
            return "setting up"
        case "active":
            return f"round {max(1, report['ram']['dirty-sync-count'])}"
        case "device":
            return "switchover"
        case "postcopy-active":
            return "postcopy"
        case "postcopy-paused":
            return "paused"
        case "postcopy-recover":
            return "recovering"
        case other:
            return str(other)


def phase_line(report: dict[str, Any]) -> str:
    """Bytes, rate, dirty rate, ETA of the phase."""
    ram, progress = report["ram"], report.get("progress", {})
    parts = []
    if report["status"] == "postcopy-paused":
        parts.append(f"{format_bytes(ram['remaining'])} still to come")
        if "paused-because" in report:
            parts.append(str(report["paused-because"]))
        parts.append("`pageferry recover` goes on")
    elif report["status"] in ("active", "device", "postcopy-active"):
        parts.append(f"{format_bytes(ram['remaining'])} left of {format_bytes(ram['total'])}")
        parts.append(format_rate(progress.get("rate", 0)))
        if progress.get("dirty-rate"):
            parts.append(f"guest writes {format_rate(progress['dirty-rate'])}")
        if "cpu-throttle-percentage" in report:
            parts.append(f"slowed down by {report['cpu-throttle-percentage']} %")
        eta = progress.get("eta")
        if eta is not None:
            parts.append(f"ETA {format_seconds(eta)}")
        elif progress.get("dirty-rate"):
            parts.append("no ETA: the guest writes faster than its memory moves")
    else:
        parts.append(format_seconds(report["total-time"] / 1000))
    return "  ".join(parts)


class View(Display):
    """Shows nothing: --quiet."""

    def __call__(self, report: dict[str, Any]) -> None:
        pass


class PlainView(PlainLines, View):
    """Lines on stderr, for logs."""

    def __init__(self) -> None:
        self._phase = ""
        self._last = 0.0

    def __call__(self, report: dict[str, Any]) -> None:
        phase, now = phase_of(report), time.monotonic()
        if phase == self._phase and now - self._last < _PLAIN_SECONDS:
            return
        self._phase, self._last = phase, now
        self.say(f"{phase}: {phase_line(report)}")


class LiveView(LiveLines, View):
    """One live line a phase, drawn by rich; a phase that is over keeps its last line."""

    def __init__(self) -> None:
        super().__init__()
        self._phase = ""
        self._line: Any = None
        self._line_text = ""
        self._size = 0
        self._begin = 0.0

    def __exit__(self, *rest: Any) -> None:
        self._finish_phase()
        super().__exit__(*rest)

    def _finish_phase(self) -> None:
        if self._line is not None:
            self._console.print(self._draw(1.0, self._finished_text()))
            self._line = None

    def _finished_text(self) -> str:
        seconds, size = time.monotonic() - self._begin, self._size
        if self._phase in ("completed", "failed", "cancelled") or not size:
            return self._line_text
        text = f"{format_bytes(size)} in {format_seconds(seconds)}"
        return f"{text}  {format_rate(size / max(seconds, 1e-3))}"

    def _draw(self, share: float, text: str) -> Any:
        return bar(f"{self._phase:<12}", _BAR, share, text)

    def __call__(self, report: dict[str, Any]) -> None:
        phase = phase_of(report)
        if phase != self._phase:
            self._finish_phase()
            self._phase, self._begin = phase, time.monotonic()
        self._size = report.get("progress", {}).get("round-bytes", 0)
        share = 1.0 if not self._size else 1 - report["ram"]["remaining"] / self._size
        self._line_text = phase_line(report)
        self._line = self._draw(share, self._line_text)
        self.draw(self._line)


def make_view(quiet: bool) -> View:
    if quiet:
        return View()
    return LiveView() if sys.stderr.isatty() else PlainView()


def summary(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    ram = report["ram"]
    seconds = report["total-time"] / 1000
    rows = [
        ("result", _verdict(report)),
        ("time", _times(report)),
        ("memory", f"{format_bytes(ram['total'])}, {ram['dirty-sync-count']} round(s), "
                   f"{ram['normal']} pages sent, {ram['duplicate']} zero"),
        ("wire", f"{format_bytes(report['wire-bytes'])}, "
                 f"{format_rate(report['wire-bytes'] / max(seconds, 1e-3))} on average"),
        ("codec", _codecs(report)),
        *_postcopy(report),
        ("processes", _processes(report)),
    ]  # fmt: skip
    if "goal" in report:
        rows.insert(4, ("goal", _goal(report)))
    if "throttle" in report or "throttle-because" in report:
        rows.insert(3, ("throttle", _throttle(report)))
    if report.get("dirty-tracking", "none") != "none":
        rows.insert(3, ("tracking", str(report["dirty-tracking"])))
    for name in ("destination", "source-process"):
        if report.get(name):
            rows.append((name, str(report[name])))
    return "\n".join(f"{name:<15}{text}" for name, text in rows)


def _goal(report: dict[str, Any]) -> str:
    level = f" {report['level']}" if "level" in report else ""
    tried = len(report["goal-choices"])
    return (
        f"{report['goal']}: {report['workers-active']} of {report['workers']} workers, "
        f"{report['codec']}{level}, after {tried} slices with another one"
    )


def _throttle(report: dict[str, Any]) -> str:
    """What the guest lost, and what that made of it."""
    if "throttle" not in report:
        return f"none: {report['throttle-because']}"
    slowed = report["throttle"]
    text = (
        f"by {slowed['by']}, for {format_seconds(slowed['time'] / 1000)}: "
        f"{slowed['mean-percentage']:.0f} % of its time on average, {slowed['max-percentage']} % "
        f"at the most"
    )
    if "slow-down" in slowed:
        text += f"; it did {slowed['slow-down']:.0f} % less"
    return text


def _verdict(report: dict[str, Any]) -> str:
    text = str(report["status"])
    if "verified" in report:
        text += ", verified"
    if "oracle" in report:
        oracle = report["oracle"]
        text += (
            f", oracle: {oracle['pages'] - oracle['wrong-pages']} of {oracle['pages']} pages right"
        )
    return text


def _times(report: dict[str, Any]) -> str:
    text = format_seconds(report["total-time"] / 1000)
    if "setup-time" in report:
        text += f", of which setup {format_seconds(report['setup-time'] / 1000)}"
    if "downtime" in report:
        text += f", downtime {format_seconds(report['downtime'] / 1000)}"
        if "downtime-limit" in report:  # only the source knows it
            text += f" (limit {format_seconds(report['downtime-limit'] / 1000)})"
    return text


def _postcopy(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows that only a postcopy has."""
    if "postcopy-requests" not in report:
        return []
    rows = [(
        "postcopy",
        f"{report['postcopy-requests']} requests, {report['postcopy-pages']} pages ahead of the "
        f"background, {report['postcopy-priority']}",
    )]  # fmt: skip
    if "postcopy-latency-percentiles" in report:
        p = report["postcopy-latency-percentiles"]
        rows.append((
            "fault latency",
            f"mean {report['postcopy-latency'] / 1000:.0f} us, p50 {p['p50']:.0f}, "
            f"p90 {p['p90']:.0f}, p99 {p['p99']:.0f}, max {p['max']:.0f}",
        ))  # fmt: skip
    if report.get("recoveries"):
        rows.append(("recoveries", str(report["recoveries"])))
    return rows


def _codecs(report: dict[str, Any]) -> str:
    used = {name: n for name, n in report["codec-pages"].items() if n}
    return ", ".join(f"{name}: {n} pages" for name, n in used.items()) or "nothing but zeros"


def _processes(report: dict[str, Any]) -> str:
    processes = report.get("processes", [])
    cpu = sum(process["cpu-time"] for process in processes) / 1000
    peak = max((process["peak-memory"] for process in processes), default=0)
    return f"{len(processes)}, {cpu:.2f} s of CPU in all, {format_bytes(peak)} the largest"
