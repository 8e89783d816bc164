"""The Python interface as a host tool uses it."""

import asyncio
import subprocess
import sys

import pytest
from helpers import pattern

import pageferry


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "vm.mem"
    path.write_bytes(pattern(4000))
    return path


def test_six_lines_in_a_script_without_a_main_guard(image, tmp_path):
    """A script is not run again by the workers it causes."""
    script = tmp_path / "tool.py"
    script.write_text(f"""
print("once")
import pageferry
report = pageferry.migrate("image:{image}", "image:{tmp_path}/copy.mem", codec="zstd", verify=True)
print(report["status"], report["wire-bytes"] < report["ram"]["total"])
""")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "once\ncompleted True\n"


def test_progress_and_cancel(tmp_path):
    """Progress arrives while it runs; the migration object can be steered and cancelled."""
    seen, migration = [], []

    def on_progress(report):
        seen.append(report)
        if len(seen) == 2:
            assert migration[0].query()["status"] == "active"
            migration[0].cancel()

    with pytest.raises(pageferry.PageferryError) as caught:
        pageferry.migrate(
            "demo:?size=64M&rate=0", "demo:", max_bandwidth=5_000_000,
            on_progress=on_progress, on_started=migration.append,
        )  # fmt: skip
    assert caught.value.exit_code == 130
    assert caught.value.data["report"]["status"] == "cancelled"
    assert seen[-1]["status"] == "cancelled"


def test_two_at_once(image, tmp_path):
    """Two migrations in one event loop do not disturb each other."""

    async def both():
        return await asyncio.gather(
            pageferry.migrate_async(f"image:{image}", f"image:{tmp_path}/a", workers=1),
            pageferry.migrate_async("demo:?size=16M", "demo:", workers=1),
        )

    first, second = asyncio.run(both())
    assert first["status"] == second["status"] == "completed"
    assert second["oracle"]["ok"]
    assert (tmp_path / "a").read_bytes() == image.read_bytes()


def test_a_cancelled_task_leaves_nothing(tmp_path):
    """Host tooling cancels tasks: the guest goes, its processes with it."""

    async def start_and_cancel():
        begun = asyncio.Event()
        task = asyncio.ensure_future(pageferry.migrate_async(
            "demo:?size=64M&rate=0", f"image:{tmp_path}/o", max_bandwidth=5_000_000,
            on_progress=lambda report: begun.set(),
        ))  # fmt: skip
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(start_and_cancel())
    assert not (tmp_path / "o").exists()


def test_unknown_parameter():
    with pytest.raises(TypeError, match="speed"):
        pageferry.migrate("demo:", "demo:", speed=9)
    with pytest.raises(pageferry.PageferryError, match="workers"):
        pageferry.migrate("demo:", "demo:", workers=1000)


def test_memory_onto_itself_is_refused(image):
    with pytest.raises(pageferry.PageferryError, match="same memory"):
        pageferry.migrate(f"ram:{image}", f"ram:{image}")
