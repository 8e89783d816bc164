"""A cgroup of our own for threads of another process, with less processor time than there is.

Always below the cgroup that they are in, so that whatever holds there holds on:

* Version 2 (Documentation/admin-guide/cgroup-v2.rst, "Threads", "CPU"): a threaded cgroup. Memory
  and all else that belongs to a process stays with the cgroup above, which is a "domain threaded"
  one meanwhile; so single threads can be moved, and others that are in there are not touched.
* Version 1 (Documentation/scheduler/sched-bwc.rst): its cpu hierarchy knows of nothing but
  processor time.

Files of /proc and /sys alone; decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PERIOD_US, _LONGEST_US, _LEAST_US = 100_000, 1_000_000, 1000
# Threads that are made while others are moved: so many looks.
_LOOKS = 20
# A thread that has just left may still be counted.
_EMPTY_SECONDS, _LOOK_SECONDS = 1.0, 0.002
# Of the cpu controller in /proc/self/mountinfo: kind, source, options.
FIRST, SECOND = r"cgroup \S+ (?:\S+,)?cpu(?:,\S+)?", r"cgroup2 \S+ \S+"
_NAME = re.compile(r"pageferry-[0-9]+-[0-9a-f]{16}x?-[0-9a-f]{8}")


@dataclass(frozen=True)
class Group:
    """One cgroup, made or not. `enables`: the cgroup above did not give out processor time before
    it was made (version 2)."""

    folder: str
    version: int
    enables: bool = False

    @property
    def above(self) -> Path:
        return Path(self.folder).parent

    @property
    def _threads(self) -> str:
        return "tasks" if self.version == 1 else "cgroup.threads"

    def make(self) -> None:
        """OSError if it cannot be; then `remove`."""
        folder = Path(self.folder)
        folder.mkdir()
        if self.version == 2:
            # before cpu: a cgroup that has processes may give it out to threaded ones only
            (folder / "cgroup.type").write_text("threaded")
            if self.enables:
                (self.above / "cgroup.subtree_control").write_text("+cpu")

    def limit(self, cpus: float) -> None:
        """All that are in it get that many processors together."""
        quota, period = quota_of(cpus)
        self._set(f"{quota}", period)

    def unlimited(self) -> None:
        """At once, for whoever waits for the next period too."""
        self._set("max", _PERIOD_US)

    def _set(self, quota: str, period: int) -> None:
        folder = Path(self.folder)
        if self.version == 2:
            (folder / "cpu.max").write_text(f"{quota} {period}")
            return
        if quota == "max":
            quota = "-1"
        # the kernel has a least quota at each moment: so a longer period first
        (folder / "cpu.cfs_period_us").write_text(f"{period}")
        (folder / "cpu.cfs_quota_us").write_text(quota)

    def enter(self, thread: int) -> None:
        """OSError if it may not be moved; one that has ended needs not."""
        _move(Path(self.folder) / self._threads, thread)

    def inside(self) -> list[int]:
        """Threads that are in it."""
        try:
            return [int(line) for line in (Path(self.folder) / self._threads).read_text().split()]
        except OSError:
            return []

    def remove(self) -> None:
        """No limit, all threads where they were, and no group. Idempotent. OSError if some of it
        is left; there is no limit any more even so."""
        folder = Path(self.folder)
        if folder.is_dir():
            # it was never made as a whole: such a folder lets nobody make a file that it has not
            with contextlib.suppress(FileNotFoundError, PermissionError):
                self.unlimited()
            until = time.monotonic() + _EMPTY_SECONDS
            while not self._empty():
                if time.monotonic() > until:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self.folder)
                time.sleep(_LOOK_SECONDS)
        if self.enables and not any(path.is_dir() for path in _children(self.above)):
            with contextlib.suppress(FileNotFoundError):
                (self.above / "cgroup.subtree_control").write_text("-cpu")

    def _empty(self) -> bool:
        for thread in self.inside():
            _move(self.above / self._threads, thread)
        try:
            os.rmdir(self.folder)
        except FileNotFoundError:
            return True
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            return False
        return True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def group_of(data: dict[str, Any]) -> Group:
    """What `as_dict` made. ValueError for a folder that no pageferry makes."""
    group = Group(str(data["folder"]), int(data["version"]), bool(data["enables"]))
    if not group.folder.startswith("/") or not _NAME.fullmatch(Path(group.folder).name):
        raise ValueError(f"{group.folder} is none of ours")
    return group


def quota_of(cpus: float) -> tuple[int, int]:
    """Quota and period in microseconds: the kernel takes no quota below 1 ms, and no period above
    1 s."""
    quota = int(cpus * _PERIOD_US)
    if quota >= _LEAST_US:
        return quota, _PERIOD_US
    period = int(_LEAST_US / cpus) if cpus > 0 else _LONGEST_US
    return _LEAST_US, min(period, _LONGEST_US)


def plan(pid: int, threads: list[int], stem: str) -> dict[Group, list[int]]:
    """The groups to be made, none of them made yet, and who is to be in each; who has ended is in
    none. Their names begin with `stem`. OSError if there can be none."""
    places: dict[tuple[Path, int], list[int]] = {}
    for thread in threads:
        where = _place_of(pid, thread)
        if where is not None:
            places.setdefault(where, []).append(thread)
    found = {}
    for (above, version), inside in places.items():
        enables = version == 2 and "cpu" not in _words(above / "cgroup.subtree_control")
        folder = f"{above / stem}-{secrets.token_hex(4)}"
        found[Group(folder, version, enables)] = inside
    return found


def _place_of(pid: int, thread: int) -> tuple[Path, int] | None:
    """The cgroup below which one can be made for this thread, and its version; None if it has
    ended. OSError if there is none."""
    try:
        mine = Path(f"/proc/{pid}/task/{thread}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    mounts = Path("/proc/self/mountinfo").read_text()
    second = _folder(mounts, SECOND, re.search(r"^0::/(.*)$", mine, re.MULTILINE))
    if second is not None and "cpu" in _words(second / "cgroup.controllers"):
        return _writable(second, "cgroup.threads"), 2
    path = re.search(r"^\d+:(?:[^:\n]+,)?cpu(?:,[^:\n]+)?:/(.*)$", mine, re.MULTILINE)
    first = _folder(mounts, FIRST, path)
    if first is None:
        raise OSError(errno.ENOENT, "there is no cgroup with a processor limit")
    return _writable(first, "tasks"), 1


def _folder(mounts: str, kind: str, path: re.Match[str] | None) -> Path | None:
    # proc_pid_mountinfo(5): id, parent, device, root, mount point … - kind, source, options
    mount = re.search(rf"^\d+ \d+ \S+ / (\S+) .* - {kind}$", mounts, re.MULTILINE)
    if path is None or mount is None or ".." in path[1].split("/"):
        return None
    return Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), mount[1])) / path[1]


def _writable(folder: Path, threads: str) -> Path:
    if not os.access(folder, os.W_OK) or not os.access(folder / threads, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _move(file: Path, thread: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        file.write_text(f"{thread}")


def enter_all(groups: dict[Group, list[int]], threads_now: Callable[[], list[int]]) -> None:
    """Everybody into their groups; and who was made meanwhile by one that was still outside."""
    for group, inside in groups.items():
        for thread in inside:
            group.enter(thread)
    first = next(iter(groups))
    for _ in range(_LOOKS):
        new = set(threads_now()) - {thread for group in groups for thread in group.inside()}
        if not new:
            return
        for thread in new:
            first.enter(thread)
