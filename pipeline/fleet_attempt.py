"""One attempt of an item whose source is at another host, as the batch sees it: what it may be told
there, and what is true of it when that host is lost. Pure.

Both sides say all they have to say each time (`Orders`, `News`), so whatever is lost or said twice
does no harm. Dask runs a task of a lost worker again by itself, so each run of the task has a name
of its own and asks before it begins: an attempt is begun by one run only. A guest that runs asks a
second time, before it is stopped: by then the batch has written down that it is being handed over.
"""

from __future__ import annotations

import enum

import msgspec

from ..transport.errors import Cancelled, ConfirmationLost, PageferryError, PeerLost

# A run of the task that hears nothing for so long is alone: it cancels its migration.
LEASE_SECONDS = 10.0
# A worker that answers nothing for so long is lost, as the batch sees it; and a guest that waits so
# long for leave to be handed over stays where it is.
SILENT_SECONDS = 10.0
# How long a worker keeps an answer back if it has nothing new to say.
POLL_SECONDS = 0.5

BEGIN, HAND_OVER = "begin", "hand-over"
RESOURCE_PREFIX = "pageferry-"


def resource(host: str) -> str:
    """What a dask worker at `host` has (`dask worker --resources NAME=1000`)."""
    return f"{RESOURCE_PREFIX}{host}"


class Orders(msgspec.Struct, frozen=True):
    """What the batch says. `run`: the run that is meant, "" if none is known yet; `max_bandwidth`:
    bytes a second, 0 without limit."""

    run: str = ""
    begin: bool = False
    hand_over: bool = False
    cancel: bool = False
    max_bandwidth: int = 0


class News(msgspec.Struct, frozen=True):
    """What the worker says. `run`: the task's last run there, "" if there was none; `asks`: for
    leave to do what, "" if for nothing; `progress`: query-migrate's report."""

    run: str = ""
    asks: str = ""
    progress: dict[str, object] | None = None


class Heard(enum.Enum):
    """What follows from news."""

    NOTHING = enum.auto()
    ASKS_TO_HAND_OVER = enum.auto()  # write it down, then `may_hand_over`
    LOST = enum.auto()  # nobody there knows of the run that was begun


class Attempt:
    """What one attempt was told. `handed_over`: the guest may run at its destination, unless its
    source says otherwise."""

    def __init__(self, max_bandwidth: int) -> None:
        self.orders = Orders(max_bandwidth=max_bandwidth)

    @property
    def begun(self) -> bool:
        return self.orders.begin

    @property
    def handed_over(self) -> bool:
        return self.orders.hand_over

    def heard(self, news: News) -> Heard:
        """Take what a worker says into account."""
        if not news.run:
            return Heard.LOST if self.begun else Heard.NOTHING
        if self.begun and news.run != self.orders.run:
            return Heard.LOST  # dask has begun it anew, and that run is never told to begin
        if not self.orders.cancel:
            if news.asks == BEGIN and not self.begun:
                self._say(run=news.run, begin=True)
            elif news.asks == HAND_OVER and self.begun and not self.handed_over:
                return Heard.ASKS_TO_HAND_OVER
        return Heard.NOTHING

    def is_mine(self, run: str) -> bool:
        """What this run has come to is what has become of the attempt: no other was begun."""
        return not self.begun or run == self.orders.run

    def may_hand_over(self) -> None:
        """It has been written down."""
        self._say(hand_over=True)

    def cancel(self) -> None:
        """Once it may be handed over, that is for its source to decide."""
        self._say(cancel=True)

    def limit(self, max_bandwidth: int) -> None:
        """Bytes a second, 0 without limit."""
        self._say(max_bandwidth=max_bandwidth)

    def _say(self, **changes: object) -> None:
        self.orders = msgspec.structs.replace(self.orders, **changes)

    def lost(self, where: str, why: str) -> PageferryError:
        """What is true of it if nobody can say any more how it ended."""
        if self.handed_over:
            return ConfirmationLost(
                f"{where} was lost ({why}) while this guest was being handed over: it may run at "
                f"its destination. Look where it runs; if that is at its source, "
                f"`batch resume --retry NAME` moves it again"
            )
        if self.orders.cancel:
            return Cancelled()
        return PeerLost(f"{where} was lost: {why}")
