"""A VM of an unmodified QEMU moves into another QEMU; its own boot guest says what it lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import msgspec
import pytest
from helpers import Running, receiver
from helpers import pageferry as run
from qemu_vm import Vm, require_qemu

import pageferry
from pageferry.tools.bench.boot_guest import BootGuest, rom_image
from pageferry.transport.errors import DestinationError, PeerRefused, SourceError
from pageferry.transport.messages import PROTOCOL, Block, Hello
from pageferry.workers.guests.qemu import QemuDestination, QemuSource
from pageferry.workers.guests.qmp import Monitor
from pageferry.workers.guests.uri import GuestUri

MIB = 1 << 20
LO, HI = MIB, 33 * MIB


@pytest.fixture
def machine(tmp_path):
    """Starts VMs with the boot guest, all alike; ends them."""
    require_qemu()
    rom = rom_image(tmp_path / "rom", mode=1, lo=LO, hi=HI, delay=2000)
    with contextlib.ExitStack() as stack:

        def start(name, incoming=None, backend="file", memory=64 * MIB, kind=Vm, **more):
            vm = kind(name, memory=memory, backend=backend, bios=rom, incoming=incoming, **more)
            stack.enter_context(vm)
            if incoming is None and "-S" not in more.get("extra", ()):
                vm.wait_for_serial(b"B")
            return vm

        yield start


def runs_on(vm):
    """The guest writes here: its passes go on, and when it is stopped the oracle is content."""
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance("passes", 2)
        vm.qmp("stop")
        assert guest.oracle() == []
        vm.qmp("cont")


def settings(vm):
    return vm.qmp("query-migrate-parameters"), vm.qmp("query-migrate-capabilities")


@contextlib.contextmanager
def loaded(vm, waiting):
    """Source and destination just before Run."""
    source = QemuSource(GuestUri("qemu", vm.qmp_path))
    blocks = [Block(block.name, block.size) for block in source.blocks]
    destination = QemuDestination(GuestUri("qemu", waiting.qmp_path))
    try:
        destination.lay_out(Hello(PROTOCOL, "", "", "qemu", blocks, 1, 1))
        source.stop()
        destination.load_state("qemu", source.save_state(), source.running)
        yield source, destination
    finally:
        source.close()
        destination.close()


A_UUID = "6f1c1f5e-0d0e-4c57-9d0e-0c0d3b1c2a11"


def test_a_vm_goes_to_no_other_uuid(machine):
    """QEMU's words; and it is let through where that is not wanted, or an end has none."""
    source = machine("src", extra=("-uuid", A_UUID))
    other = machine("dst", incoming="defer", extra=("-uuid", A_UUID.replace("6", "7")))
    with pytest.raises(PeerRefused, match=f"UUID received is {A_UUID} and local is 7f1c"):
        pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{other.qmp_path}")
    assert source.status() == "running" and other.status() == "inmigrate"
    hello = Hello(PROTOCOL, "", "", "qemu", [Block("ram0", 64 * MIB)], 1, 1)
    for theirs, validate in ((A_UUID, False), ("", True), (A_UUID.replace("6", "7"), True)):
        there = QemuDestination(GuestUri("qemu", other.qmp_path))
        there.validate_uuid = validate
        there.lay_out(msgspec.structs.replace(hello, guest_uuid=theirs))
        there.discard()
    without = machine("none", incoming="defer")
    report = pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{without.qmp_path}")
    assert report["status"] == "completed"
    runs_on(without)


class SharesTheSecond(Vm):
    """A VM whose second memory is in the file that `theirs` has; or in a new one."""

    theirs = None

    def _file(self, index, size):
        if index and self.theirs is not None:
            self.ram_files[index] = self.theirs
        return super()._file(index, size)


def test_memory_that_both_ends_share_does_not_travel(machine, monkeypatch):
    """It is neither sent nor cleared, and has to be the same file; the guest goes on with it."""
    source = machine("src", backend="numa2", kind=SharesTheSecond)
    leaving = f"qemu:{source.qmp_path}?ignore-shared=ram1"
    apart = machine("apart", backend="numa2", kind=SharesTheSecond, incoming="defer")
    with pytest.raises(PeerRefused, match="another file here"):
        pageferry.migrate(
            f"qemu:{source.qmp_path}?ignore-shared=ram1",
            f"qemu:{apart.qmp_path}?ignore-shared=ram1",
        )
    monkeypatch.setattr(SharesTheSecond, "theirs", source.ram_files[1])
    there = machine("dst", backend="numa2", kind=SharesTheSecond, incoming="defer")
    with pytest.raises(PeerRefused, match="leaves out memory ram1, and this end none"):
        pageferry.migrate(leaving, f"qemu:{apart.qmp_path}")
    for names, says in (("ram2", "has no memory ram2"), ("ram0,ram1", "no memory is left")):
        with pytest.raises(SourceError, match=says):
            QemuSource(GuestUri("qemu", source.qmp_path, {"ignore-shared": names}))
    inode = os.stat(source.ram_files[1]).st_ino
    report = pageferry.migrate(leaving, f"qemu:{there.qmp_path}?ignore-shared=ram1")
    assert report["ram"]["total"] == 32 * MIB
    assert os.stat(source.ram_files[1]).st_ino == inode
    source.kill()
    runs_on(there)


def test_a_vm_moves_while_it_runs(machine):
    source, destination = machine("src"), machine("dst", incoming="defer")
    with BootGuest(*source.ram_parts()) as guest:
        before = guest.get("passes")
    report = pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    assert report["status"] == "completed"
    assert report["ram"]["dirty-sync-count"] >= 2
    assert source.status() == "postmigrate"
    assert destination.status() == "running"
    assert str(destination.pid) in report["destination"]
    with BootGuest(*destination.ram_parts()) as guest:
        assert guest.get("passes") >= before
    runs_on(destination)
    destination.wait_for_serial(b"B")  # its serial line goes on there


def test_there_and_back(machine):
    """Each time into a new QEMU; the counters never go back."""
    vm, passes = machine("vm0"), 0
    for i in range(1, 4):
        following = machine(f"vm{i}", incoming="defer")
        pageferry.migrate(
            f"qemu:{vm.qmp_path}", f"qemu:{following.qmp_path}", workers=1 + i % 3,
            codec=("none", "lz4", "zstd")[i % 3],
        )  # fmt: skip
        vm.close()
        vm = following
        with BootGuest(*vm.ram_parts()) as guest:
            assert guest.get("passes") >= passes
            passes = guest.advance("passes", 1)
    runs_on(vm)


def test_memory_on_two_numa_nodes(machine):
    source = machine("src", backend="numa2")
    destination = machine("dst", backend="numa2", incoming="defer")
    report = pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    assert report["ram"]["total"] == 64 * MIB
    runs_on(destination)


def test_memory_without_a_name(machine):
    source = machine("src", backend="memfd")
    destination = machine("dst", backend="memfd", incoming="defer")
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    runs_on(destination)


def test_a_paused_vm_arrives_paused(machine):
    source, destination = machine("src"), machine("dst", incoming="defer")
    source.qmp("stop")
    report = pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    assert report["run-state"] == destination.status() == "paused"
    destination.qmp("cont")
    runs_on(destination)


def test_a_paused_vm_that_somebody_lets_go_on_meanwhile(machine):
    """It is stopped for the switchover like any other, and runs there."""
    source, destination = machine("src"), machine("dst", incoming="defer")
    source.qmp("stop")
    with Running(
        "copy",
        f"qemu:{source.qmp_path}",
        f"qemu:{destination.qmp_path}",
        "--max-bandwidth",
        "20MB",
        "--downtime-limit",
        "9s",
    ) as copying:
        copying.error_line("round 1")
        source.qmp("cont")
        code, _, said = copying.finish()
    assert code == 0, said
    assert source.status() == "postmigrate"
    assert destination.status() == "running"
    runs_on(destination)


def test_a_qemu_that_hangs_is_ended_before_the_source_may_go_on(machine):
    """It was given the devices: whoever gives it up must know that it does not run."""
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    with loaded(vm, waiting) as (source, destination):
        os.kill(waiting.pid, signal.SIGSTOP)
        destination.discard()
        assert waiting.has_ended()
        source.resume()
    assert vm.status() == "running"
    runs_on(vm)


def test_one_that_was_told_to_run_and_said_nothing_may_have_run(machine):
    """Then the source must not be told that it did not."""
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    with loaded(vm, waiting) as (_, destination):
        waiting.kill()
        with pytest.raises(DestinationError):
            destination.run()
        with pytest.raises(DestinationError, match="may have run"):
            destination.discard()


def test_the_source_goes_on_while_the_destination_still_has_the_disk(tmp_path, machine):
    """Both have one disk open, which only one may write."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ("-drive", f"file={disk},format=raw")
    vm, waiting = machine("src", extra=drive), machine("dst", incoming="defer", extra=drive)
    with loaded(vm, waiting) as (source, destination):
        source.resume()
        assert vm.status() == "running"
        destination.discard()
    runs_on(vm)
    other = machine("other", incoming="defer", extra=drive)
    pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{other.qmp_path}")
    runs_on(other)


@pytest.mark.parametrize("again", [True, False])
def test_a_stopped_vm_that_somebody_lets_go_on(machine, again):
    """Even for a moment: what it wrote meanwhile would be lost."""
    vm = machine("src")
    source = QemuSource(GuestUri("qemu", vm.qmp_path))
    source.stop()
    vm.qmp("cont")
    if again:
        vm.qmp("stop")
    with pytest.raises(SourceError, match="let the VM go on"):
        source.save_state()
    source.resume()
    source.close()
    runs_on(vm)


def test_qemu_is_set_as_before(machine):
    """x-ignore-shared that is left on would make a snapshot without RAM; and what was on stays on,
    but not while it would hold the state back."""
    source, destination = machine("src"), machine("dst", incoming="defer")
    source.set_capabilities(pause_before_switchover=True)
    before = {vm: settings(vm) for vm in (source, destination)}
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    assert {vm: settings(vm) for vm in (source, destination)} == before
    runs_on(destination)


def test_by_send_and_receive(machine):
    source, destination = machine("src"), machine("dst", incoming="defer")
    with receiver("--into", f"qemu:{destination.qmp_path}", "--once") as receiving:
        sent = run("send", f"qemu:{source.qmp_path}", receiving.endpoint, "--json")
        assert sent.returncode == 0, sent.stderr
        assert json.loads(sent.stdout)["status"] == "completed"
        assert receiving.finish()[0] == 0
    runs_on(destination)


def test_cancelled_in_mid_round_it_runs_on(machine):
    """And can be moved afterwards."""
    source, destination = machine("src"), machine("dst", incoming="defer")
    with Running(
        "copy", f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}", "--max-bandwidth", "1MB"
    ) as copying:
        copying.error_line("round 1")
        copying.process.send_signal(signal.SIGINT)
        assert copying.finish()[0] == 130
    assert source.status() == "running"
    assert destination.status() == "inmigrate"
    runs_on(source)
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    runs_on(destination)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_qemu_that_is_killed(machine, end):
    """Known at once, not when it is asked for something; the other is as it was."""
    source, destination = machine("src"), machine("dst", incoming="defer")
    with Running(
        "copy", f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}", "--max-bandwidth", "1MB"
    ) as copying:
        copying.error_line("round 1")
        (source if end == "source" else destination).kill()
        code, _, said = copying.finish()
    assert code == (3 if end == "source" else 4)
    assert "has ended" in said
    if end == "destination":
        assert source.status() == "running"
        runs_on(source)
    else:
        assert destination.status() == "inmigrate"


def test_a_destination_of_another_size_is_refused(machine):
    source, destination = machine("src"), machine("dst", incoming="defer", memory=96 * MIB)
    with pytest.raises(PeerRefused, match="start it with the source's command line"):
        pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    assert source.status() == "running"
    runs_on(source)


def test_devices_that_do_not_match(machine):
    """Found when the machine stands still: it goes on as it was, its QEMU set as before."""
    rng = ("-device", "virtio-rng-pci")
    source, destination = machine("src", extra=rng), machine("dst", incoming="defer")
    before = settings(source)
    with pytest.raises((DestinationError, PeerRefused), match="the source's command line"):
        pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    assert settings(source) == before
    assert source.status() == "running"
    runs_on(source)
    other = machine("other", incoming="defer", extra=rng)
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{other.qmp_path}")
    runs_on(other)


def test_memory_that_somebody_else_writes(machine):
    """A vhost-user back end, say: what it writes would be lost."""
    source, destination = machine("src"), machine("dst", incoming="defer")
    other = subprocess.Popen(
        [sys.executable, "-c",
         "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); "
         "print('up', flush=True); sys.stdin.read()", str(source.ram_files[0])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with other:
        assert other.stdout.readline() == b"up\n"
        with pytest.raises(SourceError, match=f"process {other.pid} "):
            pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
        other.stdin.close()
    runs_on(source)


def test_a_destination_that_does_not_wait_is_refused(machine):
    source, destination = machine("src"), machine("dst")
    with pytest.raises((DestinationError, PeerRefused), match="-incoming defer"):
        pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    runs_on(source)
    runs_on(destination)


def test_a_vm_of_private_memory_is_refused(machine):
    source = machine("src", backend="private")
    with pytest.raises(SourceError, match="share=on"):
        pageferry.migrate(f"qemu:{source.qmp_path}", "ram:/dev/shm/never")
    assert source.status() == "running"
    assert not os.path.exists("/dev/shm/never")


def test_a_vm_is_not_moved_into_mere_memory(machine):
    source = machine("src")
    with pytest.raises(PeerRefused, match="a VM is more than memory"):
        pageferry.migrate(f"qemu:{source.qmp_path}", "ram:/dev/shm/never")
    runs_on(source)
    assert not os.path.exists("/dev/shm/never")


def test_no_monitor(tmp_path):
    with pytest.raises(SourceError, match="-qmp"):
        pageferry.migrate(f"qemu:{tmp_path}/none", f"qemu:{tmp_path}/none2")


def test_a_monitor_that_somebody_has(machine):
    source, destination = machine("src"), machine("dst", incoming="defer")
    monitor = Monitor(source.qmp_path)
    try:
        assert monitor.pid == source.pid
        with pytest.raises(SourceError, match="has it"):
            pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{destination.qmp_path}")
    finally:
        monitor.close()
    runs_on(source)
