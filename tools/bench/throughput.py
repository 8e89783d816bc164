"""Memory from one process into another, over TCP: pageferry, QEMU, pipes and rsync in turn.

All methods take turns within a round, and ratios are taken within a round before their median
is: a shared host may be twice as fast a minute later. Fresh destination memory is deleted
before each run; touched memory is what the fresh run left, with a byte changed in each page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ...transport.quantities import format_bytes
from . import content, pageferry, peers, qemu
from .lab import BenchError, Lab, remove, say
from .table import mebibytes, median, megabytes, number, ratio, ratio_text, render

DESTINATIONS = ("fresh", "touched")


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int
    contents: Sequence[str]
    methods: Sequence[str]
    destinations: Sequence[str]
    accel: str
    cpu: str


@dataclass
class Run:
    """One transfer. `seconds`: total-time of those that have one, else as `until_ready`;
    `until_ready`: until the command ended, with QEMU until the destination could run."""

    seconds: float
    until_ready: float
    wire: int
    cpu: dict[str, float]
    peak: dict[str, int]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """A Run, or why there is none, and what it was a run of."""

    content: str
    destination: str
    method: str
    rep: int
    run: Run | None = None
    equal: bool | None = None  # None: not compared this time
    problem: str = ""


class Method(Protocol):
    """Moves the file `source` to the file `destination`."""

    skip: int  # bytes at the beginning that need not be equal

    def missing(self) -> str:
        """Why it cannot be run here, or nothing."""
        ...

    def run(self, source: str, destination: str, touched: bool) -> Run: ...


class _Pageferry:
    skip = 0

    def __init__(self, lab: Lab, kind: str, options: list[str]) -> None:
        self._lab, self._kind, self._options = lab, kind, options

    def missing(self) -> str:
        return ""

    def run(self, source: str, destination: str, touched: bool) -> Run:
        outcome = pageferry.send(
            self._lab, f"{self._kind}:{source}", f"ram:{destination}", self._options
        )
        report = {"source": outcome.report, "destination": outcome.received}
        return Run(outcome.total, outcome.wall, outcome.wire, outcome.cpu, outcome.peak, report)


class _Qemu:
    skip = qemu.SKIP

    def __init__(self, host: qemu.Qemu, size: int, channels: int, compression: str = "") -> None:
        self._host, self._size = host, size
        self._channels, self._compression = channels, compression

    def missing(self) -> str:
        return self._host.missing()

    def run(self, source: str, destination: str, touched: bool) -> Run:
        moved = self._host.migrate(
            source, destination, self._size, touched, self._channels, self._compression
        )
        return Run(moved.total, moved.until_ready, moved.wire, moved.cpu, moved.peak, moved.report)


class _Peer:
    skip = 0

    def __init__(self, lab: Lab, peer: peers.Pipe | peers.Rsync) -> None:
        self._lab, self._peer = lab, peer

    def missing(self) -> str:
        return self._peer.missing()

    def run(self, source: str, destination: str, touched: bool) -> Run:
        moved = self._peer.move(self._lab, source, destination)
        return Run(moved.wall, moved.wall, moved.wire, moved.cpu, moved.peak)


Maker = Callable[[Lab, qemu.Qemu, Plan], Method]


def _ferry(kind: str, *options: str) -> Maker:
    return lambda lab, host, plan: _Pageferry(lab, kind, ["--workers", "2", *options])


def _machine(channels: int, compression: str = "") -> Maker:
    return lambda lab, host, plan: _Qemu(host, plan.size, channels, compression)


def _pipe(name: str) -> Maker:
    return lambda lab, host, plan: _Peer(lab, peers.PIPES[name])


# What a row is compared with: QEMU by total-time, the pipe by the time a person waits.
_PLAIN = ("qemu multifd-4 none", "cat | socat")
_ZSTD = ("qemu multifd-4 zstd", "zstd -T2 -1 | socat")

# name -> how it is made, what it is compared with
_METHODS: dict[str, tuple[Maker, tuple[str, str]]] = {
    "pageferry none": (_ferry("image", "--codec", "none"), _PLAIN),
    "pageferry zstd-1": (_ferry("image", "--codec", "zstd", "--level", "1"), _ZSTD),
    "pageferry auto": (_ferry("image", "--codec", "auto"), _PLAIN),
    "pageferry none live": (_ferry("ram", "--codec", "none"), _PLAIN),
    "qemu precopy": (_machine(0), _PLAIN),
    "qemu multifd-4 none": (_machine(4, "none"), _PLAIN),
    "qemu multifd-4 zstd": (_machine(4, "zstd"), _ZSTD),
    "cat | socat": (_pipe("cat | socat"), _PLAIN),
    "zstd -T2 -1 | socat": (_pipe("zstd -T2 -1 | socat"), _ZSTD),
    "lz4 -1 | socat": (_pipe("lz4 -1 | socat"), _PLAIN),
    "rsync -W": (lambda lab, host, plan: _Peer(lab, peers.Rsync()), _PLAIN),
}
METHOD_NAMES = tuple(_METHODS)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs of the plan: the table, and the single measurements."""
    if plan.size % (1 << 20) or plan.size < 64 << 20:
        raise BenchError("--size must be at least 64M and whole mebibytes")
    host = qemu.Qemu(lab, plan.accel.split(","), plan.cpu)
    methods = {name: _METHODS[name][0](lab, host, plan) for name in plan.methods}
    rows: list[Row] = []
    for kind in plan.contents:
        source = lab.path(f"source-{kind}")
        content.make(source, kind, plan.size)
        for rep in range(plan.reps):
            for name in _order(plan, rep):
                rows += _turn(lab, plan, kind, rep, name, methods[name], source)
        remove(source)
    return _tables(plan, rows), [asdict(row) for row in rows]


def _order(plan: Plan, rep: int) -> list[str]:
    """The methods, each round beginning with another: nobody always follows the same one
    that was slow, or comes first after the source was made."""
    first = rep * len(plan.methods) // plan.reps
    return [*plan.methods[first:], *plan.methods[:first]]


def _turn(
    lab: Lab, plan: Plan, kind: str, rep: int, name: str, method: Method, source: str
) -> list[Row]:
    """One method's runs in a round: into fresh memory, then into the same, touched."""
    if problem := method.missing():
        return [Row(kind, where, name, rep, problem=problem) for where in plan.destinations]
    destination = lab.path("destination")
    remove(destination)
    rows = []
    for where in plan.destinations:
        if where == "touched":
            with open(destination, "ab"):
                pass
            content.spoil(destination, plan.size)
        row = Row(kind, where, name, rep)
        rows.append(row)
        try:
            row.run = method.run(source, destination, where == "touched")
            if rep == 0:
                row.equal = content.same(source, destination, plan.size, method.skip)
        except BenchError as e:
            row.problem = str(e)
        say(_progress(row))
    remove(destination)
    return rows


def _progress(row: Row) -> str:
    what = f"{row.content} {row.destination} {row.rep + 1}: {row.method}"
    if row.run is None:
        return f"{what}: {row.problem}"
    wrong = "" if row.equal in (None, True) else " WRONG BYTES"
    return f"{what}: {row.run.seconds:.2f} s ({row.run.until_ready:.2f} s){wrong}"


# ---- the tables -------------------------------------------------------------------------

_HEADER = (
    "method", "s min", "median", "wait min", "median", "GB/s", "wire MB", "CPU src", "CPU dst",
    "MiB src", "MiB dst", "vs QEMU", "vs pipe", "equal",
)  # fmt: skip

_LEGEND = """\
s         seconds; pageferry and QEMU: total-time as each reports it; else the whole command
wait      seconds a person waits: until the command ended; QEMU: until the destination is ready
GB/s      guest memory by the median of s
CPU       seconds of all processes of that side, from start to end (pageferry: the start of
          Python included); QEMU, which runs anyway: during the migration only; medians
MiB       most anonymous memory of that side; guest memory is in shared files and not in it
vs QEMU   times faster than multifd-4 with the same codec, by s: median of the rounds (minima)
vs pipe   times faster than cat, or zstd -1, over socat, by wait: median of the rounds (minima)
equal     bytes compared after the first run; QEMU: from 1 MiB on
pageferry moves an image of stopped memory, as QEMU a stopped machine; `live`: memory that
somebody may write meanwhile, tracked by content, which costs a hash and a second look"""


def _tables(plan: Plan, rows: list[Row]) -> str:
    parts = []
    for kind in plan.contents:
        for where in plan.destinations:
            mine = [row for row in rows if (row.content, row.destination) == (kind, where)]
            parts.append(
                f"{kind}, {format_bytes(plan.size)}, {where} destination memory, "
                f"{plan.reps} rounds\n{render(_HEADER, _lines(plan, mine))}"
            )
    return "\n\n".join([*parts, _LEGEND])


def _lines(plan: Plan, rows: list[Row]) -> list[list[str]]:
    good: dict[str, dict[int, Run]] = {name: {} for name in plan.methods}
    for row in rows:
        if row.run is not None:
            good[row.method][row.rep] = row.run
    lines = []
    for name in plan.methods:
        mine = [row for row in rows if row.method == name]
        problems = [row.problem for row in mine if row.problem]
        if not good[name]:
            lines.append([name, problems[0] if problems else "not run"])
            continue
        lines.append(_line(plan, name, good))
        compared = [row.equal for row in mine if row.equal is not None]
        lines[-1][-1] = "-" if not compared else "yes" if all(compared) else "NO"
        lines += [["", f"a run failed: {problem}"] for problem in problems]
    return lines


def _line(plan: Plan, name: str, good: dict[str, dict[int, Run]]) -> list[str]:
    runs = list(good[name].values())
    by_qemu, by_pipe = _METHODS[name][1]
    seconds, wait = [r.seconds for r in runs], [r.until_ready for r in runs]

    def side(values: Callable[[Run], dict[str, Any]], which: str) -> float:
        return float(median([values(r).get(which, 0) for r in runs]))

    def total(method: str) -> dict[int, float]:
        return {rep: run.seconds for rep, run in good.get(method, {}).items()}

    def waited(method: str) -> dict[int, float]:
        return {rep: run.until_ready for rep, run in good.get(method, {}).items()}

    return [
        name,
        number(min(seconds)), number(median(seconds)), number(min(wait)), number(median(wait)),
        number(plan.size / median(seconds) / 1e9), megabytes(median([r.wire for r in runs])),
        number(side(lambda r: r.cpu, "source")), number(side(lambda r: r.cpu, "destination")),
        mebibytes(side(lambda r: r.peak, "source")),
        mebibytes(side(lambda r: r.peak, "destination")),
        ratio_text(ratio(total(name), total(by_qemu))),
        ratio_text(ratio(waited(name), waited(by_pipe))),
        "",
    ]  # fmt: skip
