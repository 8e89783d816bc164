"""What a process costs: its own memory, its processor time."""

from __future__ import annotations

import time


def own_memory(pid: int | str = "self") -> int:
    """Anonymous memory of this process, or of another, bytes (RssAnon in /proc/self/status).

    Guest memory that a process maps is not its own: the resident set would count it again
    in every worker.
    """
    with open(f"/proc/{pid}/status", "rb") as f:
        for line in f:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


class _Account:
    """Of this process."""

    before = 0  # processor time, ns, that belongs to jobs which have ended


def cpu_ns() -> int:
    """Processor time of this process, its threads included; where it has had other jobs, since the
    last of them ended."""
    return time.process_time_ns() - _Account.before


def count_from_here() -> None:
    """A job has ended: what is used from now on belongs to the next."""
    _Account.before = time.process_time_ns()


def cpu_ns_of(pid: int) -> int:
    """Of another process, all of it, to the nanosecond and now; 0 if it is gone. Its clock is
    ~pid << 3 | CPUCLOCK_SCHED (clock_getcpuclockid(3), <linux/posix-timers.h>)."""
    try:
        return time.clock_gettime_ns(~pid << 3 | 2)
    except OSError:
        return 0
