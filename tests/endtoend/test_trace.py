"""`--trace`: what the file says is what happened, however it ended."""

import asyncio
import contextlib
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter

import psutil
import pytest
from both_ends import BothEnds
from helpers import Running, pattern, receiver, sweep, until, until_async
from helpers import pageferry as run

import pageferry
from pageferry.pipeline import api
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.journal import Journal
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.pipeline.trace_file import Trace
from pageferry.pipeline.tracing import current, recording
from pageferry.transport.links import Endpoint
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.trace_records import Kind
from pageferry.workers.tracing import Rings

PRECOPY = ["setup", "active", "device", "completed"]
POSTCOPY = ["setup", "active", "device", "postcopy-active", "completed"]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "vm.mem"
    path.write_bytes(pattern(2000))
    return path


class Events:
    """A trace that is looked at. `whole`: it was written to its end."""

    def __init__(self, path, whole=True):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if not whole:
            text = text[: text.rindex("}") + 1] + "]"
        self.all = json.loads(text)
        self._well_formed(whole)

    def _well_formed(self, whole):
        named = {e["pid"] for e in self.all if e["name"] == "process_name"}
        lines = {(e["pid"], e["tid"]) for e in self.all if e["name"] == "thread_name"}
        begun = {}
        for event in self.all:
            assert event["pid"] in named and (event["pid"], event["tid"]) in lines, event
            assert event.get("dur", 0) >= 0
            line = begun.setdefault((event["pid"], event["tid"]), [])
            if event["ph"] == "B":
                line.append(event["name"])
            elif event["ph"] == "E":
                assert line.pop() == event["name"]
        if whole:
            assert not any(begun.values())
            assert self.named("trace ends")[0]["args"] == {"events-lost": 0}

    def named(self, name, phases="XibB"):
        return [e for e in self.all if e["name"] == name and e["ph"] in phases]

    def sum(self, name, argument):
        return sum(e["args"][argument] for e in self.named(name))

    def processes(self):
        return {e["args"]["name"]: e["pid"] for e in self.all if e["name"] == "process_name"}

    def states(self, end):
        (line,) = [
            (e["pid"], e["tid"]) for e in self.all
            if e["name"] == "thread_name" and e["args"]["name"] == f"{end}: states"
        ]  # fmt: skip
        return [e["name"] for e in self.all
                if (e["pid"], e["tid"]) == line and e["ph"] in "Bi"]  # fmt: skip


def traced(path, *arguments, **options):
    """A migration with a trace: the events, the report, and the object of its source."""
    seen = []
    report = pageferry.migrate(*arguments, trace=str(path), on_started=seen.append, **options)
    return Events(path), report, seen[0]


def test_a_copy(tmp_path):
    events, report, source = traced(
        tmp_path / "t.json", "demo:?size=32M&rate=5000&content=text", "demo:", workers=2
    )
    counters, ram = source.statistics.counters, report["ram"]
    assert len(events.named("frame")) == counters.total("frames") == len(events.named("place"))
    assert events.sum("frame", "pages") == ram["normal"] + ram["duplicate"]
    assert events.sum("place", "pages") == ram["normal"] + ram["duplicate"]
    assert events.sum("frame", "bytes") == counters.total("wire_bytes")
    assert len(events.named("in flight")) == len(events.named("frame"))
    assert events.states("source") == events.states("destination") == PRECOPY
    rounds = ram["dirty-sync-count"]
    assert [e["args"]["pages"] for e in events.named("round 1")] == [8192, 8192]  # both ends
    assert len(events.named(f"round {rounds}")) == 2
    assert len(events.named("SendRound")) == rounds
    assert len(events.named("said Run")) == len(events.named("heard Run")) == 1
    assert len(events.named("barrier")) == 2 * rounds
    pids = {process["name"]: process["pid"] for process in report["processes"]}
    del pids["source coordinator"]
    shown = events.processes()
    assert {name: shown.pop(name) for name in pids} == pids
    assert list(shown.values()) == [os.getpid()]
    inside(events, "frame", "batch")
    inside(events, "write", "place")


def inside(events, inner, outer):
    """Each bar of the one kind lies in one of the other, of the same process."""
    spans = [(e["pid"], e["ts"], e["ts"] + e["dur"]) for e in events.named(outer)]
    for e in events.named(inner):
        begin, end = e["ts"], e["ts"] + e["dur"]
        if inner == "frame" and e["args"]["bytes"] < 4096:
            continue  # of zeros: no batch
        assert any(p == e["pid"] and b <= begin and end <= t + 0.01 for p, b, t in spans)


@pytest.mark.parametrize("link", ["zmq", "direct"])
def test_a_postcopy(tmp_path, link):
    events, report, source = traced(
        tmp_path / "t.json", "demo:?size=16M&content=random&access=random&rate=5000", "demo:",
        postcopy="now", workers=2, max_postcopy_bandwidth=20_000_000, postcopy_link=link,
    )  # fmt: skip
    requests = report["postcopy-requests"]
    assert requests > 0
    assert len(events.named("request")) + len(events.named("ask again")) == requests
    assert len(events.named("answer")) + len(events.named("elsewhere")) == requests
    assert len(events.named("elsewhere")) == report["postcopy-elsewhere"]
    assert len(events.named("fault")) == len(events.named("request"))
    assert events.sum("answer", "pages") == report["postcopy-pages"]
    assert events.sum("install", "pages") == report["postcopy-pages"]
    assert events.sum("frame", "pages") + report["postcopy-pages"] == report["ram"]["normal"]
    assert len(events.named("frame")) == source.statistics.counters.total("frames")
    assert events.states("source") == events.states("destination") == POSTCOPY
    arrows = Counter(e["ph"] for e in events.named("page", "stf"))
    assert arrows == {
        "s": len(events.named("request")),
        "t": len(events.named("answer")),
        "f": len(events.named("install")),
    }
    assert {"sender-1", "postcopy-0", "receiver-1", "fault-0"} <= events.processes().keys()
    asked = {(e["args"]["block"], e["args"]["page"]) for e in events.named("request")}
    assert {(e["args"]["block"], e["args"]["page"]) for e in events.named("install")} <= asked


def test_two_ends(image, tmp_path):
    """Each has its own; both have the same clock on one host."""
    here, theirs = tmp_path / "here.json.gz", tmp_path / "there.json"
    into = f"image:{tmp_path}/there.mem"
    with receiver("--into", into, "--once", "--trace", str(theirs)) as there:
        sent = run("send", f"image:{image}", there.endpoint, "--trace", str(here), "--json")
        assert sent.returncode == 0, sent.stderr
        code, _, err = there.finish()
    assert code == 0, err
    source, destination = Events(here), Events(theirs)
    assert source.states("source") == destination.states("destination") == PRECOPY
    assert source.sum("frame", "pages") == destination.sum("place", "pages")
    assert not source.named("place") and not destination.named("frame")
    for events in (source, destination):
        (begins,) = events.named("trace begins")
        assert begins["args"]["monotonic-us"] == int(begins["ts"])
    (said,), (heard,) = source.named("said Run"), destination.named("heard Run")
    assert said["ts"] <= heard["ts"]


def _workers(running, name):
    found = []
    for child in psutil.Process(running.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith(name):
                found.append(child)
    return found


def slow(path):
    """A copy that takes a while."""
    return Running(
        "copy", "demo:?size=64M&rate=0", "demo:", "--max-bandwidth", "20MB", "--trace", str(path)
    )


def _has(path, what):
    return path.exists() and what in path.read_text()


def test_a_killed_worker_leaves_a_whole_trace(tmp_path):
    """With what it had done: its ring outlives it."""
    path = tmp_path / "t.json"
    with slow(path) as running:
        until(lambda: _has(path, '"name":"frame"'), "a frame in the trace")
        _workers(running, "pf-send-1")[0].kill()
        code, _, err = running.finish()
    assert code == 9, err
    events = Events(path)
    assert events.states("source") == ["setup", "active", "failed"]
    killed = events.processes()["sender-1"]
    assert any(e["pid"] == killed for e in events.named("frame"))


def test_a_cancelled_one_is_whole(tmp_path):
    path = tmp_path / "t.json"
    with slow(path) as running:
        until(lambda: _has(path, '"name":"frame"'), "a frame in the trace")
        running.process.send_signal(signal.SIGINT)
        code, _, _ = running.finish()
    assert code == 130
    events = Events(path)
    assert events.states("source")[-1] == "cancelled"
    assert events.states("destination")[-1] == "failed"


def test_what_a_killed_pageferry_wrote_can_be_read(tmp_path):
    path = tmp_path / "t.json"
    with slow(path) as running:
        until(lambda: _has(path, '"name":"frame"'), "a frame in the trace")
        children = psutil.Process(running.process.pid).children(recursive=True)
        running.kill()
        psutil.wait_procs(children, timeout=30)
        sweep(running.process.pid)
    events = Events(path, whole=False)
    assert events.named("frame") and events.states("source") == ["setup", "active"]
    assert not events.named("trace ends")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("{folder}/no/such/folder/t.json", "No such file"),
        ("{folder}", "that is no file"),
        ("/dev/null", "that is no file"),
        ("{folder}/vm.mem", "the memory that moves"),
        ("{folder}/there.mem", "the memory that moves"),
    ],
)
def test_a_file_that_cannot_be_is_found_first(image, tmp_path, where, said):
    before = image.read_bytes()
    path = where.replace("{folder}", str(tmp_path))
    done = run("copy", f"image:{image}", f"image:{tmp_path}/there.mem", "--trace", path)
    assert done.returncode == 2
    assert "--trace" in done.stderr and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["vm.mem"]
    assert image.read_bytes() == before


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_disk_that_is_full_later_is_a_warning(tmp_path, caplog, name):
    """The migration goes on; what comes after is not kept."""
    path = tmp_path / name
    caplog.set_level(logging.WARNING, "pageferry")

    async def main():
        with recording(str(path)):
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, current()._file.fileno())
            os.close(full)
            return await pageferry.migrate_async("demo:?size=8M", "demo:")

    assert asyncio.run(main())["status"] == "completed"
    (warning,) = caplog.messages
    assert str(path) in warning and "No space left" in warning


def test_what_finds_no_room_is_told(tmp_path, caplog):
    """A ring that overflows between two looks."""
    path = tmp_path / "t.json"
    trace, rings = Trace(str(path)), Rings(1, 8)
    writer = rings.writer(0)
    trace.began("sender-0", 4711, rings.reader(0), "x", "sender-0")
    for number in range(20_000):
        writer.add(Kind.READ, 1, number=number)
    trace.ended(4711)
    trace.close()
    events = json.loads(path.read_text())
    lost = sum(e["args"]["events"] for e in events if e["name"] == "events lost")
    read = [e for e in events if e["name"] == "read"]
    assert lost > 0 and lost + len(read) == 20_000
    assert events[-1]["args"] == {"events-lost": lost}
    assert f"lacks {lost} events" in caplog.text
    del writer
    rings.close()


def test_a_batch_is_one_trace(image, tmp_path):
    other = tmp_path / "other.mem"
    other.write_bytes(pattern(500, seed=2))
    path, there = tmp_path / "t.json", tmp_path / "there"
    there.mkdir()
    done = run(
        "batch", f"{tmp_path}/*.mem", f"image:{there}/", "--state", f"{tmp_path}/state",
        "--trace", str(path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = Events(path)
    for item in json.loads(done.stdout)["items"]:
        assert events.states(f"{item['name']}: source") == PRECOPY
        assert f"{item['name']}: sender-0" in events.processes()


def test_a_trace_is_not_an_item_of_its_batch(image, tmp_path):
    before = image.read_bytes()
    (tmp_path / "there").mkdir()
    done = run(
        "batch", f"{tmp_path}/*.mem", f"image:{tmp_path}/there/", "--state", f"{tmp_path}/state",
        "--trace", str(image),
    )  # fmt: skip
    assert done.returncode == 2 and "the memory that moves" in done.stderr
    assert image.read_bytes() == before


def test_without_one_nobody_has_a_ring():
    seen = []
    pageferry.migrate("demo:?size=8M", "demo:", on_started=seen.append)
    assert seen[0].journal.lane is None


def monitor(where, snapshot):
    """The example client, which behaves as Firecracker does."""
    return [
        sys.executable, "-m", "pageferry.tools.uffd_client", "--socket", str(where),
        "--image", str(snapshot),
    ]  # fmt: skip


def test_a_restore(tmp_path):
    """Both ends in one file: faults, and what came of them."""
    snapshot, path, where = tmp_path / "vm.mem", tmp_path / "t.json", tmp_path / "uffd.sock"
    snapshot.write_bytes(pattern(2000))
    with Running(
        "restore", f"image:{snapshot}", "--uffd-socket", str(where), "--json",
        "--trace", str(path),
    ) as restore:  # fmt: skip
        until(where.exists, "listening")
        client = subprocess.run(
            monitor(where, snapshot), capture_output=True, timeout=60, check=False
        )
        assert client.returncode == 0, client.stderr
        code, out, err = restore.finish()
    assert code == 0, err
    report, events = json.loads(out), Events(path)
    assert events.states("restore") == POSTCOPY
    assert events.states("destination 1: source") == ["setup", "postcopy-active", "completed"]
    requests = len(events.named("request")) + len(events.named("ask again"))
    assert requests == len(events.named("answer")) + len(events.named("elsewhere")) > 0
    pages = events.sum("place", "pages") + events.sum("install", "pages")
    assert pages == report["ram"]["normal"] + report["ram"]["duplicate"]
    assert len(events.named("page", "f")) == len(events.named("install"))


def test_a_server_and_a_restore(tmp_path):
    """Each end its own file."""
    snapshot, where = tmp_path / "vm.mem", tmp_path / "uffd.sock"
    snapshot.write_bytes(pattern(2000))
    here, there = tmp_path / "serve.json", tmp_path / "restore.json"
    with Running(
        "serve", f"image:{snapshot}", "--listen", "tcp://127.0.0.1:0", "--json",
        "--trace", str(here),
    ) as server:  # fmt: skip
        endpoint = json.loads(server.line())["endpoint"]
        with Running(
            "restore", endpoint, "--uffd-socket", str(where), "--trace", str(there)
        ) as restore:
            until(where.exists, "listening")
            subprocess.run(
                monitor(where, snapshot), stdout=subprocess.DEVNULL, timeout=60, check=True
            )
            code, _, err = restore.finish()
        assert code == 0, err
        server.line()  # the report of this destination
        server.process.send_signal(signal.SIGINT)
        server.finish()
    serve, restored = Events(here), Events(there)
    assert serve.sum("frame", "pages") == restored.sum("place", "pages")
    assert serve.sum("answer", "pages") == restored.sum("install", "pages")
    assert len(serve.named("heard Armed")) == len(restored.named("said Armed")) == 1


class Ends(BothEnds):
    """Both ends of a postcopy in one event loop."""

    def __init__(self, guest):
        endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
        self.listening = Destination(endpoint, api.opener(parse_guest("demo:")))
        parameters = Parameters(postcopy="now", max_postcopy_bandwidth=20_000_000, workers=2)
        self.source = Source(guest, endpoint, parameters.checked())

    async def until(self, condition, what):
        await until_async(lambda: condition() or self.sending.done(), what)


@pytest.mark.parametrize("how", ["pause", "sender", "fault"])
def test_a_postcopy_that_was_recovered(tmp_path, how):
    """New processes go on in the rings of those that were killed."""
    path = tmp_path / "t.json"

    async def main():
        guest = open_source(parse_guest("demo:?size=16M&content=random&access=random&rate=2000"))
        try:
            with recording(str(path)):
                async with Ends(guest) as ends:
                    await ends.until(
                        lambda: ends.source.statistics.pages_done >= 1000, "pages moved"
                    )
                    if how == "pause":
                        ends.source.pause()
                    elif how == "sender":
                        os.kill(
                            ends.source._equipment.crew.pool.workers[0].process.pid, signal.SIGKILL
                        )
                    else:
                        faults = ends.listening.arrival._faults.pool
                        os.kill(faults.workers[0].process.pid, signal.SIGKILL)
                    paused = Status.POSTCOPY_PAUSED
                    await ends.until(lambda: ends.source.core.status is paused, "paused")
                    await ends.until(lambda: ends.listening.arrival.status is paused, "paused")
                    ends.source.recover(None)
                    report, _ = await asyncio.gather(ends.sending, ends.arriving)
                return report, ends.source.statistics
        finally:
            guest.close()

    report, statistics = asyncio.run(main())
    assert report["recoveries"] == 1
    events = Events(path)
    states = [
        "setup", "active", "device", "postcopy-active", "postcopy-paused", "postcopy-recover",
        "postcopy-active", "completed",
    ]  # fmt: skip
    assert events.states("source") == events.states("destination") == states
    names = Counter(e["args"]["name"] for e in events.all if e["name"] == "process_name")
    assert {names["sender-0"], names["sender-1"], names["receiver-0"], names["postcopy-0"]} == {2}
    assert names["fault-0"] == (2 if how == "fault" else 1)
    # a frame is counted when its pages are taken, and drawn when it is sent: one may lie between
    missed = statistics.counters.total("frames") - len(events.named("frame"))
    assert 0 <= missed <= (how == "sender")


def test_work_that_overlaps_is_drawn_in_order(tmp_path):
    """Whatever ends first: bars of a line lie in each other."""
    path = tmp_path / "t.json"

    async def main():
        gates = [asyncio.Event() for _ in range(3)]
        with recording(str(path)):
            journal = Journal("source", "x")
            tasks = [
                asyncio.ensure_future(journal.during(f"work {i}", gate.wait))
                for i, gate in enumerate(gates)
            ]
            await asyncio.sleep(0)
            for i in (0, 2, 1):
                gates[i].set()
                await tasks[i]

    asyncio.run(main())
    work = [e["ph"] + e["name"] for e in Events(path).all if e["name"].startswith("work")]
    assert work == ["Bwork 0", "Bwork 1", "Bwork 2", "Ework 2", "Ework 1", "Ework 0"]


def test_a_report_and_a_trace_are_two_files(tmp_path):
    path = str(tmp_path / "x")
    done = run("copy", "demo:", "demo:", "--trace", path, "--report", f"{tmp_path}/./x")
    assert done.returncode == 2 and "--report and --trace" in done.stderr
    assert os.listdir(tmp_path) == []
