"""Runs one cell of a migration: holds a moment open, does the fault, sees to it that what can go on
does, and says what has come of it. What it finds is a fact (`observed`); whether that is right is
cells.py's."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from cells import (
    ANYWHERE,
    ASKING,
    CANCELS,
    JUMPING,
    LEAVING,
    LOADING,
    PAUSED,
    RECOVER,
    ROUND_1,
    ROUND_N,
    SETUP,
    SOURCE_SIDE,
    STARTING,
    WAITING,
    Fault,
    Line,
    Loss,
    Outcome,
    RunSaid,
    Victim,
    allowed,
    bound,
    expected,
    loss,
)
from hosts import End, Gone, MemoryGroup, Missing, Network, small_disk
from relay import Relay

from pageferry.workers import leftovers

_PROCESS = {
    Victim.SENDER: "pf-send-0",
    Victim.RECEIVER: "pf-recv-0",
    Victim.URGENT: "pf-postcopy",
    Victim.FAULT: "pf-fault",
    Victim.SOURCE_GUEST: "pf-demo-guest",
    Victim.DESTINATION_GUEST: "pf-demo-guest",
    Victim.SLOWER: "pf-throttle",
    Victim.COMMAND: "pf-command",
    Victim.SOURCE_CARRIER: "pf-carrier",
    Victim.DESTINATION_CARRIER: "pf-carrier",
    Victim.SAVER: "pf-save-0",
    Victim.GUARD: "pf-guard",
    Victim.GUEST: "pf-demo-guest",
}
_GATES = {
    SETUP: "hello", LOADING: "load_state", LEAVING: "load_state", STARTING: "run", JUMPING: "run",
    RECOVER: "resume",
}  # fmt: skip
_UNDISTURBED = (Outcome.COMPLETES, Outcome.SAVED, Outcome.SAVED_ALONE)
KILLS_SOURCE = (Victim.SOURCE, Victim.SOURCE_AND_SLOWER, Victim.COORDINATOR)
# Bytes a second while a moment is held: a guest of 4 MiB takes 28 s.
SLOW = 150_000
# A guest of 32 MiB moves in a few seconds, and so long is waited at the most for a random moment.
_IN_SECONDS = {"max_bandwidth": 20_000_000, "max_postcopy_bandwidth": 10_000_000}
_AT_RANDOM_SECONDS = 2.0
# Longer than any heartbeat (4 s).
_STOPPED_SECONDS = 4.5
_PATIENCE = 3  # times the bound, on a busy machine
_LONGEST_SECONDS = 90
_RESET_SECONDS = 10
_TURNS = 6  # recoveries that are tried
_numbers = itertools.count()


@dataclass
class Result:
    """What came of a cell. `took`: seconds from the fault to the error, by end, where one was to
    come. `errors`: class and exit code by end. `wrong`: what is not as it should be."""

    cell: str
    expected: str
    observed: str = ""
    took: dict[str, float | None] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    def as_dict(self):
        return asdict(self)


class Running:
    """One cell while it runs. Other kinds of runs: kinds.py."""

    def __init__(self, cell, nursery, starting, size, workers, seed, varied):
        self.cell, self.nursery, self.starting = cell, nursery, starting
        self.size, self.workers, self.seed, self.varied = size, workers, seed, varied
        self.result = Result(str(cell), " or ".join(sorted(o.value for o in allowed(cell))))
        self.stack = contextlib.AsyncExitStack()
        self.relay = self.network = self.group = self.image = None
        self.source = self.destination = None
        self.ends = []  # those there are
        self.number, self.draw = next(_numbers), random.Random(seed)
        self.at = 0.0  # when the fault came
        self.stopped = 0  # a pid

    # ---- laying out ----------------------------------------------------------------------

    @property
    def _on_disk(self):
        return self.cell.hit is Line.DISK

    @property
    def _relayed(self):
        direct = (Line.WIRE, Line.DISK, Line.MEMORY)
        return isinstance(self.cell.hit, Line) and self.cell.hit not in direct

    _recovers_itself = False
    _turn_seconds = 0.0  # after a recover that is tried

    @property
    def _has_demo_guest(self):
        return not self._on_disk

    def _parameters(self):
        moment = self.cell.moment
        found = {
            "workers": self.workers, "codec": "none", "batch_pages": 16, "insecure": True,
            "postcopy": "never" if self._on_disk else "manual", "max_rounds": 1000,
            "downtime_limit": 10.0,
        }  # fmt: skip
        if self.varied and not self._relayed and self.draw.random() < 0.5:
            found["postcopy_link"] = "direct"
        if moment is ANYWHERE:
            when = self.draw.choice(["manual", "now", "after=1"])
            return found | _IN_SECONDS | {"postcopy": when, "downtime_limit": 0.3}
        if moment is ROUND_1:
            found["max_bandwidth"] = SLOW
        if moment is ROUND_N:
            found["downtime_limit"] = 0.001
        if moment is WAITING:
            found["pause_before_switchover"] = True
        if moment.run in (RunSaid.POSTCOPY, RunSaid.STARTING) or moment is LEAVING:
            found |= {"postcopy": "now", "max_postcopy_bandwidth": SLOW}
        return found

    def _guest(self):
        if self._on_disk:
            return f"image:{self.image}"
        rate = 20_000 if self.cell.moment is ROUND_N else 50
        return f"demo:?size={self.size}&content=random&access=random&rate={rate}&seed={self.seed}"

    async def _start(self):
        cell, stack = self.cell, self.stack
        there = {"end": "destination", "endpoint": "tcp://127.0.0.1:0", "into": "demo:"}
        here = {"end": "source", "parameters": self._parameters()}
        if cell.moment in _GATES:
            there["hold"] = _GATES[cell.moment]
        if cell.moment is ASKING:
            here["hold"] = "ask"
        if cell.moment is ROUND_N:
            here["slow_from_2"] = SLOW
        if cell.hit is Line.WIRE:
            self.network = stack.enter_context(Network(self.number))
            there["network"], here["network"] = (
                self.network.names["destination"], self.network.names["source"],
            )  # fmt: skip
            there["endpoint"] = f"tcp://{self.network.address['destination']}:0"
        if cell.hit is Line.MEMORY:
            self.group = stack.enter_context(MemoryGroup(self.number))
            there["cgroup"] = str(self.group.folder)
        if self._on_disk:
            self._lay_disk(there)
        await self._begin(here, there)

    async def _begin(self, here, there):
        """Both ends, by what they are to be."""
        self.destination = await self._end(there)
        endpoint = (await self.destination.heard("listening"))["endpoint"]
        if self._relayed:
            self.relay = Relay(endpoint, self.draw if self.varied else None)
            self.stack.push_async_callback(self.relay.close)
            endpoint = self.relay.endpoint
        self.source = await self._end(here | {"endpoint": endpoint, "guest": self._guest()})

    async def _end(self, spec):
        end = await End.start(self.nursery, spec)
        self.stack.push_async_callback(end.close)
        self.ends.append(end)
        return end

    def _folder(self):
        folder = Path(tempfile.mkdtemp(prefix="pf-torture-"))
        self.stack.callback(shutil.rmtree, folder, True)
        return folder

    def _lay_disk(self, there):
        folder = self._folder()
        self.image = folder / "here.mem"
        self.image.write_bytes(os.urandom(8 << 20))
        self.content = self.image.read_bytes()
        self.disk = self.stack.enter_context(small_disk(folder / "disk", 16 << 20))
        there["into"] = f"image:{self.disk}/there.mem"

    # ---- the moment ----------------------------------------------------------------------

    async def _hold(self):
        """Until the moment is there, and nothing moves on."""
        moment, source, there = self.cell.moment, self.source, self.destination
        if moment is ANYWHERE:
            await source.heard("status", status="setup")
            await asyncio.sleep(self.draw.uniform(0, _AT_RANDOM_SECONDS))
            if source.ended or there.ended:
                raise Missing("it was over")
            return
        if moment in _GATES and moment is not RECOVER:
            await there.heard("held")
        elif moment is ASKING:
            await source.heard("held")
        elif moment is WAITING:
            await source.heard("status", status=moment.status.value)
        elif moment in (ROUND_1, ROUND_N):
            least = 1 if moment is ROUND_1 else 2
            await source.until(
                lambda: any(e.get("round", 0) >= least for e in source.said), f"round {least}"
            )
        else:
            await self._both("postcopy-active")
        if moment in (PAUSED, RECOVER):
            source.tell("pause")
            await self._both("postcopy-paused")
        if moment is RECOVER:
            source.tell("recover")
            await there.heard("held")
        assert source.status == moment.status.value, f"{source.status} is not {moment}"
        for end in self.ends:
            end.look()

    async def _both(self, status):
        for end in (self.source, self.destination):
            await end.heard("status", status=status)

    # ---- the fault -----------------------------------------------------------------------

    async def _do(self):
        cell = self.cell
        if isinstance(cell.hit, Victim) and cell.fault not in CANCELS:
            await self._hit(cell.hit)
            return
        self.at = time.monotonic()
        if cell.fault in CANCELS:
            self.source.tell("cancel")
            return
        match cell.hit, cell.fault:
            case Line.WIRE, _:
                self.network.cut()
            case Line.DISK, _:
                self._fill()
                self._unlimit()
            case Line.MEMORY, _:
                self.group.leave(1 << 20)
                self._unlimit()
                await self._until_the_kernel_kills()
            case line, Fault.RESET:
                resetting = self.relay.reset(line)
                with contextlib.suppress(TimeoutError):  # over meanwhile: nobody says anything
                    await asyncio.wait_for(resetting, _RESET_SECONDS)
            case line, fault:
                self.relay.do(line, fault)
                if line is Line.CONTROL:
                    self._go_on()
                await asyncio.wait_for(self.relay.done.wait(), 30)
                self.at = self.relay.at

    async def _hit(self, victim):
        """A process."""
        cell = self.cell
        pid = self._pid(victim)
        if not pid and cell.moment is ANYWHERE:
            raise Missing("it was not there")
        while not pid:
            await asyncio.sleep(0.01)
            pid = self._pid(victim)
        for end in self.ends:
            end.look()
        self.at = time.monotonic()
        if cell.fault is Fault.STOP:
            self.stopped = pid
        try:
            os.kill(pid, signal.SIGSTOP if cell.fault is Fault.STOP else signal.SIGKILL)
        except ProcessLookupError:
            if cell.moment is not ANYWHERE:
                raise
            raise Missing("it has just ended") from None
        if victim is Victim.DESTINATION_SERVER and cell.fault is Fault.KILL:
            await self._until_dead(self.destination.find("pf-demo-guest"))

    async def _until_the_kernel_kills(self):
        """Somebody, when memory has run out: that is the fault."""
        there = len(self.destination.alive())
        while len(self.destination.alive()) == there:
            self.at = time.monotonic()
            await asyncio.sleep(0.005)

    async def _until_dead(self, pid):
        """What a fork server has started ends with it, and not in the same moment."""
        with contextlib.suppress(psutil.NoSuchProcess):
            while pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.005)

    def _pid(self, victim):
        source = victim in (*KILLS_SOURCE, *SOURCE_SIDE) or len(self.ends) == 1
        end = self.source if source else self.destination
        match victim:
            case Victim.SOURCE | Victim.DESTINATION | Victim.COORDINATOR:
                return end.pid
            case Victim.SOURCE_SERVER | Victim.DESTINATION_SERVER | Victim.SERVER:
                return end.server
            case _:
                return end.find(_PROCESS[victim])

    def _fill(self):
        with contextlib.suppress(OSError), open(self.disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        self.at = time.monotonic()

    def _unlimit(self):
        """As fast as it can."""
        self.source.tell("set", arguments={
            "max-bandwidth": 0, "max-postcopy-bandwidth": 0, "downtime-limit": "10s",
        })  # fmt: skip

    def _go_on(self):
        """Hold nothing open any more."""
        self._unlimit()
        for end in self.ends:
            end.tell("release")
        if self.cell.moment is PAUSED:
            self._recover()
        if self.cell.moment is WAITING:
            self.source.tell("continue")

    def _recover(self):
        self.source.tell("recover")

    # ---- what comes of it ----------------------------------------------------------------

    def _trouble(self, end):
        """When an end said so: by its error, when it has let go of everything, or its pause."""
        found = [
            e["t"] for e in end.said
            if e["t"] >= self.at and (e.get("error") or e.get("status") == "postcopy-paused")
        ]  # fmt: skip
        return min(found, default=0.0)

    def _dead(self, end):
        """Whether that end was killed."""
        killed = dict.fromkeys(KILLS_SOURCE, self.source) | {Victim.DESTINATION: self.destination}
        return (self.cell.fault is Fault.KILL and killed.get(self.cell.hit) is end) or end.gone

    def _to_know(self):
        """The ends that are to say that something is wrong, before anything is done about it."""
        moment, what = self.cell.moment, expected(self.cell)
        ends = [e for e in self.ends if not self._dead(e)]
        gone = loss(self.cell)
        itself = (self.cell.fault, self.cell.hit) == (Fault.STOP, Victim.COORDINATOR)
        harmless = gone in (Loss.NOTHING, Loss.SOURCE_GUEST) and what is not Outcome.GUEST_DIES
        if moment in (ANYWHERE, PAUSED) or harmless or itself or what in _UNDISTURBED:
            return []
        if moment.run in (RunSaid.WHOLE, RunSaid.STARTING):
            # the start of a guest is not interrupted: the destination acts on it, and says so,
            # afterwards
            there = (Victim.SOURCE, Victim.RECEIVER, Victim.FAULT, Victim.DESTINATION_GUEST)
            silent = self.cell.hit in (*there, Victim.DESTINATION_SERVER)
            return [e for e in ends if e is self.source and not silent]
        return ends

    async def _wait_for_errors(self):
        waiting = self._to_know()
        for end in waiting:
            if self.stopped != end.pid:
                await self._know(end)
        if self.stopped:
            if not waiting:
                await asyncio.sleep(max(0.0, self.at + _STOPPED_SECONDS - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.stopped, signal.SIGCONT)
            for end in waiting:
                if self.stopped == end.pid:
                    await self._know(end, since=time.monotonic())

    async def _know(self, end, since=0.0):
        limit = bound(self.cell)
        self.result.bounds[end.name] = limit
        try:
            await end.until(
                lambda: self._trouble(end) or end.ended, "an error", limit * _PATIENCE + 25
            )
        except Gone:
            if self.cell.hit is not Line.MEMORY:
                raise
            return
        if self._trouble(end):
            took = self._trouble(end) - max(self.at, since)
            self.result.took[end.name] = round(max(0.0, took), 2)
            if took > limit * _PATIENCE:
                self.result.wrong.append(f"the {end.name} knew after {took:.1f} s")

    async def _to_the_end(self):
        """Whatever can go on does, and whatever cannot ends."""
        if self.network is not None:
            self.network.join()
        if self.group is not None:
            self.group.lift()
        self._go_on()
        asked = 0
        until = time.monotonic() + 60
        while True:
            ends = [e for e in self.ends if not e.gone and not self._dead(e)]
            left = [e for e in ends if not e.ended]
            if not left:
                return
            if time.monotonic() > until:
                raise TimeoutError(
                    "no end: " + ", ".join(f"the {e.name} is {e.status}" for e in left)
                )
            paused = [e for e in left if e.status == "postcopy-paused"]
            if self._recovers_itself:
                paused = []
            if paused and (len(left) == 1 or self._gone_for_good()):
                for end in paused:
                    end.tell("cancel")
            elif len(paused) == 2 and asked < _TURNS:
                asked += 1
                self._recover()
                await asyncio.sleep(self._turn_seconds)
            await asyncio.sleep(0.1)

    def _gone_for_good(self):
        return loss(self.cell) in (Loss.SOURCE_END, Loss.DESTINATION_END)

    async def _facts(self):
        """Both ends let go; what they say of the guest and of what they left."""
        facts = {}
        for end in self.ends:
            facts[end.name] = end.ended
            if end.ended:
                said = f"{end.ended['error']} ({end.ended['exit-code']})"
                self.result.errors[end.name] = said if end.ended["error"] else "done"
        if self.source.ended and self._has_demo_guest:
            facts["guest"] = await self.source.heard("guest")
        for end in self.ends:  # the destination first
            end.tell("quit")
            if not self._dead(end) and end.ended:
                left = await end.heard("left")
                end.look()
                if more := {k: v for k, v in left.items() if k not in ("event", "t")}:
                    self.result.wrong.append(f"left at the {end.name}: {more}")
        facts["still"] = self.source.first("still")
        await self._nothing_is_left()
        return facts

    async def _nothing_is_left(self):
        for end in self.ends:
            until = time.monotonic() + 20
            while (alive := end.alive()) and time.monotonic() < until:
                await asyncio.sleep(0.02)
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    self.result.wrong.append(f"{process.name()} of the {end.name} goes on")
            while (names := _names(end.pid)) and time.monotonic() < until:
                if self._dead(end):
                    leftovers.sweep()  # as the next start does
                await asyncio.sleep(0.05)
            if names:
                self.result.wrong.append(f"names of the {end.name}: {names}")
        if self._on_disk and (names := [n for n in os.listdir(self.disk) if n != "filler"]):
            self.result.wrong.append(f"left on the disk: {names}")

    def _observed(self, facts):
        """Which outcome that is."""
        source, there, guest = facts["source"], facts["destination"], facts.get("guest") or {}
        arrived = bool(there) and not there["error"] and there["oracle"] is True
        if arrived and source and not source["error"]:
            self._stands_still(facts)
            return Outcome.RECOVERS if source["recoveries"] else Outcome.COMPLETES
        if arrived:
            if source:
                self._stands_still(facts)
            return Outcome.ARRIVES
        if self._killed_on_arrival(source, there):
            return Outcome.LOST
        if there and not there["error"]:
            return f"arrived, and the oracle says {there['oracle']}"
        errors = {e["error"] for e in (source, there) if e}
        if "PostcopyFailed" in errors:
            if source:
                self._stands_still(facts)
            return Outcome.LOST
        if source and source["error"] == "ConfirmationLost":
            self._stands_still(facts)
            return Outcome.UNCONFIRMED
        if self._on_disk:
            same = self.image.read_bytes() == self.content
            return Outcome.SOURCE_RUNS if same else "the source is not as it was"
        if guest.get("guest") == "runs":
            return Outcome.SOURCE_RUNS if guest["whole"] else "the source's guest is not as it was"
        if not source or guest.get("guest") == "gone":
            return Outcome.GUEST_DIES
        return f"source {source}, destination {there}, guest {guest}"

    def _killed_on_arrival(self, source, there):
        """Its guest had arrived, and died there of the fault before it was looked at."""
        told = source and not source["error"] and (not there or there["error"])
        return told and loss(self.cell) in (Loss.DESTINATION_GUEST, Loss.DESTINATION_END)

    def _stands_still(self, facts):
        """The guest runs at one side only, and its memory here is as it was when it left."""
        guest = facts.get("guest")
        if guest is None or guest["guest"] == "gone":
            return
        for what in (guest, facts["still"] or guest):
            if what["guest"] != "stands still":
                self.result.wrong.append(f"the source's guest {what['guest']}")
        if guest.get("whole") is False:
            self.result.wrong.append("the source's memory has changed")

    async def run(self):
        begin = time.monotonic()
        try:
            async with self.stack:
                async with self.starting, asyncio.timeout(_LONGEST_SECONDS):
                    begin = time.monotonic()
                    await self._start()
                    await self._hold()
                async with asyncio.timeout(_LONGEST_SECONDS):
                    await self._do()
                    await self._wait_for_errors()
                    await self._to_the_end()
                    observed = self._observed(await self._facts())
                self.result.observed = getattr(observed, "value", observed)
                if not _as_expected(self.cell, observed):
                    self.result.wrong.append(f"observed: {self.result.observed}")
        except Missing as e:
            self.result.skipped = str(e)
        except (TimeoutError, Gone, AssertionError, OSError) as e:
            self.result.wrong.append(f"{type(e).__name__}: {e}; {self._story()}")
        self.result.seconds = round(time.monotonic() - begin, 1)
        return self.result

    def _story(self):
        """What both ends have said, for whoever looks for the reason."""
        lines = []
        for end in self.ends:
            for said in end.said:
                what = {k: v for k, v in said.items() if k not in ("event", "t")}
                lines.append((said["t"] - self.at, end.name, said["event"], what))
        return "; ".join(f"{t:.2f} {n} {e} {w}" for t, n, e, w in sorted(lines, key=lambda x: x[0]))


def _names(pid):
    return [
        name for folder in ("/dev/shm", tempfile.gettempdir()) for name in os.listdir(folder)
        if f"pageferry-{pid}-" in name
    ]  # fmt: skip


def _as_expected(cell, observed):
    """A source that was stopped and goes on may hear that its guest has arrived, and so may one
    that hears it twice."""
    wanted = expected(cell)
    if wanted is Outcome.ARRIVES and observed is Outcome.COMPLETES:
        return cell.fault in (Fault.STOP, Fault.REPEAT)
    return observed in allowed(cell)
