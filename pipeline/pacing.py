"""How fast the background of a postcopy may go, and how much of it may be on the way. Pure.

A fault waits behind whatever is queued between the two hosts: socket buffers, queueing discipline,
card. On a link that is the bottleneck nothing but a background that stays below its rate empties
that queue; on a faster one pacing gains nothing. So the background is free, and the rate that it
reaches is the link's, until requests are seen to wait: the destination says with each one how
long the last was on the wire. What that exceeds the shortest by is the queue, as in TCP
Vegas (Brakmo, Peterson, 1995). Then the background gets a share of the rate, never less than 80 %,
and from time to time it is let go, to see whether the link still is the bottleneck; more and more
seldom, as each try is felt by a few faults. When no faults came for a while it is free too.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..transport.pages import PAGE_SIZE

# A queue of a free background is a millisecond at the least: what TCP keeps below itself (TCP small
# queues, Documentation/networking/ip-sysctl.rst). A wait of fewer times the latency that is
# wanted is the processor's, and pacing does not help against that.
_QUEUE = 7
# Shares of the link's rate that a paced background gets: at first, and at the least.
SHARE, LEAST = 0.9, 0.8
_LESS = 0.05
# Faults are "coming" for this long after the last.
QUIET_SECONDS = 0.25
# A free background is measured for this long before it is paced.
_FREE_SECONDS, _AGAIN_SECONDS = 0.2, 0.04
# It is let go again after this long, then twice, four times … as long.
_TRY_SECONDS, _MOST_TRY_SECONDS = 2.0, 60.0
# A sample takes at least this long, and this many requests say something.
_SAMPLE_SECONDS, _REQUESTS = 0.04, 4
_SLOWEST = 1_000_000
# Pages in a frame of a free background; of a paced one what the link carries in _PIECE_SECONDS.
_FREE_PIECE, _SMALLEST_PIECE, _LARGEST_PIECE = 64, 8, 32
_PIECE_SECONDS = 0.001
_PIECES = 4  # in flight a channel: both ends work at the same time


@dataclass(frozen=True)
class Pace:
    """What senders go by. `rate`: wire bytes a second, all together, 0 without limit;
    `piece_pages` in a frame; `credit`: bytes in flight a channel."""

    rate: int
    piece_pages: int
    credit: int


@dataclass(frozen=True)
class Sample:
    """Sums so far. Seconds and bytes; `on_wire`: of `answered` requests, without the time at the
    source; `shortest`: of one of these, 0 if there is none."""

    now: float
    wire: int = 0
    paused: float = 0.0
    requests: int = 0
    answered: int = 0
    on_wire: float = 0.0
    shortest: float = 0.0


class Pacer:
    """`limit`: max-postcopy-bandwidth, 0 without; `latency`: how long a request may wait behind
    the background, seconds."""

    def __init__(self, workers: int, latency: float, limit: int = 0) -> None:
        self.limit = limit
        self.link = 0.0  # wire bytes a second that a free background reached
        self.share = 0.0  # of it, for the background; 0: free
        self._workers = workers
        self._latency = latency
        self._last: Sample | None = None
        self._fault_at = float("-inf")
        self._since = 0.0  # when it was let go or paced
        self._measured = 0.0  # the best since it was let go
        self._need = _FREE_SECONDS
        self._try_after = _TRY_SECONDS

    def __repr__(self) -> str:
        return f"<Pacer link={self.link / 1e6:.0f} MB/s share={self.share:.2f}>"

    def tick(self, sample: Sample) -> Pace:
        """The pace from now on."""
        last = self._last
        if last is None:
            self._last, self._since = sample, sample.now
        elif sample.now - last.now >= _SAMPLE_SECONDS:
            self._last = sample
            if sample.requests > last.requests:
                self._fault_at = sample.now
            self._decide(last, sample)
        return self._pace()

    def _decide(self, last: Sample, sample: Sample) -> None:
        if self.share:
            self._while_paced(sample.now, self._wait(last, sample) > self._latency)
            return
        self._measured = max(self._measured, self._rate(last, sample))
        if sample.now - self._since >= self._need or not self.link:
            self.link = max(self._measured, 1.0)
        queued = self._wait(last, sample) > _QUEUE * self._latency
        if queued and sample.now - self._since >= self._need:
            self.share, self._since = SHARE, sample.now

    def _while_paced(self, now: float, waits: bool) -> None:
        if now - self._fault_at > QUIET_SECONDS:
            self._let_go(now, _FREE_SECONDS)
            self._try_after = _TRY_SECONDS
        elif waits:
            self.share = max(LEAST, self.share - _LESS)
        elif now - self._since > self._try_after:
            self._try_after = min(2 * self._try_after, _MOST_TRY_SECONDS)
            self._let_go(now, _AGAIN_SECONDS)

    def _let_go(self, now: float, need: float) -> None:
        self.share, self._since, self._need, self._measured = 0.0, now, need, 0.0

    def _wait(self, last: Sample, sample: Sample) -> float:
        """Seconds that requests waited on the wire beyond the shortest, on average."""
        n = sample.answered - last.answered
        if n < _REQUESTS:
            return 0.0
        return (sample.on_wire - last.on_wire) / n - sample.shortest

    def _rate(self, last: Sample, sample: Sample) -> float:
        """Bytes a second; time in which senders stood aside says nothing of the link."""
        seconds = sample.now - last.now
        free = 1 - min(0.9, (sample.paused - last.paused) / (seconds * self._workers))
        return (sample.wire - last.wire) / (seconds * free)

    def _pace(self) -> Pace:
        rate, piece = self.limit, _FREE_PIECE
        if self.share:
            rate = max(_SLOWEST, min(rate or 1 << 59, int(self.share * self.link)))
            fits = int(self.link * _PIECE_SECONDS / PAGE_SIZE)
            piece = max(_SMALLEST_PIECE, min(fits, _LARGEST_PIECE))
        return Pace(rate, piece, _PIECES * piece * PAGE_SIZE)
