"""Guests that write several times faster than the link carries: slowed down they converge, and they
have all of their time again whatever becomes of it."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PAGE, Running, ask, receiver, same_file, until
from qemu_vm import MIB, Vm, require_qemu
from slowed import is_free, notes, why_no_quota

import pageferry
from pageferry.pipeline import api
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.tools.bench.boot_guest import IN_ORDER, BootGuest, rom_image
from pageferry.transport.errors import Cancelled, NotConverging, UsageError
from pageferry.transport.links import Endpoint
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.slowing import MEANS, QUOTA

LINK = 40_000_000
# 4 times the link; two rounds are too short for it to write all of its memory
DEMO = f"demo:?size=40M&rate={4 * LINK // PAGE}&content=random"
SLOW = {"codec": "none", "max_bandwidth": LINK}
# QEMU's steps, two of them
STEPS = {"auto_converge": True, "cpu_throttle_initial": 60, "cpu_throttle_increment": 30}


LIMIT = {"dirty_limit": True}


@pytest.mark.parametrize("how", [STEPS, LIMIT], ids=["auto-converge", "dirty-limit"])
def test_four_times_the_link(how):
    """Without being slowed down it never converges; so it is within the limit, to the byte."""
    seen, passes = [], []

    def look(report):
        seen.append(report.get("cpu-throttle-percentage", 0))

    def started(migration):
        on_event = migration.on_event
        migration.on_event = lambda name, data: (
            passes.append(data) if name == "MIGRATION_PASS" else None, on_event(name, data)
        )  # fmt: skip

    report = asyncio.run(
        pageferry.migrate_async(DEMO, "demo:", on_progress=look, on_started=started, **SLOW, **how)
    )
    assert report["status"] == "completed"
    assert report["oracle"]["ok"]
    throttle = report["throttle"]
    assert throttle["by"] == "guest"
    assert throttle["max-percentage"] >= 60
    # by its own count of pages
    assert throttle["pages-per-second-throttled"] < throttle["pages-per-second-before"]
    assert throttle["slow-down"] > 0
    assert max(seen) == throttle["max-percentage"] and seen[0] == 0
    assert how == LIMIT or set(seen) <= {0, 60, 90}
    assert "cpu-throttle-percentage" not in report  # lifted
    assert report["ram"]["dirty-sync-count"] == len(passes) >= 4


@contextlib.asynccontextmanager
async def arriving(where):
    """Where a demo guest can go."""
    endpoint = Endpoint("ipc", path=f"{where}/c")
    listening = Destination(endpoint, api.opener(parse_guest("demo:")))
    task = asyncio.ensure_future(api.receive_one(listening))
    try:
        yield endpoint
    finally:
        if listening.arrival is None:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listening.close()


async def cancelled_when_throttled(guest, where, parameters):
    """Set while it runs; cancelled when it is seen."""
    async with arriving(where) as endpoint:
        source = Source(guest, endpoint, parameters)

        def look(report):
            if report["ram"]["dirty-sync-count"] >= 2 and "throttle" not in report:
                source.set_parameters({"dirty-limit": "on", "x-vcpu-dirty-limit-period": "100ms"})
            if report.get("cpu-throttle-percentage"):
                source.cancel()

        source.on_progress = look
        await source.run()


def test_set_while_it_runs_and_cancelled(tmp_path):
    """The guest goes on as fast as it was, and is moved by postcopy, which is not slowed down."""
    guest = open_source(parse_guest(DEMO))
    try:
        parameters = Parameters(**SLOW, max_rounds=1000).checked()
        with pytest.raises(Cancelled) as caught:
            asyncio.run(cancelled_when_throttled(guest, tmp_path, parameters))
        assert caught.value.data["report"]["throttle"]["max-percentage"] > 0
        assert guest._guest.ask("latency").percentage == 0
        assert guest.verdict().ok
        guest.resume()
    finally:
        guest.close()


def test_a_stall_is_throttled_before_postcopy():
    """`auto` takes over only when 30 % do not help."""
    report = pageferry.migrate(
        DEMO.replace("40M", "20M"), "demo:", **SLOW, auto_converge=True, cpu_throttle_initial=30,
        max_cpu_throttle=30, postcopy="auto",
    )  # fmt: skip
    assert report["oracle"]["ok"]
    assert "postcopy-requests" in report
    assert report["throttle"]["max-percentage"] == 30
    assert report["ram"]["dirty-sync-count"] > 4


# Writes 8 MiB, two pages at a time: some times faster than the link, and not much of a processor.
WRITER = """
import mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, os.fstat(fd).st_size)
print("ready", flush=True)
turn = 0
while True:
    turn += 1
    for at in range(0, 8 << 20, 8192):
        memory[at : at + 8] = memory[at + 4096 : at + 4104] = turn.to_bytes(8, "little")
        time.sleep(0.0002)
"""
SLOW_LINK = {"codec": "none", "max_bandwidth": 8_000_000}


@pytest.fixture
def memory():
    paths = [f"/dev/shm/test-pf-{os.getpid()}-{name}" for name in "ab"]
    Path(paths[0]).write_bytes(os.urandom(8 << 20))
    yield paths
    for path in paths:
        Path(path).unlink(missing_ok=True)


@pytest.fixture
def writer(memory):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, memory[0]], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def needs(means, pid):
    if means == QUOTA and (reason := why_no_quota(pid)):
        pytest.skip(reason)


@pytest.mark.parametrize("means", MEANS)
def test_a_process(memory, writer, means):
    """It stands still then, and what is there is what it had: by a quota, or by stops."""
    needs(means, writer.pid)
    report = pageferry.migrate(
        f"pid:{writer.pid}?throttle={means}", f"ram:{memory[1]}", **SLOW_LINK, dirty_limit=True,
        vcpu_dirty_limit_period=0.5, downtime_limit=0.5,
    )  # fmt: skip
    assert report["status"] == "completed"
    assert report["throttle"]["by"] == means
    assert report["throttle"]["max-percentage"] > 0
    assert {"slow-down", "processors-before", "processors-throttled"} <= set(report["throttle"])
    assert "throttle" in {process["name"] for process in report["processes"]}
    assert report["source-process"].startswith(("stopped", "frozen"))
    assert same_file(*memory)
    assert notes() == []
    os.kill(writer.pid, 18)
    assert is_free(writer.pid)


@pytest.mark.parametrize(("means", "victim"), [("cgroup", "destination"), ("signal", "source")])
def test_an_end_is_killed(memory, writer, means, victim, tmp_path):
    """While it is slowed down: it goes on here with all of its time."""
    needs(means, writer.pid)
    monitor = f"unix:{tmp_path}/m"
    with (
        receiver("--into", f"ram:{memory[1]}", "--once") as there,
        Running(
            "send", f"ram:{memory[0]}?pid={writer.pid}&throttle={means}", there.endpoint,
            "--max-bandwidth", "8MB", "--codec", "none", "--auto-converge", "--max-rounds", "1",
            "--cpu-throttle-initial", "97", "--monitor", monitor, "--downtime-limit", "31ms",
        ) as here,
    ):  # fmt: skip
        here.error_line("round 1")
        until(
            lambda: ask(monitor, "query-migrate").get("cpu-throttle-percentage"),
            "it is slowed down",
        )
        assert len(notes()) == 1
        (there if victim == "destination" else here).process.kill()
        code, _, said = (here if victim == "destination" else there).finish()
        assert code == 7, said
        until(lambda: not notes(), "it is lifted")
        assert is_free(writer.pid)


def test_nobody_to_slow_down(memory):
    with pytest.raises(UsageError, match="whose writer is named"):
        pageferry.migrate(f"ram:{memory[0]}", f"ram:{memory[1]}", auto_converge=True)
    # nobody writes an image
    report = pageferry.migrate(f"image:{memory[0]}", f"ram:{memory[1]}", auto_converge=True)
    assert report["status"] == "completed" and "throttle" not in report


def test_given_up_in_the_end():
    """What may be taken of its time does not suffice, and the error says what was tried."""
    with pytest.raises(NotConverging, match="lost 20 % of its time") as caught:
        pageferry.migrate(
            DEMO.replace("40M", "8M"), "demo:", **SLOW, auto_converge=True, max_cpu_throttle=20,
            max_rounds=1, downtime_limit=0.031,
        )  # fmt: skip
    report = caught.value.data["report"]
    assert report["throttle"]["max-percentage"] == 20
    assert "cpu-throttle-percentage" not in report


@pytest.fixture
def machine(tmp_path):
    require_qemu()
    rom = rom_image(tmp_path / "rom", mode=IN_ORDER, lo=MIB, hi=9 * MIB, delay=DELAY)
    with contextlib.ExitStack() as stack:

        def start(name, incoming=None):
            vm = stack.enter_context(Vm(name, memory=32 * MIB, bios=rom, incoming=incoming))
            if incoming is None:
                vm.wait_for_serial(b"B")
            return vm

        yield start


DELAY = 2000


@pytest.mark.parametrize("means", MEANS)
def test_a_vm(machine, means):
    """Its processors alone by a quota, so that its monitor answers; or all of it."""
    source, there = machine("src"), machine("dst", incoming="defer")
    needs(means, source.pid)
    report = pageferry.migrate(
        f"qemu:{source.qmp_path}?throttle={means}", f"qemu:{there.qmp_path}", dirty_limit=True,
        codec="none", max_bandwidth=10_000_000, downtime_limit=0.1, vcpu_dirty_limit_period=0.5,
    )  # fmt: skip
    assert report["status"] == "completed"
    assert report["throttle"]["by"] == means
    assert report["throttle"]["max-percentage"] > 0 and "slow-down" in report["throttle"]
    assert notes() == []
    assert "pageferry-" not in "".join(
        path.read_text() for path in Path(f"/proc/{source.pid}/task").glob("*/cgroup")
    )
    assert source.status() in ("postmigrate", "paused")
    with BootGuest(*there.ram_parts()) as guest:
        guest.advance("passes", 1)
        there.qmp("stop")
        assert guest.oracle() == []
