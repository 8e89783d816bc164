"""The one protocol behind which every guest stands. Coordinators know this and no more.

A source guest lends its RAM blocks and says which pages were written; a destination guest
lays out blocks for what was announced, and becomes whole or leaves no trace. Methods may
block for a while: coordinators call them off their event loop.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

from ...transport.errors import SourceError
from ...transport.messages import Block, Hello, SharedBlock
from ...transport.pages import PAGE_SIZE, Bytes8, Pages, Runs
from ..kernel.huge import may_be_huge
from ..kernel.userfaultfd import unregister, wake
from ..ram import RamBlock

# How writes are found, in order of preference.
TRACKING_NONE = "none"  # nobody writes
TRACKING_PAGEMAP = "pagemap-scan"  # userfaultfd WP_ASYNC + PAGEMAP_SCAN: exact, cheap
TRACKING_HASH = "content-hash"  # reads everything each round


@dataclass(frozen=True)
class Region:
    """Pages [first, first + pages) of `block` are at `address` in the guest's address space, on
    host pages of `page_size` bytes."""

    block: int
    first: int
    pages: int
    address: int
    page_size: int


class ArmedMemory:
    """A guest's memory whose missing pages are caught: who touches one sleeps until it is
    installed through `uffd`. Owns the descriptor; pickles into workers, taking it along."""

    def __init__(self, uffd: int, regions: list[Region]) -> None:
        self.uffd = uffd
        self.regions = regions
        self.armed = True

    def __repr__(self) -> str:
        return f"<ArmedMemory uffd={self.uffd} {len(self.regions)} regions>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attach_memory, (DupFd(self.uffd), self.regions))

    def disarm(self) -> None:
        """Nothing is caught any more: what is missing is zero, as any hole is. Wakes who sleeps.

        In this order: the kernel (Linux 6.18) wakes sleepers before it lets go of a range, and who
        touches in between sleeps again. OSError if one region cannot be let go of (it is mapped no
        more); the others are.
        """
        self.armed = False
        error: OSError | None = None
        for act in (unregister, wake):
            for region in self.regions:
                try:
                    act(self.uffd, region.address, region.pages * PAGE_SIZE)
                except OSError as e:
                    error = error or e
        if error is not None:
            raise error

    def close(self) -> None:
        """Idempotent. Memory stays armed while its owner holds a descriptor too."""
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1


def _attach_memory(dup: Any, regions: list[Region]) -> ArmedMemory:
    return ArmedMemory(dup.detach(), regions)


class Patience:
    """How long a call on a guest may still wait for it. Calls are made in threads, which nobody can
    end; so whoever waits in one looks every LOOK_SECONDS whether somebody is in a `hurry`."""

    LOOK_SECONDS = 0.05
    # What a guest that answers needs, also in a hurry.
    LEAST_SECONDS = 0.5

    def __init__(self) -> None:
        self.hurried = False

    def over(self, began: float, seconds: float) -> bool:
        """Whether a wait of `seconds` since `began` (time.monotonic) is over."""
        return time.monotonic() - began > (
            min(seconds, self.LEAST_SECONDS) if self.hurried else seconds
        )

    def hurry(self) -> None:
        self.hurried = True


class SourceGuest(ABC):
    """A guest that is to leave.

    `live`: somebody may be writing right now. `can_stop`: `stop` makes that end; a guest that
    cannot be stopped is moved when a whole scan finds nothing changed. `can_quit`: it can be
    ended once it has moved. `can_throttle`: it can be slowed down. `last_look_by_content`:
    `dirty_pages` may miss some, so when it is stopped all memory is compared with what was sent.
    """

    kind: str
    blocks: list[RamBlock]
    tracking: str = TRACKING_NONE
    last_look_by_content: bool = False
    live: bool = False
    can_stop: bool = False
    can_quit: bool = False
    can_throttle: bool = False
    running: bool = False
    image_size: int = 0
    # Its memory is its alone, and can be given back once it runs elsewhere; some of it was.
    can_release: bool = False
    released: bool = False
    # Its own, if it has one; a destination of another is not meant.
    uuid: str = ""
    # Blocks that are not in `blocks`, because the destination has them in the same file.
    shared: Sequence[SharedBlock] = ()
    # What a destination must know beyond the usual (transport/messages.py).
    capabilities: tuple[str, ...] = ()
    # Whose memory it is, if that is another process: it is read, and stopped, until the end.
    process: int = 0
    # It is saved and goes on here, whatever comes; so does a process that nobody let go on.
    stays: bool = False
    # When it was told to stop (CLOCK_MONOTONIC, seconds), if `stop` does more before; else 0.
    stopped_at: float = 0.0

    def facts(self) -> dict[str, Any]:
        """What the statistics say of it from the start."""
        return {}

    def start_tracking(self) -> None:
        """From now on writes are seen. Called once, before `initial_pages`."""

    def initial_pages(self, block: int) -> Runs:
        """Pages of a block that hold anything; the others are known to be zero."""
        return self.blocks[block].data_runs()

    def dirty_pages(self, block: int) -> Runs:
        """Pages written since the last call, or since `start_tracking` (get and clear)."""
        raise NotImplementedError

    def written_so_far(self) -> int | None:
        """How many pages `dirty_pages` would have, about, if that can be known in a few
        milliseconds a GiB. Not at the same time as `dirty_pages`."""
        return None

    def settle(self) -> None:
        """Writes that had begun when pages were last taken (a device's) have ended when this
        returns. Called before those pages are read, unless it is stopped."""

    def throttle(self, percentage: int) -> None:
        """It loses so much of its time from now on; 0: nothing. Without effect on one that was
        stopped: `stop` ends it for good. HostLacks if that cannot be done. Only if
        `can_throttle`."""
        raise NotImplementedError

    def slowed(self) -> dict[str, Any]:
        """How it was slowed down and what that did (slowing.py); nothing if it never was. Quick."""
        return {}

    def helpers(self) -> list[dict[str, Any]]:
        """What processes of its own have cost so far (slowing.py), as in `processes` of a report.
        Quick."""
        return []

    def stop(self) -> None:
        """No write happens after this returns. Idempotent."""

    def resume(self) -> None:
        """Undo `stop`. Idempotent; never called once the destination may be running."""

    def protect(self) -> ArmedMemory:
        """Its memory, registered so that writes can be held back (kernel/userfaultfd.py), whoever
        makes them; nothing is protected yet. Once; writes are tracked no more. AttachError,
        HostLacks, SourceError: why that cannot be."""
        raise SourceError(
            "nobody is known whose writes could be held back: say who writes this memory "
            "(ram:PATH?pid=PID), or leave out --live"
        )

    def moved(self) -> None:
        """The destination was told to run: what was set here for the move can be set back."""

    def save_state(self) -> bytes:
        """Everything of the guest that is not RAM, as sections called as its kind (states.py); b""
        if there is nothing. Called when stopped."""
        return b""

    def check(self) -> None:
        """Raise SourceError if it has ended. Quick: asked several times a second."""

    def check_stopped(self) -> None:
        """Raise SourceError if somebody lets it go on, or has: its memory is still being sent. It
        may have ended. Quick."""

    def yank(self) -> None:
        """A guest that does not answer is not waited for any more: calls that are under way in
        other threads, and all that follow, end soon. `resume` is still to be tried."""
        for block in self.blocks:
            block.file.given_up = True

    def quit(self) -> None:
        """It has moved for good: end what is left of it here. Only if `can_quit`."""

    def describe(self) -> dict[str, Any]:
        """What is left of it here, for the result."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Idempotent. A guest that was stopped stays stopped."""


class DestinationGuest(ABC):
    """A guest that is to arrive."""

    kind: str
    blocks: list[RamBlock]
    fresh: list[bool]  # this block reads as zero everywhere
    have: Sequence[bytes] = ()  # digests of what it holds already (digest.py), a string a block
    compares = False  # `held` finds pages that it has elsewhere
    # Its `load_state` takes sections that nobody knows here, too: it keeps them, and loads none.
    keeps_sections = False
    validate_uuid = True  # whether one that has a uuid takes only the guest of that
    # Whether somebody may give its pages back (a balloon) while others still arrive.
    gives_back = True
    # Its memory, armed before anything can touch it; only if hello.capabilities has POSTCOPY.
    memory: ArmedMemory | None = None

    @abstractmethod
    def lay_out(self, hello: Hello) -> None:
        """Make RAM for `hello.blocks`, or raise: DestinationTooSmall, PeerRefused, …

        If `hello.capabilities` has POSTCOPY: also arm `memory`, or raise PeerRefused.
        """

    def may_hold(self, block: int, pages: Pages, digests: bytes) -> Bytes8:
        """1 for each of those pages that it may have somewhere, by digests to look for them
        (content.py). Only if `compares`."""
        raise NotImplementedError

    def held(self, block: int, pages: Pages, digests: bytes, sure: bytes) -> Bytes8:
        """Make those pages that it can find elsewhere, by digests to look for and those that decide
        (content.py); 1 for each that is there now. Only if `compares`."""
        raise NotImplementedError

    def may_be_huge(self, block: int) -> bool:
        """Whether a block may be on transparent huge pages (kernel/huge.py)."""
        return may_be_huge(self.blocks[block].file.fd)

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        """Take the device state (sections of a guest of `kind`, b"" for none) and make everything
        durable. All pages have arrived, but in a postcopy. `running`: whether `run` is to let it
        run."""

    def check(self) -> None:
        """Raise GuestGone if it has ended. Quick: asked several times a second."""

    @abstractmethod
    def run(self) -> str:
        """Make it whole and let it run; says where it is. Quick: the source waits."""

    def started(self) -> None:
        """It runs, and the source was told so: what was set for the move can be set back."""

    def arrived(self) -> None:
        """After `run`, in postcopy: all of its memory is here. GuestGone if it does not run even
        so. May wait for it."""

    def conclude(self) -> dict[str, Any]:
        """After `run`: what can be said about it. May let the guest run on for a while."""
        return {}

    def hurry(self) -> None:
        """It will not arrive: a call that is under way in another thread is to end soon."""

    def yank(self) -> None:
        """As `hurry`, and it is not waited for in what follows either."""
        for block in getattr(self, "blocks", ()):
            block.file.given_up = True
        self.hurry()

    @abstractmethod
    def discard(self) -> None:
        """It will not arrive: leave nothing that looks whole. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Idempotent."""


def layout_size(blocks: list[Block], image_size: int) -> int:
    """Bytes of a file that holds `blocks` at their offsets."""
    return max([image_size, *(block.offset + block.size for block in blocks)])
