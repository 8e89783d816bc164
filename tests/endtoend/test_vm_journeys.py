"""A VM of an unmodified QEMU that moves often, beside others, and with somebody killed on the way.

The boot guest says what it lost: its counters and pages, and what it has printed on all the serial
lines that it had. Whatever happens it never runs twice, and it can always be let go on once.
"""

import contextlib
import json
import os
import random
import signal
import struct

import pytest
from helpers import PAGE, Running, receiver, sweep
from helpers import pageferry as run
from qemu_vm import MIB, Vm, require_qemu

import pageferry
from pageferry.tools.bench.boot_guest import AT_RANDOM, IN_ORDER, BootGuest, rom_image
from pageferry.transport.errors import PeerRefused

CAN_POSTCOPY = os.geteuid() == 0
_by_postcopy = pytest.mark.skipif(not CAN_POSTCOPY, reason="postcopy into qemu: needs root")
LO, HI, MARKS = MIB, 17 * MIB, 32 * MIB
COUNTERS = ("touches", "writes", "passes")
# A round of the pages that the guest writes takes 1.6 s like this, and any number of them fits the
# downtime limit, or none.
SLOW = ("--codec", "none", "--max-bandwidth", "10MB")
CONVERGES, NEVER_CONVERGES = ("--downtime-limit", "60s"), ("--downtime-limit", "31ms")


@pytest.fixture
def machine(tmp_path):
    """Starts VMs with the boot guest, ends them. The same `hi` makes them alike."""
    require_qemu()
    with contextlib.ExitStack() as stack:

        def start(name, incoming=None, hi=HI):
            rom = rom_image(tmp_path / f"rom-{hi}", mode=IN_ORDER, lo=LO, hi=hi, delay=2000)
            vm = stack.enter_context(Vm(name, memory=64 * MIB, bios=rom, incoming=incoming))
            if incoming is None:
                vm.wait_for_serial(b"B")
            return vm

        yield start


def counters(vm):
    with BootGuest(*vm.ram_parts()) as guest:
        return [guest.get(name) for name in COUNTERS]


def steer(vm, **fields):
    with BootGuest(*vm.ram_parts()) as guest:
        guest.set(**fields)
        guest.settle()


def is_right(vm):
    """The guest of a VM that stands still."""
    assert vm.status() != "running"
    with BootGuest(*vm.ram_parts()) as guest:
        assert guest.oracle() == []


def runs_on(vm):
    """The guest writes here; when it is stopped the oracle is content."""
    assert vm.status() == "running"
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance(by=2000)
    vm.qmp("stop")
    is_right(vm)
    vm.qmp("cont")


def moved(source, destination):
    """It runs there only, and has gone on from where it was stopped. What it has printed here."""
    assert source.status() in ("postmigrate", "paused")
    is_right(source)
    before = counters(source)
    assert destination.status() == "running"
    after = counters(destination)
    assert all(now >= then for now, then in zip(after, before, strict=True)), (before, after)
    return source.serial()


def printed_all(vm, before=b""):
    """On all its serial lines together, what it would have printed on one."""
    vm.qmp("stop")
    said = before + vm.serial()
    with BootGuest(*vm.ram_parts()) as guest:
        passes = guest.get("passes")
    assert said[:1] == b"A"
    assert set(said[1:]) == {ord("B")}
    assert passes - 1 <= len(said) - 1 <= passes  # it counts a pass before it says so
    vm.qmp("cont")


@contextlib.contextmanager
def both_ends(source, waiting, *options):
    """A receiver, and a sender with these options."""
    with (
        receiver("--into", f"qemu:{waiting.qmp_path}", "--once") as receiving,
        Running("send", f"qemu:{source.qmp_path}", receiving.endpoint, *options) as sending,
    ):
        yield receiving, sending


def tell(*arguments):
    """Something, to a pageferry by its monitor."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr


def mark(vm, seed=0):
    """16 MiB that only this VM has, where its guest does not write."""
    with BootGuest(*vm.ram_parts()) as guest:
        guest.ram.write(MARKS, marks_of(seed))


def marks_of(seed):
    return random.Random(seed).randbytes(16 * MIB)


def marks(vm):
    with BootGuest(*vm.ram_parts()) as guest:
        return guest.ram.read(MARKS, 16 * MIB)


# --- often


def travel(machine, moves, ways):
    """So many moves, each to a new QEMU, in these ways in turn; the rest is drawn by lot."""
    draw, vm, said = random.Random(20), machine("vm0"), b""
    for i in range(1, moves + 1):
        steer(vm, mode=draw.choice([IN_ORDER, AT_RANDOM]), random=draw.randrange(1, 1 << 62))
        following = machine(f"vm{i}", incoming="defer")
        way = ways[i % len(ways)]
        report = pageferry.migrate(
            f"qemu:{vm.qmp_path}", f"qemu:{following.qmp_path}",
            workers=draw.randint(1, 3), codec=draw.choice(["none", "lz4", "zstd", "auto"]),
            postcopy=way, downtime_limit=60 if way == "never" else 0.001,
        )  # fmt: skip
        assert report["status"] == "completed"
        if way != "after=2":  # by then nothing may be left to send
            assert ("postcopy-requests" in report) == (way == "now")
        said += moved(vm, following)
        vm.close()
        vm = following
    steer(vm, mode=IN_ORDER)
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance("passes")
    runs_on(vm)
    printed_all(vm, said)
    assert b"B" in vm.serial()


@pytest.mark.parametrize(
    ("times", "ways"),
    [
        pytest.param(6, ["never"], id="precopy"),
        pytest.param(3, ["now", "after=2", "never"], id="postcopy", marks=_by_postcopy),
    ],
)
def test_there_and_back(machine, times, ways):
    travel(machine, 2 * times, ways)


# --- beside another


def test_two_vms_at_the_same_time(machine, tmp_path):
    """By four processes, all amid it at once; each VM arrives with its own memory. One of them by
    postcopy, where there is one."""
    ways = ["never", "now" if CAN_POSTCOPY else "never"]
    sizes = [17 * MIB, 25 * MIB]
    sources = [machine(f"src{seed}", hi=hi) for seed, hi in enumerate(sizes)]
    there = [machine(f"dst{seed}", hi=hi, incoming="defer") for seed, hi in enumerate(sizes)]
    monitors = [f"unix:{tmp_path}/m{seed}" for seed in range(2)]
    with contextlib.ExitStack() as stack:
        pageferries = []
        for seed, way in enumerate(ways):
            mark(sources[seed], seed)
            pageferries.append(stack.enter_context(both_ends(
                sources[seed], there[seed], "--json", "--codec", "none", "--postcopy", way,
                "--max-bandwidth", "1MB", "--max-postcopy-bandwidth", "1MB", *CONVERGES,
                "--monitor", monitors[seed],
            )))  # fmt: skip
        for (_, sending), way in zip(pageferries, ways, strict=True):
            sending.error_line("postcopy:" if way == "now" else "round 1:")
        for monitor in monitors:
            tell("set", monitor, "max-bandwidth=0", "max-postcopy-bandwidth=0")
        for (receiving, sending), way in zip(pageferries, ways, strict=True):
            code, out, said = sending.finish()
            assert code == 0, said
            assert ("postcopy-requests" in json.loads(out)) == (way != "never")
            code, _, said = receiving.finish()
            assert code == 0, said
    for seed in range(2):
        said = moved(sources[seed], there[seed])
        runs_on(there[seed])
        printed_all(there[seed], said)
        assert marks(sources[seed]) == marks(there[seed]) == marks_of(seed)


# --- somebody does not want it any more


@pytest.mark.parametrize("end", ["source", "destination"])
def test_cancelled_in_mid_round(machine, tmp_path, end):
    """At either end: the VM runs on, its destination still waits, and then it moves there."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    monitor = f"unix:{tmp_path}/m"
    with both_ends(source, waiting, *SLOW, *NEVER_CONVERGES, "--monitor", monitor) as (
        receiving,
        sending,
    ):
        sending.error_line("round 2:")
        if end == "source":
            tell("cancel", monitor)
        else:
            receiving.process.send_signal(signal.SIGINT)
        codes = [one.finish()[0] for one in (sending, receiving)]
    assert codes == [130, 130]
    still_here(source, waiting)


def still_here(source, waiting):
    """It never left, and can leave now."""
    assert waiting.status() == "inmigrate"
    runs_on(source)
    printed_all(source)
    pageferry.migrate(f"qemu:{source.qmp_path}", f"qemu:{waiting.qmp_path}", downtime_limit=60)
    said = moved(source, waiting)
    runs_on(waiting)
    printed_all(waiting, said)


# --- somebody is killed


def was_stopped(vm):
    """Since it was started (a STOP event), whatever it does now."""
    vm.status()
    return any(event["event"] == "STOP" for event in vm.events)


MOMENTS = {
    "in the round": lambda source, waiting: True,
    "in the last round": lambda source, waiting: was_stopped(source),
    # These are over in milliseconds: Run may have been said, or not.
    "devices saved": lambda source, waiting: source.status() == "postmigrate",
    "devices loaded": lambda source, waiting: waiting.status() != "inmigrate",
}
EARLY = ("in the round", "in the last round")


@contextlib.contextmanager
def at_the(moment, source, waiting):
    """A receiver and a sender of this VM, at this moment."""
    limit = NEVER_CONVERGES if moment == "in the round" else CONVERGES
    slow = SLOW if moment in EARLY else ()
    with both_ends(source, waiting, *limit, *slow) as (receiving, sending):
        if moment in EARLY:
            sending.error_line("round 1:")
        source.wait_until(lambda: MOMENTS[moment](source, waiting), moment)
        yield receiving, sending


def kill(running):
    """SIGKILL for pageferry; what it had in /dev/shm nobody else can remove."""
    running.kill()
    sweep(running.process.pid)


@pytest.mark.parametrize("moment", EARLY)
def test_a_receiver_that_is_killed(machine, moment):
    """The VM runs on where it was, and its destination still waits."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    with at_the(moment, source, waiting) as (receiving, sending):
        kill(receiving)
        code, _, said = sending.finish()
    assert code == 7, said
    assert was_stopped(source) == (moment == "in the last round")
    still_here(source, waiting)


def test_a_sender_that_is_killed_while_the_vm_stands_still(machine):
    """Nobody is left to resume it: an operator does."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    with at_the("in the last round", source, waiting) as (receiving, sending):
        kill(sending)
        code, _, said = receiving.finish()
    assert code == 7, said
    assert source.status() == "paused"
    is_right(source)
    source.qmp("cont")
    still_here(source, waiting)


@pytest.mark.parametrize(
    ("end", "moment"), [("sender", "devices saved"), ("receiver", "devices loaded")]
)
def test_killed_when_it_is_undecided_where_the_vm_goes_on(machine, end, moment):
    """It goes on there, or here, or an operator lets it go on here: never at both ends."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    with at_the(moment, source, waiting) as both:
        victim, other = both if end == "receiver" else both[::-1]
        kill(victim)
        code, _, said = other.finish()
    assert code in (0, 7, 13), said
    if not waiting.has_ended() and waiting.status() == "running":
        arrived = moved(source, waiting)
        assert code in (0, 13)
        runs_on(waiting)
        printed_all(waiting, arrived)
        return
    # 7: a sender that lives has let it go on; 13: it cannot know, and has not
    resumed = end == "receiver" and code == 7
    assert (source.status() == "running") == resumed
    if not resumed:
        is_right(source)
        source.qmp("cont")
    waiting.close()
    runs_on(source)
    still_here(source, machine("other", incoming="defer"))


# --- by postcopy, when the VM runs there and its memory is here

SLOW_POSTCOPY = ("--postcopy", "now", "--codec", "none", "--max-postcopy-bandwidth", "1MB")


@_by_postcopy
def test_a_postcopy_that_is_cut_and_taken_up_again(machine, tmp_path):
    """Twice: nothing is lost, and all goes on."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    mark(source)
    monitor = f"unix:{tmp_path}/m"
    with both_ends(source, waiting, *SLOW_POSTCOPY, "--monitor", monitor) as ends:
        receiving, sending = ends
        for _ in range(2):
            sending.error_line("postcopy:")
            tell("pause", monitor)
            sending.error_line("paused:")
            receiving.error_line("paused:")
            tell("recover", monitor)
        sending.error_line("postcopy:")
        tell("set", monitor, "max-postcopy-bandwidth=0")
        for one in ends:
            code, _, said = one.finish()
            assert code == 0, said
    said = moved(source, waiting)
    runs_on(waiting)
    printed_all(waiting, said)
    assert marks(waiting) == marks(source)


@_by_postcopy
def test_a_receiver_that_is_killed_before_a_postcopy(machine):
    """It had prepared its QEMU to wait for missing pages: nobody brings any. Whoever comes next
    refuses it, or makes it as it was; he does not leave a VM there that sleeps for ever."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    with both_ends(source, waiting, *SLOW, *NEVER_CONVERGES, "--postcopy", "after=99") as ends:
        receiving, sending = ends
        sending.error_line("round 1:")
        kill(receiving)
        assert sending.finish()[0] == 7
    for way in ("now", "never"):
        with contextlib.suppress(PeerRefused):
            pageferry.migrate(
                f"qemu:{source.qmp_path}", f"qemu:{waiting.qmp_path}",
                downtime_limit=60, postcopy=way,
            )  # fmt: skip
            said = moved(source, waiting)
            runs_on(waiting)
            printed_all(waiting, said)
            return
    runs_on(source)
    printed_all(source)


@_by_postcopy
@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_killed_in_postcopy(machine, end):
    """The VM needs both hosts now. It does not go on there with pages that it does not have; an
    operator may let it go on here, from where it left."""
    source, waiting = machine("src"), machine("dst", incoming="defer")
    mark(source)
    steer(source, delay=50_000)  # it is not to have touched all its pages by then
    with both_ends(source, waiting, *SLOW_POSTCOPY) as ends:
        ends[1].error_line("postcopy:")
        victim, other = ends if end == "receiver" else ends[::-1]
        kill(victim)
        other.error_line("paused:")
        makes_nothing_up(source, waiting)
        other.process.send_signal(signal.SIGINT)
        code, _, said = other.finish()
    assert code == 14, said
    assert "never arrived" in said
    if end == "sender":  # who lives has thrown away what it cannot complete
        assert waiting.has_ended()
    waiting.kill()
    assert source.status() in ("postmigrate", "paused")
    is_right(source)
    source.qmp("cont")
    steer(source, delay=2000)
    still_here(source, machine("other", incoming="defer"))


def makes_nothing_up(source, destination):
    """No page that the guest has there began as zeros in place of what it left here."""
    with BootGuest(*source.ram_parts()) as left, BootGuest(*destination.ram_parts()) as here:
        for page in range(LO, HI, PAGE):
            before, now = (
                struct.unpack("<Q", guest.ram.read(page + 8, 8))[0] for guest in (left, here)
            )
            assert now == 0 or now >= before > 0, f"page {page:#x}: {now} writes, {before} here"
