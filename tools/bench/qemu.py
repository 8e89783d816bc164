"""QEMU's own migration of a stopped machine, as a peer: precopy and multifd.

The machine is never started (-S): it has no disk, no firmware runs, and its RAM is a shared
file that holds the content to move. Both ends are fresh processes each time, since a machine
that has been migrated away cannot be migrated again without running. Knows no other method.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .lab import (
    BenchError,
    Child,
    Lab,
    PeakMemory,
    free_port,
    loopback_bytes,
    processor_seconds,
    wait_for,
)

PROGRAM = "qemu-system-x86_64"
# Firmware and tables live below: not compared.
SKIP = 1 << 20
NO_LIMIT = 100 << 30  # bytes a second; QEMU's default is 128 MiB/s


class Qmp:
    """One command, one answer, events dropped."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise BenchError(f"QEMU: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise BenchError(f"QEMU ended during {command}")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Emulator:
    """A QEMU process and its QMP socket. A context manager.

    `before`: what to put before the command.
    """

    def __init__(
        self, lab: Lab, name: str, arguments: list[str], before: Sequence[str] = ()
    ) -> None:
        where = os.path.join(lab.directory, f"{name}.qmp")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(where)
        self.process: Child = lab.start(
            [*before, PROGRAM, "-name", f"{name},debug-threads=on", "-nodefaults",
             "-display", "none", *arguments, "-qmp", f"unix:{where},server=on,wait=off"]
        )  # fmt: skip
        try:
            self.qmp = wait_for(f"QEMU ({name})", lambda: self._connect(where))
        except BaseException:
            self.process.kill()
            raise

    def _connect(self, where: str) -> Qmp | None:
        if not self.process.running():
            self.process.join()
            raise BenchError("QEMU ended at once")
        try:
            return Qmp(where)
        except OSError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with contextlib.suppress(BenchError, OSError):
            self.qmp.ask("quit")
            self.process.join(10, check=False)
        self.qmp.close()
        self.process.kill()

    def ended(self) -> dict[str, Any] | None:
        """query-migrate, once the migration is over."""
        answer: dict[str, Any] = self.qmp.ask("query-migrate")
        status = answer.get("status")
        if status in ("failed", "cancelled"):
            raise BenchError(f"QEMU: migration {status}: {answer.get('error-desc', '')}")
        return answer if status == "completed" else None


class Machine(Emulator):
    """A stopped virtual machine whose RAM is the file `ram`.

    `ready_memory`: have QEMU touch all pages first, as those of a machine that runs are.
    """

    def __init__(
        self, lab: Lab, name: str, ram: str, size: int, accel: str, cpu: str,
        ready_memory: bool, incoming: bool = False,
    ) -> None:  # fmt: skip
        mib = f"{size >> 20}M"
        backend = f"memory-backend-file,id=ram,size={mib},mem-path={ram},share=on"
        argv = [
            "-S", "-accel", accel, "-cpu", cpu,
            "-object", f"{backend},prealloc={'on' if ready_memory else 'off'}",
            "-machine", "q35,memory-backend=ram", "-m", mib,
        ]  # fmt: skip
        super().__init__(lab, name, [*argv, "-incoming", "defer"] if incoming else argv)

    def set_up(self, channels: int, compression: str) -> None:
        """`channels` 0: plain precopy."""
        ask = self.qmp.ask
        ask(
            "migrate-set-capabilities",
            capabilities=[{"capability": "multifd", "state": channels > 0}],
        )
        ask("migrate-set-parameters", **{"max-bandwidth": NO_LIMIT})
        if channels:
            ask("migrate-set-parameters", **{
                "multifd-channels": channels, "multifd-compression": compression,
            })  # fmt: skip

    def ready(self) -> bool:
        """At the destination: is all memory there, could it run?"""
        return bool(self.qmp.ask("query-status")["status"] != "inmigrate")


@dataclass
class Moved:
    """One migration. Seconds and bytes; `cpu` and `peak` by side."""

    total: float
    until_ready: float
    wire: int
    cpu: dict[str, float]
    peak: dict[str, int]
    report: dict[str, Any]


@dataclass
class Qemu:
    """How QEMU is run here. `accel` is what works of `accelerators`."""

    lab: Lab
    accelerators: list[str]
    cpu: str
    accel: str = ""

    def missing(self) -> str:
        """Why it cannot be run, or nothing."""
        if shutil.which(PROGRAM) is None:
            return f"not installed: {PROGRAM}"
        if self.accel:
            return ""
        problem = "no accelerator was named"
        for accel in self.accelerators:
            ram = self.lab.path("probe")
            try:
                with Machine(self.lab, "probe", ram, 64 << 20, accel, self.cpu, False) as machine:
                    version = machine.qmp.ask("query-version")["qemu"]
                self.accel = accel
                text = ".".join(str(version[part]) for part in ("major", "minor", "micro"))
                self.lab.note("QEMU", f"{text}, accel {accel}, cpu {self.cpu}")
                return ""
            except BenchError as e:
                problem = str(e)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(ram)
        return problem

    def migrate(
        self, source: str, destination: str, size: int, touched: bool,
        channels: int, compression: str,
    ) -> Moved:  # fmt: skip
        """The RAM file `source` to the RAM file `destination`."""
        lab, how = self.lab, (size, self.accel, self.cpu)
        with (
            PeakMemory() as memory,
            Machine(lab, "source", source, *how, ready_memory=True) as here,
            Machine(
                lab, "destination", destination, *how, ready_memory=touched, incoming=True
            ) as there,
        ):
            memory.watch("source", here.process)
            memory.watch("destination", there.process)
            for machine in (here, there):
                machine.set_up(channels, compression)
            uri = f"tcp:127.0.0.1:{free_port()}"
            there.qmp.ask("migrate-incoming", uri=uri)
            sides = {"source": here.process, "destination": there.process}
            used = {side: processor_seconds(child) for side, child in sides.items()}
            before, begin = loopback_bytes(), time.monotonic()
            here.qmp.ask("migrate", uri=uri)
            report = wait_for("QEMU's migration", here.ended, 300, every=0.01)
            wait_for("QEMU's destination", there.ready, 60)
            until_ready = time.monotonic() - begin
            wire = loopback_bytes() - before
            cpu = {s: processor_seconds(child) - used[s] for s, child in sides.items()}
        return Moved(report["total-time"] / 1000, until_ready, wire, cpu, memory.peak, report)
