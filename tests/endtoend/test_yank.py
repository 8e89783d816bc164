"""A migration that hangs is cut from outside: real stopped processes, in every state.

What each of them would wait for otherwise takes from four seconds (a silent peer) to a minute (a
guest that does not answer), and says so in other words than "yanked".
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver

import psutil
import pytest
import unsure_guest
from both_ends import BothEnds
from helpers import Running, ask, receiver, sweep, until, until_async
from helpers import pageferry as run
from qemu_vm import Vm, require_qemu

from pageferry.pipeline import api
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.snapshot import Snapshot
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.tools.bench.boot_guest import rom_image
from pageferry.transport.errors import ConfirmationLost, PageferryError, PeerLost
from pageferry.transport.links import Endpoint
from pageferry.workers import forking
from pageferry.workers.forking import start_process
from pageferry.workers.guests import open_destination, open_source, parse_guest

SLOW = {"max_bandwidth": 2_000_000, "workers": 2}


class Ends(BothEnds):
    """Both ends in one event loop; `destination`: the guest that is to arrive, if not a demo's."""

    def __init__(self, guest, destination=None, **parameters):
        endpoint = Endpoint("ipc", path=f"@test-yank-{os.getpid()}")
        opener = api.opener(parse_guest("demo:"))
        if destination is not None:

            def opener(hello):
                return destination

        self.listening = Destination(endpoint, opener)
        self.source = Source(guest, endpoint, Parameters(**parameters).checked())

    async def status(self, wanted):
        await until_async(
            lambda: self.source.core.status is wanted or self.sending.done(), wanted.value
        )

    async def ends_as_yanked(self, kind=PeerLost):
        with pytest.raises(kind, match="yanked"):
            await self.sending
        assert not self.source.can_be_yanked()


@pytest.fixture
def guest():
    guest = open_source(parse_guest("demo:?size=8M&content=text&rate=1000"))
    yield guest
    guest.close()


@contextlib.contextmanager
def stopped(*pids):
    """As if they hung."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def runs(guest):
    """Here, and nothing is lost."""
    guest._guest.patience.hurried = False
    assert not guest._stopped
    first = guest.verdict()
    guest.resume()
    second = guest.verdict()
    assert first.ok and second.ok


def test_in_setup_while_the_other_end_says_nothing(guest):
    """Something that accepts connections and is silent."""

    async def go():
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = Endpoint("tcp", "127.0.0.1", server.getsockname()[1])
            source = Source(guest, endpoint, Parameters(workers=1).checked())
            sending = asyncio.ensure_future(source.run())
            await until_async(lambda: source._connection.made == 1, "it has said Hello")
            assert source.core.status is Status.SETUP
            source.yank()
            with pytest.raises(PeerLost, match="yanked"):
                await sending

    asyncio.run(go())
    runs(guest)


@pytest.mark.parametrize("victim", ["sender", "receiver", "nobody"])
def test_in_a_round_with_a_worker_that_hangs(guest, victim):
    async def go():
        async with Ends(guest, **SLOW) as ends:
            await ends.status(Status.ACTIVE)
            await until_async(lambda: ends.source.statistics.pages_done > 0, "pages move")
            pools = {
                "sender": ends.source._equipment.crew.pool,
                "receiver": ends.listening.arrival._pool,
            }
            pids = [pools[victim].workers[0].process.pid] if victim in pools else []
            with stopped(*pids):
                ends.source.yank()
                await ends.ends_as_yanked()
                with pytest.raises(PageferryError, match="yanked"):
                    await ends.arriving

    asyncio.run(go())
    runs(guest)


class Hanging(Snapshot):
    """Its saver stands still, and then it is yanked."""

    def _extents(self):
        os.kill(self._crew.pool.workers[0].process.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_soon(self.yank)
        return super()._extents()


def test_a_snapshot_whose_saver_hangs(guest, tmp_path):
    """The guest, which stands still, goes on; there is no file."""
    taking = Hanging(guest, str(tmp_path / "a"), 1)
    with pytest.raises(PeerLost, match="yanked"):
        asyncio.run(taking.run())
    assert not taking.can_be_yanked()
    assert os.listdir(tmp_path) == []
    runs(guest)


def test_while_the_guest_itself_does_not_stop(guest):
    """It is told to, and hangs: nobody knows then whether it goes on, and the error says so."""
    pid = guest._guest.process.pid

    async def go():
        async with Ends(guest, workers=1) as ends:
            with contextlib.ExitStack() as hung:

                async def hangs():
                    hung.enter_context(stopped(pid))

                ends.source.before_stop = hangs
                await ends.status(Status.DEVICE)
                ends.source.yank()
                with pytest.raises(PeerLost, match=r"yanked.*does not answer"):
                    await ends.sending

    asyncio.run(go())


def test_while_the_other_end_starts_the_guest(guest):
    """It was told to run, and nobody knows whether it does: the source stays stopped."""
    mute = unsure_guest.NeverConfirms(parse_guest("demo:"))

    async def go():
        async with Ends(guest, mute) as ends:
            await until_async(lambda: ends.source.core.run_said, "Run was said")
            ends.source.yank()
            await ends.ends_as_yanked(ConfirmationLost)
            mute.release.set()

    asyncio.run(go())
    assert guest._stopped


def test_at_the_destination_while_the_guest_does_not_start(guest):
    """It is ended, and cannot run any more: so the source goes on."""
    hangs = unsure_guest.HangsAtTheStart(parse_guest("demo:"))

    async def go():
        async with Ends(guest, hangs) as ends:
            await until_async(lambda: ends.source.core.run_said, "Run was said")
            arrival = ends.listening.arrival
            await until_async(lambda: arrival.starting, "it is told to run")
            ends.listening.yank()
            with pytest.raises(PageferryError, match="does not answer"):
                await ends.sending
            with pytest.raises(PageferryError, match="does not answer"):
                await ends.arriving

    asyncio.run(go())
    runs(guest)


class CutAtOnce(Source):
    """As if the cut came in the moment in which it begins to look at the handshake."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        start = self._tasks.start

        def started(coroutine, *, link=False):
            task = start(coroutine, link=link)
            if coroutine.__name__ == "_watch_handshake":
                task.cancel()
                self.yank()
            return task

        self._tasks.start = started


def test_before_anybody_has_looked_at_the_handshake(guest):
    """What was opened for that is closed: else the end of the link is never reached."""

    async def go():
        async with Ends(guest) as ends:
            await ends.ends_as_yanked()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Source", CutAtOnce)
        asyncio.run(go())
    runs(guest)


def test_at_the_destination_when_the_guest_runs(guest):
    """What is set back on its host may hang: the guest runs, and is ended by nobody."""
    runs_there = unsure_guest.SetBackLate(parse_guest("demo:"))

    async def go():
        async with Ends(guest, runs_there) as ends:
            await ends.sending  # it was told that it runs
            arrival = ends.listening.arrival
            assert arrival.status is Status.DEVICE
            ends.listening.yank()
            arrival._hurry_start()  # as it is a second later
            assert not runs_there.yanked
            runs_there.release.set()
            report = await ends.arriving
            assert report["status"] == "completed"
            assert report["oracle"]["ok"]

    asyncio.run(go())


def test_a_postcopy_at_its_destination(guest):
    async def go():
        parameters = {"postcopy": "now", "max_postcopy_bandwidth": 4_000_000, "workers": 2}
        async with Ends(guest, **parameters) as ends:
            await ends.status(Status.POSTCOPY_ACTIVE)
            arrival = ends.listening.arrival
            await until_async(lambda: arrival.status is Status.POSTCOPY_ACTIVE, "there too")
            assert ends.listening.can_be_yanked()
            with stopped(ends.source._equipment.crew.pool.workers[0].process.pid):
                ends.listening.yank()
                assert arrival.status is Status.POSTCOPY_PAUSED
                await ends.status(Status.POSTCOPY_PAUSED)
            ends.source.set_parameters({"max-postcopy-bandwidth": 0})
            ends.source.recover(None)
            report, arrived = await asyncio.gather(ends.sending, ends.arriving)
            assert report["status"] == arrived["status"] == "completed"
            assert arrived["oracle"]["ok"]

    asyncio.run(go())


@pytest.mark.parametrize("victim", ["sender", "postcopy", "receiver", "fault"])
def test_a_postcopy_pauses_and_goes_on(guest, victim):
    async def go():
        parameters = {"postcopy": "now", "max_postcopy_bandwidth": 4_000_000, "workers": 2}
        async with Ends(guest, **parameters) as ends:
            await ends.status(Status.POSTCOPY_ACTIVE)
            arrival = ends.listening.arrival
            pools = {
                "sender": ends.source._equipment.crew.pool,
                "postcopy": ends.source._equipment.background.pool,
                "receiver": arrival._pool, "fault": arrival._faults.pool,
            }  # fmt: skip
            with stopped(pools[victim].workers[0].process.pid):
                ends.source.yank()
                await ends.status(Status.POSTCOPY_PAUSED)
                assert "yanked" in ends.source.query()["paused-because"]
                ends.source.yank()  # there is nothing more to cut
                await until_async(lambda: arrival.status is Status.POSTCOPY_PAUSED, "there too")
                connection = ends.source._connection
                await until_async(lambda: not connection.is_open, "the connection is gone")
            ends.source.set_parameters({"max-postcopy-bandwidth": 0})
            ends.source.recover(None)
            report, arrived = await asyncio.gather(ends.sending, ends.arriving)
            assert report["status"] == arrived["status"] == "completed"
            assert arrived["oracle"]["ok"]

    asyncio.run(go())


HUNG_SERVER = """
import asyncio, os, signal, sys
from multiprocessing import forkserver
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.transport.errors import PageferryError
from pageferry.transport.links import parse_endpoint
from pageferry.workers import forking
from pageferry.workers.guests import open_source, parse_guest

async def go(guest):
    source = Source(guest, parse_endpoint(sys.argv[1]), Parameters(workers=1).checked())
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGSTOP)
    sending = asyncio.ensure_future(source.run())
    while not forking._starting:
        await asyncio.sleep(0.01)
    source.yank()
    try:
        await sending
    except PageferryError as e:
        print(e.message)

guest = open_source(parse_guest("demo:?size=1M"))
asyncio.run(go(guest))
guest.close()
"""


def test_in_setup_while_no_process_can_be_started():
    """The fork server hangs: nobody could end the thread that waits for it."""
    with receiver("--once") as there:
        done = subprocess.run(
            [sys.executable, "-c", HUNG_SERVER, there.endpoint],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "yanked" in done.stdout, done.stderr
        assert there.finish()[0] == 7


def test_what_another_one_s_start_takes_is_no_reason_to_end_all(guest):
    """Whoever waits for the fork server may have it killed, and with it everybody's workers."""
    server = forkserver._forkserver._forkserver_pid
    started = []

    def start():
        started.append(start_process(os.getpid, (), "another-one-s"))

    async def go():
        async with Ends(guest, **SLOW) as ends:
            await ends.status(Status.ACTIVE)
            another = threading.Thread(target=start)
            with stopped(server):
                another.start()
                await until_async(
                    lambda: any(time.monotonic() - t > 0.9 for t in forking._starting),
                    "it takes long",
                )
                ends.source._end_a_hung_start()
                ends.listening.arrival._end_a_hung_start()
            another.join()

    asyncio.run(go())
    (process,) = started
    process.join()
    assert process.exitcode == 0
    process.close()
    assert forkserver._forkserver._forkserver_pid == server


def family(pid):
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


@pytest.mark.parametrize("end", ["source", "destination"])
def test_from_the_command_line_while_the_peer_hangs(end, tmp_path):
    where = f"unix:{tmp_path}/mon"
    monitor = ("--monitor", where)
    with (
        receiver("--into", "demo:", "--once", *monitor * (end == "destination")) as there,
        Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "10MB",
                *monitor * (end == "source")) as sending,
    ):  # fmt: skip
        sending.error_line("round 1")
        ours, peer = (sending, there) if end == "source" else (there, sending)
        assert ask(where, "query-yank") == [{"type": "migration"}]
        with stopped(*family(peer.process.pid)):
            done = run("yank", where)
            assert done.returncode == 0, done.stderr
            code, out, err = ours.finish()
            assert code == 7
            assert "yanked" in err + out
            peer.process.kill()
        peer.finish()  # its helpers go on, and end
        sweep(peer.process.pid)


def asks(source, vm):
    """QEMU stands still, and a call on it is under way."""
    running = source._call._running
    still = psutil.Process(vm.pid).status() == "stopped"
    return still and running is not None and not running.done()


@contextlib.contextmanager
def _two_vms(folder):
    """One that runs, and one that waits for it."""
    require_qemu()
    rom = rom_image(folder / "rom", mode=1, lo=1 << 20, hi=33 << 20, delay=2000)
    with (
        Vm("hung", memory=64 << 20, bios=rom) as vm,
        Vm("there", memory=64 << 20, bios=rom, incoming="defer") as there,
    ):
        vm.wait_for_serial(b"B")
        yield vm, there


@pytest.mark.qemu
@pytest.mark.parametrize("when", [Status.ACTIVE, Status.DEVICE])
def test_a_qemu_that_hangs(when, tmp_path):
    """Its monitor is not waited for any more; when it comes round it does what it was told."""
    with _two_vms(tmp_path) as (vm, there):
        source = open_source(parse_guest(f"qemu:{vm.qmp_path}"))
        try:

            async def go():
                waiting = open_destination(parse_guest(f"qemu:{there.qmp_path}"))

                async def hang():
                    till.enter_context(stopped(vm.pid))

                ends = Ends(source, waiting, **SLOW)
                ends.source.before_stop = hang  # who asks is known at the start
                async with ends, contextlib.AsyncExitStack() as till:
                    await ends.status(Status.ACTIVE)
                    if when is Status.ACTIVE:
                        await hang()
                    ends.source.set_parameters({"max-bandwidth": 0, "downtime-limit": 60_000})
                    await until_async(lambda: asks(ends.source, vm), "QEMU is asked")
                    assert ends.source.core.status is when
                    ends.source.yank()
                    await ends.ends_as_yanked(PageferryError)
                    with pytest.raises(PageferryError, match="yanked"):
                        await ends.arriving

            asyncio.run(go())
        finally:
            source.close()
        vm.wait_for_status("running")
        assert there.status() == "inmigrate"


@pytest.mark.qemu
def test_a_qemu_that_hangs_when_it_has_been_stopped(tmp_path):
    """The migration has failed at once. That the VM goes on is waited for: what a QEMU has not read
    when its client goes is lost, and it would stand still here and there."""
    with _two_vms(tmp_path) as (vm, there):
        source = open_source(parse_guest(f"qemu:{vm.qmp_path}"))
        try:

            async def go():
                waiting = open_destination(parse_guest(f"qemu:{there.qmp_path}"))
                ends = Ends(source, waiting, **SLOW)

                async def slow_down():
                    ends.source.set_parameters({"max-bandwidth": 300_000})

                ends.source.before_stop = slow_down
                async with ends:
                    await ends.status(Status.ACTIVE)
                    ends.source.set_parameters({"max-bandwidth": 0, "downtime-limit": 60_000})
                    await until_async(lambda: ends.source.core.stopped, "it stands still")
                    with stopped(vm.pid):
                        ends.source.yank()
                        await until_async(lambda: ends.source.core.status is Status.FAILED, "over")
                        with pytest.raises(PageferryError, match="yanked"):
                            await ends.arriving
                        await until_async(lambda: asks(ends.source, vm), "QEMU is asked")
                        assert not ends.sending.done()
                    await ends.ends_as_yanked(PageferryError)

            asyncio.run(go())
        finally:
            source.close()
        assert vm.status() == "running"
        assert there.status() == "inmigrate"


def test_a_guest_that_dies_before_it_has_handed_over(monkeypatch, tmp_path):
    """Known at once, not when nobody has come for 20 s."""
    with Running("copy", "demo:?size=1G&content=random", "demo:", "--json") as running:
        until(lambda: _guest_of(running), "the guest is there")
        _guest_of(running)[0].kill()
        code, out, err = running.finish()
    assert code == 3, err
    assert json.loads(out)["error"]["message"] == "the guest did not hand over its memory"


def _guest_of(running):
    found = []
    for child in psutil.Process(running.process.pid).children(recursive=True):
        with contextlib.suppress(OSError), open(f"/proc/{child.pid}/comm") as f:
            if f.read().startswith("pf-demo"):
                found.append(child)
    return found
