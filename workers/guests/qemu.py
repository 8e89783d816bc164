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
import errno
import os
import select
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ...transport.errors import (
    AttachError,
    DestinationError,
    GuestGone,
    HostLacks,
    PageferryError,
    PeerRefused,
    SourceError,
)
from ...transport.messages import POSTCOPY, Hello
from ...transport.pages import PAGE_SIZE, Runs
from ..hollow import hollow_note
from ..kernel import remote
from ..kernel.huge import may_be_huge
from ..kernel.libc import TMPFS, file_system
from ..kernel.userfaultfd import register_missing
from ..ram import RamBlock
from .base import (
    TRACKING_HASH,
    TRACKING_PAGEMAP,
    ArmedMemory,
    DestinationGuest,
    Patience,
    Region,
    SourceGuest,
)
from .protecting import protect_process
from .qemu_memory import (
    Backend,
    Discarding,
    VmTracker,
    backends,
    check_devices,
    check_shared,
    check_whole,
    layout,
    shared_blocks,
    specs_of,
)
from .qmp import Monitor, Pending
from .slowing import MEANS, Slowing
from .states import MAX_QEMU, QEMU, state_into, state_of
from .tracking import windows
from .uri import GuestUri

_FD_NAME = "pageferry-state"
_STATE_SECONDS = 60.0
# A QEMU that must not run any more may take so long to end.
_QUIT_SECONDS = 5.0
_STOP_AGAIN_SECONDS = 0.5
_ACTIVE = ("setup", "active", "pre-switchover", "device", "wait-unplug", "cancelling")
_POLL_SECONDS = 0.001
# The source gives up waiting for word of the guest's start after 30 s: then this is decided.
_CONT_SECONDS = 10.0
# In a postcopy it may sleep on a page first; one that refuses says so at once.
_CONT_AWHILE = 1.0
_GO_ON_SECONDS, _RETRY_SECONDS = 10.0, 0.1
_IGNORE_SHARED = "x-ignore-shared"
_NO_UUID = "00000000-0000-0000-0000-000000000000"  # of a QEMU without -uuid
# Disks are opened for writing with `cont`, not when all is loaded: the source may still go on.
_LATE_BLOCK = "late-block-activate"
# QEMU's own limit must not slow its state down.
_UNLIMITED = 1 << 50
_QEMUS_BANDWIDTH = 128 << 20  # its default


class Settings:
    """What QEMU's migration is set to while it carries our state, and what it was set to before.

    x-ignore-shared left on would make the VM's next snapshot one without RAM: set as late as can
    be, put back always, and what a killed pageferry left is put back by the next.
    """

    def __init__(self, monitor: Monitor, capabilities: set[str]) -> None:
        """Only these `capabilities` on (what else is on may hold the state back, or send it by
        other channels), no limit to the bandwidth, no TLS on a pipe. Nothing is set yet."""
        self._monitor = monitor
        found = monitor("query-migrate-capabilities")
        states = {str(row["capability"]): bool(row["state"]) for row in found}
        known = monitor("query-migrate-parameters")
        self._parameters = {
            name: known[name] for name in ("max-bandwidth", "tls-creds") if name in known
        }
        before = dict(states)
        if self._parameters.get("max-bandwidth") == _UNLIMITED:
            # left by a pageferry that was killed just then: nobody else says this
            self._parameters["max-bandwidth"] = _QEMUS_BANDWIDTH
            before |= {name: False for name in (_IGNORE_SHARED, _LATE_BLOCK) if name in before}
        wanted = {name: name in capabilities for name in states}
        self._to_set = {n: on for n, on in wanted.items() if states[n] != on}
        self._to_put_back = {n: on for n, on in before.items() if wanted[n] != on}
        self._applied = False

    def apply(self) -> None:
        """As we need it. The bandwidth first and last: it says that the others are ours."""
        self._applied = True
        wanted: dict[str, Any] = {"max-bandwidth": _UNLIMITED, "tls-creds": ""}
        self._monitor("migrate-set-parameters", **{name: wanted[name] for name in self._parameters})
        self._set(self._to_set)

    def _set(self, states: dict[str, bool]) -> None:
        if states:
            rows = [{"capability": name, "state": state} for name, state in states.items()]
            self._monitor("migrate-set-capabilities", capabilities=rows)

    def put_back(self) -> None:
        """As it was. Idempotent."""
        if self._applied:
            self._applied = False
            self._set(self._to_put_back)
            self._monitor("migrate-set-parameters", **self._parameters)


class _StatePipe:
    """A pipe of which QEMU has one end, by a name that its migration knows it by."""

    URI = f"fd:{_FD_NAME}"

    def __init__(self, monitor: Monitor, *, reading: bool) -> None:
        """`reading`: we read."""
        ends = os.pipe2(os.O_CLOEXEC)
        self.fd, theirs = ends if reading else ends[::-1]
        try:
            monitor.give(_FD_NAME, theirs)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(theirs)
        self._monitor = monitor

    def take(self) -> int:
        """Our end, which is the caller's from now on; QEMU's goes with its migration."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """If it was not taken: both ends. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with contextlib.suppress(AttributeError, SourceError):
                self._monitor("closefd", fdname=_FD_NAME)


class QemuSource(SourceGuest):
    """A VM that is to leave."""

    kind = "qemu"
    live = True
    can_stop = True
    can_quit = True
    can_throttle = True
    tracking = TRACKING_HASH

    def __init__(self, uri: GuestUri) -> None:
        how = uri.choice("tracking", (TRACKING_PAGEMAP, TRACKING_HASH))
        by = uri.choice("throttle", MEANS)
        self._patience = Patience()
        self._monitor = Monitor(uri.rest, self._patience)
        self._slowing = Slowing(self._monitor.pid, by, self._processors)
        self._found: list[Backend] = []
        self._tracker: VmTracker | None = None
        self._facts: dict[str, Any] = {}
        self._settings: Settings | None = None
        self._pipe: _StatePipe | None = None
        self._discarding: Discarding | None = None
        self._stopped = self._quit = False
        self._torn = False  # somebody let it go on while its memory was still being sent
        self._migrating = False  # QEMU may be carrying out our `migrate`
        try:
            self._check()
            self.uuid = _uuid_of(self._monitor)
            ignored = uri.names("ignore-shared")
            self._found = backends(self._monitor, ignored)
            self.shared = shared_blocks(self._monitor, ignored)
            self._layout = layout(self._monitor)
            specs = specs_of(self._found)
            self.blocks = [RamBlock(s, b.file, 0) for s, b in zip(specs, self._found, strict=True)]
            # another file may be somebody's image
            self.can_release = all(file_system(b.file.fd) == TMPFS for b in self._found)
            self._track(how)
        except BaseException:
            self.close()
            raise
        self.image_size = sum(backend.size for backend in self._found)
        self.process = self._monitor.pid

    def _track(self, how: str) -> None:
        """By the kernel if that can be, else by content: then the statistics say why."""
        if how == TRACKING_HASH:
            return
        try:
            self._tracker = VmTracker(self._monitor, self.blocks)
        except (AttachError, HostLacks) as e:
            if how or e.data.get("reason") == "busy":
                raise
            self._facts = {"dirty-tracking-because": e.message}
            return
        self.tracking = TRACKING_PAGEMAP
        self._facts = {"attach-pause-us": round(self._tracker.paused_seconds * 1e6)}

    def facts(self) -> dict[str, Any]:
        return self._facts

    def _processors(self) -> list[int]:
        """The threads that run the guest: the monitor, disks and network have others."""
        return sorted({int(row["thread-id"]) for row in self._monitor("query-cpus-fast")})

    def throttle(self, percentage: int) -> None:
        if not self._stopped:
            self._slowing.set(percentage)

    def slowed(self) -> dict[str, Any]:
        return self._slowing.meter.report()

    def helpers(self) -> list[dict[str, Any]]:
        return self._slowing.processes()

    def start_tracking(self) -> None:
        self._slowing.begin()
        if self._tracker is not None:
            self._tracker.start()

    def dirty_pages(self, block: int) -> Runs:
        assert self._tracker is not None
        return self._tracker.written(block)

    def written_so_far(self) -> int | None:
        return self._tracker.so_far() if self._tracker is not None else None

    def settle(self) -> None:
        if self._tracker is not None:
            self._tracker.settle()

    def _check(self) -> None:
        """SourceError for a VM that cannot be moved; nothing has happened yet."""
        if note := hollow_note(self._monitor.pid):
            raise SourceError(
                f"part of the VM's memory was given back when it moved (--release-ram; {note}): it "
                f"cannot run here any more; `quit` it"
            )
        status = self._monitor("query-status")
        if status["status"] == "postmigrate":
            raise SourceError(
                "the VM is postmigrate: it has been moved, or somebody tried to; if it does not "
                "run elsewhere, `cont` it first"
            )
        if status["status"] not in ("running", "paused"):
            raise SourceError(
                f"the VM is {status['status']}: only one that runs or is paused can be moved"
            )
        self.running = bool(status["running"])
        migration = self._check_for_others()
        if reasons := migration.get("blocked-reasons"):
            raise SourceError(f"the VM cannot be migrated: {'; '.join(map(str, reasons))}")
        check_devices(self._monitor)
        check_whole(self._monitor.pid)

    def _check_for_others(self) -> dict[str, Any]:
        """query-migrate's answer; SourceError if somebody else migrates the VM."""
        migration: dict[str, Any] = self._monitor("query-migrate")
        if migration.get("status") in _ACTIVE:
            raise SourceError(f"QEMU is migrating this VM by itself: {migration['status']}")
        return migration

    def protect(self) -> ArmedMemory:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        return protect_process(
            self._monitor.pid, self.blocks, lambda: _plant(self._monitor, remote.plant_protecting)
        )

    def stop(self) -> None:
        if not self._stopped:
            if self._slowing.stops_all:  # the monitor is not to be waited for again and again
                self._slowing.release()
            self._check_for_others()
            self._monitor.take_resumes()
            # somebody may have paused it, or let it go on, since we looked
            self.running = bool(self._monitor("query-status")["running"])
            # all that can be done while it still runs
            self._settings = Settings(self._monitor, {_IGNORE_SHARED})
            self._pipe = _StatePipe(self._monitor, reading=True)
            self._discarding = Discarding(self._monitor, self._found)
            self._discarding.set(False)
            self._stopped = True  # first: if the answer is lost, resume must not be a no-op
            self.stopped_at = time.monotonic()
            self._slowing.release()
            self._monitor("stop")
            self._slowing.lift()
            status = self._monitor("query-status")["status"]
            if status in ("running", "suspended"):  # asleep, and a key would wake it
                raise SourceError(f"the VM was stopped and is {status}")
            if layout(self._monitor) != self._layout:
                raise SourceError("memory was plugged into the VM, or out of it, meanwhile")

    def resume(self) -> None:
        if self._stopped:
            if self.running:
                # QEMU drops what it has not read when its client goes: so this is waited for though
                # somebody is in a hurry. Who is so once more leaves it standing still.
                self._patience.hurried = False
                self._go_on()
            self._stopped = False
        if self._discarding is not None:
            self._discarding.set(True)
        self.moved()

    def moved(self) -> None:
        if self._settings is not None:
            self._settings.put_back()

    def _go_on(self) -> None:
        """`cont`, again for a while if QEMU refuses: the other end may have to let go of a disk."""
        until = time.monotonic() + _GO_ON_SECONDS
        while True:
            try:
                self._monitor("cont")
            except SourceError as e:
                if not e.data.get("refused") or time.monotonic() > until:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def _end_migration(self) -> None:
        """Ours, if it is still under way: nothing can be set until it has ended."""
        if self._monitor("query-migrate").get("status") in _ACTIVE:
            self._monitor("migrate_cancel")
        self._wait_for(lambda found: found.get("status") not in _ACTIVE)
        self._migrating = False

    def _wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """query-migrate's answer, once it is as wanted."""
        until = time.monotonic() + _STATE_SECONDS
        while not condition(found := self._monitor("query-migrate")):
            if time.monotonic() > until:
                raise SourceError(f"QEMU's migration stays {found.get('status')}")
            time.sleep(_POLL_SECONDS)
        return dict(found)

    def save_state(self) -> bytes:
        """All but RAM: QEMU's migration stream, in a section."""
        try:
            stream = self._migrate()
        finally:
            if self._migrating:
                self._end_migration()
        self.check()
        return state_of(QEMU, SimpleNamespace(stream=stream))

    def _migrate(self) -> bytes:
        assert self._pipe is not None and self._settings is not None
        self._settings.apply()
        self._migrating = True
        self._monitor("migrate", uri=_StatePipe.URI)
        fd = self._pipe.take()
        try:
            state = _read_all(fd, self._patience)
        finally:
            os.close(fd)
        found = self._wait_for(lambda found: found.get("status") not in _ACTIVE)
        self._migrating = False
        if found.get("status") != "completed":
            reason = found.get("error-desc") or found.get("status")
            raise SourceError(f"QEMU cannot save its devices: {reason}")
        return state

    def check(self) -> None:
        if self._monitor.has_ended():
            raise SourceError(f"QEMU (process {self._monitor.pid}) has ended")
        self._slowing.check()
        # what it wrote meanwhile would be lost, and it would run twice
        if self._stopped and self._monitor.take_resumes():
            raise SourceError("somebody let the VM go on while it was being moved: start again")

    def yank(self) -> None:
        self._patience.hurry()

    def quit(self) -> None:
        self._monitor("quit", within=_QUIT_SECONDS)
        if not self._monitor.has_ended(_QUIT_SECONDS):
            raise SourceError(f"QEMU process {self._monitor.pid} does not end: quit it by hand")
        self._quit = True

    def check_stopped(self) -> None:
        if not self._monitor.has_ended() and self._monitor.take_resumes():
            self._torn = True
            with contextlib.suppress(SourceError):  # in the event loop: others wait for it
                self._monitor("stop", within=_STOP_AGAIN_SECONDS)
        if self._torn:  # for good: a recovery does not mend it
            raise SourceError(
                "somebody let the VM go on here while its memory was still being sent: what came "
                "since then may be torn; end it at both ends, and start it anew"
            )

    def describe(self) -> dict[str, Any]:
        if self._quit:
            return {"source-vm": "ended"}
        if not self._stopped:
            return {}
        if self.released:
            return {"source-vm": "paused, and its memory was given back: `quit` it"}
        return {"source-vm": "paused; `cont` on its monitor would let it run a second time"}

    def close(self) -> None:
        self._slowing.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._pipe is not None:
            self._pipe.close()
        with contextlib.suppress(SourceError):  # it has gone
            self.moved()
        for block in self._found:
            block.file.close()
        self._monitor.close()


def _uuid_of(monitor: Monitor) -> str:
    """The VM's, "" if it was given none."""
    found = str(monitor("query-uuid")["UUID"]).lower()
    return "" if found == _NO_UUID else found


def _read_all(fd: int, patience: Patience) -> bytes:
    """The other end's all; SourceError if it hangs."""
    parts, size = [], 0
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        began = time.monotonic()
        while not poll.poll(Patience.LOOK_SECONDS * 1000):
            if patience.over(began, _STATE_SECONDS):
                raise SourceError(
                    f"QEMU sent nothing of its devices for {time.monotonic() - began:.1f} s"
                )
        if not (part := os.read(fd, 1 << 20)):
            break
        parts.append(part)
        size += len(part)
        if size > MAX_QEMU:
            raise SourceError(
                f"the VM's state without its RAM is above {MAX_QEMU >> 20} MiB: QEMU sends RAM "
                f"in it (since 8.1 it takes memory-backend-file; memfd is not left out)"
            )
    return b"".join(parts)


class QemuDestination(DestinationGuest):
    """A QEMU that waits for a VM (`-incoming defer`), of the same command line but for paths."""

    kind = "qemu"

    def __init__(self, uri: GuestUri) -> None:
        self._path = uri.rest
        self._ignored = uri.names("ignore-shared")
        self._monitor: Monitor | None = None
        self._patience = Patience()
        self._found: list[Backend] = []
        self._loading = False
        self._told = False  # to run, and it did not say no
        self._settings: Settings | None = None
        self._pipe: _StatePipe | None = None
        self._cont: Pending | None = None
        self._planted = -1  # QEMU's own descriptor of what catches missing pages

    def lay_out(self, hello: Hello) -> None:
        if hello.kind != "qemu":
            raise PeerRefused(f"a {hello.kind}: guest cannot go on as a qemu: guest", field="kind")
        try:
            self._monitor = Monitor(self._path, self._patience)
            self._check()
            self._compare_uuids(hello.guest_uuid)
            check_devices(self._monitor)
            self._found = backends(self._monitor, self._ignored)
            check_shared(shared_blocks(self._monitor, self._ignored), hello.shared)
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
        self._clear_what_was_left()
        self._settings = Settings(self._monitor, {_IGNORE_SHARED, _LATE_BLOCK})
        self._pipe = _StatePipe(self._monitor, reading=False)
        if POSTCOPY in hello.capabilities:
            self._arm([ours[spec.name] for spec in hello.blocks])
        self.fresh = [not len(block.data_runs()[0]) for block in self.blocks]

    def _compare_uuids(self, theirs: str) -> None:
        """The guest's, and that which this QEMU was started with, where both have one. QEMU does so
        itself in a migration of its own (validate-uuid, migration/savevm.c)."""
        assert self._monitor is not None
        ours = _uuid_of(self._monitor)
        if self.validate_uuid and ours and theirs and ours != theirs:
            raise PeerRefused(
                f"UUID received is {theirs} and local is {ours}: start the QEMU here with -uuid "
                f"{theirs}, or receive with --no-validate-uuid",
                field="guest-uuid",
            )

    def _clear_what_was_left(self) -> None:
        """A pageferry that was killed before the guest ran here left QEMU a userfaultfd: with that
        its missing pages would be waited for by nobody. QEMU has none of its own yet."""
        assert self._monitor is not None
        try:
            for fd in remote.planted_in(self._monitor.pid):
                remote.uproot(self._monitor.pid, fd)
        except (AttachError, HostLacks, OSError) as e:
            raise DestinationError(
                f"QEMU's memory was armed by a pageferry that was killed, and cannot be disarmed "
                f"({e}): start this QEMU anew"
            ) from e

    def may_be_huge(self, block: int) -> bool:
        assert self._monitor is not None
        return may_be_huge(self.blocks[block].file.fd, self._monitor.pid)

    def _arm(self, found: list[Backend]) -> None:
        """From now on touches of missing pages by this QEMU, or by KVM for it, are caught."""
        assert self._monitor is not None
        pid = self._monitor.pid
        try:
            planted = _plant(self._monitor, remote.plant_missing)
        except (AttachError, HostLacks) as e:
            raise PeerRefused(
                f"postcopy into this QEMU is not possible: {e.message}", field=POSTCOPY
            ) from e
        self._planted = planted.there
        regions: list[Region] = []
        self.memory = ArmedMemory(planted.uffd, regions)
        for index, backend in enumerate(found):
            places = windows(pid, backend.file)
            if sum(place.length for place in places) != backend.size:
                raise PeerRefused(
                    f"memory {backend.name} is mapped twice, or not as a whole", field=POSTCOPY
                )
            for place in places:
                try:
                    register_missing(self.memory.uffd, place.address, place.length)
                except OSError as e:
                    raise PeerRefused(_why_not_armed(e, backend.name), field=POSTCOPY) from e
                regions.append(
                    Region(
                        index,
                        place.offset // PAGE_SIZE,
                        place.length // PAGE_SIZE,
                        place.address,
                        PAGE_SIZE,
                    )
                )

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
        assert self._settings is not None and self._pipe is not None
        self._running = running
        state_into(QEMU, state, found := SimpleNamespace())
        self._loading = True
        try:
            self._settings.apply()
            self._monitor("migrate-incoming", uri=_StatePipe.URI)
            fd = self._pipe.take()
            threading.Thread(target=_feed, args=(fd, found.stream), daemon=True).start()
            self._wait_until_loaded()
        except SourceError as e:
            raise DestinationError(
                f"the QEMU here cannot take the devices' state ({e}): is it started with the "
                f"source's command line? Its log says which device"
            ) from e

    def _wait_until_loaded(self) -> None:
        assert self._monitor is not None
        until = time.monotonic() + _STATE_SECONDS
        while self._monitor("query-status")["status"] == "inmigrate":
            found = self._monitor("query-migrate")
            if found.get("status") == "failed" or time.monotonic() > until:
                raise SourceError(str(found.get("error-desc", "it did not load in time")))
        if self._monitor("query-status")["running"]:
            self._end()  # before the source hears of it and goes on
            raise SourceError("it runs before it was told to (store-global-state=off?)")

    def check(self) -> None:
        if self._monitor is not None and self._monitor.has_ended():
            raise GuestGone(f"QEMU (process {self._monitor.pid}) has ended: see its log")
        if self._told and self._cont is not None and self._cont.wait(0):
            self._told = False
            try:
                self._cont.result()
            except SourceError as e:
                raise GuestGone(f"the VM does not go on here: {e.message}") from e

    def run(self) -> str:
        assert self._monitor is not None
        if self._running:
            self._told = True
            postcopy = self.memory is not None and self.memory.armed
            self._cont = self._monitor.begin("cont")
            if not self._cont.wait(_CONT_AWHILE if postcopy else _CONT_SECONDS):
                if not postcopy:
                    raise DestinationError(f"QEMU at {self._path} does not answer cont")
                # its main thread sleeps on a page: it goes on when that comes, over this link or
                # the next
                return self._where()
            try:
                self._cont.result()
            except SourceError as e:
                self._told = not e.data.get("refused")
                raise DestinationError(e.message) from e
            self._told = False
        return self._where()

    def _where(self) -> str:
        assert self._monitor is not None
        return f"QEMU process {self._monitor.pid} ({self._path})"

    def arrived(self) -> None:
        if self._told and self._cont is not None:
            self._cont.wait(_CONT_SECONDS)  # nothing is left that it could sleep on
            self.check()
            if self._told:
                raise GuestGone(f"QEMU at {self._path} does not answer cont")

    def started(self) -> None:
        if self._settings is not None:
            with contextlib.suppress(SourceError):
                self._settings.put_back()

    def conclude(self) -> dict[str, Any]:
        self._uproot()
        return {}

    def _uproot(self) -> None:
        """QEMU is as it was: it has no descriptor of ours. Nothing is caught any more."""
        if self._planted >= 0 and self._monitor is not None:
            there, self._planted = self._planted, -1
            with contextlib.suppress(AttachError, HostLacks, OSError):
                remote.uproot(self._monitor.pid, there)

    def yank(self) -> None:
        if self._told and self.memory is not None and self.memory.armed:
            return  # that it goes on is waited for shortly, and it may sleep on a page for long
        self._patience.hurry()
        self.hurry()

    def hurry(self) -> None:
        if self._monitor is not None and self._loading:
            self._monitor.kill()  # it would be ended anyway, and may be asleep on a page

    def discard(self) -> None:
        """A QEMU that was given devices is of no use any more, and must not run: it is ended, by
        force if it does not answer. DestinationError if it may still run, or may have run."""
        if self._monitor is not None and self._loading:
            self._end()
        else:
            self._stay_as_it_was()
        self.close()
        if self._told:
            self._told = False
            raise DestinationError("QEMU was told to run and did not answer: it may have run")

    def _stay_as_it_was(self) -> None:
        """It waits for another."""
        if self._pipe is not None:
            self._pipe.close()
        if self.memory is not None and self.memory.uffd >= 0:
            self.memory.disarm()
            self._uproot()

    def _end(self) -> None:
        assert self._monitor is not None
        with contextlib.suppress(PageferryError):
            self._monitor("quit", within=_QUIT_SECONDS)
        if not self._monitor.has_ended(_QUIT_SECONDS):
            self._monitor.kill()
            if not self._monitor.has_ended(_QUIT_SECONDS):
                raise DestinationError(f"QEMU process {self._monitor.pid} does not end")

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        for backend in self._found:
            backend.file.close()
        if self.memory is not None:
            self.memory.close()
        if self._monitor is not None:
            self._monitor.close()


def _plant(monitor: Monitor, plant: Callable[..., remote.Planted]) -> remote.Planted:
    """The userfaultfd in QEMU; by a descriptor of ours where QEMU's user may have none that catches
    the kernel's touches."""
    try:
        return plant(monitor.pid)
    except HostLacks:
        try:
            device = os.open(remote.DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            device = -1
        if device < 0:
            raise
    try:
        with monitor.lent(device) as there:
            return plant(monitor.pid, there)
    finally:
        os.close(device)


def _why_not_armed(e: OSError, name: str) -> str:
    if e.errno == errno.EBUSY:
        return (
            f"memory {name} is watched by somebody else's userfaultfd, or by that of a pageferry "
            f"that was killed: start this QEMU anew"
        )
    return (
        f"the kernel cannot catch missing pages of memory {name} ({e.strerror}): it can for files "
        f"in tmpfs (/dev/shm) and memfds"
    )


def _feed(fd: int, state: bytes) -> None:
    """Write all of it; a QEMU that refuses it closes its end."""
    view = memoryview(state)
    try:
        with contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(fd, view) :]
    finally:
        os.close(fd)
