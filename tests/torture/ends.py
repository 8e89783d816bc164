"""One end of a migration in a process of its own, as `pageferry send` and `receive` are (and
`snapshot` and `restore`: ends_of_files.py), that says what happens and does what it is told
(telling.py).

Ends are forked off a process that has imported everything (`serve`): a matrix starts hundreds.
After its end each says what it has left behind, and the source what has become of its guest.
"""

from __future__ import annotations

import array
import asyncio
import atexit
import collections
import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver, resource_tracker, util

import ends_of_files
import psutil
import ring
from telling import HELD_SECONDS, End, Wire

from pageferry.pipeline import api
from pageferry.pipeline.arrival import Arrival
from pageferry.pipeline.carriage import dialled, local_endpoint
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.transport.errors import SourceError
from pageferry.transport.links import parse_endpoint
from pageferry.transport.stream_addresses import Stream
from pageferry.workers.forking import warm_up
from pageferry.workers.guests import demo, demo_process, open_source, parse_guest
from pageferry.workers.guests.demo import DemoDestination

_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_LOOK_SECONDS = 0.02
# How often a guest wakes that has a rate: by default each millisecond, and dozens run here.
_TICK_SECONDS = 0.02


class HeldGuest(DemoDestination):
    """A demo guest that does not go on at one point."""

    def __init__(self, gate):
        super().__init__(parse_guest("demo:"))
        self._gate = gate

    def load_state(self, kind, state, running):
        self._gate.pass_by("load_state")
        super().load_state(kind, state, running)

    def run(self):
        self._gate.pass_by("run")
        return super().run()

    def hurry(self):
        super().hurry()
        self._gate.give_up()


# ---- the two ends -----------------------------------------------------------------------


class SourceEnd(End):
    async def run(self):
        uri = parse_guest(self.spec["guest"])
        guest = await asyncio.to_thread(open_source, uri)
        try:
            parameters = Parameters(**self.spec["parameters"]).checked()
            obeying = await self.until_over(lambda: self.move(guest, parameters))
            if uri.kind == "demo":
                try:
                    found = await asyncio.to_thread(self.look_at, guest)
                except SourceError:  # killed when it was over
                    found = {"guest": "gone"}
                self.wire.say("guest", **found)
            await self.stay(obeying)
            if uri.kind == "demo" and guest._stopped and not guest._guest.has_ended():
                self.wire.say("still", **self.stands_still(guest))  # to the very end
        finally:
            await asyncio.to_thread(guest.close)

    async def move(self, guest, parameters):
        """As api.send."""
        async with dialled(api.parse_target(self.spec["endpoint"])) as (there, carriage):
            self.source = Source(guest, there, parameters)
            self.source.carriage, carriage.on_failure = carriage, self.source.link_broke
            self.source.on_event = self.event
            if self.spec.get("hold") == "ask":
                self.source.before_stop = self.ask
            moving = asyncio.ensure_future(self.say_when_pages_move())
            try:
                return await self.source.run()
            finally:
                moving.cancel()

    async def ask(self):
        self.wire.say("held")
        await asyncio.to_thread(self.gate.open.wait, HELD_SECONDS)

    def event(self, name, data):
        if name == "MIGRATION_PASS" and data["pass"] == 2 and self.spec.get("slow_from_2"):
            self.source.set_parameters({"max-bandwidth": self.spec["slow_from_2"]})
        super().event(name, data)

    async def say_when_pages_move(self):
        """Of each round, once; and when the guest is slowed down."""
        told = slowed = 0
        while True:
            if not slowed and self.spec.get("slows"):
                slowed = self.source.query().get("cpu-throttle-percentage", 0)
                if slowed:
                    self.wire.say("throttled", percentage=slowed)
            statistics = self.source.statistics
            if statistics.rounds != told and statistics.pages_done > statistics.round_base:
                told = statistics.rounds
                self.wire.say("moving", round=told)
            await asyncio.sleep(_LOOK_SECONDS)

    def act(self, what, **data):
        match what:
            case "set":
                self.source.set_parameters(data["arguments"])
            case "postcopy":
                self.source.start_postcopy()
            case "pause":
                self.source.pause()
            case "continue":
                self.source.go_on()
            case "recover":
                self.source.recover(data.get("where"))
            case "cancel":
                self.source.cancel()

    def look_at(self, guest):
        """What has become of the guest here: it runs on and is whole, or stands still."""
        if guest._guest.has_ended():
            return {"guest": "gone"}
        if guest._stopped:
            return self.stands_still(guest) | {"whole": guest._guest.ask("check").verdict.ok}
        before, until = guest._guest.ask("latency").registers, time.monotonic() + 10
        while (now := guest._guest.ask("latency").registers) == before:
            if time.monotonic() > until:
                return {"guest": "does not run", "whole": False}
            time.sleep(_LOOK_SECONDS)
        verdict = guest.verdict()
        guest.resume()
        return {"guest": "runs", "whole": verdict.ok, "steps": now.position}

    @staticmethod
    def stands_still(guest):
        """Its registers are as they were when it was stopped: it has not run since."""
        now = guest._guest.ask("latency").registers
        return {"guest": "stands still" if now == guest._registers else "ran on"}


class DestinationEnd(End):
    def hold_before_receivers(self, *, recovering):
        """The source has no answer yet, to its Hello or its Resume."""
        start = Arrival._start_receivers

        async def held(arrival, *, installing):
            if installing == recovering and not self.gate.open.is_set():
                self.wire.say("held")
                while not self.gate.open.is_set():
                    await asyncio.sleep(_LOOK_SECONDS)
            return await start(arrival, installing=installing)

        Arrival._start_receivers = held

    async def run(self):
        if self.spec.get("hold") in ("hello", "resume"):
            self.hold_before_receivers(recovering=self.spec["hold"] == "resume")
        stream = self.spec.get("stream")
        endpoint = local_endpoint() if stream else parse_endpoint(self.spec["endpoint"])
        into = self.spec["into"]
        opener = api.opener(parse_guest(into))
        if into == "demo:":
            opener = lambda hello: HeldGuest(self.gate)  # noqa: E731
        self.listening = Destination(endpoint, opener, on_event=self.event, insecure=True)
        try:
            self.wire.say("listening", endpoint=str(self.listening.endpoint))
            arriving = self.arrive_over(stream) if stream else api.receive_one(self.listening)
            await self.stay(await self.until_over(lambda: arriving))
        finally:
            self.listening.close()

    async def arrive_over(self, path):
        """A stream: what is at `path`."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        reports = []
        told = lambda report, error: reports.append(report)  # noqa: E731
        await api.receive_stream(Stream(reads=sock.detach()), self.listening, told)
        return reports[-1]

    def act(self, what, **data):
        match what:
            case "cancel":
                self.listening.cancel()


# ---- the process ------------------------------------------------------------------------


def _descriptors():
    """How many of each kind."""
    kinds, ours = collections.Counter(), f"{tempfile.gettempdir()}/pageferry-"
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
            # a fork server that has ended has taken its folder along, and the next has another
            kinds[ours if kind.startswith(ours) else kind] += 1
    return kinds


def _helpers():
    return {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}


def _left(before):
    """What there is that was not before."""
    gc.collect()
    found = {}
    if more := _descriptors() - before[0]:
        found["descriptors"] = dict(more)
    if more := {t.name for t in threading.enumerate()} - before[1]:
        found["threads"] = sorted(more)
    mine = psutil.Process().children(recursive=True)
    if more := [c.name() for c in mine if c.pid not in _helpers() and c.status() != "zombie"]:
        found["processes"] = more
    names = [n for n in os.listdir("/dev/shm") if f"pageferry-{os.getpid()}-" in n]
    if more := set(names) - before[2]:
        found["names"] = sorted(more)
    return found


def _forked(path, args, passfds):
    """As multiprocessing's spawnv_passfds: fork server and resource tracker, without the quarter of
    a second in which they import what is here already."""
    pid = os.fork()
    if pid:
        return pid
    try:
        atexit._clear()  # those of the coordinator
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in passfds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        with contextlib.suppress(SystemExit):
            exec(args[-1], {})
        atexit._run_exitfuncs()
    finally:
        os._exit(0)


@contextlib.contextmanager
def _helpers_are_forked():
    """Only as long as there is no thread."""
    before, util.spawnv_passfds = util.spawnv_passfds, _forked
    try:
        yield
    finally:
        util.spawnv_passfds = before


def main(spec, sock):
    """The process of an end."""
    wire = Wire(sock)
    if spec["end"] == "ring":
        ring.serve(spec, wire)
    demo.RUN_ON_SECONDS = 0.1
    logging.getLogger("pageferry").addHandler(logging.NullHandler())
    demo_process._TICK = _TICK_SECONDS  # before the fork server is forked
    with _helpers_are_forked():
        warm_up()
    wire.say("up", pid=os.getpid(), server=forkserver._forkserver._forkserver_pid)
    names = [n for n in os.listdir("/dev/shm") if f"pageferry-{os.getpid()}-" in n]
    before = (_descriptors(), {t.name for t in threading.enumerate()}, set(names))
    ends = {"source": SourceEnd, "destination": DestinationEnd, **ends_of_files.ENDS}

    async def go():
        await ends[spec["end"]](wire, spec).run()

    asyncio.run(go())
    wire.say("left", **_left(before))


def _enter(spec):
    """The network, and the cgroup, that it is to be in."""
    if network := spec.get("network"):
        fd = os.open(f"/run/netns/{network}", os.O_RDONLY | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)
    if group := spec.get("cgroup"):
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))


def serve(orders):
    """Fork an end for each spec that comes with a socket; answer with its pid. Ends when nobody
    has the other side."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    while True:
        data, ancillary, _, _ = orders.recvmsg(1 << 16, socket.CMSG_SPACE(4))
        if not data:
            return
        fd = array.array("i", ancillary[0][2])[0]
        pid = os.fork()
        if pid == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                spec = json.loads(data)
                _enter(spec)
                main(spec, socket.socket(fileno=fd))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                util._exit_function()
                os._exit(code)
        os.close(fd)
        orders.sendall(str(pid).encode())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
