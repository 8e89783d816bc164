"""`--report FILE`: what copy and send call to have a page written when they end, however they end.

Knows where recorder, page and file come together; not what is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ...pipeline.parameters import Parameters
from ...transport.errors import Cancelled, as_ours
from ...workers.guests import GuestUri
from ...workers.guests.shared_memory import path_of
from .main import error_object
from .view import View

_log = logging.getLogger("pageferry")


if TYPE_CHECKING:
    from ..report.recorder import Asked, Recorder

    class Migrating(Asked, Protocol):
        """What whoever cancels it needs, too."""

        def cancel(self) -> None: ...


class Recording:
    """The callbacks of a migration, for a display and a recorder."""

    def __init__(
        self, recorder: Recorder | None, view: View, attach: Callable[[Migrating], None]
    ) -> None:
        self._recorder = recorder
        self._view = view
        self._attach = attach
        self.report: dict[str, Any] | None = None

    def on_started(self, migration: Migrating) -> None:
        self._attach(migration)
        if self._recorder is not None:
            self._recorder.on_started(migration)

    def on_progress(self, report: dict[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.on_progress(report)
        self._view(report)


@contextlib.contextmanager
def recorded(
    path: str | None,
    source: str,
    destination: str,
    parameters: Parameters,
    view: View,
    attach: Callable[[Migrating], None],
    *memory: GuestUri,
) -> Iterator[Recording]:
    """Set `.report` in it; at its end the page is at `path`, if there is one. UsageError before
    anything moves if it cannot be. `memory`: what moves, which must not be written over."""
    if path is None:
        yield Recording(None, view, attach)
        return
    # who wants no page does not wait for what draws it
    from ..report.recorder import Recorder
    from ..report.writing import check_writable

    check_writable(path, tuple(_file_of(uri) for uri in memory))
    recorder = Recorder(source, destination, parameters.qmp())
    recording = Recording(recorder, view, attach)
    try:
        yield recording
    except asyncio.CancelledError:
        recording.report = error_object(Cancelled("interrupted", report={"status": "cancelled"}))
        raise
    except Exception as e:
        recording.report = error_object(as_ours(e))
        raise
    finally:
        _write(path, recorder, recording.report, view)


def _file_of(uri: GuestUri) -> str:
    if uri.kind == "image":
        return uri.rest
    return path_of(uri) if uri.kind in ("ram", "shm") else ""


def _write(path: str, recorder: Recorder, report: dict[str, Any] | None, view: View) -> None:
    """What goes wrong here is no failed migration."""
    from ..report.page import render
    from ..report.writing import write

    try:
        write(path, render(recorder.record(report)))
    except Exception as e:
        _log.warning("the report %s was not written: %s", path, e)
    else:
        view.say(f"report: {path}")
