"""A VM's postcopy in the moments when something of it sleeps: QEMU's main thread on a page that is
missing, a command of ours on the main thread, the link; and when one of the QEMUs is ended, or let
go on where it must not.

Both ends are in one event loop, so that each of these moments can be had. Nothing comes while the
source's postcopy process stands still; who then touches a missing page sleeps until it goes on.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import threading
from pathlib import Path

import pytest
from both_ends import BothEnds
from helpers import PAGE, blocks_on_disk, until, until_async
from qemu_vm import MIB, Vm, require_qemu

import pageferry
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.tools.bench.boot_guest import IDLE, IN_ORDER, BootGuest, rom_image
from pageferry.transport.errors import PageferryError, PostcopyFailed, SourceError, WorkerDied
from pageferry.transport.links import Endpoint
from pageferry.workers.guests.qemu import QemuDestination, QemuSource
from pageferry.workers.guests.uri import GuestUri
from pageferry.workers.hollow import HollowNote, hollow_note, what_is_hollow
from pageferry.workers.ram import RamBlock

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="postcopy into qemu: needs root")
LO, HI, SIZE = 2 * MIB, 10 * MIB, 64 * MIB
SLOW = 100_000  # bytes a second: nothing worth mentioning arrives
GIVE_UP = 20.0


class DiscardingVm(Vm):
    """One whose QEMU throws its memory away when it quits."""

    def _file(self, index, size):
        return super()._file(index, size) + ",discard-data=on"


@pytest.fixture
def machine(tmp_path):
    """Starts VMs whose guest is idle, with content in [LO, HI); ends them."""
    require_qemu()
    rom = rom_image(tmp_path / "rom", mode=IDLE, lo=LO, hi=HI, delay=2000)
    with contextlib.ExitStack() as stack:

        def start(name, incoming=None, kind=Vm, **more):
            vm = stack.enter_context(kind(name, memory=SIZE, bios=rom, incoming=incoming, **more))
            if incoming is None:
                vm.wait_for_serial(b"A")
                with BootGuest(*vm.ram_parts()) as guest:
                    guest.fill(LO, HI)
            return vm

        yield start


@pytest.fixture
def guest_of():
    """Opens VMs as sources; lets go of them."""
    with contextlib.ExitStack() as stack:

        def opened(vm):
            source = QemuSource(GuestUri("qemu", vm.qmp_path))
            stack.callback(source.close)
            return source

        yield opened


def content(vm):
    with BootGuest(*vm.ram_parts()) as guest:
        return guest.ram.read(LO, HI - LO)


def runs_on(vm):
    """Its guest obeys, and counts what it writes."""
    with BootGuest(*vm.ram_parts()) as guest:
        guest.set(mode=IN_ORDER)
        guest.advance("passes", 1)
        vm.qmp("stop")
        assert guest.oracle() == []


class Arriving(QemuDestination):
    """A QEMU that waits. Something may happen just before it is told something, in the thread that
    tells it."""

    def __init__(self, vm, **before):
        super().__init__(GuestUri("qemu", vm.qmp_path))
        self._before = before

    def _now(self, what):
        self._before.get(what, lambda: None)()

    def load_state(self, *arguments):
        self._now("load_state")
        super().load_state(*arguments)

    def run(self):
        self._now("run")
        return super().run()

    def started(self):
        self._now("started")
        super().started()


class Ends(BothEnds):
    """Both ends of a VM's postcopy in one event loop."""

    def __init__(self, guest, into, **parameters):
        self.endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}-{id(self)}")
        self.listening = Destination(self.endpoint, lambda hello: into)
        asked = {"postcopy": "now", "max_postcopy_bandwidth": SLOW, "workers": 1, "codec": "none"}
        parameters = Parameters(**(asked | parameters)).checked()
        self.said = []  # every status of the source
        self.source = Source(guest, self.endpoint, parameters, on_event=self._note)

    def _note(self, name, data):
        if name == "MIGRATION":
            self.said.append(data["status"])

    @property
    def arrival(self):
        return self.listening.arrival

    async def both(self, status):
        """Until both ends say so."""
        for what, end in (("here", lambda: self.source.core), ("there", lambda: self.arrival)):
            task = self.sending if what == "here" else self.arriving
            await until_async(
                lambda end=end, task=task: task.done() or (end() and end().status is status),
                f"{status} {what}",
            )
            if task.done():
                task.result()

    async def whole(self):
        """The end, as fast as can be."""
        self.source.set_parameters({"max-postcopy-bandwidth": 0})
        report, arrived = await asyncio.gather(self.sending, self.arriving)
        assert report["status"] == arrived["status"] == "completed"
        return report, arrived

    def nothing_comes(self):
        """No page that is asked for, from now on."""
        os.kill(self._postcopy_process(), signal.SIGSTOP)

    def go_on(self):
        os.kill(self._postcopy_process(), signal.SIGCONT)

    def cut(self):
        """The link is lost."""
        os.kill(self._postcopy_process(), signal.SIGKILL)

    def _postcopy_process(self):
        return self.source._equipment.background.pool.workers[0].process.pid

    def somebody_waits(self):
        """Whether a page was asked for that has not come."""
        return bool(self.arrival._faults._waiting.words().any())


class Look(threading.Thread):
    """QEMU's main thread reads a page of its guest's memory, as it does for devices: it sleeps if
    that is missing, and answers no command until it has it."""

    def __init__(self, vm, folder):
        super().__init__()
        self._vm, self._path = vm, folder / "seen"
        self.start()

    def run(self):
        with contextlib.suppress(OSError):  # QEMU was ended
            self._vm.qmp("pmemsave", val=LO, size=PAGE, filename=str(self._path))

    async def seen(self):
        await asyncio.to_thread(self.join, GIVE_UP)
        assert not self.is_alive(), "it sleeps for ever"
        return self._path.read_bytes()


# ---- its memory here ---------------------------------------------------------------------------


def test_a_vm_s_memory_is_given_back_as_it_arrives(machine, guest_of):
    """With a break in the middle; what is said of the VM that stays here is right."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    guest, before = guest_of(source), content(source)

    async def run():
        async with Ends(guest, Arriving(waiting), release_ram=True) as ends:
            ends.source.set_parameters({"max-postcopy-bandwidth": 2_000_000})
            await until_async(lambda: ends.source.core.released > 256, "something is given back")
            noted = hollow_note(source.pid)
            ends.cut()
            await ends.both(Status.POSTCOPY_PAUSED)
            ends.source.recover(None)
            report, _ = await ends.whole()
        assert report["released-bytes"] == SIZE
        assert "given back" in report["source-vm"]

        assert noted and not hollow_note(source.pid)  # the result has said it

    asyncio.run(run())
    assert blocks_on_disk(source.ram_files[0]) == 0
    assert source.status() == "postmigrate"
    assert content(waiting) == before
    runs_on(waiting)
    guest.close()
    note = HollowNote(source.pid)
    note.write()  # as of a pageferry that was killed
    with pytest.raises(SourceError, match="was given back when it moved"):
        QemuSource(GuestUri("qemu", source.qmp_path))
    note.drop()


def test_a_vm_that_never_arrived_whole_stays_noted(machine, guest_of):
    """It is postmigrate, as any that was moved, and to `cont` it would run it with holes."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    guest = guest_of(source)

    async def run():
        async with Ends(guest, Arriving(waiting), release_ram=True) as ends:
            ends.source.set_parameters({"max-postcopy-bandwidth": 2_000_000})
            await until_async(lambda: ends.source.core.released > 256, "something is given back")
            ends.cut()
            await ends.both(Status.POSTCOPY_PAUSED)
            ends.source.cancel()
            with pytest.raises(PostcopyFailed, match="were given back"):
                await ends.sending

    asyncio.run(run())
    guest.close()
    note = hollow_note(source.pid)
    try:
        assert source.status() == "postmigrate"
        with pytest.raises(SourceError, match="was given back when it moved"):
            guest_of(source)
        assert f"end it (`kill {source.pid}`)" in what_is_hollow(note)
    finally:
        Path(note or "/nowhere").unlink(missing_ok=True)


# ---- QEMU's main thread sleeps -----------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
def test_the_link_is_lost_while_cont_sleeps(machine, guest_of, tmp_path, early):
    """Before the answer to `cont` is given up for now, or after: that QEMU was told to run, so it
    is not ended. It goes on when the page comes, over the next link."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    before, set_before, looks = content(source), settings(waiting), []

    async def run():
        def main_thread_sleeps():
            ends.nothing_comes()
            looks.append(Look(waiting, tmp_path))
            until(ends.somebody_waits, "it sleeps")
            if early:
                ends.cut()

        async with Ends(guest_of(source), Arriving(waiting, run=main_thread_sleeps)) as ends:
            if not early:
                await ends.both(Status.POSTCOPY_ACTIVE)
                ends.cut()
            await ends.both(Status.POSTCOPY_PAUSED)
            assert looks[0].is_alive()
            assert not waiting.has_ended()
            ends.source.recover(None)
            await ends.whole()
            assert await looks[0].seen() == before[:PAGE]

    asyncio.run(run())
    assert content(waiting) == before
    assert settings(waiting) == set_before
    assert source.status() == "postmigrate"
    runs_on(waiting)


def test_the_link_is_lost_while_the_devices_are_loaded(machine, guest_of, tmp_path):
    """Its QEMU will not answer any more: it is ended, at once, and the source goes on."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    looks, loading = [], threading.Event()

    async def run():
        def main_thread_sleeps():
            ends.nothing_comes()
            looks.append(Look(waiting, tmp_path))
            until(ends.somebody_waits, "it sleeps")
            loading.set()

        async with Ends(guest_of(source), Arriving(waiting, load_state=main_thread_sleeps)) as ends:
            await until_async(loading.is_set, "the devices are loaded")
            assert looks[0].is_alive()
            ends.cut()
            with pytest.raises(WorkerDied):
                await ends.sending
            await until_async(ends.arriving.done, "the receiver is free", GIVE_UP)
            with pytest.raises(PageferryError):
                ends.arriving.result()
        looks[0].join()

    asyncio.run(run())
    assert waiting.has_ended()
    assert source.status() == "running"
    runs_on(source)


def test_cont_is_refused_when_it_is_answered_at_last(machine, guest_of, tmp_path):
    """All memory has come, and it does not run: that is no success."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ("-drive", f"file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d")
    source, waiting = machine("src", extra=drive), machine("dst", incoming="defer", extra=drive)
    before, looks = content(source), []

    async def run():
        def main_thread_sleeps():
            ends.nothing_comes()
            looks.append(Look(waiting, tmp_path))
            until(ends.somebody_waits, "it sleeps")
            lock_out(held.fileno())

        async with Ends(guest_of(source), Arriving(waiting, run=main_thread_sleeps)) as ends:
            await ends.both(Status.POSTCOPY_ACTIVE)
            ends.go_on()
            with pytest.raises(PostcopyFailed, match="refuses cont"):
                await ends.whole()
            await asyncio.gather(ends.arriving, return_exceptions=True)

    with open(disk, "r+b") as held:
        asyncio.run(run())
    assert waiting.has_ended()
    assert content(source) == before
    source.qmp("cont")
    runs_on(source)


def lock_out(fd):
    """Hold a disk as a QEMU does that shares it with nobody (block/file-posix.c in QEMU)."""
    ofd_setlk, not_shared, permissions = 37, 200, 8
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, not_shared, permissions, 0)
    fcntl.fcntl(fd, ofd_setlk, lock)


# ---- which pages are missing is being said -----------------------------------------------------


def test_a_touch_while_it_is_said_which_pages_are_missing(machine, guest_of, tmp_path, monkeypatch):
    """The page has been punched out, and is not yet known to be one that comes: who touches it then
    must not be given zeros."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    before, looks = content(source), []
    clear = RamBlock.clear

    async def run():
        guest = guest_of(source)
        async with Ends(guest, Arriving(waiting)) as ends:

            def clear_and_look(block, runs):
                clear(block, runs)
                if guest._stopped and not looks:
                    faults = ends.arrival._faults
                    uffd, process = ends.arrival.guest.memory.uffd, faults.pool.workers[0].process
                    looks.append(Look(waiting, tmp_path))
                    until(
                        lambda: not looks[0].is_alive() or is_left_to_wait(uffd, process.pid),
                        "it reads, or sleeps",
                    )

            monkeypatch.setattr(RamBlock, "clear", clear_and_look)
            await ends.both(Status.POSTCOPY_ACTIVE)
            await ends.whole()
            assert await looks[0].seen() == before[:PAGE]

    asyncio.run(run())
    assert content(waiting) == before
    runs_on(waiting)


def is_left_to_wait(uffd, process):
    """Whether a fault waits to be read, and this process goes on sleeping and does not read it."""
    slept = times_slept(process)
    while is_readable(uffd):
        if times_slept(process) > slept + 1:
            return True
    return False


def is_readable(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def times_slept(process):
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE).group(1))


# ---- its end comes early -----------------------------------------------------------------------


def test_a_postcopy_that_ends_before_the_destination_is_set_back(machine, guest_of):
    """QEMU's main thread answers late. Nothing is left as it was set for the move."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    before, set_before = content(source), settings(waiting)

    async def run():
        def until_it_is_over():
            arrival = ends.arrival
            until(
                lambda: (
                    arrival.status is Status.COMPLETED
                    or not arrival.guest.memory.armed
                    or ends.arriving.done()
                ),
                "all has come",
            )

        into = Arriving(waiting, started=until_it_is_over)
        async with Ends(guest_of(source), into, max_postcopy_bandwidth=0) as ends:
            await ends.whole()

    asyncio.run(run())
    assert content(waiting) == before
    assert settings(waiting) == set_before
    runs_on(waiting)


def settings(vm):
    return vm.qmp("query-migrate-parameters"), vm.qmp("query-migrate-capabilities")


# ---- a QEMU is ended, or let go on -------------------------------------------------------------


@pytest.mark.parametrize("how", ["quit", "killed"])
def test_the_source_is_ended_in_postcopy(machine, guest_of, how):
    """Also by itself, and where it was to throw its memory away then: nothing of it is lost."""
    source = machine("src", kind=DiscardingVm)
    waiting = machine("dst", incoming="defer", kind=DiscardingVm)
    before = content(source)

    async def run():
        async with Ends(guest_of(source), Arriving(waiting)) as ends:
            await ends.both(Status.POSTCOPY_ACTIVE)
            source.close() if how == "quit" else source.kill()
            await ends.whole()

    asyncio.run(run())
    assert content(waiting) == before
    assert discards(waiting)
    runs_on(waiting)


def discards(vm):
    return vm.qmp("qom-get", path="/objects/ram0", property="discard-data")


@pytest.mark.parametrize("way", ["cancelled", "never stopped", "refused"])
def test_a_source_that_goes_on_throws_its_memory_away_as_before(machine, guest_of, way):
    extra = ("-device", "virtio-rng-pci") if way == "refused" else ()
    source = machine("src", kind=DiscardingVm, extra=extra)
    if way == "refused":
        waiting = machine("dst", incoming="defer")
        with pytest.raises(PageferryError, match="the source's command line"):
            pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{waiting.qmp_path}")
    else:
        guest = guest_of(source)
        if way == "cancelled":
            guest.stop()
            assert not discards(source)
        guest.resume()
    assert discards(source)
    runs_on(source)


def test_somebody_lets_the_source_go_on_in_postcopy(machine, guest_of):
    """What it writes then would be torn: it is stopped again, and the move says why."""
    source, waiting = machine("src"), machine("dst", incoming="defer")

    async def run():
        async with Ends(guest_of(source), Arriving(waiting)) as ends:
            await ends.both(Status.POSTCOPY_ACTIVE)
            source.qmp("cont")
            await ends.both(Status.POSTCOPY_PAUSED)
            assert source.status() == "paused"
            assert "let the VM go on here" in ends.source.query()["paused-because"]
            ends.source.cancel()
            with pytest.raises(PostcopyFailed, match="never arrived"):
                await ends.sending

    asyncio.run(run())
    assert source.status() == "paused"


def test_nor_is_that_missed_or_mended(machine, guest_of):
    """However quickly all has come, and whoever recovers it."""
    source, waiting = machine("src"), machine("dst", incoming="defer")

    async def run():
        into = Arriving(waiting, run=lambda: source.qmp("cont"))
        async with Ends(guest_of(source), into, max_postcopy_bandwidth=0) as ends:
            for times in (1, 2):
                await until_async(
                    lambda times=times: (
                        ends.said.count("postcopy-paused") == times or ends.sending.done()
                    ),
                    "paused",
                )
                await ends.both(Status.POSTCOPY_PAUSED)
                ends.source.recover(None)
            await until_async(lambda: ends.said.count("postcopy-paused") == 3, "paused")
            ends.source.cancel()
            with pytest.raises(PostcopyFailed):
                await ends.sending

    asyncio.run(run())
    assert source.status() == "paused"


def test_the_vm_is_killed_while_its_postcopy_is_paused(machine, guest_of):
    """Nobody is left to recover it for, and the receiver says so by itself."""
    source, waiting = machine("src"), machine("dst", incoming="defer")

    async def run():
        async with Ends(guest_of(source), Arriving(waiting)) as ends:
            await ends.both(Status.POSTCOPY_ACTIVE)
            ends.cut()
            await ends.both(Status.POSTCOPY_PAUSED)
            waiting.kill()
            await until_async(ends.arriving.done, "the receiver is free", GIVE_UP)
            with pytest.raises(PostcopyFailed, match="has ended"):
                ends.arriving.result()
            assert ends.source.core.status is Status.POSTCOPY_PAUSED

    asyncio.run(run())
    assert source.status() in ("paused", "postmigrate")
