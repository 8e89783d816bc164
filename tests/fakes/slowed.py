"""Whether a process is slowed down, seen from outside."""

import os
from pathlib import Path

from helpers import until

from pageferry.workers.kernel import cpu_quota
from pageferry.workers.kernel.tasks import cpu_seconds, is_stopped, threads_of


def why_no_quota(pid):
    """Why no cgroup can be made for it; "" if one can."""
    try:
        cpu_quota.plan(pid, [pid], "pageferry-1-0123456789abcdef")
    except OSError as e:
        return f"no cgroup can be made for it: {e}"
    return ""


def used(pid, seconds):
    """Wait until it has had so much more of a processor."""
    before = cpu_seconds(pid)
    until(lambda: cpu_seconds(pid) >= before + seconds, "it runs")


def notes():
    return [name for name in os.listdir("/dev/shm") if name.endswith("-throttled")]


def is_free(pid):
    """Nothing is left of it."""
    assert notes() == []
    groups = [Path(f"/proc/{pid}/task/{task}/cgroup").read_text() for task in threads_of(pid)]
    assert "pageferry-" not in "".join(groups)
    until(lambda: not is_stopped(pid), "it goes on")
    used(pid, 0.03)
    return True
