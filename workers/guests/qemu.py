"""qemu:QMP_SOCKET, a virtual machine of an unmodified QEMU, as source and as destination.

Its RAM is shared memory that pageferry reads and writes by itself; what is not RAM (devices,
processors, small memories such as the screen's) is moved by QEMU's own migration with
x-ignore-shared, through a pipe, in one piece while the machine stands still. In QEMU,
migration/ram.c (migrate_ram_is_ignored), docs/devel/migration.

A source goes on as it was unless the destination was told to run; then it stays paused. A
destination is a QEMU with the same machine, waiting with `-incoming defer`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from ...transport.errors import (
    DestinationError,
    PageferryError,
    PeerRefused,
    SourceError,
)
from ...transport.messages import POSTCOPY, Block, Hello
from ...transport.pages import PAGE_SIZE
from ..ram import RamBlock, RamFile
from .base import TRACKING_HASH, DestinationGuest, SourceGuest
from .qmp import CommandFailed, Monitor
from .uri import GuestUri

_FD_NAME = "pageferry-state"
# Devices and small memories: a 4K screen has 32 MiB.
_MAX_STATE = 256 << 20
_STATE_SECONDS = 60.0
_POLL_SECONDS = 0.001
# QEMU's own limit must not slow its state down.
_UNLIMITED = 1 << 50
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


def backends(monitor: Monitor) -> list[Backend]:
    """The VM's RAM, in the order of names. SourceError unless all of it is shared memory."""
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
    made: list[Backend] = []
    try:
        for memdev in sorted(found, key=lambda memdev: str(memdev["id"])):
            name, size = str(memdev["id"]), int(memdev["size"])
            made.append(Backend(name, size, _open(monitor, name, size)))
    except BaseException:
        for backend in made:
            backend.file.close()
        raise
    return made


def _open(monitor: Monitor, name: str, size: int) -> RamFile:
    """The file of a backend: by the path that QEMU has it at, in QEMU's own view of the files."""
    kind = {
        row["name"]: row["type"] for row in monitor("qom-list", path="/objects")
    }.get(name, "")  # fmt: skip
    if kind == "child<memory-backend-file>":
        path = str(monitor("qom-get", path=f"/objects/{name}", property="mem-path"))
        path = f"/proc/{monitor.pid}/root{os.path.join(_directory(monitor.pid), path)}"
    elif kind == "child<memory-backend-memfd>":
        path = _memfd(monitor.pid, size)
    else:
        raise SourceError(f"memory {name} is a {kind or 'backend'}, which cannot be shared: {_HOW}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise SourceError(f"cannot open the VM's memory {path}: {e.strerror}") from e
    file = RamFile(fd, f"memory {name}")
    if os.fstat(fd).st_size < size or not _is_mapped(monitor.pid, fd):
        file.close()
        raise SourceError(f"{path} is not the memory {name} of process {monitor.pid} any more")
    if others := _others_that_map(monitor.pid, fd):
        file.close()
        raise SourceError(
            f"the VM's memory {name} is mapped by {', '.join(others)} too, whose writes nobody "
            f"would see: end it (vhost-user devices cannot be moved)"
        )
    return file


def _directory(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/cwd")


def _memfd(pid: int, size: int) -> str:
    """The descriptor of QEMU that is a memfd of this size; SourceError if several are."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("/memfd:memory-backend-memfd") and (
                os.stat(path).st_size == size
            ):
                found.append(path)
    if len(found) != 1:
        raise SourceError(
            f"{len(found)} memory-backend-memfd of {size} bytes: which is which cannot be told; "
            f"use memory-backend-file for them"
        )
    return found[0]


def _is_mapped(pid: int, fd: int) -> bool:
    """True if process `pid` maps the file for writing: for QEMU, it is the one that the VM uses."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if fields[3] == device and int(fields[4]) == status.st_ino and "w" in fields[1]:
                return True
    return False


def _others_that_map(pid: int, fd: int) -> list[str]:
    """Processes other than `pid` and this one that can write the file through a mapping."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in (pid, os.getpid()):
            with contextlib.suppress(OSError):  # it has ended, or is not ours to see
                if _is_mapped(int(name), fd):
                    with open(f"/proc/{name}/comm") as comm:
                        found.append(f"process {name} ({comm.read().strip()})")
    return found


def _specs(found: list[Backend]) -> list[Block]:
    specs, offset = [], 0
    for backend in found:
        specs.append(Block(backend.name, backend.size, PAGE_SIZE, offset))
        offset += backend.size
    return specs


def _ignore_shared(monitor: Monitor, state: bool) -> None:
    capability = {"capability": "x-ignore-shared", "state": state}
    monitor("migrate-set-capabilities", capabilities=[capability])


def _ignores_shared(monitor: Monitor) -> bool:
    found = monitor("query-migrate-capabilities")
    return any(row["capability"] == "x-ignore-shared" and row["state"] for row in found)


class QemuSource(SourceGuest):
    """A VM that is to leave."""

    kind = "qemu"
    live = True
    can_stop = True
    tracking = TRACKING_HASH

    def __init__(self, uri: GuestUri) -> None:
        self._monitor = Monitor(uri.rest)
        self._found: list[Backend] = []
        self._stopped = False
        self._former: tuple[bool, int] | None = None  # x-ignore-shared, max-bandwidth
        try:
            self._check()
            self._found = backends(self._monitor)
        except BaseException:
            self.close()
            raise
        specs = _specs(self._found)
        self.blocks = [RamBlock(s, b.file, 0) for s, b in zip(specs, self._found, strict=True)]
        self.image_size = sum(backend.size for backend in self._found)

    def _check(self) -> None:
        """SourceError for a VM that cannot be moved; nothing has happened yet."""
        status = self._monitor("query-status")
        if status["status"] not in ("running", "paused"):
            raise SourceError(
                f"the VM is {status['status']}: only one that runs or is paused can be moved"
            )
        self.running = bool(status["running"])
        migration = self._monitor("query-migrate")
        if migration.get("status") in ("setup", "active", "device", "cancelling"):
            raise SourceError(f"QEMU is migrating this VM by itself: {migration['status']}")
        if reasons := migration.get("blocked-reasons"):
            raise SourceError(f"the VM cannot be migrated: {'; '.join(map(str, reasons))}")

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True  # first: if the answer is lost, resume must not be a no-op
            if self.running:
                self._monitor("stop")

    def resume(self) -> None:
        if not self._stopped:
            return
        if self._former is not None:
            ignored, bandwidth = self._former
            _ignore_shared(self._monitor, ignored)
            self._monitor("migrate-set-parameters", max_bandwidth=bandwidth)
        if self.running:
            self._monitor("cont")
        self._stopped = False

    def save_state(self) -> bytes:
        """All but RAM, as QEMU's migration stream."""
        self._former = (
            _ignores_shared(self._monitor),
            int(self._monitor("query-migrate-parameters")["max-bandwidth"]),
        )
        _ignore_shared(self._monitor, True)
        self._monitor("migrate-set-parameters", max_bandwidth=_UNLIMITED)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._monitor.give(_FD_NAME, theirs)
            finally:
                os.close(theirs)
            self._monitor("migrate", uri=f"fd:{_FD_NAME}")
            state = _read_all(ours)
        finally:
            os.close(ours)
        until = time.monotonic() + _STATE_SECONDS
        while (found := self._monitor("query-migrate")).get("status") != "completed":
            if found.get("status") in ("failed", "cancelled") or time.monotonic() > until:
                reason = found.get("error-desc") or found.get("status")
                raise SourceError(f"QEMU cannot save its devices: {reason}")
            time.sleep(_POLL_SECONDS)
        return state

    def describe(self) -> dict[str, Any]:
        if not self._stopped:
            return {}
        return {"source-vm": "paused; `cont` on its monitor would let it run a second time"}

    def close(self) -> None:
        for block in self._found:
            block.file.close()
        self._monitor.close()


def _read_all(fd: int) -> bytes:
    parts, size = [], 0
    while part := os.read(fd, 1 << 20):
        parts.append(part)
        size += len(part)
        if size > _MAX_STATE:
            raise SourceError(
                f"the VM's state without its RAM is above {_MAX_STATE >> 20} MiB: QEMU sends RAM "
                f"in it (since 8.1 it takes memory-backend-file; memfd is not left out)"
            )
    return b"".join(parts)


class QemuDestination(DestinationGuest):
    """A QEMU that waits for a VM (`-incoming defer`), of the same command line but for paths."""

    kind = "qemu"

    def __init__(self, uri: GuestUri) -> None:
        self._path = uri.rest
        self._monitor: Monitor | None = None
        self._found: list[Backend] = []
        self._loading = False

    def lay_out(self, hello: Hello) -> None:
        if hello.kind != "qemu":
            raise PeerRefused(f"a {hello.kind}: guest cannot go on as a qemu: guest", field="kind")
        if POSTCOPY in hello.capabilities:
            raise PeerRefused(
                "postcopy into qemu: is not there yet: leave --postcopy out", field=POSTCOPY
            )
        try:
            self._monitor = Monitor(self._path)
            self._check()
            self._found = backends(self._monitor)
        except SourceError as e:
            raise DestinationError(e.message) from e
        ours = {backend.name: backend for backend in self._found}
        for spec in hello.blocks:
            size = ours[spec.name].size if spec.name in ours else 0
            if size != spec.size:
                raise PeerRefused(
                    f"the VM here has {size} bytes of memory {spec.name}, the source has "
                    f"{spec.size}: start it with the source's command line",
                    field=f"block {spec.name!r} size",
                )
        if extra := sorted(set(ours) - {spec.name for spec in hello.blocks}):
            raise PeerRefused(f"the source's VM has no memory {', '.join(extra)}", field="blocks")
        self.blocks = [RamBlock(spec, ours[spec.name].file, 0) for spec in hello.blocks]
        self.fresh = [not len(block.data_runs()[0]) for block in self.blocks]

    def _check(self) -> None:
        assert self._monitor is not None
        status = self._monitor("query-status")["status"]
        if status != "inmigrate":
            raise SourceError(
                f"the QEMU at {self._path} is {status}: start one that waits, with -incoming defer"
            )
        if self._monitor("query-migrate").get("status", "none") != "none":
            raise SourceError(f"the QEMU at {self._path} is being migrated into by somebody else")

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        assert self._monitor is not None
        self._running = running
        self._loading = True
        _ignore_shared(self._monitor, True)
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        feeding = threading.Thread(target=_feed, args=(ours, state))
        try:
            try:
                self._monitor.give(_FD_NAME, theirs)
            finally:
                os.close(theirs)
            feeding.start()
            self._monitor("migrate-incoming", uri=f"fd:{_FD_NAME}")
            self._wait_until_loaded()
        except SourceError as e:
            raise DestinationError(
                f"the QEMU here cannot take the devices' state ({e}): is it started with the "
                f"source's command line? Its log says which device"
            ) from e
        finally:
            if feeding.ident is None:
                os.close(ours)

    def _wait_until_loaded(self) -> None:
        assert self._monitor is not None
        until = time.monotonic() + _STATE_SECONDS
        while self._monitor("query-status")["status"] == "inmigrate":
            found = self._monitor("query-migrate")
            if found.get("status") == "failed" or time.monotonic() > until:
                raise SourceError(str(found.get("error-desc", "it did not load in time")))
            time.sleep(_POLL_SECONDS)

    def run(self) -> str:
        assert self._monitor is not None
        if self._running:
            try:
                self._monitor("cont")
            except CommandFailed as e:
                raise DestinationError(e.message) from e
        return f"QEMU process {self._monitor.pid} ({self._path})"

    def discard(self) -> None:
        """A QEMU that was given devices and not told to run is of no use any more."""
        if self._monitor is not None and self._loading:
            with contextlib.suppress(PageferryError):
                self._monitor("quit")
        self.close()

    def close(self) -> None:
        for backend in self._found:
            backend.file.close()
        if self._monitor is not None:
            self._monitor.close()


def _feed(fd: int, state: bytes) -> None:
    """Write all of it; a QEMU that refuses it closes its end."""
    view = memoryview(state)
    try:
        with contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(fd, view) :]
    finally:
        os.close(fd)
