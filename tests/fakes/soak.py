"""`make soak`: one demo guest after another goes there and back, with random parameters.

After each trip the guest's oracle looks at every byte. When a guest has made its trips, this
process, which is both ends of each, must have exactly what it had at first: children, threads,
descriptors, names in /dev/shm and the temporary folder. Its memory must not grow: a line is fitted
to what it has after each trip, the first tenth left out.

A trip is cancelled, yanked, or paused in postcopy and recovered now and then: the guest is then
where it has to be, and moves on from there. Everything random is drawn from one seed, and each
trip from the seed and its number alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil

from pageferry.pipeline import api
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.transport.errors import Cancelled, NotConverging, PeerLost, UsageError
from pageferry.transport.keys import KeyDirectory
from pageferry.transport.links import Endpoint
from pageferry.workers.forking import start_process, warm_up
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.demo import DemoDestination, DemoSource
from pageferry.workers.reserve import Reserve

# A guest makes so many trips, then there is another one.
TRIPS_OF_A_GUEST = 20
# What memory may grow by, in bytes a trip, before it is called a leak.
MOST_GROWTH = 8 << 10


@dataclass(frozen=True)
class Trip:
    """What is drawn for one: `cut`: what happens on the way, "" for nothing."""

    number: int
    parameters: Parameters
    tcp: bool
    keys: bool
    reserve: bool
    cut: str

    def __str__(self) -> str:
        p = self.parameters
        level = "" if p.level is None else f"-{p.level}"
        words = [f"{p.workers} x {p.codec}{level}", "tcp" if self.tcp else "ipc"]
        words.append(f"postcopy {p.postcopy}" if p.postcopy != "never" else "precopy")
        if p.postcopy != "never":
            words.append(f"{p.postcopy_link}{'' if p.preempt else ', no preempt'}")
        words += ["verified"] * bool(p.verify) + ["keys"] * self.keys
        words += ["reserve"] * self.reserve
        return ", ".join(words + [self.cut] * bool(self.cut))


def draw_guest(draw: random.Random) -> str:
    """The URI of a guest."""
    options = [
        f"size={draw.choice([1, 3, 8, 16, 24])}M",
        f"content={draw.choice(['zero', 'text', 'random'])}",
        f"rate={draw.choice([100, 2000, 20_000, 100_000])}",
        f"seed={draw.randrange(1 << 20)}",
    ]
    if draw.random() < 0.4:
        options += ["access=random", f"vcpus={draw.choice([1, 2, 4])}"]
    return "demo:?" + "&".join(options)


def draw_trip(seed: int, number: int) -> Trip:
    """That of this number, whatever was drawn before."""
    draw = random.Random(f"{seed} {number}")
    codec, level = draw.choice([
        ("none", None), ("lz4", None), ("zstd", 1), ("zstd", 3), ("zlib", 1), ("auto", None),
    ])  # fmt: skip
    postcopy = draw.choice(["never", "never", "now", "auto", "after=1", "after=2"])
    cut = draw.choices(["", "cancel", "yank", "pause"], [85, 6, 4, 5])[0]
    parameters = Parameters(
        workers=draw.randint(1, 4), codec=codec, level=level, postcopy=postcopy,
        preempt=draw.random() < 0.7, postcopy_link=draw.choice(["zmq", "direct"]),
        batch_pages=draw.choice([16, 64, 256]), downtime_limit=draw.choice([0.1, 0.3, 1.0]),
        max_rounds=100, verify=draw.random() < 0.3 if postcopy == "never" else None,
    )  # fmt: skip
    if cut == "pause":  # in postcopy, and slow enough to be caught in it
        parameters = replace(
            parameters, postcopy="now", verify=None, max_postcopy_bandwidth=4_000_000
        )
    if cut in ("cancel", "yank"):
        cut += f" in {draw.choice(['setup', 'active', 'device'])}"
        parameters = replace(parameters, postcopy="never")
    keys = draw.random() < 0.2
    if keys:
        parameters = replace(parameters, postcopy_link="zmq")
    return Trip(number, parameters.checked(), draw.random() < 0.5, keys, draw.random() < 0.5, cut)


def things() -> Counter[str]:
    """What this process has that could be left behind."""
    gc.collect()
    found = [f"child {child.pid}" for child in psutil.Process().children(recursive=True)]
    found += [f"thread {thread.name}" for thread in threading.enumerate()]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(f"descriptor {fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    for folder in ("/dev/shm", tempfile.gettempdir()):
        names = os.listdir(folder)
        found += [f"name {folder}/{name}" for name in names if name.startswith("pageferry-")]
    return Counter(found)


class Leak(Exception):
    """Something is there that was not."""


class Soak:
    """The trips, one after the other. `say(line)`: one of progress."""

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        self.seed = seed
        self._say = say
        self.outcomes: Counter[str] = Counter()
        self.memory: list[int] = []  # resident bytes after each trip
        self.looks = 0  # of the oracle
        self.pages = 0  # that it looked at
        self._guest: DemoSource

    async def run(self, trips: int) -> None:
        """All of them; raises at the first that is not as it has to be."""
        for first in range(0, trips, TRIPS_OF_A_GUEST):
            before = things()
            with ThreadPoolExecutor() as executor:  # whose threads end with it
                asyncio.get_running_loop().set_default_executor(executor)
                await self._guests_trips(range(first, min(first + TRIPS_OF_A_GUEST, trips)))
            if more := things() - before:
                raise Leak(f"trips {first} and on, seed {self.seed}: left {list(more)}")

    async def _guests_trips(self, numbers: range) -> None:
        guest = open_source(parse_guest(draw_guest(random.Random(f"{self.seed} guest {numbers}"))))
        assert isinstance(guest, DemoSource)
        self._guest = guest
        reserve = Reserve(16)
        try:
            for number in numbers:
                trip = draw_trip(self.seed, number)
                try:
                    outcome = await self._travel(trip, reserve if trip.reserve else None)
                except Exception as e:
                    e.add_note(f"trip {number} of seed {self.seed}: {trip}")
                    raise
                self.outcomes[outcome] += 1
                self.memory.append(psutil.Process().memory_info().rss)
                self._say(f"{number + 1}: {outcome}: {trip}")
        finally:
            self._guest.close()
            await asyncio.to_thread(reserve.close)

    async def _travel(self, trip: Trip, reserve: Reserve | None) -> str:
        """One trip, and a look at every page wherever the guest is now."""
        with tempfile.TemporaryDirectory(prefix="pf-soak-") as folder:
            where = Endpoint("ipc", path=f"{folder}/c")
            if trip.tcp:
                where = Endpoint("tcp", "127.0.0.1", 0)
            parameters, keys = trip.parameters, ""
            if trip.keys:
                keys, mine = _keys(folder)
                parameters = replace(parameters, keys=mine)
            opener = api.opener(parse_guest("demo:"))
            listening = Destination(where, opener, reserve=reserve, keys=keys)
            try:
                source = Source(self._guest, listening.endpoint, parameters, reserve=reserve)
                return await self._both_ends(trip, source, listening)
            finally:
                listening.forget()
                listening.close()

    async def _both_ends(self, trip: Trip, source: Source, listening: Destination) -> str:
        source.on_event = _Cut(trip.cut, source)
        arriving = asyncio.ensure_future(listening.receive())
        try:
            await source.run()
            await arriving
        except (Cancelled, PeerLost, NotConverging) as e:
            wanted = bool(trip.cut) or isinstance(e, NotConverging)  # on a loaded host
            if not wanted or source.core.status is Status.COMPLETED:
                raise
            self._look(self._guest)  # it runs here
            return type(e).__name__.lower()
        finally:
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)
        assert listening.arrival is not None
        arrived = listening.arrival.guest
        assert isinstance(arrived, DemoDestination)
        stayed, self._guest = self._guest, arrived.depart()
        stayed.close()
        self._look(self._guest)
        return f"recovered {source.query()['recoveries']}" if trip.cut == "pause" else "arrived"

    def _look(self, guest: DemoSource) -> None:
        guest._guest.patience.hurried = False  # of a yank: it is well
        verdict = guest.verdict()
        guest.resume()
        self.looks += 1
        self.pages += verdict.pages
        if not verdict.ok:
            raise AssertionError(f"the oracle: {verdict}")


class _Cut:
    """Does to a source what is drawn for its trip, when it is in the state for it."""

    def __init__(self, cut: str, source: Source) -> None:
        self._what, _, self._when = cut.partition(" in ")
        self._source = source

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        status = data.get("status")
        later = asyncio.get_running_loop().call_soon
        if self._what == "cancel" and status == self._when:
            later(self._source.cancel)
        elif self._what == "yank" and status == self._when:
            later(self._yank)
        elif self._what == "pause" and status == "postcopy-active":
            self._what = "recover"
            later(self._pause)
        elif self._what == "recover" and status == "postcopy-paused":
            later(self._source.recover, None)

    def _yank(self) -> None:
        if self._source.can_be_yanked():
            self._source.yank()

    def _pause(self) -> None:
        with contextlib.suppress(UsageError):  # all is there already
            self._source.pause()


def _keys(folder: str) -> tuple[str, str]:
    """Two directories of keys, each of which allows the other."""
    there = KeyDirectory.create(f"{folder}/there")
    here = KeyDirectory.create(f"{folder}/here")
    there.allow(here.public)
    here.allow(there.public)
    return there.path, here.path


def growth(memory: list[int]) -> float:
    """Bytes a trip, by a line through all but the first tenth."""
    kept = np.array(memory[len(memory) // 10 :], float)
    return float(np.polyfit(np.arange(len(kept)), kept, 1)[0]) if len(kept) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    print(f"{asked.trips} trips, seed {asked.seed}", flush=True)
    warm_up()
    process = start_process(os.getpid, (), "warm-up")
    process.join()
    process.close()
    began = time.monotonic()
    soak = Soak(asked.seed, lambda line: print(line, flush=True))
    asyncio.run(soak.run(asked.trips))
    grown, took = growth(soak.memory), time.monotonic() - began
    print(
        f"{sum(soak.outcomes.values())} trips in {took:.0f} s: {dict(soak.outcomes)}; "
        f"{soak.looks} looks at {soak.pages} pages, none wrong; children, threads, descriptors "
        f"and names as before; memory {soak.memory[len(soak.memory) // 10] / 1e6:.1f} to "
        f"{soak.memory[-1] / 1e6:.1f} MB, {grown / 1e3:+.2f} kB a trip"
    )
    if asked.trips >= 200 and grown > MOST_GROWTH:
        print(f"this grows by more than {MOST_GROWTH / 1e3:.0f} kB a trip: a leak")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
