"""A cgroup v2 for a test: made below this process's own, gone afterwards."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from helpers import until

from pageferry.workers.kernel.freezer import cgroup_of


@contextlib.contextmanager
def own_cgroup(name="a"):
    """The folder of a new cgroup; skips where there can be none. Who is still in it is killed."""
    parent = cgroup_of(os.getpid())
    if parent is None:
        pytest.skip("needs cgroup v2 mounted")
    folder = parent / f"pageferry-{os.getpid()}-{name}"
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"needs a cgroup of its own: {e.strerror}")
    try:
        if not (folder / "cgroup.freeze").exists():
            pytest.skip("needs a cgroup freezer (Linux 5.2)")
        yield folder
    finally:
        remove(folder)


def enter(folder: Path, pid: int) -> None:
    """Put a process into a cgroup."""
    (folder / "cgroup.procs").write_text(str(pid))


def remove(folder: Path) -> None:
    """With all that are in it; they need a moment to end."""

    def gone():
        with contextlib.suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            folder.rmdir()
        return not folder.exists()

    until(gone, "the cgroup is empty")
