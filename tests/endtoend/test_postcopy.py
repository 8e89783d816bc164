"""The guest starts at the destination before its memory is there; the oracle finds what is lost."""

import asyncio
import json
import os
import random
import signal

import pytest
from helpers import Running, receiver, until
from helpers import pageferry as run

import pageferry
from pageferry.transport.errors import PeerRefused, UsageError

RANDOM = "demo:?size=16M&content=random&access=random"
# Slow enough that the guest meets pages that have not come, however busy this machine is.
SLOW = 20_000_000


def check(report, missing=None):
    """Every byte right, and each page installed once."""
    assert report["status"] == "completed"
    assert report["oracle"]["ok"]
    assert report["postcopy-already-there"] == 0
    assert report["lost-frames"] == 0
    if missing is not None:
        assert sum(report["pages-by-channel"]) == missing


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "zlib", "auto"])
@pytest.mark.parametrize("workers", [1, 3])
def test_now(codec, workers):
    report = pageferry.migrate(
        f"{RANDOM}&rate=5000", "demo:", postcopy="now", codec=codec, workers=workers,
        max_postcopy_bandwidth=SLOW,
    )  # fmt: skip
    check(report, missing=4096)
    assert report["postcopy-requests"] > 0
    assert report["postcopy-preempt"] is True
    assert len(report["pages-by-channel"]) == workers + 1


@pytest.mark.parametrize("content", ["zero", "text"])
@pytest.mark.parametrize("link", ["zmq", "direct"])
def test_content(content, link):
    report = pageferry.migrate(
        f"demo:?size=32M&rate=20000&content={content}", "demo:", postcopy="now", postcopy_link=link
    )
    assert report["oracle"]["ok"]
    assert report["postcopy-already-there"] == 0
    assert report["postcopy-link"] == link


def test_without_preemption_requests_are_answered_in_line():
    report = pageferry.migrate(
        f"{RANDOM}&rate=5000", "demo:", postcopy="now", preempt=False, max_postcopy_bandwidth=SLOW
    )
    check(report, missing=4096)
    assert report["postcopy-pages"] == 0  # all by the background's channels
    assert report["postcopy-requests"] > 0
    assert report["senders-paused-time"] == 0


def test_many_threads_fault_at_once():
    report = pageferry.migrate(f"{RANDOM}&rate=0&vcpus=16", "demo:", postcopy="now")
    check(report, missing=4096)


def test_after_rounds_only_what_is_dirty_travels_twice():
    """Precopy first; then what was written since, and holes are zero without being asked for."""
    report = pageferry.migrate(
        "demo:?size=64M&rate=0&content=text", "demo:", postcopy="after=1", downtime_limit=0.031
    )
    assert report["oracle"]["ok"]
    assert report["ram"]["dirty-sync-count"] == 2
    assert sum(report["pages-by-channel"]) > 0


def test_auto_takes_over_where_precopy_would_not_converge():
    report = pageferry.migrate(
        "demo:?size=32M&rate=0", "demo:", postcopy="auto", max_bandwidth=60_000_000,
        downtime_limit=0.05,
    )  # fmt: skip
    assert report["oracle"]["ok"]
    assert "postcopy-requests" in report, report["ram"]


def test_auto_stays_out_of_the_way_of_a_guest_that_converges():
    report = pageferry.migrate("demo:?size=32M&rate=1000", "demo:", postcopy="auto")
    assert report["oracle"]["ok"]
    assert "postcopy-requests" not in report


def test_a_random_guest_of_64_mib_many_times():
    """Workers, codecs, preemption, links, access, threads: drawn, and every byte checked."""
    draw = random.Random(7)
    for _ in range(6):
        vcpus = draw.choice([1, 1, 4])
        guest = (
            f"demo:?size=64M&rate={draw.choice([0, 3000, 20000])}"
            f"&content={draw.choice(['zero', 'text', 'random'])}&access=random&vcpus={vcpus}"
        )
        report = pageferry.migrate(
            guest, "demo:",
            postcopy=draw.choice(["now", "after=1"]), workers=draw.randint(1, 4),
            codec=draw.choice(["none", "lz4", "zstd", "zlib", "auto"]),
            preempt=draw.choice([True, True, False]), postcopy_link=draw.choice(["zmq", "direct"]),
        )  # fmt: skip
        assert report["oracle"]["ok"], (guest, report)
        assert report.get("postcopy-already-there", 0) == 0


@pytest.mark.parametrize("link", ["zmq", "direct"])
def test_two_hosts_over_tcp(link):
    with receiver("--into", "demo:", "--once") as there:
        sent = run(
            "send", f"{RANDOM}&rate=3000", there.endpoint, "--json", "--postcopy", "now",
            "--postcopy-link", link, "--max-postcopy-bandwidth", "20MB",
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        code, out, err = there.finish()
    assert code == 0, err
    arrived, report = json.loads(out), json.loads(sent.stdout)
    assert arrived["oracle"]["ok"]
    assert arrived["guest-latency"]["count"] > 0
    assert report["postcopy-latency"] > 0
    distribution = report["postcopy-latency-dist"]
    # on a busy host one may be asked for again
    assert 0 < sum(distribution) <= report["postcopy-requests"]
    percentiles = report["postcopy-latency-percentiles"]
    assert percentiles["p50"] <= percentiles["p90"] <= percentiles["p99"] <= percentiles["max"]


def test_started_by_hand(tmp_path):
    monitor = f"unix:{tmp_path}/m"
    with Running(
        "copy", "demo:?size=64M&rate=0", "demo:", "--postcopy", "manual", "--monitor", monitor,
        "--max-bandwidth", "30MB", "--max-postcopy-bandwidth", "30MB", "--json",
    ) as running:  # fmt: skip
        running.error_line("round 1")
        assert run("start-postcopy", monitor).returncode == 0
        running.error_line("postcopy")
        code, out, err = running.finish()
    assert code == 0, err
    report = json.loads(out)
    assert report["oracle"]["ok"]
    assert report["postcopy-requests"] > 0


def test_started_by_hand_where_writes_are_found_by_content(monkeypatch):
    """The round is cut short; the scan after it is not."""
    from pageferry.workers.guests.base import TRACKING_HASH
    from pageferry.workers.guests.demo import DemoSource

    attach = DemoSource._attach

    def without_tracking(self, base, descriptors):
        attach(self, base, descriptors)
        self.tracking = TRACKING_HASH

    monkeypatch.setattr(DemoSource, "_attach", without_tracking)
    asked = []

    def ask(report):
        if report["status"] == "active" and not asked:
            asked.append(True)
            started[0].start_postcopy()

    started = []
    report = pageferry.migrate(
        "demo:?size=32M&rate=0&content=random", "demo:", postcopy="manual",
        max_bandwidth=40_000_000, on_progress=ask, on_started=started.append,
    )  # fmt: skip
    assert report["dirty-tracking"] == "content-hash"
    assert report["oracle"]["ok"]
    assert "postcopy-requests" in report


def test_started_by_hand_without_having_been_prepared(tmp_path):
    monitor = f"unix:{tmp_path}/m"
    with Running(
        "copy", "demo:?size=64M", "demo:", "--monitor", monitor, "--max-bandwidth", "30MB"
    ) as running:
        running.error_line("round 1")
        refused = run("start-postcopy", monitor)
        assert refused.returncode == 2
        assert "--postcopy manual" in refused.stderr
        assert run("cancel", monitor).returncode == 0
        running.finish()


def test_pause_and_recover_from_the_command_line(tmp_path):
    monitor = f"unix:{tmp_path}/m"
    with Running(
        "copy", f"{RANDOM}&rate=1000", "demo:", "--postcopy", "now", "--monitor", monitor, "--json",
        "--max-postcopy-bandwidth", "5MB",
    ) as running:  # fmt: skip
        running.error_line("postcopy")
        refused = run("cancel", monitor)
        assert refused.returncode == 0
        assert run("pause", monitor).returncode == 0
        running.error_line("paused")
        status = run("status", monitor)
        assert "recover" in status.stdout
        assert run("set", monitor, "max-postcopy-bandwidth=0").returncode == 0
        until(lambda: run("recover", monitor).returncode == 0, "recovered")
        code, out, err = running.finish()
    assert code == 0, err
    report = json.loads(out)
    assert report["oracle"]["ok"]
    assert report["recoveries"] == 1


def test_an_image_cannot_run_before_it_is_there(tmp_path):
    (tmp_path / "a").write_bytes(bytes(8192))
    with pytest.raises(UsageError, match="can be stopped"):
        pageferry.migrate(f"image:{tmp_path}/a", f"image:{tmp_path}/b", postcopy="now")


def test_a_destination_that_does_not_run_guests_refuses(tmp_path):
    with pytest.raises(PeerRefused, match="leave --postcopy out"):
        pageferry.migrate("demo:?size=8M", f"image:{tmp_path}/b", postcopy="now")
    assert not (tmp_path / "b").exists()


def test_verify_and_postcopy_exclude_each_other():
    with pytest.raises(UsageError, match="leave one of them out"):
        pageferry.migrate("demo:?size=8M", "demo:", postcopy="now", verify=True)


def test_a_guest_that_dies_in_postcopy_ends_it():
    """The destination's guest is killed: there is nothing left to be recovered."""
    from pageferry.transport.errors import PostcopyFailed

    async def run_it():
        started = []

        def on_started(migration):
            started.append(migration)

        async def killer():
            while not started or started[0].core.status.value != "postcopy-active":
                await asyncio.sleep(0.005)
            detail = started[0].statistics.extra["destination"]
            os.kill(int(detail.split("process ")[1].rstrip(")")), signal.SIGKILL)

        task = asyncio.ensure_future(killer())
        try:
            await pageferry.migrate_async(
                f"{RANDOM}&rate=1000", "demo:", postcopy="now", on_started=on_started,
                max_postcopy_bandwidth=5_000_000,
            )  # fmt: skip
        finally:
            await task

    with pytest.raises(PostcopyFailed, match="never arrived"):
        asyncio.run(run_it())


def test_a_destination_that_is_killed_leaves_no_guest_asleep():
    """Its guest sleeps on a page that nobody sends any more: it goes all the same."""
    with receiver("--into", "demo:", "--once") as there, Running(
        "send", f"{RANDOM}&rate=2000", there.endpoint, "--postcopy", "now",
        "--max-postcopy-bandwidth", "2MB",
    ) as here:  # fmt: skip
        here.error_line("postcopy:")
        there.kill()
        pid = there.process.pid
        until(
            lambda: not [n for n in os.listdir("/dev/shm") if n.startswith(f"pageferry-{pid}-")],
            "its memory is gone",
        )
        here.error_line("paused")
        here.process.send_signal(signal.SIGINT)
        code, _, err = here.finish()
    assert code == 14
    assert "never arrived" in err
