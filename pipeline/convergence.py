"""When to stop the guest: will what remains fit into the downtime limit? Pure.

As in QEMU (migration_iteration_run in migration/migration.c) the rate is measured in bytes of
guest memory a second, so compression and zero pages are in it, and the threshold is rate x
downtime limit. Beyond QEMU, what a switchover costs however little remains (stopping, the
last scan, device state, the round trips) is taken off the limit first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..transport.pages import PAGE_SIZE

# A round shorter than this says more about latency than about the rate.
_MEASURABLE_PAGES = 1024
# Switchover without a page left, before it was ever measured: stop, barrier, state, run.
FIXED_SECONDS = 0.03
# A guest that writes at this share of the rate leaves nothing to predict from.
_HOPELESS = 0.95


class Decision(enum.Enum):
    SWITCH_OVER = "switch over"
    NEXT_ROUND = "next round"
    GIVE_UP = "give up"


@dataclass
class Convergence:
    """What the rounds so far say."""

    downtime_limit: float  # seconds
    max_rounds: int
    rounds: int = 0
    rate: float = 0.0  # bytes of guest memory a second
    dirty_rate: float = 0.0  # bytes of guest memory a second
    take_seconds: float = 0.0  # what taking the dirty set took last time

    def round_done(self, pages: int, seconds: float) -> None:
        """A round moved `pages` pages in `seconds`."""
        self.rounds += 1
        if pages >= _MEASURABLE_PAGES or self.rate == 0:
            self.rate = pages * PAGE_SIZE / max(seconds, 1e-6)

    def dirty_taken(self, pages: int, since: float, took: float) -> None:
        """`pages` were written in the `since` seconds before they were taken, in `took`."""
        self.dirty_rate = pages * PAGE_SIZE / max(since, 1e-6)
        self.take_seconds = took

    def expected_downtime(self, pages: int) -> float:
        """Seconds for which the guest would stand still if it were stopped now."""
        moving = pages * PAGE_SIZE / self.rate if self.rate else 0.0
        return FIXED_SECONDS + self.take_seconds + moving

    def decide(self, pages: int) -> Decision:
        """With `pages` left to send."""
        # without a rate (nothing moved yet) nobody knows how long the rest takes
        if pages == 0 or (self.rate and self.expected_downtime(pages) <= self.downtime_limit):
            return Decision.SWITCH_OVER
        if self.rounds >= self.max_rounds:
            return Decision.GIVE_UP
        return Decision.NEXT_ROUND

    def eta(self, pages: int) -> float | None:
        """Seconds until the switchover, or None while the guest writes faster than we send."""
        if self.rate == 0 or self.dirty_rate >= _HOPELESS * self.rate:
            return None
        return pages * PAGE_SIZE / (self.rate - self.dirty_rate)
