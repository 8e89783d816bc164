"""The page of a migration: a record in, one HTML document out, well-formed and whole in itself.
Pure. What it says: sections.py.
"""

from __future__ import annotations

from . import sections as s
from .charts import escape
from .record import Record
from .style import STYLE


def render(record: Record) -> str:
    """The document."""
    body = [header(record), *(part for _, part in parts(record)), s.raw(record.report)]
    return document(f"{record.source} to {record.destination}", body)


def header(record: Record, what: str = "pageferry migration report") -> str:
    """What moves where, and what became of it."""
    return (
        f"<header><p>{escape(what)}</p><h1>{escape(record.source)} "
        f"<span>to</span> {escape(record.destination)}</h1>"
        f"{verdict_line(s.verdict(record.report), s.outcome(record.report))}</header>"
    )


def verdict_line(text: str, outcome: str) -> str:
    return f'<p id="verdict" class="{escape(outcome)}">{escape(text)}</p>'


def parts(record: Record) -> list[tuple[str, str]]:
    """All sections by name, in their order; one without content is empty."""
    report, end = record.report, s.end_of(record)
    facts = s.table(("what", "here"), list(record.host.items()))
    return [
        ("figures", s.section("Key figures", s.stall(report) + s.figures(report))),
        ("time-line", s.section("Time line", s.time_line(record, end))),
        ("throughput", s.section("Throughput", s.throughput(record.samples, end))),
        ("dirty", s.section("What the guest writes", s.dirty(record, end))),
        ("rounds", s.section("Rounds", s.rounds(record))),
        ("faults", s.section("Fault latency", s.faults(report))),
        ("processes", s.section("Processes", s.uses(record) or s.processes(report))),
        ("pages", s.section("Pages", s.pages(report))),
        ("settings", s.section("Settings", s.settings(record.settings))),
        ("host", s.section("Host", facts)),
    ]


def document(title: str, body: list[str]) -> str:
    """A page that needs nothing else."""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\"/>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(part for part in body if part)}</main></body></html>\n"
    )
