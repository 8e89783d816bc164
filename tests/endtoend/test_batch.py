"""Batches, end to end: real migrations of small images, killed and taken up again, with items that
fail among them."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from helpers import PAGE, Running, pattern, receiver, same_file, sweep, until, until_async
from helpers import pageferry as run

from pageferry.pipeline.batch import Batch, worth_another_try
from pageferry.pipeline.batch_state import BatchState, look
from pageferry.pipeline.manifest import manifest
from pageferry.pipeline.planner import State
from pageferry.transport import errors

PAGES = 128


@pytest.fixture
def images(tmp_path):
    """Six of 512 KiB, and a folder for them to go to."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    for number in range(6):
        # random, so that a limited rate takes its time with it
        content = random.Random(number).randbytes(PAGES * PAGE)
        (folder / f"vm{number}.mem").write_bytes(content)
    return folder


def arrived(images, *, all_over=True):
    """Names of the images that are at the destination, each whole. `all_over`: nothing else may be
    there; else what has arrived of some may be, hidden."""
    out = images.parent / "out"
    found = sorted(name for name in os.listdir(out) if not name.startswith("."))
    for name in found:
        assert same_file(images / name, out / name)
    assert not all_over or found == sorted(os.listdir(out))
    return found


def inodes(images):
    out = images.parent / "out"
    return {name: os.stat(out / name).st_ino for name in os.listdir(out) if name[0] != "."}


def status(path):
    done = run("batch", "status", "--state", str(path), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def begin(path, **data):
    """The state of a new batch, and the batch."""
    state = BatchState(str(path), manifest(data, os.path.dirname(path)))
    return state, Batch(state)


def test_a_directory(images, tmp_path):
    """All of it, some at a time; the summary says so."""
    path = tmp_path / "state"
    done = run("batch", str(images), f"image:{tmp_path}/out/", "--state", str(path),
               "--parallel", "3", "--codec", "none", "--verify")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert arrived(images) == [f"vm{n}.mem" for n in range(6)]
    assert "completed: 6 of 6 completed" in done.stdout
    assert "vm0.mem: completed, 512.0 KiB in" in done.stderr
    got = status(path)
    assert (got["status"], got["completed"], got["pid"]) == ("completed", 6, None)
    assert {item["attempts"] for item in got["items"]} == {1}
    assert all("verified" in item["report"] for item in got["items"])
    # nothing is left to do, and nothing is done
    before = inodes(images)
    assert run("batch", "resume", "--state", str(path)).returncode == 0
    assert inodes(images) == before


def test_workers_are_started_once(images, tmp_path):
    """Two at a time have two processes at each end, however many there are; between two images and
    after the last these wait at the receiver, and nothing of theirs outlives a kill -9."""
    path = tmp_path / "state"
    with receiver("--into", f"image:{tmp_path}/out/", "--at-once", "2") as receiving:
        done = run("batch", str(images), receiving.endpoint, "--state", str(path), "--json",
                   "--parallel", "2", "--workers", "1", "--verify")  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert 1 <= report["worker-processes"] <= 2
        said = [json.loads(receiving.process.stdout.readline()) for _ in range(6)]
        pids = {p["pid"] for each in said for p in each["processes"] if p["name"] == "receiver-0"}
        assert 1 <= len(pids) <= 2
        until(lambda: {psutil.Process(pid).name() for pid in pids} == {"pf-idle"}, "they wait")
        kill_9(receiving)  # they are of its family
    sweep(receiving.process.pid)
    assert arrived(images) == [f"vm{n}.mem" for n in range(6)]


def test_workers_that_are_traced_are_used_again_too(images, tmp_path):
    """Nothing of a ring is left in them; each job's events are there."""
    trace = tmp_path / "trace.json"
    done = run("batch", str(images), f"image:{tmp_path}/out/", "--state", str(tmp_path / "state"),
               "--parallel", "2", "--workers", "1", "--trace", str(trace), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr
    assert json.loads(done.stdout)["worker-processes"] <= 4
    for number in range(6):
        assert f"vm{number}.mem: sender-0" in trace.read_text()


@pytest.mark.parametrize("to", ["receiver", "directory"])
def test_clones_that_begin_together_travel_once(tmp_path, to):
    """Four clones of one image and two of another, all at once: of each family the first travels,
    of the others what is their own."""
    (tmp_path / "images").mkdir()
    (tmp_path / "out").mkdir()
    mib, own = 1 << 20, 6
    for number in range(6):
        content = bytearray(random.Random(number % 3 == 2).randbytes(4 * mib))
        draw = random.Random(100 + number)
        for page in draw.sample(range(len(content) // PAGE), own):
            content[page * PAGE : (page + 1) * PAGE] = draw.randbytes(PAGE)
        (tmp_path / "images" / f"vm{number}.mem").write_bytes(content)
    with receiver("--into", f"image:{tmp_path}/out/", "--at-once", "6") as receiving:
        where = receiving.endpoint if to == "receiver" else f"image:{tmp_path}/out/"
        done = run("batch", str(tmp_path / "images"), where, "--state", str(tmp_path / "state"),
                   "--parallel", "6", "--codec", "none", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wire-bytes"] < 2 * 4 * mib + 4 * 2 * own * PAGE + mib // 2
    there = {i["name"]: i["report"]["pages-already-there"] for i in report["items"]}
    firsts = [name for name, pages in there.items() if not pages]
    assert sorted(firsts) == ["vm0.mem", "vm2.mem"]
    assert len(arrived(tmp_path / "images")) == 6


def test_a_worker_that_is_killed_is_replaced(images, tmp_path):
    """Its item is tried again; the others go on."""
    killed = []

    async def main():
        state, batch = begin(
            tmp_path / "s", parallel=2, destination="image:out/", backoff="10ms",
            defaults={"workers": 1, "codec": "none", "batch-pages": 16}, **{"max-bandwidth": "1MB"},
            items=[{"source": f"image:images/vm{n}.mem"} for n in range(6)],
        )  # fmt: skip

        def look_at(query):
            for entry in batch._entries.values():
                equipment = entry.migration and entry.migration._equipment
                if not killed and equipment and equipment.crew.pool.workers:
                    killed.append(equipment.crew.pool.workers[0].process.pid)
                    os.kill(killed[0], signal.SIGKILL)

        batch.on_progress = look_at
        report = await batch.run()
        state.close()
        return report

    report = asyncio.run(main())
    assert killed and report["completed"] == 6
    assert sorted(item["attempts"] for item in report["items"]) == [1, 1, 1, 1, 1, 2]
    assert report["worker-processes"] <= 5 + 1
    assert len(arrived(images)) == 6


def test_a_manifest_with_an_item_that_fails(images, tmp_path):
    """It does not stop the others, comes first in the summary, and can be tried again."""
    path = tmp_path / "m.json"
    items = [{"source": f"image:images/vm{n}.mem"} for n in range(2)]
    items.insert(0, {"source": "image:images/lacks.mem", "priority": 5})
    path.write_text(json.dumps({
        "parallel": 1, "destination": "image:out/", "defaults": {"workers": 1}, "items": items,
    }))  # fmt: skip
    done = run("batch", str(path))
    assert done.returncode == 15
    assert done.stdout.startswith("lacks.mem: failed after one attempt: cannot open")
    assert "partial: 2 of 3 completed, 1 failed" in done.stdout
    assert "resume --state" in done.stderr.splitlines()[-1]
    assert arrived(images) == ["vm0.mem", "vm1.mem"]

    state = f"{path}.state"
    table = run("batch", "status", "--state", state).stdout.splitlines()
    assert table[1].split()[:3] == ["lacks.mem", "failed", "1"]
    assert "cannot open" in table[1]
    assert table[-1] == "3 items: 1 failed, 2 completed; partial"
    # resume leaves it alone, unless it is told not to
    done = run("batch", "resume", "--state", state, "--json")
    assert done.returncode == 15
    report = json.loads(done.stdout)
    assert report["error"]["class"] == "BatchPartial"
    assert report["items"][0]["error"]["class"] == "SourceError"
    assert [item["state"] for item in report["items"]] == ["failed", "completed", "completed"]
    before = inodes(images)
    (images / "lacks.mem").write_bytes(pattern(10))
    done = run("batch", "resume", "--state", state, "--retry-failed", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completed"] == 3
    assert arrived(images) == ["lacks.mem", "vm0.mem", "vm1.mem"]
    assert before.items() <= inodes(images).items()


def test_all_failed(tmp_path):
    """Nobody listens there. It is tried again as often as was said, then it is over."""
    (tmp_path / "a.mem").write_bytes(pattern(10))
    path = tmp_path / "s"
    done = run("batch", str(tmp_path / "a.mem"), "tcp://127.0.0.1:1", "--state", str(path),
               "--retries", "2", "--backoff", "2ms", "--json")  # fmt: skip
    assert done.returncode == 16
    report = json.loads(done.stdout)
    assert report["error"]["class"] == "BatchFailed"
    (item,) = report["items"]
    assert (item["attempts"], item["error"]["class"]) == (3, "ConnectError")
    assert done.stderr.count("tried again in") == 2
    assert "a.mem: started again (attempt 3)" in done.stderr


def test_retried_until_it_works(images, tmp_path):
    """The receiver comes when the first attempt has failed."""
    where = f"ipc://{tmp_path}/socket"
    source = images / "vm0.mem"

    async def main():
        state, batch = begin(
            tmp_path / "s", backoff="10ms", retries=1000,
            items=[{"source": f"image:{source}", "destination": where}],
        )  # fmt: skip
        failed, events = asyncio.Event(), []

        def on_item(event):
            events.append(event["event"])
            if event["event"] == "failed":
                assert event["error"]["class"] == "ConnectError"
                failed.set()

        batch.on_item = on_item
        running = asyncio.ensure_future(batch.run())
        await failed.wait()
        arguments = ("receive", "--listen", where, "--once", "--quiet",
                     "--into", f"image:{tmp_path}/out/vm0.mem")  # fmt: skip
        there = await asyncio.to_thread(Running, *arguments)
        with there:
            report = await running
            assert (await asyncio.to_thread(there.finish))[0] == 0
        state.close()
        return report, events

    report, events = asyncio.run(main())
    assert report["status"] == "completed"
    assert events[:2] == ["started", "failed"] and events[-1] == "completed"
    assert arrived(images) == ["vm0.mem"]


def slowly(images, path, *more):
    """A batch of two at a time that takes some seconds, as a process."""
    return Running(
        "batch", str(images), f"image:{images.parent}/out/", "--state", str(path), "--parallel",
        "2", "--max-bandwidth", "2MB", "--batch-pages", "16", "--codec", "none", *more,
    )  # fmt: skip


def resume(path, *more):
    """The rest, at full speed."""
    return run("batch", "resume", "--state", str(path), "--max-bandwidth", "0", *more)


def kill_9(running):
    """And wait until what it started has gone too."""
    family = psutil.Process(running.process.pid).children(recursive=True)
    running.kill()
    until(lambda: not any(p.is_running() for p in family), "its processes die with it")


@pytest.mark.parametrize(
    "moment", ["vm0.mem: started", "vm1.mem: started", ": completed", "vm3.mem: started",
               "vm5.mem: started"],
)  # fmt: skip
def test_kill_9_and_resume(images, tmp_path, moment):
    """Every image arrives, those that were complete are not sent again."""
    path = tmp_path / "state"
    with slowly(images, path) as running:
        running.error_line(moment)
        kill_9(running)
    assert run("batch", str(images), "ipc://@x", "--state", str(path)).returncode == 2
    before, whole = inodes(images), arrived(images, all_over=False)
    got = status(path)
    assert got["status"] == "interrupted" and got["pid"] is None
    completed = [i["name"] for i in got["items"] if i["state"] == "completed"]
    assert set(completed) <= set(whole)
    done = resume(path, "--json")
    assert done.returncode == 0, done.stderr
    assert arrived(images) == [f"vm{n}.mem" for n in range(6)]
    after = inodes(images)
    for name in completed:
        assert after[name] == before[name]
        assert f"{name}: started" not in done.stderr
    attempts = {i["name"]: i["attempts"] for i in json.loads(done.stdout)["items"]}
    assert all(attempts[name] == 1 for name in completed)
    assert max(attempts.values()) <= 2


@pytest.mark.parametrize("who", ["batch", "receiver"])
def test_an_image_under_way_goes_on(tmp_path, who):
    """kill -9 of either end: each image arrives under its own name, those that were complete are
    not sent again, and of the one that was under way only what had not come."""
    (tmp_path / "images").mkdir()
    (tmp_path / "out").mkdir()
    for number, mib in enumerate([1, 12, 2]):
        content = random.Random(number).randbytes(mib << 20)
        (tmp_path / "images" / f"vm{number}.mem").write_bytes(content)
    path, where = tmp_path / "state", f"ipc://{tmp_path}/socket"
    part = tmp_path / "out" / ".vm1.mem.pageferry-part"

    def there():
        return receiver("--into", f"image:{tmp_path}/out/", listen=where)

    with there() as receiving:
        with Running("batch", f"{tmp_path}/images", where, "--state", str(path), "--parallel", "1",
                     "--max-bandwidth", "8MB", "--codec", "none") as running:  # fmt: skip
            running.error_line("vm1.mem: started")
            until(lambda: part.exists() and part.stat().st_blocks * 512 >= 4 << 20, "some of it")
            if who == "receiver":
                kill_9(receiving)
                running.error_line("vm1.mem: failed")
            kill_9(running)
        if who == "batch":
            # the resume comes while the receiver still waits for the first
            done = resume(path, "--json")
    if who == "receiver":
        sweep(receiving.process.pid)
        with there():
            done = resume(path, "--json")
    assert done.returncode == 0, done.stderr
    assert arrived(tmp_path / "images") == ["vm0.mem", "vm1.mem", "vm2.mem"]
    first, second, _ = json.loads(done.stdout)["items"]
    assert first["attempts"] == 1
    assert 0 < second["report"]["pages-already-there"] < (12 << 20) // PAGE


def test_killed_again_and_again(images, tmp_path):
    """Each time it comes one image further."""
    path = tmp_path / "state"
    with slowly(images, path) as running:
        running.error_line(": completed")
        kill_9(running)
    for _ in range(2):
        with Running("batch", "resume", "--state", str(path)) as running:
            running.error_line(": completed")
            kill_9(running)
    assert sum(row.state is State.COMPLETED for row in look(str(path)).rows) >= 3
    done = resume(path, "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    assert len(arrived(images)) == 6


def test_it_does_not_end_before_the_last_outcome_is_written(images, tmp_path):
    """Two end at about the same time, and the file is slow to take one of them."""
    others_over = threading.Event()

    class Slow(BatchState):
        def ended(self, number, *what):
            if number == 0:
                assert others_over.wait(20)
            super().ended(number, *what)

    async def main():
        wanted = manifest({"parallel": 2, "destination": f"image:{tmp_path}/out/", "items": [
            {"source": f"image:{images}/vm{n}.mem"} for n in range(2)
        ]}, str(tmp_path))  # fmt: skip
        with contextlib.closing(Slow(str(tmp_path / "s"), wanted)) as state:
            batch = Batch(state)
            running = asyncio.create_task(batch.run())
            await until_async(lambda: batch._entries[1].state is State.COMPLETED, "the second")
            await until_async(lambda: batch._entries[1].task is None, "its task")
            for _ in range(100):  # let the batch act on it, and begin what it does in a thread
                await asyncio.sleep(0)
                await asyncio.to_thread(os.getpid)
            assert not running.done() and not batch._workers._closed
            others_over.set()
            await running
            assert [row.state for row in state.rows()] == [State.COMPLETED] * 2

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(images, tmp_path, number):
    """What runs is cancelled, the state kept, and the message says how to go on."""
    path = tmp_path / "state"
    with slowly(images, path) as running:
        running.error_line(": completed")
        running.process.send_signal(number)
        code, out, err = running.finish()
    assert code == 130
    assert f"`pageferry batch resume --state {path}` goes on" in err
    assert "result         cancelled:" in out
    got = status(path)
    assert got["running"] == 0 and got["pending"] >= 3 and got["failed"] == 0
    assert resume(path).returncode == 0
    assert len(arrived(images)) == 6


def test_one_process_at_a_time(images, tmp_path):
    """A second is refused while the first runs, and `status` shows whose it is."""
    path = tmp_path / "state"
    with slowly(images, path, "--max-bandwidth", "250kB") as running:
        running.error_line("vm1.mem: started")
        second = run("batch", "resume", "--state", str(path))
        assert second.returncode == 2 and "somebody works on the batch" in second.stderr
        got = status(path)
        assert (got["status"], got["pid"]) == ("active", running.process.pid)
        assert got["running"] == 2
        running.process.send_signal(signal.SIGINT)
        assert running.finish()[0] == 130


def test_shares_of_the_bandwidth(images, tmp_path):
    """Two share it; when one has ended the other has all, up to its own limit."""
    limits = []

    async def main():
        state, batch = begin(
            tmp_path / "s", parallel=2, destination="image:out/", **{"max-bandwidth": "8MB"},
            defaults={"workers": 1, "codec": "none"},
            items=[{"source": f"image:images/vm{n}.mem"} for n in range(3)]
            + [{"source": "image:images/vm3.mem", "max-bandwidth": "1MB", "priority": 9}],
        )  # fmt: skip

        def look_at(query):
            assert query["running"] <= 2
            assert sum(query[state.value] for state in State) == query["total"] == 4
            limits.append({item["name"]: item["limit"] for item in query["items"]})
            assert sum(limits[-1].values()) <= 8_000_000
            for entry in batch._entries.values():
                if entry.migration is not None:
                    assert entry.migration.parameters.max_bandwidth == entry.rate

        batch.on_progress = look_at
        report = await batch.run()
        state.close()
        assert (batch.query()["bytes"], batch.query()["bytes-done"]) == (report["bytes"],) * 2
        return report

    report = asyncio.run(main())
    assert (report["completed"], report["bytes"]) == (4, 4 * PAGES * PAGE)
    assert {"vm3.mem": 1_000_000, "vm0.mem": 7_000_000} in limits
    assert arrived(images) == [f"vm{n}.mem" for n in range(4)]


def test_a_guest_among_images(images, tmp_path):
    """A guest that runs is noted as handed over before it can be."""

    async def main():
        state, batch = begin(
            tmp_path / "s", parallel=2, defaults={"workers": 1},
            items=[
                {"name": "guest", "source": "demo:?size=4M", "destination": "demo:"},
                {"source": "image:images/vm0.mem", "destination": "image:out/"},
            ],
        )  # fmt: skip
        noted, real = [], state.switching
        state.switching = lambda number: (noted.append(number), real(number))
        report = await batch.run()
        state.close()
        return report, noted

    report, noted = asyncio.run(main())
    assert report["status"] == "completed"
    assert noted == [0]
    assert arrived(images) == ["vm0.mem"]


_KILLED_AT_HANDOVER = """
import asyncio, os, signal, sys
from pageferry.pipeline.batch import Batch
from pageferry.pipeline.batch_state import BatchState
from pageferry.pipeline.manifest import manifest

class Killed(BatchState):
    def switching(self, number):
        super().switching(number)
        os.kill(os.getpid(), signal.SIGKILL)

items = [{"name": "guest", "source": "demo:?size=4M", "destination": "demo:"}]
asyncio.run(Batch(Killed(sys.argv[1], manifest({"items": items}, "/"))).run())
"""


def test_killed_while_a_guest_is_handed_over(tmp_path):
    """It may run at its destination: it is not sent again until somebody says so by its name."""
    path = str(tmp_path / "state")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_HANDOVER, path], timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    for more in ((), ("--retry-failed",)):
        done = resume(path, *more)
        assert done.returncode == 16
        assert "guest: failed after one attempt: pageferry ended while" in done.stdout
        assert "started" not in done.stderr
    done = resume(path, "--retry", "guest", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"][0]["attempts"] == 2


def test_a_receiver_that_is_busy(images, tmp_path):
    """It takes one image at a time: the others wait their turn, by retrying."""
    with receiver("--into", f"image:{tmp_path}/out/vm0.mem") as there:
        done = run("batch", str(images / "vm*.mem"), there.endpoint, "--state",
                   str(tmp_path / "s"), "--parallel", "3", "--retries", "1000",
                   "--backoff", "20ms", "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["completed"] == 6
        there.process.send_signal(signal.SIGTERM)
        assert there.finish()[0] == 130


def test_cancelled_as_a_task(images, tmp_path):
    """As host tooling does it: nothing is left, and it can be taken up again."""

    async def main():
        state, batch = begin(
            tmp_path / "s", destination="image:out/", parallel=2, **{"max-bandwidth": "1MB"},
            defaults={"batch-pages": 16, "codec": "none"},
            items=[{"source": f"image:images/vm{n}.mem"} for n in range(4)],
        )  # fmt: skip
        begun = asyncio.Event()
        batch.on_progress = lambda query: query["bytes-done"] and begun.set()
        task = asyncio.ensure_future(batch.run())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {row.state for row in state.rows()} == {State.PENDING}
        state.close()

    asyncio.run(main())
    assert arrived(images, all_over=False) == []
    assert resume(tmp_path / "s", "--quiet").returncode == 0
    assert arrived(images) == [f"vm{n}.mem" for n in range(4)]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["images"], 2, "is no manifest"),
        (["no-such.toml"], 2, "cannot read the manifest"),
        (["*.nothing", "ipc://@x"], 2, "no image is there"),
        (["images", "nowhere"], 2, "names no guest"),
        (["images", "image:out"], 2, "write image:DIR/"),
        (["images", "image:out/"], 2, "there is no directory"),
        (["images", "ipc://@x", "--parallel", "many"], 2, "--parallel must be a whole number"),
        (["images", "ipc://@x", "--parallel", "0"], 2, "parallel must be from 1"),
        (["images", "ipc://@x", "--max-bandwidth", "fast"], 2, "no rate"),
        (["images", "ipc://@x", "--state", "no/such/folder"], 2, "cannot open the state"),
        (["resume", "--state", "nothing"], 2, "cannot open the state"),
        (["status", "--state", "nothing"], 2, "there is no state"),
        (["resume"], 2, "--state"),
    ],
)
def test_one_clear_error(tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / name).write_bytes(b"x")
    done = run("batch", *arguments)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.state"))


def test_which_errors_are_worth_another_try():
    again = {"ConnectError", "PeerLost", "WorkerDied", "NoSpace", "NotConverging"}
    final = {"UsageError", "SourceError", "AttachError", "HostLacks", "ConfirmationLost",
             "PostcopyFailed", "PeerRefused"}  # fmt: skip
    by_name = {cls.__name__: cls for cls in errors.all_errors()}
    assert all(worth_another_try(by_name[name]()) for name in again)
    assert not any(worth_another_try(by_name[name]()) for name in final)
    assert worth_another_try(errors.PeerRefused("busy", field="busy"))
