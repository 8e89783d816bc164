"""Collects what a page needs while a migration runs: looks, changes of state, rounds.

Fed by on_started, on_progress and events; memory is bounded however long it takes. Must not know
how a migration is done, nor what the page looks like.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from ..._version import __version__
from .record import Phase, Record, Round, Sample, Use

# Four a second: eight minutes until every second one goes.
MOST_SAMPLES = 2000
# Of the rounds and of the changes of state, so many of the first and of the last are kept.
KEPT_AT_AN_END = 200
_FINAL = ("completed", "failed", "cancelled", "over")
# What a live page draws a line through: a screen has no more columns to show.
LIVE_POINTS = 240
_USE_SECONDS = 2.0

T = TypeVar("T")


class Asked(Protocol):
    """What is needed of a migration."""

    on_event: Callable[[str, dict[str, Any]], None]

    def query(self) -> dict[str, Any]: ...
    def query_parameters(self) -> dict[str, Any]: ...
    def query_processes(self) -> list[dict[str, Any]]: ...


class Ends(Generic[T]):
    """The first and the last of what is added, and how many in the middle were left out."""

    def __init__(self, kept: int = KEPT_AT_AN_END) -> None:
        self._kept = kept
        self._first: list[T] = []
        self._last: deque[T] = deque(maxlen=kept)
        self._added = 0

    def add(self, item: T) -> None:
        self._added += 1
        if len(self._first) < self._kept:
            self._first.append(item)
        else:
            self._last.append(item)

    def items(self) -> list[T]:
        return [*self._first, *self._last]

    @property
    def left_out(self) -> int:
        return self._added - len(self._first) - len(self._last)


class Samples:
    """Looks, evenly spread however many there are."""

    def __init__(self) -> None:
        self.kept: list[Sample] = []
        self._stride = 1
        self._skipped = 0

    def add(self, sample: Sample) -> None:
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        self.kept.append(sample)
        if len(self.kept) >= MOST_SAMPLES:
            del self.kept[1::2]
            self._stride *= 2

    def few(self) -> tuple[Sample, ...]:
        """At most LIVE_POINTS of them, the last one among them."""
        stride = -(-len(self.kept) // LIVE_POINTS) or 1
        return tuple(self.kept[::-1][::stride][::-1])


class Recorder:
    """One migration. `clock`: seconds, monotonic."""

    def __init__(
        self,
        source: str,
        destination: str,
        settings: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._destination = destination
        self._settings = settings
        self._clock = clock
        self._began = clock()
        self._migration: Asked | None = None
        self._last: dict[str, Any] = {}
        self._samples = Samples()
        self._looked = False
        self._phases: Ends[Phase] = Ends()
        self._phase: Phase | None = None
        self._rounds: Ends[Round] = Ends()
        self._costs: deque[tuple[float, dict[str, dict[str, Any]]]] = deque(maxlen=64)
        self._round: tuple[Round, int] | None = None  # with the bytes sent before it

    def on_started(self, migration: Asked) -> None:
        """Before anything moves. Whoever listens to its events already goes on to do so."""
        # its own clock began when it was made, just now; a query would begin its window of rates
        self._began = self._clock()
        self._migration = migration
        others = migration.on_event

        def on_event(name: str, data: dict[str, Any]) -> None:
            others(name, data)
            self.on_event(name, data)

        migration.on_event = on_event

    def on_progress(self, report: dict[str, Any]) -> None:
        """A report, four times a second. One that comes after the end says no rate."""
        self._last = report
        progress = report.get("progress")
        if progress is None or report["status"] in _FINAL:
            return
        if not self._looked:  # a rate is between two looks
            self._looked = True
            return
        dirty = progress.get("dirty-rate", 0)  # a restore has none
        self._samples.add(Sample(self._now(), progress["rate"], progress["wire-rate"], dirty))

    def on_event(self, name: str, data: dict[str, Any]) -> None:
        """What the monitor's clients are told."""
        if name == "MIGRATION":
            self._status(str(data["status"]))
        elif name == "MIGRATION_PASS" and self._migration is not None:
            self._pass(int(data["pass"]), self._migration.query())

    def _now(self) -> float:
        return max(0.0, self._clock() - self._began)

    def _status(self, status: str) -> None:
        now = self._now()
        if self._phase is not None:
            self._phases.add(replace(self._phase, end=now))
        self._phase = Phase(status, now, now)
        if self._round is not None and self._migration is not None:
            # a switchover has a round of its own; the look costs it a quarter of a millisecond
            self._end_round(now, int(self._migration.query()["wire-bytes"]))

    def _pass(self, number: int, report: dict[str, Any]) -> None:
        now, wire = self._now(), int(report["wire-bytes"])
        self._end_round(now, wire)
        self._last, self._looked = report, True
        stopped = self._phase is not None and self._phase.status != "active"
        progress = report["progress"]
        begun = Round(
            number, now, now, progress["round-bytes"] // report["ram"]["page-size"], 0,
            progress.get("dirty-rate", 0), stopped,
        )  # fmt: skip
        self._round = begun, wire

    def _end_round(self, now: float, wire: int) -> None:
        if self._round is not None:
            begun, before = self._round
            self._rounds.add(replace(begun, end=now, wire_bytes=max(0, wire - before)))
            self._round = None

    @property
    def status(self) -> str:
        """The last that was told."""
        return self._phase.status if self._phase is not None else "none"

    def so_far(self) -> Record:
        """How it is now; nothing is changed by it."""
        now, report = self._now(), self._last
        uses: tuple[Use, ...] = ()
        phases, rounds, settings = self._phases.items(), self._rounds.items(), self._settings
        if self._phase is not None and self._phase.status not in _FINAL:
            phases.append(replace(self._phase, end=now))
        if self._migration is not None:
            report = self._migration.query()
            settings = self._migration.query_parameters()
            uses = self._uses(now, self._migration.query_processes())
        if self._round is not None:
            begun, before = self._round
            wire = max(0, int(report.get("wire-bytes", 0)) - before)
            rounds.append(replace(begun, end=now, wire_bytes=wire))
        return Record(
            self._source, self._destination, report, settings, host_facts(), self._samples.few(),
            tuple(phases), tuple(rounds), self._rounds.left_out, uses,
        )  # fmt: skip

    def _uses(self, now: float, processes: list[dict[str, Any]]) -> tuple[Use, ...]:
        """Shares between the oldest look that is not older than two seconds, and this one."""
        while len(self._costs) > 1 and now - self._costs[0][0] > _USE_SECONDS:
            self._costs.popleft()
        then, before = self._costs[0] if self._costs else (now, {})
        self._costs.append((now, {p["name"]: p for p in processes}))

        def part(process: dict[str, Any], name: str) -> float | None:
            old = before.get(process["name"], {})
            if name not in process or name not in old or now - then < 0.1:
                return None
            spent: float = process[name] - old[name]
            return max(0.0, spent) / 1000 / (now - then)

        return tuple(
            Use(
                p["name"], part(p, "cpu-time"), part(p, "wait-time"), part(p, "codec-time"),
                p["cpu-time"] / 1000, p["peak-memory"],
            )
            for p in processes
        )  # fmt: skip

    def record(self, report: dict[str, Any] | None) -> Record:
        """All of it, when it is over; `report` is the final one."""
        now = self._now()
        final = {k: v for k, v in self._last.items() if k != "progress"} | (report or {})
        if self._phase is not None and self._phase.status not in _FINAL:
            self._status("over")
        self._end_round(now, int(final.get("wire-bytes", 0)))
        if self._migration is not None:
            self._settings = self._migration.query_parameters()
        return Record(
            self._source, self._destination, final, dict(self._settings), host_facts(),
            tuple(self._samples.kept), tuple(self._phases.items()), tuple(self._rounds.items()),
            self._rounds.left_out,
        )  # fmt: skip


def host_facts() -> dict[str, str]:
    """What measurements depend on; not whose host it is."""
    return {
        "pageferry": __version__,
        "Python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "CPUs": str(len(os.sched_getaffinity(0))),
    }
