"""The memory of a VM of an unmodified QEMU, from outside: its backends' files, who else could write
them, and which pages the VM writes.

Asks QEMU's monitor and /proc; changes nothing. Knows nothing of migration.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...transport.errors import HostLacks, PeerRefused, SourceError
from ...transport.messages import Block, SharedBlock
from ...transport.pages import PAGE_SIZE, Bytes8, Runs, mark, runs_of
from ..kernel.huge import may_be_huge, reports_what_is_gone
from ..kernel.libc import FUSE, file_system, lock_file
from ..kernel.mappings import catches_missing, mappings, other_writers, writable_mappings
from ..kernel.remote import planted_in
from ..ram import RamBlock, RamFile
from .qmp import Monitor
from .tracking import WriteTracker

# A line of `info ramblock`: name, host page size, offset and more.
_RAM_BLOCK = re.compile(r"^ *(\S+) +(\d+) ([KMG])iB +0x", re.MULTILINE)
# A line of `info mtree -f`: where guest RAM begins, and the backend's name.
_RAM_AT = re.compile(r"^ *([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, ram\): (\S+)", re.MULTILINE)
_HVA = re.compile(r"is 0x([0-9a-f]+)")
# Block drivers that map all guest memory for a device once and for all: no page table tells what it
# writes.
_FOREIGN_DRIVERS = ("nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user",
                    "virtio-blk-vhost-vdpa")  # fmt: skip
# Up to this version an empty transaction is known to wait for all requests of all disks.
_TRANSACTION_WAITS_BEFORE = 9
# From this version on only named files are left out of QEMU's own stream (x-ignore-shared).
_MEMFD_TRAVELS_SINCE = (8, 1)
_HOW = (
    "-object memory-backend-file,id=ram0,size=SIZE,mem-path=/dev/shm/NAME,share=on "
    "-machine …,memory-backend=ram0"
)


@dataclass(frozen=True)
class Backend:
    """A memory backend of the VM whose memory is shared."""

    name: str
    size: int
    file: RamFile


def backends(monitor: Monitor, ignored: frozenset[str] = frozenset()) -> list[Backend]:
    """The VM's RAM, in the order of names, but for what is `ignored`. SourceError unless all of it
    is shared memory."""
    found = monitor("query-memdev")
    private = [memdev["id"] for memdev in found if not memdev.get("share")]
    if private:
        raise SourceError(
            f"the VM's memory {', '.join(map(str, private))} is private to QEMU: start the VM "
            f"with share=on ({_HOW})"
        )
    summary = monitor("query-memory-size-summary")
    wanted = int(summary["base-memory"]) + int(summary.get("plugged-memory", 0))
    if sum(int(memdev["size"]) for memdev in found) < wanted:
        raise SourceError(
            f"{wanted >> 20} MiB of RAM are not in a shared memory backend: start the VM "
            f"with {_HOW}"
        )
    check_ignored({str(memdev["id"]) for memdev in found}, ignored)
    _check_page_sizes(monitor, {str(memdev["id"]) for memdev in found} - ignored)
    made: list[Backend] = []
    try:
        for memdev in sorted(found, key=lambda memdev: str(memdev["id"])):
            name, size = str(memdev["id"]), int(memdev["size"])
            if name in ignored:
                continue
            made.append(Backend(name, size, _open(monitor, name, size)))
    except BaseException:
        for backend in made:
            backend.file.close()
        raise
    return made


def check_ignored(names: set[str], ignored: frozenset[str]) -> None:
    """SourceError for a name that no memory has, or if nothing is left to be moved."""
    if unknown := sorted(ignored - names):
        raise SourceError(f"ignore-shared: the VM has no memory {', '.join(unknown)}")
    if ignored and ignored >= names:
        raise SourceError(
            "ignore-shared: no memory is left to be moved; QEMU's own migration with "
            "x-ignore-shared moves the devices alone"
        )


def shared_blocks(monitor: Monitor, ignored: frozenset[str]) -> list[SharedBlock]:
    """What both ends have in one file: nobody here reads, locks, tracks, clears or arms it.

    SourceError if a QEMU would throw it away when it ends, and with it the other one's.
    """
    host, found = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), []
    for memdev in sorted(monitor("query-memdev"), key=lambda memdev: str(memdev["id"])):
        name, size = str(memdev["id"]), int(memdev["size"])
        if name not in ignored:
            continue
        if _discards(monitor, name):
            raise SourceError(
                f"memory {name} has discard-data=on: QEMU would throw it away as it ends, and with "
                f"it that of the other end"
            )
        try:
            status = os.stat(_path(monitor, name, size))
        except OSError as e:
            raise SourceError(f"cannot find the file of memory {name}: {e.strerror}") from e
        if (status.st_dev, status.st_ino) not in {m.file for m in mappings(f"/proc/{monitor.pid}")}:
            raise SourceError(
                f"the file of memory {name} is not the one that process {monitor.pid} uses: it was "
                f"replaced"
            )
        found.append(SharedBlock(name, size, host, status.st_dev, status.st_ino))
    return found


def check_shared(ours: list[SharedBlock], theirs: list[SharedBlock]) -> None:
    """PeerRefused unless both ends leave the same memories out; on one host: the same files."""
    names = [sorted(b.name for b in blocks) for blocks in (ours, theirs)]
    if names[0] != names[1]:
        left_out = [", ".join(some) or "none" for some in names]
        raise PeerRefused(
            f"the source leaves out memory {left_out[1]}, and this end {left_out[0]}: write the "
            f"same ?ignore-shared=… at both ends",
            field="shared",
        )
    known = {block.name: block for block in ours}
    for block in theirs:
        here = known[block.name]
        same = (here.device, here.inode) == (block.device, block.inode)
        if here.size != block.size or (here.host == block.host and not same):
            raise PeerRefused(
                f"memory {block.name} is another file here than at the source, so that it has to "
                f"travel: leave it out of ?ignore-shared=… at both ends",
                field=f"shared block {block.name!r}",
            )


def _check_page_sizes(monitor: Monitor, names: set[str]) -> None:
    """SourceError for huge pages: hugetlbfs has no write(2)."""
    text = str(monitor("human-monitor-command", command_line="info ramblock"))
    sizes = {name.rpartition("/")[2]: f"{n} {unit}iB" for name, n, unit in _RAM_BLOCK.findall(text)}
    for name in sorted(names):
        if sizes.get(name) != "4 KiB":
            raise SourceError(
                f"the VM's memory {name} is on pages of {sizes.get(name, 'unknown size')}: only "
                f"pages of 4 KiB can be moved as yet (mem-path in /dev/shm)"
            )


def _open(monitor: Monitor, name: str, size: int) -> RamFile:
    """The file of a backend, open, and checked to be the one that the VM uses."""
    try:
        path = _path(monitor, name, size)
        file = RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), f"memory {name}")
        try:
            _check_file(monitor.pid, file.fd, name, size)
            if not lock_file(file.fd):
                raise SourceError(
                    f"the VM's memory {name} is being moved by another pageferry already"
                )
        except BaseException:
            file.close()
            raise
    except OSError as e:
        raise SourceError(
            f"cannot open the memory {name} of process {monitor.pid} ({e.filename}): {e.strerror}; "
            f"run pageferry as root or as QEMU's user, and where QEMU runs"
        ) from e
    return file


def _check_file(pid: int, fd: int, name: str, size: int) -> None:
    if os.fstat(fd).st_size < size or not writable_mappings(pid, fd):
        raise SourceError(
            f"the file of memory {name} is not the one that process {pid} uses: it was replaced, "
            f"or QEMU's monitor belongs to another process"
        )
    if others := _others_that_map(pid, fd):
        raise SourceError(
            f"the VM's memory {name} is mapped by {', '.join(others)} too, whose writes nobody "
            f"would see: end it (two QEMUs need two files; vhost-user devices cannot be moved)"
        )


def _path(monitor: Monitor, name: str, size: int) -> str:
    """Where a backend's file is, in QEMU's own view of the files."""
    kind = {
        row["name"]: row["type"] for row in monitor("qom-list", path="/objects")
    }.get(name, "")  # fmt: skip
    if kind == "child<memory-backend-file>":
        path = str(monitor("qom-get", path=f"/objects/{name}", property="mem-path"))
        if path.startswith("/proc/self/fd/"):  # what it was started with (qemu_process.py)
            return f"/proc/{monitor.pid}/fd/{os.path.basename(path)}"
        directory = os.readlink(f"/proc/{monitor.pid}/cwd")
        return f"/proc/{monitor.pid}/root{os.path.join(directory, path)}"
    if kind == "child<memory-backend-memfd>":
        version = monitor("query-version")["qemu"]
        if (version["major"], version["minor"]) >= _MEMFD_TRAVELS_SINCE:
            raise SourceError(
                f"memory {name} is a memory-backend-memfd, which QEMU since 8.1 sends by itself, "
                f"while the VM stands still: use memory-backend-file ({_HOW})"
            )
        return _memfd(monitor, name, size)
    raise SourceError(f"memory {name} is a {kind or 'backend'}, which cannot be moved: {_HOW}")


def _memfd(monitor: Monitor, name: str, size: int) -> str:
    """The descriptor of QEMU that is this backend's memfd."""
    pid, found = monitor.pid, dict[tuple[int, int], str]()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("/memfd:memory-backend-memfd"):
                status = os.stat(path)
                if status.st_size == size:
                    found[status.st_dev, status.st_ino] = path
    if len(found) > 1:  # which of them, its place in the guest tells
        file = _file_behind(monitor, name)
        found = {key: path for key, path in found.items() if key == file}
    if len(found) != 1:
        raise SourceError(
            f"{len(found)} memory-backend-memfd of {size} bytes: which of them is {name} cannot be "
            f"told; use memory-backend-file for them"
        )
    return found.popitem()[1]


def _file_behind(monitor: Monitor, name: str) -> tuple[int, int]:
    """Device and inode of the file that the RAM `name` is in; (0, 0) if it is nowhere."""
    tree = str(monitor("human-monitor-command", command_line="info mtree -f"))
    for gpa, whose in _RAM_AT.findall(tree):
        if whose.rpartition("/")[2] == name:
            answer = str(monitor("human-monitor-command", command_line=f"gpa2hva 0x{gpa}"))
            if (hva := _HVA.search(answer)) is None:
                continue
            address = int(hva[1], 16)
            for m in mappings(f"/proc/{monitor.pid}"):
                if m.start <= address < m.end:
                    return m.file
    return 0, 0


def _others_that_map(pid: int, fd: int) -> list[str]:
    """Who else can write the file through a mapping, by number and name."""
    found = []
    for other in other_writers(pid, fd):
        with contextlib.suppress(OSError), open(f"/proc/{other}/comm") as comm:
            found.append(f"process {other} ({comm.read().strip()})")
    return found


def specs_of(found: list[Backend]) -> list[Block]:
    specs, offset = [], 0
    for backend in found:
        specs.append(Block(backend.name, backend.size, PAGE_SIZE, offset))
        offset += backend.size
    return specs


class VmTracker:
    """Which pages of a VM's memory are written (tracking.py, whose two warnings it heeds).

    HostLacks or AttachError if that cannot be known from outside.
    """

    def __init__(self, monitor: Monitor, blocks: list[RamBlock]) -> None:
        self._monitor = monitor
        self._blocks = blocks
        gives_back = _gives_back(monitor)
        if (
            any(may_be_huge(block.file.fd, monitor.pid) for block in blocks)
            and not reports_what_is_gone()
        ):
            raise HostLacks(
                "its memory may be on transparent huge pages, and this kernel loses what was "
                "written to some of them (PAGEMAP_SCAN before a fix of 2026)"
            )
        self._can_wait = int(monitor("query-version")["qemu"]["major"]) < _TRANSACTION_WAITS_BEFORE
        self._check_disks()
        self._tracker = WriteTracker(monitor.pid, [block.file for block in blocks])
        self.paused_seconds = self._tracker.paused_seconds
        try:
            self._tracker.prepare()
            # of each block, where it had data when last looked at; if it may lose some
            self._data = self._look_for_data() if gives_back else None
        except BaseException:
            self._tracker.close()
            raise

    def _check_disks(self) -> None:
        """HostLacks if a disk may write by DMA, and nothing would tell when that has ended."""
        if not self._can_wait and _has_direct_disks(self._monitor):
            raise HostLacks(
                "a disk has cache.direct=on (or is a host device): what it writes by DMA cannot be "
                "tracked in this version of QEMU"
            )

    def start(self) -> None:
        """From now on writes are noted."""
        self._tracker.start()

    def written(self, index: int) -> Runs:
        """Pages of a block that were written, or given back, since the last call.

        One that was given back and then only read keeps what it had there: a guest that gave a page
        away may find that in it, or zeros, so nothing is lost; digests (--verify) may differ.
        """
        found = self._tracker.written(index)
        if self._data is None:
            return found
        before, now = self._data[index], self._data_of(index)
        self._data[index] = now
        gone = before & ~now
        if not gone.any():
            return found
        mark(gone, found, 1)
        return runs_of(np.flatnonzero(gone))

    def so_far(self) -> int:
        """How many pages `written` would have, about."""
        return self._tracker.so_far()

    def _look_for_data(self) -> list[Bytes8]:
        return [self._data_of(index) for index in range(len(self._blocks))]

    def _data_of(self, index: int) -> Bytes8:
        """1 for each page that is there, 0 for holes."""
        block = self._blocks[index]
        table = np.zeros(block.pages, np.uint8)
        mark(table, block.data_runs(), 1)
        return table

    def settle(self) -> None:
        """All requests of disks that had begun, and write by DMA, have ended."""
        if not self._can_wait:
            self._check_disks()  # none came meanwhile
        elif _has_direct_disks(self._monitor):
            self._monitor("transaction", actions=[])  # drains before it does nothing

    def close(self) -> None:
        self._tracker.close()


def _has_direct_disks(monitor: Monitor) -> bool:
    """Whether a disk may write to guest memory by DMA: past the page cache, or in a file system
    that itself goes past it (FUSE with direct_io)."""
    pid = monitor.pid
    for node in monitor("query-named-block-nodes", flat=True):
        if node["cache"]["direct"] or node["drv"] == "host_device":
            return True
        path = str(node.get("file", ""))
        if node["drv"] == "file" and _is_fuse(f"/proc/{pid}/root{path}"):
            return True
    return False


def _is_fuse(path: str) -> bool:
    """What cannot be looked at counts as one."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return file_system(fd) == FUSE
    finally:
        os.close(fd)


def _gives_back(monitor: Monitor) -> bool:
    """Whether the guest can give memory back: by a balloon, or virtio-mem."""
    if any(row["type"] == "virtio-mem" for row in monitor("query-memory-devices")):
        return True
    try:
        monitor("query-balloon")
    except SourceError as e:
        if not e.data.get("refused"):
            raise
        return False
    return True


def check_whole(pid: int) -> None:
    """SourceError for a VM whose own memory is still arriving: what is missing reads as zeros.

    A userfaultfd that catches nothing is one that could not be closed when all was there."""
    if planted_in(pid) and catches_missing(pid):
        raise SourceError(
            f"QEMU (process {pid}) has a userfaultfd open: its own memory has not all arrived yet "
            f"(a postcopy into it); wait for its end"
        )


def _discards(monitor: Monitor, name: str) -> bool:
    """Whether a QEMU that ends throws this memory away."""
    path = f"/objects/{name}"
    properties = {row["name"] for row in monitor("qom-list", path=path)}
    return "discard-data" in properties and bool(
        monitor("qom-get", path=path, property="discard-data")
    )


class Discarding:
    """discard-data=on makes a QEMU that ends throw its memory away; while that is still being sent,
    it must not."""

    def __init__(self, monitor: Monitor, found: list[Backend]) -> None:
        self._monitor = monitor
        self._paths = [f"/objects/{b.name}" for b in found if _discards(monitor, b.name)]

    def set(self, on: bool) -> None:
        for path in self._paths:
            self._monitor("qom-set", path=path, property="discard-data", value=on)


def layout(monitor: Monitor) -> dict[str, Any]:
    """What is compared to see whether memory was plugged in or out meanwhile."""
    return {str(row["id"]): int(row["size"]) for row in monitor("query-memdev")}


# ---- devices that write memory behind QEMU's back ------------------------------------------

_FOREIGN = ("vfio-", "vhost-user-", "vhost-vdpa-", "vhost-scsi")


def check_devices(monitor: Monitor) -> None:
    """SourceError for devices whose writes nobody would see, by their names."""
    found = set()
    for where in ("/machine/peripheral", "/machine/peripheral-anon"):
        for row in monitor("qom-list", path=where):
            kind = str(row["type"])
            if kind.startswith("child<") and kind[6:].startswith(_FOREIGN):
                found.add(kind[6:-1])
    network = str(monitor("human-monitor-command", command_line="info network"))
    found |= {kind for kind in ("vhost-user", "vhost-vdpa") if f"type={kind}" in network}
    nodes = monitor("query-named-block-nodes", flat=True)
    found |= {str(node["drv"]) for node in nodes if node["drv"] in _FOREIGN_DRIVERS}
    if found:
        raise SourceError(
            f"the VM has {', '.join(sorted(found))}: a device that another process or the hardware "
            f"drives cannot be moved; unplug it first (device_del)"
        )
