"""Whether shared memory may be on transparent huge pages (admin-guide/mm/transhuge.rst).

Two things differ then: a hole that is punched into one may leave its pages there, as zeros, if
somebody has a page of it pinned; and before a fix of 2026 PAGEMAP_SCAN did not report what was
written to one that was split or unmapped since. Facts only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

from ...transport.errors import HostLacks
from . import userfaultfd
from .pagemap import PagemapScanner

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_NEVER = ("never", "deny", "inherit")
_SIZE = 2 << 20


def may_be_huge(fd: int, pid: int | None = None) -> bool:
    """True if the file that `fd` is may be on huge pages: so its file system was mounted, or so
    the kernel is set. `pid`: who may have it mounted where we do not see it. What cannot be read
    counts as no."""
    mounted = _mounted_huge(fd, "self") or (pid is not None and _mounted_huge(fd, str(pid)))
    return mounted or any(
        _chosen(path) not in _NEVER
        for path in (_SETTINGS / "shmem_enabled", *_SETTINGS.glob("hugepages-*/shmem_enabled"))
    )


def _chosen(path: Path) -> str:
    """The word in brackets."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0] or "never"
    except OSError:
        return "never"


def _mounted_huge(fd: int, where: str) -> bool:
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open(f"/proc/{where}/mountinfo") as lines:
        for line in lines:
            if line.split()[2] == wanted:
                options = line.rpartition(" ")[2].strip().split(",")
                return any(o.startswith("huge=") and o != "huge=never" for o in options)
    return False


def reports_what_is_gone() -> bool:
    """Whether PAGEMAP_SCAN reports a stretch without page table as written, as it does since the
    fix. HostLacks if this process may not ask."""
    uffd = userfaultfd.create_tracking()
    try:
        with mmap.mmap(-1, 3 * _SIZE) as memory:
            flat = np.frombuffer(memory, np.uint8)
            begin = -(-flat.ctypes.data // _SIZE) * _SIZE
            del flat
            userfaultfd.register_write_protect(uffd, begin, _SIZE)
            scanner = PagemapScanner(os.getpid())
            try:
                return bool(len(scanner.collect(begin, _SIZE)[0]))
            finally:
                scanner.close()
    except OSError as e:
        raise HostLacks(f"cannot try how writes are tracked: {e.strerror}") from e
    finally:
        os.close(uffd)
