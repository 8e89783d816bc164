"""How long a guest that runs already waits for pages that have not come yet.

Preempt on, over ZeroMQ or over a connection without its threads, against preempt off and against
QEMU's postcopy, over loopback and over a link of 1 Gbit/s between two network namespaces of our
own; and what a steady 500 faults a second cost the background. All of a row's rivals take turns
before the next row: two runs an hour apart are not compared.

The guest itself takes the time of each touch that waits, so processes that have to be woken up
are in it. Nothing runs beside it that watches it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ...transport.pages import PAGE_SIZE
from ...transport.quantities import format_bytes
from . import links
from .lab import BenchError, Lab, Others, huge_pages, say, wait_for
from .links import LOOPBACK, Link
from .pageferry import endpoint_of, last_object
from .qemu import Qemu
from .qemu_postcopy import LARGEST, Postcopy
from .table import median, number, render

PARTS = ("faults", "huge", "qemu", "background")
_HUGE_PAGE = 2 << 20
_LARGEST_HUGE = 512 << 20
_QUICK_SIZE = 128 << 20
_BACKGROUND_REPS = 3
# A guest in order that touches a page a second is behind the background: it never faults.
_NO_FAULTS = "access=sequential&rate=1"
# Touches a second. As memory comes fewer of them fault: half of them, over all of it.
_RATES = (500, 1000)


@dataclass(frozen=True)
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int
    quick: bool
    breakdown: bool
    parts: Sequence[str]
    links: Sequence[str]
    threads: Sequence[str]
    accel: str
    cpu: str

    def does(self, part: str) -> bool:
        return part in self.parts


@dataclass(frozen=True)
class _Method:
    """One of those that are compared."""

    name: str
    options: tuple[str, ...] = ()
    qemu: bool = False
    preempt: bool = True
    nodelay: bool = False


_OFF = _Method("no preempt", ("--no-preempt",), preempt=False)
_ZMQ = _Method("preempt, zmq", ("--postcopy-link", "zmq"))
_DIRECT = _Method("preempt, direct", ("--postcopy-link", "direct"))
_QEMU_OFF = _Method("QEMU no preempt", qemu=True, preempt=False)
_QEMU_ON = _Method("QEMU preempt", qemu=True)
_QEMU_OFF_NODELAY = _Method("QEMU nodelay no preempt", qemu=True, preempt=False, nodelay=True)
_QEMU_ON_NODELAY = _Method("QEMU nodelay preempt", qemu=True, nodelay=True)
_OURS = (_ZMQ, _DIRECT, _OFF)
_THEIRS = (_QEMU_ON, _QEMU_OFF, _QEMU_ON_NODELAY, _QEMU_OFF_NODELAY)
# who, without preempt, with it
_PAIRS = (
    ("pageferry zmq", _OFF, _ZMQ),
    ("pageferry direct", _OFF, _DIRECT),
    ("QEMU", _QEMU_OFF, _QEMU_ON),
    ("QEMU nodelay", _QEMU_OFF_NODELAY, _QEMU_ON_NODELAY),
)


@dataclass(frozen=True)
class _Case:
    """What all rivals do."""

    link: str
    pages: str  # 4K, 2M
    threads: int
    size: int

    def guest(self) -> str:
        huge = "&hugepages=2M" if self.pages == "2M" else ""
        return (
            f"demo:?size={self.size}&content=random&access=random&rate=0&vcpus={self.threads}{huge}"
        )


@dataclass
class Run:
    """One postcopy. Times in microseconds, but `seconds` of postcopy and `total` of everything;
    `background`: bytes a second that nobody had asked for."""

    faults: int
    seconds: float
    total: float
    background: float
    guest: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    right: bool | None = None  # what the oracle says
    reports: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Row:
    """A Run, or why there is none."""

    case: _Case
    method: str
    rep: int
    run: Run | None = None
    problem: str = ""
    others: float = 0.0  # share of all processors that somebody else had meanwhile


# ---- one run ----------------------------------------------------------------------------


def _patience(size: int) -> float:
    """Seconds after which a migration hangs."""
    return 60 + size / 4e6


def _move(lab: Lab, link: Link, size: int, guest: str, options: Iterable[str]) -> Run:
    """`pageferry send` to a `pageferry receive`: postcopy from the beginning."""
    quiet = ["--json", "--quiet"]
    receive = lab.start(
        [*link.destination, *lab.pageferry, "receive", "--listen", f"tcp://{link.host}:0",
         "--into", "demo:", "--once", *link.options, *quiet]
    )  # fmt: skip
    try:
        endpoint = wait_for("the receiver to listen", lambda: endpoint_of(receive))
        sending = lab.start(
            [*link.source, *lab.pageferry, "send", guest, endpoint, "--postcopy", "now",
             *link.options, *options, *quiet]
        )  # fmt: skip
        try:
            sending.join(_patience(size))
            receive.join(_patience(size))
        finally:
            sending.kill()
    finally:
        receive.kill()
    return _read(last_object(sending), last_object(receive))


def _read(sent: dict[str, Any], received: dict[str, Any]) -> Run:
    """What the two reports say."""
    seconds = (sent["total-time"] - sent["setup-time"] - sent["downtime"]) / 1000
    pages = sum(sent["pages-by-channel"][:-1])
    run = Run(
        faults=received["postcopy-requests"], seconds=seconds, total=sent["total-time"] / 1000,
        background=pages * PAGE_SIZE / seconds, guest=received.get("guest-latency") or {},
        right=received["oracle"]["ok"], reports=[sent, received],
    )  # fmt: skip
    if "postcopy-latency" in received:
        run.ours = {
            "mean": received["postcopy-latency"] / 1000,
            **received["postcopy-latency-percentiles"],
        }
        run.parts = _parts(run, received)
    return run


def _parts(run: Run, received: dict[str, Any]) -> dict[str, float]:
    """Where a fault's time goes."""
    parts = {
        name: received.get(f"postcopy-{name}-ns", 0) / 1000
        for name in ("fault-to-request", "at-source", "answer-to-installed")
    }
    parts["rest"] = run.ours["mean"] - sum(parts.values())
    if run.guest:
        parts["guest"] = run.guest["mean"] - run.ours["mean"]
    return parts


def _move_qemu(machines: Postcopy, link: Link, size: int, method: _Method) -> Run:
    """The same with QEMU."""
    waited = machines.migrate(link, size, method.preempt, method.nodelay)
    guest = {}
    if len(waited.waits):
        marks = np.percentile(waited.waits, [50, 90, 99, 100]).tolist()
        guest = {"mean": float(waited.waits.mean())}
        guest |= dict(zip(("p50", "p90", "p99", "max"), marks, strict=True))
    return Run(
        faults=len(waited.waits), seconds=waited.seconds, total=waited.total,
        background=waited.background / waited.seconds, guest=guest, reports=[waited.report],
    )  # fmt: skip


# ---- all of them ------------------------------------------------------------------------


class _Bench:
    """The runs of a plan, each said as it is done."""

    def __init__(self, lab: Lab, plan: Plan) -> None:
        self.lab, self.plan = lab, plan
        self.rows: list[Row] = []
        self.background: list[Row] = []
        self.links: dict[str, Link] = {}
        self.left_out: list[str] = []
        self.machines: Postcopy | None = None

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append(f"{what} left out: {why}")
        say(self.left_out[-1])

    def measure(self) -> None:
        with contextlib.ExitStack() as stack:
            self._set_up(stack)
            say(_progress(_HEADER))
            for rep in range(self.plan.reps):
                with contextlib.closing(self._cases()) as cases:
                    for case in cases:
                        self._round(case, rep)
        if self.plan.does("background"):
            say(_progress(("touches a second", *_BACKGROUND_HEADER[1:])))
            for rep in range(1 if self.plan.quick else max(self.plan.reps, _BACKGROUND_REPS)):
                self._background_round(rep)

    def _set_up(self, stack: contextlib.ExitStack) -> None:
        """Links and machines, as far as they are to be had."""
        for name in self.plan.links:
            try:
                self.links[name] = (
                    LOOPBACK if name == LOOPBACK.name
                    else stack.enter_context(links.shaped(self.lab))
                )  # fmt: skip
            except BenchError as e:
                self.leave_out(name, f"{e} (it takes root and iproute2)")
        if self.plan.does("qemu"):
            host = Qemu(self.lab, self.plan.accel.split(","), self.plan.cpu)
            machines = Postcopy(self.lab, host)
            if problem := machines.missing():
                self.leave_out("QEMU", problem)
            else:
                self.machines = machines

    def _cases(self) -> Generator[_Case, None, None]:
        """In the order in which they are measured. Huge pages are there while their cases are."""
        if self.plan.does("faults") or self.machines is not None:
            for link in self.links:
                for n in self._threads(link):
                    yield _Case(link, "4K", n, self.plan.size)
        if not self.plan.does("huge"):
            return
        size = min(self.plan.size, _LARGEST_HUGE)
        # Both ends have the guest's memory.
        try:
            with huge_pages(2 * size // _HUGE_PAGE):
                for link in [LOOPBACK.name] if self.plan.quick else self.links:
                    for n in self._threads("" if self.plan.quick else link):
                        yield _Case(link, "2M", n, size)
        except BenchError as e:
            self.leave_out("2 MiB pages", str(e))

    def _threads(self, link: str) -> list[int]:
        """In a hurry more than one on loopback only."""
        threads = [int(n) for n in self.plan.threads]
        return threads[:1] if self.plan.quick and link != LOOPBACK.name else threads

    def _round(self, case: _Case, rep: int) -> None:
        """All rivals in one case, beginning with another one each time."""
        methods: list[_Method] = []
        if case.pages == "2M" or self.plan.does("faults"):
            methods += _OURS
        if case.pages == "4K" and case.threads == 1 and self.machines is not None:
            methods += _THEIRS
        first = rep % max(1, len(methods))
        for method in [*methods[first:], *methods[:first]]:
            row = Row(case, method.name, rep)
            self.rows.append(row)
            self._fill(row, self._runner(case, method))
            say(_progress(_cells(row)))

    def _runner(self, case: _Case, method: _Method) -> Callable[[], Run]:
        link = self.links[case.link]
        if not method.qemu:
            return partial(_move, self.lab, link, case.size, case.guest(), method.options)
        machines, size = self.machines, min(case.size, LARGEST)
        assert machines is not None
        return partial(_move_qemu, machines, link, size, method)

    def _background_round(self, rep: int) -> None:
        case = _Case(LOOPBACK.name, "4K", 1, self.plan.size)
        for rate in (0, _RATES[-1]) if self.plan.quick else (0, *_RATES):
            access = f"access=random&rate={rate}" if rate else _NO_FAULTS
            guest = f"demo:?size={case.size}&content=random&{access}"
            row = Row(case, str(rate), rep)
            self.background.append(row)
            self._fill(row, partial(_move, self.lab, LOOPBACK, case.size, guest, ()))
            say(_progress(_background_cells(row)))

    def _fill(self, row: Row, run: Callable[[], Run]) -> None:
        others = Others()
        try:
            row.run = run()
        except (BenchError, KeyError) as e:
            row.problem = str(e) if isinstance(e, BenchError) else f"the report lacks {e}"
        row.others = others.share()


def quick(plan: Plan) -> Plan:
    """The same in less than two minutes."""
    parts = [part for part in plan.parts if part != "qemu"]
    return replace(plan, size=min(plan.size, _QUICK_SIZE), reps=1, parts=parts)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All runs of the plan: the tables, and the single measurements."""
    if plan.size % (4 << 20) or plan.size < 64 << 20:
        raise BenchError("--size must be at least 64M and a multiple of 4M")
    bench = _Bench(lab, plan)
    bench.measure()
    return _tables(plan, bench), [asdict(row) for row in [*bench.rows, *bench.background]]


# ---- the tables -------------------------------------------------------------------------

_HEADER = (
    "method", "link", "pages", "threads", "faults", "mean us", "p50", "p90", "p99", "max",
    "ours p50", "p99", "bg MB/s", "total s", "right", "others",
)  # fmt: skip
_WIDTHS = (23, 8, 5, 7, 7, 8, 8, 8, 8, 9, 8, 8, 7, 7, 5, 6)
_BACKGROUND_HEADER = (
    "touches/s",
    "faults",
    "faults/s",
    "mean us",
    "bg MB/s",
    "total s",
    "right",
    "others",
)
_MARKS = ("mean", "p50", "p90", "p99", "max")

_LEGEND = """\
faults    pages that were asked for; QEMU: touches that took 50 us or more
mean…max  how long the guest waited for a page that was not there, as it saw it; QEMU's guest:
          any touch that took 50 us or more
ours      the same as pageferry's destination saw it: from its learning of the fault until the
          page is there
bg        guest memory a second that nobody had asked for, during the postcopy; without preempt
          what was asked for travels in line with it and is in it
total     total-time, of which setup-time is a part
right     what the guest's oracle says of its bytes
others    share of all processors that others had during the run, from the start of the commands:
          more than some per cent, and the row is not worth much"""


def _progress(cells: Sequence[str]) -> str:
    """A row as soon as it is there: the widths of the others are not known yet."""
    out = [cells[0].ljust(_WIDTHS[0])]
    return "  ".join([*out, *(c.rjust(w) for c, w in zip(cells[1:], _WIDTHS[1:], strict=False))])


def _verdict(run: Run) -> str:
    return "-" if run.right is None else "yes" if run.right else "NO"


def _cells(row: Row) -> list[str]:
    """A row of the big table."""
    case, run = row.case, row.run
    head = [row.method, case.link, case.pages, str(case.threads)]
    if run is None:
        return [*head, row.problem]
    return [
        *head, str(run.faults), *(number(run.guest.get(mark), 0) for mark in _MARKS),
        number(run.ours.get("p50"), 0), number(run.ours.get("p99"), 0),
        number(run.background / 1e6, 1), number(run.total), _verdict(run),
        f"{row.others:.0%}",
    ]  # fmt: skip


def _background_cells(row: Row) -> list[str]:
    run = row.run
    if run is None:
        return [row.method, row.problem]
    return [
        row.method, str(run.faults), number(run.faults / run.seconds, 0),
        number(run.guest.get("mean"), 0), number(run.background / 1e6, 1), number(run.total),
        _verdict(run), f"{row.others:.0%}",
    ]  # fmt: skip


def _tables(plan: Plan, bench: _Bench) -> str:
    parts = list(bench.left_out)
    size = format_bytes(plan.size)
    if bench.rows:
        title = f"postcopy from the beginning, {size} of random bytes, touched at random"
        parts.append(f"{title}\n{_all_runs(bench.rows)}\n{_LEGEND}")
    if any(row.run is not None for row in bench.rows):
        parts.append(_summary(bench.rows))
    if plan.breakdown and any(row.run is not None and row.run.parts for row in bench.rows):
        parts.append(_breakdown(bench.rows))
    if bench.background:
        parts.append(f"the background beside faults, {size}, loopback\n{_cost(bench.background)}")
    return "\n\n".join(parts)


def _all_runs(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        cells = _cells(row)
        if row.run is None:  # a remark: render wants two cells
            cells = [cells[0], " ".join(cells[1:])]
        lines.append(cells)
    return render(_HEADER, lines)


def _means(rows: list[Row], case: _Case, method: _Method) -> dict[int, float]:
    """Round -> mean wait of the guest, microseconds."""
    return {
        row.rep: row.run.guest["mean"]
        for row in rows
        if (row.case, row.method) == (case, method.name) and row.run is not None and row.run.guest
    }


def _ratio(over: dict[int, float], under: dict[int, float]) -> str:
    """Median of the ratios within a round."""
    found = [over[rep] / under[rep] for rep in over.keys() & under.keys()]
    return number(median(found)) if found else "-"


def _summary(rows: list[Row]) -> str:
    """In the shape of the table of QEMU's postcopy-preempt cover letter (Peter Xu, 2022)."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        rivals = [_means(rows, case, method) for method in (_QEMU_ON, _QEMU_ON_NODELAY)]
        for who, without, with_it in _PAIRS:
            off, on = _means(rows, case, without), _means(rows, case, with_it)
            if on or off:
                lines.append([
                    f"{case.pages}, {case.threads} threads, {case.link}", who, _milli(off),
                    _milli(on), _ratio(off, on), *(_ratio(rival, on) for rival in rivals),
                ])  # fmt: skip
    header = (
        "pages, threads, link", "who", "no preempt ms", "preempt ms", "ratio", "QEMU/this",
        "QEMU nodelay/this",
    )  # fmt: skip
    legend = "mean time that the guest waits for a page, median of the rounds; ratios within one"
    return f"{render(header, lines)}\n{legend}"


def _milli(means: dict[int, float]) -> str:
    return number(median(list(means.values())) / 1000, 3) if means else "-"


_PARTS = {
    "fault-to-request": "until asked",
    "at-source": "at source",
    "answer-to-installed": "install",
    "rest": "wire, wake-ups",
    "guest": "guest's own",
}


def _breakdown(rows: list[Row]) -> str:
    """Where the mean of a fault's time goes, microseconds."""
    lines = []
    for row in rows:
        if row.run is not None and row.run.parts:
            lines.append([
                *_cells(row)[:4], number(row.run.guest.get("mean"), 0),
                number(row.run.ours["mean"], 0),
                *(number(row.run.parts.get(part), 0) for part in _PARTS),
            ])  # fmt: skip
    legend = """\
us, means. until asked: from learning of the fault until the request is sent; at source: from its
arrival until the answer is sent; install: from the answer's arrival until the page is there; wire,
wake-ups: ours less these three; guest's own: what the guest waited more than ours, that is until
the fault is delivered and until the guest is woken and runs"""
    header = (*_HEADER[:4], "guest", "ours", *_PARTS.values())
    return f"{render(header, lines)}\n{legend}"


def _cost(rows: list[Row]) -> str:
    """Medians, and the background as a share of that without faults, in the same round."""
    rates: dict[str, dict[int, Run]] = {}
    for row in rows:
        if row.run is not None:
            rates.setdefault(row.method, {})[row.rep] = row.run
    calm = {rep: run.background for rep, run in rates.get("0", {}).items()}
    lines = []
    for method, runs in rates.items():

        def middle(value: Callable[[Run], float], runs: dict[int, Run] = runs) -> float:
            return float(median([value(run) for run in runs.values()]))

        with_faults = {rep: run.background for rep, run in runs.items()}
        lines.append([
            method, number(middle(lambda run: run.faults), 0),
            number(middle(lambda run: run.faults / run.seconds), 0),
            number(middle(lambda run: run.guest.get("mean", 0)), 0),
            number(middle(lambda run: run.background / 1e6), 1),
            number(middle(lambda run: run.total)),
            "yes" if all(run.right for run in runs.values()) else "NO",
            f"{max(row.others for row in rows if row.method == method):.0%}",
            str(len(runs)), _ratio(with_faults, calm),
        ])  # fmt: skip
    lines += [[row.method, f"a run failed: {row.problem}"] for row in rows if row.problem]
    legend = """\
medians; share: of the background without faults, within a round. A page that has come does not
fault: the figure for 500 faults/s is in the row whose faults/s come closest to that"""
    return f"{render((*_BACKGROUND_HEADER, 'runs', 'share'), lines)}\n{legend}"
