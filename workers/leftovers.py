"""What processes of ours that were killed have left, found and removed; never what a live one has.

Whether an owner is dead: names.py. What belongs to another user is left alone. Of a directory of
images: hidden files that never got their name go, those that a next attempt would go on with are
shown, and go only if that is asked for. Processes that one of ours stopped, and nobody let go on
since, are shown: whether they may go on is not for this to know, unless they were only to be saved.
Those, and who was slowed down (throttled.py), run here and nowhere else: they go on. Those whose
memory was given back are shown too, until they have ended (hollow.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hollow import HOLLOW, what_is_hollow
from .kernel.libc import lock_file
from .kernel.tasks import began_at, pid_namespace, turns_of
from .names import SHARED_MEMORY, notes
from .throttled import THROTTLED, lift_what_was_left

_SHARED = re.compile(r"(pageferry-\d+-[0-9a-f]{16})(?:-[0-9a-f]+-(\w+))?")
_SEMAPHORE = re.compile(r"sem\.(pageferry-\d+-[0-9a-f]{16})(-\w+)")
_FOLDER = re.compile(r"\.?pageferry-\d+-[0-9a-f]{16}")
_PARTIAL = re.compile(r"\.(.+)\.pageferry-part")
_UNNAMED = re.compile(r"\..+\.[0-9a-f]{8}\.pageferry|\.pageferry-report-[0-9a-f]{16}")
# A file that is about to get its name is there for milliseconds; so is a folder, and a report's
# part.
_MOMENT_SECONDS = 3600.0
STOPPED = "stopped"
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass
class Leftover:
    """`kind`: marker, segment, semaphore, folder, unnamed, partial, stopped, throttled or hollow.
    `size`: bytes on disk or in memory; `age`: seconds since it was last written. `removed`; else
    `why` it is kept."""

    path: str
    kind: str
    what: str = ""
    size: int = 0
    age: float = 0.0
    removed: bool = False
    why: str = ""


def sweep() -> list[Leftover]:
    """At a start: all that is certainly dead, and what a person must know (`hollow`, which is
    kept). Never raises."""
    try:
        found = [*_shared_memory(True), *_folders(True)]
    except OSError:
        return []
    return [one for one in found if one.removed or one.kind == HOLLOW]


def clean(directories: list[str], *, partial: bool, dry_run: bool) -> list[Leftover]:
    """All of this host and of `directories` of images; `partial`: also what a next attempt would
    go on with. With `dry_run` nothing is removed: `removed` says what would be. OSError for a
    directory that cannot be read."""
    found = [*_shared_memory(not dry_run), *_folders(not dry_run)]
    for directory in directories:
        found += _images(directory, not dry_run, partial)
    return found


# ---- shared memory -----------------------------------------------------------------------------


def _shared_memory(act: bool) -> Iterator[Leftover]:
    owners: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(os.listdir(SHARED_MEMORY)):
        if match := _SHARED.fullmatch(name) or _SEMAPHORE.fullmatch(name):
            owners.setdefault(match[1], []).append((name, match[2] or ""))
    for marker, names in owners.items():
        with _held_if_dead(f"{SHARED_MEMORY}/{marker}") as dead:
            if dead:
                # the marker goes last: who comes in between finds what it finds dead as well
                for name, what in sorted(names, key=lambda row: row[0] == marker):
                    if (found := _one_shared(name, what, act)) is not None:
                        yield found


def _one_shared(name: str, what: str, act: bool) -> Leftover | None:
    kind = "semaphore" if name.startswith("sem.") else "segment" if what else "marker"
    found = _look(f"{SHARED_MEMORY}/{name}", kind, what if kind == "segment" else "")
    if found is not None and what == STOPPED and _still_stopped(found, act):
        return found
    if found is not None and what == HOLLOW and (why := what_is_hollow(found.path)):
        found.kind, found.what, found.why = HOLLOW, "", why
        return found
    if found is not None and what == THROTTLED:
        found.kind, found.what = THROTTLED, ""
        found.why, found.removed = lift_what_was_left(found.path, act=act)
        return found
    return _removed(found, act)


@contextlib.contextmanager
def _held_if_dead(path: str) -> Iterator[bool]:
    """Whether the owner of this marker, or folder, is dead; if so it is locked meanwhile. One that
    is not there: nobody can have a name of it any more."""
    try:
        # another user's is not even opened: it may be a pipe, or leased, and hold up who does
        mine = os.lstat(path).st_uid == os.geteuid()
        fd = os.open(path, _LOOK) if mine else -1
    except FileNotFoundError:
        yield True
        return
    except OSError:
        mine, fd = False, -1
    if fd < 0:
        yield False
        return
    try:
        try:
            dead = os.fstat(fd).st_uid == os.geteuid() and lock_file(fd)
        except OSError:  # a file system without locks
            dead = False
        yield dead
    finally:
        os.close(fd)


def _still_stopped(found: Leftover, act: bool) -> bool:
    """Whether the process that a note names still stands still; `found` says so then. One that was
    to be saved and nothing else runs here and nowhere else: with `act` it goes on, unless somebody
    has let it go on before, and stopped it again for reasons of his own (it may have moved)."""
    try:
        note = json.loads(Path(found.path).read_text())
        pid, began = int(note["pid"]), str(note["began"])
        if note["namespace"] != pid_namespace():
            found.why = f"process {pid} of another pid namespace was stopped: look there"
            return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    folder = str(note.get("folder", ""))
    if began_at(pid) != began or not _stands_still(pid, folder):
        return False
    found.kind, found.what = STOPPED, ""
    if is_its_stop(note) and (not act or _let_go_on(pid, began, folder)):
        found.why = f"process {pid} was stopped to be saved, and goes on"
        return False
    how = note.get("folder") or "SIGSTOP"
    way = f"echo 0 > {how}/cgroup.freeze" if note.get("folder") else f"kill -CONT {pid}"
    found.why = (
        f"process {pid} was stopped ({how}) by a pageferry that was killed, and still stands "
        f"still: if its memory is not in use elsewhere, `{way}` lets it go on"
    )
    return True


def _let_go_on(pid: int, began: str, folder: str) -> bool:
    """Undo what `stop` did (guests/stopping.py); False if we may not."""
    try:
        if folder:
            Path(folder, "cgroup.freeze").write_text("0")
            return True
        pidfd = os.pidfd_open(pid)
        try:
            if began_at(pid) == began:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        finally:
            os.close(pidfd)
    except ProcessLookupError:
        pass  # it has ended
    except OSError:
        return False
    return True


def _stands_still(pid: int, folder: str) -> bool:
    try:
        if folder:
            return "frozen 1" in Path(folder, "cgroup.events").read_text()
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def stopped_note(pid: int, folder: str, *, stays: bool, turns: int) -> str:
    """What is noted of a process that is about to be stopped; `folder`: of the cgroup that is
    frozen, "" for SIGSTOP; `stays`: whatever comes, it goes on here; `turns`: of one that stands
    still by now (turns_of), else 0."""
    facts = {
        "pid": pid, "began": began_at(pid), "namespace": pid_namespace(), "folder": folder,
        "stays": stays, "turns": turns,
    }  # fmt: skip
    return json.dumps(facts)


def is_its_stop(note: dict[str, Any]) -> bool:
    """Whether a process that stands still does so for whoever wrote this note of it, to save it and
    no more: it has not run since."""
    turns = note.get("turns")
    return bool(note.get("stays") and turns) and turns == turns_of(int(note["pid"]))


def stopped_to_be_saved(pid: int) -> str:
    """The note of whoever has this process, which stands still, do so to save it, alive or not; ""
    if nobody does."""
    same = {"pid": pid, "began": began_at(pid), "namespace": pid_namespace()}
    return next(
        (path for path, note in notes(STOPPED, pid) if same.items() <= note.items()
         and is_its_stop(note)), "",
    )  # fmt: skip


# ---- folders and images ------------------------------------------------------------------------


def _folders(act: bool) -> Iterator[Leftover]:
    where = tempfile.gettempdir()
    for name in sorted(os.listdir(where)):
        if not _FOLDER.fullmatch(name):
            continue
        path = os.path.join(where, name)
        if name.startswith("."):
            # It may be about to be locked: whoever tried its lock would be in the way.
            found = _look(path, "folder")
            if found is None or found.age < _MOMENT_SECONDS:
                continue
        with _held_if_dead(path) as dead:
            found = _look(path, "folder") if dead else None
            if found is not None:
                yield from _some(_removed(found, act))


def _images(directory: str, act: bool, partial: bool) -> Iterator[Leftover]:
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if (match := _PARTIAL.fullmatch(name)) is not None:
            yield from _some(_partial(path, match[1], act and partial, partial))
        elif _UNNAMED.fullmatch(name):
            with _held_if_dead(path) as dead:
                found = _look(path, "unnamed") if dead else None
                if found is not None and found.age > _MOMENT_SECONDS:
                    yield from _some(_removed(found, act))


def _partial(path: str, image: str, act: bool, wanted: bool) -> Leftover | None:
    """Whoever receives it holds its lock (files.py), and looks whether it still has its name when
    it has got that."""
    with _held_if_dead(path) as dead:
        found = _look(path, "partial", image)
        if found is None:
            return None
        if not dead:
            found.why = "it is being received"
        elif not wanted:
            found.why = "the next attempt goes on with it; --partial removes it"
        else:
            found.removed = True
            return _removed(found, act)
    return found


def _look(path: str, kind: str, what: str = "") -> Leftover | None:
    """None for what is gone, or another user's."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    if status.st_uid != os.geteuid():
        return None
    size = status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return Leftover(path, kind, what, size, max(0.0, time.time() - status.st_mtime))


def _removed(found: Leftover | None, act: bool) -> Leftover | None:
    """Remove it, if it is to be acted."""
    if found is None:
        return None
    found.removed = True
    try:
        if act and os.path.isdir(found.path) and not os.path.islink(found.path):
            shutil.rmtree(found.path)
        elif act:
            os.unlink(found.path)
    except FileNotFoundError:
        return None  # somebody else was quicker
    except OSError as e:
        found.removed, found.why = False, f"cannot be removed: {e.strerror}"
    return found


def _some(found: Leftover | None) -> Iterator[Leftover]:
    if found is not None:
        yield found


def as_dict(found: Leftover) -> dict[str, Any]:
    """For programs."""
    return {
        "path": found.path, "kind": found.kind, "what": found.what, "size": found.size,
        "age": round(found.age), "removed": found.removed, "why": found.why,
    }  # fmt: skip
