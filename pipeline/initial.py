"""Which pages are sent of a guest at all: what holds something, but for what the destination has.

Knows the guest's memory and what the destination said of its own. Must not know how pages are sent,
nor of those that are written later (rounds.py).
"""

from __future__ import annotations

import asyncio
from itertools import zip_longest

import numpy as np

from ..transport import messages
from ..transport.errors import RemoteProtocolError
from ..transport.pages import PAGE_SIZE, Bytes8, Pages, Runs, complement, runs_of, total_pages
from ..workers.content import both_digests, sure_digests, take_digests
from ..workers.digest import CHUNK_PAGES, equal_chunks
from ..workers.guests.base import SourceGuest
from ..workers.page_table import CLEAN, PageTable
from .blocking import Blocking
from .control import Ask
from .statistics import Statistics

# Pages in one Contents message.
_COMPARED_PAGES = 8192
# Runs in one Discard message, or Missing.
DISCARD_RUNS = 65536


class InitialPages:
    """One migration's. `call`: for what blocks; `ask`: the destination."""

    def __init__(
        self, guest: SourceGuest, call: Blocking, ask: Ask, statistics: Statistics
    ) -> None:
        self._guest, self._call, self._ask, self._statistics = guest, call, ask, statistics
        self.kept: list[list[bool]] = []  # chunks of each block that the destination has
        self._fresh: list[bool] = []
        self._have: list[bytes] = []  # digests of what the destination has already
        self._compares = False

    def offered(self, welcome: messages.Welcome) -> None:
        """What the destination says of its memory. RemoteProtocolError if it is another one's."""
        n = len(self._guest.blocks)
        if len(welcome.fresh) != n or len(welcome.have) not in (0, n):
            raise RemoteProtocolError("Welcome does not match what was asked for")
        self._fresh, self._have = welcome.fresh, welcome.have
        self._compares = welcome.compares

    @property
    def already_there(self) -> int:
        """Pages that are left out, holes not."""
        return int(self._statistics.extra.get("pages-already-there", 0))

    def _note_there(self, pages: int) -> None:
        self._statistics.extra["pages-already-there"] = pages

    async def mark(self, table: PageTable) -> None:
        """DIRTY, what is to be sent; the destination clears what is a hole here."""
        self.kept = [[False] * -(-block.pages // CHUNK_PAGES) for block in self._guest.blocks]
        for i, block in enumerate(self._guest.blocks):
            runs = await self._call(self._guest.initial_pages, i)
            table.mark_dirty(i, runs)
            self._statistics.hole_pages += block.pages - total_pages(runs)
            there = self._fresh[i]
            if self._have and not self._guest.live:
                there = await self._leave_out_what_is_there(table, i)
            if not there:
                await self._discard(i, complement(runs, block.pages))
            if self._compares and not self._guest.live:
                await self._leave_out_what_is_elsewhere(table, i)

    async def _leave_out_what_is_there(self, table: PageTable, index: int) -> bool:
        """Chunks that the destination has, by their digests, are not sent; True if that is all."""
        block = self._guest.blocks[index]
        equal = self.kept[index] = await self._call(equal_chunks, block, self._have[index])
        before, view = table.remaining(), table.view(index)
        for chunk, same in enumerate(equal):
            if same:
                view[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES] = CLEAN
        self._note_there(self.already_there + before - table.remaining())
        return all(equal)

    async def _leave_out_what_is_elsewhere(self, table: PageTable, index: int) -> None:
        """Pages that the destination can find among other images are not sent."""
        block = self._guest.blocks[index]
        # no view of the table is kept: an error of the peer would keep it beyond the table
        dirty = np.flatnonzero(table.view(index) != CLEAN)
        dirty = dirty[dirty < block.size // PAGE_SIZE]
        known = self.already_there
        parts = [dirty[at : at + _COMPARED_PAGES] for at in range(0, len(dirty), _COMPARED_PAGES)]
        ahead = await self._call(both_digests, block, dirty[:_COMPARED_PAGES], False)
        for pages, following in zip_longest(parts, parts[1:], fillvalue=dirty[:0]):
            digests, sure = ahead
            found = np.flatnonzero(await self._ask_for(index, pages, digests))
            sure = take_digests(sure, found) if sure else b""
            if len(found) and not sure:
                sure = await self._call(sure_digests, block, pages[found])
            # while the destination makes those, we look at what follows: more of the same, if any
            look = self._call(both_digests, block, following, 2 * len(found) > len(pages))
            if not len(found):
                ahead = await look
                continue
            held, ahead = await asyncio.gather(
                self._ask_for(index, pages[found], take_digests(digests, found), sure), look
            )
            table.view(index)[pages[found[held != 0]]] = CLEAN
            known += int(np.count_nonzero(held))
        self._note_there(known)

    async def _ask_for(self, index: int, pages: Pages, digests: bytes, sure: bytes = b"") -> Bytes8:
        """Which of these pages the destination may have; with `sure`, has."""
        starts, counts = runs_of(pages)
        held = await self._ask(
            messages.Contents(index, starts.tolist(), counts.tolist(), digests, sure)
        )
        assert isinstance(held, messages.Held)
        if len(held.bits) != -(-len(pages) // 8):
            raise RemoteProtocolError("Held does not match what was asked for")
        return np.unpackbits(np.frombuffer(held.bits, np.uint8), count=len(pages))

    async def _discard(self, block: int, runs: Runs) -> None:
        starts, counts = runs
        for at in range(0, len(starts), DISCARD_RUNS):
            part = slice(at, at + DISCARD_RUNS)
            await self._ask(messages.Discard(block, starts[part].tolist(), counts[part].tolist()))
