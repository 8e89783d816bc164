"""What a page is drawn from: plain values, bounded. Pure; knows nothing of where they come from.

Times are seconds since the migration began.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One look: bytes a second over the last two seconds."""

    at: float
    rate: float  # of guest memory
    wire_rate: float
    dirty_rate: float  # of the guest, at the last look for dirty pages


@dataclass(frozen=True)
class Phase:
    """From a change of the state to the next."""

    status: str
    begin: float
    end: float


@dataclass(frozen=True)
class Round:
    """From its first page to the next round, the taking of its dirty set included."""

    number: int
    begin: float
    end: float
    pages: int
    wire_bytes: int
    dirty_rate: float  # of the guest before it, bytes a second
    stopped: bool  # the guest stood still


@dataclass(frozen=True)
class Record:
    """All of it. `report`: the final one, with `error` in it if there was one."""

    source: str
    destination: str
    report: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    phases: tuple[Phase, ...] = ()
    rounds: tuple[Round, ...] = ()
    rounds_left_out: int = 0
