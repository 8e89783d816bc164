"""`python -m pageferry.tools.bench`: the command line of the benchmarks.

Finds the subcommand, sets up the lab it runs in and prints what it returns. Measures nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ...transport.errors import UsageError
from ...transport.quantities import parse_rate, parse_size
from . import (
    clones,
    converge,
    delta,
    demo,
    drain,
    eta,
    keys,
    kills,
    links,
    many,
    plan,
    postcopy,
    scaling,
    snapshots,
    sparse,
    startup,
    streams,
    throughput,
    trace,
    tune,
    verify,
    vm,
    web,
)
from .content import KINDS
from .lab import BenchError, Lab, isolate
from .pageferry import default_command

F = TypeVar("F", bound=Callable[..., Any])
Measure = Callable[[Lab], tuple[str, list[dict[str, Any]]]]


def _size(text: str) -> int:
    """A size as pageferry writes them: 512M, 2G."""
    try:
        return parse_size(text)
    except UsageError as e:
        raise click.BadParameter(str(e)) from e


def _rate(text: str) -> int:
    """A rate as pageferry writes them: 10Gbit, 500MB."""
    try:
        return parse_rate(text)
    except UsageError as e:
        raise click.BadParameter(str(e)) from e


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Words with commas between them, each one of `known`."""

    def words(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",")]
        for word in found:
            if word not in known:
                raise click.BadParameter(f"{word!r} is none of: {', '.join(known)}")
        return found

    return words


def _run(measure: Measure, json_file: str | None, command: str) -> None:
    """Make a lab, measure in it, print; clean up however it ends."""
    try:
        isolated = isolate()
        with Lab(shlex.split(command) or default_command(), isolated) as lab:
            table, rows = measure(lab)
            header = lab.describe()
    except (BenchError, OSError) as e:
        raise click.ClickException(str(e)) from e
    except KeyboardInterrupt:
        click.echo("interrupted: everything is cleaned up", err=True)
        sys.exit(130)
    click.echo("\n".join(f"{key}: {value}" for key, value in header.items()))
    click.echo()
    click.echo(table)
    if json_file is not None:
        with open(json_file, "w") as f:
            json.dump({"host": header, "rows": rows}, f, indent=1)
            f.write("\n")


def _size_option(default: str, what: str) -> Callable[[F], F]:
    return click.option(
        "--size", type=_size, default=default, show_default=True, metavar="SIZE", help=what
    )


def _common_options(reps: int) -> Callable[[F], F]:
    """What all benchmarks take."""

    def decorate(function: F) -> F:
        for option in (
            click.option("--pageferry", default="", metavar="COMMAND",
                         help="How to run pageferry. Default: this installation."),
            click.option("--json", "json_file", type=click.Path(dir_okay=False, writable=True),
                         help="Write all single measurements there."),
            click.option("--reps", type=click.IntRange(1), default=reps, show_default=True,
                         help="Rounds through everything that is compared."),
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


def _list_option(
    name: str, known: Sequence[str], default: Sequence[str], what: str
) -> Callable[[F], F]:
    return click.option(
        name, type=_words(known), default=",".join(default), show_default=True, metavar="LIST",
        help=what,
    )  # fmt: skip


def _accelerator_options(function: F) -> F:
    """How QEMU is run."""
    for option in (
        click.option("--cpu", default="qemu64", show_default=True, help="QEMU's CPU model."),
        click.option("--accel", default="kvm,tcg", show_default=True,
                     help="QEMU accelerators to try, in this order."),
    ):  # fmt: skip
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure pageferry, side by side with its peers.

    All traffic stays on this host. All files and network namespaces are called pageferry-bench-*
    and are removed at the end, as are all processes. throughput needs memory for 2.5 times --size.
    """


@cli.command("throughput")
@_size_option("2G", "Guest memory.")
@_list_option("--contents", KINDS, KINDS, "What the memory holds.")
@_list_option("--methods", throughput.METHOD_NAMES, throughput.METHOD_NAMES,
              "What takes turns.")  # fmt: skip
@_list_option("--destinations", throughput.DESTINATIONS, throughput.DESTINATIONS,
              "Memory that is new, or that has all its pages.")  # fmt: skip
@_accelerator_options
@_common_options(reps=3)
def throughput_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Memory from one process into another over TCP: pageferry, QEMU, pipes, rsync."""
    plan = throughput.Plan(**options)
    _run(lambda lab: throughput.measure(lab, plan), json_file, pageferry)


@cli.command("scaling")
@_size_option("2G", "Guest memory.")
@_list_option("--contents", KINDS, ("random", "text"), "What the memory holds.")
@_list_option("--workers", tuple(map(str, range(1, 65))), ("1", "2", "3", "4"), "How many.")
@_common_options(reps=3)
def scaling_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Time and processor time against the number of workers."""
    plan = scaling.Plan(**options)
    _run(lambda lab: scaling.measure(lab, plan), json_file, pageferry)


@cli.command("converge")
@_size_option("256M", "Of the guest.")
@click.option("--link", type=_rate, default="100MB", show_default=True, metavar="RATE")
@click.option("--times", type=click.FloatRange(0), default=4.0, show_default=True,
              help="The guest writes so many times what the link carries.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=300, show_default=True, metavar="MS",
              help="Downtime limit.")  # fmt: skip
@_common_options(reps=3)
def converge_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """A guest that writes faster than the link: auto-converge, dirty-limit, postcopy."""
    plan = converge.Plan(**options)
    _run(lambda lab: converge.measure(lab, plan), json_file, pageferry)


@cli.command("sparse")
@_size_option("64G", "Of the image.")
@click.option("--data", type=_size, default="100M", show_default=True, metavar="SIZE",
              help="How much of it is no hole.")  # fmt: skip
@click.option("--directory", type=click.Path(file_okay=False, exists=True),
              default=tempfile.gettempdir(), show_default=True,
              help="On a file system that can hold sparse files.")  # fmt: skip
@_common_options(reps=3)
def sparse_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Copy a large image that is mostly holes."""
    plan = sparse.Plan(**options)
    _run(lambda lab: sparse.measure(lab, plan), json_file, pageferry)


@cli.command("demo")
@_size_option("1G", "Guest memory.")
@_common_options(reps=2)
def demo_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Move the running demo guest: downtime against its limit, and giving up."""
    plan = demo.Plan(**options)
    _run(lambda lab: demo.measure(lab, plan), json_file, pageferry)


@cli.command("delta")
@_size_option("512M", "Guest memory.")
@click.option("--rate", type=_rate, default="1Gbit", show_default=True, metavar="RATE",
              help="Of the link.")  # fmt: skip
@click.option("--content", type=click.Choice(["text", "random", "zero"]), default="text",
              show_default=True, help="What the memory holds.")  # fmt: skip
@click.option("--cache", type=_size, default="512M", show_default=True, metavar="SIZE",
              help="xbzrle-cache-size.")  # fmt: skip
@_list_option("--codecs", delta.CODECS, delta.CODECS, "What takes turns.")
@_common_options(reps=3)
def delta_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Guests that change little, much and all of a page: xbzrle beside plain codecs."""
    plan = delta.Plan(**options)
    _run(lambda lab: delta.measure(lab, plan), json_file, pageferry)


@cli.command("eta")
@_size_option("2G", "Guest memory.")
@_common_options(reps=2)
def eta_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """What the ETA says on the way, against the time that it takes."""
    plan = eta.Plan(**options)
    _run(lambda lab: eta.measure(lab, plan), json_file, pageferry)


@cli.command("plan")
@_size_option("512M", "Guest memory.")
@_list_option("--parts", plan.PARTS, plan.PARTS, "What is measured.")
@_common_options(reps=3)
def plan_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """What `pageferry plan` says, against the migration that it recommends; dirty rates."""
    wanted = plan.Plan(**options)
    _run(lambda lab: plan.measure(lab, wanted), json_file, pageferry)


@cli.command("postcopy")
@_size_option("2G", "Guest memory.")
@click.option("--quick", is_flag=True, help="128M, one round, no QEMU: less than two minutes.")
@click.option("--breakdown", is_flag=True, help="Say where the time of a fault goes, too.")
@_list_option("--parts", postcopy.PARTS, postcopy.PARTS, "What is measured.")
@_list_option("--links", links.LINKS, links.LINKS, "Links; 1Gbit takes root.")
@_list_option("--threads", tuple(map(str, range(1, 65))), ("1", "16"),
              "Processors of the guest that fault at the same time.")  # fmt: skip
@_accelerator_options
@_common_options(reps=1)
def postcopy_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """How long a guest waits for its pages in postcopy: preempt on and off, QEMU."""
    plan = postcopy.Plan(**options)
    plan = postcopy.quick(plan) if plan.quick else plan
    _run(lambda lab: postcopy.measure(lab, plan), json_file, pageferry)


@cli.command("qemu")
@_size_option("1G", "Guest memory.")
@click.option("--quick", is_flag=True, help="256M, one round, less postcopy: less than a minute.")
@_list_option("--parts", vm.PARTS, vm.PARTS, "What is measured.")
@_list_option("--guests", vm.GUEST_NAMES, vm.GUEST_NAMES, "What the guest does.")
@_accelerator_options
@_common_options(reps=3)
def qemu_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """A running VM of an unmodified QEMU: pageferry against QEMU's own migration."""
    plan = vm.Plan(**options)
    plan = vm.quick(plan) if plan.quick else plan
    _run(lambda lab: vm.measure(lab, plan), json_file, pageferry)


@cli.command("trace")
@_size_option("1G", "Memory that is sent.")
@_list_option("--contents", KINDS, ("random",), "What the memory holds.")
@click.option("--before", default="", metavar="COMMAND",
              help="How to run another version, to be compared with off.")  # fmt: skip
@_common_options(reps=7)
def trace_command(json_file: str | None, pageferry: str, before: str, **options: Any) -> None:
    """What --trace costs, off and on: time, processor time, latency of faults."""
    plan = trace.Plan(before=shlex.split(before), **options)
    _run(lambda lab: trace.measure(lab, plan), json_file, pageferry)


@cli.command("verify")
@_size_option("1G", "Of the image.")
@_list_option("--contents", tuple(verify.CASES), ("random", "text", "sparse"), "What it holds.")
@click.option("--directory", type=click.Path(file_okay=False, exists=True),
              default="/dev/shm", show_default=True,
              help="Where the image is, and its copy. In memory it costs most.")  # fmt: skip
@_common_options(reps=7)
def verify_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """What verification costs: off, by default, and with all of it read back."""
    plan = verify.Plan(**options)
    _run(lambda lab: verify.measure(lab, plan), json_file, pageferry)


@cli.command("keys")
@_size_option("1G", "Memory that is sent.")
@_list_option("--contents", KINDS, ("random",), "What the memory holds.")
@click.option("--codec", default="none", show_default=True, help="What it is sent with.")
@click.option("--workers", default="2", show_default=True, help="Channels.")
@_common_options(reps=7)
def keys_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """What --keys costs, without and with: time, processor time, latency of faults."""
    _run(lambda lab: keys.measure(lab, keys.Plan(**options)), json_file, pageferry)


@cli.command("streams")
@_size_option("1G", "Memory that is sent.")
@click.option("--guest", type=_size, default="128M", show_default=True, metavar="SIZE",
              help="Of the one that "
              "waits for its pages.")  # fmt: skip
@_list_option("--contents", KINDS, ("random",), "What the memory holds.")
@click.option("--codec", default="none", show_default=True, help="What it is sent with.")
@click.option("--workers", default="2", show_default=True, help="Channels.")
@click.option("--through", default="", metavar="COMMAND", help="Also behind a command that runs "
              "another one: 'ssh -p 2222 localhost'.")  # fmt: skip
@_common_options(reps=5)
def streams_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """What a byte stream costs against TCP: time, processor time, latency of faults."""
    _run(lambda lab: streams.measure(lab, streams.Plan(**options)), json_file, pageferry)


@cli.command("startup")
@_common_options(reps=7)
def startup_command(json_file: str | None, pageferry: str, reps: int) -> None:
    """From the start of the command to the first page, and what an installation weighs."""
    _run(lambda lab: startup.measure(lab, reps), json_file, pageferry)


@cli.command("web")
@_size_option("1G", "Of the image, and of the guest.")
@_common_options(reps=3)
def web_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """What --web costs the migration that it shows, whoever looks."""
    plan = web.Plan(**options)
    _run(lambda lab: web.measure(lab, plan), json_file, pageferry)


@cli.command("tune")
@_size_option("1G", "Guest memory.")
@_list_option("--contents", KINDS, ("text", "random"), "What the memory holds.")
@click.option("--sample", type=_size, default="256M", show_default=True, metavar="SIZE",
              help="How much of it trials move.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True,
              help="How often the sweep tries each setting.")  # fmt: skip
@click.option("--workers", default="", metavar="LIST", help="As `pageferry tune` takes it.")
@click.option("--codecs", default="", metavar="LIST", help="The same.")
@click.option("--batches", default="", metavar="LIST", help="The same.")
@_common_options(reps=7)
def tune_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """`pageferry tune` against trying everything: time, and how fast what it names is."""
    plan = tune.Plan(**options)
    _run(lambda lab: tune.measure(lab, plan), json_file, pageferry)


@cli.command("clones")
@click.option("--images", type=click.IntRange(1), default=50, show_default=True)
@click.option("--families", type=click.IntRange(1), default=5, show_default=True)
@_size_option("128M", "Of each image.")
@click.option("--changed", type=click.IntRange(0), default=600, show_default=True,
              help="Pages of a clone that are its own.")  # fmt: skip
@click.option("--parallel", type=click.IntRange(1), default=4, show_default=True,
              help="Images of the batch at once.")  # fmt: skip
@click.option("--together", is_flag=True,
              help="Clones follow one another, instead of families taking turns.")  # fmt: skip
@click.option("--directory", type=click.Path(file_okay=False, exists=True),
              default=tempfile.gettempdir(), show_default=True,
              help="Where the images are, and their copies.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", help="The rows, as JSON.")
@click.option("--pageferry", "command", default="", metavar="CMD", help="Another installation.")
def clones_command(json_file: str | None, command: str, **options: Any) -> None:
    """Many images of few families: a batch, copies one by one, rsync."""
    plan = clones.Plan(**options)
    _run(lambda lab: clones.measure(lab, plan), json_file, command)


@cli.command("kills")
@click.option("--images", type=click.IntRange(1), default=50, show_default=True)
@_size_option("128M", "Of each image.")
@click.option("--clones", type=click.IntRange(0), default=9, show_default=True,
              help="Of each image that is none.")  # fmt: skip
@click.option("--changed", type=click.IntRange(0), default=600, show_default=True,
              help="Pages of a clone that are its own.")  # fmt: skip
@click.option("--kills", type=click.IntRange(0), default=20, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--parallel", type=click.IntRange(1), default=4, show_default=True, help="At once.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Of each. Default: pageferry's.")
@click.option("--codec", default="none", show_default=True)
@click.option("--rate", type=_rate, default="0", metavar="RATE", help="Limit of all together.")
@click.option("--directory", type=click.Path(file_okay=False, exists=True),
              default=tempfile.gettempdir(), show_default=True,
              help="Where the images are, and their copies.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", help="The rows, as JSON.")
@click.option("--pageferry", "command", default="", metavar="CMD", help="Another installation.")
def kills_command(json_file: str | None, command: str, **options: Any) -> None:
    """kill -9 of a batch at random moments, resumed each time: what arrives, what is sent twice."""
    plan = kills.Plan(**options)
    _run(lambda lab: kills.measure(lab, plan), json_file, command)


@cli.command("many")
@click.option("--images", type=click.IntRange(1), default=200, show_default=True)
@_size_option("1M", "Of each image.")
@click.option("--parallel", type=click.IntRange(1), default=4, show_default=True,
              help="At once.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0), default=0, help="Of each. Default: pageferry's.")
@click.option("--directory", type=click.Path(file_okay=False, exists=True),
              default="/dev/shm", show_default=True,
              help="Where the images are, and their copies.")  # fmt: skip
@_common_options(reps=3)
def many_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Many small images in a batch: what each costs beside its bytes."""
    plan = many.Plan(**options)
    _run(lambda lab: many.measure(lab, plan), json_file, pageferry)


@cli.command("snapshots")
@_size_option("2G", "Of the memory that is saved and restored.")
@click.option("--live-size", type=_size, default="1G", show_default=True, metavar="SIZE",
              help="Of the guest that writes.")  # fmt: skip
@click.option("--lazy-size", type=_size, default="2G", show_default=True, metavar="SIZE",
              help="Of the guest that is restored, at once and lazily.")  # fmt: skip
@click.option("--content", type=click.Choice(list(KINDS)), default="random", show_default=True)
@click.option("--rate", type=click.IntRange(0), default=20_000, show_default=True,
              help="Pages a second that the guest writes.")  # fmt: skip
@click.option("--directory", type=click.Path(file_okay=False, exists=True), show_default=True,
              default=tempfile.gettempdir(), help="Where the files are.")  # fmt: skip
@_accelerator_options
@_common_options(reps=3)
def snapshots_command(json_file: str | None, pageferry: str, **options: Any) -> None:
    """Memory into a file and back, beside cp and QEMU; a guest's pause, its first instruction."""
    plan = snapshots.Plan(**options)
    _run(lambda lab: snapshots.measure(lab, plan), json_file, pageferry)


@cli.command("drain")
@click.option("--guests", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--hosts", type=click.IntRange(2), default=500, show_default=True,
              help="Half of them are emptied into the other half.")  # fmt: skip
@click.option("--link", type=_rate, default="10Gbit", show_default=True, metavar="RATE",
              help="Of each host, each way.")  # fmt: skip
@click.option("--backbone", type=_rate, default="0", metavar="RATE",
              help="Of all guests together. Default: no limit.")  # fmt: skip
@click.option("--parallel", type=click.IntRange(1), default=500, show_default=True,
              help="Guests at once.")  # fmt: skip
@click.option("--per-host", type=click.IntRange(1), default=2, show_default=True,
              help="Guests at once from a host, and to one.")  # fmt: skip
@click.option("--failing", type=click.FloatRange(0, 0.5), default=0.01, show_default=True,
              help="The share of attempts that fail.")  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True)
def drain_command(**options: Any) -> None:
    """Plan a drain of many guests over many hosts, with a simulated clock: nothing is moved."""
    plan = drain.Plan(**options)
    click.echo(drain.table(drain.simulate(plan), plan))


if __name__ == "__main__":
    cli(prog_name="python -m pageferry.tools.bench")
