"""`pageferry inspect FILE`: what is in a saved migration."""

from __future__ import annotations

import json
import sys

import click

from ...pipeline.inspecting import inspect_saved


@click.command("inspect")
@click.argument("file")
@click.option("--full", is_flag=True, help="Show long values, too: all bytes and elements.")
def inspect_command(file: str, full: bool) -> None:
    """Show what is in FILE as JSON: sections, memory blocks and how many pages they have.

    FILE is a memory image (raw, an ELF core), a directory of them, a device state, or a migration
    stream that QEMU has saved (migrate exec:cat>FILE); - is standard input.

    \b
    pageferry inspect vm.mem
    ssh host cat vm.state | pageferry inspect -
    """
    print(json.dumps(inspect_saved(file, sys.stdin.buffer, full=full), indent=2))
