"""Options that several commands share, and how they become Parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ...pipeline.goals import GOALS
from ...pipeline.parameters import Parameters
from ...transport.codecs import codec_names
from ...transport.errors import UsageError
from ...transport.quantities import parse_duration, parse_rate, parse_size

_NUMBERS = {
    "workers", "level", "max_rounds", "batch_pages", "parallel", "retries", "cpu_throttle_initial",
    "cpu_throttle_increment", "max_cpu_throttle", "throttle_trigger_threshold",
}  # fmt: skip
F = TypeVar("F", bound=Callable[..., Any])
trace_option = click.option("--trace", metavar="FILE", help="Write what every process does there, "
                            "for ui.perfetto.dev; compressed if it ends in .gz.")  # fmt: skip


def migration_options(function: F) -> F:
    """What copy and send take."""
    return memory_options(switchover_options(page_options(output_options(function))))


def switchover_options(function: F) -> F:
    """What a migration that somebody looks after takes."""
    pause = click.option("--pause-before-switchover", is_flag=True, help="Wait, with the guest "
                         "stopped, until `pageferry continue` says so.")  # fmt: skip
    release = click.option("--release-ram", is_flag=True, help="With --postcopy: give memory back "
                           "here as it arrives there.")  # fmt: skip
    return pause(release(function))


def page_options(function: F) -> F:
    """What everything that moves memory takes."""
    report = click.option("--report", metavar="FILE", help="Write a page (HTML) about it there, "
                          "however it ends.")  # fmt: skip
    return report(web_option(function))


def web_option(function: F) -> F:
    web = click.option("--web", metavar="[HOST:]PORT", help="Serve such a page, live, and metrics "
                       "for Prometheus. Without HOST on loopback; port 0: any.")  # fmt: skip
    return web(function)


def key_options(function: F) -> F:
    """What everything that connects to a peer takes."""
    peer = click.option("--peer", metavar="NAME", default="", help="The name that the other end "
                        "has in DIR, if it is not the address's host.")  # fmt: skip
    return listening_options(peer(function))


def listening_options(function: F) -> F:
    """What everything that listens takes."""
    keys = click.option("--keys", metavar="DIR", default="", help="Encrypt; peers are those whose "
                        "keys are in DIR (`pageferry keys`).")  # fmt: skip
    insecure = click.option("--insecure", is_flag=True, help="Go to other hosts without keys: for "
                            "a network that is trusted.")  # fmt: skip
    return keys(insecure(function))


def user_option(function: F) -> F:
    """What runs for long, or hears strangers, takes."""
    user = click.option("--user", metavar="NAME[:GROUP]", help="Become this user as soon as what "
                        "needs root is done.")  # fmt: skip
    return user(function)


def memory_options(function: F) -> F:
    """What is said of a migration itself."""
    for option in reversed(
        [
            click.option("--profile", metavar="NAME", help="Settings that `pageferry tune` wrote: "
                         "a name, or a path. What is said here as well comes before."),
            click.option("--workers", metavar="N", help="Channels, each with a process at both "
                         "ends (QEMU: multifd-channels). Default: one a CPU."),
            click.option("--codec", metavar="NAME", default="auto", show_default=True,
                         help=f"{codec_names()}. auto takes what moves most; xbzrle sends "
                         "what differs from what was sent before."),
            click.option("--level", metavar="N", help="The codec's level."),
            click.option("--xbzrle-cache-size", metavar="SIZE", default="64M", show_default=True,
                         help="Pages sent before that xbzrle keeps."),
            click.option("--goal", metavar="GOAL", default="",
                         help=f"{', '.join(GOALS)}: choose workers (up to --workers) and codec "
                         "while it runs."),
            click.option("--max-bandwidth", metavar="RATE", default="0",
                         help="Such as 10Gbit or 500MB. Default: no limit."),
            click.option("--downtime-limit", metavar="TIME", default="300ms", show_default=True,
                         help="How long the guest may stand still."),
            click.option("--max-rounds", metavar="N", default="30", show_default=True,
                         help="Give up after this many rounds that did not converge."),
            *throttle_options(),
            click.option("--postcopy", metavar="WHEN", default="never", show_default=True,
                         help="Start the guest there before its memory: now, after=ROUNDS, auto "
                         "(when it would not converge), manual (when start-postcopy says so)."),
            click.option("--no-preempt", is_flag=True,
                         help="Answer page faults in line with the background, for comparison."),
            click.option("--max-postcopy-bandwidth", metavar="RATE", default="0",
                         help="For the background of a postcopy. Default: no limit."),
            click.option("--postcopy-latency-target", metavar="TIME", default="100us",
                         show_default=True,
                         help="How long a fault may wait behind the background."),
            click.option("--postcopy-link", type=click.Choice(["zmq", "direct"]), default="zmq",
                         show_default=True, help="What requested pages travel on: ZeroMQ, or a "
                         "connection without its threads in between."),
            click.option("--batch-pages", metavar="N", default="256", show_default=True,
                         help="4 KiB pages in a frame."),
            click.option("--quit-source", is_flag=True,
                         help="End a VM here once it runs there. Default: it stays paused."),
            click.option("--verify/--no-verify", default=None,
                         help="Compare what is there with what was read here. Default: for images. "
                         "Of a running guest, which stands still meanwhile, all memory is read "
                         "again."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def throttle_options() -> list[Callable[[Any], Any]]:
    """How a guest that writes too fast is slowed down."""
    return [
        click.option("--auto-converge", is_flag=True,
                     help="A guest that does not converge is slowed down, step by step."),
        click.option("--dirty-limit", is_flag=True,
                     help="It is slowed down to what the link can follow, by what is measured."),
        click.option("--cpu-throttle-initial", metavar="N", default="20", show_default=True,
                     help="The first step, in % of its time."),
        click.option("--cpu-throttle-increment", metavar="N", default="10", show_default=True,
                     help="Each further step."),
        click.option("--cpu-throttle-tailslow", is_flag=True,
                     help="No larger steps than it seems to need."),
        click.option("--max-cpu-throttle", metavar="N", default="99", show_default=True,
                     help="It never loses more than this."),
        click.option("--throttle-trigger-threshold", metavar="N", default="50", show_default=True,
                     help="Too fast is who writes more than N % of what is moved."),
        click.option("--vcpu-dirty-limit", metavar="RATE", default="0",
                     help="With --dirty-limit: what the guest may write. Default: the threshold's "
                     "share of what the link moves."),
        click.option("--vcpu-dirty-limit-period", metavar="TIME", default="1s", show_default=True,
                     help="How often --dirty-limit looks."),
    ]  # fmt: skip


def output_options(function: F) -> F:
    """What copy, send and receive take."""
    for option in reversed(
        [
            click.option("--monitor", metavar="unix:PATH", help="Serve QMP there meanwhile."),
            trace_option,
            click.option("--json", "as_json", is_flag=True,
                         help="One JSON object on stdout, messages on stderr."),
            click.option("--quiet", is_flag=True, help="No progress, no summary."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """What was said on the command line, as a manifest says it; with --profile, what that says and
    the command line does not."""
    context = click.get_current_context()
    given: dict[str, Any] = {}
    for name, value in options.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        shown = name.replace("_", "-")
        if name == "no_preempt":
            given["preempt"] = False
        elif name == "keys":
            given["keys"] = os.path.abspath(value)
        elif name != "profile":
            given[shown] = integer(shown, value) if name in _NUMBERS else value
    if options.get("profile") is None:
        return given
    from ...pipeline.profiles import with_profile

    return with_profile(options["profile"], given)


def parameters(options: dict[str, Any]) -> Parameters:
    """The options as Parameters; UsageError that names the option."""
    check_files(options)
    if options.get("profile") is not None:
        options = profiled(options)
    return Parameters(
        workers=integer("workers", options["workers"]) or 0,
        codec=options["codec"],
        level=integer("level", options["level"]),
        xbzrle_cache_size=parse_size(options["xbzrle_cache_size"]),
        goal=options["goal"],
        max_bandwidth=parse_rate(options["max_bandwidth"]),
        downtime_limit=parse_duration(options["downtime_limit"]),
        max_rounds=integer("max-rounds", options["max_rounds"]) or 0,
        batch_pages=integer("batch-pages", options["batch_pages"]) or 0,
        verify=options["verify"],
        quit_source=options["quit_source"],
        pause_before_switchover=options.get("pause_before_switchover", False),
        release_ram=options.get("release_ram", False),
        postcopy=options["postcopy"],
        preempt=not options["no_preempt"],
        postcopy_link=options["postcopy_link"],
        max_postcopy_bandwidth=parse_rate(options["max_postcopy_bandwidth"]),
        postcopy_latency_target=parse_duration(options["postcopy_latency_target"]),
        keys=options.get("keys", ""),
        peer=options.get("peer", ""),
        insecure=options.get("insecure", False),
        **_throttle(options),
    ).checked()


def check_files(options: dict[str, Any]) -> None:
    """UsageError if two things are to be written to one file."""
    report, trace = options.get("report"), options.get("trace")
    if report and trace and os.path.realpath(report) == os.path.realpath(trace):
        raise UsageError("--report and --trace name the same file: each needs one of its own")


def _throttle(options: dict[str, Any]) -> dict[str, Any]:
    numbers = (
        "cpu_throttle_initial", "cpu_throttle_increment", "max_cpu_throttle",
        "throttle_trigger_threshold",
    )  # fmt: skip
    return {
        "auto_converge": options["auto_converge"],
        "dirty_limit": options["dirty_limit"],
        "cpu_throttle_tailslow": options["cpu_throttle_tailslow"],
        "vcpu_dirty_limit": parse_rate(options["vcpu_dirty_limit"]),
        "vcpu_dirty_limit_period": parse_duration(options["vcpu_dirty_limit_period"]),
        **{name: integer(name.replace("_", "-"), options[name]) or 0 for name in numbers},
    }


def profiled(options: dict[str, Any]) -> dict[str, Any]:
    """`options`, the profile's in place of those that nobody gave."""
    merged = dict(options)
    for shown, value in given_options(options).items():
        name = shown.replace("-", "_")
        if name == "preempt":
            merged["no_preempt"] = not value
        elif name in merged:
            merged[name] = value if isinstance(value, bool) else str(value)
    return merged


def integer(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"--{name} must be a whole number, not {text!r}") from None
    if name == "workers" and value < 1:
        raise UsageError("--workers must be at least 1")
    return value
