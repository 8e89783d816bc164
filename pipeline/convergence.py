"""When to stop the guest: will what remains fit into the downtime limit? Pure.

As in QEMU (migration_iteration_run in migration/migration.c) the threshold is measured rate x
downtime limit; the rate is in bytes of guest memory a second, so that compression is in it.
Beyond QEMU, what a switchover costs however little remains (stopping, the
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
# Nothing but zeros was moved so far: what a slow link carries.
_UNKNOWN_RATE = 5e7
# The dirty rate of the last round weighs as much as so many seconds of this one.
_KNOWN_SECONDS = 2.0
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
    max_bandwidth: int = 0  # bytes a second on the wire, 0 without limit
    rounds: int = 0
    rate: float = 0.0  # bytes of guest memory a second, zero pages not counted
    wire_share: float = 1.0  # bytes on the wire for one of guest memory
    dirty_rate: float = 0.0  # bytes of guest memory a second
    take_seconds: float = 0.0  # what taking the dirty set took last time

    def round_done(self, pages: int, seconds: float, zero: int = 0, wire: int = 0) -> None:
        """A round moved `pages` pages in `seconds`, `zero` of them zero, in `wire` bytes.

        Zero pages cost next to nothing, and what a guest writes is seldom zero: they say
        nothing of how fast its dirty pages will move. Nor does the first round say how well
        these compress: it counts as if they did not.
        """
        self.rounds += 1
        content, seconds = (pages - zero) * PAGE_SIZE, max(seconds, 1e-6)
        rate = content / seconds
        if content < _MEASURABLE_PAGES * PAGE_SIZE and rate <= self.rate:
            return  # too short to say more than that it can be at least so fast
        self.rate = rate
        self.wire_share = wire / content if wire else 1.0
        if self.rounds == 1 and wire:
            self.rate, self.wire_share = min(self.rate, wire / seconds), 1.0

    def dirty_taken(self, pages: int, since: float, took: float) -> None:
        """`pages` were written in the `since` seconds before they were taken, in `took`."""
        self.dirty_rate = pages * PAGE_SIZE / max(since, 1e-6)
        self.take_seconds = took

    def expected_downtime(self, pages: int) -> float:
        """Seconds for which the guest would stand still if it were stopped now."""
        rate = self.rate or _UNKNOWN_RATE
        if self.max_bandwidth:
            rate = min(rate, self.max_bandwidth / self.wire_share)
        moving = pages * PAGE_SIZE / rate
        return FIXED_SECONDS + self.take_seconds + moving

    def decide(self, pages: int) -> Decision:
        """With `pages` left to send."""
        if pages == 0 or self.expected_downtime(pages) <= self.downtime_limit:
            return Decision.SWITCH_OVER
        if self.rounds >= self.max_rounds:
            return Decision.GIVE_UP
        return Decision.NEXT_ROUND

    def dirty_rate_now(self, written: int, since: float) -> float:
        """The dirty rate when in this round `written` pages were written in `since` seconds. Where
        that is short it says little, and the rounds before count too."""
        known = _KNOWN_SECONDS if self.dirty_rate else 0.0
        if since + known <= 0:
            return 0.0
        return (written * PAGE_SIZE + known * self.dirty_rate) / (since + known)

    @property
    def hopeless(self) -> bool:
        """The guest writes as fast as we send, or faster: one round more would leave no less."""
        return self.rate == 0 or self.dirty_rate >= _HOPELESS * self.rate

    def eta(
        self, left: int, rate: float, written: int, dirty_rate: float, total: int
    ) -> float | None:
        """Seconds until the guest runs at the destination, or None if it will not so.

        Of this round `left` pages are left, and go on at `rate`; `written` pages are dirty again,
        and of all `total` pages more will be at `dirty_rate` (both rates: bytes of guest memory a
        second). Then come the rounds that `decide` would decide on.
        """
        if rate <= 0:
            return None
        seconds, pages = left * PAGE_SIZE / rate, float(left)
        for _ in range(max(1, self.max_rounds - self.rounds)):
            step = pages * PAGE_SIZE / rate
            pages = min(total, written + dirty_rate * step / PAGE_SIZE)
            written = 0
            downtime = FIXED_SECONDS + self.take_seconds + pages * PAGE_SIZE / rate
            # with nothing left it is stopped whatever that takes (decide)
            if downtime <= self.downtime_limit or pages < 1:
                return seconds + downtime
            if dirty_rate >= _HOPELESS * rate:
                return None
            seconds += self.take_seconds + pages * PAGE_SIZE / rate
        return None
