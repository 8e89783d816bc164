"""`pageferry status | set | cancel | yank | start-postcopy | pause | recover MONITOR`: talks QMP
to a running migration."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click
from qemu.qmp import ConnectError as QmpConnectError
from qemu.qmp import ExecuteError, QMPClient, QMPError

from ...pipeline.monitor import monitor_path
from ...transport.errors import ConnectError, PeerLost, UsageError
from .view import phase_line, phase_of, summary


async def _ask(where: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
    client = QMPClient("pageferry")
    client.logger.disabled = True
    try:
        await client.connect(monitor_path(where))
    except QmpConnectError as e:
        raise ConnectError(
            f"no migration answers at {where}: it ended, or was started without --monitor"
        ) from e
    try:
        return await client.execute(command, arguments)
    except ExecuteError as e:
        raise UsageError(str(e)) from e
    except QMPError as e:
        raise PeerLost(f"the migration at {where} ended meanwhile") from e
    finally:
        await client.disconnect()


@click.command("status")
@click.argument("monitor")
@click.option("--json", "as_json", is_flag=True, help="query-migrate as it is.")
def status_command(monitor: str, as_json: bool) -> None:
    """Show the migration at MONITOR (unix:PATH)."""
    report = asyncio.run(_ask(monitor, "query-migrate"))
    if as_json:
        print(json.dumps(report))
    elif "ram" not in report:
        print(report["status"])
    elif report["status"] in ("completed", "failed", "cancelled"):
        print(summary(report))
    else:
        print(f"{phase_of(report)}: {phase_line(report)}")


@click.command("cancel")
@click.argument("monitor")
def cancel_command(monitor: str) -> None:
    """Cancel the migration at MONITOR; its source goes on as if nothing had been."""
    asyncio.run(_ask(monitor, "migrate_cancel"))


@click.command("set")
@click.argument("monitor")
@click.argument("parameters", nargs=-1, required=True, metavar="NAME=VALUE...")
def set_command(monitor: str, parameters: tuple[str, ...]) -> None:
    """Change max-bandwidth, downtime-limit, max-rounds, auto-converge, dirty-limit and what belongs
    to these of the migration at MONITOR.

    \b
    pageferry set unix:/run/mig.sock max-bandwidth=2Gbit downtime-limit=500ms
    pageferry set unix:/run/mig.sock auto-converge=on cpu-throttle-initial=40
    """
    arguments = {}
    for parameter in parameters:
        name, mark, value = parameter.partition("=")
        if not mark:
            raise UsageError(f"{parameter!r} sets nothing: write NAME=VALUE")
        arguments[name] = value
    asyncio.run(_ask(monitor, "migrate-set-parameters", arguments))


@click.command("start-postcopy")
@click.argument("monitor")
def start_postcopy_command(monitor: str) -> None:
    """Start the guest at its destination now; its memory follows.

    The migration at MONITOR must have been started with --postcopy.
    """
    asyncio.run(_ask(monitor, "migrate-start-postcopy"))


@click.command("pause")
@click.argument("monitor")
def pause_command(monitor: str) -> None:
    """Drop the connection of the postcopy at MONITOR; `recover` takes it up again."""
    asyncio.run(_ask(monitor, "migrate-pause"))


@click.command("yank")
@click.argument("monitor")
def yank_command(monitor: str) -> None:
    """Cut the migration at MONITOR that hangs: within 2 s it has failed, whatever it waits for.

    Its source goes on, unless the guest was told to run at the destination; a postcopy pauses.
    """
    asyncio.run(_ask(monitor, "yank", {"instances": [{"type": "migration"}]}))


@click.command("recover")
@click.argument("monitor")
@click.argument("endpoint", required=False)
def recover_command(monitor: str, endpoint: str | None) -> None:
    """Connect the paused postcopy at MONITOR (the source's) again.

    ENDPOINT: where the destination is to be reached now, if not where it was.
    """
    asyncio.run(_ask(monitor, "migrate-recover", {"uri": endpoint} if endpoint else None))
