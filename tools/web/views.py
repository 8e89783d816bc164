"""The live page: the report's sections as parts by name, and the document around them. Pure.

Parts are put into the page as HTML: everything in them has gone through the report's escaping.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..report import batch_page, page
from ..report import sections as s
from ..report.charts import escape
from ..report.record import BatchRecord, Record

# All that any page has, in the order in which they stand.
ORDER = (
    "head", "figures", "time-line", "throughput", "dirty", "rounds", "faults", "processes",
    "pages", "items", "settings", "host", "raw",
)  # fmt: skip
TITLE = "title"


def migration(record: Record, *, over: bool) -> dict[str, str]:
    """A migration while it runs, or when it is over."""
    names = f"{record.source} to {record.destination}"
    parts = dict(page.parts(record))
    if over:
        word = s.verdict(record.report).split()[0]
        return parts | {
            TITLE: f"{word}: {names}",
            "head": page.header(record, "pageferry, live: it has ended"),
            "raw": s.raw(record.report),
        }
    done = s.done(record.report)
    head = (
        f"<header><p>pageferry, live</p><h1>{escape(record.source)} <span>to</span> "
        f"{escape(record.destination)}</h1>{_now(s.now(record.report), done)}</header>"
    )
    return parts | {TITLE: _title(done, names), "head": head, "raw": ""}


def batch(record: BatchRecord, *, over: bool) -> dict[str, str]:
    """A batch while it runs, or when it is over."""
    parts = dict(batch_page.parts(record))
    if over:
        return parts | {
            TITLE: f"Ended: {record.title}",
            "head": batch_page.header(record, "pageferry batch, live: it has ended"),
        }
    done = batch_page.done(record.report)
    head = (
        f"<header><p>pageferry batch, live</p><h1>{escape(record.title)}</h1>"
        f"{_now(batch_page.now(record.report), done)}</header>"
    )
    return parts | {TITLE: _title(done, record.title), "head": head}


def receiver(
    everything: BatchRecord, last: Record | None, *, last_over: bool, over: bool
) -> dict[str, str]:
    """A receiver: the migration that came last, if it takes one at a time, and all of them."""
    title, report = everything.title, everything.report
    parts = dict.fromkeys(ORDER, "")
    if last is not None:
        parts |= dict(page.parts(last))
        parts["items"] = dict(batch_page.parts(everything))["items"]
        text, done = s.now(last.report), s.done(last.report)
        if last_over:
            text, done = s.verdict(last.report), None
        kind = s.outcome(last.report) if last_over else "running"
        said = f"{page.verdict_line(text, kind)}{_progress(done)}"
    else:
        parts |= dict(batch_page.parts(everything))
        done = None
        said = _now(_received(report), None)
    what = "pageferry receive, live" + (": it has ended" if over else "")
    parts["head"] = f"<header><p>{what}</p><h1>{escape(title)}</h1>{said}</header>"
    return parts | {TITLE: _title(done, title)}


def _received(report: Mapping[str, object]) -> str:
    counts = [f"{report.get('completed', 0)} received"]
    counts += [f"{report[n]} {n}" for n in ("failed", "cancelled") if report.get(n)]
    running = report.get("running")
    counts.append(f"{running} arriving" if running else "nothing arriving now")
    return f"{', '.join(counts)}."


def _now(text: str, done: float | None) -> str:
    return f"{page.verdict_line(text, 'running')}{_progress(done)}"


def _progress(done: float | None) -> str:
    if done is None:
        return ""
    value = f'max="1" value="{done:.4f}"'
    return f'<progress id="progress" aria-label="done" {value}>{done:.0%}</progress>'


def _title(done: float | None, names: str) -> str:
    return names if done is None else f"{done:.0%} {names}"


def document(parts: Mapping[str, str]) -> str:
    """The page as it is loaded: everything is there, and live.js keeps it so. What is in it comes
    from this server; the headers forbid anything else."""
    places = "".join(f'<div id="part-{name}">{parts.get(name, "")}</div>' for name in ORDER)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(parts.get(TITLE, 'pageferry'))}</title>"
        '<link rel="stylesheet" href="style.css"/><script src="live.js" defer="defer"></script>'
        '</head>\n<body><p id="link" role="status" hidden="hidden"></p>'
        f"<main>{places}<noscript><p>Without JavaScript this page stays as it is: load it again."
        "</p></noscript></main></body></html>\n"
    )
