"""`--goal`: senders are parked and codecs changed while memory moves, and every byte arrives."""

import asyncio
import json

import pytest
from helpers import pageferry, pattern, same_file

from pageferry.pipeline import api, goals, steering


@pytest.fixture
def restless(monkeypatch):
    """Slices so short that a small source sees everything that there is to try, and again."""
    monkeypatch.setattr(goals, "SLICE_SECONDS", 0.002)
    monkeypatch.setattr(goals, "LEAST_PAGES", 64)
    monkeypatch.setattr(goals, "_WORTHWHILE", 0)
    monkeypatch.setattr(goals, "_HOLD", 1)
    monkeypatch.setattr(goals, "_UNLIKE", 0.0)
    monkeypatch.setattr(steering, "_FIRST_PIECE", 256)
    monkeypatch.setattr(steering, "_MOST_PIECE", 256)


@pytest.mark.parametrize("goal", goals.GOALS)
@pytest.mark.parametrize("source", ["image", "ram"])
def test_whatever_is_chosen_every_byte_arrives(tmp_path, restless, goal, source):
    """Many changes in a few hundred extents, with senders that are parked and woken."""
    path, copy = tmp_path / "vm.mem", tmp_path / "copy.mem"
    path.write_bytes(pattern(12_000))
    report = asyncio.run(
        api.migrate_async(f"{source}:{path}", f"ram:{copy}", goal=goal, workers=3, verify=True)
    )
    assert same_file(path, copy)
    assert report["status"] == "completed" and report["verified"]
    assert report["goal"] == goal
    assert 1 <= report["workers-active"] <= 3
    assert report["goal-choices"]
    assert all(c["rate"] > 0 and c["time"] >= 0 for c in report["goal-choices"])
    assert len(report["goal-choices"]) <= 32


def test_a_guest_that_writes_meanwhile_is_whole(restless):
    """The oracle of the demo guest says so."""
    report = asyncio.run(
        api.migrate_async(
            "demo:?size=48M&rate=3000&content=text", "demo:", goal="least-cpu", workers=3
        )
    )
    assert report["oracle"]["ok"]
    assert report["goal-choices"]


def test_in_postcopy_everything_is_as_it_was(restless):
    """All senders work, with the codec they were started with."""
    report = asyncio.run(
        api.migrate_async(
            "demo:?size=16M&rate=1000&content=text&access=random", "demo:", goal="least-cpu",
            workers=2, postcopy="now", codec="lz4",
        )
    )  # fmt: skip
    assert report["oracle"]["ok"]
    assert report["codec-pages"]["lz4"] > 0
    assert report["codec-pages"]["zstd"] == 0


def test_from_the_command_line_and_in_a_batch(tmp_path):
    """The same name in both."""
    path, manifest = tmp_path / "vm.mem", tmp_path / "m.json"
    path.write_bytes(pattern(1024))
    done = pageferry("copy", f"image:{path}", f"image:{tmp_path}/a.mem", "--goal", "least-wire",
                     "--json", "--quiet")  # fmt: skip
    report = json.loads(done.stdout)
    assert (report["goal"], report["codec"], report["level"]) == ("least-wire", "zstd", 3)
    item = {"source": f"image:{path}", "destination": f"image:{tmp_path}/b.mem"}
    manifest.write_text(json.dumps({"items": [item], "defaults": {"goal": "fastest"}}))
    assert pageferry("batch", str(manifest), "--quiet").returncode == 0
    assert same_file(path, tmp_path / "b.mem")
    done = pageferry("copy", f"image:{path}", f"image:{tmp_path}/a.mem", "--goal", "cheap")
    assert done.returncode == 2 and "goal is fastest" in done.stderr
