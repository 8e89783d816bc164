"""`pageferry serve image:PATH --listen ENDPOINT`: a snapshot, pulled by those who restore it."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import click

from ...pipeline import api
from ...pipeline.parameters import Parameters
from ...transport.errors import PageferryError
from ...transport.quantities import format_bytes, format_seconds, parse_rate
from ...workers.guests import parse_guest
from .main import error_object
from .options import integer, listening_options, trace_option, user_option
from .running import Interrupts, as_user, run
from .service import ready, where_to_listen
from .view import View


@click.command("serve")
@click.argument("source")
@click.option("--listen", required=True, metavar="ENDPOINT", help="tcp://HOST:PORT (port 0: any), "
              "ipc://PATH, systemd. Channels listen beside it, on ports of their own.")  # fmt: skip
@click.option("--workers", metavar="N", help="Channels for each destination. Default: one a CPU.")
@click.option("--codec", metavar="NAME", default="auto", show_default=True)
@click.option("--level", metavar="N", help="The codec's level.")
@click.option("--max-postcopy-bandwidth", metavar="RATE", default="0",
              help="For the background of each destination. Default: no limit.")  # fmt: skip
@listening_options
@user_option
@trace_option
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line on stdout.")
@click.option("--quiet", is_flag=True, help="Say nothing.")
def serve_command(source: str, listen: str, **options: Any) -> None:
    """Serve the memory image SOURCE to every `pageferry restore` that asks for it.

    \b
    pageferry serve image:vm.mem --listen tcp://192.0.2.7:4445
    """
    endpoint, guest = where_to_listen(listen), parse_guest(source)
    parameters = Parameters(
        workers=integer("workers", options["workers"]) or 0,
        codec=options["codec"],
        level=integer("level", options["level"]),
        max_postcopy_bandwidth=parse_rate(options["max_postcopy_bandwidth"]),
        postcopy="now",
        keys=options["keys"],
        insecure=options["insecure"],
    ).checked()
    as_json, quiet = options["as_json"], options["quiet"]
    as_user(options["user"])

    async def start(view: View, interrupts: Interrupts) -> None:
        def ended(name: str, report: dict[str, Any] | None, error: PageferryError | None) -> None:
            if as_json:
                line = report if report is not None else error_object(error or PageferryError())
                print(json.dumps({"destination": name} | line, default=str), flush=True)
            view.say(f"destination {name}: {_told(report, error)}")

        async with AsyncExitStack() as stack:
            server = await api.open_server(stack, guest, endpoint, parameters, ended)
            if as_json:
                line = {"event": "listening", "endpoint": str(server.endpoint)}
                print(json.dumps(line), flush=True)
            view.say(f"serving {guest} at {server.endpoint}")
            ready()
            await server.run()

    run(
        start, as_json=as_json, quiet=quiet, interrupted="no longer serving",
        trace=options["trace"], memory=(guest,),
    )  # fmt: skip


def _told(report: dict[str, Any] | None, error: PageferryError | None) -> str:
    if report is None:
        return error.message if error is not None else "ended"
    return (
        f"restored, {format_bytes(report['wire-bytes'])} in "
        f"{format_seconds(report['total-time'] / 1000)}, {report['postcopy-requests']} requests"
    )
