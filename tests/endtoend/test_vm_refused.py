"""What of a VM would be lost in silence is refused by name, and what would not be is let through:
memory that has not all arrived, devices that others drive, mappings that are not what they were."""

import contextlib
import mmap
import os
import socket
import struct
import threading
from pathlib import Path

import pytest
from helpers import PAGE, Running, receiver, sweep
from qemu_vm import MIB, Vm, require_qemu

import pageferry
from pageferry.tools.bench.boot_guest import IDLE, IN_ORDER, BootGuest, rom_image
from pageferry.transport.errors import AttachError, HostLacks, PageferryError, SourceError
from pageferry.workers.guests.base import TRACKING_PAGEMAP
from pageferry.workers.guests.qemu import QemuSource
from pageferry.workers.guests.qemu_memory import check_devices
from pageferry.workers.guests.qmp import Monitor
from pageferry.workers.guests.tracking import windows
from pageferry.workers.guests.uri import GuestUri
from pageferry.workers.kernel.inject import Injection
from pageferry.workers.kernel.remote import plant_missing

LO, HI, SIZE = 2 * MIB, 10 * MIB, 64 * MIB
SYS_MMAP = 9  # x86-64
GIVE_UP = 20.0


@pytest.fixture
def machine(tmp_path):
    """Starts VMs with the boot guest, which is idle; ends them."""
    require_qemu()
    rom = rom_image(tmp_path / "rom", mode=IDLE, lo=LO, hi=LO + MIB)
    with contextlib.ExitStack() as stack:

        def start(name, incoming=None, **more):
            vm = stack.enter_context(Vm(name, memory=SIZE, bios=rom, incoming=incoming, **more))
            if incoming is None:
                vm.wait_for_serial(b"A")
            return vm

        yield start


@contextlib.contextmanager
def opened(path):
    source = QemuSource(GuestUri("qemu", str(path)))
    try:
        yield source
    finally:
        source.close()


# ---- memory that has not all arrived -----------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="postcopy into qemu: needs root")
def test_a_vm_whose_own_memory_is_still_arriving(tmp_path, machine):
    """What is missing would go on as zeros. Also when nobody is left who could bring it."""
    another = tmp_path / "qmp"
    source = machine("src")
    with BootGuest(*source.ram_parts()) as guest:
        guest.fill(LO, HI)
    there = machine("dst", incoming="defer", extra=("-qmp", f"unix:{another},server=on,wait=off"))
    with (
        receiver("--into", f"qemu:{there.qmp_path}", "--once") as receiving,
        Running(
            "send", f"qemu:{source.qmp_path}", receiving.endpoint, "--postcopy", "now",
            "--codec", "none", "--max-postcopy-bandwidth", "100kB",
        ) as sending,
    ):  # fmt: skip
        sending.error_line("postcopy:")
        with pytest.raises(SourceError, match="not all arrived"), opened(another):
            pass
        kill(receiving)
        with pytest.raises(SourceError, match="not all arrived"), opened(another):
            pass
        kill(sending)
    there.kill()  # it sleeps, and would not quit


def test_a_vm_whose_memory_has_all_arrived(machine):
    """A descriptor that catches nothing any more is one that could not be closed at the end, say
    for a debugger."""
    vm = machine("src")
    try:
        os.close(plant_missing(vm.pid).uffd)
    except (AttachError, HostLacks) as e:
        pytest.skip(str(e))
    with opened(vm.qmp_path):
        pass


def kill(running):
    """SIGKILL for pageferry; what it had in /dev/shm nobody else can remove."""
    running.kill()
    sweep(running.process.pid)


# ---- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_devices_that_qemu_drives_by_itself(tmp_path, machine, cache):
    """Disks with and without direct access, SCSI, and one that is not there are let through."""
    extra = ["-device", "virtio-rng-pci", "-device", "virtio-scsi-pci", "-device", "virtio-net-pci",
             "-drive", "driver=null-co,if=none,id=null", "-device", "virtio-blk-pci,drive=null",
             ]  # fmt: skip
    for name, device in (("b", "virtio-blk-pci"), ("s", "scsi-hd"), ("i", "ide-hd")):
        disk = tmp_path / name
        disk.write_bytes(bytes(MIB))
        extra += ["-drive", f"file={disk},format=raw,cache={cache},if=none,id={name}",
                  "-device", f"{device},drive={name}"]  # fmt: skip
    vm = machine("src", extra=extra)
    with opened(vm.qmp_path) as source:
        source.stop()
        assert source.save_state()
        source.resume()
    with BootGuest(*vm.ram_parts()) as guest:
        guest.set(mode=IN_ORDER)
        guest.advance()


class WithDrivers(Monitor):
    """The monitor of a VM whose disks' drivers have other names: there is no hardware here of which
    these could be."""

    named = ()

    def __call__(self, command, *rest, **arguments):
        answer = super().__call__(command, *rest, **arguments)
        if command == "query-named-block-nodes":
            answer = [node | {"drv": name} for node in answer[:1] for name in self.named]
        return answer


@pytest.mark.parametrize(
    ("named", "refused"),
    [(["raw", "file", "qcow2", "host_device", "nbd"], ""), (["raw", "nvme"], "nvme"),
     (["virtio-blk-vhost-vdpa"], "virtio-blk-vhost-vdpa")],
)  # fmt: skip
def test_disks_that_write_memory_by_themselves(tmp_path, machine, named, refused):
    """They are given all of it once and for all, and no page table says what they write."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    vm = machine("src", extra=("-drive", f"file={disk},format=raw"))
    monitor = WithDrivers(vm.qmp_path)
    monitor.named = named
    try:
        with (
            pytest.raises(SourceError, match=f"the VM has {refused}: a device")
            if refused
            else contextlib.nullcontext()
        ):
            check_devices(monitor)
    finally:
        monitor.close()


class VhostUserPeer(threading.Thread):
    """As much of a vhost-user back end (docs/interop/vhost-user in QEMU) as a QEMU needs to start
    and not to refuse migration by itself. It does nothing."""

    def __init__(self, path):
        super().__init__()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._listening.settimeout(GIVE_UP)
        self.start()

    def run(self):
        header = struct.Struct("<III")  # request, flags, size
        # what is asked, and its answer: features, protocol features, queues
        log_all, has_protocol_features, log_in_memory = 1 << 26, 1 << 30, 1 << 1
        asked = {1: log_all | has_protocol_features, 15: log_in_memory, 17: 1}
        version_1, reply = 1, 4
        with self._listening, contextlib.suppress(OSError), self._listening.accept()[0] as qemu:
            while data := qemu.recv(header.size, socket.MSG_WAITALL):
                request, _, size = header.unpack(data)
                if size:
                    qemu.recv(size, socket.MSG_WAITALL)
                if request in asked:
                    qemu.sendall(header.pack(request, version_1 | reply, 8))
                    qemu.sendall(struct.pack("<Q", asked[request]))


@pytest.fixture
def driven(tmp_path, machine):
    """Starts VMs that have a network which another process drives."""
    peers, vms = [], []

    def start(name, *device, **more):
        path = tmp_path / f"peer{len(peers)}"
        peers.append(VhostUserPeer(path))
        options = ("-chardev", f"socket,id=c,path={path}", "-netdev", "vhost-user,id=n,chardev=c")
        try:
            vms.append(machine(name, extra=(*options, *device), **more))
        except RuntimeError as e:
            pytest.skip(str(e))  # a QEMU that was built without
        return vms[-1]

    yield start
    for vm in vms:
        vm.close()
    for peer in peers:
        peer.join()


@pytest.mark.parametrize("device", [(), ("-device", "virtio-net-pci,netdev=n")])
def test_a_network_that_another_process_drives(driven, device):
    """Whether a device uses it yet or not."""
    vm = driven("src", *device)
    with pytest.raises(SourceError, match="the VM has vhost-user: a device"), opened(vm.qmp_path):
        pass


def test_a_destination_with_such_a_network(machine, driven):
    """It is known before the VM stands still."""
    vm, waiting = machine("src"), driven("dst", incoming="defer")
    with pytest.raises(PageferryError, match="the VM has vhost-user: a device"):
        pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")
    assert waiting.status() == "inmigrate"
    assert not any(event["event"] == "STOP" for event in vm.events)


# ---- mappings ----------------------------------------------------------------------------------


def test_memory_that_qemu_maps_anew_at_the_same_place(machine):
    """As it does with a broken page when the VM is reset: its writes are not tracked there."""
    vm = machine("src")
    page = (LO + 4 * MIB) // PAGE
    with opened(vm.qmp_path) as source:
        if source.tracking != TRACKING_PAGEMAP:
            pytest.skip(source.facts()["dirty-tracking-because"])
        source.start_tracking()
        place = windows(vm.pid, source.blocks[0].file)[0]
        flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED
        try:
            with Injection(vm.pid) as target:
                at = target.syscall(
                    SYS_MMAP, place.address + page * PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE,
                    flags, its_descriptor(vm), page * PAGE,
                )  # fmt: skip
        except (AttachError, HostLacks) as e:
            pytest.skip(str(e))
        assert at == place.address + page * PAGE
        assert windows(vm.pid, source.blocks[0].file) == [place]
        with pytest.raises(SourceError, match="has changed how it maps"):
            source.dirty_pages(0)


def its_descriptor(vm):
    """QEMU's of its RAM."""
    (found,) = [
        int(fd.name)
        for fd in Path(f"/proc/{vm.pid}/fd").iterdir()
        if os.readlink(fd) == str(vm.ram_files[0])
    ]
    return found
