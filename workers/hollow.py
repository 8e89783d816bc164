"""The note of a guest whose memory is given back while it stands still (release.py): written before
the first page goes, removed when all of it has arrived.

If its coordinator is killed in between, or the postcopy is given up, nothing else says for long
that this guest has holes where its memory was, and a person may take it for one that was merely
stopped. So whoever finds the note of an owner that is dead says so for as long as that process is
there (leftovers.py), and nobody moves it again. Knows no memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from .kernel.tasks import began_at, lives, pid_namespace
from .names import SHARED_MEMORY, notes, shared_name

HOLLOW = "hollow"


class HollowNote:
    """That of process `pid`; with 0 there is none, for nothing of the guest outlives us."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._path = ""

    def write(self) -> None:
        """OSError if it cannot be: then nothing may be given back. Idempotent."""
        if not self._pid or self._path:
            return
        path = f"{SHARED_MEMORY}/{shared_name(HOLLOW)}"
        facts = {"pid": self._pid, "began": began_at(self._pid), "namespace": pid_namespace()}
        try:
            with open(path, "x") as file:
                json.dump(facts, file)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(path)
            e.filename = path  # where it was not opening that failed it has none
            raise
        self._path = path

    def drop(self) -> None:
        """Idempotent."""
        path, self._path = self._path, ""
        with contextlib.suppress(OSError):
            if path:
                os.unlink(path)


def hollow_note(pid: int) -> str:
    """The note of whoever gave memory of this process back, alive or not; "" if nobody did."""
    same = {"pid": pid, "began": began_at(pid), "namespace": pid_namespace()}
    return next((path for path, facts in notes(HOLLOW, pid) if facts == same), "")


def what_is_hollow(path: str) -> str:
    """For a note whose owner is dead: what must not be done with the process that it names; "" if
    that has ended, or the note was just being written and nothing had been given back yet."""
    try:
        facts = json.loads(Path(path).read_text())
        pid, began = int(facts["pid"]), str(facts["began"])
        elsewhere = facts["namespace"] != pid_namespace()
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if elsewhere:
        return f"memory of process {pid} of another pid namespace was given back: look there"
    if not lives(pid, began):
        return ""
    return (
        f"the guest in process {pid} was moving when its pageferry ended, and part of its "
        f"memory was given back (--release-ram): its memory is incomplete, so it must not be "
        f"resumed: end it (`kill {pid}`)"
    )
