"""A running VM of an unmodified QEMU moves: by pageferry, and by QEMU itself.

The guest does nothing, writes slowly, or writes fast, and counts what it does. The same guest, the
same downtime limit, no limit to the bandwidth; all methods take turns within a round, and ratios
are taken within a round, since two runs an hour apart are not to be compared. Postcopy is measured
by what the guest itself saw: how long its touches took, and how much it got done.

When the guest has moved, its oracle is asked, and all memory is compared with that of the source,
which stands still. How a VM is run and watched is in boot_vm.py, and not known here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ...transport.pages import PAGE_SIZE
from ...transport.quantities import format_bytes
from . import boot_guest, boot_vm, content, pageferry
from .boot_guest import AT_RANDOM, IDLE, LOW, READ_AT_RANDOM, BootGuest
from .boot_vm import BootVm, Shape, Watch
from .lab import BenchError, Lab, Others, free_port, loopback_bytes, remove, say
from .qemu import Qemu
from .qemu_postcopy import nodelay_library
from .table import median, megabytes, number, ratio, ratio_text, render

PARTS = ("precopy", "postcopy")
_LIMIT = 300  # milliseconds of downtime
# pageferry's default; QEMU itself never gives up
_MAX_ROUNDS = 30
_NOT_CONVERGING = "not converging"  # a result; whatever else there is instead of one is not
_CHANNELS = 4
_OURS = ("--workers", "2")
_QUICK_SIZE = 256 << 20
# Above that the addresses of the guest are not those of its RAM's bytes (q35 from 2 GiB on).
_HIGHEST = 2 << 30
_BEFORE_SECONDS = 0.5
_AFTER_SECONDS = 1.0
_CALIBRATION_SECONDS = 0.2
# A touch that took longer waited for its page: see qemu_postcopy.py.
_WAITED_SECONDS = 50e-6
_CHUNK = 4 << 20
_GUESTS_OWN = 16  # bytes at the beginning of each page that the guest writes


@dataclass(frozen=True)
class _Guest:
    """What the guest does to a quarter of its RAM, so many times a second."""

    name: str
    mode: int
    rate: int


_GUESTS = (
    _Guest("idle", READ_AT_RANDOM, 5_000),
    _Guest("slow", AT_RANDOM, 5_000),
    _Guest("fast", AT_RANDOM, 50_000),
)
GUEST_NAMES = tuple(guest.name for guest in _GUESTS)


@dataclass(frozen=True)
class _Method:
    """One of those that are compared."""

    name: str
    qemu: bool = True
    postcopy: bool = False
    channels: int = 0
    capabilities: tuple[str, ...] = ()
    nodelay: bool = False


_MULTIFD = _Method("QEMU multifd-4", channels=_CHANNELS, capabilities=("multifd",))
_PREEMPT = ("postcopy-ram", "postcopy-preempt")
_PRECOPIES = (_Method("pageferry", qemu=False), _MULTIFD, _Method("QEMU precopy"))
_POSTCOPIES = (
    _Method("pageferry", qemu=False, postcopy=True),
    _Method("QEMU preempt", postcopy=True, capabilities=_PREEMPT),
    _Method("QEMU no preempt", postcopy=True, capabilities=("postcopy-ram",)),
    _Method("QEMU nodelay preempt", postcopy=True, capabilities=_PREEMPT, nodelay=True),
)
_METHODS = {"precopy": _PRECOPIES, "postcopy": _POSTCOPIES}
# what we are compared with
_RIVALS = {"precopy": _MULTIFD.name, "postcopy": "QEMU preempt"}


@dataclass(frozen=True)
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int
    quick: bool
    parts: Sequence[str]
    guests: Sequence[str]
    accel: str
    cpu: str


@dataclass
class Run:
    """One migration. Seconds, but `downtime` and `stopped` in milliseconds and `waits` in
    microseconds; touches a second.

    `downtime` is what the method reports, `stopped` how long the guest was seen to do nothing;
    `slower`, `dearer`: the share of its touches that the guest lost to the migration before it
    stopped, by time and by processor time; `after`: touches in the second after it went on.
    """

    total: float
    downtime: float
    stopped: float
    wire: int
    rounds: int
    before: float
    slower: float | None
    dearer: float | None
    after: float | None
    cpu: dict[str, float]
    faults: int | None = None
    waited: int | None = None
    waits: dict[str, float] = field(default_factory=dict)
    right: bool = True
    wrong: str = ""
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """A Run, or why there is none, and of what."""

    part: str
    guest: str
    method: str
    rep: int
    run: Run | None = None
    problem: str = ""
    others: float = 0.0  # share of all processors that somebody else had meanwhile


@dataclass
class _Moved:
    """What a method says of a migration."""

    report: dict[str, Any]
    wire: int
    cpu: dict[str, float]
    faults: int | None = None


# ---- one run ----------------------------------------------------------------------------


class _Bench:
    """The runs of a plan."""

    def __init__(self, lab: Lab, plan: Plan) -> None:
        self._lab, self._plan = lab, plan
        self._high = LOW + plan.size // 4
        self._delays: dict[_Guest, int] = {}
        self._library = ""
        host = Qemu(lab, plan.accel.split(","), plan.cpu)
        if problem := host.missing():
            raise BenchError(f"QEMU cannot be run: {problem}")
        rom = os.path.join(lab.directory, "rom")
        boot_guest.rom_image(rom, mode=IDLE)
        self._shape = Shape(host, plan.size, rom)
        self._source, self._destination = lab.path("vm-source"), lab.path("vm-destination")
        self.rows: list[Row] = []

    def measure(self) -> None:
        for rep in range(self._plan.reps):
            for part in self._plan.parts:
                for guest in self._guests(part):
                    self._round(part, guest, rep)
        remove(self._source)

    def _guests(self, part: str) -> list[_Guest]:
        """Those that are measured. In postcopy a guest that does nothing waits for nothing."""
        skipped = {"idle", "slow"} if self._plan.quick else {"idle"}
        names = set(self._plan.guests) - (skipped if part == "postcopy" else set())
        return [guest for guest in _GUESTS if guest.name in names]

    def _round(self, part: str, guest: _Guest, rep: int) -> None:
        """All methods in turn, beginning with another one each time."""
        methods = _METHODS[part]
        first = rep % len(methods)
        for method in [*methods[first:], *methods[:first]]:
            row = Row(part, guest.name, method.name, rep)
            self.rows.append(row)
            others = Others()
            try:
                row.run = self._run(guest, method)
            except (BenchError, KeyError) as e:
                row.problem = _reason(e)
            row.others = others.share()
            say(_progress(row))

    def _run(self, guest: _Guest, method: _Method) -> Run:
        self._make_source()
        with self._machines(method) as (here, there):
            self._start(here, guest)
            ticks = here.guest.cycles_per_second(_CALIBRATION_SECONDS)
            with Watch(here, there) as watch:
                time.sleep(_BEFORE_SECONDS)
                begin = time.monotonic()
                moved = (self._by_qemu if method.qemu else self._by_us)(method, here, there)
                watch.wait_until_resumed()
                histogram = there.guest.histogram(since=here.guest.histogram())
                if method.postcopy:
                    left = watch.resumed + _AFTER_SECONDS - time.monotonic()
                    time.sleep(max(0.0, left))
            there.stop()
            run = self._read(method, moved, watch, begin)
            if method.postcopy:
                self._read_waits(run, histogram, ticks)
            run.wrong = self._problem(here.guest, there.guest)
            run.right = not run.wrong
            return run

    @contextlib.contextmanager
    def _machines(self, method: _Method) -> Iterator[tuple[BootVm, BootVm]]:
        """The guest at the source, and a destination that waits, its memory new."""
        before: list[str] = []
        if method.nodelay:
            self._library = self._library or nodelay_library(self._lab)
            before = ["env", f"LD_PRELOAD={self._library}"]
        remove(self._destination)
        # QEMU's postcopy refuses shared memory at the destination
        ram = "" if method.qemu and method.postcopy else self._destination
        try:
            with (
                BootVm(self._lab, "source", self._shape, self._source, before=before) as here,
                BootVm(
                    self._lab, "destination", self._shape, ram, incoming=True, before=before
                ) as there,
            ):
                yield here, there
        finally:
            remove(self._destination)

    def _make_source(self) -> None:
        """RAM of random bytes, but for what the guest expects to be zero."""
        if not os.path.exists(self._source):
            content.make(self._source, "random", self._plan.size)
        with open(self._source, "r+b") as f, mmap.mmap(f.fileno(), self._high) as mapping:
            memory = np.frombuffer(mapping, np.uint8).reshape(-1, PAGE_SIZE)
            memory[: LOW // PAGE_SIZE] = 0
            memory[LOW // PAGE_SIZE :, :_GUESTS_OWN] = 0
            del memory

    def _start(self, here: BootVm, guest: _Guest) -> None:
        """It does what it is to do, at its rate."""
        if guest not in self._delays:
            self._delays[guest] = self._calibrate(here, guest)
        self._set(here.guest, guest, self._delays[guest])

    def _set(self, running: BootGuest, guest: _Guest, delay: int) -> None:
        running.set(mode=guest.mode, lo=LOW, hi=self._high, delay=delay)
        running.settle()
        running.advance()  # its clock shows the last touch

    def _calibrate(self, here: BootVm, guest: _Guest) -> int:
        """How often it is to pause after each touch. A pause takes tens of nanoseconds or hundreds,
        by the host; others who want the processor meanwhile must not count."""

        def seconds(delay: int) -> float:
            self._set(here.guest, guest, delay)
            begin, first = here.guest_seconds(), here.guest.get("touches")
            time.sleep(_CALIBRATION_SECONDS)
            return (here.guest_seconds() - begin) / max(1, here.guest.get("touches") - first)

        seconds(0)  # the first touch of a page takes longer
        bare = seconds(0)
        delay = 1000
        for _ in range(2):
            pause = max(1e-9, (seconds(delay) - bare) / delay)
            delay = max(1, round((1 / guest.rate - bare) / pause))
        return delay

    def _by_us(self, method: _Method, here: BootVm, there: BootVm) -> _Moved:
        options = [*_OURS, "--downtime-limit", f"{_LIMIT}ms", "--max-rounds", str(_MAX_ROUNDS)]
        if method.postcopy:
            options += ["--postcopy", "now"]
        sides = {"source": here, "destination": there}
        used = {side: machine.own_seconds() for side, machine in sides.items()}
        outcome = pageferry.send(
            self._lab, f"qemu:{here.monitor}", f"qemu:{there.monitor}", options
        )
        cpu = {
            side: outcome.cpu[side] + machine.own_seconds() - used[side]
            for side, machine in sides.items()
        }
        faults = outcome.received.get("postcopy-requests") if method.postcopy else None
        return _Moved(outcome.report, outcome.wire, cpu, faults)

    def _by_qemu(self, method: _Method, here: BootVm, there: BootVm) -> _Moved:
        for name in method.capabilities:
            if not boot_vm.can(here, name):
                raise BenchError(f"this QEMU has no {name}")
        boot_vm.set_up(here, there, _LIMIT, method.capabilities)
        if method.channels:
            boot_vm.use_channels(here, there, method.channels)
        uri = f"tcp:127.0.0.1:{free_port()}"
        sides = {"source": here, "destination": there}
        used = {side: machine.own_seconds() for side, machine in sides.items()}
        before = loopback_bytes()
        report = (
            boot_vm.postcopy(here, there, uri) if method.postcopy
            else boot_vm.precopy(here, there, uri, _MAX_ROUNDS)
        )  # fmt: skip
        wire = loopback_bytes() - before
        cpu = {side: machine.own_seconds() - used[side] for side, machine in sides.items()}
        faults = report["ram"].get("postcopy-requests") if method.postcopy else None
        return _Moved(report, wire, cpu, faults)

    def _read(self, method: _Method, moved: _Moved, watch: Watch, begin: float) -> Run:
        """`begin`: before the command of the migration was given."""
        report = moved.report
        # The start of a command is not yet the migration, nor is its setting up.
        moving = (report["total-time"] - report.get("setup-time", 0)) / 1000
        before = watch.rate(0, begin)
        if before is None or before.touches <= 0:
            raise BenchError("the guest did nothing before the migration")
        during = watch.rate(max(begin, watch.resumed - moving), watch.stopped)
        after = watch.rate(watch.resumed, watch.resumed + _AFTER_SECONDS)
        return Run(
            total=report["total-time"] / 1000, downtime=report["downtime"],
            stopped=(watch.resumed - watch.stopped) * 1000, wire=moved.wire,
            rounds=report["ram"]["dirty-sync-count"], before=before.touches,
            slower=_loss(before.touches, during.touches if during else None),
            dearer=_loss(before.by_processor, during.by_processor if during else None),
            after=after.touches if after and method.postcopy else None,
            cpu=moved.cpu, faults=moved.faults, report=report,
        )  # fmt: skip

    def _read_waits(self, run: Run, histogram: Sequence[int], ticks: float) -> None:
        """How long the guest waited, by its own clock: touches at the destination that took long.
        The first one can be off, if KVM has changed that clock."""
        shortest = _WAITED_SECONDS * ticks
        long = [n if boot_guest.edges(i)[0] >= shortest else 0 for i, n in enumerate(histogram)]
        run.waited = sum(long)
        if run.waited:
            cycles = {"mean": boot_guest.mean(long)} | {
                f"p{share}": boot_guest.percentile(long, share / 100) for share in (50, 90, 99)
            }
            run.waits = {name: 1e6 * value / ticks for name, value in cycles.items()}

    def _problem(self, here: BootGuest, there: BootGuest) -> str:
        """What is wrong with the guest at the destination, which is stopped; or nothing."""
        for problem in there.oracle():
            return problem
        for address in range(LOW, self._plan.size, _CHUNK):
            size = min(_CHUNK, self._plan.size - address)
            old, new = (
                np.frombuffer(ram.read(address, size), np.uint8).reshape(-1, PAGE_SIZE)
                for ram in (here.ram, there.ram)
            )
            differs = old != new
            written = max(0, self._high - address) // PAGE_SIZE
            differs[:written, :_GUESTS_OWN] = False
            pages = np.flatnonzero(differs.any(axis=1))
            if len(pages):
                return f"page {address + int(pages[0]) * PAGE_SIZE:#x} is not that of the source"
        return ""


def _loss(before: float | None, during: float | None) -> float | None:
    return 1 - during / before if before and during is not None else None


def _reason(e: BenchError | KeyError) -> str:
    """In pageferry's own words, if it is pageferry that failed."""
    if isinstance(e, KeyError):
        return f"the report lacks {e}"
    return str(e).partition("pageferry: ")[2] or str(e)


def quick(plan: Plan) -> Plan:
    """The same in less than a minute."""
    return replace(plan, size=min(plan.size, _QUICK_SIZE), reps=1)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs of the plan: the tables, and the single measurements."""
    if plan.size % _CHUNK or plan.size < 64 << 20 or LOW + plan.size // 4 > _HIGHEST:
        raise BenchError("--size must be at least 64M, below 8G and a multiple of 4M")
    bench = _Bench(lab, plan)
    bench.measure()
    return _tables(plan, bench.rows), [asdict(row) for row in bench.rows]


# ---- the tables -------------------------------------------------------------------------

_PRECOPY = (
    "method", "touches/s", "total s", "downtime ms", "stopped ms", "worst", "wire MB", "slower",
    "by CPU", "rounds", "CPU src", "CPU dst", "right", "others",
)  # fmt: skip
_POSTCOPY = (
    "method", "touches/s", "total s", "downtime ms", "stopped ms", "faults", "waits", "mean us",
    "p50", "p90", "p99", "next second", "wire MB", "CPU src", "CPU dst", "right", "others",
)  # fmt: skip
_MARKS = ("mean", "p50", "p90", "p99")

_LEGEND = """\
medians of the rounds
touches/s  what the guest did before; idle: it reads, and writes one page only; slow, fast: it
           writes. At random, in a quarter of its RAM. Its processor is always busy
total      total-time as each reports it
downtime   as each reports it
stopped    how long the guest did nothing, as its RAM shows it from outside, to a millisecond or two
worst      of all rounds
wire       all bytes over loopback, TCP/IP headers included
slower     touches a second that the guest lost from the end of the setup until it stopped
by CPU     the same by the second that its processor really ran: what is left of it where nobody has
           to wait for a processor
rounds     dirty-sync-count
CPU        seconds of that side, without the guest's processor; pageferry: its processes from their
           start on, Python's included, and QEMU's
right      the guest's oracle, and all memory compared with that of the source
others     share of all processors that others had, at most: more than some per cent, and the row is
           not worth much"""
_POSTCOPY_LEGEND = """\
faults     pages that were asked for
waits      touches that took the guest 50 us or more, and how long they took, by its own clock, from
           a histogram with four counters an octave
next second  touches in the second after the guest went on, of those before"""


def _progress(row: Row) -> str:
    what = f"{row.part} {row.guest} {row.rep + 1}: {row.method}"
    if row.run is None:
        return f"{what}: {row.problem}"
    run = row.run
    wrong = f" WRONG: {run.wrong}" if run.wrong else ""
    return f"{what}: {run.total:.2f} s, stopped {run.stopped:.0f} ms{wrong}"


def _tables(plan: Plan, rows: list[Row]) -> str:
    size = format_bytes(plan.size)
    parts = [f"a running VM of {size} of random bytes, limit {_LIMIT} ms, {plan.reps} rounds"]
    for part in plan.parts:
        header, cells = {
            "precopy": (_PRECOPY, _precopy_cells), "postcopy": (_POSTCOPY, _postcopy_cells),
        }[part]  # fmt: skip
        for guest in GUEST_NAMES:
            mine = [row for row in rows if (row.part, row.guest) == (part, guest)]
            if mine:
                parts.append(f"{part}, guest: {guest}\n{render(header, _lines(mine, cells))}")
    parts.append("\n".join([_LEGEND, *([_POSTCOPY_LEGEND] if "postcopy" in plan.parts else [])]))
    if ratios := _ratios(rows):
        parts.append(ratios)
    return "\n\n".join(parts)


def _lines(rows: list[Row], cells: Callable[[list[Run]], list[str]]) -> list[list[str]]:
    lines = []
    for method in dict.fromkeys(row.method for row in sorted(rows, key=lambda row: row.rep)):
        mine = [row for row in rows if row.method == method]
        runs = [row.run for row in mine if row.run is not None]
        problems = list(dict.fromkeys(row.problem for row in mine if row.problem))
        if not runs:
            why = "; ".join(problems)
            lines.append([method, why if why.startswith(_NOT_CONVERGING) else f"left out: {why}"])
            continue
        right = "yes" if all(run.right for run in runs) else "NO"
        lines.append([method, *cells(runs), right, f"{max(row.others for row in mine):.0%}"])
        lines += [["", f"a run failed: {problem}"] for problem in problems]
        lines += [["", f"WRONG: {run.wrong}"] for run in runs if run.wrong]
    return lines


def _middle(runs: list[Run], value: Callable[[Run], float | None]) -> float | None:
    """Median of those runs that have it."""
    found = [x for run in runs if (x := value(run)) is not None]
    return median(found) if found else None


def _wait(mark: str) -> Callable[[Run], float | None]:
    return lambda run: run.waits.get(mark)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _first_cells(runs: list[Run]) -> list[str]:
    return [
        number(_middle(runs, lambda r: r.before), 0), number(_middle(runs, lambda r: r.total)),
        number(_middle(runs, lambda r: r.downtime), 0),
        number(_middle(runs, lambda r: r.stopped), 0),
    ]  # fmt: skip


def _cpu_cells(runs: list[Run]) -> list[str]:
    sides = ("source", "destination")
    return [number(median([run.cpu[side] for run in runs])) for side in sides]


def _precopy_cells(runs: list[Run]) -> list[str]:
    return [
        *_first_cells(runs), number(max(run.stopped for run in runs), 0),
        megabytes(median([run.wire for run in runs])), _share(_middle(runs, lambda r: r.slower)),
        _share(_middle(runs, lambda r: r.dearer)),
        number(_middle(runs, lambda r: r.rounds), 0), *_cpu_cells(runs),
    ]  # fmt: skip


def _postcopy_cells(runs: list[Run]) -> list[str]:
    return [
        *_first_cells(runs), number(_middle(runs, lambda r: r.faults), 0),
        number(_middle(runs, lambda r: r.waited), 0),
        *(number(_middle(runs, _wait(mark)), 0) for mark in _MARKS),
        _share(_middle(runs, lambda r: None if r.after is None else r.after / r.before)),
        megabytes(median([run.wire for run in runs])), *_cpu_cells(runs),
    ]  # fmt: skip


_COMPARED: dict[str, Callable[[Run], float | None]] = {
    "total": lambda run: run.total,
    "downtime": lambda run: run.downtime,
    "stopped": lambda run: run.stopped,
    "mean wait": _wait("mean"),
    "p99 wait": _wait("p99"),
}


def _ratios(rows: list[Row]) -> str:
    """pageferry by its rival, within a round."""
    lines = []
    for part, rival in _RIVALS.items():
        for guest in GUEST_NAMES:
            mine = [row for row in rows if (row.part, row.guest) == (part, guest)]
            cells = []
            for value in _COMPARED.values():
                ours, theirs = (_by_round(mine, method, value) for method in ("pageferry", rival))
                cells.append(ratio_text(ratio(theirs, ours)))
            if any(cell != "-" for cell in cells):
                lines.append([f"{part}, {guest}", rival, *cells])
    if not lines:
        return ""
    header = ("", "pageferry by", *_COMPARED)
    legend = "below 1 pageferry takes less: median of the ratios within a round (of the minima)"
    return f"{render(header, lines)}\n{legend}"


def _by_round(
    rows: list[Row], method: str, value: Callable[[Run], float | None]
) -> dict[int, float]:
    """Round -> value, of those that have it."""
    return {
        row.rep: found
        for row in rows
        if row.method == method and row.run is not None and (found := value(row.run))
    }
