"""A VM of an unmodified QEMU in which the boot guest runs, and what is seen of it from outside.

The guest counts its touches in its RAM, which is read here without its doing: where it stands still
and where it goes on is seen to a millisecond, whoever moves it. Its own clock cannot say that: KVM
lets it stand still with the machine, or jump, depending on when the destination was started
(kvm_synchronize_tsc in arch/x86/kvm/x86.c).

QEMU's own migrations of such a VM are here too, as they are with a stopped machine in qemu.py.
Knows nothing of pageferry.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .boot_guest import BootGuest, Part
from .lab import BenchError, Lab, processor_seconds, wait_for
from .qemu import NO_LIMIT, Emulator, Qemu, Qmp

_SAMPLE_SECONDS = 0.001
_MOVES_SECONDS = 0.02
# Precopy moves nearly nothing, so that all memory is left to postcopy.
_PRECOPY_RATE = 1 << 20
_PATIENCE_SECONDS = 5.0
_UP_SECONDS, _HANGS_SECONDS = 20.0, 300.0


@dataclass(frozen=True)
class Shape:
    """What both ends of a migration have in common. `rom`: the boot guest; sizes in bytes."""

    host: Qemu
    size: int
    rom: str


class BootVm(Emulator):
    """A QEMU process that runs the boot guest, or waits for it (`incoming`). A context manager.

    `ram`: its RAM file, shared; without, its RAM is private, as QEMU's postcopy wants it at the
    destination. `monitor`: a QMP socket that nobody has. `guest`: to steer and read the guest.
    """

    def __init__(
        self, lab: Lab, name: str, shape: Shape, ram: str = "", incoming: bool = False,
        before: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.monitor = os.path.join(lab.directory, f"{name}-2.qmp")
        mib = f"{shape.size >> 20}M"
        kind = f"memory-backend-file,mem-path={ram},share=on" if ram else "memory-backend-ram"
        arguments = [
            "-accel", shape.host.accel, "-cpu", shape.host.cpu, "-nic", "none",
            "-object", f"{kind},id=ram,size={mib}", "-machine", "q35,memory-backend=ram",
            "-m", mib, "-bios", shape.rom, "-qmp", f"unix:{self.monitor},server=on,wait=off",
            *(("-incoming", "defer") if incoming else ()),
        ]  # fmt: skip
        super().__init__(lab, name, arguments, before)
        try:
            self.guest = BootGuest(ram or self._private(shape.size))
            if not incoming:
                wait_for("the guest to start", self.guest.up, _UP_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.private = not ram

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if hasattr(self, "guest"):
            self.guest.close()
        super().__exit__(kind, error, trace)

    def _private(self, size: int) -> Part:
        """Where address 0 of the guest is in QEMU's memory."""
        answer = self.qmp.ask("human-monitor-command", **{"command-line": "gpa2hva 0"})
        found = re.search(r"is (0x[0-9a-f]+)", str(answer))
        if found is None:
            raise BenchError(f"QEMU does not say where its guest's memory is: {answer}")
        return f"/proc/{self.process.pid}/mem", int(found.group(1), 16), size

    def own_seconds(self) -> float:
        """Processor time that QEMU has used so far, without that of the guest's processor."""
        return processor_seconds(self.process) - self.guest_seconds()

    def guest_seconds(self) -> float:
        """Processor time that the guest's processor has used so far."""
        return sum(map(_thread_seconds, _guest_threads(self.process.pid)))

    def stop(self) -> None:
        """The guest stands still."""
        self.qmp.ask("stop")


def _guest_threads(pid: int) -> list[str]:
    """Those that are a guest's processors, by their names (debug-threads=on)."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        path = f"/proc/{pid}/task/{thread}"
        with contextlib.suppress(OSError), open(f"{path}/comm") as f:
            if f.read().startswith(("CPU ", "ALL CPUs")):
                found.append(path)
    return found


def _thread_seconds(path: str) -> float:
    """In more detail than stat has it (Documentation/scheduler/sched-stats.rst of Linux)."""
    with contextlib.suppress(OSError), open(f"{path}/schedstat") as f:
        return int(f.read().split()[0]) / 1e9
    return 0.0


# ---- watching ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """Touches: a second, and a second of the guest's processor time at the source (None if it had
    none)."""

    touches: float
    by_processor: float | None


@dataclass(frozen=True)
class _Sample:
    """Of the guest's touches and its processor time, so far."""

    when: float
    touches: int
    seconds: float


class Watch:
    """Sees a guest stop at one end and go on at the other: reads its count of touches there a
    thousand times a second. A context manager.

    `stopped`: when it was last seen to move at the source; `resumed`: when it was first seen to
    have moved at the destination. Each is late by up to a sample.
    """

    def __init__(self, here: BootVm, there: BootVm) -> None:
        self._here, self._there = here.guest, there.guest
        # Memory that is private must not be read before the guest runs in it: that would make up
        # a page that is still to come.
        self._monitor = Qmp(there.monitor) if there.private else None
        self._threads = _guest_threads(here.process.pid)
        self._samples: list[_Sample] = []
        self.stopped, self.resumed = 0.0, 0.0
        self._problem: BaseException | None = None
        self._end, self._goes_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._monitor is not None:
            self._monitor.close()

    def wait_until_resumed(self, seconds: float = 30.0) -> None:
        """BenchError if the guest does not go on at the destination."""
        seen = self._goes_on.wait(seconds)
        if self._problem is not None:
            raise BenchError(f"the guest cannot be watched: {self._problem}") from self._problem
        if not seen:
            raise BenchError("the guest does not go on at the destination")

    def rate(self, begin: float, end: float) -> Rate | None:
        """Between two times, both before or both after the switch; None if they are too near to
        say."""
        between = [sample for sample in self._samples if begin <= sample.when <= end]
        if len(between) < 2 or between[-1].when - between[0].when < _MOVES_SECONDS:
            return None
        first, last = between[0], between[-1]
        touches, seconds = last.touches - first.touches, last.seconds - first.seconds
        return Rate(touches / (last.when - first.when), touches / seconds if seconds > 0 else None)

    def _watch(self) -> None:
        try:
            while not self._end.wait(_SAMPLE_SECONDS):
                self._look()
        except BaseException as e:
            self._problem = e
            self._goes_on.set()

    def _look(self) -> None:
        """The count only rises, and what is copied of it is never above that of the source: when
        it is, the guest itself has counted on."""
        if self.resumed:
            self._note(self._there.get("touches"))
            return
        there = self._there.get("touches") if self._runs_there() else 0
        now, here = time.monotonic(), self._here.get("touches")
        if there > here:
            self.resumed = now
            self._note(there)
            self._goes_on.set()
            return
        if not self._samples or here != self._samples[-1].touches:
            self.stopped = now
        self._note(here, now)

    def _note(self, touches: int, now: float = 0.0) -> None:
        seconds = sum(map(_thread_seconds, self._threads))
        self._samples.append(_Sample(now or time.monotonic(), touches, seconds))

    def _runs_there(self) -> bool:
        if self._monitor is None:
            return True
        if not self._samples or self.stopped == self._samples[-1].when:
            return False  # it ran here just now
        return bool(self._monitor.ask("query-status")["running"])


# ---- QEMU's own migration ---------------------------------------------------------------


def set_up(here: BootVm, there: BootVm, downtime: int, capabilities: Sequence[str]) -> None:
    """`downtime`: the limit, milliseconds."""
    states = [{"capability": name, "state": True} for name in capabilities]
    for machine in (here, there):
        if states:
            machine.qmp.ask("migrate-set-capabilities", capabilities=states)
        machine.qmp.ask(
            "migrate-set-parameters", **{"max-bandwidth": NO_LIMIT, "downtime-limit": downtime}
        )


def use_channels(here: BootVm, there: BootVm, channels: int) -> None:
    for machine in (here, there):
        machine.qmp.ask("migrate-set-parameters", **{
            "multifd-channels": channels, "multifd-compression": "none",
        })  # fmt: skip


def precopy(here: BootVm, there: BootVm, uri: str, max_rounds: int) -> dict[str, Any]:
    """query-migrate's answer at the end. BenchError after so many rounds, and some seconds, in
    which QEMU measures its guest: by itself it never gives up."""
    there.qmp.ask("migrate-incoming", uri=uri)
    begin = time.monotonic()
    here.qmp.ask("migrate", uri=uri)

    def over() -> dict[str, Any] | None:
        if report := here.ended():
            return report
        memory = here.qmp.ask("query-migrate").get("ram", {})
        rounds, seconds = memory.get("dirty-sync-count", 0), time.monotonic() - begin
        if rounds <= max_rounds or seconds <= _PATIENCE_SECONDS:
            return None
        here.qmp.ask("migrate_cancel")
        raise BenchError(
            f"not converging after {rounds} rounds, {seconds:.1f} s: the guest "
            f"writes {memory['dirty-pages-rate']} pages/s, {memory['mbps'] / 8:.0f} MB/s are moved"
        )

    return wait_for("QEMU's migration", over, _HANGS_SECONDS, every=0.01)


def can(machine: BootVm, capability: str) -> bool:
    """Does this QEMU have it?"""
    rows = machine.qmp.ask("query-migrate-capabilities")
    return any(row["capability"] == capability for row in rows)


def postcopy(here: BootVm, there: BootVm, uri: str) -> dict[str, Any]:
    """Postcopy as soon as it can begin; query-migrate's answer at the end."""
    here.qmp.ask("migrate-set-parameters", **{
        "max-bandwidth": _PRECOPY_RATE, "max-postcopy-bandwidth": 0, "downtime-limit": 1,
    })  # fmt: skip
    there.qmp.ask("migrate-incoming", uri=uri)
    here.qmp.ask("migrate", uri=uri)
    wait_for("QEMU's precopy", lambda: here.qmp.ask("query-migrate").get("status") == "active")
    here.qmp.ask("migrate-start-postcopy")
    return wait_for("QEMU's postcopy", here.ended, _HANGS_SECONDS, every=0.01)
