"""The page of a batch: totals, throughput, what ran when, and its items. Pure, as sections.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...transport.quantities import format_bytes, format_rate, format_seconds
from . import sections as s
from .charts import Bar, escape, number, share, timeline
from .page import document, verdict_line
from .record import Attempt, BatchRecord, ItemRow

STATES = ("completed", "failed", "running", "waiting", "pending")
# More items at once than this are drawn low, and without their names.
_HIGH_LANES, _HIGH, _LOW = 16, 30, 8


def render(record: BatchRecord) -> str:
    """The document."""
    body = [header(record), *(part for _, part in parts(record)), s.raw(record.report)]
    return document(record.title, body)


def header(record: BatchRecord, what: str = "pageferry batch report") -> str:
    return (
        f"<header><p>{escape(what)}</p><h1>{escape(record.title)}</h1>"
        f"{verdict_line(verdict(record.report), outcome(record.report))}</header>"
    )


def outcome(report: Mapping[str, Any]) -> str:
    error = s.mapping(report.get("error"))
    if error.get("class") == "Cancelled" or report.get("status") == "cancelled":
        return "stopped"
    return "good" if report.get("status") == "completed" and not error else "bad"


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: what became of it."""
    error, took = s.mapping(report.get("error")), s.milliseconds(report, "total-time")
    text = f"{_count(report, 'completed')} of {_count(report, 'total')} items completed"
    if took is not None:
        text += f" in {format_seconds(took)}"
    return f"{text}: {error.get('message', '')}" if error else f"{text}."


def now(report: Mapping[str, Any]) -> str:
    """One sentence while it runs."""
    parts = [f"{_count(report, 'completed')} of {_count(report, 'total')} completed"]
    parts += [f"{_count(report, n)} {n}" for n in STATES[1:] if number(report.get(n))]
    text = ", ".join(parts)
    eta = number(report.get("eta"))
    return text + (f"; {format_seconds(max(0.0, eta))} to go." if eta is not None else ".")


def done(report: Mapping[str, Any]) -> float | None:
    """The share that is there, 0 to 1: of the bytes, or where they are not known of the items."""
    size, arrived = number(report.get("bytes")), number(report.get("bytes-done"))
    if size and arrived is not None:
        return share(arrived, size) / 100
    total, ended = number(report.get("total")), number(report.get("completed"))
    return share(ended or 0.0, total) / 100 if total else None


def _count(report: Mapping[str, Any], name: str) -> str:
    value = number(report.get(name))
    return "?" if value is None else f"{value:,.0f}"


def parts(record: BatchRecord) -> list[tuple[str, str]]:
    """All sections by name, in their order; one without content is empty."""
    end = max(record.seconds, 0.001)
    facts = s.table(("what", "here"), list(record.host.items()))
    drawn = s.throughput(record.samples, end) if record.samples else ""
    return [
        ("figures", s.section("Key figures", _figures(record.report))),
        ("throughput", s.section("Throughput", drawn)),
        ("time-line", s.section("Time line", _time_line(record, end))),
        ("items", s.section("Items", _items(record))),
        ("host", s.section("Host", facts)),
    ]


def _figures(report: Mapping[str, Any]) -> str:
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("total", "Items", _plain),
        *((name, name.capitalize(), _plain) for name in STATES),
        ("bytes-done", "Arrived", format_bytes),
        ("bytes", "Memory", format_bytes),
        ("rate", "Throughput", format_rate),
        ("eta", "To go", format_seconds),
        ("total-time", "Time", _milliseconds),
        ("wire-bytes", "On the wire", format_bytes),
    ]
    cells = []
    for name, label, say in shown:
        if (value := number(report.get(name))) is not None:
            text = s.figure(name, report[name], say(max(0.0, value)))
            cells.append(f"<div><dt>{label}</dt><dd>{text}</dd></div>")
    return f"<dl>{''.join(cells)}</dl>" if cells else ""


def _plain(value: float) -> str:
    return f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return format_seconds(value / 1000)


def _time_line(record: BatchRecord, end: float) -> str:
    """What ran when: a lane for each that ran at the same time."""
    lanes: dict[int, list[Bar]] = {}
    begins = [at for at in (number(one.begin) for one in record.attempts) if at is not None]
    # where only the last are shown it begins with them
    origin = math.floor(min(begins)) if begins and record.attempts_left_out else 0
    for one in record.attempts:
        lanes.setdefault(one.lane, []).append(_bar(one, origin))
    if not lanes:
        return ""
    rows = [lanes.get(i, []) for i in range(max(lanes) + 1)]
    height = _HIGH if len(rows) <= _HIGH_LANES else _LOW
    drawn = timeline(
        rows, end - origin, lambda at: format_seconds(at + origin), "items over time", height
    )
    legend = "".join(
        f'<i class="{kind}"></i>{kind} ' for kind in ("running", "completed", "failed", "cancelled")
        if any(one.outcome == kind for one in record.attempts)
    )  # fmt: skip
    left_out = ""
    if record.attempts_left_out:
        left_out = f"<p>{escape(record.attempts_left_out)} more are left out.</p>"
    return f'<p class="legend">{legend}</p>{drawn}{left_out}'


def _bar(one: Attempt, origin: float) -> Bar:
    took = format_seconds(max(0.0, one.end - one.begin))
    title = f"{one.name}: {one.outcome}, {took}"
    return Bar(one.begin - origin, one.end - origin, one.outcome, one.name, title)


def _items(record: BatchRecord) -> str:
    rows = [_item(item) for item in record.items]
    if not rows:
        return ""
    head = "".join(
        f"<th>{name}</th>" for name in ("item", "state", "size", "rate", "took")
    )  # fmt: skip
    more = ""
    if record.items_left_out > 0:
        more = (
            f"<p>and {record.items_left_out:,} more: `pageferry batch status` has all of them.</p>"
        )
    return f'<div class="items">{s.scroll(f"<tr>{head}</tr>", rows)}</div>{more}'


def _item(item: ItemRow) -> str:
    state = item.phase or item.state
    if item.attempts > 1:
        state += f", attempt {item.attempts}"
    size, done_ = number(item.size) or 0.0, number(item.done)
    if done_ is not None and size:
        text = f"{share(done_, size):.0f} % of {escape(format_bytes(size))}"
        text += s.bar(share(done_, size), "page")
    else:
        text = escape(format_bytes(size)) if size else ""
    rate, took = number(item.rate), number(item.took)
    below = f"<small>to {escape(item.destination)}</small>" if item.destination else ""
    below += f'<small class="error">{escape(item.error)}</small>' if item.error else ""
    return (
        f'<tr class="{escape(item.state)}"><td>{escape(item.name)}{below}</td>'
        f'<td><i class="{escape(item.state)}"></i>{escape(state)}</td><td>{text}</td>'
        f"<td>{'' if rate is None else escape(format_rate(rate))}</td>"
        f"<td>{'' if took is None else escape(format_seconds(max(0.0, took)))}</td>"
        "</tr>"
    )
