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
class Use:
    """What a process does: shares of the last two seconds (None: it does no such thing), seconds of
    processor in all, bytes."""

    name: str
    cpu: float | None
    wait: float | None
    codec: float | None
    cpu_time: float
    memory: int


@dataclass(frozen=True)
class Record:
    """All of it. `report`: the final one, with `error` in it if there was one; while it runs the
    last look, with `progress`. `uses`: while it runs."""

    source: str
    destination: str
    report: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    phases: tuple[Phase, ...] = ()
    rounds: tuple[Round, ...] = ()
    rounds_left_out: int = 0
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """An item of a batch that ran once. `lane`: the smallest that was free; `outcome`: completed,
    failed, cancelled, or running."""

    name: str
    lane: int
    begin: float
    end: float
    outcome: str


@dataclass(frozen=True)
class ItemRow:
    """What a page says of an item. `done`, `size`: bytes; `rate`: bytes a second while it runs;
    `took`: seconds of the last attempt; `phase`: while it runs."""

    name: str
    source: str
    destination: str
    state: str
    attempts: int = 0
    done: int | None = None
    size: int = 0
    rate: float | None = None
    took: float | None = None
    phase: str = ""
    error: str = ""


@dataclass(frozen=True)
class BatchRecord:
    """A batch, so far or in the end. `report`: totals, as it tells them; `error` in it if there was
    one. `items`: the most telling first."""

    title: str
    seconds: float
    report: dict[str, Any] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    items: tuple[ItemRow, ...] = ()
    items_left_out: int = 0
    attempts: tuple[Attempt, ...] = ()
    attempts_left_out: int = 0
    samples: tuple[Sample, ...] = ()
