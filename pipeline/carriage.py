"""A migration's byte stream: the process that carries it, from its coordinator's side.

At the source the carrier is dialled in place of the receiver: `dial` gives the endpoint at which it
listens, and `listen` tells it of the channels that workers are about to dial. At the destination
it connects to what listens there (`answer`). Whatever breaks is told to `on_failure`, once, and a
moment late, so that what came before it is heard first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..transport.carrier import take
from ..transport.errors import (
    ConnectError,
    LocalProtocolError,
    PageferryError,
    PeerLost,
    UsageError,
)
from ..transport.links import Endpoint, parse_endpoint
from ..transport.stream_addresses import Stream, is_stream, parse_stream, recover_words
from ..transport.streams import ends_of
from ..workers import carrier, jobs
from ..workers.command import how_it_ended
from ..workers.counters import Counters
from ..workers.pool import Pool, Worker
from .blocking import to_its_end

# Who started a command that never answers hears what is waited for. Most logins are quicker.
_SAY_SECONDS = 4.0
# What arrived with the end of a stream is heard before the end is.
_HEARD_SECONDS = 0.3
_LOOK_SECONDS = 0.5
_log = logging.getLogger("pageferry")


def local_endpoint() -> Endpoint:
    """A new name in the abstract namespace, where a crash leaves no file."""
    return Endpoint("ipc", path=f"@pageferry-{os.getpid()}-{secrets.token_hex(8)}")


class Carriage:
    """One stream at a time. `on_failure`: told what broke it."""

    def __init__(self, on_failure: Callable[[PageferryError], None] = lambda error: None) -> None:
        self.on_failure = on_failure
        self.peer = ""  # the path of the receiver, at its host
        self.monitor = ""  # at which the migration is controlled, for who is told how to go on
        self._stream: Stream | None = None
        self._pool: Pool | None = None
        self._counters: Counters | None = None
        self._answer: asyncio.Future[jobs.AnyJob] | None = None
        self._over: asyncio.Future[jobs.StreamEnded] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._saying: asyncio.TimerHandle | None = None
        self._ended: Pool | None = None  # the last one, for what it has cost
        self._here = ""  # the path at which it is dialled
        self._met = False  # the other end has answered
        self._asked = self._hurry = False  # the carrier was told to finish, in a hurry
        self.closed = False  # the other end has closed the stream, and said so

    def __repr__(self) -> str:
        return f"<Carriage {self._stream}>"

    async def dial(self, stream: Stream) -> Endpoint:
        """Where the receiver at the other end of `stream` is to be dialled. ConnectError,
        UsageError."""
        self._here = local_endpoint().path
        await self._start(stream, self._here, dials=True)
        assert self._answer is not None
        ready = await self._answer
        assert isinstance(ready, jobs.Ready)
        self.peer = ready.endpoint
        return Endpoint("ipc", path=self._here, stands_for=self.peer)

    async def answer(self, stream: Stream, endpoint: Endpoint) -> None:
        """Connect the source at the other end of `stream` to what listens at `endpoint`."""
        if endpoint.scheme != "ipc":
            raise UsageError(f"a stream ends at an ipc:// endpoint, not at {endpoint}")
        await self._start(stream, endpoint.path, dials=False)

    async def _start(self, stream: Stream, path: str, *, dials: bool) -> None:
        given = None if stream.command else carrier.Descriptors(*take(stream))
        try:
            # a command may be one that waits for a source to come
            waits = not dials and bool(stream.command)
            patience = None if waits else carrier.GREETING_SECONDS
            self._stream = stream
            self._met = self._asked = self._hurry = self.closed = False
            self._counters = Counters(1)
            self._pool = Pool("carrier", self._counters, self._on_job, self._failed)
            self._answer = asyncio.get_running_loop().create_future()
            self._over = asyncio.get_running_loop().create_future()
            job = carrier.CarrierJob(
                self._counters, str(stream), stream.command, given, dict(os.environ), os.getcwd(),
                dials, path, patience,
            )  # fmt: skip
            self._saying = asyncio.get_running_loop().call_later(
                _SAY_SECONDS, self._say_what_is_waited_for, stream, dials, patience
            )
            await self._pool.start(carrier.main, [job])
            self._watching = asyncio.get_running_loop().create_task(self._watch(self._pool))
        finally:
            if given is not None:
                given.close()

    def _say_what_is_waited_for(self, stream: Stream, dials: bool, patience: float | None) -> None:
        whom = "`pageferry receive … -` (or relay)" if dials else "`pageferry send`"
        long = "" if patience is None else f"; it is given up after {patience:.0f} s"
        _log.warning(
            "%s: no %s has answered at its other end yet%s", stream, whom, long
        )  # fmt: skip

    def _say_nothing(self) -> None:
        if self._saying is not None:
            self._saying.cancel()

    async def _watch(self, pool: Pool) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            try:
                while True:
                    pool.check()
                    await asyncio.sleep(_LOOK_SECONDS)
            except PageferryError as e:
                self._failed(e)

    async def listen(self, endpoints: list[Endpoint]) -> None:
        """Let workers dial these, which are beside what `dial` gave."""
        if self._pool is None:
            return  # they are the receiver's own
        suffixes = ends_of([endpoint.path for endpoint in endpoints], self._here)
        self._answer = asyncio.get_running_loop().create_future()
        self._pool.say_all(jobs.Names(suffixes))
        await self._answer

    async def locate(self, where: str, before: Endpoint) -> Endpoint:
        """For a connection that is made anew: what `where` is, "" for as `before`."""
        whole = self._pool is not None and self._pool.alive and not self.closed
        if not where and (self._stream is None or whole):
            return before  # a stream that is whole has the new connections as it had the old
        if where and not is_stream(where):
            await self.close(hurry=True)
            self._stream = None
            return parse_endpoint(where)
        stream = parse_stream(where) if where else self._stream
        assert stream is not None
        if not stream.command:
            raise ConnectError(
                f"the stream {stream} has ended, and only a command can be started again: "
                f"{self.recovery()}"
            )
        await self.close(hurry=True)
        return await self.dial(stream)

    def recovery(self) -> str:
        """How a postcopy goes on whose stream broke, for a person."""
        assert self._stream is not None
        try:
            words = recover_words(self._stream, self.peer)
        except UsageError as e:
            return f"it cannot be said how to reach its receiver: {e}"
        monitor = shlex.quote(self.monitor) if self.monitor else "MONITOR"
        command = " ".join(filter(None, ("pageferry recover", monitor, words)))
        return f"its receiver listens at ipc://{self.peer} of its host: `{command}` goes on"

    def _on_job(self, worker: Worker, job: jobs.AnyJob) -> None:
        match job:
            case jobs.Said(line):
                _log.warning("%s: %s", str(self._stream).partition(" ")[0], line)
            case jobs.StreamEnded(status, said):
                if status:  # of a migration that failed, more was said already
                    level = logging.INFO if self._hurry else logging.WARNING
                    _log.log(level, "%s %s%s", self._stream, how_it_ended(status), said)
                if self._over is not None and not self._over.done():
                    self._over.set_result(job)
                if not self._asked:
                    self.closed = True
                    self._failed(PeerLost(f"the other end has closed {self._stream}"))
            case jobs.Ready():
                self._met = True
                self._say_nothing()
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(job)
            case _:
                self._failed(LocalProtocolError(f"{worker!r} said {job!r}"))

    def _failed(self, error: Exception) -> None:
        assert isinstance(error, PageferryError)
        self._met = False  # and is told nothing any more
        self._say_nothing()
        for waiting in (self._answer, self._over):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # whoever waits gets it; nobody may
        asyncio.get_running_loop().call_later(_HEARD_SECONDS, self._tell, self._pool, error)

    def _tell(self, pool: Pool | None, error: PageferryError) -> None:
        if pool is self._pool and pool is not None:  # it is this stream's still
            self.on_failure(error)

    def processes(self) -> list[dict[str, Any]]:
        """What it has cost, as `processes` of the result."""
        pool = self._pool or self._ended
        return [
            {
                "name": name,
                "pid": pid,
                "cpu-time": row["cpu_ns"] // 1_000_000,
                "peak-memory": row["peak_memory"],
                "wait-time": 0,
                "codec-time": 0,
            }
            for name, pid, row in (pool.rows() if pool is not None else [])
        ]

    async def close(self, *, hurry: bool = False) -> None:
        """End the stream, when all that was said is delivered; with `hurry`, nobody waits long for
        that. Idempotent."""
        pool = self._pool
        if pool is None:
            return
        if self._met and pool.alive:
            await self._finish(pool, hurry)
        self._pool, self._ended = None, pool
        self._say_nothing()
        # else not `pool.hurry()`: a carrier that is killed cannot end what its command has started
        if hurry and any(worker.silent(time.monotonic_ns()) for worker in pool.workers):
            pool.hurry()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await pool.close()
        if self._counters is not None:
            self._counters.close()
            self._counters = None

    async def _finish(self, pool: Pool, hurry: bool) -> None:
        assert self._over is not None
        self._asked, self._hurry = True, hurry
        pool.say_all(jobs.Finish(carrier.HURRY if hurry else b""))
        seconds = carrier.HURRY_SECONDS if hurry else carrier.FINISH_SECONDS
        with contextlib.suppress(PageferryError, TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._over), seconds + 1.0)


@contextlib.asynccontextmanager
async def dialled(target: Endpoint | Stream) -> AsyncIterator[tuple[Endpoint, Carriage]]:
    """Where to dial `target`, and what carries it, if it is a stream."""
    carriage = Carriage()
    hurry = True
    try:
        yield (await carriage.dial(target) if isinstance(target, Stream) else target), carriage
        hurry = False
    finally:
        await to_its_end(carriage.close(hurry=hurry))
