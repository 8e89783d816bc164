"""What query-migrate and the result say: QEMU's names where it is QEMU's thing, and our own.

One object a migration. Reads counters; decides nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..transport.pages import PAGE_SIZE
from ..workers.counters import Counters, FrozenCounters
from ..workers.pool import Pool
from ..workers.priority import NAMES
from ..workers.usage import cpu_ns, own_memory
from .convergence import Convergence
from .state import Status

CODEC_FIELDS = {"none": "raw_pages", "lz4": "lz4_pages", "zstd": "zstd_pages", "zlib": "zlib_pages",
                "xbzrle": "delta_pages"}  # fmt: skip
# The rate shown is that of the last seconds, not of the whole.
_WINDOW_SECONDS = 2.0
# What is to come is judged by the last half of what was: looks for that, at most so many.
_STEADY_LOOKS = 128


@dataclass(frozen=True)
class RoundCost:
    """What a round was: pages (zero pages are in it), bytes on the wire, seconds; and processor
    time and waiting (for link or receivers) of all senders together, seconds."""

    pages: int
    wire: int
    seconds: float
    sender_cpu: float
    waited: float


class Statistics:
    """Numbers of one end of a migration. Times: CLOCK_MONOTONIC seconds."""

    def __init__(self, role: str, helpers: Callable[[], list[dict[str, Any]]] = list) -> None:
        """`helpers`: what processes that belong to no pool have cost (SourceGuest.helpers)."""
        self.role = role
        self.started = time.monotonic()
        self.set_up: float | None = None
        self.stopped: float | None = None
        self.running: float | None = None
        self.ended: float | None = None
        self.total_pages = 0
        self.hole_pages = 0
        self.control_bytes = 0
        self.rounds = 0
        self.round_pages = 0
        self.round_base = 0
        self.extra: dict[str, Any] = {}
        self.counters: Counters | FrozenCounters | None = None
        # of the process that serves faults: one row
        self.urgent: Counters | FrozenCounters | None = None
        # what round 1 cost, and what the peer says of its end: of trial runs (trials.py)
        self.first_round: RoundCost | None = None
        self.peer: dict[str, int] = {}
        self.postcopy = False  # the guest was started before its memory was there
        self.processes: list[dict[str, Any]] = []
        self._helpers = helpers
        self._peak = 0
        self._samples: list[tuple[float, int, int]] = []
        self._steady: list[tuple[float, int]] = []

    def begin_round(self, number: int, pages: int) -> None:
        self.rounds = number
        self.round_pages = pages
        self.round_base = self.pages_done

    def _total(self, field: str) -> int:
        return sum(c.total(field) for c in (self.counters, self.urgent) if c is not None)

    def _urgent(self, field: str) -> int:
        return self.urgent.total(field) if self.urgent is not None else 0

    @property
    def pages_done(self) -> int:
        """Pages sent or placed so far, zero pages included, holes not."""
        return self._total("normal") + self._total("duplicate") - self._total("lost_pages")

    @property
    def remaining_pages(self) -> int:
        """Pages of this round that are still to be sent."""
        return max(0, self.round_pages - (self.pages_done - self.round_base))

    def finish_round(self) -> None:
        """Nothing remains. Pages that a postcopy served before its round was begun were counted in
        both."""
        self.round_pages = self.pages_done - self.round_base

    @property
    def wire_bytes(self) -> int:
        return self._total("wire_bytes") + self.control_bytes

    def rates(self) -> tuple[float, float]:
        """Guest bytes and wire bytes a second, over the last seconds."""
        now = time.monotonic()
        self._peak = max(self._peak, own_memory())
        if not self._samples and self.set_up is not None:
            self._samples.append((self.set_up, 0, 0))  # a first look says something too
        self._samples.append((now, self.pages_done, self.wire_bytes))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.pop(0)
        then, pages, wire = self._samples[0]
        if now - then < 1e-3:
            return 0.0, 0.0
        now_, pages_, wire_ = self._samples[-1]
        return (pages_ - pages) * PAGE_SIZE / (now_ - then), (wire_ - wire) / (now_ - then)

    def steady_rate(self) -> float:
        """Guest bytes a second since the half of the time that pages move, or for some seconds."""
        now, pages = time.monotonic(), self.pages_done
        if not pages:
            return 0.0
        if not self._steady and self.set_up is not None:
            self._steady.append((self.set_up, 0))
        apart = (now - self._steady[0][0]) / _STEADY_LOOKS if self._steady else 0.0
        if not self._steady or now - self._steady[-1][0] > max(apart, 0.05):
            self._steady.append((now, pages))
        begin = self._steady[0][0]
        since = begin + min((now - begin) / 2, max(0.0, now - begin - _WINDOW_SECONDS))
        then, had = next(look for look in reversed(self._steady) if look[0] <= since)
        if len(self._steady) > 2 * _STEADY_LOOKS:
            del self._steady[1::2]
        return (pages - had) * PAGE_SIZE / (now - then) if now - then > 1e-3 else 0.0

    def remember_processes(self, *pools: Pool | None) -> None:
        """Keep what this process and the workers of closed pools cost."""
        self.processes = self.processes_now(*pools)

    def processes_now(self, *pools: Pool | None) -> list[dict[str, Any]]:
        """What this process and the workers of `pools` have cost so far: milliseconds, bytes."""
        self._peak = max(self._peak, own_memory())
        found: list[dict[str, Any]] = [
            {
                "name": f"{self.role} coordinator",
                "pid": os.getpid(),
                "cpu-time": cpu_ns() // 1_000_000,
                "peak-memory": self._peak,
            }
        ]
        for name, pid, row in (row for pool in pools if pool is not None for row in pool.rows()):
            found.append(
                {
                    "name": name,
                    "pid": pid,
                    "cpu-time": row["cpu_ns"] // 1_000_000,
                    "peak-memory": row["peak_memory"],
                    "wait-time": row["wait_ns"] // 1_000_000,
                    "codec-time": row["codec_ns"] // 1_000_000,
                }
            )
        return found + self._helpers()

    def ram(self, convergence: Convergence | None) -> dict[str, Any]:
        """The `ram` object of query-migrate."""
        end = self.ended or time.monotonic()
        moving = max(1e-3, end - (self.set_up or self.started))
        normal, duplicate = self._total("normal"), self._total("duplicate") + self.hole_pages
        ram = {
            "transferred": self.wire_bytes,
            "remaining": self.remaining_pages * PAGE_SIZE,
            "total": self.total_pages * PAGE_SIZE,
            "duplicate": duplicate,
            "normal": normal,
            "normal-bytes": normal * PAGE_SIZE,
            "page-size": PAGE_SIZE,
            "dirty-sync-count": self.rounds,
            "mbps": round(self.wire_bytes * 8 / 1e6 / moving, 1),
            "pages-per-second": round((normal + duplicate) / moving),
        }
        if convergence is not None:
            ram["dirty-pages-rate"] = round(convergence.dirty_rate / PAGE_SIZE)
        return ram

    def report(self, status: Status, convergence: Convergence | None) -> dict[str, Any]:
        """All of query-migrate. Times in milliseconds, sizes in bytes."""
        end = self.ended or time.monotonic()
        report: dict[str, Any] = {
            "status": status.value,
            "total-time": round((end - self.started) * 1000),
            "ram": self.ram(convergence),
            "wire-bytes": self.wire_bytes,
            "workers": self.counters.workers if self.counters is not None else 0,
            "codec-pages": {name: self._total(field) for name, field in CODEC_FIELDS.items()},
            "lost-frames": self._total("lost_frames"),
        }
        if self.set_up is not None:
            report["setup-time"] = round((self.set_up - self.started) * 1000)
        if convergence is not None and convergence.rate:
            left = self.remaining_pages
            report["expected-downtime"] = round(convergence.expected_downtime(left) * 1000)
        if self.stopped is not None and self.running is not None:
            report["downtime"] = round((self.running - self.stopped) * 1000)
        first = [r["first_ns"] for r in self._rows() if r["first_ns"]]
        if first:
            report["first-page-time"] = round((min(first) / 1e9 - self.started) * 1000)
        if self.postcopy:
            report |= self._postcopy()
        if self.processes:
            report["processes"] = self.processes
        return report | self.extra

    def _postcopy(self) -> dict[str, Any]:
        """What only a postcopy has."""
        rows = self._rows()
        pages = [row["normal"] + row["duplicate"] - row["lost_pages"] for row in rows]
        urgent = self._urgent("normal") + self._urgent("duplicate")
        return {
            "postcopy-requests": self._urgent("requests"),
            "postcopy-pages": urgent,
            "postcopy-elsewhere": self._urgent("elsewhere"),
            "postcopy-priority": NAMES[self._urgent("priority")],
            "pages-by-channel": [*pages, urgent],
            "senders-paused-time": round(sum(row["paused_ns"] for row in rows) / 1e6),
            "postcopy-already-there": self._total("already_there"),
            "postcopy-resent": self._total("resent"),
        }

    def _rows(self) -> list[dict[str, int]]:
        if self.counters is None:
            return []
        return [self.counters.read(i) for i in range(self.counters.workers)]
