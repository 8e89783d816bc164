"""Running a migration from the command line: signals, display, result.

Ctrl-C (or SIGTERM) cancels; a second one gives up waiting for the peer. Everything a person
reads goes to stderr while it runs; the result goes to stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol

from ...pipeline.tracing import recording
from ...transport.errors import Cancelled
from ...workers.forking import warm_up
from ...workers.guests import GuestUri, SourceGuest, needs_process
from ...workers.privileges import become, become_after_attach, find_user
from .view import View, make_view, summary


def as_user(
    text: str | None, source: GuestUri | None = None
) -> Callable[[SourceGuest], None] | None:
    """With --user: become that user now, or, if `source` is another process, by what this returns,
    to be called when that is attached to. Nothing runs yet."""
    if text is None:
        return None
    user = find_user(text)
    if source is None or not needs_process(source):
        become(user)
        warm_up()
        return None
    attached = become_after_attach(user)
    return lambda guest: attached(guest.process)


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Interrupts:
    """Turns signals into cancellation."""

    def __init__(self) -> None:
        self._migration: Cancellable | None = None
        self._task: asyncio.Task[Any] | None = None
        self._asked = False

    def attach(self, migration: Cancellable) -> None:
        self._migration = migration

    def __call__(self) -> None:
        if self._migration is not None and not self._asked:
            self._asked = True
            self._migration.cancel()
        elif self._task is not None:
            self._task.cancel()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def run(
    start: Callable[[View, Interrupts], Awaitable[dict[str, Any] | None]],
    *,
    as_json: bool,
    quiet: bool,
    interrupted: str = "interrupted; the source is as it was",
    trace: str | None = None,
    memory: Sequence[GuestUri | None] = (),
) -> None:
    """Run `start(view, interrupts)` to its end and print its report. `interrupted`: what a
    second Ctrl-C leaves behind; one after the switchover has an error of its own. `trace`: the file
    for its trace; `memory`: what moves, which must not be written over."""
    view = make_view(quiet)

    async def main() -> dict[str, Any] | None:
        interrupts = Interrupts()
        with interrupts.installed():
            try:
                return await start(view, interrupts)
            except asyncio.CancelledError:
                raise Cancelled(interrupted) from None

    with view, recording(trace, *(uri for uri in memory if uri is not None)):
        try:
            report = asyncio.run(main())
        finally:
            if trace is not None:
                view.say(f"trace: {trace}")
    if report is not None:
        show(report, as_json=as_json, quiet=quiet)


def show(report: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Print a report on stdout."""
    if as_json:
        print(json.dumps(report, default=str), flush=True)
    elif not quiet:
        print(summary(report), flush=True)
