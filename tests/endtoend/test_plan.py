"""Dirty rates and plans of real sources: exact where the kernel tracks, within their margin where
pages are compared, and the source is as it was, however it ends. What stalls says so."""

import asyncio
import json
import os
import signal
from dataclasses import replace

import pytest
from helpers import PAGE, Running, pageferry, pattern, until, until_async
from qemu.qmp import ExecuteError, QMPClient
from qemu_vm import Vm, require_qemu
from shared_writer import SharedWriter

from pageferry.pipeline import api
from pageferry.pipeline.dirty_rate import Asked
from pageferry.pipeline.measuring import RunningDirtyRate, dirty_rate
from pageferry.pipeline.plan import Goal
from pageferry.pipeline.planning import Wanted, plan
from pageferry.transport.errors import SourceError, UsageError
from pageferry.transport.pages import pages_of
from pageferry.workers.dirty import SampledPages, TrackedPages
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.base import TRACKING_PAGEMAP

PAGES = 2048
SAMPLING = "page-sampling"


@pytest.fixture
def writer():
    with SharedWriter("obey", f"memfd:test-{os.getpid()}", PAGES) as writer:
        writer.tell("map", 0, 0, PAGES)
        yield writer


@pytest.fixture
def opened(writer):
    """The process as a source that is tracked."""
    guest = open_source(parse_guest(f"pid:{writer.pid}"))
    try:
        if guest.tracking != TRACKING_PAGEMAP:
            pytest.skip(guest.facts()["dirty-tracking-because"])
        yield guest
    finally:
        guest.close()


def is_tracked(pid):
    """Whether a userfaultfd write-protects any of its memory (proc_pid_smaps(5), VmFlags)."""
    with open(f"/proc/{pid}/smaps") as smaps:
        return any(" uw" in line for line in smaps if line.startswith("VmFlags:"))


# ---- dirty rates -------------------------------------------------------------------------------


def test_both_ways_find_what_a_process_writes_and_it_is_let_go_of(writer, opened):
    """A page that is written again counts once, in both; and each costs the process one fault."""
    tracked = TrackedPages(opened)
    sampled = SampledPages(opened.blocks, [PAGES], 3)
    for first in (0, 1000):
        tracked.begin()
        sampled.begin()
        assert is_tracked(writer.pid)
        for dirty in (range(first, first + 300), range(first + 200, first + 301)):
            writer.tell("write", *dirty)
        assert (tracked.look(), sampled.look()) == (301, 301)
        writer.tell("write", *range(first, first + 100))
        assert (tracked.look(), sampled.look()) == (301, 301)
    sampled.begin()
    writer.tell("write", 0)  # what it holds already: only the kernel sees that
    assert (tracked.look(), sampled.look()) == (302, 0)
    assert tracked.faults == 603
    assert set(pages_of(tracked.written()[0])) == {0, *range(1000, 1301)}
    assert tracked.look() == 0
    sampled.close()
    opened.close()
    assert not is_tracked(writer.pid)
    writer.tell("write", 5)


def test_the_demo_guest_s_registers_say_how_much_it_wrote():
    """Counted from one stop to the next: not one page more or less, whatever the host does."""
    guest = open_source(parse_guest("demo:?size=32M&rate=20000&content=zero"))
    try:
        if guest.tracking != TRACKING_PAGEMAP:
            pytest.skip("the kernel does not track writes here")
        guest.stop()
        before = guest._registers
        tracked = TrackedPages(guest)
        sampled = SampledPages(guest.blocks, [4096], 3)
        tracked.begin()
        sampled.begin()
        guest.resume()
        until(lambda: tracked.look() > 1000, "it writes")
        guest.stop()
        wrote = (guest._registers.passes - before.passes) * 8192
        wrote += guest._registers.position - before.position
        assert tracked.look() == min(wrote, 8192)
        # what it writes lies together: one sampled page in two, and one part at either end
        assert sampled.look() == pytest.approx(min(wrote, 8192), abs=8)
        sampled.close()
    finally:
        guest.close()


def test_an_image_is_written_by_nobody_and_memory_without_owner_is_compared(tmp_path):
    (tmp_path / "vm.mem").write_bytes(pattern(300))

    def rate(source, **more):
        return api.dirty_rate(source, seconds=0.05, **more)

    found = rate(f"image:{tmp_path}/vm.mem")
    assert (found["mode"], found["dirty-rate"], found["status"]) == ("none", 0, "measured")
    found = rate(f"ram:{tmp_path}/vm.mem")
    assert (found["mode"], found["dirty-pages-rate"], found["sampled-pages"]) == (SAMPLING, 0, 300)
    with pytest.raises(UsageError, match="take --mode page-sampling"):
        rate(f"ram:{tmp_path}/vm.mem", mode="dirty-bitmap")
    with pytest.raises(SourceError):
        rate(f"image:{tmp_path}/none")


def test_dirtyrate_from_the_command_line(writer):
    """Whoever is only compared is not attached to."""
    done = pageferry("dirtyrate", f"pid:{writer.pid}", "--seconds", "0.1", "--mode", SAMPLING)
    assert done.returncode == 0, done.stderr
    assert "dirty rate     0 B/s, 0 pages a second" in done.stdout
    assert "2048 pages were compared" in done.stdout and "only read" in done.stdout
    assert pageferry("dirtyrate", "demo:", "--mode", "guess").returncode == 2


@pytest.mark.parametrize("command", ["dirtyrate", "plan"])
def test_ctrl_c_lets_go_of_the_source(command, writer):
    with Running(command, f"pid:{writer.pid}", "--seconds", "60", "--json") as running:
        until(lambda: is_tracked(writer.pid), "it is attached to")
        running.process.send_signal(signal.SIGINT)
        code, out, err = running.finish()
    assert code == 130 and "the source is as it was" in err
    assert json.loads(out)["error"]["class"] == "Cancelled"
    assert not is_tracked(writer.pid)
    assert writer.state() == "S"
    writer.tell("write", 5)


def test_a_measurement_beside_a_migration_ends_with_it(tmp_path):
    """It never holds it up: descriptors and threads go, and what was not measured says so."""
    (tmp_path / "vm.mem").write_bytes(pattern(64))

    async def main():
        guest = open_source(parse_guest(f"ram:{tmp_path}/vm.mem"))
        here = [True]
        rates = RunningDirtyRate(guest, lambda: bool(here))
        assert rates.query()["status"] == "unstarted"
        rates.start({"calc-time": 50, "calc-time-unit": "millisecond"})
        assert rates.query()["status"] == "measuring"
        with pytest.raises(UsageError, match="already"):
            rates.start({"calc-time": 1})
        await until_async(lambda: rates.query()["status"] == "measured", "it is measured")
        with pytest.raises(UsageError, match="tracks the guest's writes itself"):
            rates.start({"calc-time": 1, "mode": "dirty-bitmap"})
        rates.start({"calc-time": 60})
        guest.close()
        await rates.close()
        assert "not here any more" in rates.query()["error"]
        here.clear()
        with pytest.raises(UsageError, match="does not run here any more"):
            rates.start({"calc-time": 1})

    asyncio.run(main())


# ---- a stall -----------------------------------------------------------------------------------


def test_a_stall_is_said_and_what_is_advised_helps(tmp_path):
    """As an event and in query-migrate; and the dirty rate can be asked for meanwhile."""

    async def talk():
        client = QMPClient("test")
        await client.connect(str(tmp_path / "mon"))
        try:
            return await follow(client)
        finally:
            await client.disconnect()

    async def follow(client):
        with client.listener("MIGRATION_STALL") as stalls:
            event = (await anext(aiter(stalls)))["data"]
            await client.execute(
                "calc-dirty-rate", {"calc-time": 50, "calc-time-unit": "millisecond"}
            )
            with pytest.raises(ExecuteError, match="is being measured already"):
                await client.execute("calc-dirty-rate", {"calc-time": 1})
            while (found := await client.execute("query-dirty-rate"))["status"] != "measured":
                await asyncio.sleep(0.01)
            stall = (await client.execute("query-migrate"))["stall"]
            advised = {o["option"]: o.get("value") for o in event["options"]}
            await client.execute(
                "migrate-set-parameters", {"downtime-limit": 4 * advised["downtime-limit"]}
            )
            return event, found, stall

    with Running(
        "copy", "demo:?size=8M&rate=0", "demo:", "--max-bandwidth", "20MB", "--codec", "none",
        "--downtime-limit", "20ms", "--max-rounds", "10000", "--workers", "1",
        "--monitor", f"unix:{tmp_path}/mon", "--json",
    ) as running:  # fmt: skip
        running.error_line("round 1")
        event, found, stall = asyncio.run(talk())
        code, out, err = running.finish()
    assert code == 0, err
    assert event["dirty-rate"] >= 0.95 * event["rate"] and not event["over"]
    named = {o["option"] for o in event["options"]} - {"max-bandwidth"}  # if that is the bound
    assert named == {"downtime-limit", "postcopy", "auto-converge"}
    assert found["mode"] == SAMPLING and found["dirty-pages-rate"] > 0
    assert stall["count"] >= 1 and stall["text"].startswith("stalled: the guest writes ")
    report = json.loads(out)
    assert report["oracle"]["ok"] and report["stall"]["count"] >= 1


# ---- plans -------------------------------------------------------------------------------------

WANTED = Wanted(Goal(50_000_000), seconds=0.1, sample=8 << 20, workers=1, bandwidth="50MB")


def planned(source, wanted=WANTED):
    return asyncio.run(plan(parse_guest(source), None, wanted))


def test_a_plan_of_an_image_is_time_and_nothing_else(tmp_path):
    (tmp_path / "vm.mem").write_bytes(pattern(3072))
    found = api.plan(
        f"image:{tmp_path}/vm.mem", max_bandwidth=5_000_000, seconds=0.1, sample=8 << 20, workers=1
    )
    assert list(found["modes"]) == ["precopy"] and "downtime" not in found
    assert found["rounds"] == 1 and found["dirty-rate"]["mode"] == "none"
    assert found["memory"]["data"] == 3072 * PAGE and 0 < found["memory"]["zero-share"] < 1
    # the link is slow, and half of this compresses well
    assert "none" not in found["settings"]
    assert 12e6 * 0.1 < found["wire-bytes"] < 12e6


def test_a_plan_of_a_guest_is_what_can_be_run():
    source = "demo:?size=16M&rate=500&content=text"
    found = planned(source, replace(WANTED, seconds=0.3))
    assert found["converges"] and found["mode"] == "precopy"
    assert set(found["modes"]) == {"precopy", "auto-converge", "postcopy"}
    assert found["downtime"] > 0
    assert found["dirty-rate"]["working-set"][-1]["pages"] > 0
    assert {c["codec"] for c in found["content"]["written"]} == {"lz4", "zstd"}
    assert found["settings"][-4:] == ["--max-bandwidth", "50MB", "--downtime-limit", "300ms"]
    done = pageferry("copy", source, "demo:", *found["settings"], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["oracle"]["ok"]


def test_a_plan_of_a_process_leaves_it_as_it_was(writer, tmp_path):
    """With what a profile says, but for what is said here."""
    profile = tmp_path / "p.toml"
    profile.write_text('workers = 1\ncodec = "zstd"\nlevel = 3\nverify = true\n')
    writer.tell("write", *range(0, PAGES, 2))
    done = pageferry(
        "plan",
        f"pid:{writer.pid}",
        "--seconds",
        "0.1",
        "--profile",
        str(profile),
        "--codec",
        "none",
    )
    assert done.returncode == 0, done.stderr
    assert "precopy, " in done.stdout and "--workers 1 --codec none" in done.stdout
    assert "The guest writes next to nothing" in " ".join(done.stdout.split())
    assert not is_tracked(writer.pid) and writer.state() == "S"


@pytest.mark.qemu
def test_a_vm_does_not_notice():
    """It is measured and planned for; it runs on, and its monitor is free again."""
    require_qemu()
    with Vm("plan", memory=64 << 20) as vm:
        before = vm.qmp("query-migrate-capabilities"), vm.qmp("query-migrate-parameters")
        source = f"qemu:{vm.qmp_path}"
        rate = asyncio.run(dirty_rate(parse_guest(source), Asked(0.1)))
        assert rate["status"] == "measured" and rate["mode"] in ("dirty-bitmap", SAMPLING)
        found = planned(source, replace(WANTED, codec="none"))
        assert "postcopy" in found["modes"] and found["converges"]
        assert vm.qmp("query-status")["running"] and not is_tracked(vm.pid)
        after = vm.qmp("query-migrate-capabilities"), vm.qmp("query-migrate-parameters")
        assert after == before
