"""Runs a command, and ends it with all that it has started when whoever wants it is gone, however
that ended. A program of its own (`python -I -S tended.py SECONDS WORD…`), so it imports nothing of
ours.

    coordinator ── a pipe, nothing is said ──► this: leads the session ──► the command

Its stdin is that pipe: when it closes all others of the session get SIGTERM, and SECONDS later
SIGKILL. It is the session, and not a process group, for `timeout`, and a shell with job control,
make groups of their own. Its end is the command's: the same status, or the same signal.
PR_SET_PDEATHSIG would not do: it ends one process and not what that has started, it comes when the
*thread* that started the process ends, and to set it between fork and exec needs a parent without
threads.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time

# What is killed is gone at once, but for what the kernel has it wait for.
_GONE_SECONDS, _LOOK_SECONDS = 1.0, 0.01


def main(seconds: float, words: list[str]) -> None:
    # whoever stops a service tells all of it: the command first, this after it
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    leash = os.dup(0)
    try:
        pid = os.posix_spawnp(
            words[0], words, os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT],
        )  # fmt: skip
    except OSError as e:
        sys.exit(f"cannot be run: {e.strerror}")
    ended, poll = os.pidfd_open(pid), select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(leash, select.POLLIN)
    if any(fd == ended for fd, _ in poll.poll()):
        _end_as(os.waitpid(pid, 0)[1])
    _signal_others(signal.SIGTERM)
    poll.unregister(leash)
    poll.poll(seconds * 1000)
    until = time.monotonic() + _GONE_SECONDS
    while _signal_others(signal.SIGKILL) and time.monotonic() < until:  # one may just have forked
        time.sleep(_LOOK_SECONDS)
    os._exit(1)  # nobody asks


def _signal_others(number: int) -> int:
    """To all of this session but us that have not ended; how many there are."""
    session, found = str(os.getsid(0)), 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or became another user's
            with open(f"/proc/{name}/stat", errors="replace") as file:
                state, _, _, theirs = file.read().rpartition(")")[2].split()[:4]
            if theirs == session and state not in "ZX":
                found += 1
                os.kill(int(name), number)
    return found


def _end_as(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL, and what the C library keeps for itself
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])  # we may have been given that
            os.kill(os.getpid(), number)
        os._exit(128 + number)  # whatever happens: it is no success
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
