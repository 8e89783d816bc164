"""Trial runs: a sample of a source is moved for real, by the ordinary coordinators and workers, and
thrown away at the other end.

Carries out what tuning.py wants tried and measures it; decides nothing. Both ends are here, or the
other one is a running `pageferry receive`, whose destination is not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from ..transport.errors import LocalProtocolError, PeerRefused
from ..transport.links import Endpoint
from ..transport.pages import PAGE_SIZE
from ..workers.forking import warm_up
from ..workers.guests import GuestUri, open_source
from ..workers.guests.base import SourceGuest
from ..workers.guests.sample import Sample, SampleDestination, readable
from .api import receive_one
from .blocking import Blocking, to_its_end
from .destination import Destination
from .parameters import Parameters
from .source import Source
from .tuning import Measured, Search, Setting, Trial

# A receiver that has just ended a trial lets go of it first; one that is at work is not waited for.
_BUSY_SECONDS, _AGAIN_SECONDS = 10.0, 0.05
OnTrial = Callable[[Trial, Measured], None]


async def take_sample(source: GuestUri, limit: int) -> Sample:
    """Up to `limit` bytes of the data of `source`, which is neither stopped nor changed. The
    caller closes it."""
    stop = False
    opening = Blocking()

    def copy() -> Sample:
        guest: SourceGuest = open_source(readable(source))
        try:
            return Sample(guest, limit, lambda: stop)
        finally:
            guest.close()

    try:
        return await opening(copy)
    except asyncio.CancelledError:
        stop = True
        if (sample := await to_its_end(opening.idle())) is not None:
            sample.close()
        raise


class TrialRuns:
    """Runs trials of one sample, one at a time. `endpoint`: the receiver; None: both ends are
    here. `parameters`: what all trials have in common."""

    def __init__(
        self, sample: Sample, endpoint: Endpoint | None, parameters: Parameters | None = None
    ) -> None:
        warm_up()
        self._sample = sample
        self._parameters = parameters or Parameters()
        if endpoint is None:
            self._parameters = self._parameters.on_this_host()
        self._listening: Destination | None = None
        # A receiver elsewhere knows a source by it: there each trial is another one.
        self._identity: bytes | None = None
        if endpoint is None:
            self._identity = secrets.token_bytes(16)
            endpoint = Endpoint("ipc", path=f"@pageferry-{os.getpid()}-{secrets.token_hex(8)}")
            self._listening = Destination(
                endpoint, lambda hello: SampleDestination(), only=self._identity
            )
        self.endpoint = endpoint
        self.local = self._listening is not None
        self.seconds = 0.0  # of all trials, their set-up included
        self.set_up = 0.0  # seconds of the last one before its first round

    def __repr__(self) -> str:
        return f"<TrialRuns {self._sample!r} to {self.endpoint}>"

    async def run(self, trial: Trial) -> Measured:
        """Move what the trial says, and throw it away; what it was like."""
        begin = time.monotonic()
        try:
            while True:
                try:
                    return await self._once(trial)
                except PeerRefused as e:
                    late = time.monotonic() - begin > _BUSY_SECONDS
                    if e.data.get("field") != "busy" or late:
                        raise
                await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            self.seconds += time.monotonic() - begin

    async def _once(self, trial: Trial) -> Measured:
        arriving: asyncio.Future[Any] | None = None
        guest = self._sample.guest(trial.share)
        try:
            if self._listening is not None:
                arriving = asyncio.ensure_future(receive_one(self._listening))
            source = Source(
                guest, self.endpoint, with_setting(self._parameters, trial.setting),
                identity=self._identity,
            )  # fmt: skip
            await source.run()
            if source.statistics.set_up is not None:
                self.set_up = source.statistics.set_up - source.statistics.started
            if arriving is not None:
                await arriving
        except BaseException:
            if arriving is not None:
                if self._listening is not None and self._listening.arrival is None:
                    arriving.cancel()
                # let it clean up: it was told
                await asyncio.gather(arriving, return_exceptions=True)
            raise
        finally:
            guest.close()
        return measured(source, trial)

    def close(self) -> None:
        """Idempotent. The sample is the caller's."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None


def with_setting(parameters: Parameters, setting: Setting) -> Parameters:
    """`parameters`, but for what is tuned."""
    return replace(
        parameters, workers=setting.workers, codec=setting.codec, level=setting.level,
        batch_pages=setting.batch_pages,
    ).checked()  # fmt: skip


def measured(source: Source, trial: Trial) -> Measured:
    """What a migration that has ended was like."""
    statistics = source.statistics
    cost = statistics.first_round
    if cost is None:
        raise LocalProtocolError("a trial run ended without a round")
    peer, switchover = statistics.peer, None
    if statistics.stopped is not None and statistics.running is not None:
        switchover = statistics.running - statistics.stopped
    received = peer.get("receivers-cpu-us")
    return Measured(
        trial.setting, cost.pages * PAGE_SIZE, cost.seconds, cost.wire, cost.sender_cpu,
        None if received is None else received / 1e6, cost.waited, switchover,
        peer.get("first-touch-ns", 0) / 1e9 / (1 << 20), peer.get("processors", 0),
        trial.share >= 1.0,
    )  # fmt: skip


async def tune(runs: TrialRuns, search: Search, on_trial: OnTrial | None = None) -> None:
    """Make all trials that `search` wants."""
    while (trial := search.next()) is not None:
        found = await runs.run(trial)
        search.learn(found)
        if on_trial is not None:
            on_trial(trial, found)


@contextlib.asynccontextmanager
async def trial_runs(
    source: GuestUri, endpoint: Endpoint | None, limit: int, parameters: Parameters | None = None
) -> AsyncIterator[tuple[Sample, TrialRuns]]:
    """A sample of `source` and runs of it; gone afterwards, however it ends."""
    warm_up()
    sample = await take_sample(source, limit)
    try:
        runs = TrialRuns(sample, endpoint, parameters)
        try:
            yield sample, runs
        finally:
            runs.close()
    finally:
        sample.close()
