"""The note of a process that is slowed down, and how it gets all of its time back, whoever is still
there to see to that.

A note is a name in shared memory (names.py), written before anything is done to the process and
removed when nothing of it is left. In this order a guest that is to stand still, because it moves,
never has one: `stop` lifts first. So whoever finds one of an owner that is dead may let the process
go on.

Lifted it is, in this order: by who slows it (slower.py), when told to or when the coordinator is
gone; by the coordinator, if that one is gone; by a sweep, if both are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kernel.cpu_quota import Group, group_of
from .kernel.tasks import began_at, is_stopped, pid_namespace
from .names import SHARED_MEMORY, notes, shared_name

THROTTLED = "throttled"


@dataclass(frozen=True)
class Note:
    """Process `pid`, and when it `began`. `groups`: of processor time; none: by signals."""

    path: str
    pid: int
    began: str
    groups: tuple[Group, ...] = ()

    def write(self) -> None:
        """OSError if it cannot be: then nothing may be done to the process."""
        facts: dict[str, Any] = {
            "pid": self.pid, "began": self.began, "namespace": pid_namespace(),
            "groups": [group.as_dict() for group in self.groups],
        }  # fmt: skip
        with open(self.path, "x") as file:
            json.dump(facts, file)

    def lift(self) -> None:
        """All of its time is the process's, and the note is gone. Idempotent. OSError if something
        is left: the note is there then."""
        errors: list[OSError] = []
        for group in self.groups:
            try:
                group.remove()
            except OSError as e:
                errors.append(e)
        if not self.groups:
            self._go_on()
        if errors:
            raise errors[0]
        # if this fails somebody would take it for true when the process stands still for good
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _go_on(self) -> None:
        """SIGCONT, to that process and no other that got its number."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return
        try:
            if began_at(self.pid) == self.began and is_stopped(self.pid):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)


def note_of(pid: int, groups: tuple[Group, ...] = ()) -> Note:
    """A new one, not written yet."""
    return Note(f"{SHARED_MEMORY}/{shared_name(THROTTLED)}", pid, began_at(pid), groups)


def stopped_now_and_then(pid: int) -> str:
    """The note of whoever has this process stand still for moments, to slow it down; "" if nobody
    does. Of two that stop it one would take the other's moment for its own."""
    same = {"pid": pid, "began": began_at(pid), "namespace": pid_namespace(), "groups": []}
    return next((path for path, facts in notes(THROTTLED, pid) if facts == same), "")


def lift_what_was_left(path: str, *, act: bool) -> tuple[str, bool]:
    """For a note whose owner is dead: what it was, and whether nothing is left of it. Without `act`
    nothing is done."""
    try:
        facts = json.loads(Path(path).read_text())
        groups = tuple(group_of(data) for data in facts["groups"])
        note = Note(path, int(facts["pid"]), str(facts["began"]), groups)
        elsewhere = facts["namespace"] != pid_namespace()
    except FileNotFoundError:
        return "", True
    except (OSError, ValueError, KeyError, TypeError):
        # it was being written: nothing had been done yet
        if act:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return "", True
    if elsewhere:
        return f"process {note.pid} of another pid namespace was slowed down: look there", False
    if act:
        try:
            note.lift()
        except OSError as e:
            return f"process {note.pid} is still slowed down: {e.strerror} ({e.filename})", False
    return f"process {note.pid} was slowed down, and has all of its time again", True
