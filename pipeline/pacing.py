"""How fast the background of a postcopy may go, and how much of it may be on the way. Pure.

A fault waits behind whatever is queued between the two hosts: socket buffers, queueing discipline,
card. On a link that is the bottleneck nothing but a background that stays below its rate empties
that queue. So: measure the rate while the background is not paced; while faults come, pace it
to a share of that; when none came for a while, let it go. What is in flight is sized by the latency
that is wanted: with in-flight bytes = rate x latency, the queue is no longer than that. Only
samples that the link (and not our own pacing) limits say how fast it is, as in BBR (Cardwell et
al., ACM Queue 14(5), 2016). A background that is paced and not held up by the link goes faster
step by step, up to where it was held up last, and beyond that only now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..transport.pages import PAGE_SIZE

# Share of the link's rate that the background gets while faults come.
SHARE = 0.85
# Faults are "coming" for this long after the last.
QUIET_SECONDS = 0.25
# A sample takes at least this long.
_SAMPLE_SECONDS = 0.04
_SMALLEST_PIECE, _LARGEST_PIECE = 8, 64  # pages
_MOST_CREDIT = 4 << 20
_UNKNOWN = 32, 384 << 10  # piece and credit before anything is measured
_SLOWEST = 1_000_000
# Senders that wait for acknowledgements for this share of the time are held up by the link.
_HELD_UP = 0.3
_GAIN = 0.5
_STEP = 1.08  # a sample
# What the link carried when it held us up counts for this long.
_CEILING_SECONDS = 10.0


@dataclass(frozen=True)
class Pace:
    """What senders go by. `rate`: wire bytes a second, all together, 0 without limit;
    `piece_pages` in a frame; `credit`: bytes in flight a channel."""

    rate: int
    piece_pages: int
    credit: int


@dataclass(frozen=True)
class Sample:
    """Sums so far, over all senders. Seconds and bytes; `requests`: of the postcopy process."""

    now: float
    wire: int
    waited: float
    paused: float
    requests: int


class Pacer:
    """`limit`: max-postcopy-bandwidth, 0 without; `latency`: wanted, seconds."""

    def __init__(self, workers: int, latency: float, limit: int = 0) -> None:
        self.limit = limit
        self.link = 0.0  # wire bytes a second it carries, as far as is known
        self._workers = workers
        self._latency = latency
        self._last: Sample | None = None
        self._fault_at = float("-inf")
        self._paced = False
        self._ceiling = float("inf")
        self._ceiling_at = float("-inf")

    def tick(self, sample: Sample) -> Pace:
        """The pace from now on."""
        last = self._last
        if last is None:
            self._last = sample
            return self._pace(sample.now)
        if sample.requests > last.requests:
            self._fault_at = sample.now
        if sample.now - last.now >= _SAMPLE_SECONDS:
            self._learn(last, sample)
            self._last = sample
        return self._pace(sample.now)

    def _learn(self, last: Sample, sample: Sample) -> None:
        seconds = sample.now - last.now
        # time in which senders stood aside says nothing of the link
        free = 1 - min(0.9, (sample.paused - last.paused) / (seconds * self._workers))
        rate = (sample.wire - last.wire) / (seconds * free)
        held_up = (sample.waited - last.waited) / (seconds * self._workers) > _HELD_UP
        if rate <= 0:
            return
        if not self._paced:
            self.link = rate if not self.link else self.link + _GAIN * (rate - self.link)
        elif held_up:
            self._ceiling, self._ceiling_at = rate, sample.now
            self.link += _GAIN * (rate - self.link)
        else:
            old = sample.now - self._ceiling_at > _CEILING_SECONDS
            self.link = min(self.link * _STEP, float("inf") if old else self._ceiling)

    def _pace(self, now: float) -> Pace:
        self._paced = now - self._fault_at < QUIET_SECONDS and self.link > 0
        rate = self.limit
        if self._paced:
            rate = max(_SLOWEST, min(rate or 1 << 59, int(SHARE * self.link)))
        if not self.link:
            return Pace(rate, *_UNKNOWN)
        in_flight = self.link * self._latency
        piece = int(in_flight / 4 / PAGE_SIZE)
        piece = max(_SMALLEST_PIECE, min(piece, _LARGEST_PIECE))
        credit = max(3 * piece * PAGE_SIZE, int(in_flight / self._workers))
        return Pace(rate, piece, min(credit, _MOST_CREDIT))
