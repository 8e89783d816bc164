"""Real-time priority, where it is permitted, for the processes that a sleeping guest waits for."""

from __future__ import annotations

import contextlib
import gc
import os

from .kernel.libc import set_nice_and_slice

# Above everything ordinary, below what the kernel and audio set for themselves.
FIFO_PRIORITY = 50
# Of who carries their pages, and bulk as well: below them, so that it is never in their way.
CARRIER_PRIORITY = FIFO_PRIORITY - 1
_NICE = -15
# Background of a postcopy: whoever else wants the processor goes first.
BACKGROUND_NICE = 10
# Longer than anybody's by default: who wakes with a shorter one takes the processor at once instead
# of waiting for a slice of the background's to end (EEVDF's PREEMPT_SHORT). Nobody gets less of it.
_BACKGROUND_SLICE_NS = 10_000_000
# As counters carry it.
NORMAL, NICE, FIFO = 0, 1, 2
NAMES = {NORMAL: "normal", NICE: f"nice {_NICE}", FIFO: f"SCHED_FIFO {FIFO_PRIORITY}"}


def become_urgent(priority: int = FIFO_PRIORITY) -> int:
    """Raise this thread's priority as far as it goes: FIFO, NICE or NORMAL. Threads that it starts
    afterwards inherit it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        return FIFO
    except (OSError, AttributeError):
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
        return NICE
    except OSError:
        return NORMAL


def become_background() -> None:
    """Let others go first, with all threads that there are. For good: without CAP_SYS_NICE there
    is no way back."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended; the slice is no one's to refuse
            set_nice_and_slice(int(thread), BACKGROUND_NICE, _BACKGROUND_SLICE_NS)


def collect_seldom() -> None:
    """Python's collector stops everything for milliseconds: what is there now is no garbage, and
    what serves faults makes hardly any."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
