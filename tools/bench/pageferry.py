"""Runs pageferry as its users do: by its command line, in processes of its own.

Imports nothing of what it measures, so that `--pageferry` can name another installation.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .lab import BenchError, Child, Lab, PeakMemory, loopback_bytes, processor_seconds, wait_for

_LISTEN = "tcp://127.0.0.1:0"


def default_command() -> list[str]:
    """This installation."""
    return [sys.executable, "-m", "pageferry"]


@dataclass
class Outcome:
    """One run. Times in seconds, sizes in bytes; `cpu` and `peak` by side."""

    wall: float
    report: dict[str, Any]
    received: dict[str, Any]
    code: int = 0
    message: str = ""
    wire: int = 0  # what the loopback interface counted
    cpu: dict[str, float] = field(default_factory=dict)
    cpu_before: float = 0.0  # of `cpu`, what the receiver had used when it listened
    peak: dict[str, int] = field(default_factory=dict)
    groups: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """QEMU's total-time: without the start of the command."""
        return float(self.report["total-time"]) / 1000


def send(
    lab: Lab, source: str, into: str, options: list[str],
    while_sending: Callable[[Child], None] = lambda child: None, receive: Sequence[str] = (),
) -> Outcome:  # fmt: skip
    """`pageferry send` to a `pageferry receive`, over TCP. `receive`: options of that."""
    with PeakMemory() as memory:
        receiving = lab.start(
            [*lab.pageferry, "receive", "--listen", _LISTEN, "--into", into,
             "--once", "--json", "--quiet", *receive]
        )  # fmt: skip
        memory.watch("destination", receiving)
        try:
            endpoint = wait_for("the receiver to listen", lambda: endpoint_of(receiving))
            cpu_before = processor_seconds(receiving)
            before, begin = loopback_bytes(), time.monotonic()
            sending = lab.start(
                [*lab.pageferry, "send", source, endpoint, *options, "--json", "--quiet"]
            )
            memory.watch("source", sending)
            while_sending(sending)
            source_cpu = sending.join()
            wall = time.monotonic() - begin
            destination_cpu = receiving.join(20)
        finally:
            receiving.kill()
        wire = loopback_bytes() - before
    report, received = last_object(sending), last_object(receiving)
    cpu = {"source": source_cpu, "destination": destination_cpu}
    return Outcome(
        wall, report, received, wire=wire, cpu=cpu, cpu_before=cpu_before, peak=memory.peak,
        groups=_groups(report, received, sum(cpu.values())),
    )  # fmt: skip


def copy(lab: Lab, source: str, destination: str, options: list[str]) -> Outcome:
    """`pageferry copy`, which may fail: see `code` and `message`."""
    with PeakMemory() as memory:
        begin = time.monotonic()
        child = lab.start(
            [*lab.pageferry, "copy", source, destination, *options, "--json", "--quiet"]
        )
        memory.watch("both", child)
        child.join(check=False)
        wall = time.monotonic() - begin
    assert child.code is not None
    report: dict[str, Any] = {}
    with contextlib.suppress(BenchError):
        report = last_object(child)
    message = " ".join(child.errors().splitlines()[-1:])
    return Outcome(wall, report, {}, child.code, message, cpu={"both": child.cpu}, peak=memory.peak)


def endpoint_of(receive: Child) -> str:
    """Where it listens, as soon as it says so."""
    first, newline, _ = receive.output().partition("\n")
    if newline:
        return str(json.loads(first)["endpoint"])
    if not receive.running():
        receive.join()
        raise BenchError("the receiver ended before it listened")
    return ""


def last_object(child: Child) -> dict[str, Any]:
    """The report: the last line of its output."""
    lines = child.output().splitlines()
    try:
        report = json.loads(lines[-1])
    except (IndexError, ValueError) as e:
        raise BenchError(f"{child.name} printed no report: {child.errors()}") from e
    assert isinstance(report, dict)
    return report


def _groups(
    report: dict[str, Any], received: dict[str, Any], everything: float
) -> dict[str, float]:
    """Processor seconds by group of processes. `other`: what no process of the reports has
    used, that is the fork servers, resource trackers, and the ends of the coordinators."""
    groups: dict[str, float] = {}
    rows = {(p["pid"]): p for r in (report, received) for p in r.get("processes", [])}
    for row in rows.values():
        name = str(row["name"]).rpartition("-")[0] or str(row["name"])
        groups[name] = groups.get(name, 0.0) + row["cpu-time"] / 1000
    groups["other"] = max(0.0, everything - sum(groups.values()))
    return groups
