"""`pageferry restore SOURCE --uffd-socket PATH`: the page-fault handler of a microVM's restore."""

from __future__ import annotations

from typing import Any

import click

from ...pipeline import api
from ...pipeline.parameters import Parameters
from ...transport.links import Endpoint, parse_endpoint
from ...workers.guests import GuestUri, parse_guest
from .options import key_options, output_options, page_options, user_option
from .reporting import recorded
from .running import Interrupts, as_user, run
from .view import View


@click.command("restore")
@click.argument("source")
@click.option("--uffd-socket", required=True, metavar="PATH", help="Where the monitor connects and "
              "hands over its userfaultfd, as Firecracker does (backend_type Uffd).")  # fmt: skip
@key_options
@user_option
@page_options
@output_options
def restore_command(source: str, uffd_socket: str, **options: Any) -> None:
    """Serve the page faults of a restored guest from SOURCE, until all of its memory is there.

    SOURCE is the address of a `pageferry serve`, or image:PATH on this host.

    \b
    pageferry restore tcp://192.0.2.7:4445 --uffd-socket /run/vm1/uffd.sock
    """
    where: GuestUri | Endpoint
    if source.startswith(("tcp://", "ipc://")):
        where = parse_endpoint(source)
    else:
        where = parse_guest(source)
    parameters = Parameters(
        postcopy="now", keys=options["keys"], peer=options["peer"], insecure=options["insecure"]
    ).checked()
    as_user(options["user"])

    async def start(view: View, interrupts: Interrupts) -> dict[str, Any]:
        async with recorded(
            options, "restore", source, f"the guest at {uffd_socket}", parameters, view,
            interrupts.attach, *([where] if isinstance(where, GuestUri) else []),
        ) as recording:  # fmt: skip
            recording.report = await api.restore(
                where, uffd_socket, parameters, on_progress=recording.on_progress,
                on_started=recording.on_started, monitor=options["monitor"],
            )  # fmt: skip
            return recording.report

    run(
        start, as_json=options["as_json"], quiet=options["quiet"],
        interrupted="no longer serving faults: a guest that has not got all of its memory sleeps",
        trace=options["trace"], memory=(where,) if isinstance(where, GuestUri) else (),
    )  # fmt: skip
