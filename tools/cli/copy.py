"""`pageferry copy SOURCE DESTINATION`: both ends on this host."""

from __future__ import annotations

from typing import Any

import click

from ...pipeline import api
from ...transport.errors import VerificationFailed
from ...workers.guests import parse_guest
from .options import migration_options, parameters
from .reporting import recorded
from .running import Interrupts, run
from .view import View


@click.command("copy")
@click.argument("source")
@click.argument("destination")
@migration_options
def copy_command(source: str, destination: str, **options: Any) -> None:
    """Move the guest SOURCE to DESTINATION, both on this host.

    \b
    pageferry copy image:vm.mem image:/backup/vm.mem --codec zstd --verify
    pageferry copy 'demo:?size=512M&content=text' demo:
    """
    checked = parameters(options)
    where, into = parse_guest(source), parse_guest(destination)

    async def start(view: View, interrupts: Interrupts) -> dict[str, Any]:
        async with recorded(
            options, "copy", source, destination, checked, view, interrupts.attach,
            where, into,
        ) as recording:  # fmt: skip
            recording.report = await api.copy(
                where, into, checked, on_progress=recording.on_progress,
                on_started=recording.on_started, monitor=options["monitor"],
            )  # fmt: skip
            return checked_oracle(recording.report)

    run(
        start, as_json=options["as_json"], quiet=options["quiet"], trace=options["trace"],
        memory=(where, into),
    )  # fmt: skip


def checked_oracle(report: dict[str, Any]) -> dict[str, Any]:
    """The report, unless the demo guest's oracle found a wrong byte."""
    oracle = report.get("oracle")
    if oracle is not None and not oracle["ok"]:
        raise VerificationFailed(
            f"the oracle found {oracle['wrong-pages']} wrong pages of {oracle['pages']}",
            report=report,
        )
    return report
