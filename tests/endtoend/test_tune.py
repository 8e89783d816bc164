"""`pageferry tune`: samples, trial runs here and at a receiver whose destination they never touch,
what is written, and how it ends."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq.asyncio
from helpers import GIVE_UP, PAGE, Running, pageferry, pattern, receiver, same_file, sweep, until
from qemu_vm import Vm, require_qemu
from shared_writer import SharedWriter

from pageferry.pipeline import api
from pageferry.pipeline.agreement import check_hello
from pageferry.pipeline.batch_state import look
from pageferry.pipeline.control import Control
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.profiles import read_profile
from pageferry.pipeline.reception import Reception
from pageferry.pipeline.trials import TrialRuns, take_sample, trial_runs
from pageferry.pipeline.tuning import Setting, Trial
from pageferry.tools.cli.tune import tune_command
from pageferry.tools.report.arrivals import Arrivals
from pageferry.tools.report.tuning_curves import check_curves
from pageferry.transport.errors import Cancelled, HostLacks, PeerRefused, SourceError, UsageError
from pageferry.transport.links import connect, parse_endpoint
from pageferry.transport.messages import (
    MAX_SAMPLE,
    PROTOCOL,
    SAMPLE,
    Block,
    Hello,
    Refused,
    Welcome,
)
from pageferry.transport.session import Role
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.sample import PIECE_PAGES, Sample, first_touch, spread

PIECE = PIECE_PAGES * PAGE
FEW = ("--codecs", "none,lz4", "--batches", "256", "--workers", "1,2", "--sample", "8M")
ONE = ("--codecs", "none", "--batches", "256", "--workers", "1", "--sample", "8M")


@pytest.fixture
def image(tmp_path):
    """12 MiB of mixed content."""
    path = tmp_path / "vm.mem"
    path.write_bytes(pattern(3072))
    return path


def sample_of(path, limit):
    guest = open_source(parse_guest(f"image:{path}"))
    try:
        return Sample(guest, limit)
    finally:
        guest.close()


def content_of(source):
    """All bytes of a sample's source, which is closed."""
    try:
        return source.blocks[0].read(0, source.image_size)
    finally:
        source.close()


# ---- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 511, 512, 513, 5000, 100_000])
@pytest.mark.parametrize("wanted", [1, 512, 2048, 10**6])
def test_pieces_are_spread_and_do_not_overlap(pages, wanted):
    """Every beginning of them is spread as well: half of them leave no half of the source out."""
    pieces = spread(pages, wanted)
    taken = np.zeros(pages, int)
    for piece in pieces:
        taken[piece.first : piece.first + piece.pages] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(p.pages for p in pieces)
    if wanted >= pages:
        assert taken.min() == 1
    else:
        assert taken.sum() <= max(wanted, PIECE_PAGES)
    if len(pieces) >= 8:
        quarters = {p.first * 4 // pages for p in pieces[: len(pieces) // 2]}
        assert quarters == {0, 1, 2, 3}


def test_a_small_source_is_in_it_as_a_whole(image):
    """Each byte once, in the order of the pieces."""
    sample = sample_of(image, 1 << 30)
    try:
        assert (sample.data, sample.share) == (12 << 20, 1.0)
        got, data = content_of(sample.guest()), image.read_bytes()
        found = {got[at : at + PIECE] for at in range(0, len(got), PIECE)}
        assert found == {data[at : at + PIECE] for at in range(0, len(data), PIECE)}
        zero = sum(not any(data[at : at + PAGE]) for at in range(0, len(data), PAGE))
        assert sample.zero_share == pytest.approx(zero * PAGE / len(data))
        half = sample.guest(0.5)
        assert half.image_size == 6 << 20
        assert got.startswith(content_of(half))
    finally:
        sample.close()


def test_holes_are_in_it_in_the_proportion_they_have(tmp_path):
    """A quarter of this image holds something, and so does a quarter of its sample."""
    path = tmp_path / "sparse.mem"
    with open(path, "wb") as file:
        for at in range(0, 64 << 20, 8 << 20):
            file.seek(at)
            file.write(os.urandom(2 << 20))
        file.truncate(64 << 20)
    sample = sample_of(path, 8 << 20)
    try:
        assert sample.data == 8 << 20
        assert sample.size == 32 << 20
        source = sample.guest()
        _, counts = source.initial_pages(0)
        source.close()
        assert counts.sum() * PAGE == 8 << 20
    finally:
        sample.close()


def test_a_source_that_is_all_holes_is_refused(tmp_path):
    path = tmp_path / "holes.mem"
    with open(path, "wb") as file:
        file.truncate(8 << 20)
    with pytest.raises(SourceError, match="all holes"):
        sample_of(path, 1 << 20)


@pytest.mark.parametrize("size", [PAGE, 1 << 20, 2 << 20, (6 << 20) + PAGE])
def test_a_sparse_sample_stays_within_what_receivers_take(tmp_path, size):
    """Holes beyond that are left out."""
    path = tmp_path / "huge.mem"
    with open(path, "wb") as file:
        file.write(os.urandom(size))
        file.truncate(64 << 30)
    sample = sample_of(path, 8 << 20)
    try:
        assert sample.data == size
        assert MAX_SAMPLE // 2 < sample.size <= MAX_SAMPLE
    finally:
        sample.close()


def test_the_first_touch_costs_something():
    assert 0 <= first_touch() < 1e-6


# ---- what a receiver takes -------------------------------------------------------------------


def hello(**changes):
    usual = {
        "protocol": PROTOCOL, "version": "1", "uuid": "12345678-1234-5678-1234-567812345678",
        "kind": SAMPLE, "blocks": [Block(SAMPLE, 1 << 20)], "workers": 1, "batch_pages": 256,
        "capabilities": [SAMPLE],
    }  # fmt: skip
    return Hello(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "image"}, "kind"),
        ({"capabilities": []}, "kind"),
        ({"capabilities": [SAMPLE, "postcopy-ram"]}, "kind"),
        ({"blocks": [Block(SAMPLE, MAX_SAMPLE + PAGE)]}, "image-size"),
        ({"blocks": [Block(SAMPLE, PAGE, offset=MAX_SAMPLE)]}, "image-size"),
        ({"image_size": MAX_SAMPLE + 1}, "image-size"),
    ],
)  # fmt: skip
def test_trial_runs_that_are_refused(changes, field):
    """Neither half a trial run, nor one that takes this host's memory."""
    check_hello(hello(), "demo")
    check_hello(hello(blocks=[Block(SAMPLE, MAX_SAMPLE)]), None)
    with pytest.raises(PeerRefused) as caught:
        check_hello(hello(**changes), None)
    assert caught.value.data["field"] == field


# ---- trial runs ------------------------------------------------------------------------------


def test_trials_here_measure_what_they_moved(image):
    """Bytes, processor time of both ends, the share; and nothing is left."""

    async def main():
        async with trial_runs(parse_guest(f"image:{image}"), None, 8 << 20) as (sample, runs):
            trials = [Trial(Setting(n, "zstd", 1, 64), share) for n, share in ((1, 1.0), (2, 0.5))]
            return sample.data, [await runs.run(trial) for trial in trials]

    data, (whole, half) = asyncio.run(main())
    assert (whole.size, half.size) == (data, data // 2)
    assert (whole.whole, half.whole) == (True, False)
    for found in (whole, half):
        assert 0 < found.wire < found.size
        assert found.sender_cpu > 0 and found.receiver_cpu > 0 and found.seconds > 0
        assert found.switchover is None and found.cpus >= 1


@pytest.mark.parametrize("source", ["ram", "demo"])
def test_what_lives_is_tried_as_such(tmp_path, source, image):
    """Copied, hashed if its writes are found by content, and stopped, none of which it notices."""
    uri = {"ram": f"ram:{image}", "demo": "demo:?size=8M"}[source]

    async def main():
        async with trial_runs(parse_guest(uri), None, 8 << 20) as (sample, runs):
            assert sample.live and sample.by_content == (source == "ram")
            return await runs.run(Trial(Setting(1, "none", None, 256), 1.0))

    found = asyncio.run(main())
    assert found.switchover is not None and 0 < found.switchover < found.seconds + 60


def test_a_trial_that_is_cut_leaves_nothing(image):
    """And the next one runs."""

    async def main():
        async with trial_runs(parse_guest(f"image:{image}"), None, 8 << 20) as (_, runs):
            trial = Trial(Setting(2, "none", None, 256), 1.0)
            for turns in range(0, 60, 7):
                running = asyncio.ensure_future(runs.run(trial))
                for _ in range(turns):
                    await asyncio.sleep(0)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            return await runs.run(trial)

    assert asyncio.run(main()).size == 8 << 20


def test_a_sample_that_is_cut_is_closed(image):
    async def main():
        taking = asyncio.ensure_future(take_sample(parse_guest(f"image:{image}"), 8 << 20))
        await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(main())


def test_a_receiver_of_one_is_not_used_up(image, tmp_path):
    """Its destination is not touched by trial runs, and what comes after them arrives."""
    into = tmp_path / "arrived.mem"
    with receiver("--into", f"image:{into}", "--once") as there:
        done = pageferry("tune", f"image:{image}", there.endpoint, *FEW, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["best"]["fastest"]["cpu-receivers"] > 0
        assert not into.exists()
        assert pageferry("send", f"image:{image}", there.endpoint, "--quiet").returncode == 0
        code, out, _ = there.finish()
    assert code == 0
    reports = [json.loads(line) for line in out.splitlines()]
    assert [r["status"] for r in reports] == ["completed"]
    assert same_file(image, into)


def test_a_receiver_of_many_takes_trials_too(image, tmp_path):
    """They are none of what it received."""
    (tmp_path / "images").mkdir()
    with receiver("--into", f"image:{tmp_path}/images/") as there:
        done = pageferry("tune", f"image:{image}", there.endpoint, *ONE, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        there.process.send_signal(signal.SIGINT)
        _, out, _ = there.finish()
    reports = [json.loads(line) for line in out.splitlines()]
    assert [r.get("error", {}).get("class") for r in reports] == ["Cancelled"]  # and no image
    assert os.listdir(tmp_path / "images") == []


def test_a_receiver_that_is_busy_is_waited_for(image):
    """It lets go of one trial while the next one knocks; something else is an error at last."""

    async def main():
        where = parse_endpoint("tcp://127.0.0.1:0")

        def never(hello):
            raise AssertionError("a trial run never meets the destination")

        listening = Destination(where, never)
        told = []
        serving = asyncio.ensure_future(
            api.receive(listening, lambda *end: told.append(end), once=True)
        )
        sample = await take_sample(parse_guest(f"image:{image}"), 4 << 20)
        runs = TrialRuns(sample, listening.endpoint)
        try:
            trial = Trial(Setting(1, "none", None, 256), 1.0)
            both = await asyncio.gather(runs.run(trial), runs.run(trial))
            assert not serving.done()
            return [m.size for m in both], told
        finally:
            runs.close()
            sample.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            listening.close()

    assert asyncio.run(main()) == ([4 << 20, 4 << 20], [])


@asynccontextmanager
async def knocking(endpoint):
    """Says Hello as often as it is asked to, each as another source that stays; the answer."""
    context, sockets, tasks = zmq.asyncio.Context(), [], []

    async def listen(socket, control):
        while True:
            control.heard(await socket.recv())

    async def knock(**changes):
        socket = connect(context, endpoint, secrets.token_bytes(16), control=True)
        control = Control(Role.SOURCE, socket.send, "the receiver")
        sockets.append(socket)
        tasks.append(asyncio.ensure_future(listen(socket, control)))
        tasks.append(asyncio.ensure_future(control.keep_alive()))
        asked = control.ask(hello(uuid=str(uuid.uuid4()), **changes))
        return await asyncio.wait_for(asked, GIVE_UP)

    try:
        yield knock
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for socket in sockets:
            socket.close(0)
        context.term()


def test_trials_have_no_more_room_than_images(tmp_path):
    """All have the same name, none: they are not one another's next attempt, nor an image's."""

    async def main():
        at = parse_endpoint("tcp://127.0.0.1:0")
        opener = api.opener(parse_guest(f"image:{tmp_path}/"))
        receiving = Reception(at, opener, lambda *end: None, at_once=1)
        serving = asyncio.ensure_future(receiving.serve())
        try:
            async with knocking(receiving.endpoint) as knock:
                image = {"kind": "image", "capabilities": []}
                return [await knock(), await knock(), await knock(**image)]
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            receiving.close()

    first, *others = asyncio.run(main())
    assert isinstance(first, Welcome)
    for other in others:
        assert isinstance(other, Refused)
        assert other.field == "busy"


@pytest.mark.parametrize("many", [False, True])
def test_trials_are_not_shown_as_migrations(image, tmp_path, many):
    """No row of them, no page that takes the place of a migration's, and nothing counted."""

    async def main():
        at = parse_endpoint("tcp://127.0.0.1:0")
        pages = []
        arrivals = Arrivals("t", "here", lambda error: {}, lambda *end: pages.append(end[2]))
        if many:
            opener = api.opener(parse_guest(f"image:{tmp_path}/"))
            receiving = Reception(at, opener, lambda *end: None, at_once=1)
            serving = asyncio.ensure_future(receiving.serve())
        else:
            receiving = Destination(at, api.opener(parse_guest(f"image:{tmp_path}/into")))
            serving = asyncio.ensure_future(api.receive(receiving, lambda *end: None, once=False))
        receiving.on_arrival = arrivals.arrived
        try:
            async with trial_runs(parse_guest(f"image:{image}"), receiving.endpoint, 4 << 20) as (
                _,
                runs,
            ):
                for _ in range(2):
                    await runs.run(Trial(Setting(1, "none", None, 256), 1.0))
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            receiving.close()
        return arrivals.query(), pages

    query, pages = asyncio.run(main())
    assert (query["total"], query["running"], query["completed"]) == (0, 0, 0)
    assert pages == []


def test_a_signal_ends_a_receiver_of_one_during_a_trial():
    """A trial is not the one migration that there is to cancel."""

    async def main(there):
        async with knocking(parse_endpoint(there.endpoint)) as knock:
            assert isinstance(await knock(), Welcome)
            there.process.send_signal(signal.SIGTERM)
            return await asyncio.to_thread(there.finish)

    with receiver("--once") as there:
        code, out, _ = asyncio.run(main(there))
    error = json.loads(out.splitlines()[-1])["error"]
    assert (error["class"], error["message"]) == ("Cancelled", "no longer listening")
    assert code == Cancelled.exit_code


# ---- the command -----------------------------------------------------------------------------


def test_a_table_a_profile_and_how_it_is_used(image, tmp_path):
    """What was named goes into the profile; copy, batch and Python use it, and what is said
    explicitly comes before."""
    profile = tmp_path / "p.toml"
    done = pageferry("tune", f"image:{image}", *FEW, "--profile", str(profile))
    assert done.returncode == 0, done.stderr
    assert "best for throughput:" in done.stdout and "workers: GB/s" in done.stdout
    assert "trial 1 of about" in done.stderr and f"profile: {profile}" in done.stderr
    named = read_profile(str(profile))
    assert set(named) >= {"workers", "codec", "batch-pages"}
    line = next(li for li in done.stdout.splitlines() if li.startswith("best for throughput:"))
    assert f"--workers {named['workers']} --codec {named['codec']}" in line
    assert profile.read_text().startswith(f"# image:{image} to")

    profile.write_text('workers = 3\ncodec = "zstd"\nlevel = 2\nbatch-pages = 64\n')
    used = (f"image:{image}", f"image:{tmp_path}/copy.mem", "--profile", str(profile), "--json")
    report = json.loads(pageferry("copy", *used).stdout)
    assert (report["workers"], report["codec"]) == (3, "zstd")
    report = json.loads(pageferry("copy", *used, "--codec", "none", "--workers", "1").stdout)
    assert (report["workers"], report["codec"]) == (1, "none")
    (tmp_path / "to").mkdir()
    state = ("--state", str(tmp_path / "state"), "--profile", str(profile), "--json", "--quiet")
    done = pageferry("batch", str(image), f"image:{tmp_path}/to/", *state)
    assert done.returncode == 0, done.stderr
    assert look(str(tmp_path / "state")).rows[0].item.settings.workers == 3
    report = asyncio.run(
        api.migrate_async(
            f"image:{image}", f"image:{tmp_path}/copy.mem", profile=str(profile), workers=2
        )
    )
    assert (report["workers"], report["codec"]) == (2, "zstd")


def test_curves_are_drawn(tmp_path):
    """A panel a factor, whole or not at all."""
    point = {"rate": 10**9, "spread": 0.1, "cpu": 1.5}
    points = [point | {"value": "1"}, point | {"value": "2", "spread": None, "rate": 2 * 10**9}]
    report = {"source": "a", "destination": "b", "curves": {"workers": points, "codec": points[:1]}}
    for name, begin in (("c.svg", b"<?xml"), ("c.png", b"\x89PNG")):
        where = tmp_path / name
        # in a process of its own: matplotlib keeps its fonts open
        program = "from pageferry.tools.report.tuning_curves import check_curves, draw_curves\n"
        program += f"check_curves({str(where)!r})\ndraw_curves({report!r}, {str(where)!r})"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=GIVE_UP)
        assert where.read_bytes().startswith(begin)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "c.svg"]


def test_curves_without_matplotlib(monkeypatch, tmp_path):
    """Said before anything is measured, with what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HostLacks, match=r"pip install 'pageferry\[report\]'"):
        check_curves(str(tmp_path / "c.svg"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sample", "1M"), "at least 4M"),
        (("--workers", "0"), "--workers"),
        (("--workers", "1,x"), "--workers"),
        (("--batches", "8"), "--batches"),
        (("--codecs", "brotli"), "brotli"),
        (("--codecs", "zstd:fast"), "zstd:1"),
        (("--codecs", "auto:1"), "auto has no level"),
        (("--repeats", "0"), "--repeats"),
        (("--curves", "c.pdf"), ".png or .svg"),
        (("--curves", "/no/such/c.png"), "cannot write into"),
        (("--profile", "a b"), "no name for a profile"),
        (("udp://x",), "names no guest"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(image, options, said):
    """Said before anything is measured."""
    with pytest.raises(UsageError, match=said):
        tune_command.main([f"image:{image}", *options], standalone_mode=False)


def test_all_of_it(image):
    """Each combination, as often as it was asked for."""
    done = pageferry("tune", f"image:{image}", *FEW, "--exhaustive", "--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["trials"] for row in report["settings"]] == [2] * 4
    assert report["trials"] == 9


def test_an_image_has_no_downtime(image, tmp_path):
    done = pageferry("tune", f"image:{image}", *ONE, "--goal", "least-downtime", "--profile",
                     str(tmp_path / "p.toml"))  # fmt: skip
    assert done.returncode == 2 and "no downtime" in done.stderr


def test_an_interrupt_leaves_nothing(image):
    with Running("tune", f"image:{image}", "--sample", "8M") as running:
        running.error_line("trial 3 of")
        running.process.send_signal(signal.SIGINT)
        code, _, err = running.finish()
        assert code == 130 and "interrupted; the source is as it was" in err
        left = [n for n in os.listdir("/dev/shm") if f"-{running.process.pid}-" in n]
        assert left == []


def test_a_kill_leaves_no_sample(image):
    """Its resource tracker removes the name."""
    with Running("tune", f"image:{image}", "--sample", "8M") as running:
        running.error_line("trial 2 of")
        pid = running.process.pid
        running.kill()

        def gone():
            return not any(f"-{pid}-" in name for name in os.listdir("/dev/shm"))

        try:
            until(gone, "the sample's name is removed")
        finally:
            sweep(pid)


# ---- of what runs ----------------------------------------------------------------------------


def tried_once(uri):
    """One trial of a sample of what runs."""

    async def main():
        async with trial_runs(parse_guest(uri), None, 4 << 20) as (sample, runs):
            assert sample.live
            return await runs.run(Trial(Setting(1, "none", None, 256), 1.0))

    return asyncio.run(main())


def test_a_process_does_not_notice(tmp_path):
    """It is not stopped, and its sample is its memory."""
    path = f"/dev/shm/test-pf-{os.getpid()}-tune"
    try:
        with open(path, "wb") as file:
            file.write(pattern(1024))
        with SharedWriter("obey", path, 1024) as writer:
            writer.tell("map", 0, 0, 1024)
            assert tried_once(f"pid:{writer.pid}?mapping={path}").size == 4 << 20
            assert writer.state() in "SR"
            assert "TracerPid:\t0" in Path(f"/proc/{writer.pid}/status").read_text()
            userfaultfds = [os.readlink(f"/proc/{writer.pid}/fd/{fd}")
                            for fd in os.listdir(f"/proc/{writer.pid}/fd")]  # fmt: skip
            assert not any("userfaultfd" in name for name in userfaultfds)
    finally:
        os.unlink(path)


@pytest.mark.qemu
def test_a_vm_does_not_notice():
    """It runs on, nothing of it is set otherwise, and its monitor is free again."""
    require_qemu()
    with Vm("tune", memory=64 << 20) as vm:
        before = vm.qmp("query-migrate-capabilities"), vm.qmp("query-migrate-parameters")
        for _ in range(2):
            assert tried_once(f"qemu:{vm.qmp_path}").size > 0
        assert vm.qmp("query-status")["running"]
        after = vm.qmp("query-migrate-capabilities"), vm.qmp("query-migrate-parameters")
        assert after == before
        assert vm.qmp("query-migrate") == {}
