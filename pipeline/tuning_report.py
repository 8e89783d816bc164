"""What `pageferry tune` found, as data: the object of --json, which tables, curves and profiles are
made from. Pure.

Names are in kebab case; rates in bytes of guest memory a second, times in milliseconds, processor
time in seconds a GB (1e9 bytes), shares from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any

from ..transport.quantities import format_rate
from .bounds import bound_of
from .tuning import FASTEST, LEAST_CPU, LEAST_DOWNTIME, Book, Search, Setting

# What each goal wants, for people.
GOAL_WORDS = {
    FASTEST: "throughput", LEAST_CPU: "CPU per GB", LEAST_DOWNTIME: "downtime",
}  # fmt: skip


def named(setting: Setting) -> dict[str, Any]:
    """A setting by the names of the command line's options."""
    level = {} if setting.level is None else {"level": setting.level}
    return {"workers": setting.workers, "codec": setting.codec, **level,
            "batch-pages": setting.batch_pages}  # fmt: skip


def row_of(book: Book, setting: Setting) -> dict[str, Any]:
    """What a setting was like."""
    runs = book.good(setting)
    size = sum(run.size for run in runs)
    received = [run.receiver_cpu for run in runs if run.receiver_cpu is not None]
    spread, downtime = book.spread(setting), book.downtime(setting)
    return named(setting) | {
        "rate": round(book.rate(setting)),
        "spread": None if spread is None else round(spread, 4),
        "trials": len(book.runs[setting]),
        "cpu-senders": round(sum(run.sender_cpu for run in runs) / size * 1e9, 4),
        "cpu-receivers": round(sum(received) / size * 1e9, 4) if len(received) == len(runs)
        else None,
        "cpu": round(book.cpu(setting) * 1e9, 4),
        "wire-share": round(sum(run.wire for run in runs) / size, 4),
        "downtime": None if downtime is None else round(downtime * 1000, 1),
    }  # fmt: skip


def report_of(tuner: Search, *, local: bool, cpus: int) -> dict[str, Any]:
    """Everything but what the caller knows better: source, sample, time."""
    book = tuner.book
    best = tuner.best()
    order = sorted(book.runs, key=book.rate, reverse=True)
    return {
        "trials": tuner.done,
        "settings": [row_of(book, setting) for setting in order],
        "best": {goal: row_of(book, setting) for goal, setting in best.items()},
        "bound": {goal: _bound(book, setting, local, cpus) for goal, setting in best.items()},
        "curves": curves(book, tuner.space.codecs),
    }


def _bound(book: Book, setting: Setting, local: bool, cpus: int) -> dict[str, Any]:
    bound = bound_of(book, setting, local=local, cpus=cpus)
    use = bound.use
    return {
        "kind": bound.kind,
        "text": bound.text,
        "senders-busy": round(use.senders, 3),
        "receivers-busy": None if use.receivers is None else round(use.receivers, 3),
        "senders-waiting": round(use.waiting, 3),
        "first-touch-share": round(use.touch, 3),
        "wire-rate": round(use.wire),
    }


def curves(book: Book, codecs: Sequence[tuple[str, int | None]]) -> dict[str, list[dict[str, Any]]]:
    """By factor, for each of its values that was tried: the fastest setting that has it."""
    order = {codec: i for i, codec in enumerate(codecs)}
    factors: dict[str, Callable[[Setting], tuple[int, str]]] = {
        "workers": lambda s: (s.workers, str(s.workers)),
        "codec": lambda s: (order.get((s.codec, s.level), len(order)), s.how),
        "batch-pages": lambda s: (s.batch_pages, str(s.batch_pages)),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for factor, value in factors.items():
        groups: dict[tuple[int, str], list[Setting]] = {}
        for setting in book.runs:
            groups.setdefault(value(setting), []).append(setting)
        found[factor] = [
            {"value": key[1]} | row_of(book, max(group, key=book.rate))
            for key, group in sorted(groups.items())
        ]
    return found


def comments(report: dict[str, Any], goal: str) -> list[str]:
    """What a profile says of where its settings are from."""
    row = report["best"][goal]
    spread = "" if row["spread"] is None else f" ± {row['spread']:.0%}"
    cpu = f"{row['cpu']:.2f} s of CPU a GB"
    if row["cpu-receivers"] is None:
        cpu += " at the source"
    lines = [
        f"{report['source']} to {report['destination']}: best for {GOAL_WORDS[goal]} of "
        f"{len(report['settings'])} settings in {report['trials']} trials, {report['date']}",
        f"{format_rate(row['rate'])}{spread}, {cpu}, {row['wire-share']:.2f} on the wire a byte",
    ]
    if row["downtime"] is not None:
        lines.append(f"estimated downtime {row['downtime']:.0f} ms")
    return [line for text in [*lines, report["bound"][goal]["text"]] for line in wrap(text, 96)]
