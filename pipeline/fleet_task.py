"""A fleet's side of a batch at a host: `run_item` is the dask task of one item, and `exchange` what
the batch calls (`Client.run`) to tell it something and to hear how it goes.

Both run in the event loop of dask's worker and never block it: the migration is a process of its
own (fleet_source.py). Imports no dask: the functions are all that dask needs to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import time
import uuid
from collections import OrderedDict
from typing import Any

import msgspec

from .._version import __version__
from ..transport.errors import (
    Cancelled,
    ConfirmationLost,
    HostLacks,
    PageferryError,
    PeerLost,
    WorkerDied,
    as_ours,
    by_name,
)
from .blocking import to_its_end
from .fleet_attempt import BEGIN, HAND_OVER, LEASE_SECONDS, POLL_SECONDS, News, Orders

# A line of a source; the longest is its report.
_MOST_LINE = 16 << 20
# Runs that have ended are remembered, so that their batch does not take them for lost.
_REMEMBERED = 10_000
_LOOK_SECONDS = 1.0
# A source that has said its last word, or has nobody left to say it to, ends.
_END_SECONDS = 10.0

# The run whose it is; its report, or its error.
Outcome = tuple[str, dict[str, Any] | None, PageferryError | None]


class _Run:
    """One run of the task of one attempt, and what it and its batch say to each other."""

    def __init__(self, guest: str) -> None:
        self.guest = guest  # that runs, by its URI; "" for an image
        self.name = uuid.uuid4().hex
        self.asks = ""
        self.progress: dict[str, Any] | None = None
        self.orders = Orders()
        self.changed = asyncio.Event()  # the orders
        self.heard_at = time.monotonic()
        self.ended = asyncio.Event()

    @property
    def alone(self) -> bool:
        """No batch is there any more."""
        return time.monotonic() - self.heard_at > LEASE_SECONDS

    def obey(self, orders: Orders) -> None:
        self.heard_at = time.monotonic()
        if orders != self.orders:
            self.orders = orders
            self.changed.set()

    def ask(self, what: str) -> None:
        self.asks = what
        for waiting in _waiting:
            waiting.set()

    @property
    def news(self) -> News:
        return News(self.name, self.asks, self.progress)

    async def next_orders(self) -> None:
        """Until there are others, or it is time to look whether there still is a batch."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), _LOOK_SECONDS)
        self.changed.clear()

    async def _only_one(self) -> None:
        """A batch that was killed leaves a source that ends when its lease does: two of one guest
        would be in each other's way."""
        for other in list(_runs.values()):
            if self.guest and other.guest == self.guest and other is not self:
                while not (other.ended.is_set() or self.orders.cancel or self.alone):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(other.ended.wait(), _LOOK_SECONDS)

    async def may_begin(self) -> None:
        """Returns when the batch says so to this very run."""
        await self._only_one()
        self.ask(BEGIN)
        while True:
            orders = self.orders
            if orders.cancel:
                raise Cancelled
            if orders.begin and orders.run == self.name:
                self.asks = ""
                return
            if orders.begin or self.alone:
                raise PeerLost("dask ran this item again, or its batch has gone: nothing was begun")
            await self.next_orders()


_runs: OrderedDict[str, _Run] = OrderedDict()  # the last of each attempt
_waiting: set[asyncio.Event] = set()


async def exchange(token: str, said: bytes) -> bytes:
    """Tell the attempt `token` its Orders; its News, at once if it asks for something."""
    _less_logging()
    orders = msgspec.json.decode(said, type=Orders)
    run = _runs.get(token)
    if run is not None:
        run.obey(orders)
    asked = asyncio.Event()
    _waiting.add(asked)
    try:
        if not _urgent(token, orders):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), POLL_SECONDS)
    finally:
        _waiting.discard(asked)
    run = _runs.get(token)
    return msgspec.json.encode(run.news if run is not None else News())


def _urgent(token: str, orders: Orders) -> bool:
    """It asks what these orders do not answer, or it is not what they are for."""
    run = _runs.get(token)
    if run is None:
        return orders.begin
    answered = {BEGIN: orders.begin, HAND_OVER: orders.hand_over}.get(run.asks, True)
    return not (answered or orders.cancel)


async def run_item(token: str, version: str, job: bytes, guest: str = "") -> Outcome:
    """Move one item whose source is here (`job`: a fleet_source.Job as JSON; `guest`: the source's
    URI if that is a guest that runs). What becomes of it is returned: to dask a migration that
    failed is no failure."""
    run = _runs[token] = _Run(guest)
    _runs.move_to_end(token)
    while len(_runs) > _REMEMBERED and next(iter(_runs.values())).ended.is_set():
        _runs.popitem(last=False)
    try:
        if version != __version__:
            raise HostLacks(
                f"this host has pageferry {__version__}, and the batch {version}: install the same"
            )
        await run.may_begin()
        return run.name, await _Source(run).move(job), None
    except Exception as e:
        return run.name, None, as_ours(e)
    finally:
        run.ended.set()


class _Source:
    """The process that moves it, and what is said to it."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._told = Orders(run.name, begin=True, max_bandwidth=-1)  # what the job says is older
        self._outcome: dict[str, Any] | None = None

    async def move(self, job: bytes) -> dict[str, Any]:
        # its own session: Ctrl-C is the worker's, and that it ends is seen by the end of the pipe
        process = subprocess.Popen(
            [sys.executable, "-m", "pageferry.pipeline.fleet_source"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(_MOST_LINE)
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), process.stdout
        )
        writing, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        writing.write(job + b"\n")
        telling = asyncio.ensure_future(self._tell(writing))
        try:
            while line := await reader.readline():
                self._hear(json.loads(line))
        finally:  # if the worker closes: it sees that, and cancels its migration by itself
            telling.cancel()
            writing.close()
            code = await to_its_end(_end_of(process))
            reading.close()
        return self._judged(code)

    def _hear(self, said: dict[str, Any]) -> None:
        if "progress" in said:
            self._run.progress = said["progress"]
        elif "asks" in said:
            self._run.ask(said["asks"])
        else:
            self._outcome = said

    async def _tell(self, source: asyncio.WriteTransport) -> None:
        """New orders as they come; without a batch, that it is over."""
        while True:
            orders, told = self._run.orders, self._told
            if self._run.alone and not orders.hand_over:
                orders = msgspec.structs.replace(orders, cancel=True)
            what: dict[str, Any] = {}
            if orders.max_bandwidth != told.max_bandwidth:
                what["max-bandwidth"] = orders.max_bandwidth
            if orders.hand_over and not told.hand_over:
                what[HAND_OVER] = True
                self._run.asks = ""
            if orders.cancel and not told.cancel:
                what["cancel"] = True
            if what:
                source.write(json.dumps(what).encode() + b"\n")
            self._told = orders
            await self._run.next_orders()

    def _judged(self, code: int | None) -> dict[str, Any]:
        outcome = self._outcome
        if outcome is None:
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            if self._told.hand_over:
                raise ConfirmationLost(
                    f"the source process of this guest died ({how}) while it was being handed "
                    f"over: look where it runs"
                )
            raise WorkerDied(f"the source process died ({how})")
        if "report" in outcome:
            report: dict[str, Any] = outcome["report"]
            return report
        said = outcome["error"]
        error = by_name(said["class"], said["message"])
        error.data |= said["data"]
        raise error


async def _end_of(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code; None if it takes long."""
    try:
        return await asyncio.to_thread(process.wait, _END_SECONDS)
    except subprocess.TimeoutExpired:
        return None


class _NotThis(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return exchange.__name__ not in record.getMessage()


def _less_logging() -> None:
    """Dask's worker logs each call of `exchange`, twice a second and item."""
    logger = logging.getLogger("distributed.worker")
    if not any(isinstance(known, _NotThis) for known in logger.filters):
        logger.addFilter(_NotThis())
