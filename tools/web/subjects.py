"""What a server shows: a migration, a batch or a receiver, with its page's parts and its metrics.

Each asks what it shows when somebody looks, and not before. Must not know how that gets to anybody.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import Metric

from ..report.arrivals import Arrivals
from ..report.batch_recorder import BatchRecorder
from ..report.recorder import Recorder
from . import metrics, views

# A guest stands still for milliseconds: nothing is drawn then. One that does for longer is shown.
_STILL_SECONDS = 1.0


class Subject(ABC):
    """What is shown. Everything is called in the event loop of what runs."""

    def __init__(self) -> None:
        self.over = False
        self.report: dict[str, Any] | None = None
        self._still_since: float | None = None

    def finish(self, report: dict[str, Any] | None) -> None:
        """It has ended so; `report` has the error, if there was one."""
        self.over, self.report = True, report

    @property
    def still(self) -> bool:
        """A guest is just being switched over: processor time spent now is downtime."""
        if self.over or self.status() != "device":
            self._still_since = None
            return False
        now = time.monotonic()
        self._still_since = self._still_since or now
        return now - self._still_since < _STILL_SECONDS

    def status(self) -> str:
        """Of the one migration, if it is one."""
        return ""

    @abstractmethod
    def parts(self) -> dict[str, str]:
        """The page's parts as they are now."""

    @abstractmethod
    def metrics(self) -> Iterator[Metric]:
        """The same as numbers."""


class MigrationSubject(Subject):
    """copy, send, restore."""

    def __init__(self, recorder: Recorder, command: str) -> None:
        super().__init__()
        self._recorder = recorder
        self._command = command

    def status(self) -> str:
        return self._recorder.status

    def parts(self) -> dict[str, str]:
        if self.over:
            return views.migration(self._recorder.record(self.report), over=True)
        return views.migration(self._recorder.so_far(), over=False)

    def metrics(self) -> Iterator[Metric]:
        record = self._recorder.so_far()
        yield from metrics.about(self._command)
        yield from metrics.migration(record)


class BatchSubject(Subject):
    """batch run, batch resume. `query`: how it goes."""

    def __init__(self, recorder: BatchRecorder, query: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._recorder = recorder
        self._query = query

    def parts(self) -> dict[str, str]:
        if self.over:
            return views.batch(self._recorder.record(self.report), over=True)
        return views.batch(self._recorder.so_far(), over=False)

    def metrics(self) -> Iterator[Metric]:
        yield from metrics.about("batch")
        yield from metrics.batch(self._query())


class ReceiverSubject(Subject):
    """receive: one at a time, or `many`."""

    def __init__(self, arrivals: Arrivals, *, many: bool) -> None:
        super().__init__()
        self._arrivals = arrivals
        self._many = many

    def status(self) -> str:
        last = self._arrivals.last
        return "" if self._many or last is None or self._arrivals.ended else last.status

    def parts(self) -> dict[str, str]:
        arrivals = self._arrivals
        everything, last = arrivals.all.so_far(), None
        ended = arrivals.ended is not None
        if arrivals.last is not None and not self._many:
            last = arrivals.last.record(arrivals.ended) if ended else arrivals.last.so_far()
        return views.receiver(everything, last, last_over=ended, over=self.over)

    def metrics(self) -> Iterator[Metric]:
        arrivals = self._arrivals
        yield from metrics.about("receive")
        yield from metrics.receiver(arrivals.query(), arrivals.running)
        if arrivals.last is not None and not self._many and arrivals.ended is None:
            yield from metrics.migration(arrivals.last.so_far())
