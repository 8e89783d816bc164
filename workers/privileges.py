"""Becoming an ordinary user for good (`--user`), and what of root's a migration needs afterwards.

Changes this process and nothing else: whoever calls it has started no process yet. Knows nothing of
guests and links.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..transport.errors import HostLacks, SourceError, UsageError
from .kernel.libc import forbid_new_privileges
from .priority import FIFO_PRIORITY

_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


@dataclass(frozen=True)
class User:
    """Who to become. `groups`: all of them, the first one too."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def prepare() -> None:
    """Before there are threads, which have this each for themselves: no program that is executed
    from now on gains anything."""
    forbid_new_privileges()


def find_user(text: str) -> User:
    """NAME or NAME:GROUP, names or numbers. UsageError if there is no such user, or if it is one
    who could take back what was given up."""
    name, colon, group = text.partition(":")
    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise UsageError(f"--user: there is no user {name[:80]!r} on this host") from None
    try:
        gid = found.pw_gid
        if colon:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        groups = os.getgrouplist(found.pw_name, gid)
    except (KeyError, OverflowError):
        raise UsageError(f"--user: there is no group {group[:80]!r} on this host") from None
    if found.pw_uid == 0 or 0 in groups:
        raise UsageError(f"--user {text[:80]}: that is root, or of its group: name another user")
    return User(found.pw_name, found.pw_uid, gid, tuple(sorted(set(groups))))


def become(user: User) -> None:
    """This process, all its threads, and whatever it starts from now on, are `user` without any
    capability, for good. Nothing if that is who we are. UsageError if we may not; HostLacks if
    something of before is left, or the user cannot run pageferry.

    Not dumpable afterwards (prctl(2)): another process of the user does not read the secret keys
    that are in here. Workers, which have none, are new programs, and dumpable.
    """
    prepare()
    if os.getresuid() != (user.uid,) * 3:
        if os.geteuid() != 0:
            raise UsageError(f"--user {user.name} needs root: start it as root, or as {user.name}")
        _leave_priority()
        try:
            # in this order: who is not root any more may change no group
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        except OSError as e:
            raise HostLacks(f"cannot become {user.name}: {e.strerror}") from e
        if kept := _what_is_left(user):
            raise HostLacks(f"--user {user.name}: {kept}: it is not safe to go on")
    _can_run(user)


def become_after_attach(user: User) -> Callable[[int], None]:
    """What becomes `user` when that is called with the process that was attached to, for which root
    was needed. From then on it is looked at, and stopped, as the user: UsageError if it is
    another's."""
    prepare()

    def attached(process: int) -> None:
        try:
            found = os.stat(f"/proc/{process}")
        except OSError as e:
            raise SourceError(f"there is no process {process}") from e
        # what it maps is read by whoever has its group too, and nobody else (ptrace(2))
        if (found.st_uid, found.st_gid) != (user.uid, user.gid):
            raise UsageError(
                f"--user {user.name}: process {process} is uid {found.st_uid}'s, gid "
                f"{found.st_gid}, and is read and stopped until the end: name its user and group "
                f"(--user {found.st_uid}:{found.st_gid}), or leave --user out"
            )
        become(user)

    return attached


def _leave_priority() -> None:
    """Who answers page faults may still raise its priority."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_RTPRIO, (FIFO_PRIORITY, FIFO_PRIORITY))


def _what_is_left(user: User) -> str:
    """What of before is still there, or can be had back; "" if nothing."""
    ids = os.getresuid() + os.getresgid()
    if ids != (user.uid,) * 3 + (user.gid,) * 3 or set(os.getgroups()) - set(user.groups):
        return "a user or group of before is left"
    for again in (os.setresuid, os.setresgid):
        with contextlib.suppress(PermissionError):
            again(-1, 0, -1)
            return "root can be had back"
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            rows = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            if any(int(rows[name], 16) for name in _SETS):
                return "a capability is left"
    return ""


def _can_run(user: User) -> None:
    """Processes are started from these two, and much is imported when it is needed."""
    here = str(Path(__file__).parent.parent)
    for path, how in ((sys.executable, os.R_OK | os.X_OK), (here, os.R_OK | os.X_OK)):
        if not os.access(path, how):
            raise HostLacks(
                f"--user {user.name}: that user cannot read {path}: install pageferry where it can"
            )
