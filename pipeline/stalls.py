"""A precopy that gets nowhere: noticed while it runs, said with its figures, with what will happen
by itself, and with what somebody can do about it. Pure.

What a stall is, convergence.py says (`hopeless`); nothing is decided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..transport.pages import PAGE_SIZE
from ..transport.quantities import format_bytes, format_rate, format_seconds
from . import migration as core
from .parameters import MANUAL, NEVER
from .state import Status

# What is advised is this much more than what would just do.
_MARGIN = 1.2


@dataclass(frozen=True)
class Option:
    """What somebody can do. `how`: what to write, `value` in it (milliseconds, bytes a second)."""

    name: str
    how: str
    value: int = 0

    def told(self) -> dict[str, Any]:
        return {"option": self.name, "how": self.how} | (
            {"value": self.value} if self.value else {}
        )


@dataclass(frozen=True)
class Notice:
    """That it stalls, or does so no more: a sentence, and the data of MIGRATION_STALL."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)


class Stalls:
    """Of one migration."""

    def __init__(self) -> None:
        self.count = 0
        self._last: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Stalls {self.count} {'now' if self.stalled else 'none now'}>"

    @property
    def stalled(self) -> bool:
        return bool(self._last) and not self._last["over"]

    def report(self) -> dict[str, Any]:
        """For query-migrate: the last stall, if there was one."""
        return {"stall": {**self._last, "count": self.count}} if self._last else {}

    def after(self, event: core.Event, state: core.Migration) -> Notice | None:
        """What to say after `event`, which `state` has handled; nothing if that was said before."""
        if not isinstance(event, core.Taken):
            return None
        stalls = _stalls(event, state)
        if stalls:
            notice = _notice(event, state)
            first, self._last = not self.stalled, notice.data
            self.count += first
            return notice if first else None
        if not self.stalled:
            return None
        self._last = self._last | {"over": True}
        text = f"it gets on again: {_figures(state)}"
        return Notice(text, {"over": True, "text": text})


def _stalls(event: core.Taken, state: core.Migration) -> bool:
    """Round 1 says little: what is written while all of memory moves is written in a long time."""
    going_on = state.status is Status.ACTIVE and not state.leaving
    if not (going_on and state.live and state.can_stop) or state.convergence.rounds < 2:
        return False
    found = state.convergence
    fits = found.expected_downtime(event.pages) <= found.downtime_limit
    return found.hopeless and not fits


def _figures(state: core.Migration) -> str:
    found = state.convergence
    return (
        f"the guest writes {format_rate(found.dirty_rate)} and {format_rate(found.rate)} are moved"
    )


def _notice(event: core.Taken, state: core.Migration) -> Notice:
    found = state.convergence
    needed = found.expected_downtime(event.pages)
    options = options_of(state, needed)
    text = (
        f"stalled: {_figures(state)}, so {format_bytes(event.pages * PAGE_SIZE)} stay to be sent, "
        f"a downtime of {format_seconds(needed)} where {format_seconds(found.downtime_limit)} are "
        f"allowed. {_by_itself(state)} Options: {'; '.join(o.how for o in options)}"
    )
    data = {
        "over": False,
        "round": found.rounds,
        "dirty-rate": round(found.dirty_rate),
        "rate": round(found.rate),
        "remaining": event.pages * PAGE_SIZE,
        "expected-downtime": round(needed * 1000),
        "downtime-limit": round(found.downtime_limit * 1000),
        "options": [option.told() for option in options],
        "text": text,
    }
    return Notice(text, data)


def _throttles(state: core.Migration) -> bool:
    return state.throttling is not None and state.throttling.on


def _by_itself(state: core.Migration) -> str:
    """What happens if nobody does anything."""
    if _throttles(state):
        return "The guest is slowed down, as was asked for."
    if state.after is not None:
        return f"Postcopy is started after round {state.after}."
    return f"It is given up after round {state.convergence.max_rounds}, and the guest goes on here."


def options_of(state: core.Migration, needed: float) -> list[Option]:
    """What would get it on, where a switchover now would take `needed` seconds."""
    found = state.convergence
    limit = math.ceil(needed * _MARGIN * 100) * 10
    options = [Option("downtime-limit", f"`pageferry set MONITOR downtime-limit={limit}ms`", limit)]
    wire = math.ceil(found.dirty_rate * found.wire_share * _MARGIN / 1e6)
    if 0 < found.max_bandwidth < wire * 1e6:  # else it is not the bound
        how = f"`pageferry set MONITOR max-bandwidth={wire}MB`, if the link carries it"
        options.append(Option("max-bandwidth", how, wire * 1_000_000))
    if state.postcopy == MANUAL:
        options.append(Option("postcopy", "`pageferry start-postcopy MONITOR`"))
    elif state.postcopy == NEVER:
        options.append(Option("postcopy", "start it anew with --postcopy auto"))
    if not _throttles(state):
        how = "`pageferry set MONITOR auto-converge=on`, which slows the guest down"
        options.append(Option("auto-converge", how))
    return options
