"""What a coordinator tells of one end of a migration: to the log (logging, "pageferry.…") and, if
there is one, to the trace. INFO is what an operator wants to know, DEBUG every instruction, message
and worker.

Never says what is in guest memory, nor tokens and identities: of messages only what they are and
how large. Decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from ..transport.quantities import format_seconds
from .state import FINAL, Status
from .tracing import current

T = TypeVar("T")

# The item of a batch that this task moves.
_item: ContextVar[str] = ContextVar("pageferry-item", default="")


def name_item(name: str) -> None:
    """Whatever this task and those that it starts tell is about the item `name`."""
    _item.set(name)


@dataclass
class _Work:
    """A piece of work that began."""

    name: str
    done: bool = False


class Journal:
    """One end's. `role`: source, destination, restore; `scope`: a name of the migration that both
    ends know; `item`: which of several it is, if it is no batch's."""

    def __init__(self, role: str, scope: str, item: str = "") -> None:
        trace, item = current(), item or _item.get()
        self._prefix = f"{item}: " if item else ""
        self.lane = trace.lane(role, scope, self._prefix) if trace is not None else None
        self._log = logging.getLogger(f"pageferry.{role}")
        self._status = Status.NONE
        self._round = 0
        self._work: list[_Work] = []  # that is under way
        # what took how long since the guest was to be stopped
        self._steps: list[tuple[str, float]] = []

    def info(self, text: str, *arguments: Any) -> None:
        self._log.info(self._prefix + text, *arguments)

    def debug(self, text: str, *arguments: Any) -> None:
        self._log.debug(self._prefix + text, *arguments)

    def mark(self, name: str, **facts: Any) -> None:
        """Something that has happened, with what it was about; for the trace, and at DEBUG."""
        self.debug("%s %s", name, facts or "")
        if self.lane is not None:
            self.lane.mark("work", name, **facts)

    def became(self, status: Status, why: str = "") -> None:
        """The migration is in another state."""
        if status is self._status:
            return
        before, self._status = self._status, status
        self.info("%s%s", status.value, f": {why}" if why else "")
        if status is Status.DEVICE:
            self._steps = []
        if self.lane is None:
            return
        if before is not Status.NONE:
            self.lane.ends("states", before.value)
        if status in FINAL:
            self.lane.mark("states", status.value, why=why)
        else:
            self.lane.begins("states", status.value)

    def round_begins(self, number: int, pages: int) -> None:
        self.debug("round %d begins: %d pages", number, pages)
        if self.lane is not None:
            if self._round:
                self.lane.ends("rounds", f"round {self._round}")
            self.lane.begins("rounds", f"round {number}", pages=pages)
        self._round = number

    def round_ends(self, **facts: Any) -> None:
        """The round that began last; `facts` for the trace."""
        if self.lane is not None and self._round:
            self.lane.ends("rounds", f"round {self._round}", **facts)
        self._round = 0

    async def during(self, name: str, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Await `function(*arguments)`, as one piece of work."""
        self.debug("%s begins", name)
        work = _Work(name)
        self._work.append(work)
        if self.lane is not None:
            self.lane.begins("work", name)
        begin = time.monotonic()
        try:
            return await function(*arguments)
        finally:
            took = time.monotonic() - begin
            if self._status is Status.DEVICE:
                self._steps.append((name, took))
            self.debug("%s took %s", name, format_seconds(took))
            work.done = True
            self._end_work()

    def _end_work(self) -> None:
        """Bars of a line lie in each other: one ends when all have that began after it."""
        while self._work and self._work[-1].done:
            name = self._work.pop().name
            if self.lane is not None:
                self.lane.ends("work", name)

    def stood_still(self, seconds: float) -> None:
        """The guest runs at the destination; it stood still for `seconds`. Told once, with what
        took how long since it was to be stopped."""
        steps, self._steps = self._steps, []
        if steps:
            parts = ", ".join(f"{name} {format_seconds(took)}" for name, took in steps)
            self.info("the guest stood still for %s: %s", format_seconds(seconds), parts)

    def control(self, direction: str, message: Any, size: int) -> None:
        """A control message was "said" or "heard", of `size` bytes."""
        name = type(message).__name__
        self.debug("%s %s, %d bytes", direction, name, size)
        if self.lane is not None:
            self.lane.mark("control", f"{direction} {name}", bytes=size)

    def over(self, text: str) -> None:
        """This end has ended, however it did; `text` says so."""
        self.info("%s", text)
        if self.lane is not None and self._status not in (*FINAL, Status.NONE):
            self.lane.ends("states", self._status.value)
        self.round_ends()
