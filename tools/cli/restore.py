"""`pageferry restore SOURCE`: `--uffd-socket PATH`, the page-fault handler of a microVM's restore;
`--into GUEST`, a guest that was saved goes on here.
"""

from __future__ import annotations

from typing import Any

import click

from ...pipeline import api
from ...pipeline.parameters import NEVER, NOW, Parameters
from ...transport.errors import UsageError
from ...transport.links import Endpoint, parse_endpoint
from ...workers.guests import GuestUri, parse_guest
from .copy import checked_oracle
from .options import (
    check_files,
    integer,
    key_options,
    output_options,
    page_options,
    user_option,
)
from .reporting import recorded
from .running import Interrupts, as_user, run
from .view import View


@click.command("restore")
@click.argument("source")
@click.option("--into", metavar="GUEST", help="What the guest of the snapshot SOURCE (file:PATH) "
              "is to be here: qemu:QMP_SOCKET, ram:PATH, image:PATH, demo:")  # fmt: skip
@click.option("--lazy", is_flag=True, help="With --into: it runs at once, its memory comes behind, "
              "what it touches first.")  # fmt: skip
@click.option("--workers", metavar="N", help="With --into: processes that read, and that write. "
              "Default: one a CPU.")  # fmt: skip
@click.option("--uffd-socket", metavar="PATH", help="Where the monitor connects and "
              "hands over its userfaultfd, as Firecracker does (backend_type Uffd).")  # fmt: skip
@key_options
@user_option
@page_options
@output_options
def restore_command(
    source: str, uffd_socket: str | None, into: str | None, lazy: bool, **options: Any
) -> None:
    """Serve the page faults of a restored guest from SOURCE, until all of its memory is there; or
    let a guest that `pageferry snapshot` saved go on here.

    SOURCE is the address of a `pageferry serve`, or file:PATH or image:PATH on this host.

    \b
    pageferry restore tcp://192.0.2.7:4445 --uffd-socket /run/vm1/uffd.sock
    pageferry restore file:vm.snap --into qemu:/run/vm1/incoming.qmp --lazy
    """
    if (uffd_socket is None) == (into is None):
        raise UsageError("say where to restore: --uffd-socket PATH or --into GUEST, one of them")
    check_files(options)
    if into is not None:
        _into(source, into, lazy, options)
        return
    assert uffd_socket is not None
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


def _into(source: str, into: str, lazy: bool, options: dict[str, Any]) -> None:
    """`--into`: both ends are here."""
    where, there = parse_guest(source), parse_guest(into)
    parameters = Parameters(
        workers=integer("workers", options["workers"]) or 0,
        codec="none",  # it goes no further than this host
        postcopy=NOW if lazy else NEVER,
    ).checked()
    as_user(options["user"])

    async def start(view: View, interrupts: Interrupts) -> dict[str, Any]:
        async with recorded(
            options, "restore", source, into, parameters, view, interrupts.attach, where, there
        ) as recording:
            recording.report = await api.restore_into(
                where, there, parameters, on_progress=recording.on_progress,
                on_started=recording.on_started, monitor=options["monitor"],
            )  # fmt: skip
            return checked_oracle(recording.report)

    run(
        start, as_json=options["as_json"], quiet=options["quiet"],
        interrupted="interrupted; nothing is left of the guest here, the snapshot is as it was",
        trace=options["trace"], memory=(where, there),
    )  # fmt: skip
