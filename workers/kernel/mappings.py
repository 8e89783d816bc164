"""What a process maps, as /proc/PID/maps has it (proc_pid_maps(5)). Facts only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mapping:
    """Bytes [start, end) of an address space. `access`: as in "rw-s"; `offset`: where in the file
    it begins; `file`: device and inode, (0, 0) if it is of none."""

    start: int
    end: int
    access: str
    offset: int
    file: tuple[int, int]
    name: str

    @property
    def has_code(self) -> bool:
        """Of a file, or the vdso: not what a program makes as it runs, and may drop again."""
        return self.name.startswith("/") or self.name == "[vdso]"

    @property
    def shared_and_writable(self) -> bool:
        """What is stored through it is in the file."""
        return self.access[1] == "w" and self.access[3] == "s"

    def order(self) -> int:
        """C libraries first: they have what an injection looks for, and are small."""
        name = self.name.rpartition("/")[2]
        return 0 if name.startswith(("libc.", "libc-", "ld-musl")) else 1 + (name[:3] != "ld-")


def mappings(folder: str) -> Iterator[Mapping]:
    """Those of the task whose folder in /proc that is, lowest first; OSError if it has ended or is
    not ours to see."""
    with open(f"{folder}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            span, access, offset, device, inode, *name = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            major, minor = (int(part, 16) for part in device.split(":"))
            yield Mapping(
                start, end, access, int(offset, 16), (os.makedev(major, minor), int(inode)),
                name[0].rstrip("\n") if name else "",
            )  # fmt: skip


def writable_mappings(pid: int, fd: int) -> list[Mapping]:
    """Through which process `pid` can write the file that `fd` is. OSError as above."""
    status = os.fstat(fd)
    wanted = (status.st_dev, status.st_ino)
    return [m for m in mappings(f"/proc/{pid}") if m.file == wanted and m.shared_and_writable]


def other_writers(pid: int, fd: int) -> list[int]:
    """Processes but `pid` and this one that can write the file that `fd` is through a mapping, as
    far as they are ours to see."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in (pid, os.getpid()):
            with contextlib.suppress(OSError):  # it has ended, or is not ours to see
                if writable_mappings(int(name), fd):
                    found.append(int(name))
    return found


def catches_missing(pid: int) -> bool:
    """True if touches of missing pages are caught anywhere in the process (smaps, "um"). OSError
    as above."""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as lines:
        return any(line.startswith("VmFlags:") and "um" in line.split() for line in lines)
