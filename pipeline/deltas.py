"""The source's side of `--codec xbzrle`: the cache of pages sent before, round by round, and what
query-migrate says of it (QEMU's XBZRLECacheStats)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..transport.errors import HostLacks
from ..transport.pages import PAGE_SIZE
from ..workers.counters import Counters, FrozenCounters
from ..workers.page_cache import PageCache
from ..workers.page_table import DIRTY, PageTable

# Pages looked at between two turns of the event loop: some tens of milliseconds.
_STEP = 1 << 20
_FIELDS = ("xbzrle_pages", "xbzrle_bytes", "xbzrle_misses")
_Reading = tuple[int, int, int]
_log = logging.getLogger("pageferry")


class Deltas:
    """One migration's. `pages`: of each block."""

    def __init__(self, pages: list[int], size: int) -> None:
        """HostLacks if there is no room."""
        self._blocks = pages
        self.size = size  # what was asked for
        self._taken = PAGE_SIZE
        self.cache = PageCache(sum(pages))
        try:
            self.cache.look_for_room(size)
        except HostLacks:
            self.cache.close()
            raise
        self._base: _Reading = (0, 0, 0)
        self._rates = (0.0, 0.0)

    def __repr__(self) -> str:
        return f"<Deltas {self.cache!r}>"

    def resize(self, size: int) -> None:
        """From the next round on; HostLacks, and nothing has changed, if there is no room."""
        self.cache.look_for_room(size)
        self.size = size

    def begin_round(self, number: int, table: PageTable, counters: Counters) -> Iterator[None]:
        """Give slots to the pages of the round that begins, with pauses for others to have a turn.
        While the guest stands still, call nothing: what is sent then is not sent again."""
        self._rates = self._rates_since(counters)
        self._base = _read(counters)
        yield from self._take(number)
        before = 0
        for block, pages in enumerate(self._blocks):
            for first in range(0, pages, _STEP):
                # no view of the table is kept between two turns
                dirty = np.flatnonzero(table.view(block)[first : first + _STEP] == DIRTY)
                self.cache.assign(number, dirty + (before + first))
                yield
            before += pages

    def _take(self, number: int) -> Iterator[None]:
        """Have as many slots as were asked for. Where there is no room any more, in the first round
        it is an error, and later there are as many as before."""
        if (size := self.size) == self._taken:
            return
        try:
            yield from self.cache.make_room(size)
        except HostLacks as e:
            if number == 1:
                raise
            _log.warning("xbzrle-cache-size stays %d: %s", self._taken, e)
            self.size = self._taken
            return
        self.cache.use_room()
        self._taken = size

    def _rates_since(self, counters: Counters | FrozenCounters) -> tuple[float, float]:
        """cache-miss-rate and encoding-rate of this round, or of the last if it has none yet."""
        pages, size, misses = (
            now - then for now, then in zip(_read(counters), self._base, strict=True)
        )
        if not pages + misses:
            return self._rates
        return misses / (pages + misses), pages * PAGE_SIZE / size if size else 0.0

    def report(self, counters: Counters | FrozenCounters | None) -> dict[str, Any]:
        """`xbzrle-cache` of query-migrate. Bytes are those of deltas before another codec packs
        them, and of pages that overflowed; rates are those of the round."""
        if counters is None:
            return {}
        miss_rate, encoding_rate = self._rates_since(counters)
        pages, size, misses = _read(counters)
        return {
            "xbzrle-cache": {
                "cache-size": self.size,
                "bytes": size,
                "pages": pages,
                "cache-miss": misses,
                "cache-miss-rate": round(miss_rate, 4),
                "encoding-rate": round(encoding_rate, 2),
                "overflow": counters.total("xbzrle_overflow"),
            }
        }

    def drop(self) -> Iterator[None]:
        """In a postcopy there are none, and memory is short: nothing is kept any more. When no
        sender touches the cache again, with pauses for others to have a turn."""
        yield from self.cache.drop()

    def close(self) -> None:
        self.cache.close()


def _read(counters: Counters | FrozenCounters) -> _Reading:
    pages, size, misses = (counters.total(field) for field in _FIELDS)
    return pages, size, misses
