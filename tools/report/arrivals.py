"""Collects what pages about a receiver need: each migration by a recorder of its own, and all
together as a batch. A receiver may run for years: what ended long ago is forgotten.

Must not know how a migration arrives, nor what a page looks like.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from ...transport.errors import Cancelled, PageferryError
from .batch_recorder import BatchRecorder
from .recorder import Asked, Recorder

# Ended arrivals that are still shown.
_KEPT = 200
_PROGRESS_SECONDS = 0.25


class Greeting(Protocol):
    """What a source says of itself, as far as it is shown."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def uuid(self) -> str: ...


class Arriving(Asked, Protocol):
    """One migration that arrives."""

    on_progress: Callable[[dict[str, Any]], None] | None
    on_end: Callable[[dict[str, Any] | None, PageferryError | None], None] | None

    @property
    def hello(self) -> Greeting: ...


# An arrival that has ended: its recorder, its last report (with `error` if there was one), its
# name and uuid, which are the peer's choice.
OnEnd = Callable[[Recorder, dict[str, Any] | None, str, str], None]


class Arrivals:
    """All of one receiver. `into`: where they go, in words; `explain`: an error as reports have it;
    `on_end`: called for each when it has ended."""

    def __init__(
        self,
        title: str,
        into: str,
        explain: Callable[[PageferryError], dict[str, Any]],
        on_end: OnEnd | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.all = BatchRecorder(title, clock, _KEPT)
        self.last: Recorder | None = None  # the one that came last
        self.ended: dict[str, Any] | None = None  # and its report, if it is over
        self.outcomes: Counter[str] = Counter()
        self.bytes = 0  # of guest memory, of all that completed
        self._into = into
        self._explain = explain
        self._on_end = on_end
        self._clock = clock
        self._count = 0
        self._reports: dict[str, dict[str, Any]] = {}  # of those that run, by their row's name
        self._progressed = clock()
        self.all.on_progress(self.query())

    def arrived(self, arrival: Arriving) -> None:
        """Before it begins."""
        hello = arrival.hello
        name = hello.name or hello.kind
        self._count += 1
        row = f"{self._count}: {name}"  # the peer's choice may not be the only one of its name
        recorder = Recorder(name, self._into, {}, self._clock)
        recorder.on_started(arrival)
        self.last, self.ended = recorder, None
        if not self._reports:
            self._progress(now=True)  # until now nothing moved
        self._reports[row] = {}
        told = {"name": row, "source": name, "destination": "", "attempts": 1}
        self.all.on_item(told | {"event": "started", "state": "running"})
        others = arrival.on_progress

        def on_progress(report: dict[str, Any]) -> None:
            if others is not None:
                others(report)
            recorder.on_progress(report)
            self._reports[row] = report
            self._progress()

        def on_end(report: dict[str, Any] | None, error: PageferryError | None) -> None:
            # neither: it was stopped, or stopped when it had arrived
            if report is None and error is None and recorder.status != "completed":
                error = Cancelled("the receiver was stopped")
            self._end(row, told, recorder, report, error)
            if self._on_end is not None:
                self._on_end(recorder, self._final(report, error), name, hello.uuid)

        arrival.on_progress, arrival.on_end = on_progress, on_end

    def _final(
        self, report: dict[str, Any] | None, error: PageferryError | None
    ) -> dict[str, Any] | None:
        return report if error is None else self._explain(error)

    def _end(
        self,
        row: str,
        told: dict[str, Any],
        recorder: Recorder,
        report: dict[str, Any] | None,
        error: PageferryError | None,
    ) -> None:
        size = int((self._reports.pop(row).get("ram") or {}).get("total", 0))
        outcome = "completed" if error is None else "failed"
        if isinstance(error, Cancelled):
            outcome = "cancelled"
        self.outcomes[outcome] += 1
        self.bytes += size if error is None else 0
        event = told | {"event": outcome, "state": outcome, "size": size}
        if error is not None:
            event["error"] = {"message": error.message}
        self.all.on_item(event)
        if recorder is self.last:
            self.ended = self._final(report, error) or {"status": "completed"}
        self._progress(now=True)

    def _progress(self, *, now: bool = False) -> None:
        time_ = self._clock()
        if now or time_ - self._progressed >= _PROGRESS_SECONDS:
            self._progressed = time_
            self.all.on_progress(self.query())

    @property
    def running(self) -> list[dict[str, Any]]:
        """The last report of each that is arriving."""
        return [report for report in self._reports.values() if report]

    def query(self) -> dict[str, Any]:
        """All together, by the names of a batch."""
        parts = [report.get("progress", {}) for report in self.running]
        arrived = sum(
            max(0, r["ram"]["total"] - r["ram"]["remaining"])
            for r in self.running
            if r["ram"]["dirty-sync-count"]
        )
        return {
            "status": "active",
            "total": self._count,
            **{name: self.outcomes[name] for name in ("completed", "failed", "cancelled")},
            "running": len(self._reports),
            "bytes-done": self.bytes + arrived,
            "rate": sum(part.get("rate", 0) for part in parts),
            "items": [
                {"name": row, "migration": report or None} for row, report in self._reports.items()
            ],
        }
