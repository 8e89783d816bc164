"""How long until the first page moves, and what an installation weighs on the disk.

The first page is seen from outside: this process starts `pageferry send` and watches the
counter of the loopback interface, which is ours alone, until more than a handshake went over
it. Without a network namespace of our own that is not measured, and the reports must do.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from . import content, pageferry
from .lab import Child, Lab, loopback_bytes, remove, say
from .table import median, number, render

_SIZE = 64 << 20
# More than all handshakes and hellos, less than the first frame of pages.
_HANDSHAKE = 64 << 10
_LOOK_SECONDS = 0.001


@dataclass
class _Times:
    """Seconds of one run after the other, by what was timed."""

    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        self.rows.setdefault(what, []).append(seconds)


def measure(lab: Lab, reps: int) -> tuple[str, list[dict[str, Any]]]:
    """Times of all phases, and sizes of what must be installed."""
    source, destination = lab.path("source"), lab.path("destination")
    content.make(source, "random", _SIZE)
    times = _Times()
    for rep in range(reps):
        remove(destination)
        _one(lab, times, source, destination)
        say(f"round {rep + 1} of {reps}")
    lines = [
        [what, number(min(s)), number(median(s)), number(max(s))] for what, s in times.rows.items()
    ]
    header = ("seconds, each from the start of its process", "min", "median", "max")
    weights = _weights("pageferry")
    rows: list[dict[str, Any]] = [
        {"what": what, "seconds": seconds} for what, seconds in times.rows.items()
    ]
    rows += [{"distribution": name, "bytes": size} for name, size in weights.items()]
    return f"{render(header, lines)}\n\n{_weight_table(weights)}", rows


def _one(lab: Lab, times: _Times, source: str, destination: str) -> None:
    python = [sys.executable, "-c"]
    for what, argv in (
        ("python, for comparison", [*python, "pass"]),
        ("python -c 'import pageferry'", [*python, "import pageferry"]),
        ("pageferry --version", [*lab.pageferry, "--version"]),
    ):
        begin = time.monotonic()
        lab.start(argv).join()
        times.add(what, time.monotonic() - begin)
    base, begin = loopback_bytes(), time.monotonic()

    def watch(child: Child) -> None:
        """From the moment the sender was started."""
        started = time.monotonic()
        times.add("pageferry receive: listening", started - begin)
        while lab.isolated and child.running():
            if loopback_bytes() - base > _HANDSHAKE:
                times.add("pageferry send: first page on the wire", time.monotonic() - started)
                return
            time.sleep(_LOOK_SECONDS)

    outcome = pageferry.send(
        lab, f"image:{source}", f"ram:{destination}", ["--codec", "none"], watch
    )
    first = outcome.report.get("first-page-time")
    times.add("pageferry send: everything, 64 MiB", outcome.wall)
    times.add("  of it before and after the migration", outcome.wall - outcome.total)
    times.add("  of it setup-time", outcome.report.get("setup-time", 0) / 1000)
    if first is not None:
        times.add("  of it first-page-time", first / 1000)


def _weights(root: str) -> dict[str, int]:
    """Bytes on disk of each distribution that `root` needs, itself left out."""
    found: dict[str, int] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # needed on other systems only
        found[name] = 0 if name == root else _size(distribution)
        for requirement in distribution.requires or []:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            if match is not None and "extra ==" not in requirement:
                waiting.append(re.sub(r"[-_.]+", "-", match[0]).lower())
    found.pop(root, None)
    return found


def _size(distribution: metadata.Distribution) -> int:
    """By its RECORD, as the files are now."""
    total = 0
    for file in distribution.files or []:
        path = str(distribution.locate_file(file))
        total += os.stat(path).st_size if os.path.isfile(path) else 0
    return total


def _weight_table(weights: dict[str, int]) -> str:
    lines = [
        [name, f"{size / 1e6:.1f}"]
        for name, size in sorted(weights.items(), key=lambda item: -item[1])
    ]
    lines.append(
        ["all that pageferry needs, Python itself left out", f"{sum(weights.values()) / 1e6:.1f}"]
    )
    return render(("installed distribution", "MB"), lines)
