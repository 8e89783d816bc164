"""What is known of a process without stopping it, and why it is none to attach to.

Reads /proc alone. Whoever asks may be told of a process that has ended meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ...transport.errors import AttachError, HostLacks

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD
_CAP_SYS_PTRACE = 1 << 19


@contextlib.contextmanager
def memory_of(folder: str, flags: int) -> Iterator[int]:
    """A descriptor for the memory of the program that runs in a task now."""
    fd = os.open(f"{folder}/mem", flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def check_process(pid: int) -> list[int]:
    """Threads that might be stopped, the best first; raises if this is none to attach to."""
    if platform.machine() != "x86_64":
        raise HostLacks(f"attaching is not wired up for {platform.machine()} yet")
    status = status_of(pid, f"/proc/{pid}")
    if int(status["Tgid"]) == os.getpid():
        raise AttachError(f"process {pid} is this one: it cannot attach to itself", reason="self")
    if status["Tgid"] != status["Pid"]:
        raise AttachError(
            f"{pid} is a thread of process {status['Tgid']}: name the process", reason="thread"
        )
    if int(stat_of(f"/proc/{pid}")[6]) & _KERNEL_THREAD:
        raise AttachError(f"process {pid} is a thread of the kernel, no guest", reason="kernel")
    threads = [tid for tid in threads_of(pid) if _state(f"/proc/{pid}/task/{tid}") not in "ZX"]
    if not threads:
        raise AttachError(
            f"process {pid} is a zombie: it has ended, and its parent has not asked how",
            reason="zombie",
        )
    return threads


def check_thread(pid: int, tid: int) -> None:
    """Raises if this thread is none to attach to."""
    status = status_of(pid, f"/proc/{pid}/task/{tid}")
    if status["TracerPid"] != "0":
        raise AttachError(
            f"process {pid} is traced by process {_named(status['TracerPid'])}: there can be only "
            "one tracer; end that first", reason="traced",
        )  # fmt: skip
    if status.get("Seccomp") == "1":
        raise AttachError(
            f"process {pid} is confined by seccomp's strict mode: any other call would kill it",
            reason="seccomp",
        )
    if "shstk" in status.get("x86_Thread_features", ""):
        raise AttachError(
            f"process {pid} has a shadow stack, on which a call cannot be made to return: start "
            "it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off", reason="shadow-stack",
        )  # fmt: skip


def _read(path: str, pid: int) -> str:
    """A file of /proc; AttachError if the process has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None


def status_of(pid: int, folder: str) -> dict[str, str]:
    lines = _read(f"{folder}/status", pid).splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


_ENDED = ["X", *["0"] * 6]


def stat_of(folder: str) -> list[str]:
    """Fields of /proc/PID/stat from the state on (state, parent, ..., flags)."""
    try:
        return Path(f"{folder}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return _ENDED


def _state(folder: str) -> str:
    return stat_of(folder)[0]


def threads_of(pid: int) -> list[int]:
    """The main thread first."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    except FileNotFoundError:
        raise gone(pid) from None


def parent_of(pid: int) -> int:
    return int(stat_of(f"/proc/{pid}")[1])


def _named(tid: str) -> str:
    """The process of a thread, with its name: a tracer is a thread."""
    try:
        pid = status_of(0, f"/proc/{tid}")["Tgid"]
        return f"{pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    except (AttachError, OSError):
        return f"{tid} (which has ended)"


def gone(pid: int) -> AttachError:
    return AttachError(f"process {pid} has ended, or there is none", reason="gone")


def forbidden(pid: int) -> HostLacks:
    """Why the kernel did not let us; HostLacks, or AttachError if the process ended meanwhile."""
    status = status_of(pid, f"/proc/{pid}")
    owners = {int(uid) for uid in status["Uid"].split()}
    return HostLacks(
        why_forbidden(
            pid,
            scope=_yama_scope(),
            capable=bool(int(status_of(pid, "/proc/self")["CapEff"], 16) & _CAP_SYS_PTRACE),
            owner=next(iter(owners - {os.getuid()}), os.getuid()),
            # what is in /proc/PID belongs to root then, though the folder does not
            dumpable=os.stat(f"/proc/{pid}/status").st_uid in owners,
        ),
        reason="permission",
    )


def _yama_scope() -> int:
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return 0


def why_forbidden(pid: int, *, scope: int, capable: bool, owner: int, dumpable: bool) -> str:
    """What to do. `scope`: Yama's (Documentation/admin-guide/LSM/Yama.rst), 0 without Yama;
    `capable`: we have CAP_SYS_PTRACE; `owner`: a user it runs as, ours only if there is no other.
    """
    may_not = f"may not attach to process {pid}: "
    if scope == 3:
        return may_not + "yama ptrace_scope=3 forbids it to all until the host restarts"
    if capable:
        return may_not + (
            "CAP_SYS_PTRACE is there, so a security module (SELinux, AppArmor) forbids it, or "
            "the process is in a user namespace above ours"
        )
    if owner != os.getuid():
        return may_not + f"it runs as user {owner}: be root or have CAP_SYS_PTRACE"
    if not dumpable:
        return may_not + (
            "it is not dumpable (it changed its user, or asked for it by prctl): be root or have "
            "CAP_SYS_PTRACE"
        )
    if scope == 2:
        return may_not + "yama ptrace_scope=2 demands CAP_SYS_PTRACE: be root"
    if scope == 1:
        return may_not + (
            "yama ptrace_scope=1 lets only a parent do that: set kernel.yama.ptrace_scope=0, or "
            "be root"
        )
    return may_not + "it has a group or a capability that we lack: be root or have CAP_SYS_PTRACE"
