"""What a page says, section by section: a record in, HTML that is well-formed XML out. Pure.

Names and error texts come from peers and files: whatever they are, they end up as text. Numbers
that make no sense are left out. No style in an attribute: pages forbid it. Must not know how a
migration is done, nor whether it is over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...transport.quantities import format_bytes, format_rate, format_seconds
from .charts import Bar, Line, escape, histogram, lines, number, share, timeline
from .record import Record, Sample

# What of a report is shown as it is: far more than there ever is, and a page that still opens.
_DEEPEST, _MOST_ITEMS, _LONGEST = 12, 5000, 10_000
# Of a histogram: 2^40 us are twelve days.
_MOST_COLUMNS = 40
_PHASES = {
    "setup": ("setup", "setup"),
    "active": ("precopy", "active"),
    "pre-switchover": ("waiting for `pageferry continue`", "paused"),
    "device": ("switchover", "device"),
    "postcopy-active": ("postcopy", "postcopy"),
    "postcopy-paused": ("paused", "paused"),
    "postcopy-recover": ("recovering", "paused"),
    "cancelling": ("cancelling", "paused"),
}
_UNITS = {"downtime-limit": "ms", "postcopy-latency-target": "us"}
_RATES = ("max-bandwidth", "max-postcopy-bandwidth")


# ---- what a report has, whatever is in it ----------------------------------------------------


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def milliseconds(report: Mapping[str, Any], name: str) -> float | None:
    value = number(report.get(name))
    return None if value is None else max(0.0, value) / 1000


def end_of(record: Record) -> float:
    """Seconds on the axes."""
    ends = [milliseconds(record.report, "total-time"), 0.001]
    ends += [number(phase.end) for phase in record.phases]
    ends += [number(round_.end) for round_ in record.rounds]
    ends += [number(sample.at) for sample in record.samples]
    return max(end for end in ends if end is not None)


# ---- the sections ----------------------------------------------------------------------------


def outcome(report: Mapping[str, Any]) -> str:
    error = report.get("error")
    if error:
        return "stopped" if mapping(error).get("class") == "Cancelled" else "bad"
    return "good" if report.get("status") == "completed" else "stopped"


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: what became of it."""
    total = milliseconds(report, "total-time")
    took = format_seconds(total) if total is not None else ""
    error = mapping(report.get("error"))
    if error:
        word = "Cancelled" if error.get("class") == "Cancelled" else "Failed"
        text = f"{word} after {took}" if took else f"{word} before anything moved"
        return f"{text}: {error.get('message', '')}"
    if report.get("status") != "completed":
        return f"Ended as {report.get('status', 'unknown')}" + (f" after {took}." if took else ".")
    text = f"Completed in {took}" if took else "Completed"
    down, limit = milliseconds(report, "downtime"), milliseconds(report, "downtime-limit")
    if down is not None:
        text += f", downtime {format_seconds(down)}"
        if limit is not None:
            above = ", which is more than the" if down > limit else " of"
            text += f"{above} {format_seconds(limit)} allowed"
    if "verified" in report:
        text += "; verified: the destination holds what was read at the source"
    oracle = mapping(report.get("oracle"))
    if oracle.get("ok") is True:
        text += "; every byte of the demo guest is right"
    return text + "."


def phase(report: Mapping[str, Any]) -> str:
    """What is going on, in a word or two."""
    status = str(report.get("status", "none"))
    word = _PHASES.get(status, (status, ""))[0]
    number_ = number(mapping(report.get("ram")).get("dirty-sync-count"))
    return f"{word}, round {number_:.0f}" if status == "active" and number_ else word


def now(report: Mapping[str, Any]) -> str:
    """One sentence while it runs."""
    ram, progress = mapping(report.get("ram")), mapping(report.get("progress"))
    word = phase(report)
    word = word[:1].upper() + word[1:]
    left, total = number(ram.get("remaining")), number(ram.get("total"))
    if report.get("status") == "postcopy-paused":
        because = report.get("paused-because", "the connection is gone")
        return f"{word}: {because}. `pageferry recover` goes on."
    if report.get("status") not in ("active", "device", "postcopy-active") or left is None:
        return f"{word}."
    parts = [f"{format_bytes(left)} left of {format_bytes(total or 0)}"]
    rate, writes = number(progress.get("rate")), number(progress.get("dirty-rate"))
    if rate is not None:
        parts.append(format_rate(rate))
    eta = number(progress.get("eta"))
    throttled = number(report.get("cpu-throttle-percentage"))
    if throttled:
        parts.append(f"the guest is slowed down by {throttled:.0f} %")
    if eta is not None:
        parts.append(f"{format_seconds(max(0.0, eta))} to go")
    elif writes and rate is not None and writes > rate:
        parts.append("the guest writes faster than its memory moves")
    return f"{word}: {', '.join(parts)}."


def done(report: Mapping[str, Any]) -> float | None:
    """The share of this round that is there, 0 to 1."""
    size = number(mapping(report.get("progress")).get("round-bytes"))
    left = number(mapping(report.get("ram")).get("remaining"))
    return None if not size or left is None else share(size - left, size) / 100


def stall(report: Mapping[str, Any]) -> str:
    """That it got nowhere, or had got nowhere, and what can be done."""
    stall = mapping(report.get("stall"))
    if not stall.get("text"):
        return ""
    text, count = str(stall.get("round", "")), number(stall.get("count")) or 1
    before = f"Round {text}, {count:.0f} times so far: " if count > 1 else f"Round {text}: "
    after = " It got on again later." if stall.get("over") else ""
    return f'<p id="stall">{escape(before + str(stall["text"]) + after)}</p>'


def figures(report: Mapping[str, Any]) -> str:
    ram, progress = mapping(report.get("ram")), mapping(report.get("progress"))
    seconds = milliseconds(report, "total-time")
    wire = number(report.get("wire-bytes"))
    throttle = mapping(report.get("throttle"))
    cache = {f"xbzrle-{name}": of for name, of in mapping(report.get("xbzrle-cache")).items()}
    shown = [
        ("remaining", "Still to send", ram if progress else {}, "bytes"),
        ("rate", "Throughput", progress, "rate"),
        ("wire-rate", "Throughput, wire", progress, "rate"),
        ("dirty-rate", "Guest writes", progress, "rate"),
        ("eta", "To go", progress, "s"),
        ("total-time", "Time", report, "ms"),
        ("setup-time", "Setup", report, "ms"),
        ("downtime", "Downtime", report, "ms"),
        ("downtime-limit", "Downtime allowed", report, "ms"),
        ("total", "Memory", ram, "bytes"),
        ("wire-bytes", "On the wire", report, "bytes"),
        ("normal", "Pages sent", ram, ""),
        ("duplicate", "Zero pages", ram, ""),
        ("dirty-sync-count", "Rounds", ram, ""),
        ("xbzrle-pages", "Pages in the cache of deltas", cache, ""),
        ("xbzrle-cache-miss", "Pages that were not in it", cache, ""),
        ("xbzrle-bytes", "Their deltas", cache, "bytes"),
        ("xbzrle-overflow", "Deltas larger than a page", cache, ""),
        ("xbzrle-cache-size", "What the cache may take", cache, "bytes"),
        ("cpu-throttle-percentage", "Guest slowed down by", report, "%"),
        ("max-percentage", "Slowed down, at the most", throttle, "%"),
        ("slow-down", "Guest did less", throttle, "%"),
        ("postcopy-requests", "Pages asked for", report, ""),
        ("recoveries", "Recoveries", report, ""),
        ("lost-frames", "Frames lost", report, ""),
    ]
    cells = []
    for name, label, where, unit in shown:
        if (value := number(where.get(name))) is not None:
            cells.append(
                f"<div><dt>{label}</dt>"
                f"<dd>{figure(name, where[name], _said(value, unit))}</dd></div>"
            )
    if wire is not None and seconds:
        average = format_rate(wire / seconds)
        cells.append(f"<div><dt>Wire, on average</dt><dd>{escape(average)}</dd></div>")
    return f"<dl>{''.join(cells)}</dl>" if cells else ""


def _said(value: float, unit: str) -> str:
    if unit in ("ms", "s"):
        return format_seconds(value / (1000 if unit == "ms" else 1))
    if unit == "rate":
        return format_rate(value)
    if unit == "%":
        return f"{value:.0f} %"
    return format_bytes(value) if unit == "bytes" else f"{value:,.0f}"


def figure(name: str, value: object, text: str) -> str:
    """A number as people read it, with the exact one for programs."""
    return f'<data id="{escape(name)}" value="{escape(value)}">{escape(text)}</data>'


def time_line(record: Record, end: float) -> str:
    phases, rows = [], []
    for phase in record.phases:
        name, kind = _PHASES.get(phase.status, (phase.status, "paused"))
        begin, stop = number(phase.begin), number(phase.end)
        if begin is None or stop is None or phase.status == "none":
            continue
        took = format_seconds(max(0.0, stop - begin))
        phases.append(Bar(begin, stop, kind, "", f"{name}: {took}"))
        rows.append(
            f'<tr><td><i class="{kind}"></i>{escape(name)}</td>'
            f"<td>{escape(format_seconds(max(0.0, begin)))}</td><td>{escape(took)}</td></tr>"
        )
    rounds = []
    for one in record.rounds:
        begin, stop = number(one.begin), number(one.end)
        if begin is not None and stop is not None:
            kind = "device" if one.stopped else "active"
            took = format_seconds(max(0.0, stop - begin))
            text = escape(one.number)
            rounds.append(Bar(begin, stop, kind, text, f"round {one.number}: {took}"))
    if not phases and not rounds:
        return ""
    drawn = timeline([phases, rounds] if rounds else [phases], end, format_seconds, "phases")
    below = "<p>The upper row has the phases, the lower one the rounds.</p>" if rounds else ""
    head = "<tr><th>phase</th><th>began at</th><th>took</th></tr>"
    return f"{drawn}{below}{scroll(head, rows)}"


def _points(samples: Sequence[Sample], name: str) -> list[tuple[float, float]]:
    found = []
    for sample in samples:
        at, value = number(sample.at), number(getattr(sample, name))
        if at is not None and value is not None:
            found.append((at, max(0.0, value)))
    return found


def throughput(samples: Sequence[Sample], end: float) -> str:
    guest, wire = _points(samples, "rate"), _points(samples, "wire_rate")
    if not guest:
        return "<p>It was not looked at often enough for a line.</p>"
    drawn = lines(
        [Line("guest", guest), Line("wire", wire)],
        end, format_seconds, format_rate, "bytes a second over time",
    )  # fmt: skip
    return (
        f'<p class="legend"><i class="guest"></i>guest memory <i class="wire"></i>on the wire, '
        f"bytes a second over the last two seconds</p>{drawn}"
    )


def dirty(record: Record, end: float) -> str:
    dirty, rate = _points(record.samples, "dirty_rate"), _points(record.samples, "rate")
    if not any(value for _, value in dirty):
        return ""
    drawn = lines(
        [Line("rate", rate), Line("dirty", dirty)],
        end, format_seconds, format_rate, "dirty rate over time",
    )  # fmt: skip
    return (
        '<p class="legend"><i class="dirty"></i>what the guest wrote before the last look for '
        f'dirty pages, bytes a second <i class="rate"></i>what moved, for comparison</p>{drawn}'
    )


def rounds(record: Record) -> str:
    rows = []
    for one in record.rounds:
        begin, end, dirty = number(one.begin), number(one.end), number(one.dirty_rate)
        pages, wire = number(one.pages), number(one.wire_bytes)
        rows.append((
            f"{one.number}{' (guest stopped)' if one.stopped else ''}",
            "" if pages is None else f"{pages:,.0f}",
            "" if wire is None else format_bytes(wire),
            "" if begin is None or end is None else format_seconds(max(0.0, end - begin)),
            "" if dirty is None or one.number == 1 else format_rate(dirty),
        ))  # fmt: skip
    if not rows:
        return ""
    left_out = ""
    if record.rounds_left_out:
        left_out = f"<p>{escape(record.rounds_left_out)} rounds in the middle are left out.</p>"
    return left_out + table(("round", "pages", "on the wire", "took", "guest wrote"), rows)


def faults(report: Mapping[str, Any]) -> str:
    """postcopy-latency-dist: column i has the faults of 2^i to 2^(i+1) microseconds."""
    counts = [number(n) for n in _list(report.get("postcopy-latency-dist"))[:_MOST_COLUMNS]]
    shown = [max(0.0, n or 0.0) for n in counts]
    if not any(shown):
        return ""
    names = [_microseconds(2.0**i if i else 0.0) for i in range(len(shown))]
    titles = [
        f"{names[i]} to {_microseconds(2.0 ** (i + 1))}: {n:,.0f} fault(s)"
        for i, n in enumerate(shown)
    ]
    percentiles = mapping(report.get("postcopy-latency-percentiles"))
    marks, cells = [], []
    for name in ("p50", "p90", "p99", "max"):
        value = number(percentiles.get(name))
        if value is None:
            continue
        cells.append(
            f"<div><dt>{name}</dt>"
            f"<dd>{figure(f'fault-{name}', percentiles[name], _microseconds(value))}</dd></div>"
        )
        if name != "max":
            at = math.log2(max(value, 1.0)) if value >= 2 else max(value, 0.0) / 2
            marks.append((name, at))
    mean = number(report.get("postcopy-latency"))
    if mean is not None:
        text = _microseconds(mean / 1000)
        exact = figure("postcopy-latency", report["postcopy-latency"], text)
        cells.insert(0, f"<div><dt>mean</dt><dd>{exact}</dd></div>")
    first = next(i for i, n in enumerate(shown) if n)
    first = min([first] + [int(at) for _, at in marks])
    drawn = histogram(
        shown[first:], names[first:], titles[first:],
        [(name, at - first) for name, at in marks], "faults by how long they waited",
    )  # fmt: skip
    return (
        f"<dl>{''.join(cells)}</dl><p>{sum(shown):,.0f} fault(s) by how long they waited; each "
        f"column is twice as long as the one before.</p>{drawn}"
    )


def _microseconds(value: float) -> str:
    if value < 1000:
        return f"{value:.0f} us"
    return f"{value / 1000:.1f} ms" if value < 1e6 else format_seconds(value / 1e6)


def processes(report: Mapping[str, Any]) -> str:
    processes = [mapping(process) for process in _list(report.get("processes"))[:_MOST_ITEMS]]
    columns = ("cpu-time", "wait-time", "codec-time")
    spent = [number(process.get(name)) for process in processes for name in columns]
    longest = max([milliseconds(report, "total-time") or 0.0] + [(s or 0) / 1000 for s in spent])
    rows = []
    for process in processes:
        cells = [f"<td>{escape(process.get('name', ''))}</td>"]
        for name in columns:
            value = milliseconds(process, name)
            if value is None:
                cells.append("<td></td>")
                continue
            kind = name.removesuffix("-time")
            cells.append(
                f"<td>{escape(format_seconds(value))}{bar(share(value, longest), kind)}</td>"
            )
        memory = number(process.get("peak-memory"))
        cells.append(f"<td>{'' if memory is None else escape(format_bytes(memory))}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    head = (
        "<tr><th>process</th><th>processor</th><th>waiting for the link</th>"
        "<th>in the codec</th><th>memory</th></tr>"
    )
    scale = f"<p>A whole bar is {escape(format_seconds(longest))}.</p>"
    return scale + scroll(head, rows)


def uses(record: Record) -> str:
    """What each process does just now."""
    rows = []
    for use in record.uses:
        cells = [f"<td>{escape(use.name)}</td>"]
        for kind in ("cpu", "wait", "codec"):
            value = number(getattr(use, kind))
            if value is None:
                cells.append("<td></td>")
                continue
            percent = share(value, 1.0)
            cells.append(f"<td>{percent:.0f} %{bar(percent, kind)}</td>")
        spent, memory = number(use.cpu_time), number(use.memory)
        cells.append(f"<td>{'' if spent is None else escape(format_seconds(spent))}</td>")
        cells.append(f"<td>{'' if memory is None else escape(format_bytes(memory))}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    head = (
        "<tr><th>process</th><th>processor</th><th>waiting for the link</th>"
        "<th>in the codec</th><th>processor in all</th><th>memory</th></tr>"
    )
    return f"<p>Shares of the last two seconds.</p>{scroll(head, rows)}"


def bar(percent: float, kind: str) -> str:
    return (
        f'<svg class="bar" width="100%" height="5"><rect class="{escape(kind)}" '
        f'width="{percent:.1f}%" height="5"/></svg>'
    )


def pages(report: Mapping[str, Any]) -> str:
    """How they travelled."""
    found: list[tuple[str, float]] = []
    for name, pages in list(mapping(report.get("codec-pages")).items())[:_MOST_ITEMS]:
        if value := number(pages):
            text = "as they are" if name == "none" else str(name)
            found.append((text, value))
    if zero := number(mapping(report.get("ram")).get("duplicate")):
        found.append(("zero, not sent", zero))
    most = sum(value for _, value in found)
    rows = [
        f"<tr><td>{escape(name)}</td><td>{value:,.0f}{bar(share(value, most), 'page')}</td></tr>"
        for name, value in found
    ]
    return scroll("<tr><th>codec</th><th>pages</th></tr>", rows) if rows else ""


def settings(settings: Mapping[str, Any]) -> str:
    rows = []
    for name, value in list(settings.items())[:_MOST_ITEMS]:
        amount = number(value)
        if name in _RATES and amount is not None:
            text = format_rate(amount) if amount > 0 else "no limit"
        elif isinstance(value, bool):
            text = "on" if value else "off"
        else:
            text = f"{_plain(value)} {_UNITS.get(name, '')}".strip()
        rows.append((name, text))
    return table(("setting", "value"), rows)


def raw(report: Mapping[str, Any]) -> str:
    text = json.dumps(_plain(report), indent=1, default=str, ensure_ascii=True)
    return (
        "<details><summary>The report as JSON</summary>"
        f'<pre id="raw">{escape(text, len(text))}</pre></details>'
    )


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON can say it, with an end."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1024:
        return None  # too long to be written down
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping | list | tuple) and depth >= _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        items = list(value.items())[:_MOST_ITEMS]
        return {str(key)[:_LONGEST]: _plain(item, depth + 1) for key, item in items}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value[:_MOST_ITEMS]]
    return str(value)[:_LONGEST]


# ---- pieces ----------------------------------------------------------------------------------


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return scroll("<tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>", cells)


def scroll(head: str, rows: Sequence[str]) -> str:
    """A table that a narrow screen shows a part of."""
    return (
        f'<div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
