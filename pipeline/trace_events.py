"""From trace records to Chrome trace events, as ui.perfetto.dev and chrome://tracing read. Pure.

An event is one JSON object, a string here; a file is a JSON array of them, whose last bracket may
be missing. Times in it are microseconds of CLOCK_MONOTONIC, so that two files of one host lie over
each other as they are. The format: "Trace Event Format", linked from docs/trace.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from ..workers.trace_records import FIELDS, RECORD, SPECS, Flow, Kind, Shape, Spec

_KINDS = {int(kind) for kind in Kind}
BEGIN_FILE, BETWEEN, END_FILE = "[\n", ",\n", "\n]\n"


def microseconds(ns: int) -> str:
    """A time of `ns` nanoseconds (>= 0), with all of its digits."""
    return f"{ns // 1000}.{ns % 1000:03d}"


# ---- what workers did -------------------------------------------------------------------

_BLOCK, _PAGE = FIELDS.index("block"), FIELDS.index("page")
_TIME = "%d.%03d"  # of divmod(nanoseconds, 1000)


@dataclass(frozen=True)
class _Template:
    """How records of one kind become text. `event`: takes begin, what `shape` has besides, and the
    fields `values`; `second`: the end of a wait, or the point of an arrow."""

    event: str
    values: tuple[int, ...]
    shape: Shape
    second: str = ""


def wait_id(pid: int, number: int) -> int:
    """Of one bar among many that overlap; shown in hexadecimal."""
    return (pid & 0xFFFFFF) << 40 | number & 0xFF_FFFF_FFFF


def page_id(scope: str, block: int, page: int) -> int:
    """The same at both ends of a migration, for the arrows of a page. Perfetto takes 64 bits in
    hexadecimal, and no other string."""
    which = crc32(scope.encode(errors="replace")) & 0xFFFF
    return which << 48 | (block & 0xFF) << 40 | page & 0xFF_FFFF_FFFF


def _template(spec: Spec, pid: int) -> _Template:
    who = f'"pid":{pid},"tid":{pid}'
    what = f'"name":"{spec.name}","cat":"{spec.category}",{who},"ts":{_TIME}'
    arguments = ",".join(f'"{shown}":%d' for _, shown in spec.arguments)
    values = tuple(FIELDS.index(field) for field, _ in spec.arguments)
    rest = f'"args":{{{arguments}}}}}'
    match spec.shape:
        case Shape.MARK:
            return _Template(f'{{"ph":"i","s":"t",{what},{rest}', values, spec.shape)
        case Shape.WAIT:
            # many at a time: each has an id of its own, and a line of its own where they overlap
            key = '"id":"0x%x"'
            begin, end = (f'{{"ph":"{ph}",{what},{key}' for ph in "be")
            return _Template(f"{begin},{rest}", values, spec.shape, f"{end}}}")
    second = ""
    if spec.flow is not Flow.NONE:
        bind = ',"bp":"e"' if spec.flow is Flow.TO else ""
        second = (
            f'{{"ph":"{spec.flow.value}","name":"page","cat":"page",{who},"ts":{_TIME}'
            f',"id":"0x%x"{bind}}}'
        )
    return _Template(f'{{"ph":"X",{what},"dur":{_TIME},{rest}', values, spec.shape, second)


def worker_events(records: bytes, pid: int, scope: str, first_id: int = 0) -> list[str]:
    """The events of a worker's `records`. `scope`: of which migration, for arrows from one process
    to another; `first_id`: not used for this worker yet, nor are as many above it as there are
    records. What is of no known kind is left out."""
    events: list[str] = []
    templates: dict[int, _Template] = {}
    whole = len(records) // RECORD.size * RECORD.size
    for number, fields in enumerate(RECORD.iter_unpack(records[:whole]), first_id):
        begin, took, kind = fields[:3]
        template = templates.get(kind)
        if template is None:
            if kind not in _KINDS:
                continue
            template = templates[kind] = _template(SPECS[Kind(kind)], pid)
        at, values = divmod(begin, 1000), [fields[i] for i in template.values]
        if template.shape is Shape.SPAN:
            events.append(template.event % (*at, *divmod(took, 1000), *values))
            if template.second:
                key = page_id(scope, fields[_BLOCK], fields[_PAGE])
                events.append(template.second % (*at, key))
        elif template.shape is Shape.WAIT:
            key = wait_id(pid, number)
            events.append(template.event % (*at, key, *values))
            events.append(template.second % (*divmod(begin + took, 1000), key))
        else:
            events.append(template.event % (*at, *values))
    return events


# ---- what coordinators did, and who everybody is ----------------------------------------


def process_name(pid: int, name: str, order: int) -> list[str]:
    """`order`: from the top."""
    return [
        _event("M", "process_name", pid, pid, args={"name": name}),
        _event("M", "process_sort_index", pid, pid, args={"sort_index": order}),
        _event("M", "thread_name", pid, pid, args={"name": name}),
    ]


def line_name(pid: int, line: int, name: str) -> list[str]:
    """A line of its own of the coordinator `pid`."""
    return [
        _event("M", "thread_name", pid, line, args={"name": name}),
        _event("M", "thread_sort_index", pid, line, args={"sort_index": line}),
    ]


def begins(name: str, category: str, ns: int, pid: int, line: int, args: dict[str, Any]) -> str:
    """A bar on a line; whatever begins there ends before what began earlier. One that never ends
    (a process that was killed) is drawn to the end of the trace."""
    return _event("B", name, pid, line, ns, cat=category, args=args)


def ends(name: str, category: str, ns: int, pid: int, line: int, args: dict[str, Any]) -> str:
    """The end of the last one that began; `args` come to those of its beginning."""
    return _event("E", name, pid, line, ns, cat=category, args=args)


def mark(name: str, category: str, ns: int, pid: int, line: int, args: dict[str, Any]) -> str:
    """A moment on a line."""
    return _event("i", name, pid, line, ns, s="t", cat=category, args=args)


def _event(phase: str, name: str, pid: int, line: int, ns: int | None = None, **rest: Any) -> str:
    event: dict[str, Any] = {"ph": phase, "name": name, "pid": pid, "tid": line}
    head = json.dumps(event | rest, separators=(",", ":"), default=str)
    # its own digits: a double has too few for nanoseconds of a host that runs for months
    return head if ns is None else f'{head[:-1]},"ts":{microseconds(ns)}}}'
