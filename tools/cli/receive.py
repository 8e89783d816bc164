"""`pageferry receive`: the destination's end of migrations."""

from __future__ import annotations

import functools
import json
from typing import Any

import click

from ...pipeline import api
from ...pipeline.destination import Destination
from ...pipeline.hooks import BeforeSwitchover, command
from ...pipeline.reception import Reception
from ...transport.errors import PageferryError, UsageError
from ...transport.links import Endpoint
from ...transport.quantities import format_bytes, format_seconds
from ...workers.guests import GuestUri, check_destination, is_directory, parse_guest
from .copy import checked_oracle
from .log_lines import escaped
from .main import error_object
from .options import integer, listening_options, output_options, page_options, user_option
from .reporting import received
from .running import Interrupts, as_user, run, show
from .service import ready, where_to_receive
from .view import View


@click.command("receive")
@click.argument("stream", required=False)
@click.option("--listen", metavar="ENDPOINT", help="tcp://HOST:PORT (port 0: any), "
              "ipc://PATH, systemd. Channels listen beside it, on ports of their own.")  # fmt: skip
@click.option("--into", metavar="DESTINATION", help="Where guests go. Default: a demo: guest as "
              "such, memory into a new segment in /dev/shm.")  # fmt: skip
@click.option("--qemu-command", metavar="COMMAND", help="Start a QEMU for a VM that arrives, with "
              "memory as the source has it (refer to it by its name: memory-backend=ram0), "
              "instead of --into.")  # fmt: skip
@click.option("--at-once", metavar="N", default="4", show_default=True, help="How many images may "
              "arrive at a time, with --into image:DIR/.")  # fmt: skip
@click.option("--no-validate-uuid", is_flag=True, help="Take a VM into a QEMU that was started "
              "with another -uuid.")  # fmt: skip
@click.option("--before-switchover", metavar="COMMAND", help="Run it for each guest that arrives; "
              "the source does not stop its guest before it has succeeded.")  # fmt: skip
@click.option("--once", is_flag=True, help="End after one migration, with its exit code.")
@listening_options
@user_option
@page_options
@output_options
def receive_command(
    stream: str | None,
    listen: str | None,
    into: str | None,
    qemu_command: str | None,
    at_once: str,
    no_validate_uuid: bool,
    before_switchover: str | None,
    once: bool,
    **options: Any,
) -> None:
    """Wait for `pageferry send` and receive what it sends; or over STREAM (fd:N, -, exec:COMMAND),
    from the one that is at its other end.

    \b
    pageferry receive --listen tcp://192.0.2.7:4444 --into image:/var/lib/vm.mem --once
    pageferry send image:vm.mem 'exec:ssh HOST pageferry receive --into image:vm.mem -'
    """
    endpoint, over = where_to_receive(listen, stream)
    once = once or over is not None
    if options["keys"] and options["insecure"]:
        raise UsageError("--keys and --insecure: leave one of them out")
    if into is not None and qemu_command is not None:
        raise UsageError("--into and --qemu-command: leave one of them out")
    guest = None if into is None else parse_guest(into)
    if guest is not None:
        check_destination(guest)
    expected = "demo" if guest is not None and guest.kind == "demo" else None
    as_json, quiet = options["as_json"], options["quiet"]
    hook = None if before_switchover is None else command(before_switchover)
    as_user(options["user"])
    if guest is not None and is_directory(guest) and not once:
        _receive_many(endpoint, guest, integer("at-once", at_once) or 0, hook, options)
        return

    async def start(view: View, interrupts: Interrupts) -> None:
        destination = Destination(
            endpoint, api.opener(guest, qemu_command, validate_uuid=not no_validate_uuid),
            expected, view, keys=options["keys"], insecure=options["insecure"],
        )  # fmt: skip
        destination.before_switchover = hook
        try:
            if once:
                interrupts.attach(_OneArrival(destination, interrupts))
            async with received(options, destination, guest, view):
                told = functools.partial(_tell, view=view)
                if over is None:
                    _say_listening(destination, view, as_json)
                else:
                    ready()
                    await api.receive_stream(over, destination, told, monitor=options["monitor"])
                    return
                await api.receive(destination, told, once=once, monitor=options["monitor"])
        finally:
            destination.close()

    def _tell(report: dict[str, Any] | None, error: PageferryError | None, view: View) -> None:
        if report is not None:
            show(report, as_json=as_json, quiet=quiet)
            if once:
                checked_oracle(report)
        elif error is not None and not once:
            if as_json:
                print(json.dumps(error_object(error), default=str), flush=True)
            view.say(escaped(f"failed: {error.message}"))

    run(
        start, as_json=as_json, quiet=quiet, interrupted="no longer listening",
        trace=options["trace"], memory=(guest,),
    )  # fmt: skip


def _receive_many(
    endpoint: Endpoint,
    into: GuestUri,
    at_once: int,
    hook: BeforeSwitchover | None,
    options: dict[str, Any],
) -> None:
    """Into a directory: a line for each image that ended."""
    if at_once < 1:
        raise UsageError("--at-once must be at least 1")
    as_json, quiet = options["as_json"], options["quiet"]

    async def start(view: View, interrupts: Interrupts) -> None:
        def ended(report: dict[str, Any] | None, error: PageferryError | None, name: str) -> None:
            if as_json:
                told = {"name": name} | (error_object(error) if error else report or {})
                print(json.dumps(told, default=str), flush=True)
            if error is not None:
                view.say(escaped(f"{name}: failed: {error.message}"))
            elif report is not None:
                size = format_bytes(report["ram"]["total"])
                took = format_seconds(report["total-time"] / 1000)
                view.say(f"{escaped(name)}: {size} in {took}")

        destination = Reception(
            endpoint, api.opener(into), ended, at_once=at_once, keys=options["keys"],
            insecure=options["insecure"],
        )  # fmt: skip
        destination.before_switchover = hook
        try:
            async with received(options, destination, into, view, many=True):
                _say_listening(destination, view, as_json)
                await api.receive_many(destination, monitor=options["monitor"])
        finally:
            destination.close()

    run(
        start, as_json=as_json, quiet=quiet, interrupted="no longer listening",
        trace=options["trace"],
    )  # fmt: skip


class _OneArrival:
    """Ctrl-C in `receive --once`: cancels the migration (a trial run is none), or ends it all."""

    def __init__(self, destination: Destination, interrupts: Interrupts) -> None:
        self._destination = destination
        self._interrupts = interrupts

    def cancel(self) -> None:
        arrival = self._destination.arrival
        if arrival is not None and not arrival.trial:
            self._destination.cancel()
        else:
            self._interrupts()


def _say_listening(destination: Destination, view: View, as_json: bool) -> None:
    if as_json:
        line = {"event": "listening", "endpoint": str(destination.endpoint)}
        print(json.dumps(line), flush=True)
    view.say(f"listening at {destination.endpoint}")
    ready()
