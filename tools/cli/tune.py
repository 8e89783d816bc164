"""`pageferry tune SOURCE [DESTINATION]`: tries settings on a sample, over the real link, and names
the best."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from ...pipeline.parameters import Parameters
from ...pipeline.profiles import path_of_profile, write_profile
from ...pipeline.trials import trial_runs, tune
from ...pipeline.tuning import (
    FASTEST,
    GOALS,
    LEAST_DOWNTIME,
    Measured,
    Search,
    Space,
    Sweep,
    Trial,
    Tuner,
    worker_choices,
)
from ...pipeline.tuning_report import comments, report_of
from ...transport.codecs import CODECS, make_codec
from ...transport.errors import Cancelled, UsageError
from ...transport.links import Endpoint, parse_endpoint
from ...transport.messages import MAX_WORKERS
from ...transport.quantities import parse_rate, parse_size
from ...transport.wire import MAX_BATCH_PAGES
from ...workers.guests import GuestUri, check_destination, parse_guest
from ..report.tuning_curves import check_curves, draw_curves
from .options import integer, key_options
from .running import Interrupts
from .tune_view import TuneView, make_tune_view, tune_summary

_CODECS = "none,lz4,zstd:-1,zstd:1,zstd:3,zstd:6,auto"
_BATCHES = "64,128,256,512,1024"
_BATCH = 256  # what a migration has if nobody says otherwise
_LEAST_SAMPLE = 4 << 20
_MOST_REPEATS = 100
_ADDRESSES = ("tcp://", "ipc://")


@click.command("tune")
@click.argument("source")
@click.argument("destination", required=False)
@click.option("--sample", metavar="SIZE", default="256M", show_default=True,
              help="How much of the source's memory trials move.")  # fmt: skip
@click.option("--workers", metavar="LIST", help="Numbers of workers to try, such as 1,2,4. "
              "Default: up to twice the processors.")  # fmt: skip
@click.option("--codecs", metavar="LIST", default=_CODECS, show_default=True,
              help="Codecs to try, with :LEVEL.")  # fmt: skip
@click.option("--batches", metavar="LIST", default=_BATCHES, show_default=True,
              help="4 KiB pages in a frame to try.")  # fmt: skip
@click.option("--max-bandwidth", metavar="RATE", default="0",
              help="Of each trial. Default: no limit.")  # fmt: skip
@key_options
@click.option("--exhaustive", is_flag=True, help="Try all combinations, to see what that finds.")
@click.option("--repeats", metavar="N", default="3", show_default=True,
              help="How often, with --exhaustive.")  # fmt: skip
@click.option("--profile", metavar="NAME", help="Write the best setting there, for --profile of "
              "the other commands: a name, or a path.")  # fmt: skip
@click.option("--goal", type=click.Choice(GOALS), default=FASTEST, show_default=True,
              help="Which of the best the profile gets.")  # fmt: skip
@click.option("--curves", metavar="FILE", help="Draw the curves there: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def tune_command(source: str, destination: str | None, **options: Any) -> None:
    """Find the settings with which SOURCE moves best: to the `pageferry receive` at DESTINATION
    (tcp://HOST:PORT, ipc://PATH), or on this host.

    A sample of its memory is moved again and again, and thrown away at the other end. The source
    is read only, and what the receiver is for is not touched.

    \b
    pageferry tune image:vm.mem
    pageferry tune qemu:/run/vm/pageferry.qmp tcp://192.0.2.7:4444 --profile rack2
    """
    where, endpoint = parse_guest(source), _endpoint(destination)
    size = parse_size(options["sample"])
    if size < _LEAST_SAMPLE:
        raise UsageError("--sample must be at least 4M: less says nothing of a migration")
    space = space_of(options["workers"], options["codecs"], options["batches"])
    common = Parameters(
        max_bandwidth=parse_rate(options["max_bandwidth"]), keys=options["keys"],
        peer=options["peer"], insecure=options["insecure"],
    ).checked()  # fmt: skip
    if options["curves"] is not None:
        check_curves(options["curves"])
    if options["profile"] is not None:
        path_of_profile(options["profile"])
    start = space.start(len(os.sched_getaffinity(0)), _BATCH)
    repeats = _repeats(options)

    def search(data: int) -> Search:
        return Sweep(space, data, start, repeats) if repeats else Tuner(space, data, start)

    view = make_tune_view(options["quiet"])

    async def main() -> dict[str, Any]:
        with Interrupts().installed():
            try:
                return await _tune(where, endpoint, size, search, common, view)
            except asyncio.CancelledError:
                raise Cancelled("interrupted; the source is as it was") from None

    with view:
        report = asyncio.run(main())
    report = {"source": source, "destination": destination or "this host"} | report
    _keep(report, options, view)
    if options["as_json"]:
        print(json.dumps(report), flush=True)
    elif not options["quiet"]:
        print(tune_summary(report, fancy=sys.stdout.isatty()), flush=True)


def _repeats(options: dict[str, Any]) -> int:
    """How often all is tried; 0 if it is to be searched."""
    repeats = integer("repeats", options["repeats"]) or 0
    if not 1 <= repeats <= _MOST_REPEATS:
        raise UsageError(f"--repeats must be from 1 to {_MOST_REPEATS}")
    return repeats if options["exhaustive"] else 0


def _endpoint(destination: str | None) -> Endpoint | None:
    """The receiver's address; None if both ends are to be here."""
    if destination is not None and destination.startswith(_ADDRESSES):
        return parse_endpoint(destination)
    if destination is not None:
        check_destination(parse_guest(destination))  # of this host: its memory is not touched
    return None


def space_of(workers: str | None, codecs: str, batches: str) -> Space:
    """The settings to try, from lists with commas; UsageError that names the option."""
    cpus = len(os.sched_getaffinity(0))
    tried = worker_choices(cpus) if workers is None else _numbers(
        "--workers", workers, 1, MAX_WORKERS
    )  # fmt: skip
    return Space(tried, _codec_list(codecs), _numbers("--batches", batches, 16, MAX_BATCH_PAGES))


def _numbers(option: str, text: str, low: int, high: int) -> tuple[int, ...]:
    found = set()
    for word in text.split(","):
        if not (word.strip().isdecimal() and len(word) < 10 and low <= int(word) <= high):
            raise UsageError(f"{option} is a list of numbers from {low} to {high}, not {text!r}")
        found.add(int(word))
    return tuple(sorted(found))


def _codec_list(text: str) -> tuple[tuple[str, int | None], ...]:
    found: dict[tuple[str, int | None], None] = {}
    for word in text.split(","):
        name, colon, level = word.strip().partition(":")
        if colon and not level.lstrip("-").isdecimal():
            raise UsageError(f"--codecs: {word!r} has no level: write {name}:1")
        if name != "auto":
            make_codec(name, int(level) if colon else None)
        elif colon:
            raise UsageError(f"--codecs: auto has no level; one of {', '.join(CODECS)} has")
        found[name, int(level) if colon else None] = None
    return tuple(found)


async def _tune(
    where: GuestUri, endpoint: Endpoint | None, size: int, make: Callable[[int], Search],
    common: Parameters, view: TuneView,
) -> dict[str, Any]:  # fmt: skip
    begin = time.monotonic()
    cpus = len(os.sched_getaffinity(0))
    view.say("reading a sample")
    async with trial_runs(where, endpoint, size, common) as (sample, runs):
        tuner = make(sample.data)
        view.begin(sample)

        def on_trial(trial: Trial, found: Measured) -> None:
            mean = runs.seconds / tuner.done
            view.trial(trial, found, tuner, (tuner.expected() - tuner.done) * mean)

        await tune(runs, tuner, on_trial)
        return {
            "date": time.strftime("%Y-%m-%d"),
            "time": round((time.monotonic() - begin) * 1000),
            "sample": {
                "data": sample.data, "size": sample.size, "share": round(sample.share, 4),
                "zero-share": round(sample.zero_share, 4), "live": sample.live,
            },
            **report_of(tuner, local=runs.local, cpus=cpus),
        }  # fmt: skip


def _keep(report: dict[str, Any], options: dict[str, Any], view: TuneView) -> None:
    """Write what was asked for."""
    if options["profile"] is not None:
        goal = options["goal"]
        if goal not in report["best"]:
            raise UsageError(
                f"nothing runs in {report['source']}: it has no downtime; leave --goal "
                f"{LEAST_DOWNTIME} out"
            )
        best = report["best"][goal]
        settings = {key: best[key] for key in ("workers", "codec", "level", "batch-pages")
                    if key in best}  # fmt: skip
        report["profile"] = write_profile(options["profile"], settings, comments(report, goal))
        view.say(f"profile: {report['profile']}")
    if options["curves"] is not None:
        draw_curves(report, options["curves"])
        report["curves-file"] = options["curves"]
        view.say(f"curves: {options['curves']}")
