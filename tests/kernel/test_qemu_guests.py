"""The QEMU that other tests migrate, and its guests: do they do what those tests rely on?"""

import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import linux_guest
import pytest
import qemu_vm
from qemu_vm import MIB, Vm

from pageferry.tools.bench import boot_guest
from pageferry.tools.bench.boot_guest import PAGE, BootGuest

LOW, HIGH = 1 * MIB, 9 * MIB
BLOCK_FIELD = boot_guest.FIELDS["writes"]


@pytest.fixture(autouse=True)
def _qemu():
    qemu_vm.require_qemu()


@pytest.fixture(scope="module")
def rom(tmp_path_factory):
    return boot_guest.rom_image(tmp_path_factory.mktemp("rom") / "rom")


@pytest.fixture
def running(rom):
    """A Vm and its guest, which writes in order."""
    with Vm(bios=rom, memory=128 * MIB) as vm:
        vm.wait_for_serial(b"AB")
        with BootGuest(*vm.ram_parts()) as guest:
            yield vm, guest


# --- the boot guest


def test_bytes_are_the_assembled_source(tmp_path):
    if not shutil.which("nasm"):
        pytest.skip("nasm is not installed")
    source = Path(boot_guest.__file__).with_suffix(".asm")
    subprocess.run(["nasm", "-f", "bin", "-o", tmp_path / "out", source], check=True)
    assert (tmp_path / "out").read_bytes() == boot_guest.ASSEMBLED


def test_boots_from_a_disk(tmp_path):
    disk = boot_guest.disk_image(tmp_path / "disk", lo=LOW, hi=HIGH)
    with Vm(disk=disk, memory=64 * MIB) as vm:
        said = vm.wait_for_serial(lambda said: said.count(b"B") >= 3)
        assert said.startswith(b"ABB")
        assert set(said[1:]) == {ord("B")}


@pytest.mark.parametrize("backend", ["file", "memfd", "private", "numa2"])
def test_each_backend(rom, backend):
    """Steered and read through its RAM, up to the last page, wherever that is."""
    with Vm(bios=rom, memory=64 * MIB, backend=backend) as vm:
        vm.wait_for_serial(b"A")
        with BootGuest(*vm.ram_parts()) as guest:
            assert guest.ram.size == 64 * MIB
            guest.set(mode=boot_guest.AT_RANDOM, lo=LOW, hi=64 * MIB)
            guest.settle()
            guest.advance(by=10_000)
            vm.qmp("stop")
            assert vm.status() == "paused"
            assert guest.get("writes") > 10_000


def test_without_kvm(rom):
    with Vm(bios=rom, memory=128 * MIB, accelerator="tcg") as vm:
        vm.wait_for_serial(b"AB")
        vm.qmp("stop")
        with BootGuest(*vm.ram_parts()) as guest:
            assert guest.oracle() == []
            assert guest.get("passes") >= 1


def test_is_steered(running):
    _, guest = running
    assert guest.up()
    assert (guest.get("lo"), guest.get("hi")) == (boot_guest.LOW, boot_guest.HIGH)

    guest.set(mode=boot_guest.IDLE)
    guest.settle()
    assert guest.oracle() == []
    still = guest.all()
    guest.set(mode=boot_guest.READ_AT_RANDOM)
    guest.advance(by=1000)
    assert guest.get("writes") == still["writes"]

    guest.set(mode=boot_guest.AT_RANDOM)
    guest.advance("writes", by=1000)
    assert guest.get("position") == still["position"]
    guest.set(mode=boot_guest.IN_ORDER, delay=3)
    guest.advance("passes")
    guest.set(mode=boot_guest.IDLE)
    guest.settle()
    assert guest.oracle() == []


@pytest.mark.parametrize("fields", [{"lo": HIGH, "hi": LOW}, {"mode": 7}])
def test_nonsense_makes_it_idle(running, fields):
    _, guest = running
    guest.set(**fields)
    guest.settle()
    before = guest.get("touches")
    guest.set(**fields)
    guest.settle()
    assert guest.get("touches") == before


def test_refuses_what_is_not_for_setting(running):
    _, guest = running
    with pytest.raises(ValueError, match="touches is not for setting"):
        guest.set(touches=1)


def test_measures_its_touches(running):
    vm, guest = running
    assert guest.cycles_per_second() > 1e8
    guest.set(mode=boot_guest.IDLE)
    guest.settle()
    histogram = guest.histogram()
    assert sum(histogram) == guest.get("touches")
    middle, most = (boot_guest.percentile(histogram, share) for share in (0.5, 1.0))
    assert 0 < middle <= most
    assert 0 < boot_guest.mean(histogram) <= most
    assert guest.get("backwards") == 0

    guest.set(mode=boot_guest.READ_AT_RANDOM, longest=0)
    guest.advance(by=1000)
    vm.qmp("stop")
    assert sum(guest.histogram(since=histogram)) == pytest.approx(
        guest.get("touches") - sum(histogram), abs=1
    )
    assert guest.get("longest") > 0


def test_histogram():
    """What falls into a counter, and what is read from them."""
    edges = [boot_guest.edges(index) for index in range(8, boot_guest.BUCKETS)]
    assert edges[:6] == [(4, 5), (5, 6), (6, 7), (7, 8), (8, 10), (10, 12)]
    assert all(low < high == following for (low, high), (following, _) in pairwise(edges))
    assert edges[-1][1] == 2**64
    counts = [0] * boot_guest.BUCKETS
    assert boot_guest.percentile(counts, 0.5) == boot_guest.mean(counts) == 0
    counts[40], counts[48] = 75, 25  # 1024 to 1280, 4096 to 5120
    assert boot_guest.percentile(counts, 0.75) == 1280
    assert boot_guest.percentile(counts, 0.875) == 4608
    assert boot_guest.mean(counts) == 0.75 * 1152 + 0.25 * 4608


@pytest.mark.parametrize("mode", [boot_guest.IN_ORDER, boot_guest.AT_RANDOM])
def test_oracle(running, mode):
    """Nothing is wrong wherever it is stopped; a flipped byte and a stale page are found."""
    vm, guest = running
    guest.set(mode=mode)
    guest.settle()
    for _ in range(5):
        guest.advance(by=997)
        vm.qmp("stop")
        assert guest.oracle() == []
        vm.qmp("cont")
    vm.qmp("stop")
    assert guest.oracle() == []
    page = guest.get("lo") + 37 * PAGE
    stale = guest.ram.read(page, PAGE)

    guest.ram.write(page, bytes([stale[0] ^ 0x55]))
    assert guest.oracle()[0].startswith(f"page {page:#x} starts with")
    guest.ram.write(page, stale)
    assert guest.oracle() == []

    vm.qmp("cont")
    _until_touched(guest, page, stale)
    guest.set(mode=boot_guest.IDLE)
    guest.settle()
    assert guest.oracle() == []
    guest.ram.write(page, stale)
    assert any("writes, the guest" in problem for problem in guest.oracle())


def _until_touched(guest, page, stale):
    while guest.ram.read(page, PAGE) == stale:
        guest.advance(by=1000)


def test_oracle_takes_bytes():
    """A small RAM made by hand: 1 MiB and four pages, two of them one step ahead."""
    ram = bytearray(LOW + 4 * PAGE)
    for index, count in enumerate((8, 8, 7, 7)):
        struct.pack_into("<QQ", ram, LOW + index * PAGE, count, count)
    struct.pack_into("<Q", ram, BLOCK_FIELD, 30)
    assert boot_guest.oracle(ram, LOW, len(ram)) == []
    ram[LOW + 3 * PAGE] = 6
    assert len(boot_guest.oracle(ram, LOW, len(ram))) == 1


@pytest.mark.parametrize("kind", ["zero", "random", "text"])
def test_content(rom, kind):
    with Vm(bios=rom, memory=64 * MIB) as vm:
        vm.wait_for_serial(b"A")
        vm.qmp("stop")
        with BootGuest(*vm.ram_parts()) as guest:
            guest.fill(32 * MIB, 36 * MIB, kind)
            assert guest.ram.read(32 * MIB, 16) == bytes(16)
            assert any(guest.ram.read(32 * MIB + 16, PAGE)) == (kind != "zero")
            assert not any(guest.ram.read(36 * MIB, PAGE))


# --- QEMU's own migration, which must hold by the same measure


def _migrate(source, destination, socket):
    destination.qmp("migrate-incoming", uri=f"unix:{socket}")
    source.qmp("migrate-set-parameters", downtime_limit=2000, max_bandwidth=10**10)
    source.qmp("migrate", uri=f"unix:{socket}")
    assert source.wait_for_migration()["status"] == "completed"
    destination.wait_for_status("running")


@pytest.mark.parametrize("mode", [boot_guest.IN_ORDER, boot_guest.AT_RANDOM])
def test_boot_guest_moves(rom, running, tmp_path, mode):
    source, guest = running
    guest.set(mode=mode)
    guest.settle()
    with Vm("there", bios=rom, memory=128 * MIB, incoming="defer") as there:
        _migrate(source, there, tmp_path / "socket")
        assert source.status() == "postmigrate"
        with BootGuest(*there.ram_parts()) as moved:
            assert guest.oracle() == []
            moved.advance(by=10_000)
            there.qmp("stop")
            assert moved.oracle() == []
            assert moved.get("touches") > guest.get("touches") + 9_000


# --- the Linux guest


@pytest.fixture
def linux(tmp_path_factory):
    """Options of a Vm that boots Linux."""
    if reason := linux_guest.available():
        pytest.skip(reason)
    kernel, initrd, append = linux_guest.build(
        tmp_path_factory.getbasetemp(), writer_mib=16, rate=2000
    )
    return {
        "memory": 256 * MIB,
        "accelerator": linux_guest.accelerator(),
        "kernel": kernel,
        "initrd": initrd,
        "append": append,
        "extra": linux_guest.NETWORK,
    }


def _ticking(vm, more):
    """Wait for so many more ticks; the last of them."""
    goal = len(linux_guest.ticks(vm.serial())) + more
    said = vm.wait_for_serial(lambda said: len(linux_guest.ticks(said)) >= goal)
    return linux_guest.ticks(said)[-1]


def test_linux_moves(linux, tmp_path):
    """It boots, ticks, writes, answers; and goes on where it went without a problem."""
    with Vm("here", **linux) as here, Vm("there", **linux, incoming="defer") as there:
        here.wait_for_serial(b"writer ready")
        first = _ticking(here, 3)
        assert _ticking(here, 3)[3] > first[3]
        assert b"net eth0 10.0.2.15" in here.serial()
        assert linux_guest.ask(here) >= first[0]
        assert linux_guest.problems(here.serial()) == []

        _migrate(here, there, tmp_path / "socket")
        last = _ticking(there, 5)
        assert last[0] > first[0]
        assert linux_guest.problems(here.serial() + there.serial()) == []
        assert len(linux_guest.ticks(here.serial() + there.serial())) == last[0] + 1


def test_linux_finds_a_corrupted_page(linux):
    """One word changed in each page of the writer: it says so."""
    linux["extra"] = ()
    with Vm("here", **linux) as vm:
        vm.wait_for_serial(b"writer ready")
        _ticking(vm, 2)
        assert b"net none" in vm.serial()
        vm.qmp("stop")
        ram = boot_guest.Ram(*vm.ram_parts())
        try:
            assert _corrupt(ram) >= 16 * MIB // PAGE
        finally:
            ram.close()
        vm.qmp("cont")
        vm.wait_for_serial(b"BAD page")
        assert any("BAD page" in line for line in linux_guest.problems(vm.serial()))


def _corrupt(ram):
    """Change word 100 of every page that looks as the writer's; how many there were."""
    found = 0
    for address in range(0, ram.size, MIB):
        chunk = ram.read(address, MIB)
        for page in range(0, MIB, PAGE):
            first, second = struct.unpack_from("<QQ", chunk, page + 8)
            if first and second == (first * 6364136223846793005 + 1442695040888963407) % 2**64:
                ram.write(address + page + 800, b"changed!")
                found += 1
    return found


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"tick 1 10 10 5\ntick 3 30 30 7\n", "tick 3 follows tick 1"),
        (b"tick 1 10 10 5\ntick 2 9 30 7\n", "the monotonic clock goes back from 10 to 9"),
        (b"tick 1 10 10 5\ntick 2 11 9 7\n", "the wall clock goes back from 10 to 9"),
        (b"tick 1 10 10 5\nBAD page 3\n", "BAD page 3"),
        (b"[ 1.0] Kernel panic - not syncing\r\n", "Kernel panic"),
    ],
)
def test_linux_problems_are_found(said, problem):
    found = linux_guest.problems(said)
    assert len(found) == 1
    assert problem in found[0]


def test_an_unfinished_tick_does_not_count():
    assert linux_guest.ticks(b"tick 1 10 10 5\ntick 2 20 2") == [(1, 10, 10, 5)]


# --- the Vm


def test_the_probe_for_speed():
    """TCG translates every ring alike, so the probe must come to its end."""
    assert qemu_vm.runs_kernels_fast("tcg")


def test_a_refused_command_and_a_qemu_that_does_not_start(rom):
    with Vm(bios=rom, memory=64 * MIB) as vm:
        with pytest.raises(qemu_vm.QmpError, match="no-such-command"):
            vm.qmp("no-such-command")
        assert "ram0" in vm.hmp("info ramblock")
        assert Path(vm.qmp_path).is_socket()
        ram = vm.ram_files[0]
        assert ram.exists()
        vm.kill()
    assert not ram.exists()
    with pytest.raises(RuntimeError, match="no-such-option"):
        Vm(extra=("-no-such-option",))
