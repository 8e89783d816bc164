"""A snapshot restored lazily: a monitor hands over its userfaultfd, pages come from afar."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import PAGE, Running, until
from helpers import pageferry as run

from pageferry.pipeline import api
from pageferry.workers.guests import parse_guest

HUGE = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def snapshot(tmp_path):
    """16 MiB: random, text, zeros and holes."""
    draw = random.Random(3)
    path = tmp_path / "vm.mem"
    with open(path, "wb") as f:
        f.truncate(16 << 20)
        for at in range(0, 12 << 20, 1 << 20):
            f.seek(at)
            f.write(draw.randbytes(600 * 1024) + b"some text " * 20_000 + bytes(64 * 1024))
    return path


@contextlib.contextmanager
def monitor_process(path, snapshot, *options):
    """The example client: behaves as Firecracker does, or not."""
    command = [
        sys.executable, "-m", "pageferry.tools.uffd_client", "--socket", str(path),
        "--image", str(snapshot), *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def restoring(source, path, *options):
    with Running("restore", str(source), "--uffd-socket", str(path), "--json", *options) as it:
        until(lambda: os.path.exists(path) or it.process.poll() is not None, "listening")
        yield it


@contextlib.contextmanager
def serving(image, listen, *options, kind="image"):
    """`pageferry serve`, listening."""
    with Running("serve", f"{kind}:{image}", "--listen", listen, "--json", *options) as server:
        server.endpoint = json.loads(server.line())["endpoint"]
        yield server


def stop(server):
    server.process.send_signal(signal.SIGTERM)
    server.finish()


def whole(restore, monitor):
    """Both ends satisfied."""
    verdict = json.loads(monitor.stdout.readline())
    code, out, err = restore.finish()
    assert code == 0, err
    assert verdict["wrong-pages"] == 0
    assert monitor.wait(30) == 0
    report = json.loads(out)
    assert report["status"] == "completed"
    return report


@pytest.mark.parametrize("options", [(), ("--regions", "1"), ("--second-descriptor",)])
def test_from_an_image_here(snapshot, tmp_path, options):
    path = tmp_path / "u"
    with (
        restoring(f"image:{snapshot}", path) as restore,
        monitor_process(path, snapshot, *options) as monitor,
    ):
        report = whole(restore, monitor)
    assert report["postcopy-requests"] > 0
    assert not path.exists()


def test_its_pages(snapshot, tmp_path):
    """`--web` while it restores, `--report` when it has."""
    path, page = tmp_path / "u", tmp_path / "page.html"
    with restoring(f"image:{snapshot}", path, "--web", "0", "--report", str(page)) as restore:
        url = restore.error_line("web: ").split()[1]
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert f"the guest at {path}" in answer.read().decode()
        with monitor_process(path, snapshot) as monitor:
            report = whole(restore, monitor)
    root = ElementTree.parse(page).getroot()
    assert json.loads("".join(root.find(".//pre[@id='raw']").itertext())) == report


def test_memory_given_back_meanwhile_reads_as_zero(snapshot, tmp_path):
    """A balloon inflates while pages arrive: nothing stale comes back. Of what `pageferry snapshot`
    wrote."""
    path, file = tmp_path / "u", tmp_path / "file"
    asyncio.run(api.snapshot(parse_guest(f"image:{snapshot}"), parse_guest(f"file:{file}")))
    with serving(
        file, f"ipc://{tmp_path}/s", "--max-postcopy-bandwidth", "20MB", kind="file"
    ) as server:
        endpoint = server.endpoint
        for seed in range(3):
            with restoring(endpoint, path) as restore:
                options = ("--remove", "400", "--seed", str(seed))
                with monitor_process(path, snapshot, *options) as monitor:
                    whole(restore, monitor)


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_several_destinations_at_once(snapshot, tmp_path, scheme):
    listen = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/s"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(snapshot, listen, "--codec", "zstd"))
        endpoint = server.endpoint
        pairs = []
        for i in range(3):
            path = tmp_path / f"u{i}"
            restore = stack.enter_context(restoring(endpoint, path))
            monitor = stack.enter_context(monitor_process(path, snapshot, "--seed", str(i)))
            pairs.append((restore, monitor))
        for restore, monitor in pairs:
            whole(restore, monitor)
        told = [json.loads(server.process.stdout.readline()) for _ in pairs]
        assert {line["status"] for line in told} == {"completed"}


def test_the_source_goes_and_comes_back(snapshot, tmp_path):
    """Killed in the middle and started again: the guest sleeps and goes on."""
    listen, path = f"ipc://{tmp_path}/s", tmp_path / "u"
    slow = ("--max-postcopy-bandwidth", "3MB")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(snapshot, listen, *slow))
        restore = stack.enter_context(restoring(listen, path))
        monitor = stack.enter_context(monitor_process(path, snapshot))
        restore.error_line("postcopy:")
        stop(first)
        restore.error_line("paused")
        stack.enter_context(serving(snapshot, listen))
        whole(restore, monitor)


def test_another_snapshot_is_not_mixed_in(snapshot, tmp_path):
    """The server comes back with another image: the guest waits for its own."""
    listen, path = f"ipc://{tmp_path}/s", tmp_path / "u"
    other = tmp_path / "other"
    other.write_bytes(os.urandom(16 << 20))
    slow = ("--max-postcopy-bandwidth", "3MB")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(snapshot, listen, *slow))
        restore = stack.enter_context(restoring(listen, path))
        monitor = stack.enter_context(monitor_process(path, snapshot))
        restore.error_line("postcopy:")
        stop(first)
        wrong = stack.enter_context(serving(other, listen))
        restore.error_line("serves another snapshot now")
        stop(wrong)
        copy = tmp_path / "copy"
        copy.write_bytes(snapshot.read_bytes())
        stack.enter_context(serving(copy, listen))
        whole(restore, monitor)


@pytest.mark.parametrize(
    "kind",
    ["garbage", "no-descriptor", "silent", "gone", "overlap", "outside", "odd-pages",
     "huge-number"],
)  # fmt: skip
def test_nonsense_is_turned_away_and_the_next_is_served(snapshot, tmp_path, kind):
    path = tmp_path / "u"
    with restoring(f"image:{snapshot}", path) as restore:
        with monitor_process(path, snapshot, "--misbehave", kind) as bad:
            restore.error_line("turned away")
            bad.wait(30)
        with monitor_process(path, snapshot) as monitor:
            report = whole(restore, monitor)
    assert report["turned-away"] == 1


def test_a_monitor_that_dies_ends_it(snapshot, tmp_path):
    path = tmp_path / "u"
    with serving(snapshot, f"ipc://{tmp_path}/s", "--max-postcopy-bandwidth", "1MB") as server:
        endpoint = server.endpoint
        with (
            restoring(endpoint, path) as restore,
            monitor_process(path, snapshot, "--die-after", "100") as monitor,
        ):
            monitor.wait(30)
            code, out, err = restore.finish()
        assert code == 4
        assert "has ended before" in err
        assert json.loads(out)["error"]["class"] == "GuestGone"
        ended = json.loads(server.line())
        assert ended["error"]["class"] in ("PeerLost", "GuestGone")  # by when it died


def test_nobody_serves(tmp_path, snapshot):
    missing = run("restore", f"ipc://{tmp_path}/nobody", "--uffd-socket", str(tmp_path / "u"))
    assert missing.returncode == 5
    assert not (tmp_path / "u").exists()


def test_only_images_are_served(tmp_path):
    refused = run("serve", "demo:", "--listen", f"ipc://{tmp_path}/s")
    assert refused.returncode == 2
    assert "only image: and file: are served" in refused.stderr


def test_a_socket_path_that_is_taken(tmp_path, snapshot):
    (tmp_path / "u").write_text("precious")
    refused = run("restore", f"image:{snapshot}", "--uffd-socket", str(tmp_path / "u"))
    assert refused.returncode == 4
    assert (tmp_path / "u").read_text() == "precious"


@pytest.fixture
def huge_pages():
    before = HUGE.read_text()
    try:
        HUGE.write_text("40")
    except OSError:
        pytest.skip("huge pages cannot be reserved here (needs root)")
    if int(HUGE.read_text()) < 16:
        HUGE.write_text(before)
        pytest.skip("there is no contiguous memory left for huge pages")
    yield
    HUGE.write_text(before)


def test_pages_of_2_mib_are_installed_whole(snapshot, tmp_path, huge_pages):
    path = tmp_path / "u"
    with (
        restoring(f"image:{snapshot}", path) as restore,
        monitor_process(path, snapshot, "--huge", "--remove", "2") as monitor,
    ):
        report = whole(restore, monitor)
    assert report["postcopy-already-there"] == 0
    assert sum(report["pages-by-channel"]) % 512 == 0


def test_the_tail_of_a_snapshot_that_is_no_whole_page_is_not_mapped(tmp_path):
    """A monitor maps whole pages: what it maps must be in the snapshot."""
    odd = tmp_path / "odd"
    odd.write_bytes(os.urandom(10 * PAGE + 100))
    path = tmp_path / "u"
    with restoring(f"image:{odd}", path) as restore:
        with monitor_process(path, odd, "--misbehave", "outside"):
            restore.error_line("turned away")
        restore.process.send_signal(signal.SIGINT)
        code, _, _ = restore.finish()
    assert code == 130
    assert not path.exists()
