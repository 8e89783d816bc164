"""Finds out what a plan needs to know of a source and of these hosts: what the guest writes, what
its memory is like, and how fast that moves by trial. Then plan.py predicts.

The source is read, its writes are tracked for some seconds, and it is let go of; it is neither
stopped nor changed, however this ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from ..transport.codecs import CODECS
from ..transport.errors import SourceError, UsageError
from ..transport.links import Endpoint
from ..transport.pages import PAGE_SIZE, total_pages
from ..workers.batches import page_hashes
from ..workers.compressibility import Compressed, compressed
from ..workers.dirty import WrittenPart
from ..workers.forking import warm_up
from ..workers.guests import GuestUri
from ..workers.guests.base import TRACKING_HASH, SourceGuest
from ..workers.guests.sample import Sample
from ..workers.kernel.tracking_cost import hole_seconds
from .blocking import Blocking, to_its_end
from .dirty_rate import Asked, Measurement, information, together
from .measuring import Measuring, Opened, measure, mode_of
from .parameters import Parameters, default_workers
from .plan import Goal, Guest, Speed, Tried
from .plan_report import choose, report_of
from .trials import TrialRuns
from .tuning import Measured, Setting, Trial

# Guests that can be started at the other end before their memory is there.
_CAN_LEAVE = ("demo", "qemu")
# A sample of what is written says how that compresses: so much of it is enough.
_WRITTEN_SAMPLE = 64 << 20
# Less moves in no time, and says nothing of how fast.
_SAYS_SOMETHING = 4 << 20
# Codecs that leave more than this do not pay.
_PAYS = 0.9
# Trials of a setting that count.
_REPEATS = 2
_HASHED_PAGES = 1024
_LEAST_SAMPLE, _LEAST_SECONDS, _MOST_SECONDS = 4 << 20, 0.1, 60
# The share of a sample that is one piece of it; and what a later round may gain by.
_LEAST, _MOST_GAIN = 1e-9, 2.0


@dataclass(frozen=True)
class Wanted:
    """What a plan is for. `seconds`: how long writes are looked at, `repeats` times; `sample`:
    bytes; `workers`: 0 for as many as pay; `codec`: auto for whichever pays; `bandwidth`: as the
    user wrote it; `common`: keys and the like."""

    goal: Goal
    seconds: float = 2.0
    repeats: int = 2
    sample: int = 128 << 20
    workers: int = 0
    codec: str = "auto"
    level: int | None = None
    batch_pages: int = 256
    bandwidth: str = ""
    common: Parameters = field(default_factory=Parameters)


def wanted_by(
    parameters: Parameters, seconds: float = 2.0, sample: int = 128 << 20, bandwidth: str = ""
) -> Wanted:
    """What a plan is for that is to be carried out with `parameters`, of which those that a plan
    is made with count; UsageError. `bandwidth`: parameters.max_bandwidth as the user wrote it."""
    checked = parameters.checked()
    if sample < _LEAST_SAMPLE:
        raise UsageError("sample must be at least 4M: less says nothing of a migration")
    if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        raise UsageError("seconds must be from 0.1 to 60")
    if parameters.codec not in ("auto", *CODECS):
        raise UsageError(
            f"a plan is made without deltas ({parameters.codec}): its codec is auto, "
            f"{', '.join(CODECS)}"
        )
    goal = Goal(checked.max_bandwidth, checked.downtime_limit, checked.max_rounds)
    # trials find out what these hosts can, with no limit
    trials = Parameters(keys=checked.keys, peer=checked.peer, insecure=checked.insecure)
    return Wanted(
        goal, seconds, sample=sample, workers=parameters.workers, codec=checked.codec,
        level=checked.level, batch_pages=checked.batch_pages,
        bandwidth=bandwidth if goal.bandwidth else "", common=trials,
    )  # fmt: skip


@dataclass
class _Known:
    """What was found out of the source before it was let go of."""

    guest: Guest
    found: Measurement
    by_content: bool  # every look
    last_by_content: bool  # the last one
    memory: Sample
    written: Sample | None
    keep: Opened | None  # a guest that ends when it is let go of: trials share its processors

    async def close(self) -> None:
        self.memory.close()
        if self.written is not None:
            self.written.close()
        if self.keep is not None:
            await self.keep.close()


async def plan(
    source: GuestUri,
    endpoint: Endpoint | None,
    wanted: Wanted,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The plan for `source`, to the receiver at `endpoint`, or as if both ends were here."""
    begin = time.monotonic()
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    warm_up()
    known = await _look_at(source, wanted, say)
    try:
        content = await _content(known)
        say("trying how fast it moves")
        async with _Trials(known, endpoint, wanted, content) as trials:
            tried = await trials.all()
        guest = await _with_scan(known)
    finally:
        await to_its_end(known.close())
    choice = choose(guest, tried, wanted.goal)
    return {
        "source": str(source),
        "destination": "this host" if endpoint is None else str(endpoint),
        "bandwidth": wanted.goal.bandwidth,
        "downtime-limit": round(wanted.goal.downtime_limit * 1000),
        "planning-time": round((time.monotonic() - begin) * 1000),
        "memory": {
            "total": guest.curve.total * PAGE_SIZE,
            "data": guest.pages * PAGE_SIZE,
            "zero-share": round(known.memory.zero_share, 4),
        },
        "dirty-rate": information(known.found),
        "content": {name: [_told(c) for c in found] for name, found in content.items()},
        "speeds": [_speeds(one) for one in tried],
        **report_of(choice, guest, wanted.goal, bandwidth=wanted.bandwidth, load=load),
    }


def _told(found: Compressed) -> dict[str, Any]:
    return {"codec": found.codec, "ratio": round(found.ratio, 3), "rate": round(found.rate)}


def _speeds(tried: Tried) -> dict[str, Any]:
    def told(speed: Speed) -> dict[str, Any]:
        return {"rate": round(speed.rate), "wire-share": round(speed.wire, 4),
                "zero-share": round(speed.zero, 4)}  # fmt: skip

    return {
        "workers": tried.setting.workers, "codec": tried.setting.how,
        "memory": told(tried.memory), "written": told(tried.written),
        "switchover": round(tried.switchover * 1000), "setup": round(tried.setup * 1000),
    }  # fmt: skip


# ---- the source --------------------------------------------------------------------------------


async def _look_at(source: GuestUri, wanted: Wanted, say: Callable[[str], None]) -> _Known:
    opened = Opened(source)
    memory: Sample | None = None
    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(opened)
        say(f"looking at what is written, for {wanted.seconds * wanted.repeats:g} s"
            if guest.live else "nobody writes it")  # fmt: skip
        found, written = await _writes(guest, wanted)
        if written is not None:
            stack.callback(written.close)
        memory = await _sample(opened.call, guest, wanted.sample)
        stack.callback(memory.close)
        runs = [await opened.call(guest.initial_pages, i) for i in range(len(guest.blocks))]
        facts = Guest(
            guest.live, guest.can_stop, guest.can_throttle,
            guest.can_stop and guest.kind in _CAN_LEAVE,
            sum(total_pages(r) for r in runs), found.curve, found.facts.pop("look-seconds", 0.0),
            discard=hole_seconds(),
        )  # fmt: skip
        by_content = guest.live and guest.tracking == TRACKING_HASH
        last = guest.live and guest.last_look_by_content
        keep = opened if guest.kind == "demo" else None
        if keep is None:
            await opened.close()
        stack.pop_all()
        return _Known(facts, found, by_content, last, memory, written, keep)


async def _writes(guest: SourceGuest, wanted: Wanted) -> tuple[Measurement, Sample | None]:
    """What the guest writes, and a sample of it. `facts` of the first have `look-seconds`."""
    request = Asked(wanted.seconds).checked()
    mode = mode_of(guest, "")
    if not mode:
        return await measure(guest, request), None
    began = time.monotonic()
    async with Measuring(guest, request, mode) as measuring:
        curves = [await measuring.curve(wanted.seconds) for _ in range(wanted.repeats)]
        found = measuring.measured(began, together(curves))
        found.facts["look-seconds"] = measuring.counting.look_seconds
        runs = await measuring.call(measuring.counting.written)
        if not sum(total_pages(r) for r in runs):
            return found, None
        part = WrittenPart(guest, runs)
        return found, await _sample(measuring.call, part, _WRITTEN_SAMPLE)


async def _sample(call: Blocking, guest: SourceGuest, limit: int) -> Sample:
    """Some of its memory; cancelled, it is not left behind."""
    stop = False
    try:
        return await call(Sample, guest, limit, lambda: stop)
    except asyncio.CancelledError:
        stop = True
        if (sample := await to_its_end(call.idle())) is not None:
            sample.close()
        raise


async def _content(known: _Known) -> dict[str, list[Compressed]]:
    """How memory, and what is written, compresses."""
    found = {}
    for name, sample in (("memory", known.memory), ("written", known.written)):
        if sample is not None:
            with contextlib.closing(sample.guest()) as guest:
                found[name] = await asyncio.to_thread(
                    compressed, guest.blocks[0], guest.initial_pages(0)
                )
    return found


async def _with_scan(known: _Known) -> Guest:
    """Where writes are found by content, a look reads all memory."""
    if not (known.by_content or known.last_by_content):
        return known.guest
    with contextlib.closing(known.memory.guest()) as guest:
        rate = await asyncio.to_thread(_hash_rate, guest)
    scan = known.guest.pages * PAGE_SIZE / rate
    return replace(known.guest, scan=scan, scan_always=known.by_content)


def _hash_rate(guest: SourceGuest) -> float:
    """Bytes a second of one processor, of memory that was looked at before."""
    words = guest.blocks[0].words()[:_HASHED_PAGES]
    took = []
    for _ in range(_REPEATS):
        begin = time.thread_time()
        page_hashes(words)
        took.append(time.thread_time() - begin)
    return words.nbytes / max(min(took), 1e-9)


# ---- how fast it moves -------------------------------------------------------------------------


class _Trials:
    """Moves samples with some settings; with `async with`."""

    def __init__(
        self,
        known: _Known,
        endpoint: Endpoint | None,
        wanted: Wanted,
        content: dict[str, list[Compressed]],
    ) -> None:
        self._known, self._wanted, self._content = known, wanted, content
        self._endpoint = endpoint
        self._memory = TrialRuns(known.memory, endpoint, wanted.common)
        self._written: TrialRuns | None = None
        if known.written is not None and known.written.data >= _SAYS_SOMETHING:
            self._written = TrialRuns(known.written, endpoint, wanted.common)

    async def __aenter__(self) -> _Trials:
        return self

    async def __aexit__(self, *rest: Any) -> None:
        self._memory.close()
        if self._written is not None:
            self._written.close()

    async def all(self) -> list[Tried]:
        """Those that may pay, the cheapest first."""
        wanted = self._wanted
        workers = wanted.workers or default_workers()
        if wanted.codec != "auto":
            first = await self._one(
                Setting(workers, wanted.codec, wanted.level, wanted.batch_pages)
            )
            return await self._with_fewer([first])
        plain = Setting(workers, "none", None, wanted.batch_pages)
        await self._memory.run(Trial(plain, 1.0, counts=False))  # processes are warm then
        tried = [await self._one(plain)]
        if self._link_may_bound(tried[0]):
            for codec in self._codecs():
                tried.append(await self._one(Setting(workers, codec, None, wanted.batch_pages)))
        return await self._with_fewer(tried)

    async def _with_fewer(self, tried: list[Tried]) -> list[Tried]:
        """One worker may be enough."""
        workers = tried[0].setting.workers
        if self._wanted.workers or workers == 1:
            return tried
        best = choose(self._known.guest, tried, self._wanted.goal).tried.setting
        one = await self._one(Setting(1, best.codec, best.level, best.batch_pages))
        return [one, *tried]

    def _link_may_bound(self, plain: Tried) -> bool:
        """A codec pays only where bytes on the wire do. What a real link carries, only trials
        tell."""
        if self._endpoint is not None:
            return True
        bandwidth = self._wanted.goal.bandwidth
        return plain.memory.bound_by_link(bandwidth) or plain.written.bound_by_link(bandwidth)

    def _codecs(self) -> list[str]:
        found = [c for kind in self._content.values() for c in kind if c.ratio < _PAYS]
        return list(dict.fromkeys(c.codec for c in found))

    async def _one(self, setting: Setting) -> Tried:
        runs, setups = await self._repeated(self._memory, setting)
        memory = written = _speed(runs, self._known.memory)
        if self._written is not None and self._known.written is not None:
            again, more = await self._repeated(self._written, setting)
            least = await self._written.run(Trial(setting, _LEAST))
            # mostly short, as the last round is: what is done at once is done at the best rate
            quick = min(again, key=lambda run: run.seconds)
            written = _later(_speed([quick], self._known.written), quick, least)
            runs, setups = [*runs, *again, least], setups + more
        # some milliseconds, to which whatever else runs only adds
        stood = min((run.switchover for run in runs if run.switchover is not None), default=0.0)
        return Tried(setting, memory, written, median(setups), stood)

    async def _repeated(
        self, trials: TrialRuns, setting: Setting
    ) -> tuple[list[Measured], list[float]]:
        """And the seconds before anything moved."""
        runs, setups = [], []
        for _ in range(_REPEATS):
            runs.append(await trials.run(Trial(setting, 1.0)))
            setups.append(trials.set_up)
        return runs, setups


def _speed(runs: list[Measured], sample: Sample) -> Speed:
    """Of all `runs` together."""
    size, seconds = sum(run.size for run in runs), sum(run.seconds for run in runs)
    if not size or not seconds:
        raise SourceError("nothing was moved by a trial: there is nothing to plan with")
    return Speed(size / seconds, sum(run.wire for run in runs) / size, sample.zero_share)


def _later(speed: Speed, run: Measured, least: Measured) -> Speed:
    """How fast that would be in a later round: what a round costs however little is in it is not
    counted with each byte, and memory that is there already need not be made."""
    if run.size <= 2 * least.size or run.seconds <= least.seconds:
        return speed
    each = (run.seconds - least.seconds) / (run.size - least.size) - least.touch
    most = _MOST_GAIN * speed.rate
    rate = min(1 / each, most) if each > 0 else most
    return replace(speed, rate=max(rate, speed.rate))
