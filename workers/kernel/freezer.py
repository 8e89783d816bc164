"""The cgroup v2 freezer of a process: which it is, whether it is on, on and off.

Documentation/admin-guide/cgroup-v2.rst, "Core Interface Files". Files of /proc and /sys alone;
decides nothing. A frozen process is stopped without a signal: its parent does not hear of it,
SIGCONT does not let it go on, and SIGKILL ends it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from pathlib import Path

# The kernel tells of a change at most every 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV): so we look too.
_LOOK_MS = 1


def cgroup_of(pid: int) -> Path | None:
    """The folder of the cgroup v2 that process `pid` is in; None if it cannot be seen here."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return None
    path = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    # proc_pid_mountinfo(5): id, parent, device, root, mount point, options … - kind, …
    mount = re.search(r"^\d+ \d+ \S+ / (\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    if path is None or mount is None or ".." in path[1].split("/"):
        return None
    folder = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), mount[1])) / path[1]
    return folder if folder.is_dir() else None


def is_frozen(pid: int) -> bool:
    """Whether it stands still because its cgroup is frozen, or one above that."""
    folder = cgroup_of(pid)
    return folder is not None and _frozen(_read(folder / "cgroup.events"))


def freezer_of(pid: int) -> Freezer | None:
    """One that stops process `pid` and nothing else; None if there is none, or we may not."""
    folder = cgroup_of(pid)
    if folder is None or not os.access(folder / "cgroup.freeze", os.W_OK):
        return None  # the root cgroup has none
    freezer = Freezer(folder, pid)
    return freezer if freezer.is_its_own() else None


class Freezer:
    """The freezer of the cgroup at `folder`, of process `pid`."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        self.pid = pid

    def __repr__(self) -> str:
        return f"<Freezer {self.folder}>"

    def is_its_own(self) -> bool:
        """Whether nobody else is in this cgroup, or below it."""
        return _read(self.folder / "cgroup.procs").split() == [str(self.pid)] and not any(
            path.is_dir() for path in self.folder.iterdir()
        )

    def freeze(self, seconds: float) -> None:
        """Every thread stands still when this returns. OSError if it may not be; TimeoutError
        after `seconds`: it may still freeze then, so `thaw`."""
        events = os.open(self.folder / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            (self.folder / "cgroup.freeze").write_text("1")
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            until = time.monotonic() + seconds
            while not _frozen(os.pread(events, 4096, 0).decode()):
                if time.monotonic() > until:
                    raise TimeoutError(f"{self.folder} does not freeze")
                poll.poll(_LOOK_MS)
        finally:
            os.close(events)

    def thaw(self) -> None:
        """It goes on; without effect if the cgroup is gone."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self.folder / "cgroup.freeze").write_text("0")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a threaded cgroup lists no processes; or it is gone
        return ""


def _frozen(events: str) -> bool:
    return "frozen 1" in events
