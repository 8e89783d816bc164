"""`--codec xbzrle` over whole migrations: what it makes possible, and that every byte is right."""

import json
import resource

from helpers import Running, ask, until
from helpers import pageferry as run

import pageferry
from pageferry.workers.page_cache import PageCache


def test_a_larger_cache_makes_it_converge(tmp_path):
    """The guest writes all of its memory again in each round, which takes 0.8 s at this rate and
    may take 0.2 s. A quarter of it as deltas is no help; all of it is."""
    monitor = f"unix:{tmp_path}/m"
    moving = Running(
        "copy", "demo:?size=8M&rate=40000&changes=8", "demo:", "--codec", "xbzrle",
        "--xbzrle-cache-size", "2M", "--max-bandwidth", "10MB", "--max-rounds", "10000",
        "--downtime-limit", "200ms", "--monitor", monitor, "--json", "--quiet",
    )  # fmt: skip
    with moving:
        until((tmp_path / "m").exists, "the monitor is there")

        def cache():
            return ask(monitor, "query-migrate").get("xbzrle-cache", {"pages": 0, "cache-miss": 0})

        until(lambda: cache()["pages"] >= 512 and cache()["cache-miss"] >= 1024, "deltas, and none")
        assert cache()["cache-size"] == 2 << 20
        assert ask(monitor, "query-migrate-parameters")["xbzrle-cache-size"] == 2 << 20
        refused = run("set", monitor, "xbzrle-cache-size=1K")
        assert refused.returncode == 2 and "xbzrle-cache-size" in refused.stderr
        assert run("set", monitor, "xbzrle-cache-size=64M").returncode == 0
        code, out, err = moving.finish()
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["oracle"]["ok"]
    cache = report["xbzrle-cache"]
    assert cache["cache-size"] == 64 << 20
    assert cache["pages"] >= 2048 and cache["overflow"] == 0
    assert report["codec-pages"]["xbzrle"] == cache["pages"]
    assert report["codec-pages"]["none"] + cache["pages"] == report["ram"]["normal"]
    assert cache["bytes"] < 64 * cache["pages"]


def test_pages_written_all_over_overflow_and_travel_whole():
    """By the other codec."""
    report = pageferry.migrate(
        "demo:?size=16M&rate=20000&changes=4096&content=random", "demo:", codec="xbzrle+lz4",
        max_bandwidth=80_000_000, verify=True,
    )  # fmt: skip
    assert report["oracle"]["ok"]
    cache = report["xbzrle-cache"]
    assert cache["overflow"] > 0
    # those that were as they had been sent: written after the look, and before they were read
    assert report["codec-pages"]["xbzrle"] == cache["pages"] - cache["overflow"]


def test_no_deltas_in_a_postcopy(monkeypatch):
    """Rounds with, then pages that were discarded; and the cache's memory is given back."""
    dropped = []
    monkeypatch.setattr(
        PageCache,
        "drop",
        lambda self, drop=PageCache.drop: dropped.append(self.slots) or drop(self),
    )
    report = pageferry.migrate(
        "demo:?size=16M&rate=40000&changes=64&content=text", "demo:", codec="xbzrle+zstd",
        postcopy="after=2", max_bandwidth=40_000_000, downtime_limit=0.001,
    )  # fmt: skip
    assert report["oracle"]["ok"]
    assert report["codec-pages"]["xbzrle"] > 0
    assert report["postcopy-requests"] > 0 or report["ram"]["dirty-sync-count"] >= 2
    assert dropped == [4096]


def test_a_postcopy_goes_on_where_the_cache_cannot_be_given_back(monkeypatch, caplog):
    """At that moment no file can be opened: what is not needed is no reason to pause."""

    def starved(self, drop=PageCache.drop):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            yield from drop(self)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    monkeypatch.setattr(PageCache, "drop", starved)
    report = pageferry.migrate(
        "demo:?size=16M&rate=40000&changes=64&content=text", "demo:", codec="xbzrle+zstd",
        postcopy="after=2", max_bandwidth=40_000_000, downtime_limit=0.001,
    )  # fmt: skip
    assert report["oracle"]["ok"] and "recoveries" not in report
    assert "Too many open files" in caplog.text


def test_an_image_is_sent_once(tmp_path):
    """Nothing of it was sent before, and no cache is made."""
    (tmp_path / "vm.mem").write_bytes(bytes(range(256)) * 4096)
    report = pageferry.migrate(
        f"image:{tmp_path}/vm.mem", f"image:{tmp_path}/copy.mem", codec="xbzrle+zstd"
    )
    assert "xbzrle-cache" not in report
    assert report["codec-pages"]["zstd"] == 256
    assert (tmp_path / "copy.mem").read_bytes() == (tmp_path / "vm.mem").read_bytes()
