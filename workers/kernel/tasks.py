"""What /proc says of a process and its threads (proc_pid_stat(5)). Facts only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def pid_namespace() -> int:
    """Which one a pid of ours is a number in."""
    return os.stat("/proc/self/ns/pid").st_ino


def began_at(pid: int) -> str:
    """When a process began, in ticks since boot (field 22); "" if there is none. A number that is
    used again has another."""
    fields = _fields(f"/proc/{pid}/stat")
    return fields[19] if fields else ""


def lives(pid: int, began: str) -> bool:
    """Whether the process that `began_at` then has not ended: a zombie has."""
    fields = _fields(f"/proc/{pid}/stat")
    return bool(fields) and fields[19] == began and fields[0] not in "ZX"


def threads_of(pid: int) -> list[int]:
    """None of one that has ended."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return []


def is_stopped(pid: int) -> bool:
    """By a signal, or about to be: one thread has seen it."""
    return any(
        _fields(f"/proc/{pid}/task/{thread}/stat")[:1] == ["T"] for thread in threads_of(pid)
    )


def turns_of(pid: int) -> int:
    """How often its threads were given a processor (third field of /proc/PID/schedstat): the same
    number later says that none of them ran meanwhile, whoever let it go on and stopped it again. 0
    where the kernel does not count, or if it has ended."""
    turns = 0
    for thread in threads_of(pid):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            turns += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[2])
    return turns


def cpu_seconds(pid: int, threads: list[int] | None = None) -> float:
    """Processor time so far: of all of it, or of these threads that are still there."""
    paths = [f"/proc/{pid}/stat"]
    if threads is not None:
        paths = [f"/proc/{pid}/task/{thread}/stat" for thread in threads]
    spent = [_fields(path)[11:13] for path in paths]
    return sum(int(ticks) for both in spent for ticks in both) / _TICKS


def _fields(path: str) -> list[str]:
    """From the third on; none of what has ended."""
    try:
        return Path(path).read_text().rpartition(")")[2].split()
    except OSError:
        return []
