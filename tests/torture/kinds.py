"""Cells of other kinds of runs than a demo guest over a network: what they run on, how they are
held, and what is looked at afterwards. What they have in common is runner.py's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import time

import hosts
from cells import LAZILY, SAVING_LIVE, STOPS, STREAM_POSTCOPY, Fault, Kind, Line, Outcome, Victim
from hosts import End
from ring import PAGE, Ring
from runner import SLOW, Running

from pageferry.transport.errors import PageferryError
from pageferry.transport.snapshot_format import ALIGNMENT
from pageferry.workers.snapshot_file import CheckedBlock, open_snapshot

_PAGES = {"4M": 256, "32M": 2048}  # of a process that is saved
_FEW = 256  # of one that is slowed down: after a second or two of two rounds
_RATE = 2000  # pages that it writes a second


class _OfAProcess(Running):
    """The guest is a process of its own."""

    ring = None
    _has_demo_guest = False

    async def _start_ring(self, pages):
        path = f"/dev/shm/pf-torture-{os.getpid()}-{self.number}"
        self.stack.callback(lambda: os.path.exists(path) and os.unlink(path))
        self.ring = Ring(path, pages, self.seed)
        spec = {"end": "ring", "path": path, "rate": _RATE}
        self.ring.end = await End.start(self.nursery, spec)
        self.stack.push_async_callback(self.ring.end.close)
        self.ring.end.look()

    async def _hit(self, victim):
        if victim is Victim.SOURCE_AND_SLOWER:  # at once: neither sees the other end
            slower = self._pid(Victim.SLOWER)
            os.kill(slower, signal.SIGSTOP)
            await super()._hit(victim)
            os.kill(slower, signal.SIGKILL)
            return
        await super()._hit(victim)

    def _pid(self, victim):
        match victim:
            case Victim.SOURCE_GUEST | Victim.GUEST:
                return self.ring.pid
            case Victim.SOURCE_AND_SLOWER:
                return self.source.pid
            case _:
                return super()._pid(victim)

    async def _look_at_the_process(self):
        """What has become of it, and that its memory is of one instant still."""
        found = await self.ring.look()
        if found == "runs":
            os.kill(self.ring.pid, signal.SIGSTOP)
        if found != "is gone" and (fault := self.ring.fault(self.ring.memory())):
            self.result.wrong.append(f"the process's memory: {fault}")
        return found


class Throttled(_OfAProcess):
    """A process that is slowed down, by either means: in the end it has all of its time."""

    async def _start(self):
        await self._start_ring(_FEW)
        self.image_there = self._folder() / "there.mem"
        there = {"end": "destination", "endpoint": "tcp://127.0.0.1:0",
                 "into": f"image:{self.image_there}"}  # fmt: skip
        stops = self.cell.moment is STOPS
        parameters = {
            "workers": self.workers, "codec": "none", "batch_pages": 16, "insecure": True,
            "postcopy": "never", "max_rounds": 1000, "downtime_limit": 0.001,
            "max_bandwidth": 4 * SLOW, "auto_converge": stops, "dirty_limit": not stops,
            "max_cpu_throttle": 50,
        }  # fmt: skip
        here = {"end": "source", "parameters": parameters, "slows": True}
        if self.cell.hit is Line.WIRE:
            self.network = self.stack.enter_context(hosts.Network(self.number))
            there["network"], here["network"] = (
                self.network.names["destination"], self.network.names["source"],
            )  # fmt: skip
            there["endpoint"] = f"tcp://{self.network.address['destination']}:0"
        await self._begin(here, there)

    def _guest(self):
        return f"pid:{self.ring.pid}?throttle={'signal' if self.cell.moment is STOPS else 'cgroup'}"

    async def _hold(self):
        await self.source.heard("throttled")
        for end in self.ends:
            end.look()

    @property
    def _went_on(self):
        """It stood still already when it had moved, and it was us who let it go on."""
        return (self.cell.fault, self.cell.hit) == (Fault.STOP, Victim.SOURCE_GUEST)

    async def _facts(self):
        if self.cell.hit is Victim.SOURCE and self.cell.fault is Fault.KILL:
            await self._until_dead(self.source.pid)
            before = await self.ring.look()  # before anybody sweeps
            if before != "runs":
                self.result.wrong.append(f"the process {before}, before the next start")
        facts = await super()._facts()
        return facts | {"process": await self._look_at_the_process()}

    def _observed(self, facts):
        source, there, process = facts["source"], facts["destination"], facts["process"]
        if process == "is gone":
            return Outcome.GUEST_DIES
        if process == "runs" and not self.image_there.exists():
            return Outcome.SOURCE_RUNS
        arrived = there and not there["error"] and source and not source["error"]
        if process == "stands still" and arrived:
            if self.image_there.read_bytes() != self.ring.memory():
                return "completed, and is not what the process has"
            return Outcome.COMPLETES
        if arrived and process == "runs" and self._went_on:
            fault = self.ring.fault(self.image_there.read_bytes())
            return fault or Outcome.COMPLETES
        return f"the process {process}; source {source}, destination {there}"


class Streamed(Running):
    """Both ends are at one stream. It goes through here."""

    _turn_seconds = 2.0  # before a new way is gone the stream is closed

    async def _start(self):
        folder = self._folder()
        self._paths = [str(folder / end) for end in ("here", "there")]
        self._waiting, self._cut, self._writers = [], False, []
        for path in self._paths:
            server = await asyncio.start_unix_server(self._came, path)
            self.stack.callback(server.close)
        self.stack.callback(self._close)
        await super()._start()

    async def _begin(self, here, there):
        self.destination = await self._end(there | {"stream": self._paths[1]})
        self.listens = (await self.destination.heard("listening"))["endpoint"]
        program = [sys.executable, "-I", "-S", str(hosts.HERE / "pipe.py"), self._paths[0]]
        endpoint = f"exec:exec {shlex.join(program)}"
        self.source = await self._end(here | {"endpoint": endpoint, "guest": self._guest()})

    def _parameters(self):
        found = super()._parameters()
        if self.cell.moment is not STREAM_POSTCOPY:
            found |= {"max_bandwidth": SLOW}
        return found

    async def _came(self, reader, writer):
        """Of either end: when both are there what one says the other hears."""
        self._writers.append(writer)
        self._waiting.append((reader, writer))
        if len(self._waiting) == 2:
            (one, other), (another, third) = self._waiting
            self._waiting.clear()
            await asyncio.gather(self._pump(one, third), self._pump(another, other))

    async def _pump(self, reader, writer):
        try:
            while data := await reader.read(65536):
                if self._cut and len(data) > 4096:
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    self.at = time.monotonic()
                    self._close()
                    self.is_cut.set()
                    return
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:  # whoever was killed had not read all
            writer.close()

    def _close(self):
        for writer in self._writers:
            writer.close()

    async def _hold(self):
        if self.cell.moment is STREAM_POSTCOPY:
            await self._both("postcopy-active")
        await self.source.heard("moving")
        for end in self.ends:
            end.look()

    async def _do(self):
        if self.cell.hit is not Line.STREAM:
            await super()._do()
            return
        self.is_cut, self._cut = asyncio.Event(), True
        await asyncio.wait_for(self.is_cut.wait(), 30)

    def _recover(self):
        """By another way in: the stream's is gone."""
        self.source.tell("recover", where=self.listens)


class Saved(_OfAProcess):
    """A process that is saved to a file: that is whole, or not there; and the process goes on."""

    async def _start(self):
        await self._start_ring(_PAGES[self.size])
        folder = self._folder()
        self.disk = self.stack.enter_context(hosts.small_disk(folder / "disk", 24 << 20))
        self.path = self.disk / "a.snapshot"
        self.source = await self._end({
            "end": "saving", "guest": f"pid:{self.ring.pid}", "into": f"file:{self.path}",
            "live": self.cell.moment is SAVING_LIVE, "workers": self.workers, "hold": "half",
        })  # fmt: skip
        self.source.name = "source"

    async def _hold(self):
        await self.source.heard("held")
        self.source.look()

    async def _do(self):
        await super()._do()
        if self.cell.hit is Line.DISK:  # the other half finds no room
            self._go_on()

    async def _facts(self):
        facts = await super()._facts()
        left = [name for name in os.listdir(self.disk) if name not in ("filler", self.path.name)]
        if left:
            self.result.wrong.append(f"left on the disk: {left}")
        return facts | {"process": await self._look_at_the_process()}

    def _observed(self, facts):
        process, there = facts["process"], self.path.exists()
        if there and (fault := self._fault_of_the_file()):
            return f"a file that is not whole: {fault}"
        match there, process:
            case True, "runs":
                return Outcome.SAVED
            case False, "runs":
                return Outcome.NOT_SAVED
            case True, "is gone":
                return Outcome.SAVED_ALONE
            case False, "is gone":
                return Outcome.NO_GUEST
        return f"the process {process}, the file is {'' if there else 'not '}there: {facts}"

    def _fault_of_the_file(self):
        """As whoever restores it finds it; and it is the memory of one instant."""
        try:
            file, index = open_snapshot(str(self.path))
            with contextlib.closing(file):
                (stored,) = index.blocks
                CheckedBlock(stored, file).check(range(stored.pages))
        except PageferryError as e:
            return e.message
        data = self.path.read_bytes()[ALIGNMENT : ALIGNMENT + len(self.ring.content)]
        return self.ring.fault(data)


class Restored(Running):
    """A snapshot of a demo guest that is restored; onto a disk it is one of an image."""

    _has_demo_guest = False
    _recovers_itself = True

    async def _start(self):
        folder = self._folder()
        self.path = folder / "a.snapshot"
        on_disk = self.cell.hit is Line.DISK
        into = "demo:"
        if on_disk:
            self.disk = self.stack.enter_context(hosts.small_disk(folder / "disk", 16 << 20))
            into = f"image:{self.disk}/there.mem"
        self.before = await self.nursery.snapshot(self._what(folder))
        self.path.write_bytes(self.before)
        lazily = self.cell.moment is LAZILY
        slow = "max_postcopy_bandwidth" if lazily else "max_bandwidth"
        parameters = {
            "workers": self.workers, "codec": "none", "batch_pages": 16, slow: SLOW,
            "postcopy": "now" if lazily else "never",
        }  # fmt: skip
        self.source = await self._end({
            "end": "restoring", "guest": f"file:{self.path}", "into": into,
            "parameters": parameters,
        })  # fmt: skip
        self.source.name = "source"

    def _what(self, folder):
        """The guest that was saved."""
        if self.cell.hit is not Line.DISK:
            return f"demo:?size={self.size}&content=random&access=random&rate=50"
        (folder / "image").write_bytes(os.urandom(8 << 20))
        return f"image:{folder}/image"

    async def _hold(self):
        if self.cell.moment is LAZILY:
            await self.source.heard("status", status="postcopy-active")
        await self.source.heard("moving")
        self.source.look()

    async def _do(self):
        if self.cell.fault is Fault.TWICE:
            self.source.tell("cancel")
        if self.cell.hit is not Line.FILE:
            await super()._do()
            return
        self.at = time.monotonic()
        length = int(self.size.rstrip("M")) << 20
        with open(self.path, "r+b") as file:
            if self.cell.fault is Fault.CUT:
                file.truncate(ALIGNMENT + PAGE)
            else:  # of the half that is read last, a byte of each page
                for at in range(ALIGNMENT + length // 2, ALIGNMENT + length, PAGE):
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 0x10]))
        self._unlimit()

    def _observed(self, facts):
        if self.cell.hit is not Line.FILE and self.path.read_bytes() != self.before:
            return "the snapshot is not as it was"
        source = facts["source"]
        if source and not source["error"]:
            if source["oracle"] is not True:
                return f"restored, and the oracle says {source['oracle']}"
            return Outcome.RECOVERS if source["recoveries"] else Outcome.COMPLETES
        if self.cell.moment is LAZILY:
            return Outcome.LOST
        if self.cell.hit is Line.DISK and (left := set(os.listdir(self.disk)) - {"filler"}):
            return f"left on the disk: {left}"
        return Outcome.NOT_RESTORED


_BY_KIND = {
    Kind.NETWORK: Running,
    Kind.THROTTLED: Throttled,
    Kind.STREAM: Streamed,
    Kind.SAVING: Saved,
    Kind.RESTORING: Restored,
}


async def run_cell(cell, nursery, starting, *, size="4M", workers=1, seed=1, varied=False):
    """What came of it. In the quick form guests are small and there is one channel. `starting`: a
    semaphore; what costs processor time is the start, and who gets none for four seconds is taken
    for dead. `varied`: by the seed, what does not matter to the outcome."""
    running = _BY_KIND[cell.moment.kind]
    return await running(cell, nursery, starting, size, workers, seed, varied).run()
