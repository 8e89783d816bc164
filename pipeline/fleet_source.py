"""The source of one item of a fleet, a process that a dask worker starts (`python -m
pageferry.pipeline.fleet_source`): an ordinary migration, told what to do on stdin, and telling how
it goes on stdout.

A process of its own: dask's worker has an event loop, signals and a nanny of its own, may not have
children, and may be killed. When the worker ends, however, stdin does too: the migration is
cancelled, and its guest goes on here. One JSON object a line; what it reads: first the job, then
{"hand-over": true}, {"cancel": true}, {"max-bandwidth": N}. What it writes: {"progress": report},
{"asks": "hand-over"}, and last {"report": …} or {"error": …}. Knows nothing of dask.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import replace
from typing import Any

import msgspec

from ..transport.errors import Cancelled, PageferryError, PeerLost, as_ours
from ..transport.links import parse_endpoint
from ..workers.guests import parse_guest
from . import api
from .destination import Destination
from .fleet_attempt import HAND_OVER, SILENT_SECONDS
from .manifest import Item
from .parameters import default_workers
from .source import Source

# A worker that reads nothing for a while misses a few looks at it.
_MOST_UNREAD = 1 << 16


class Job(msgspec.Struct, frozen=True):
    """An item as it is given to its host. `max_bandwidth`: its share to begin with, bytes a second;
    `together`: how many items may be under way at this host, which share its processors."""

    item: Item
    max_bandwidth: int = 0
    together: int = 1


class Remote:
    """One migration between two pipes."""

    def __init__(self, orders: asyncio.StreamReader, news: asyncio.WriteTransport) -> None:
        """`orders` has whole lines, `news` is closed at the end."""
        self._orders, self._news = orders, news
        self._allowed = asyncio.Event()
        self._migration: Source | None = None
        self._moving: asyncio.Task[dict[str, Any]] | None = None
        self._limit = 0
        self._cancelled = False

    async def run(self) -> None:
        """From the job to the last word."""
        job = msgspec.json.decode(await self._orders.readline(), type=Job)
        self._limit = job.max_bandwidth
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._cancel)
        self._moving = asyncio.ensure_future(self._move(job))
        listening = asyncio.ensure_future(self._listen())
        try:
            self._say({"report": await self._moving})
        except asyncio.CancelledError:
            self._say(_last_words(Cancelled()))
        except Exception as e:
            self._say(_last_words(as_ours(e)))
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            self._news.close()

    async def _move(self, job: Job) -> dict[str, Any]:
        item = job.item
        p = replace(item.parameters(), max_bandwidth=self._limit)
        if not p.workers:
            p = replace(p, workers=max(1, default_workers() // max(1, job.together)))
        how: dict[str, Any] = {
            "on_progress": self._progress, "on_started": self._started, "name": item.name,
        }  # fmt: skip
        if item.to_receiver:
            return await api.send(item.guest, parse_endpoint(item.destination), p, **how)
        return await api.copy(item.guest, parse_guest(item.destination), p, **how)

    def _started(self, migration: Source | Destination) -> None:
        assert isinstance(migration, Source)
        self._migration = migration
        migration.set_parameters({"max-bandwidth": self._limit})  # meanwhile
        migration.before_stop = self._ask
        if self._cancelled:
            migration.cancel()

    async def _ask(self) -> None:
        """The guest runs on until the batch has written down that it is being handed over."""
        self._say({"asks": HAND_OVER})
        try:
            await asyncio.wait_for(self._allowed.wait(), SILENT_SECONDS)
        except TimeoutError:
            raise PeerLost("the batch does not answer: the guest stays here") from None

    def _progress(self, report: dict[str, Any]) -> None:
        if self._news.get_write_buffer_size() < _MOST_UNREAD:
            self._say({"progress": report})

    def _say(self, what: dict[str, Any]) -> None:
        self._news.write(json.dumps(what, default=str).encode() + b"\n")

    async def _listen(self) -> None:
        while line := await self._orders.readline():
            order = json.loads(line)
            if "max-bandwidth" in order:
                self._limit = order["max-bandwidth"]
                if self._migration is not None:
                    self._migration.set_parameters({"max-bandwidth": self._limit})
            if order.get(HAND_OVER):
                self._allowed.set()
            if order.get("cancel"):
                self._cancel()
        self._cancel()  # the worker has gone

    def _cancel(self) -> None:
        self._cancelled = True
        if self._migration is not None:
            self._migration.cancel()
        elif self._moving is not None:
            self._moving.cancel()


def _last_words(error: PageferryError) -> dict[str, Any]:
    return {"error": {"class": type(error).__name__, "message": error.message, "data": error.data}}


class _Writing(asyncio.BaseProtocol):
    """Knows when everything was written, or nobody reads any more."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


async def _main(orders: int, news: int) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(orders, "rb", buffering=0)
    )
    transport, writing = await loop.connect_write_pipe(_Writing, os.fdopen(news, "wb", buffering=0))
    await Remote(reader, transport).run()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(writing.over.wait(), SILENT_SECONDS)


def main() -> None:
    """stdin and stdout become ours alone: what somebody prints goes to stderr, and no process that
    is started here keeps them open."""
    orders, news = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    asyncio.run(_main(orders, news))


if __name__ == "__main__":
    main()
