"""Carries out a batch: starts what the planner says, gives each migration its share of the
bandwidth, and writes down what becomes of it before it tells anybody.

Each item is a task of its own with a migration as any other; whatever it dies of is its own
outcome. Knows nothing of terminals, files of manifests and SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..transport.errors import (
    BatchFailed,
    BatchPartial,
    Cancelled,
    ConfirmationLost,
    HostLacks,
    LocalProtocolError,
    PageferryError,
    PeerLost,
    PeerRefused,
    PostcopyFailed,
    SourceError,
    UsageError,
    VerificationFailed,
    as_ours,
)
from ..transport.links import parse_endpoint
from ..workers.content import ContentIndex
from ..workers.guests import parse_guest
from ..workers.reserve import Reserve
from ..workers.sampling import sample
from . import api
from .batch_state import BatchState, Row
from .blocking import MayHang, to_its_end
from .callbacks import tell
from .destination import Destination
from .families import Families
from .fleet import Elsewhere, Fleet
from .journal import name_item
from .manifest import Item, task
from .parameters import Parameters, default_workers
from .planner import ENDED, Planner, State
from .source import Source
from .state import Status

# Of each item's migration, what is kept.
_KEPT = (
    "total-time", "setup-time", "downtime", "wire-bytes", "destination", "verified",
    "pages-already-there", "source-host",
)  # fmt: skip
# Trying again does not help, or is not ours to decide: the guest may run at its destination.
_FINAL = (
    UsageError, SourceError, HostLacks, PeerRefused, LocalProtocolError, ConfirmationLost,
    PostcopyFailed,
)  # fmt: skip
_PROGRESS_SECONDS = 0.25
# A look at an image that takes longer says nothing of it, nor is another looked at meanwhile.
_SAMPLE_SECONDS = 5.0

_log = logging.getLogger("pageferry.batch")


def is_busy(error: PageferryError) -> bool:
    """The destination has no room just now; nothing is wrong with the item."""
    return isinstance(error, PeerRefused) and error.data.get("field") == "busy"


def worth_another_try(error: PageferryError) -> bool:
    """It may go better next time."""
    return is_busy(error) or not isinstance(error, _FINAL)


def no_fleet(item: Item) -> UsageError:
    """What becomes of an item at another host, if nobody said how to reach it."""
    return UsageError(
        f"item {item.name!r} has its source at the host {' or '.join(item.hosts)}: say --fleet "
        f"tcp://SCHEDULER:8786, or leave `host` out if it is here"
    )


class _Entry:
    """An item and what this process knows of it. `size`: bytes, 0 if that is not known before;
    `rate`: the limit that its migration has, as the planner's shares."""

    def __init__(self, row: Row) -> None:
        self.item: Item = row.item
        self.state = row.state
        self.attempts = row.attempts
        self.failures = row.failures
        self.error = row.error
        self.report = row.report
        self.size = (row.report or {}).get("memory-bytes") or _size(row.item)
        self.rate = 0
        self.progress: dict[str, Any] | None = None
        self.migration: Source | Elsewhere | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def done(self) -> int:
        """Bytes of it that have arrived, about, while it runs."""
        if self.state is not State.RUNNING or self.progress is None:
            return 0
        ram = self.progress["ram"]
        return max(0, ram["total"] - ram["remaining"]) if ram["dirty-sync-count"] else 0

    def told(self) -> dict[str, Any]:
        """For people and programs."""
        told: dict[str, Any] = {
            "name": self.item.name,
            "source": self.item.source,
            "destination": self.item.destination,
            "state": self.state.value,
            "attempts": self.attempts,
        }
        if self.error is not None and self.state is not State.COMPLETED:
            told["error"] = self.error
        return told if self.report is None else told | {"report": self.report}


def _size(item: Item) -> int:
    with contextlib.suppress(OSError):
        if item.guest.kind == "image" and not item.hosts:
            return os.stat(item.guest.rest).st_size
    return 0


class Batch:
    """One batch, from what its state says to its end. `on_item(event)`: something became of an
    item; `on_progress(query)`: four times a second at most. Both are called in the event loop."""

    def __init__(
        self,
        state: BatchState,
        on_item: Callable[[dict[str, Any]], None] | None = None,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.state = state
        self.on_item = on_item
        self.on_progress = on_progress
        self.policy = state.policy
        rows = state.rows()
        self._entries = {row.number: _Entry(row) for row in rows}
        self._planner = Planner(
            [task(r.number, r.item, r.failures) for r in rows if r.state not in ENDED],
            self.policy.limits(),
        )
        self._workers = Reserve(self._most_workers())
        self._contents: dict[str, ContentIndex] = {}  # of directories here
        self._families = Families()
        self._look = MayHang(_SAMPLE_SECONDS)
        self._sampling: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._fatal: BaseException | None = None
        self._fleet: Fleet | None = None
        self._asked = False
        self._begun = self._progressed = time.monotonic()
        # Kept up to date by `_count`, for `query` is asked often and there may be many items.
        self._states: Counter[State] = Counter()
        self._bytes = self._arrived = self._unknown = 0
        for entry in self._entries.values():
            self._count(entry, 1)

    def __len__(self) -> int:
        """How many items it has, whatever has become of them."""
        return len(self._entries)

    def _count(self, entry: _Entry, sign: int) -> None:
        """Take an entry out of the sums, or put it in."""
        self._states[entry.state] += sign
        if entry.state is not State.FAILED:
            self._bytes += sign * entry.size
        if entry.state is State.COMPLETED:
            self._arrived += sign * entry.size
        elif entry.state not in ENDED and not entry.size:
            self._unknown += sign

    def _become(self, entry: _Entry, state: State, size: int | None = None) -> None:
        """The only place where an entry's state changes."""
        self._count(entry, -1)
        entry.state = state
        entry.size = entry.size if size is None else size
        self._count(entry, 1)

    def use(self, fleet: Fleet) -> None:
        """Where the items are whose source is at another host."""
        self._fleet = fleet
        fleet.on_lost = self._fleet_lost
        waiting = (e.item for e in self._entries.values() if e.state not in ENDED)
        fleet.share(waiting, self.policy.parallel)

    def _fleet_lost(self, error: PageferryError) -> None:
        resume = f"`pageferry batch resume --state {self.state.path} --fleet tcp://…` goes on"
        self._fatal = PeerLost(f"{error}; {resume}")
        self._wake.set()

    # ---- what others may ask, at any time ------------------------------------------------

    def query(self) -> dict[str, Any]:
        """How it goes: numbers of items by state, and those that run. Sizes in bytes, rates in
        bytes a second, `eta` in seconds (None: not known)."""
        running = [self._entries[number] for number in self._planner.running]
        rate = sum(_progress(entry).get("rate", 0) for entry in running)
        done = self._arrived + sum(entry.done for entry in running)
        left = max(0, self._bytes - done)
        return {
            "status": "cancelling" if self._asked else "active",
            "total": len(self._entries),
            **{state.value: self._states[state] for state in State},
            "bytes": self._bytes,
            "bytes-done": done,
            "rate": rate,
            "eta": round(left / rate, 1) if rate and not self._unknown else None,
            "items": [
                entry.told() | {"limit": entry.rate, "migration": entry.progress}
                for entry in running
            ],
        }

    def report(self) -> dict[str, Any]:
        """What has become of it, failures first. Times in milliseconds."""
        entries = list(self._entries.values())
        states = Counter(entry.state for entry in entries)
        order = [State.FAILED, *(s for s in State if s not in (State.FAILED, State.COMPLETED))]
        rank = {state: place for place, state in enumerate([*order, State.COMPLETED])}
        return {
            "status": verdict(states),
            "total": len(entries),
            **{state.value: states[state] for state in State},
            "total-time": round((time.monotonic() - self._begun) * 1000),
            "bytes": sum(entry.size for entry in entries if entry.state is State.COMPLETED),
            "wire-bytes": sum(
                entry.report.get("wire-bytes", 0) for entry in entries if entry.report
            ),
            "worker-processes": self._workers.started,
            "state-file": os.path.abspath(self.state.path),
            "items": [e.told() for e in sorted(entries, key=lambda e: rank[e.state])],
        }

    def cancel(self) -> None:
        """Start nothing more, and cancel what runs; `run` ends with Cancelled, and everything that
        has not ended can be taken up again."""
        self._asked = True
        self._planner.cancel()
        for number in self._planner.running:
            entry = self._entries[number]
            if entry.migration is not None:
                entry.migration.cancel()
            elif entry.task is not None:
                entry.task.cancel()
        self._wake.set()

    # ---- the run -------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Run it to its end. Returns the report; BatchPartial, BatchFailed or Cancelled have it in
        their data. An error of the state's file ends the batch, with that error."""
        try:
            while True:
                now = time.monotonic()
                started = self._planner.start(now)
                self._share()  # first the others have less, then there is one more
                for number in started:
                    self._spawn(number)
                self._look_for_relatives()
                if self._fatal is not None:
                    raise self._fatal
                # the planner knows the end of an item before the state's file does
                if self._planner.over and not any(e.task for e in self._entries.values()):
                    break
                due = self._planner.next_time()
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(
                        self._wake.wait(), None if due is None else max(0.0, due - now)
                    )
        except BaseException:
            await to_its_end(self._abandon())
            raise
        finally:
            if self._sampling is not None:
                self._sampling.cancel()
            await to_its_end(asyncio.to_thread(self._workers.close))
        return self._judged()

    def _judged(self) -> dict[str, Any]:
        report = self.report()
        resume = f"pageferry batch resume --state {self.state.path}"
        match report["status"]:
            case "completed":
                return report
            case "partial" | "failed" as status:
                cls = BatchFailed if status == "failed" else BatchPartial
                raise cls(
                    f"{report['failed']} of {report['total']} items failed; "
                    f"`{resume} --retry-failed` tries them again",
                    report=report,
                )
            case _:
                raise Cancelled(
                    f"interrupted with {report['completed']} of {report['total']} items completed; "
                    f"`{resume}` goes on",
                    report=report | {"status": "cancelled"},
                )

    async def _abandon(self) -> None:
        """Every item's task to its end."""
        self._planner.cancel()
        tasks = [e.task for e in self._entries.values() if e.task is not None]
        for running in tasks:
            running.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look_for_relatives(self) -> None:
        """Have the planner's questions answered, if they are not just being answered."""
        if not self._planner.asked or self._sampling is not None:
            return
        self._sampling = asyncio.get_running_loop().create_task(self._sample())

        def done(ended: asyncio.Task[None]) -> None:
            self._sampling = None
            if not ended.cancelled() and (error := ended.exception()) is not None:
                self._fatal = error
            self._wake.set()

        self._sampling.add_done_callback(done)

    async def _sample(self) -> None:
        """One item after the other, the most urgent first: it may be started at once."""
        while asked := self._planner.asked:
            number = asked[0]
            item = self._entries[number].item
            marks: list[tuple[int, int]] = []
            with contextlib.suppress(TimeoutError):  # its migration will say more of it
                marks = await self._look(sample, item.guest.rest)
            family = self._families.of(marks)
            self._planner.related(number, None if family is None else (item.destination, family))
            self._wake.set()

    def _share(self) -> None:
        """Each migration that runs has what the planner gives it."""
        for number, rate in self._planner.shares().items():
            entry = self._entries[number]
            if entry.rate != rate:
                entry.rate = rate
                if entry.migration is not None:
                    entry.migration.set_parameters({"max-bandwidth": rate})

    def _spawn(self, number: int) -> None:
        entry = self._entries[number]
        self._become(entry, State.RUNNING)
        entry.progress = None
        entry.attempts += 1
        entry.task = asyncio.get_running_loop().create_task(self._item(number, entry))

        def done(ended: asyncio.Task[None]) -> None:
            entry.task = entry.migration = None
            if ended.cancelled():  # before it began
                self._planner.cancelled(number)
                self._become(entry, State.PENDING)
            elif (error := ended.exception()) is not None:
                self._fatal = error
            self._wake.set()

        entry.task.add_done_callback(done)

    async def _item(self, number: int, entry: _Entry) -> None:
        """One attempt, and what follows from how it ended. Raises only what ends the batch."""
        error: PageferryError | None = None
        report: dict[str, Any] = {}
        try:
            await to_its_end(asyncio.to_thread(self.state.started, number))
            self._tell(entry, "started")
            report = await self._move(number, entry)
        except asyncio.CancelledError:
            error = Cancelled()
        except Exception as e:
            error = as_ours(e)
        with contextlib.suppress(asyncio.CancelledError):  # it is about to end anyway
            await to_its_end(self._conclude(number, entry, error, report))

    async def _conclude(
        self, number: int, entry: _Entry, error: PageferryError | None, report: dict[str, Any]
    ) -> None:
        again: float | None = None
        if error is None:
            self._planner.completed(number)
            self._become(entry, State.COMPLETED, report["ram"]["total"])
            entry.error = None
            entry.report = {"memory-bytes": entry.size}
            entry.report |= {name: report[name] for name in _KEPT if name in report}
        elif isinstance(error, Cancelled):
            # by us: to be taken up again
            self._planner.cancelled(number)
            self._become(entry, State.PENDING)
        else:
            now = time.monotonic()
            if is_busy(error):
                due = self._planner.put_off(number, now)
            else:
                due = self._planner.failed(number, now, again=worth_another_try(error))
            again = None if due is None else due - now
            if due is not None and self._asked:
                self._planner.cancel()
            entry.failures = self._planner.failures[number]
            self._become(entry, State.FAILED if due is None else State.WAITING)
            entry.error = _object(error)
        await asyncio.to_thread(
            self.state.ended, number, entry.state, entry.failures, entry.error, entry.report
        )
        told = {State.WAITING: "failed", State.PENDING: "cancelled"}
        self._tell(entry, told.get(entry.state, entry.state.value), again=again)

    async def _move(self, number: int, entry: _Entry) -> dict[str, Any]:
        """The migration of one item."""
        if entry.item.hosts:
            report = await self._move_elsewhere(number, entry)
        else:
            report = await self._move_from_here(number, entry)
        oracle = report.get("oracle")
        if oracle is not None and not oracle["ok"]:
            raise VerificationFailed(f"the oracle found {oracle['wrong-pages']} wrong pages")
        return report

    async def _move_elsewhere(self, number: int, entry: _Entry) -> dict[str, Any]:
        if self._fleet is None:
            raise no_fleet(entry.item)

        def hand_over() -> None:
            self._switching(number)

        def progress(report: dict[str, Any]) -> None:
            entry.progress = report
            self._tell_progress()

        there = self._fleet.elsewhere(number, entry.item, entry.rate, hand_over, progress)
        entry.migration = there
        if self._asked:
            there.cancel()
        return await there.run()

    async def _move_from_here(self, number: int, entry: _Entry) -> dict[str, Any]:
        item = entry.item
        name_item(item.name)
        parameters = self._parameters(entry)

        def started(migration: Source | Destination) -> None:
            assert isinstance(migration, Source)
            entry.migration = migration
            if migration.parameters.max_bandwidth != entry.rate:  # meanwhile
                migration.set_parameters({"max-bandwidth": entry.rate})
            if migration.guest.can_stop:
                migration.on_event = self._handing_over(number, migration)
            if self._asked:
                migration.cancel()

        def progress(report: dict[str, Any]) -> None:
            entry.progress = report
            self._tell_progress()

        how: dict[str, Any] = {
            "on_progress": progress, "on_started": started, "name": item.name,
            "reserve": self._workers,
        }  # fmt: skip
        if item.to_receiver:
            there = parse_endpoint(item.destination)
            return await api.send(item.guest, there, parameters, **how)
        into = parse_guest(item.destination)
        index = self._contents.setdefault(os.path.dirname(into.rest), ContentIndex())
        return await api.copy(item.guest, into, parameters, **how, index=index)

    def _parameters(self, entry: _Entry) -> Parameters:
        """All items together have about the workers that one migration has by default."""
        p = replace(entry.item.parameters(), max_bandwidth=entry.rate)
        return p if p.workers else replace(p, workers=max(1, default_workers() // self._together))

    @property
    def _together(self) -> int:
        return max(1, min(self.policy.parallel, len(self._entries)))

    def _most_workers(self) -> int:
        """Of items that run at the same time, at both ends if these are here."""
        said = [entry.item.settings.workers or 0 for entry in self._entries.values()]
        each = max([1, default_workers() // self._together, *said])
        here = any(not entry.item.to_receiver for entry in self._entries.values())
        return self._together * each * (2 if here else 1)

    def _handing_over(
        self, number: int, migration: Source
    ) -> Callable[[str, dict[str, Any]], None]:
        """Notes that a guest is being handed over before it can be: who takes the batch up again
        must not send it once more. In the event loop, where nothing overtakes it; without fsync."""

        def on_event(name: str, data: dict[str, Any]) -> None:
            if name == "MIGRATION" and data["status"] == Status.DEVICE.value:
                with contextlib.suppress(PageferryError):
                    self._switching(number)
                    return
                migration.cancel()  # nobody has said Run yet

        return on_event

    def _switching(self, number: int) -> None:
        """Writes it down; an error ends the batch too."""
        try:
            self.state.switching(number)
        except PageferryError as e:
            self._fatal = e
            self._wake.set()
            raise

    def _tell(self, entry: _Entry, event: str, *, again: float | None = None) -> None:
        told = entry.told() | {"event": event, "retries": entry.item.retries}
        told |= {"failures": entry.failures, "size": entry.size}
        if again is not None:
            told["again-in"] = round(again, 3)
        _log_item(told)
        tell(self.on_item, told)
        self._tell_progress(now=True)

    def _tell_progress(self, *, now: bool = False) -> None:
        time_ = time.monotonic()
        if self.on_progress is not None and (now or time_ - self._progressed >= _PROGRESS_SECONDS):
            self._progressed = time_
            tell(self.on_progress, self.query())


def _log_item(event: dict[str, Any]) -> None:
    why = f": {event['error']['message']}" if event["event"] == "failed" else ""
    again = f"; tried again in {event['again-in']:.1f} s" if "again-in" in event else ""
    attempt = f", attempt {event['attempts']}" if event["event"] == "started" else ""
    _log.info("%s: %s%s%s%s", event["name"], event["event"], attempt, why, again)


def _progress(entry: _Entry) -> dict[str, Any]:
    found: dict[str, Any] = (entry.progress or {}).get("progress", {})
    return found


def _object(error: PageferryError) -> dict[str, Any]:
    """An error as it is kept."""
    found = {
        "class": type(error).__name__,
        "message": error.message,
        "exit-code": error.exit_code,
    }
    return found | ({"field": error.data["field"]} if "field" in error.data else {})


def verdict(states: Counter[State]) -> str:
    """completed, partial or failed; or active, if something is still to be done."""
    if sum(states[state] for state in State if state not in ENDED):
        return "active"
    if not states[State.FAILED]:
        return "completed"
    return "partial" if states[State.COMPLETED] else "failed"
