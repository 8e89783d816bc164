"""`pageferry fleet-worker NAME SCHEDULER`: a dask worker with what batches need of it."""

from __future__ import annotations

import os
import sys

import click

from ...pipeline.fleet import check_dask
from ...pipeline.fleet_attempt import resource
from ...pipeline.manifest import MAX_PARALLEL, check_host


@click.command(
    "fleet-worker", context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS]"
)
@click.argument("name")
@click.argument("scheduler")
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[DASK OPTION]...")
def fleet_worker_command(name: str, scheduler: str, more: tuple[str, ...]) -> None:
    """Let batches move what is on this host, which manifests call NAME (`host = "NAME"`). SCHEDULER
    is a dask scheduler's address: tcp://192.0.2.1:8786. What follows is for `dask worker`.

    \b
    It becomes
    dask worker SCHEDULER --resources pageferry-NAME=1000 --nthreads 256 \\
        --no-nanny --no-dashboard --memory-limit 0
    """
    check_host(name)
    check_dask()
    command = [
        sys.executable, "-m", "dask", "worker", scheduler,
        "--resources", f"{resource(name)}=1000", "--nthreads", str(MAX_PARALLEL),
        "--no-nanny", "--no-dashboard", "--memory-limit", "0", *more,
    ]  # fmt: skip
    os.execv(sys.executable, command)
