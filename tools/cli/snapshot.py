"""`pageferry snapshot SOURCE file:PATH`: a guest as it is at one instant, in a file."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from ...pipeline import api
from ...pipeline.parameters import Parameters
from ...transport.errors import UsageError
from ...transport.quantities import format_bytes, format_rate, format_seconds
from ...workers.guests import parse_guest
from .options import check_files, integer, output_options, page_options, user_option
from .reporting import recorded
from .running import Interrupts, as_user, run
from .view import View


@click.command("snapshot")
@click.argument("source")
@click.argument("into", metavar="file:PATH")
@click.option("--live", is_flag=True, help="The guest goes on while its memory is saved: each page "
              "before its first write.")  # fmt: skip
@click.option("--workers", metavar="N", help="Processes that save. Default: one a CPU.")
@user_option
@page_options
@output_options
def snapshot_command(source: str, into: str, live: bool, **options: Any) -> None:
    """Save the guest SOURCE, as it is at one instant, to a file, and let it go on.

    Without --live it stands still meanwhile. `pageferry restore file:PATH --into GUEST` is the way
    back.

    \b
    pageferry snapshot qemu:/run/vm1/pageferry.qmp file:vm1.snap --live
    """
    where, there = parse_guest(source), parse_guest(into)
    if there.kind != "file":
        raise UsageError(f"{into} is no file for a snapshot: write file:PATH")
    check_files(options)
    parameters = Parameters(workers=integer("workers", options["workers"]) or 0).checked()
    on_attached = as_user(options["user"], where)

    async def start(view: View, interrupts: Interrupts) -> dict[str, Any] | None:
        report: dict[str, Any] | None = None
        try:
            async with recorded(
                options, "snapshot", source, into, parameters, view, interrupts.attach, where, there
            ) as recording:
                report = recording.report = await api.snapshot(
                    where, there, workers=parameters.workers, live=live,
                    on_progress=recording.on_progress, on_started=recording.on_started,
                    monitor=options["monitor"], on_attached=on_attached,
                )  # fmt: skip
        except asyncio.CancelledError:
            if report is None:
                raise  # else it came too late: the file is there
        assert report is not None
        if options["as_json"] or options["quiet"]:
            return report
        print(told(report), flush=True)
        return None

    run(
        start, as_json=options["as_json"], quiet=options["quiet"],
        interrupted="interrupted; the guest goes on, nothing was written", trace=options["trace"],
        memory=(where, there),
    )  # fmt: skip


def told(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    ram, seconds = report["ram"], report["total-time"] / 1000
    rate = format_rate(ram["total"] / max(seconds, 1e-3))
    rows = [
        ("result", f"{report['status']}: {report['file']}, {format_bytes(report['file-bytes'])}"),
        ("memory", f"{format_bytes(ram['total'])}, {ram['normal']} pages, {ram['duplicate']} zero"),
        ("time", f"{format_seconds(seconds)}, {rate}"),
    ]
    if "downtime" in report:
        rows.append(("pause", format_seconds(report["downtime"] / 1000)))
    if "writes-held-back" in report:
        rows.append((
            "held back", f"{report['writes-held-back']} writes, "
            f"for {report['held-back-us']} us on average",
        ))  # fmt: skip
    return "\n".join(f"{name:<15}{text}" for name, text in rows)
