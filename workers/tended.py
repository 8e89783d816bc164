"""Runs a command, and ends it with all that it has started when whoever wants it is gone, however
that ended. A program of its own (`python -I -S tended.py WORD…`), so it imports nothing of ours.

    coordinator ── a pipe, nothing is said ──► this: leads the session ──► the command

Its stdin is that pipe: when it closes the session gets SIGTERM, and a second later SIGKILL, this
process too. Its end is the command's: the same status, or the same signal. PR_SET_PDEATHSIG would
not do: it ends one process and not what that has started, it comes when the *thread* that started
the process ends, and to set it between fork and exec needs a parent without threads.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys

_END_SECONDS = 1.0


def main(words: list[str]) -> None:
    # the session is told to end by a signal to all of it: the command first, this after it
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
    if not any(fd == ended for fd, _ in poll.poll()):
        os.killpg(0, signal.SIGTERM)
        poll.unregister(leash)
        poll.poll(_END_SECONDS * 1000)
        os.killpg(0, signal.SIGKILL)
    _end_as(os.waitpid(pid, 0)[1])


def _end_as(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(sys.argv[1:])
