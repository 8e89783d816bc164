"""Snapshots: guests saved while they write, what is killed or full then, and restored again."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import pageferry as run
from helpers import pattern, until
from qemu_vm import Vm, require_qemu
from shared_writer import SharedWriter

from pageferry.pipeline import api
from pageferry.pipeline.batch import Batch
from pageferry.pipeline.batch_state import BatchState
from pageferry.pipeline.inspecting import inspect_saved
from pageferry.pipeline.manifest import manifest
from pageferry.pipeline.monitor import Conversation
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.snapshot import Snapshot
from pageferry.pipeline.trials import take_sample
from pageferry.tools.bench.boot_guest import BootGuest, rom_image
from pageferry.tools.cli.main import cli
from pageferry.transport.errors import (
    DestinationError,
    HostLacks,
    NoSpace,
    PeerLost,
    PostcopyFailed,
    SourceError,
    UsageError,
    VerificationFailed,
    WorkerDied,
)
from pageferry.transport.pages import PAGE_SIZE
from pageferry.transport.snapshot_format import ALIGNMENT
from pageferry.workers.guests import demo, open_destination, open_source, parse_guest
from pageferry.workers.kernel import userfaultfd

MIB = 1 << 20
FAKES = Path(__file__).parents[1] / "fakes"
PAGES = 600  # and a hole behind


@pytest.fixture
def protecting():
    """Skips where writes to shared memory cannot be held back."""
    try:
        os.close(userfaultfd.create_protecting())
    except HostLacks as e:
        pytest.skip(str(e))


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """A demo guest that was restored runs on for a moment before it is checked."""
    monkeypatch.setattr(demo, "RUN_ON_SECONDS", 0.05)


def restore(path, into, *, lazy=False):
    parameters = Parameters(workers=2, codec="none", postcopy="now" if lazy else "never")
    return asyncio.run(api.restore_into(parse_guest(f"file:{path}"), parse_guest(into), parameters))


async def restore_lazily_with_a_pause(path):
    """The connection breaks when the guest runs and most of its memory is still to come."""
    begun = []

    def progress(report):
        if report["status"] == "postcopy-active" and len(begun) == 1:
            begun.append("paused")
            begun[0].pause()

    return await api.restore_into(
        parse_guest(f"file:{path}"), parse_guest("demo:"),
        Parameters(workers=2, codec="none", postcopy="now", max_postcopy_bandwidth=20 * MIB),
        on_progress=progress, on_started=begun.append,
    )  # fmt: skip


class Disturbed(Snapshot):
    """Between its instant and the first page that a saver takes, `disturb` is called."""

    disturb = staticmethod(lambda: None)

    def _extents(self):
        self.disturb()
        return super()._extents()


def save(uri, path, disturb=lambda: None, workers=2):
    """A live snapshot."""
    with contextlib.closing(open_source(parse_guest(uri))) as guest:
        snapshot = Disturbed(guest, str(path), workers, live=True)
        snapshot.disturb = disturb
        return asyncio.run(snapshot.run())


def memory_in(path, pages):
    """Of a snapshot's first block."""
    with open(path, "rb") as file:
        file.seek(ALIGNMENT)
        return file.read(pages * PAGE_SIZE).ljust(pages * PAGE_SIZE, b"\0")


@pytest.fixture
def writer(tmp_path, protecting):
    """A process that maps PAGES pages of content, and a hole of as many, and obeys."""
    path = f"/dev/shm/snapshot-test-{os.getpid()}"
    try:
        with SharedWriter("obey", path, 2 * PAGES) as process:
            with open(path, "r+b") as file:
                file.write(pattern(PAGES))
            process.tell("map", 0, 0, 2 * PAGES)
            process.path = path
            yield process
    finally:
        os.unlink(path)


# ---- live ------------------------------------------------------------------------------------


def test_a_guest_that_writes_all_the_time(tmp_path, protecting):
    """Every byte is what its registers of that instant say, restored at once or lazily; and it goes
    on itself."""
    path = tmp_path / "a"
    uri = "demo:?size=12M&rate=0&access=random&vcpus=2&content=text"
    with contextlib.closing(demo.DemoSource(parse_guest(uri))) as guest:
        report = asyncio.run(Snapshot(guest, str(path), 2, live=True).run())
        assert guest.verdict().ok
    assert report["status"] == "completed"
    assert report["writes-held-back"] > 0
    assert report["ram"]["remaining"] == 0
    assert restore(path, "demo:")["oracle"]["ok"]
    report = asyncio.run(restore_lazily_with_a_pause(path))
    assert report["oracle"]["ok"] and report["oracle"]["ran-on"] > 0
    assert report["recoveries"] >= 1
    assert "postcopy-served-here" in report
    with open(path, "r+b") as file:  # in the last page, which is read last
        file.seek(ALIGNMENT + 12 * MIB - 1)
        file.write(b"\0")  # no letter
    with pytest.raises(VerificationFailed, match="is damaged: bytes 12517376 to 12582912"):
        restore(path, "demo:")
    # the destination's own word, which is final: what the source hears of it is a pause as any
    with pytest.raises(PostcopyFailed, match=rf"is given up.* brought: {path} is damaged"):
        restore(path, "demo:", lazy=True)


def test_a_guest_may_end_when_all_of_it_is_saved(tmp_path, protecting):
    """What is left is for the disk, and may take long."""
    path, looked = tmp_path / "a", threading.Semaphore(0)

    class Ending(Snapshot):
        def _go_on(self):
            super()._go_on()
            os.kill(guest._guest.process.pid, signal.SIGKILL)
            until(guest._guest.has_ended, "the guest has ended")
            while looked.acquire(blocking=False):
                pass
            for _ in range(2):
                assert looked.acquire(timeout=20), "nobody looks any more"

    with contextlib.closing(demo.DemoSource(parse_guest("demo:?size=4M"))) as guest:
        taking = Ending(guest, str(path), 1, live=True, on_progress=lambda report: looked.release())
        report = asyncio.run(taking.run())
    assert report["status"] == "completed"
    assert restore(path, "demo:")["oracle"]["ok"]


def test_a_guest_that_is_paused_stays_so(tmp_path, protecting):
    """Its memory is registered by itself, for which it is asked."""
    path = tmp_path / "a"
    with contextlib.closing(demo.DemoSource(parse_guest("demo:?size=4M&paused=yes"))) as guest:
        asyncio.run(Snapshot(guest, str(path), 1, live=True).run())
        verdict = guest.verdict()
    assert verdict.ok and verdict.passes == verdict.position == 0
    assert restore(path, "demo:")["oracle"]["ran-on"] == 0


def test_a_process_is_saved_as_it_was_at_one_instant(tmp_path, writer):
    """Whatever it writes afterwards, before a saver comes: to pages with content, to a page twice,
    to a hole; of the last pages too. Then it is restored elsewhere."""
    before = Path(writer.path).read_bytes()
    written = [0, 1, 15, 16, 17, 300, PAGES - 1, PAGES + 5, 2 * PAGES - 1]

    def disturb():
        writer.tell("write", *written, 0, 300)

    report = save(f"pid:{writer.pid}", tmp_path / "a", disturb)
    assert memory_in(tmp_path / "a", 2 * PAGES) == before
    assert report["writes-held-back"] == len({page // 16 for page in written})
    after = Path(writer.path).read_bytes()
    assert all(after[page * PAGE_SIZE + 17] == 7 for page in written)
    writer.tell("write", 2)  # nothing is held back any more
    restore(tmp_path / "a", f"image:{tmp_path}/b")
    assert (tmp_path / "b").read_bytes() == before
    still = asyncio.run(
        api.snapshot(parse_guest(f"ram:{writer.path}?pid={writer.pid}"),
                     parse_guest(f"file:{tmp_path}/c"))
    )  # fmt: skip
    assert memory_in(tmp_path / "c", 2 * PAGES) == Path(writer.path).read_bytes()
    assert still["downtime"] <= still["total-time"]
    assert writer.state() != "T"


def test_what_would_be_lost_fails(tmp_path, writer):
    """Memory given back, or mapped anew, meanwhile: no file, and the process goes on."""
    uri = f"pid:{writer.pid}"
    with pytest.raises(SourceError, match="gave memory back"):
        save(uri, tmp_path / "a", lambda: writer.tell("advise", 100, 8, 9))  # MADV_REMOVE
    writer.tell("write", 3)
    with pytest.raises(SourceError, match="changed how it maps"):
        save(uri, tmp_path / "a", lambda: writer.tell("map", 5000, 0, 4))
    writer.tell("write", 4)
    with pytest.raises(UsageError, match="is the memory that is to be saved"):
        save(uri, writer.path)
    with pytest.raises(SourceError, match="say who writes it"):
        asyncio.run(api.snapshot(parse_guest(f"ram:{writer.path}"), parse_guest("file:x")))
    assert os.listdir(tmp_path) == []


def test_killed_in_the_middle_the_process_goes_on(tmp_path, writer):
    """Its write waits for the guard, which stands still; then all of pageferry is killed."""
    program = [
        sys.executable,
        str(FAKES / "held_snapshot.py"),
        str(writer.pid),
        str(tmp_path / "a"),
    ]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ours:
        guard = int(ours.stdout.readline().split()[1])
        writer.tell("write", 5)  # the guard saves it
        os.kill(guard, signal.SIGSTOP)
        writer.process.stdin.write(json.dumps(["write", 500]) + "\n")
        writer.process.stdin.flush()
        until(lambda: sleepers(ours.pid) == 1, "it sleeps on its page")
        ours.kill()
        assert json.loads(writer.line()) is None
    writer.tell("write", *range(PAGES))
    until(lambda: not Path(f"/proc/{guard}").exists(), "the guard has ended")
    assert os.listdir(tmp_path) == []


class Killed(Snapshot):
    """After its instant `kill` is called with the process of its first `victim`."""

    victim = "saver"
    kill = staticmethod(lambda pid: None)

    def _extents(self):
        pool = self._guard if self.victim == "guard" else self._crew.pool
        self.kill(pool.workers[0].process.pid)
        return super()._extents()


@pytest.mark.parametrize(("victim", "live"), [("saver", False), ("saver", True), ("guard", True)])
def test_one_of_its_processes_is_killed(tmp_path, writer, victim, live):
    """The process goes on, also where it sleeps on a page; no file, and it says who died."""

    def kill(pid):
        if victim == "guard":
            os.kill(pid, signal.SIGSTOP)
            writer.process.stdin.write(json.dumps(["write", 500]) + "\n")
            writer.process.stdin.flush()
            until(lambda: sleepers(os.getpid()) == 1, "it sleeps on its page")
        if not live:  # if all of us were killed now, `pageferry clean` would let it go on
            (note,) = Path("/dev/shm").glob(f"pageferry-{os.getpid()}-*-stopped")
            assert json.loads(note.read_text())["stays"] is True
            assert writer.state() == "T"
        os.kill(pid, signal.SIGKILL)

    uri = f"pid:{writer.pid}?tracking=content-hash"
    with contextlib.closing(open_source(parse_guest(uri))) as guest:
        taking = Killed(guest, str(tmp_path / "a"), 2, live=live)
        taking.victim, taking.kill = victim, kill
        with pytest.raises(WorkerDied, match=f"^{victim}-0 was killed") as caught:
            asyncio.run(taking.run())
    assert caught.value.exit_code == 9
    assert victim != "guard" or json.loads(writer.line()) is None
    writer.tell("write", *range(20))
    assert writer.state() != "T"
    assert os.listdir(tmp_path) == []


def sleepers(pid):
    """Threads that wait for somebody to serve a userfaultfd that `pid` has."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        text = ""
        with contextlib.suppress(FileNotFoundError):  # that of the list itself
            text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        found += sum(int(line.split()[1]) for line in text.splitlines() if "pending" in line)
    return found


def test_a_vm_goes_on_and_its_snapshot_too(tmp_path, protecting):
    """Live, and restored lazily into another QEMU. The first is another user's, who may not have a
    userfaultfd by himself."""
    require_qemu()
    may = os.geteuid() == 0 and os.path.exists("/dev/userfaultfd")
    extra = ("-runas", "nobody") if may else ()
    rom = rom_image(tmp_path / "rom", mode=1, lo=MIB, hi=5 * MIB, delay=2000)
    with (
        Vm("src", memory=64 * MIB, bios=rom, extra=extra) as source,
        Vm("dst", memory=64 * MIB, bios=rom, incoming="defer") as destination,
    ):
        source.wait_for_serial(b"B")
        report = save(f"qemu:{source.qmp_path}", tmp_path / "a")
        assert report["status"] == "completed"
        assert source.status() == "running"
        runs_on(source)
        report = restore(tmp_path / "a", f"qemu:{destination.qmp_path}", lazy=True)
        # a VM may give pages back: whoever has claimed one brings it
        assert report["postcopy-requests"] and "postcopy-served-here" not in report
        assert destination.status() == "running"
        runs_on(destination)


def runs_on(vm):
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance("passes", 2)
        vm.qmp("stop")
        assert guest.oracle() == []
        vm.qmp("cont")


def a_source_of_everything(tmp_path, content):
    """file:a, in a batch, by a path that is relative to its manifest; and sampled, for `tune` and
    `plan`. (`serve` has its own: test_restore.py.)"""
    (tmp_path / "out").mkdir()
    items = [{"source": "file:a", "destination": "image:out/", "verify": True}]
    state = BatchState(str(tmp_path / "state"), manifest({"items": items}, str(tmp_path)))
    with contextlib.closing(state):
        assert asyncio.run(Batch(state).run())["status"] == "completed"
    assert (tmp_path / "out" / "a").read_bytes() == content
    sample = asyncio.run(take_sample(parse_guest(f"file:{tmp_path}/a"), 100 * PAGE_SIZE))
    with contextlib.closing(sample):
        assert not sample.live and sample.data >= 100 * PAGE_SIZE


# ---- while it is taken ------------------------------------------------------------------------


def asked(tmp_path, *commands):
    """A snapshot of an image that is told `commands` when it begins to save: answers, the events,
    and what it ended with."""
    (tmp_path / "vm").write_bytes(pattern(40))
    answers, events = [], []

    def started(taking):
        talk, others = Conversation(taking), taking.on_event
        talk.negotiated = True

        def on_event(name, data):
            others(name, data)
            events.append(data.get("status", name))
            if data.get("status") == "active":
                for line in commands:
                    answers.append(talk.answer(json.dumps({"execute": line}).encode()))

        taking.on_event = on_event

    async def take():
        with contextlib.suppress(asyncio.CancelledError):
            return await api.snapshot(
                parse_guest(f"image:{tmp_path}/vm"), parse_guest(f"file:{tmp_path}/a"),
                workers=1, on_started=started,
            )  # fmt: skip

    try:
        report = asyncio.run(take())
    except PeerLost as e:
        report = e
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    return answers, events, report


def test_a_monitor_asks_and_cancels(tmp_path):
    """migrate_cancel: no file. What a snapshot cannot do says so."""
    answers, events, report = asked(
        tmp_path, "query-migrate", "query-migrate-parameters", "query-yank", "migrate-pause",
        "migrate-set-parameters", "migrate_cancel",
    )  # fmt: skip
    assert answers[0]["return"]["status"] == "active"
    assert answers[0]["return"]["ram"]["total"] == 40 * PAGE_SIZE
    assert answers[1]["return"]["background-snapshot"] is False
    assert answers[2]["return"] == [{"type": "migration"}]
    assert "cannot pause" in answers[3]["error"]["desc"]
    assert "nothing that can be set" in answers[4]["error"]["desc"]
    assert answers[5] == {"return": {}}
    assert [e for e in events if e != "MIGRATION_PASS"] == [
        "setup", "active", "cancelling", "cancelled",
    ]  # fmt: skip
    assert report is None
    assert os.listdir(tmp_path) == ["vm"]


class Cancelled(Snapshot):
    """By two Ctrl-C, `when`."""

    when = ""

    async def _finish(self, state):
        await super()._finish(state)
        if self.when == "on disk":
            self.cancel()

    async def _publish(self):
        loop = asyncio.get_running_loop()
        if self.when == "named":  # nothing of these runs before it waits for the name
            loop.call_soon(self.cancel)
            loop.call_soon(self._task.cancel)
        await super()._publish()

    async def _end_processes(self):
        if self.when:
            self._task.cancel()
        await super()._end_processes()


class Failing(Cancelled):
    """At the end, and cancelled while all is let go of."""

    when = "failed"

    async def _finish(self, state):
        raise DestinationError("the disk has gone")


class LettingGoFails(Snapshot):
    async def _end_processes(self):
        await super()._end_processes()
        raise OSError("that cannot be closed")


def test_how_it_ended_is_said_whoever_cancels_it_then(tmp_path, caplog):
    """A failure is one, with its figures; what goes wrong once the file has its name is
    told, and no failure."""
    (tmp_path / "vm").write_bytes(pattern(40))
    with contextlib.closing(open_source(parse_guest(f"image:{tmp_path}/vm"))) as guest:
        taking = Failing(guest, str(tmp_path / "a"), 1)
        with pytest.raises(DestinationError, match="the disk has gone") as raised:
            asyncio.run(taking.run())
        assert raised.value.data["report"]["status"] == "failed"
        assert not taking.can_be_yanked()
        assert os.listdir(tmp_path) == ["vm"]
        report = asyncio.run(LettingGoFails(guest, str(tmp_path / "a"), 1).run())
        assert report["status"] == "completed"
        assert "whole, but not all could be let go of: that cannot be closed" in caplog.text
        assert memory_in(tmp_path / "a", 40) == pattern(40)


@pytest.mark.parametrize("when", ["on disk", "named"])
def test_a_cancel_comes_before_its_name_or_too_late(tmp_path, when):
    """What is said is true: cancelled, and nothing is there; or completed, and all of it is."""
    (tmp_path / "vm").write_bytes(pattern(40))
    with contextlib.closing(open_source(parse_guest(f"image:{tmp_path}/vm"))) as guest:
        taking = Cancelled(guest, str(tmp_path / "a"), 1)
        taking.when = when
        if when == "on disk":
            with pytest.raises(asyncio.CancelledError):
                asyncio.run(taking.run())
            assert taking.status.value == "cancelled" and not taking.can_be_yanked()
            assert os.listdir(tmp_path) == ["vm"]
        else:
            assert asyncio.run(taking.run())["status"] == "completed"
            assert memory_in(tmp_path / "a", 40) == pattern(40)


# ---- the command line ------------------------------------------------------------------------


def test_there_and_back_by_the_command_line(tmp_path):
    """An image; errors of one line; a disk that is full."""
    content = pattern(700)[:-100]
    (tmp_path / "vm.mem").write_bytes(content)
    done = run(
        "snapshot", f"image:{tmp_path}/vm.mem", f"file:{tmp_path}/a?direct=on", "--trace",
        f"{tmp_path}/t", "--report", f"{tmp_path}/r", "--monitor", f"unix:{tmp_path}/m", "-v",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "completed" in done.stdout and f"{tmp_path}/a" in done.stdout
    assert "snapshot: completed after" in done.stderr
    assert "Completed in" in (tmp_path / "r").read_text()
    assert not (tmp_path / "m").exists()
    events = json.loads((tmp_path / "t").read_text())
    kept = [e["args"]["pages"] for e in events if e["name"] == "keep"]
    assert sum(kept) == sum(e["args"]["pages"] for e in events if e["name"] == "extent") == 700
    done = run("restore", f"file:{tmp_path}/a", "--into", f"image:{tmp_path}/b", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b").read_bytes() == content
    assert json.loads(done.stdout)["verified"]
    shown = inspect_saved(f"{tmp_path}/a")
    assert (shown["format"], shown["kind"], shown["size"]) == ("snapshot", "image", len(content))
    full = sum(any(content[at : at + 4096]) for at in range(0, len(content), 4096))
    assert shown["blocks"][0]["pages"] == {"total": 700, "data": full, "holes": 700 - full}
    for arguments, kind, text in [
        (["restore", f"file:{tmp_path}/a"], UsageError, "--uffd-socket PATH or --into GUEST"),
        (["restore", f"file:{tmp_path}/b", "--into", "demo:"], SourceError, "no snapshot of"),
        (["restore", "ram:x", "--into", "demo:"], UsageError, "is no snapshot"),
        (["snapshot", f"file:{tmp_path}/a", "file:b"], UsageError, "is a snapshot already"),
        (["snapshot", f"image:{tmp_path}/b", f"image:{tmp_path}/c"], UsageError, "file:PATH"),
        (["copy", f"file:{tmp_path}/a", "file:c"], UsageError, "file:c is a source: a snapshot is"),
        (["receive", "--listen", "ipc://@x", "--into", "file:c"], UsageError, "is a source"),
        (["tune", f"file:{tmp_path}/a", "file:c"], UsageError, "is a source"),
        (
            ["snapshot", "demo:", f"file:{tmp_path}/c", "--trace", f"{tmp_path}/c"],
            UsageError,
            "that is the memory",
        ),
    ]:
        with pytest.raises(kind, match=text):
            cli.main(arguments, standalone_mode=False)
    with pytest.raises(UsageError, match="made by `pageferry snapshot SOURCE file:b`"):
        open_destination(parse_guest("file:b"))
    a_source_of_everything(tmp_path, content)
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", full], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(NoSpace, match="no space left"):
            cli.main(
                ["snapshot", f"image:{tmp_path}/vm.mem", f"file:{full}/a"], standalone_mode=False
            )
        assert os.listdir(full) == []
    finally:
        subprocess.run(["umount", full], check=True)
