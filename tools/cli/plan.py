"""`pageferry plan SOURCE`: would it converge, in what time, and how should it be moved?"""

from __future__ import annotations

import asyncio
import json
import textwrap
from typing import Any

import click

from ...pipeline.parameters import Parameters
from ...pipeline.planning import Wanted, plan, wanted_by
from ...transport.errors import Cancelled
from ...transport.links import Endpoint, parse_endpoint
from ...transport.pages import PAGE_SIZE
from ...transport.quantities import (
    format_bytes,
    format_rate,
    format_seconds,
    parse_duration,
    parse_rate,
    parse_size,
)
from ...workers.guests import parse_guest
from .dirtyrate import seconds_of
from .display import Display, PlainLines
from .options import integer, key_options, profiled
from .running import Interrupts

_WIDTH = 92


@click.command("plan")
@click.argument("source")
@click.argument("endpoint", required=False)
@click.option("--profile", metavar="NAME", help="Plan for what `pageferry tune` wrote: a name, or "
              "a path. What is said here as well comes before.")  # fmt: skip
@click.option("--bandwidth", metavar="RATE", default="0", help="Of the link: 10Gbit, 500MB. "
              "Default: what these hosts, or the link to ENDPOINT, carry.")  # fmt: skip
@click.option("--downtime-limit", metavar="TIME", default="300ms", show_default=True,
              help="How long the guest may stand still.")  # fmt: skip
@click.option("--max-rounds", metavar="N", default="30", show_default=True,
              help="As `pageferry send` has it.")  # fmt: skip
@click.option("--seconds", metavar="N", default="2", show_default=True,
              help="How long writes are looked at, twice.")  # fmt: skip
@click.option("--sample", metavar="SIZE", default="128M", show_default=True,
              help="How much of its memory is moved to see how fast it does.")  # fmt: skip
@click.option("--workers", metavar="N", help="Plan for so many. Default: as many as pay.")
@click.option("--codec", metavar="NAME", default="auto", show_default=True,
              help="Plan for this one; auto: which pays.")  # fmt: skip
@click.option("--level", metavar="N", help="The codec's level.")
@key_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="Nothing but the plan.")
def plan_command(source: str, endpoint: str | None, **options: Any) -> None:
    """Say whether the guest SOURCE would converge, in what time, with which downtime, and how it
    should be moved: over a link of --bandwidth, or to the `pageferry receive` at ENDPOINT.

    Its writes are looked at for some seconds, and samples of its memory are moved and thrown away.
    It is neither stopped nor changed.

    \b
    pageferry plan qemu:/run/vm/pageferry.qmp --bandwidth 10Gbit --downtime-limit 100ms
    """
    where = parse_guest(source)
    there = _endpoint(endpoint)
    wanted = _wanted(options)
    view = Display() if options["quiet"] else PlainLines()

    async def main() -> dict[str, Any]:
        with Interrupts().installed():
            try:
                return await plan(where, there, wanted, view.say)
            except asyncio.CancelledError:
                raise Cancelled("interrupted; the source is as it was") from None

    report = asyncio.run(main())
    print(json.dumps(report) if options["as_json"] else told(report), flush=True)


def _endpoint(text: str | None) -> Endpoint | None:
    return None if text is None else parse_endpoint(text)


def _wanted(options: dict[str, Any]) -> Wanted:
    if options["profile"] is not None:
        options = profiled(options | {"batch_pages": "256"})
    parameters = Parameters(
        workers=integer("workers", options["workers"]) or 0,
        codec=options["codec"], level=integer("level", options["level"]),
        batch_pages=integer("batch-pages", options.get("batch_pages", "256")) or 0,
        max_bandwidth=parse_rate(options["bandwidth"]),
        downtime_limit=parse_duration(options["downtime_limit"]),
        max_rounds=integer("max-rounds", options["max_rounds"]) or 0,
        keys=options["keys"], peer=options["peer"], insecure=options["insecure"],
    )  # fmt: skip
    sample, seconds = parse_size(options["sample"]), seconds_of(options["seconds"])
    return wanted_by(parameters, seconds, sample, options["bandwidth"])


# ---- what a person sees ------------------------------------------------------------------------


def told(report: dict[str, Any]) -> str:
    """A plan as a person reads it."""
    rows = [
        ("plan", _verdict(report)),
        ("settings", " ".join(report["settings"])),
        ("memory", _memory(report)),
        ("writes", _writes(report)),
        ("link", _link(report)),
        *((mode, _mode(found)) for mode, found in report["modes"].items()),
    ]
    lines = [f"{name:<15}{text}" for name, text in rows]
    return "\n".join([*lines, "", textwrap.fill(" ".join(report["why"]), _WIDTH)])


def _verdict(report: dict[str, Any]) -> str:
    if not report["modes"][report["mode"]]["converges"]:
        return "it would not converge"
    text = f"{report['mode']}, {format_seconds(report['total-time'] / 1000)}"
    if "downtime" in report:
        text += f", downtime {format_seconds(report['downtime'] / 1000)}"
    return f"{text}, {report['rounds']} round{'s' * (report['rounds'] != 1)}"


def _memory(report: dict[str, Any]) -> str:
    memory = report["memory"]
    text = f"{format_bytes(memory['data'])} of {format_bytes(memory['total'])} hold something, "
    text += f"{memory['zero-share']:.0%} of that zero pages"
    for found in report["content"].get("memory", ()):
        text += f"; {found['codec']} {found['ratio']:.2f}"
    return text


def _writes(report: dict[str, Any]) -> str:
    found = report["dirty-rate"]
    if found["mode"] == "none":
        return "nobody writes it"
    looks = [
        f"{format_bytes(look['pages'] * PAGE_SIZE)} in {format_seconds(look['time'] / 1000)}"
        for look in found["working-set"]
    ]
    return f"{', '.join(looks)} ({found['mode']})"


def _link(report: dict[str, Any]) -> str:
    fastest = max(row["memory"]["rate"] for row in report["speeds"])
    bandwidth = report["bandwidth"]
    link = format_rate(bandwidth) if bandwidth else "no limit"
    return f"{link}; trials moved {format_rate(fastest)} to {report['destination']}"


def _mode(found: dict[str, Any]) -> str:
    if not found["converges"]:
        return f"does not converge: {format_bytes(found['remaining'])} stay to be sent"
    text = f"{format_seconds(found['total-time'] / 1000)}, {found['rounds']} rounds"
    if "downtime" in found:
        text += f", downtime {format_seconds(found['downtime'] / 1000)}"
    if found.get("cpu-throttle-percentage"):
        text += (
            f", throttled to {found['cpu-throttle-percentage']} %, slower by "
            f"{found['guest-slow-down']:.0%}"
        )
    return f"{text}, {format_bytes(found['wire-bytes'])} on the wire"
