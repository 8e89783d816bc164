"""The hosts of a batch whose sources are elsewhere, as workers of a Dask scheduler.

An item is a task at a worker of its host. Through dask go its description, progress, limits, a
cancel and the outcome; memory goes from that host to the item's destination as ever. The batch
keeps all decisions: dask is told to try nothing again, and what it does all the same is found out
(fleet_attempt.py). Only this module imports dask, and only when it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from .._version import __version__
from ..transport.errors import (
    Cancelled,
    ConnectError,
    HostLacks,
    PageferryError,
    PeerLost,
)
from .fleet_attempt import POLL_SECONDS, SILENT_SECONDS, Attempt, Heard, News, resource
from .fleet_source import Job
from .fleet_task import exchange, run_item
from .manifest import Item

# Until a scheduler answers.
CONNECT_SECONDS = 10.0
# An item whose host has no worker waits for one, and then it has failed.
NO_WORKER_SECONDS = 30.0
# A worker that does not answer for so long is looked for at the scheduler: if it is known no more,
# nobody waits for the rest of SILENT_SECONDS. Dask itself dials a dead worker for 30 s.
_ANSWER_SECONDS = POLL_SECONDS + 2.0
# What the scheduler said of its workers is true for so long.
_FRESH_SECONDS = 0.5
# A batch that is abandoned waits so long for a source that may be handing over its guest.
_LAST_WORDS_SECONDS = 3.0

_ANEW = "it was started anew"

T = TypeVar("T")


def check_dask() -> None:
    """HostLacks if it is not installed."""
    try:
        import distributed  # noqa: F401
    except ImportError as e:
        raise HostLacks("--fleet needs Dask distributed: pip install 'pageferry[fleet]'") from e


class Fleet:
    """A scheduler and the workers that it knows. `on_lost(error)`: it has gone, and the batch with
    it."""

    def __init__(self, client: Any, address: str) -> None:
        self.address = address
        self.client = client
        self.on_lost: Callable[[PageferryError], None] | None = None
        self.together: dict[str, int] = {}  # by host: how many items at once, at most
        self._workers: dict[str, frozenset[str]] = {}  # address -> resources
        self._looked_at = -_FRESH_SECONDS
        self._looking = asyncio.Lock()
        self._lost = False
        self._busy: Counter[str] = Counter()  # attempts of ours by worker
        self._tried: Counter[tuple[int, str]] = Counter()  # in vain, by item and host

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, address: str) -> AsyncIterator[Fleet]:
        """Connect to the scheduler at `address`. HostLacks, ConnectError."""
        check_dask()
        from distributed import Client

        for name in ("distributed", "distributed.client", "distributed.comm", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is an error of ours
        client = Client(
            address, asynchronous=True, set_as_default=False, timeout=CONNECT_SECONDS,
            name="pageferry-batch",
        )  # fmt: skip
        try:
            await client
        except (OSError, ValueError, TimeoutError) as e:
            await _quietly(client.close())
            raise ConnectError(
                f"no dask scheduler answers at {address} ({e}): start one with `dask scheduler`"
            ) from e
        try:
            yield cls(client, address)
        finally:
            await _quietly(client.close())

    # ---- workers -------------------------------------------------------------------------

    async def ask(self, call: Coroutine[Any, Any, T], seconds: float) -> T:
        """A call through the scheduler. PeerLost if the answer does not come, as soon as that is
        known: dask would dial a scheduler that has gone for a while."""
        asking = asyncio.ensure_future(call)
        end = time.monotonic() + seconds
        try:
            while not asking.done() and self._connected and time.monotonic() < end:
                await asyncio.wait({asking}, timeout=min(seconds, _FRESH_SECONDS))
        finally:
            asking.cancel()
        if not asking.done():
            raise PeerLost("no answer")
        try:
            return asking.result()
        except Exception as e:  # dask's own, OSError: all the same to us
            raise PeerLost(f"{type(e).__name__} {e}".strip()) from e

    @property
    def _connected(self) -> bool:
        return bool(self.client.status == "running")

    async def workers(self) -> dict[str, frozenset[str]]:
        """What resources of ours each worker has, by its address. PeerLost without a scheduler, and
        then the batch is told."""
        async with self._looking:
            if self._lost or time.monotonic() - self._looked_at < _FRESH_SECONDS:
                self._check()
                return self._workers
            try:
                said = await self.ask(self.client.scheduler.identity(), SILENT_SECONDS)
            except PeerLost:
                self._lost = True
            self._check()
            self._workers = {
                address: frozenset(r for r, amount in known["resources"].items() if amount >= 1)
                for address, known in said["workers"].items()
            }
            self._looked_at = time.monotonic()
            return self._workers

    def _check(self) -> None:
        self._lost = self._lost or not self._connected
        if self._lost:
            error = PeerLost(f"the dask scheduler at {self.address} has gone")
            if self.on_lost is not None:
                self.on_lost(error)
            raise error

    @property
    def lost(self) -> bool:
        """There is no scheduler any more."""
        return self._lost

    async def place(self, number: int, hosts: Sequence[str]) -> tuple[str, str] | None:
        """A host for item `number`, and the address of a worker of it; None if none has one. The
        first host that has one, but those where it was tried in vain come last."""
        workers = await self.workers()
        for host in sorted(hosts, key=lambda host: self._tried[number, host]):
            there = [address for address, has in workers.items() if resource(host) in has]
            if there:
                return host, min(there, key=lambda address: (self._busy[address], address))
        return None

    # ---- items ---------------------------------------------------------------------------

    def share(self, items: Iterable[Item], parallel: int) -> None:
        """The items of this fleet, of which `parallel` run at once: those of one host have together
        the processors that one migration has by default."""
        count = Counter(item.hosts[0] for item in items if item.hosts)
        self.together = {host: min(n, parallel) for host, n in count.items()}

    def elsewhere(
        self,
        number: int,
        item: Item,
        max_bandwidth: int,
        on_hand_over: Callable[[], None],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> Elsewhere:
        """One attempt of `item`, to be run. `on_hand_over`: writes down that its guest is being
        handed over; if it raises, that is not done."""
        return Elsewhere(self, number, item, max_bandwidth, on_hand_over, on_progress)

    @contextlib.contextmanager
    def at(self, number: int, host: str, address: str) -> Iterator[None]:
        """While item `number` is tried there."""
        self._busy[address] += 1
        try:
            yield
        except BaseException:
            self._tried[number, host] += 1
            raise
        finally:
            self._busy[address] -= 1


class Elsewhere:
    """One attempt of an item at a host of a fleet. As a Source, it can be cancelled and have other
    limits while it runs."""

    def __init__(
        self,
        fleet: Fleet,
        number: int,
        item: Item,
        max_bandwidth: int,
        on_hand_over: Callable[[], None],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self._fleet = fleet
        self._number = number
        self._item = item
        self._attempt = Attempt(max_bandwidth)
        self._on_hand_over = on_hand_over
        self._on_progress = on_progress
        self._token = f"pageferry-{item.name}-{secrets.token_hex(8)}"
        self._asked = asyncio.Event()  # to cancel
        self._abandoned = asyncio.Event()
        self._outcome: asyncio.Task[dict[str, Any]] | None = None
        self._where = ""

    def __repr__(self) -> str:
        return f"<Elsewhere {self._item.name} {self._where or 'nowhere yet'}>"

    def cancel(self) -> None:
        """Without effect once the destination was told to run."""
        self._attempt.cancel()
        self._asked.set()

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        """max-bandwidth, in bytes a second, within half a second."""
        self._attempt.limit(arguments["max-bandwidth"])

    async def run(self) -> dict[str, Any]:
        """Move it. Returns the report with `source-host`, raises the error. Whatever ends it, a
        cancelled task too, that says what is true of a guest: ConfirmationLost if it may run at its
        destination."""
        running = asyncio.ensure_future(self._run())
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                self.cancel()
                self._abandoned.set()
                if not self._attempt.begun:
                    running.cancel()
            except Exception:
                break
        return running.result()

    async def _run(self) -> dict[str, Any]:
        host, address = await self._place()
        self._where = f"the worker of {host} at {address}"
        with self._fleet.at(self._number, host, address):
            future = self._submit(host, address)
            self._outcome = asyncio.ensure_future(self._result(future))
            try:
                return await self._follow(address) | {"source-host": host}
            finally:
                self._outcome.cancel()
                await asyncio.gather(self._outcome, return_exceptions=True)
                # or dask would run it again, whenever it can
                if not (future.done() or self._fleet.lost):
                    await _quietly(self._fleet.client.cancel([future], force=True))

    async def _place(self) -> tuple[str, str]:
        """Where it is to run, as soon as there is somebody."""
        hosts, end = self._item.hosts, time.monotonic() + NO_WORKER_SECONDS
        while (found := await self._look_around()) is None:
            if time.monotonic() > end:
                raise ConnectError(
                    f"no dask worker of {' or '.join(hosts)} is there: start `pageferry "
                    f"fleet-worker {hosts[0]} {self._fleet.address}` at that host"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), POLL_SECONDS)
            if self._asked.is_set():
                raise Cancelled
        return found

    async def _look_around(self) -> tuple[str, str] | None:
        try:
            return await self._fleet.place(self._number, self._item.hosts)
        except PeerLost as e:
            raise self._lost(str(e)) from None

    def _submit(self, host: str, address: str) -> Any:
        """To this worker and no other, once. Dask's word for it is not enough: see Attempt."""
        job = Job(
            self._item, self._attempt.orders.max_bandwidth,
            self._fleet.together.get(self._item.hosts[0], 1),
        )  # fmt: skip
        return self._fleet.client.submit(
            run_item, self._token, __version__, msgspec.json.encode(job), self._guest,
            key=self._token,
            workers=[address], allow_other_workers=False, resources={resource(host): 1},
            retries=0, pure=False,
        )  # fmt: skip

    @property
    def _guest(self) -> str:
        """What must not be moved twice at once: each demo: is another guest."""
        return "" if self._item.guest.kind in ("image", "demo") else self._item.source

    async def _result(self, future: Any) -> dict[str, Any]:
        """What the task returns, when it has."""
        try:
            run, report, error = await future
        except asyncio.CancelledError:
            raise
        except Exception as e:
            raise await self._no_result(e) from e
        if not self._attempt.is_mine(run):
            raise self._attempt.lost(self._where, _ANEW)
        if isinstance(error, Cancelled) and not self._asked.is_set():
            raise PeerLost(
                f"{self._where} cancelled it: it heard nothing of this batch, or somebody ended it "
                f"there"
            )
        if error is not None:
            raise error
        return report  # type: ignore[no-any-return]

    async def _no_result(self, error: Exception) -> PageferryError:
        """Dask has none: a worker or the scheduler was lost, or pageferry is not there."""
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        lost = isinstance(error, KilledWorker | FutureCancelledError | OSError)
        if lost or self._attempt.begun:
            with contextlib.suppress(PeerLost):  # then it is the scheduler, and the batch is told
                await self._fleet.workers()
            return self._lost(str(error))
        return HostLacks(f"{self._where} cannot run it ({type(error).__name__}: {error})")

    async def _follow(self, address: str) -> dict[str, Any]:
        """To its end, or to that of its worker."""
        assert self._outcome is not None
        talking = asyncio.ensure_future(self._talk(address))
        abandoned = asyncio.ensure_future(self._abandoned.wait())
        ends = {self._outcome, talking}
        try:
            await asyncio.wait({*ends, abandoned}, return_when=asyncio.FIRST_COMPLETED)
            if abandoned.done() and not self._fleet.lost:  # the last words of a source
                await asyncio.wait(
                    ends, timeout=_LAST_WORDS_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            for ended in (self._outcome, talking):
                if ended.done():
                    return ended.result()
            raise self._lost("the batch was ended meanwhile")
        finally:
            talking.cancel()
            abandoned.cancel()
            await asyncio.gather(talking, abandoned, return_exceptions=True)

    def _lost(self, why: str) -> PageferryError:
        if self._fleet.lost:  # the batch is over: what can be taken up again is no failure
            self._attempt.cancel()
            why = "the dask scheduler has gone"
        return self._attempt.lost(self._where, why)

    async def _talk(self, address: str) -> dict[str, Any]:
        """Orders and news, twice a second and whenever it asks. Only ever raises."""
        silent_since: float | None = None
        while not (self._asked.is_set() and not self._attempt.begun):
            try:
                news = await self._exchange(address)
            except PeerLost as e:
                silent_since = silent_since or time.monotonic()
                await self._look_for(address, silent_since, e)
                continue
            silent_since = None
            match self._attempt.heard(news):
                case Heard.ASKS_TO_HAND_OVER:
                    self._hand_over()
                case Heard.LOST:
                    raise self._attempt.lost(self._where, _ANEW)
            if news.progress is not None:
                self._on_progress(news.progress)
        raise Cancelled

    async def _exchange(self, address: str) -> News:
        said = msgspec.json.encode(self._attempt.orders)
        call = self._fleet.client.run(exchange, self._token, said, workers=[address])
        answer = await self._fleet.ask(call, _ANSWER_SECONDS)
        return msgspec.json.decode(answer[address], type=News)

    def _hand_over(self) -> None:
        """Written down first. If that fails the batch ends, and nothing is handed over."""
        try:
            self._on_hand_over()
        except PageferryError:
            self._attempt.cancel()
        else:
            self._attempt.may_hand_over()

    async def _look_for(self, address: str, silent_since: float, error: PeerLost) -> None:
        """It did not answer, and since then has answered nothing."""
        try:
            known = address in await self._fleet.workers()
        except PeerLost as e:
            raise self._lost(str(e)) from None
        silent = time.monotonic() - silent_since
        if not known:
            raise self._lost("the scheduler knows it no more")
        if silent > SILENT_SECONDS:
            raise self._lost(f"nothing was heard of it for {silent:.0f} s: {error}")
        await asyncio.sleep(_FRESH_SECONDS / 5)


async def _quietly(closing: Coroutine[Any, Any, None]) -> None:
    """Let go of something of dask's, whatever it says to that, and however long it would take."""
    task = asyncio.ensure_future(closing)
    try:
        await asyncio.wait({task}, timeout=_LAST_WORDS_SECONDS)
    finally:
        task.cancel()
    if task.done() and not task.cancelled():
        task.exception()  # seen
