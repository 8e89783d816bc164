"""`pageferry send SOURCE ENDPOINT`: the source's end of a migration."""

from __future__ import annotations

from typing import Any

import click

from ...pipeline import api
from ...transport.carrier import claim
from ...transport.stream_addresses import Stream
from ...workers.guests import parse_guest
from .options import key_options, migration_options, parameters, user_option
from .reporting import recorded
from .running import Interrupts, as_user, run
from .view import View


@click.command("send")
@click.argument("source")
@click.argument("endpoint")
@click.option("--name", default="", help="What it is to be called in a receiver's directory.")
@key_options
@user_option
@migration_options
def send_command(source: str, endpoint: str, name: str, **options: Any) -> None:
    """Move the guest SOURCE to the `pageferry receive` at ENDPOINT: tcp://HOST:PORT, ipc://PATH, or
    a byte stream (exec:COMMAND, fd:N, -).

    \b
    pageferry send ram:/dev/shm/vm?pid=4711 tcp://192.0.2.7:4444 --downtime-limit 100ms
    pageferry send image:vm.mem 'exec:ssh HOST pageferry receive --into image:vm.mem -'
    """
    checked = parameters(options)
    where, there = parse_guest(source), api.parse_target(endpoint)
    if isinstance(there, Stream):
        there = claim(there)
    on_attached = as_user(options["user"], where)

    async def start(view: View, interrupts: Interrupts) -> dict[str, Any]:
        async with recorded(
            options, "send", source, endpoint, checked, view, interrupts.attach,
            where,
        ) as recording:  # fmt: skip
            recording.report = await api.send(
                where, there, checked, on_progress=recording.on_progress,
                on_started=recording.on_started, monitor=options["monitor"], name=name,
                on_attached=on_attached,
            )  # fmt: skip
            return recording.report

    run(
        start, as_json=options["as_json"], quiet=options["quiet"], trace=options["trace"],
        memory=(where,),
    )  # fmt: skip
