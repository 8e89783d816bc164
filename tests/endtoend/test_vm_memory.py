"""The memory of an unmodified QEMU from outside: what it writes is found, a QEMU is started for it,
and what cannot be moved is refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import pageferry as run
from helpers import receiver
from qemu_vm import Vm, accelerator, require_qemu

import pageferry
from pageferry.tools.bench.boot_guest import BootGuest, rom_image
from pageferry.transport.errors import (
    DestinationError,
    PeerRefused,
    SourceError,
    UsageError,
)
from pageferry.transport.messages import POSTCOPY, PROTOCOL, Block, Hello
from pageferry.transport.pages import PAGE_SIZE, pages_of
from pageferry.workers.guests.base import TRACKING_HASH, TRACKING_PAGEMAP
from pageferry.workers.guests.qemu import QemuDestination, QemuSource
from pageferry.workers.guests.qemu_process import QemuProcess
from pageferry.workers.guests.uri import GuestUri
from pageferry.workers.kernel.libc import punch_hole

MIB = 1 << 20
LO, HI = 2 * MIB, 34 * MIB
SIZE = 64 * MIB


@pytest.fixture
def rom(tmp_path):
    require_qemu()
    return rom_image(tmp_path / "rom", mode=1, lo=LO, hi=HI, delay=2000)


@pytest.fixture
def machine(rom):
    with contextlib.ExitStack() as stack:

        def start(name, incoming=None, **more):
            vm = Vm(name, memory=SIZE, bios=rom, incoming=incoming, **more)
            stack.enter_context(vm)
            if incoming is None:
                vm.wait_for_serial(b"B")
            return vm

        yield start


@contextlib.contextmanager
def source_of(vm, **options):
    source = QemuSource(GuestUri("qemu", vm.qmp_path, options))
    try:
        yield source
    finally:
        source.close()


def memory_of(vm):
    return [np.fromfile(part, np.uint8).reshape(-1, PAGE_SIZE) for part in vm.ram_parts()]


def injected(vm):
    """Descriptors of QEMU that are ours."""
    names = [os.readlink(f"/proc/{vm.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{vm.pid}/fd")]
    return names.count("anon_inode:[userfaultfd]")


# ---- tracking --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["file", "memfd", "numa2"])
def test_exactly_what_the_vm_writes(machine, backend):
    """What changed between two stops is what is found, once; QEMU is as before afterwards."""
    vm = machine("vm", backend=backend)
    with source_of(vm) as source, BootGuest(*vm.ram_parts()) as guest:
        assert source.tracking == TRACKING_PAGEMAP
        assert source.facts()["attach-pause-us"] > 0
        vm.qmp("stop")
        source.start_tracking()
        for _ in range(3):
            old = memory_of(vm)
            vm.qmp("cont")
            guest.advance("touches", 300)
            source.settle()
            vm.qmp("stop")
            for index, (was, now) in enumerate(zip(old, memory_of(vm), strict=True)):
                found = pages_of(source.dirty_pages(index))
                changed = np.flatnonzero((was != now).any(axis=1))
                assert len(set(found.tolist())) == len(found)
                assert set(changed.tolist()) <= set(found.tolist())
                # one may have been made writable, and the processor stopped before it wrote
                within = [page for page in set(found.tolist()) - set(changed.tolist())
                          if LO <= page * PAGE_SIZE < HI]  # fmt: skip
                assert len(within) <= 1
                assert not len(source.dirty_pages(index)[0])
        assert not injected(vm)
        vm.qmp("cont")
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance("passes", 1)
        vm.qmp("stop")
        assert guest.oracle() == []


def test_memory_that_the_guest_gives_back(machine):
    """A balloon punches holes: they count as written. Without one nobody looks for them."""
    vm = machine("vm", extra=("-device", "virtio-balloon-pci"))
    with source_of(vm) as source:
        vm.qmp("stop")
        source.start_tracking()
        page = 50 * MIB // PAGE_SIZE
        with open(vm.ram_files[0], "r+b") as file:
            file.seek(page * PAGE_SIZE)
            file.write(b"something that was there")
            file.flush()
            source.dirty_pages(0)
            punch_hole(file.fileno(), page * PAGE_SIZE, PAGE_SIZE)
        assert pages_of(source.dirty_pages(0)).tolist() == [page]
        assert not len(source.dirty_pages(0)[0])


def test_a_disk_with_direct_access_is_waited_for(tmp_path, machine):
    """What it writes by DMA comes after the scan that saw it begin: so no page is read before the
    disk has done all that had begun."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ("-drive", f"file={disk},format=raw,cache=none,if=none,id=d",
             "-device", "virtio-blk-pci,drive=d")  # fmt: skip
    vm, waiting = machine("src", extra=drive), machine("dst", incoming="defer", extra=drive)
    report = pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")
    assert report["dirty-tracking"] == TRACKING_PAGEMAP
    with BootGuest(*waiting.ram_parts()) as guest:
        guest.advance("passes", 1)
        waiting.qmp("stop")
        assert guest.oracle() == []


def test_by_content_if_asked(machine):
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    report = pageferry.migrate(
        f"qemu:{vm.qmp_path}?tracking=content-hash", f"qemu:{waiting.qmp_path}"
    )
    assert report["dirty-tracking"] == TRACKING_HASH
    with BootGuest(*waiting.ram_parts()) as guest:
        guest.advance("passes", 1)
        waiting.qmp("stop")
        assert guest.oracle() == []
    with pytest.raises(UsageError, match="tracking is"):
        pageferry.migrate(f"qemu:{vm.qmp_path}?tracking=guess", f"qemu:{waiting.qmp_path}")


def test_one_that_somebody_moves_already(machine):
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    with source_of(vm) as first:
        first._monitor.close()  # it has one client at a time
        with pytest.raises(SourceError, match="another pageferry"):
            QemuSource(GuestUri("qemu", vm.qmp_path))
    pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")


def test_by_content_where_the_kernel_cannot(machine):
    """Nobody may attach to it; the result says why."""
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    with held_by_a_tracer(vm):
        report = pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")
        assert report["dirty-tracking"] == TRACKING_HASH
        assert "traced by process" in report["dirty-tracking-because"]


@contextlib.contextmanager
def held_by_a_tracer(vm):
    """All threads of QEMU are traced, and run."""
    with subprocess.Popen(
        [sys.executable, "-c", TRACER, str(vm.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        try:
            assert tracer.stdout.readline() == b"traced\n"
            yield
        finally:
            tracer.kill()


TRACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for thread in os.listdir(f"/proc/{sys.argv[1]}/task"):
    assert libc.ptrace(0x4206, int(thread), None, None) == 0  # PTRACE_SEIZE
print("traced", flush=True)
while True:  # signals are its to pass on
    thread, status = os.waitpid(-1, 0x40000000)
    if os.WIFSTOPPED(status):
        libc.ptrace(7, thread, None, ctypes.c_void_p(os.WSTOPSIG(status)))
"""


@pytest.mark.parametrize("postcopy", ["never", "now"])
def test_a_vm_with_a_dimm(machine, postcopy):
    """Plugged into the source while it ran; the destination has it from the start."""
    slots = ("-m", "size=64M,slots=2,maxmem=512M")
    with contextlib.ExitStack() as stack:
        here, there = (f"/dev/shm/pageferry-test-{os.getpid()}-{n}" for n in ("here", "there"))
        for path in (here, there):
            stack.callback(_unlink, path)
        vm = machine("src", extra=slots)
        vm.qmp("object-add", qom_type="memory-backend-file", id="dimm0", size=128 * MIB,
               mem_path=here, share=True)  # fmt: skip
        vm.qmp("device_add", driver="pc-dimm", id="d0", memdev="dimm0")
        with open(here, "r+b") as file:
            file.write(b"in the dimm")
        backend = f"memory-backend-file,id=dimm0,size=128M,mem-path={there},share=on"
        plugged = ("-object", backend, "-device", "pc-dimm,id=d0,memdev=dimm0")
        waiting = machine("dst", incoming="defer", extra=(*slots, *plugged))
        report = pageferry.migrate(
            f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}", postcopy=postcopy
        )
        assert report["ram"]["total"] == SIZE + 128 * MIB
        with open(there, "rb") as file:
            assert file.read(11) == b"in the dimm"
        with BootGuest(*waiting.ram_parts()) as guest:
            guest.advance("passes", 1)
            waiting.qmp("stop")
            assert guest.oracle() == []


def _unlink(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def test_memory_plugged_in_meanwhile(machine):
    """It would be left behind."""
    vm = machine("src", extra=())
    with source_of(vm) as source:
        vm.qmp("object-add", qom_type="memory-backend-ram", id="more", size=MIB, share=True)
        with pytest.raises(SourceError, match="plugged"):
            source.stop()
        source.resume()
    assert vm.status() == "running"


# ---- postcopy --------------------------------------------------------------------------------


def lay_out(vm, capabilities):
    destination = QemuDestination(GuestUri("qemu", vm.qmp_path))
    hello = Hello(PROTOCOL, "", "", "qemu", [Block("ram0", SIZE)], 1, 1, capabilities=capabilities)
    try:
        destination.lay_out(hello)
    except BaseException:
        destination.discard()
        raise
    return destination


def test_armed_and_given_up_it_waits_as_before(machine):
    vm = machine("dst", incoming="defer")
    for _ in range(2):
        destination = lay_out(vm, [POSTCOPY])
        assert destination.memory.regions
        assert sum(region.pages for region in destination.memory.regions) == SIZE // PAGE_SIZE
        assert injected(vm) == 1
        destination.discard()
        assert not injected(vm)
    assert vm.status() == "inmigrate"
    source = machine("src")
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{vm.qmp_path}", postcopy="now")
    assert injected(vm) == 0


@pytest.mark.parametrize("capabilities", [[], [POSTCOPY]])
def test_what_a_killed_pageferry_left_armed_is_disarmed(machine, capabilities):
    """Its missing pages would be waited for by nobody."""
    vm = machine("dst", incoming="defer")
    left = lay_out(vm, [POSTCOPY])
    left._monitor.close()
    left.close()  # as the kernel does for who is killed: QEMU's own descriptor stays
    assert injected(vm) == 1
    destination = lay_out(vm, capabilities)
    assert injected(vm) == len(capabilities)
    destination.discard()
    source = machine("src")
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{vm.qmp_path}")
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance("passes", 1)


def test_memory_that_somebody_else_has_armed(machine):
    vm = machine("dst", incoming="defer")
    other = lay_out(vm, [POSTCOPY])
    other._monitor.close()
    with pytest.raises(DestinationError, match="another pageferry"):
        lay_out(vm, [POSTCOPY])
    other.close()


def test_settings_that_a_killed_pageferry_left_are_put_back_by_the_next(machine):
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    before = vm.qmp("query-migrate-parameters"), vm.qmp("query-migrate-capabilities")
    with source_of(vm) as source:
        source.stop()
        source.save_state()
        source._settings._applied = False  # killed: nobody puts them back
    vm.qmp("cont")
    assert vm.qmp("query-migrate-parameters") != before[0]
    pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")
    assert (vm.qmp("query-migrate-parameters"), vm.qmp("query-migrate-capabilities")) == before


def test_prepared_for_postcopy_and_not_needed(machine):
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    report = pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}", postcopy="manual")
    assert "postcopy-requests" not in report or report["postcopy-requests"] == 0
    assert injected(waiting) == 0
    with BootGuest(*waiting.ram_parts()) as guest:
        guest.advance("passes", 1)
        waiting.qmp("stop")
        assert guest.oracle() == []


# ---- a QEMU that pageferry starts, and one that it ends ----------------------------------------


def command(rom, *more):
    kind, model = accelerator()
    words = ["qemu-system-x86_64", "-accel", kind, *(("-cpu", model) if model else ()),
             "-name", "dst,debug-threads=on", "-nodefaults", "-display", "none", "-nic", "none",
             "-vga", "std", "-m", str(SIZE // MIB), "-bios", str(rom), *more]  # fmt: skip
    return " ".join(words)


ONE = ("-machine", "q35,memory-backend=ram0")
TWO = ("-machine", "q35", "-smp", "2", "-numa", "node,nodeid=0,cpus=0,memdev=ram0",
       "-numa", "node,nodeid=1,cpus=1,memdev=ram1")  # fmt: skip


@contextlib.contextmanager
def ended(pid):
    """A QEMU that nobody else ends."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("postcopy", ["never", "now"])
@pytest.mark.parametrize(("backend", "machine_options"), [("file", ONE), ("numa2", TWO)])
def test_a_qemu_is_started_for_it(tmp_path, rom, machine, postcopy, backend, machine_options):
    """It outlives pageferry, its memory is where it can be moved from again, the old one ends."""
    vm = machine("src", backend=backend)
    qmp, serial = tmp_path / "qmp", tmp_path / "serial"
    there = command(
        rom, *machine_options, "-serial", f"file:{serial}", "-qmp",
        f"unix:{qmp},server=on,wait=off",
    )  # fmt: skip
    with receiver("--qemu-command", there, "--once") as receiving:
        sent = run(
            "send", f"qemu:{vm.qmp_path}", receiving.endpoint, "--json", "--quit-source",
            "--postcopy", postcopy,
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        assert receiving.finish()[0] == 0
    report = json.loads(sent.stdout)
    assert report["source-vm"] == "ended"
    assert vm.has_ended()
    pid = int(report["destination"].split()[2])
    with ended(pid), source_of_socket(qmp) as again:
        assert [block.size for block in again.blocks] == [SIZE // len(again.blocks)] * len(
            again.blocks
        )
        assert again.running
        with BootGuest(*[f"/proc/{pid}/fd/{fd}" for fd in backing(pid)]) as guest:
            guest.advance("passes", 1)
            again.stop()
            assert guest.oracle() == []
            again.resume()


@contextlib.contextmanager
def source_of_socket(qmp):
    source = QemuSource(GuestUri("qemu", str(qmp)))
    try:
        yield source
    finally:
        source.close()


def backing(pid):
    """QEMU's descriptors of its memory, in the order of their names."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        name = os.readlink(f"/proc/{pid}/fd/{fd}")
        if name.startswith("/memfd:pageferry-ram") and int(fd) >= 500:
            found[name] = fd
    return [found[name] for name in sorted(found)]


def test_a_qemu_that_does_not_start(rom, machine):
    vm = machine("src")
    with receiver(
        "--qemu-command", command(rom, *ONE, "-device", "no-such"), "--once"
    ) as receiving:
        sent = run("send", f"qemu:{vm.qmp_path}", receiving.endpoint)
        assert sent.returncode == 4
        assert "no-such" in sent.stderr
        assert receiving.finish()[0] == 4
    assert vm.status() == "running"


def test_a_qemu_that_was_started_in_vain_is_ended(rom, machine):
    """Another machine: found when the devices are loaded."""
    vm = machine("src", extra=("-device", "virtio-rng-pci"))
    with receiver("--qemu-command", command(rom, *ONE), "--once") as receiving:
        sent = run("send", f"qemu:{vm.qmp_path}", receiving.endpoint)
        assert sent.returncode == 4
        assert receiving.finish()[0] == 4
    assert vm.status() == "running"
    left = subprocess.run(["pgrep", "-f", str(rom)], capture_output=True, text=True, check=False)
    assert left.stdout.split() == [str(vm.pid)]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("qemu 'x", "quotes"), ("qemu -incoming defer", "-incoming")],
)
def test_commands_that_make_no_sense(text, said):
    with pytest.raises(UsageError, match=said):
        QemuProcess(text, [])


def test_names_of_memory_are_no_options():
    """The peer chooses them, and they become a part of a command line."""
    with pytest.raises(PeerRefused, match="memory named"):
        QemuProcess("qemu-system-x86_64", [Block("ram0,mem-path=/etc/passwd", MIB)])


def test_a_command_that_is_no_qemu():
    with pytest.raises(DestinationError, match="did not start"):
        QemuProcess("/bin/true", [])
    with pytest.raises(DestinationError, match="cannot start"):
        QemuProcess("/no/such/qemu", [])


def test_only_vms_are_ended(tmp_path):
    (tmp_path / "image").write_bytes(bytes(PAGE_SIZE))
    with pytest.raises(UsageError, match="quit-source"):
        pageferry.migrate(f"image:{tmp_path}/image", f"image:{tmp_path}/copy", quit_source=True)
