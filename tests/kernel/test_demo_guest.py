"""The demo guest by itself: random access, several processors, memory that is armed for postcopy
or on huge pages. What it says of itself must be right before it may judge a migration."""

import contextlib
import os
import select
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import GIVE_UP, until

import pageferry
from pageferry.transport.errors import HostLacks, PeerRefused, RemoteProtocolError, UsageError
from pageferry.transport.messages import POSTCOPY, PROTOCOL, Block, Hello
from pageferry.transport.pages import PAGE_SIZE, pages_of
from pageferry.transport.vmstate import Section, save
from pageferry.workers.guests import parse_guest
from pageferry.workers.guests.base import Region
from pageferry.workers.guests.demo import HUGE_PAGE, DemoDestination, DemoSource
from pageferry.workers.guests.demo_process import (
    Content,
    Processors,
    Registers,
    check,
    order_of,
    reduce_waits,
)
from pageferry.workers.guests.states import DEMO, state_of
from pageferry.workers.kernel import userfaultfd

MIB = 1 << 20
POOL = Path("/proc/sys/vm/nr_hugepages")
encode = partial(state_of, DEMO)


def _image(registers, size):
    """What memory must hold in a guest with `registers`."""
    content = Content(registers.content, registers.seed)
    memory = content.chunk(0, size).copy()
    memory[:, 0] = registers.passes % 256
    memory[order_of(registers, len(memory))[: registers.position], 0] += 1
    return memory


def _hello(size, page_size=PAGE_SIZE, capabilities=()):
    block = Block("demo.ram", size, page_size)
    uuid = "00000000-0000-4000-8000-000000000000"
    return Hello(PROTOCOL, "0", uuid, "demo", [block], 1, 256, list(capabilities))


@contextlib.contextmanager
def _source(text):
    with contextlib.closing(DemoSource(parse_guest(text))) as guest:
        yield guest


@contextlib.contextmanager
def _destination(hello):
    guest = DemoDestination(parse_guest("demo:"))
    with contextlib.closing(guest):
        guest.lay_out(hello)
        yield guest


@pytest.fixture
def missing():
    """Skips where missing pages cannot be caught."""
    try:
        os.close(userfaultfd.create_missing())
    except HostLacks as e:
        pytest.skip(str(e))


@pytest.fixture
def huge_pages():
    """Sixteen huge pages of 2 MiB."""
    try:
        POOL.write_text("16")
    except OSError as e:
        pytest.skip(f"cannot set vm.nr_hugepages: {e.strerror}")
    try:
        if int(POOL.read_text()) < 16:
            pytest.skip("no 16 huge pages can be had here")
        yield
    finally:
        POOL.write_text("0")


# ---- access and processors -------------------------------------------------------------------


def test_each_pass_has_an_order_of_its_own():
    """The same for the same registers, and every page once."""
    registers = Registers(0, 0, 0, "zero", 7, "random")
    first = order_of(registers, 1000)
    assert (order_of(registers, 1000) == first).all()
    assert sorted(first.tolist()) == list(range(1000))
    registers.passes = 1
    assert (order_of(registers, 1000) != first).any()


@pytest.mark.parametrize(("position", "passes"), [(0, 0), (1, 0), (100, 255), (255, 70_000)])
def test_the_oracle_knows_random_order(position, passes):
    registers = Registers(position, passes, 0, "text", 3, "random")
    memory = _image(registers, MIB)
    assert check(memory, registers, 0).ok
    memory[order_of(registers, 256)[0], 0] += 1
    assert check(memory, registers, 0).wrong_pages == 1


@pytest.mark.parametrize("vcpus", [1, 4, 16])
@pytest.mark.parametrize("rate", [0, 20_000])
def test_random_access_is_right_wherever_it_stops(vcpus, rate):
    with _source(f"demo:?size=4M&access=random&vcpus={vcpus}&rate={rate}") as guest:
        seen = set()

        def enough():
            verdict = guest.verdict()
            guest.resume()
            assert verdict.ok
            seen.add(verdict.position)
            return verdict.passes >= 2 and len(seen) > 1

        until(enough, "two passes and stops at two places")


@pytest.mark.parametrize("offset", [0, 1, 4095])
def test_one_wrong_byte_is_found(offset):
    with _source("demo:?size=2M&access=random&vcpus=2") as guest:
        assert guest.verdict().ok
        fd, at = guest.blocks[0].file.fd, 77 * PAGE_SIZE + offset
        os.pwrite(fd, bytes([(os.pread(fd, 1, at)[0] + 1) % 256]), at)
        verdict = guest.verdict()
        assert not verdict.ok
        assert verdict.wrong_pages == 1


def test_a_guest_with_several_processors_migrates():
    report = pageferry.migrate("demo:?size=16M&access=random&vcpus=4", "demo:")
    assert report["status"] == "completed"
    assert report["oracle"]["ok"]
    assert report["oracle"]["ran-on"] > 0


def test_processors_touch_everything_before_they_say_so():
    memory = np.zeros((1000, PAGE_SIZE), np.uint8)
    addresses = (memory.ctypes.data + np.arange(1000) * PAGE_SIZE).tolist()
    processors = Processors(4)
    try:
        for value in range(1, 20):
            assert processors.touch(addresses, value, timed=False) == []
            assert (memory[:, 0] == value).all()
        processors.touch(addresses[:3], 50, timed=True)
        assert (memory[:3, 0] == 50).all()
        assert (memory[3:, 0] == 19).all()
        assert not memory[:, 1:].any()
    finally:
        processors.close()
        processors.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("access=zigzag", "access is one of sequential, random"),
        ("access=random&vcpus=0", "vcpus is 1 to 64"),
        ("access=random&vcpus=65", "vcpus is 1 to 64"),
        ("access=random&vcpus=two", "vcpus must be a whole number"),
        ("vcpus=2", "write access=random"),
        ("hugepages=1G", "hugepages is 2M"),
        ("hugepages=2M&size=1M", "multiple of 2097152"),
        ("size=5", "multiple of 4096"),
        ("seed=9999999999999999999", "seed"),
        ("rate=9999999999999999999", "rate"),
    ],
)
def test_options_that_make_no_sense(options, why):
    with pytest.raises(UsageError, match=why):
        DemoSource(parse_guest(f"demo:?{options}"))


# ---- what comes by the network ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"content": "prose"}, {"access": "zigzag"}, {"vcpus": 0}, {"vcpus": 65},
        {"vcpus": 2}, {"position": 256}, {"position": 1 << 63}, {"passes": 1 << 63},
        {"rate": 1 << 63}, {"seed": 1 << 63}, {"changes": 0}, {"changes": 4097},
    ],
)  # fmt: skip
def test_registers_that_make_no_sense(change):
    state = encode(
        SimpleNamespace(
            **(
                {
                    "position": 0,
                    "passes": 0,
                    "rate": 0,
                    "content": "zero",
                    "seed": 1,
                    "access": "sequential",
                    "vcpus": 1,
                    "changes": 1,
                }
                | change
            )
        )
    )
    with _destination(_hello(MIB)) as guest, pytest.raises(RemoteProtocolError, match="registers"):
        guest.load_state("demo", state, True)


def test_registers_of_before_there_was_random_access():
    """Version 1 of them."""
    old = Section(DEMO, Registers(0, 0, 1000, "zero", 1)).older(1)
    with _destination(_hello(MIB)) as guest:
        guest.load_state("demo", save([old]), True)
        assert guest._guest.ask("stop").registers == Registers(0, 0, 1000, "zero", 1)


@pytest.mark.parametrize(
    ("size", "page_size", "field"),
    [(MIB, 1 << 16, "page-size"), (MIB + 1, PAGE_SIZE, "size"), (MIB, HUGE_PAGE, "size")],
)
def test_memory_that_no_demo_guest_has(size, page_size, field):
    with pytest.raises(PeerRefused) as caught, _destination(_hello(size, page_size)):
        pass
    assert caught.value.data["field"] == field


# ---- latency ---------------------------------------------------------------------------------


def test_waits_are_reduced():
    assert reduce_waits([]) is None
    latency = reduce_waits([1000 * n for n in range(1, 102)])
    assert (latency.count, latency.mean, latency.max) == (101, 51.0, 101.0)
    assert (latency.p50, latency.p90, latency.p99) == (51.0, 91.0, 100.0)


def test_a_guest_that_is_asked_for_latency_goes_on():
    with _destination(_hello(MIB)) as guest:
        guest.load_state("demo", encode(Registers(0, 0, 0, "zero", 1, "random", 2)), True)
        guest.run()
        guest._guest.ask("latency")
        before = guest._guest.ask("latency")
        assert before.latency is None  # nothing is timed any more
        until(
            lambda: guest._guest.ask("latency").registers.passes > before.registers.passes,
            "the guest goes on",
        )
        guest._guest.ask("stop")
        stopped = guest._guest.ask("latency").registers
        assert guest._guest.ask("latency").registers == stopped  # nor does it make it run


# ---- armed memory ----------------------------------------------------------------------------


def _serve(memory, image, wanted):
    """Install pages that the guest waits for until `wanted` host pages are there."""
    region = memory.regions[0]
    step = region.page_size
    installer = userfaultfd.Installer(memory.uffd)
    installed = set()
    while len(installed) < wanted:
        ready, _, _ = select.select([memory.uffd], [], [], GIVE_UP)
        assert ready, "the guest waits for nothing"
        for fault in userfaultfd.read_messages(memory.uffd):
            offset = (fault.address - region.address) // step * step
            assert 0 <= offset < image.nbytes
            installer.copy(region.address + offset, image.ctypes.data + offset, step, step)
            installed.add(offset)


@pytest.mark.parametrize(
    ("access", "vcpus"), [("sequential", 1), ("random", 1), ("random", 4), ("random", 64)]
)
def test_an_armed_guest_runs_on_pages_that_are_served(missing, access, vcpus):
    size = 4 * MIB
    registers = Registers(0, 4, 0, "text", 5, access, vcpus)
    image = _image(registers, size)
    with _destination(_hello(size, capabilities=[POSTCOPY])) as guest:
        assert guest.memory.regions == [
            Region(0, 0, 1024, guest.memory.regions[0].address, PAGE_SIZE)
        ]
        assert len(guest.blocks[0].data_runs()[0]) == 0  # nothing was touched
        guest.load_state("demo", encode(registers), True)
        guest.run()
        _serve(guest.memory, image, 1024)
        result = guest.conclude()
        assert result["oracle"]["ok"]
        assert result["oracle"]["ran-on"] >= 1024
        if access == "random":
            latency = result["guest-latency"]
            assert latency["count"] >= 1
            assert 15 <= latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        else:
            assert "guest-latency" not in result


def test_a_guest_that_waits_for_pages_can_be_ended(missing):
    size = 4 * MIB
    with _destination(_hello(size, capabilities=[POSTCOPY])) as guest:
        guest.load_state("demo", encode(Registers(0, 0, 0, "zero", 1, "random", 8)), True)
        guest.run()
        image = np.zeros(size, np.uint8)
        _serve(guest.memory, image, 10)
        ready, _, _ = select.select([guest.memory.uffd], [], [], GIVE_UP)
        assert ready
        guest.discard()
        assert guest.memory.uffd == -1
        guest.close()


def test_memory_is_not_armed_unless_asked_for():
    with _destination(_hello(MIB)) as guest:
        assert guest.memory is None


_WITHOUT_USERFAULTFD = """
import ctypes, platform, struct
number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
# load the number; is it userfaultfd: ENOSYS; any other: allow (seccomp(2), <linux/filter.h>)
code = b"".join(struct.pack("HBBI", *row) for row in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50026), (0x06, 0, 0, 0x7FFF0000)))
rows = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(rows)))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.addressof(program), 0, 0) == 0, ctypes.get_errno()

from pageferry.transport.errors import PeerRefused
from pageferry.transport.messages import Block, Hello
from pageferry.workers.guests import open_destination, parse_guest

guest = open_destination(parse_guest("demo:"))
try:
    guest.lay_out(
        Hello(1, "0", "u", "demo", [Block("demo.ram", 1 << 20)], 1, 256, ["postcopy-ram"])
    )
except PeerRefused as e:
    print(e.data["field"], e)
finally:
    guest.close()
"""


def test_a_host_that_cannot_catch_missing_pages_refuses():
    """A process from which the kernel keeps userfaultfd."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_USERFAULTFD],
        capture_output=True,
        text=True,
        timeout=GIVE_UP,
        check=False,
    )
    assert done.stdout.startswith("postcopy-ram this kernel has no userfaultfd"), done.stderr


# ---- huge pages ------------------------------------------------------------------------------


def test_a_guest_on_huge_pages(huge_pages):
    with _source("demo:?size=16M&hugepages=2M&content=text&access=random&vcpus=2") as guest:
        assert guest.blocks[0].spec == Block("demo.ram", 16 * MIB, HUGE_PAGE)
        until(lambda: guest.verdict().ran_on or guest.resume(), "it runs")
        assert guest.verdict().ok
        if guest.tracking != "pagemap-scan":
            pytest.skip("this kernel does not track writes")
        guest.start_tracking()
        assert len(pages_of(guest.dirty_pages(0))) == 0
        guest.resume()
        found = set()
        until(lambda: found.update(pages_of(guest.dirty_pages(0)).tolist()) or found, "writes")
        assert found <= set(range(4096))
        guest.stop()
        block = guest.blocks[0]
        assert (
            block.whole_pages()[:, 0].tobytes()
            == _image(guest._registers, block.size)[:, 0].tobytes()
        )


def test_an_armed_guest_on_huge_pages(huge_pages, missing):
    size = 8 * MIB
    registers = Registers(0, 0, 0, "text", 5, "random", 4)
    image = _image(registers, size)
    with _destination(_hello(size, HUGE_PAGE, [POSTCOPY])) as guest:
        region = guest.memory.regions[0]
        assert region == Region(0, 0, 2048, region.address, HUGE_PAGE)
        assert region.address % HUGE_PAGE == 0
        guest.load_state("demo", encode(registers), True)
        guest.run()
        _serve(guest.memory, image, 4)
        result = guest.conclude()
        assert result["oracle"]["ok"]
        assert result["guest-latency"]["count"] >= 1


def test_too_few_huge_pages_are_told_with_what_to_do():
    with pytest.raises(HostLacks, match=r"sysctl vm\.nr_hugepages=\d+"):
        DemoSource(parse_guest("demo:?size=1T&hugepages=2M"))
