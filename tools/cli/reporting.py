"""`--report` and `--web`: what commands call to have a page written when they end, however that
is, and one served while they run.

Knows where recorders, pages, files and the server come together; not what is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ...pipeline.destination import Destination
from ...pipeline.parameters import Parameters
from ...transport.errors import Cancelled, HostLacks, as_ours
from ...workers.guests import GuestUri
from ...workers.guests.shared_memory import path_of
from .display import Display
from .main import error_object
from .view import View

_log = logging.getLogger("pageferry")


if TYPE_CHECKING:
    from ..report.recorder import Asked, Recorder
    from ..web.subjects import Subject

    class Migrating(Asked, Protocol):
        """What whoever cancels it needs, too."""

        def cancel(self) -> None: ...


class Outcome:
    """`report`: what something ended with; `error` is in it if there was one."""

    def __init__(self) -> None:
        self.report: dict[str, Any] | None = None


class Recording(Outcome):
    """The callbacks of a migration, for a display and a recorder."""

    def __init__(
        self, recorder: Recorder | None, view: View, attach: Callable[[Migrating], None]
    ) -> None:
        super().__init__()
        self._recorder = recorder
        self._view = view
        self._attach = attach

    def on_started(self, migration: Migrating) -> None:
        self._attach(migration)
        if self._recorder is not None:
            self._recorder.on_started(migration)

    def on_progress(self, report: dict[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.on_progress(report)
        self._view(report)


@contextlib.asynccontextmanager
async def recorded(
    options: dict[str, Any],
    command: str,
    source: str,
    destination: str,
    parameters: Parameters,
    view: View,
    attach: Callable[[Migrating], None],
    *memory: GuestUri,
) -> AsyncIterator[Recording]:
    """Set `.report` in it; when it ends the page is in the file options["report"], until then it is
    served at options["web"], where these are given. UsageError before anything moves if that cannot
    be. `memory`: what moves, which must not be written over."""
    path = options.get("report")
    if path is None and options.get("web") is None:
        yield Recording(None, view, attach)
        return
    # who wants no page does not wait for what draws it
    from ..report.page import render
    from ..report.recorder import Recorder

    check_report(path, *memory)
    recorder = Recorder(source, destination, parameters.qmp())
    recording = Recording(recorder, view, attach)

    def subject() -> Subject:
        from ..web.subjects import MigrationSubject

        return MigrationSubject(recorder, command)

    def write() -> None:
        write_report(path, lambda: render(recorder.record(recording.report)), view)

    async with served(options, subject, recording, view):
        with ending(recording, write):
            yield recording


@contextlib.asynccontextmanager
async def received(
    options: dict[str, Any],
    destination: Destination,
    into: GuestUri | None,
    view: View,
    *,
    many: bool = False,
) -> AsyncIterator[None]:
    """The same for a receiver. options["report"] is a file for the last migration, or a directory
    for a page of each."""
    path = options.get("report")
    if path is None and options.get("web") is None:
        yield
        return
    from ..report.arrivals import Arrivals
    from ..report.page import render
    from ..report.writing import name_in

    check_report(path, *([into] if into is not None else []), many=True)

    def ended(recorder: Recorder, report: dict[str, Any] | None, name: str, uuid: str) -> None:
        file = path if path is None else name_in(path, name, uuid)
        write_report(file, lambda: render(recorder.record(report)), view)

    where = str(into) if into is not None else "this host"
    arrivals = Arrivals(f"{destination.endpoint} into {where}", where, error_object, ended)
    destination.on_arrival = arrivals.arrived

    def subject() -> Subject:
        from ..web.subjects import ReceiverSubject

        return ReceiverSubject(arrivals, many=many)

    async with served(options, subject, Outcome(), view):
        yield


def check_report(path: str | None, *memory: GuestUri, many: bool = False) -> None:
    """UsageError if `path` cannot become a page, or is some of `memory`. `many`: it may be a
    directory, DIR/."""
    if path is not None:
        from ..report.writing import check_writable

        check_writable(path, tuple(_file_of(uri) for uri in memory), many=many)


def _file_of(uri: GuestUri) -> str:
    if uri.kind in ("image", "file"):
        return uri.rest
    return path_of(uri) if uri.kind in ("ram", "shm") else ""


@contextlib.contextmanager
def ending(outcome: Outcome, write: Callable[[], None]) -> Iterator[None]:
    """However it ends, `outcome` has it; then `write`."""
    try:
        yield
    except asyncio.CancelledError:
        outcome.report = error_object(Cancelled("interrupted", report={"status": "cancelled"}))
        raise
    except Exception as e:
        outcome.report = error_object(as_ours(e))
        raise
    finally:
        write()


def write_report(path: str | None, render: Callable[[], str], view: Display) -> None:
    """What goes wrong here is no failed migration."""
    if path is None:
        return
    from ..report.writing import write

    try:
        write(path, render())
    except Exception as e:
        _log.warning("the report %s was not written: %s", path, e)
    else:
        view.say(f"report: {path}")


@contextlib.asynccontextmanager
async def served(
    options: dict[str, Any], subject: Callable[[], Subject], outcome: Outcome, view: Display
) -> AsyncIterator[None]:
    """A server at options["web"], if that is given, until it ends with `outcome`. UsageError if it
    cannot be; HostLacks without its libraries."""
    where = options.get("web")
    if where is None:
        yield
        return
    from ..web.address import parse_address

    address = parse_address(where)
    try:
        from ..web.server import Server
    except ImportError as e:
        raise HostLacks(
            f"--web needs aiohttp and prometheus-client ({e.name} is missing): "
            "pip install 'pageferry[web]'"
        ) from e
    server = Server(subject(), address)
    await server.open()
    try:
        _say(f"web: {server.url}", options, view)
        if not address.loopback:
            _say(
                f"web: anybody who reaches {server.address} can read along, names and figures; "
                "nothing can be changed from there",
                options, view,
            )  # fmt: skip
        yield
    finally:
        await server.close(outcome.report)


def _say(text: str, options: dict[str, Any], view: Display) -> None:
    """Where it is must be known, --quiet or not."""
    if options.get("quiet"):
        print(text, file=sys.stderr, flush=True)
    else:
        view.say(text)
