"""Collects what a page about a batch needs: what became of each item, when, and how fast it went.

Fed by a batch's on_item and on_progress; what it shows of thousands of items is bounded, and costs
what is shown. Must not know how a batch is done, nor what the page looks like.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from .record import Attempt, BatchRecord, ItemRow, Sample
from .recorder import Ends, Samples, host_facts
from .sections import phase

# Rows of a page that is written at the end, and of one that is drawn anew twice a second.
MOST_ROWS, LIVE_ROWS = 2000, 100
LIVE_ATTEMPTS = 200
# Of the attempts, so many of the first and of the last.
_KEPT_ATTEMPTS = 1000
_ENDED = ("completed", "failed", "cancelled")
_ORDER = ("running", "failed", "waiting", "cancelled", "pending", "completed")


class BatchRecorder:
    """One batch. `clock`: seconds, monotonic. `keep`: items that ended so or so, at most so many of
    each; None: all."""

    def __init__(
        self,
        title: str,
        clock: Callable[[], float] = time.monotonic,
        keep: int | None = None,
    ) -> None:
        self.title = title
        self._keep = keep
        self._clock = clock
        self._began = clock()
        self._rows: dict[str, dict[str, ItemRow]] = {state: {} for state in _ORDER}
        self._states: dict[str, str] = {}
        self._running: dict[str, Attempt] = {}
        self._attempts: Ends[Attempt] = Ends(_KEPT_ATTEMPTS)
        self._samples = Samples()
        self._query: dict[str, Any] = {}

    def begin(self, items: list[dict[str, Any]]) -> None:
        """Now it begins; what there is then, as a batch's report tells it."""
        self._began = self._clock()
        for item in items:
            self._put(self._row(item, int((item.get("report") or {}).get("memory-bytes", 0))))

    def on_item(self, event: dict[str, Any]) -> None:
        """Something became of an item."""
        name, now = event["name"], self._now()
        if event["event"] == "started":
            taken = {attempt.lane for attempt in self._running.values()}
            lane = next(i for i in range(len(taken) + 1) if i not in taken)
            self._running[name] = Attempt(name, lane, now, now, "running")
            self._put(self._row(event, event.get("size", 0)))
            return
        row = self._row(event, event.get("size", 0))
        if (begun := self._running.pop(name, None)) is not None:
            self._attempts.add(replace(begun, end=now, outcome=event["event"]))
            row = replace(row, took=now - begun.begin)
        self._put(row)

    def on_progress(self, query: dict[str, Any]) -> None:
        """How it goes, four times a second at most."""
        self._query = query
        wire = sum(_progress(item).get("wire-rate", 0) for item in query["items"])
        self._samples.add(Sample(self._now(), query["rate"], wire, 0.0))

    def _now(self) -> float:
        return max(0.0, self._clock() - self._began)

    @staticmethod
    def _row(told: dict[str, Any], size: int) -> ItemRow:
        return ItemRow(
            told["name"], told["source"], told["destination"], told["state"], told["attempts"],
            size=size, error=str((told.get("error") or {}).get("message", "")),
        )  # fmt: skip

    def _put(self, row: ItemRow) -> None:
        if (state := self._states.get(row.name)) is not None:
            del self._rows[state][row.name]
        state = row.state if row.state in self._rows else "pending"
        self._rows[state][row.name] = row
        self._states[row.name] = state
        if self._keep is not None and len(self._rows[state]) > self._keep and state in _ENDED:
            oldest = next(iter(self._rows[state]))
            del self._rows[state][oldest], self._states[oldest]

    def _chosen(self, most: int) -> Iterator[ItemRow]:
        """Those that run, then failures, last the completed ones, the latest first."""
        moving = {item["name"]: item for item in self._query.get("items", ())}
        now = self._now()

        def ordered(state: str) -> Iterator[ItemRow]:
            rows = self._rows[state].values()
            return reversed(rows) if state == "completed" else iter(rows)

        for row in islice(chain.from_iterable(ordered(state) for state in _ORDER), most):
            begun = self._running.get(row.name)
            if begun is None:
                yield row
                continue
            yield _moving(replace(row, took=now - begun.begin), moving.get(row.name, {}))

    def so_far(self) -> BatchRecord:
        """How it is now; nothing is changed by it."""
        return self._record(self._query, LIVE_ROWS, self._samples.few(), LIVE_ATTEMPTS)

    def record(self, report: dict[str, Any] | None) -> BatchRecord:
        """All of it, when it is over; `report` is the final one."""
        totals = {k: v for k, v in self._query.items() if k not in ("rate", "eta", "items")}
        return self._record(totals | (report or {}), MOST_ROWS, tuple(self._samples.kept))

    def _record(
        self,
        report: dict[str, Any],
        most: int,
        samples: tuple[Sample, ...],
        most_attempts: int = 2 * _KEPT_ATTEMPTS,
    ) -> BatchRecord:
        now = self._now()
        attempts = self._attempts.items()
        shown = attempts[-most_attempts:]
        left_out = self._attempts.left_out + len(attempts) - len(shown)
        items = tuple(self._chosen(most))
        running = [replace(attempt, end=now) for attempt in self._running.values()]
        return BatchRecord(
            self.title, now, report, host_facts(), items, len(self._states) - len(items),
            (*shown, *running), left_out, samples,
        )  # fmt: skip


def _progress(item: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (item.get("migration") or {}).get("progress", {})
    return found


def _moving(row: ItemRow, item: dict[str, Any]) -> ItemRow:
    """`row`, with what its migration says."""
    report = item.get("migration")
    if report is None:
        return replace(row, phase="setup")
    ram = report["ram"]
    done = max(0, ram["total"] - ram["remaining"]) if ram["dirty-sync-count"] else 0
    return replace(
        row, phase=phase(report).removeprefix("precopy, "), done=done,
        size=ram["total"] or row.size, rate=_progress(item).get("rate"),
    )  # fmt: skip
