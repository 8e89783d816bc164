"""What this host can do for a migration, and what each lack costs.

Looks and tries, changes nothing, opens nothing that stays open. Knows nothing of displays:
findings go out as data. The functions that judge take what was read, so that tests can tell
them of hosts they do not run on.
"""

from __future__ import annotations

import errno
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from ..transport.errors import PageferryError
from ..transport.quantities import format_bytes
from .kernel.probing import (
    ARCHITECTURES,
    Userfaultfd,
    probe_priorities,
    probe_userfaultfd,
    scan_own_page,
)

_CAP_SYS_PTRACE = 19  # <linux/capability.h>
_SECCOMP_FILTER = "2"  # proc_pid_status(5)
# The first kernel with all that tracking needs (WP_ASYNC, PAGEMAP_SCAN).
_TRACKING_KERNEL = (6, 7)
# Less in /dev/shm is a container's default (64 MiB), not room for a guest.
_LEAST_SHM = 1 << 30
_HUGE_PAGES = {"2M": 2048, "1G": 1048576}  # KiB, as sysfs names them

_BY_CONTENT = "writes are found by content: every round reads all memory"
_NOTHING_YET = "nothing yet: missing pages are installed by copy"
# <linux/userfaultfd.h>: bit, name, what it gives, the Linux that has it, what its lack costs
_FEATURES = (
    (5, "missing-shmem", "missing pages of shared memory are caught", "4.11", "no postcopy"),
    (4, "missing-hugetlbfs", "missing huge pages are caught", "4.11",
     "no postcopy of guests in huge pages"),
    (10, "minor-shmem", "pages of shared memory not mapped yet are caught", "5.14", _NOTHING_YET),
    (9, "minor-hugetlbfs", "huge pages not mapped yet are caught", "5.13", _NOTHING_YET),
    (3, "event-remove", "memory that a guest gives back is reported", "4.11",
     "no postcopy of guests that give memory back (balloon): they would read old content"),
    (15, "wp-async", "the kernel tracks writes by itself", "6.7", _BY_CONTENT),
    (13, "wp-unpopulated", "writes to pages never touched are tracked", "6.4", _BY_CONTENT),
    (12, "wp-shmem", "writes to shared memory and huge pages are tracked", "5.19", _BY_CONTENT),
    (16, "move", "pages can be moved into place", "6.8", _NOTHING_YET),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing this host can do or cannot. `cost`: what that means; empty if it can."""

    name: str
    ok: bool
    detail: str
    cost: str


def findings() -> list[Finding]:
    """Everything, in the order in which a person wants to read it."""
    status = _read_status()
    uffd = probe_userfaultfd()
    return [
        kernel_finding(platform.release()),
        architecture_finding(platform.machine()),
        _processors(),
        userfaultfd_finding(
            uffd,
            filtered=status.get("Seccomp") == _SECCOMP_FILTER,
            device=os.access("/dev/userfaultfd", os.R_OK | os.W_OK),
        ),
        *feature_findings(uffd.features),
        _pagemap_scan(),
        ptrace_finding(_yama_scope(), _has(status, _CAP_SYS_PTRACE)),
        real_time_finding(*probe_priorities()),
        *(huge_pages_finding(size, _huge_pages(kib)) for size, kib in _HUGE_PAGES.items()),
        shmem_huge_finding(_read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        _dev_shm("/dev/shm"),
    ]


def description() -> dict[str, str | int]:
    """Which host this is."""
    return {
        "name": platform.node(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "user": os.geteuid(),
    }


def _finding(name: str, ok: bool, detail: str, cost: str) -> Finding:
    return Finding(name, ok, detail, "" if ok else cost)


def _read(path: str) -> str | None:
    """A file of /proc or /sys; None if there is none or we may not."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _read_status() -> dict[str, str]:
    """proc_pid_status(5) of this process."""
    lines = (_read("/proc/self/status") or "").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _has(status: dict[str, str], capability: int) -> bool:
    return bool(int(status.get("CapEff", "0"), 16) >> capability & 1)


def kernel_finding(release: str) -> Finding:
    """By its number; what it really has is in the other findings."""
    match = re.match(r"(\d+)\.(\d+)", release)
    ok = match is not None and (int(match[1]), int(match[2])) >= _TRACKING_KERNEL
    return _finding("kernel", ok, f"Linux {release}", "most before 6.7 cannot track writes")


def architecture_finding(machine: str) -> Finding:
    page = format_bytes(os.sysconf("SC_PAGE_SIZE"))
    return _finding(
        "architecture",
        machine in ARCHITECTURES,
        f"{machine}, pages of {page}",
        f"no postcopy, and {_BY_CONTENT}",
    )


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0))
    return _finding(
        "processors", count > 1, f"{count} usable", "guest and workers take turns on one processor"
    )


def userfaultfd_finding(uffd: Userfaultfd, *, filtered: bool, device: bool) -> Finding:
    """`filtered`: a seccomp filter is on. `device`: /dev/userfaultfd is open to us; it would do as
    well, but pageferry makes the system call, in guests too."""
    if uffd.error == 0:
        return Finding("userfaultfd", True, "all faults, of user and kernel mode", "")
    remedy = "needs vm.unprivileged_userfaultfd=1 or CAP_SYS_PTRACE"
    if device:
        remedy += " (/dev/userfaultfd is open to this user, but not used)"
    if uffd.user_mode:
        return Finding(
            "userfaultfd", False, f"user-mode only, {remedy}",
            "faults from inside the kernel (KVM, read() into guest memory) are not caught: "
            "postcopy only for guests without",
        )  # fmt: skip
    if uffd.error == errno.ENOSYS:
        detail = "this kernel has none"
    elif filtered:
        detail = (
            f"forbidden, perhaps by the seccomp filter of a container or service, else {remedy}"
        )
    elif uffd.error == errno.EPERM:
        detail = f"forbidden, {remedy}"
    else:
        detail = os.strerror(uffd.error)
    return Finding("userfaultfd", False, detail, f"no postcopy, and {_BY_CONTENT}")


def feature_findings(features: int) -> list[Finding]:
    """userfaultfd's features by the bits that the kernel returned; 0 without userfaultfd."""
    found = []
    for bit, name, what, linux, cost in _FEATURES:
        ok = bool(features >> bit & 1)
        found.append(_finding(name, ok, what if ok else f"not here (Linux {linux})", cost))
    return found


def _pagemap_scan() -> Finding:
    try:
        scan_own_page()
    except PageferryError as e:
        return Finding("pagemap-scan", False, e.message, _BY_CONTENT)
    return Finding("pagemap-scan", True, "written pages are read and armed again in one call", "")


def _yama_scope() -> int | None:
    text = _read("/proc/sys/kernel/yama/ptrace_scope")
    return int(text) if text else None


def ptrace_finding(scope: int | None, capable: bool) -> Finding:
    """Yama's scope (Documentation/admin-guide/LSM/Yama.rst), None without Yama."""
    nobody = 3
    ok = scope != nobody and (capable or not scope)
    if scope == nobody:
        detail = "yama ptrace_scope=3 forbids it to all until the host restarts"
    elif capable:
        detail = "any process (CAP_SYS_PTRACE)"
    elif ok:
        detail = "processes of the same user"
    else:
        detail = f"yama ptrace_scope={scope}, needs 0 or CAP_SYS_PTRACE"
    return _finding("ptrace", ok, detail, "unmodified guests cannot be attached to")


def real_time_finding(allowed: bool, nice: int) -> Finding:
    if allowed:
        return Finding("real-time", True, "SCHED_FIFO is allowed", "")
    return Finding(
        "real-time", False, f"needs CAP_SYS_NICE or ulimit -r; nice can be {nice}",
        "a fault waits behind other processes: p99 of the latency grows",
    )  # fmt: skip


def _huge_pages(kib: int) -> tuple[int, int] | None:
    folder = f"/sys/kernel/mm/hugepages/hugepages-{kib}kB"
    free, total = _read(f"{folder}/free_hugepages"), _read(f"{folder}/nr_hugepages")
    return (int(free), int(total)) if free and total else None


def huge_pages_finding(size: str, pages: tuple[int, int] | None) -> Finding:
    """`pages`: free, total; None if the kernel has none of this size."""
    return _finding(
        f"huge-pages-{size}",
        pages is not None and pages[0] > 0,
        f"{pages[0]} of {pages[1]} free" if pages else "this kernel has none",
        f"guests in huge pages of {size} cannot be received",
    )


def shmem_huge_finding(setting: str | None) -> Finding:
    """The kernel marks the choice: "always within_size advise [never] deny force". It holds for
    memfds; /dev/shm has an option of its mount, which only "deny" and "force" overrule."""
    match = re.search(r"\[(\w+)\]", setting or "")
    return _finding(
        "shmem-huge-pages",
        match is not None and match[1] not in ("never", "deny"),
        f"shmem_enabled={match[1]}" if match else "this kernel has none",
        "shared memory comes in small pages: more faults while it fills, more TLB misses after",
    )


def _dev_shm(path: str) -> Finding:
    try:
        info = os.statvfs(path)
    except OSError as e:
        return dev_shm_finding(e.strerror or str(e), 0)
    free, total = info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize
    if not os.access(path, os.W_OK | os.X_OK):
        return dev_shm_finding("not writable", 0)
    if total == 0:  # tmpfs mounted with size=0
        return dev_shm_finding("no limit", _LEAST_SHM)
    return dev_shm_finding(f"{format_bytes(free)} of {format_bytes(total)} free", free)


def dev_shm_finding(detail: str, free: int) -> Finding:
    return _finding(
        "dev-shm", free >= _LEAST_SHM, detail, "guests in shm: and all page tables must fit there"
    )
