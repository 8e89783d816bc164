"""Which shared memory a process writes, from outside: the files in tmpfs that it maps, and one of
them open.

Reads /proc; changes nothing, opens no device. Knows nothing of migration.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...transport.errors import SourceError
from ...transport.quantities import format_bytes
from ..kernel.freezer import is_frozen
from ..kernel.libc import TMPFS, file_system
from ..kernel.mappings import Mapping, mappings, other_writers
from ..ram import RamFile

_DELETED = " (deleted)"
_REMEDY = "run pageferry as root, or as the process's user"


@dataclass
class SharedFile:
    """A file that the process maps shared and writable. `names`: as in /proc/PID/maps."""

    key: tuple[int, int]  # device and inode
    places: list[Mapping] = field(default_factory=list)
    size: int = 0

    @property
    def name(self) -> str:
        return self.places[0].name.removesuffix(_DELETED)

    def is_called(self, wanted: str) -> bool:
        """By the name of the file, or by the addresses of one of its mappings ("START-END")."""
        names = {m.name for m in self.places} | {f"{m.start:x}-{m.end:x}" for m in self.places}
        return wanted in names or wanted.removesuffix(_DELETED) == self.name

    def __str__(self) -> str:
        first = self.places[0]
        return f"{self.name} ({format_bytes(self.size)}, at {first.start:x}-{first.end:x})"


def open_memory(pid: int, wanted: str) -> RamFile:
    """The file in tmpfs that process `pid` maps shared and writable, open for reading: the one
    called `wanted`, or "" for the only one. It is certainly the one that is mapped.

    SourceError that lists what there is if there is none, or more than one.
    """
    return _open(pid, _choose(pid, wanted))


def path_of_memory(pid: int, wanted: str) -> str:
    """A path that leads to that file as long as it is mapped, for os.stat. SourceError as above."""
    file = _choose(pid, wanted)
    with _reached(pid, file) as (_, path):
        return path


def _choose(pid: int, wanted: str) -> SharedFile:
    found, closed = _look(pid)
    chosen = [file for file in found if not wanted or file.is_called(wanted)]
    if len(chosen) == 1:
        return chosen[0]
    named = f" called {wanted}" if wanted else ""
    if chosen:
        raise SourceError(
            f"process {pid} maps {len(chosen)} files of shared memory{named}: {_listed(chosen)}; "
            f"say which: pid:{pid}?mapping=NAME, or ?mapping=START-END where names are the same"
        )
    hints = []
    if found:
        hints.append(f"it maps {_listed(found)}")
    if closed:
        hints.append(f"{_names(closed)} cannot be opened: {_REMEDY}")
    raise SourceError(
        f"process {pid} has no writable shared memory{named} in tmpfs (/dev/shm, memfd)"
        + "".join(f"; {hint}" for hint in hints)
    )


def _listed(files: list[SharedFile]) -> str:
    return ", ".join(map(str, files))


def _names(files: list[SharedFile]) -> str:
    return ", ".join(file.name for file in files)


def _look(pid: int) -> tuple[list[SharedFile], list[SharedFile]]:
    """Its shared memory in tmpfs, the largest first, and what could not be looked at."""
    files: dict[tuple[int, int], SharedFile] = {}
    try:
        for m in mappings(f"/proc/{pid}"):
            if m.shared_and_writable and m.name.startswith("/"):
                files.setdefault(m.file, SharedFile(m.file)).places.append(m)
    except (FileNotFoundError, ProcessLookupError) as e:
        raise SourceError(f"there is no process {pid}") from e
    except OSError as e:
        raise SourceError(
            f"cannot read what process {pid} maps: {e.strerror}; {_REMEDY}, and where it runs"
        ) from e
    found, closed = [], []
    for file in files.values():
        try:
            with _reached(pid, file) as (fd, _):
                if stat.S_ISREG(os.fstat(fd).st_mode) and file_system(fd) == TMPFS:
                    file.size = os.fstat(fd).st_size
                    found.append(file)
        except OSError:
            closed.append(file)
    return sorted(found, key=lambda file: -file.size), closed


def _open(pid: int, file: SharedFile) -> RamFile:
    try:
        with _reached(pid, file) as (fd, _):
            opened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise SourceError(
            f"cannot open the memory {file.name} of process {pid}: {e.strerror}; {_REMEDY}"
        ) from e
    if file.size == 0:
        os.close(opened)
        raise SourceError(f"the memory {file.name} of process {pid} is empty")
    return RamFile(opened, file.name)


@contextlib.contextmanager
def _reached(pid: int, file: SharedFile) -> Iterator[tuple[int, str]]:
    """A descriptor (O_PATH: nothing is opened by it, no device wakes up) of just that file, and the
    path that led there; OSError if none does."""
    for path in _ways(pid, file):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == file.key:
                yield fd, path
                return
        finally:
            os.close(fd)
    raise PermissionError(1, "there is no way to it for this user")


def _ways(pid: int, file: SharedFile) -> Iterator[str]:
    """Where it may be found: as what is mapped (for root), by its name, by a descriptor."""
    for m in file.places:
        yield f"/proc/{pid}/map_files/{m.start:x}-{m.end:x}"
    yield f"/proc/{pid}/root{file.name}"
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            yield f"/proc/{pid}/fd/{fd}"


def refuse_other_writers(pid: int, file: RamFile) -> None:
    """SourceError if somebody else can write the file through a mapping, and does not stand still:
    it would write on when process `pid` is stopped."""
    others = []
    for other in other_writers(pid, file.fd):
        with contextlib.suppress(OSError), open(f"/proc/{other}/stat") as f:
            name, _, rest = f.read().partition("(")[2].rpartition(")")
            if rest.split()[0] not in "TtZX" and not is_frozen(other):
                others.append(f"process {other} ({name})")
    if others:
        raise SourceError(
            f"the memory {file.name} is mapped by {', '.join(others)} too, which would write on "
            f"when process {pid} is stopped: stop it first (SIGSTOP), or end it"
        )
