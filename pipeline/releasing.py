"""--release-ram, at the source of a postcopy: its memory is given back while it arrives elsewhere.

Source (source.py) says when: never before the destination has confirmed that the guest runs there.
What may be given back, and in which order, is release.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from ..transport.errors import PageferryError, PostcopyFailed, UsageError
from ..transport.pages import PAGE_SIZE
from ..workers.guests.base import SourceGuest
from ..workers.hollow import HollowNote
from ..workers.page_table import PageTable
from ..workers.release import Release
from .migration import Migration

# So much of the event loop's time it may take: of each _TICK_SECONDS.
_TICK_SECONDS, _WORK_SECONDS = 0.05, 0.01

_log = logging.getLogger("pageferry")


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
        self._hollow, self._warned = HollowNote(guest.process), False
        self._spent = 0.0

    async def keep_on(self) -> None:
        """Give back what is acknowledged, again and again. Runs until cancelled, or until that
        fails, which is no reason for a postcopy to pause."""
        try:
            while True:
                with self._counted():
                    gone = self._may_begin() and self._release.some(_WORK_SECONDS)
                if gone:
                    self._tell()
                await asyncio.sleep(_TICK_SECONDS)
        except PageferryError as e:
            _log.warning("no more memory is given back (--release-ram) for now: %s", e)
            self._tell()  # some of it may have gone

    def everything(self) -> None:
        """It has all arrived. May take a second for each few GiB: call in a thread."""
        if self._may_begin():
            with self._counted():
                self._release.everything()
            self._tell()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Around work, in the thread that does it."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._spent += time.thread_time() - began

    def _may_begin(self) -> bool:
        """Whether it is noted what becomes of the guest here, for whoever comes when we were
        killed. First of all: so there is no hole without a note."""
        try:
            self._hollow.write()
        except OSError as e:
            if not self._warned:
                _log.warning(
                    "no memory is given back (--release-ram) as long as that cannot be noted in "
                    "%s: %s", e.filename, e.strerror
                )  # fmt: skip
            self._warned = True
            return False
        return True

    def _tell(self) -> None:
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

    def close(self, *, arrived: bool) -> None:
        """It is over. What has holes here, and has not `arrived`, stays noted. Idempotent."""
        if arrived or not self._guest.released:
            self._hollow.drop()

    def report(self) -> dict[str, Any]:
        """For query-migrate: bytes, and the milliseconds of processor time that it took. QEMU has
        no name for either."""
        return {
            "released-bytes": self._release.pages * PAGE_SIZE,
            "release-cpu-time": round(self._spent * 1000, 1),
        }
