"""`--codec auto`: which codec moves the most pages a second, batch by batch.

Compressing and sending overlap, so a codec moves pages at the lesser of what it compresses
and what the link carries of its output: min(speed, link / ratio). Speed and ratio are
learned from every batch; the link's rate is measured whenever it is what we wait for.
Where we never wait for it, it is faster than we know: the estimate grows until it matters.

Pure: observations in, a name out. No clock, no buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

CANDIDATES = ("none", "lz4", "zstd")
# Weight of a new observation: the last ten batches or so count.
_WEIGHT = 0.2
# Batches without waiting for the link before its estimate grows by _GROWTH.
_QUIET = 32
_GROWTH = 1.25
# Share of compressible pages in a batch below which no codec is worth its time.
_WORTHWHILE = 0.1


@dataclass
class _Seen:
    speed: float = 0.0  # bytes a second
    ratio: float = 1.0  # packed / plain
    known: bool = False


class CodecChoice:
    """Chooses among `candidates` for one channel."""

    def __init__(self, candidates: tuple[str, ...] = CANDIDATES) -> None:
        self._seen = {name: _Seen() for name in candidates}
        self._seen["none"] = _Seen(float("inf"), 1.0, True)
        self.link: float | None = None  # bytes a second; None: never the bottleneck yet
        self._quiet = 0

    def choose(self, compressible: float) -> str:
        """The codec for a batch of which the share `compressible` (0..1) looks compressible."""
        if self.link is None or compressible < _WORTHWHILE:
            return "none"
        for name, seen in self._seen.items():
            if not seen.known:
                return name
        return max(self._seen, key=self.page_rate)

    def page_rate(self, name: str) -> float:
        """Bytes of guest memory a second that `name` is expected to move."""
        seen = self._seen[name]
        link = float("inf") if self.link is None else self.link
        return min(seen.speed, link / seen.ratio)

    def learn(self, name: str, plain: int, packed: int, seconds: float) -> None:
        """A batch of `plain` bytes became `packed` bytes in `seconds`."""
        if name == "none" or name not in self._seen or plain == 0:
            return
        seen = self._seen[name]
        speed, ratio = plain / max(seconds, 1e-9), packed / plain
        weight = _WEIGHT if seen.known else 1.0
        seen.speed += weight * (speed - seen.speed)
        seen.ratio += weight * (ratio - seen.ratio)
        seen.known = True

    def waited(self, rate: float) -> None:
        """We waited for the link, which carried `rate` bytes a second meanwhile."""
        self._quiet = 0
        self.link = rate if self.link is None else self.link + _WEIGHT * (rate - self.link)

    def did_not_wait(self) -> None:
        """A batch left without waiting."""
        self._quiet += 1
        if self.link is not None and self._quiet >= _QUIET:
            self._quiet = 0
            self.link *= _GROWTH
