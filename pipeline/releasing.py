"""--release-ram, at the source of a postcopy: its memory is given back while it arrives elsewhere.

Source (source.py) says when: never before the destination has confirmed that the guest runs there.
What may be given back, and in which order, is release.py's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..transport.errors import PostcopyFailed, UsageError
from ..transport.pages import PAGE_SIZE
from ..workers.guests.base import SourceGuest
from ..workers.page_table import PageTable
from ..workers.release import Release
from .migration import Migration

# So much of the event loop's time it may take: of each _TICK_SECONDS.
_TICK_SECONDS, _WORK_SECONDS = 0.05, 0.01


class Releasing:
    """Made with the page table. `core` and `guest` are told what is gone: the one says what can
    still be done with the guest here, the other what is left of it."""

    def __init__(self, guest: SourceGuest, table: PageTable, core: Migration) -> None:
        if not guest.can_release:
            raise UsageError(
                "release-ram is for guests whose memory is theirs alone (demo:, and qemu: with RAM "
                "in /dev/shm or a memfd): leave it out"
            )
        self._guest, self._core = guest, core
        self._release = Release(guest.blocks, table)

    async def keep_on(self) -> None:
        """Give back what is acknowledged, again and again. Runs until cancelled."""
        while True:
            if self._release.some(_WORK_SECONDS):
                self._note()
            await asyncio.sleep(_TICK_SECONDS)

    def everything(self) -> None:
        """It has all arrived. May take a second for each few GiB: call in a thread."""
        self._release.everything()
        self._note()

    def _note(self) -> None:
        self._guest.released = True
        self._core.released = self._release.pages

    def check(self) -> None:
        """After a page table was made of what the destination says it has: PostcopyFailed if it
        lacks what it had acknowledged."""
        if lacking := self._release.lacking():
            raise PostcopyFailed(
                f"the destination lacks {lacking} pages that it had said were there, and that were "
                f"given back here (--release-ram): end the guest there"
            )

    def report(self) -> dict[str, Any]:
        """For query-migrate."""
        return {"released-bytes": self._release.pages * PAGE_SIZE}
