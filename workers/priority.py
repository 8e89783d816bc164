"""Real-time priority, where it is permitted, for the processes that a sleeping guest waits for."""

from __future__ import annotations

import contextlib
import gc
import os

# Above everything ordinary, below what the kernel and audio set for themselves.
FIFO_PRIORITY = 50
_NICE = -15
# Background of a postcopy: whoever else wants the processor goes first.
BACKGROUND_NICE = 10
# As counters carry it.
NORMAL, NICE, FIFO = 0, 1, 2
NAMES = {NORMAL: "normal", NICE: f"nice {_NICE}", FIFO: f"SCHED_FIFO {FIFO_PRIORITY}"}


def become_urgent() -> int:
    """Raise this thread's priority as far as it goes: FIFO, NICE or NORMAL. Threads that it starts
    afterwards inherit it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
        return FIFO
    except (OSError, AttributeError):
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
        return NICE
    except OSError:
        return NORMAL


def become_background() -> None:
    """Let others go first. For good: without CAP_SYS_NICE there is no way back."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, BACKGROUND_NICE)


def collect_seldom() -> None:
    """Python's collector stops everything for milliseconds: what is there now is no garbage, and
    what serves faults makes hardly any."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
