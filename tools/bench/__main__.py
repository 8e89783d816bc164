"""`python -m pageferry.tools.bench`: the command line of the benchmarks.

Finds the subcommand, sets up the lab it runs in and prints what it returns. Measures nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import click

from ...transport.errors import UsageError
from ...transport.quantities import parse_size
from . import demo, scaling, sparse, startup, throughput
from .content import KINDS
from .lab import BenchError, Lab, isolate
from .pageferry import default_command

Measure = Callable[[Lab], tuple[str, list[dict[str, Any]]]]


class _Size(click.ParamType[int]):
    """A size as pageferry writes them: 512M, 2G."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


class _Words(click.ParamType[list[str]]):
    """Words with commas between them, each out of a set."""

    name = "list"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        words = value if isinstance(value, list) else value.split(",")
        for word in words:
            if word not in self._known:
                self.fail(f"{word!r} is none of {', '.join(self._known)}", param, ctx)
        return words


def _run(measure: Measure, context: click.Context) -> None:
    """Make a lab, measure in it, print; clean up however it ends."""
    options = context.find_root().params
    isolated = isolate()
    try:
        with Lab(shlex.split(options["pageferry"]) or default_command(), isolated) as lab:
            table, rows = measure(lab)
            header = lab.describe()
    except BenchError as e:
        raise click.ClickException(str(e)) from e
    except KeyboardInterrupt:
        click.echo("interrupted: everything is cleaned up", err=True)
        sys.exit(130)
    click.echo("\n".join(f"{key}: {value}" for key, value in header.items()))
    click.echo()
    click.echo(table)
    if options["json_file"] is not None:
        with open(options["json_file"], "w") as f:
            json.dump({"host": header, "rows": rows}, f, indent=1, default=str)
            f.write("\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_file", type=click.Path(dir_okay=False, writable=True),
              help="Write all single measurements there.")  # fmt: skip
@click.option("--pageferry", default="", metavar="COMMAND",
              help="How to run pageferry. Default: this installation.")  # fmt: skip
def cli(json_file: str | None, pageferry: str) -> None:
    """Measure pageferry, side by side with its peers.

    Needs memory for three times --size. All traffic stays on the loopback interface; all files
    are called pageferry-bench-* and are removed at the end. Options of this level come first:
    `python -m pageferry.tools.bench --json raw.json throughput --size 2G`.
    """


size_option = click.option("--size", type=_Size(), default="2G", show_default=True,
                           help="Guest memory.")  # fmt: skip
reps_option = click.option("--reps", type=click.IntRange(1), default=3, show_default=True,
                           help="Rounds through all methods.")  # fmt: skip


@cli.command("throughput")
@size_option
@reps_option
@click.option("--contents", type=_Words(KINDS), default=",".join(KINDS), show_default=True)
@click.option("--methods", type=_Words(throughput.METHOD_NAMES),
              default=",".join(throughput.METHOD_NAMES), show_default=True)  # fmt: skip
@click.option("--destinations", type=_Words(throughput.DESTINATIONS),
              default=",".join(throughput.DESTINATIONS), show_default=True)  # fmt: skip
@click.option("--accel", default="kvm,tcg", show_default=True,
              help="QEMU accelerators to try, in this order.")  # fmt: skip
@click.option("--cpu", default="qemu64", show_default=True, help="QEMU CPU model.")
@click.pass_context
def throughput_command(context: click.Context, **options: Any) -> None:
    """Memory from one process into another over TCP: pageferry, QEMU, pipes, rsync."""
    plan = throughput.Plan(**options)
    _run(lambda lab: throughput.measure(lab, plan), context)


@cli.command("scaling")
@size_option
@reps_option
@click.option("--contents", type=_Words(KINDS), default="random,text", show_default=True)
@click.option("--workers", type=_Words(tuple(map(str, range(1, 65)))), default="1,2,3,4",
              show_default=True)  # fmt: skip
@click.pass_context
def scaling_command(context: click.Context, **options: Any) -> None:
    """Time and processor time against the number of workers."""
    plan = scaling.Plan(**options)
    _run(lambda lab: scaling.measure(lab, plan), context)


@cli.command("sparse")
@click.option("--size", type=_Size(), default="64G", show_default=True, help="Of the image.")
@click.option("--data", type=_Size(), default="100M", show_default=True, help="Of it, not holes.")
@reps_option
@click.option("--directory", type=click.Path(file_okay=False, exists=True),
              default=tempfile.gettempdir(), show_default=True,
              help="On a file system that can hold sparse files.")  # fmt: skip
@click.pass_context
def sparse_command(context: click.Context, **options: Any) -> None:
    """Copy a large image that is mostly holes."""
    plan = sparse.Plan(**options)
    _run(lambda lab: sparse.measure(lab, plan), context)


@cli.command("demo")
@click.option("--size", type=_Size(), default="1G", show_default=True, help="Guest memory.")
@click.option("--reps", type=click.IntRange(1), default=2, show_default=True)
@click.pass_context
def demo_command(context: click.Context, **options: Any) -> None:
    """Move the running demo guest: downtime against its limit, and giving up."""
    plan = demo.Plan(**options)
    _run(lambda lab: demo.measure(lab, plan), context)


@cli.command("startup")
@click.option("--reps", type=click.IntRange(1), default=7, show_default=True)
@click.pass_context
def startup_command(context: click.Context, reps: int) -> None:
    """From the start of the command to the first page, and what an installation weighs."""
    _run(lambda lab: startup.measure(lab, reps), context)


if __name__ == "__main__":
    cli(prog_name="python -m pageferry.tools.bench")
