"""`pageferry batch WHAT [DESTINATION]`, `batch resume` and `batch status`: many guests, some at a
time, in a way that survives whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import click

from ...pipeline.batch import Batch, no_fleet, verdict
from ...pipeline.batch_state import BatchState, Row, look
from ...pipeline.fleet import Fleet, check_dask
from ...pipeline.manifest import Item, changed, load
from ...pipeline.planner import ENDED, State
from ...pipeline.security import check_links
from ...pipeline.tracing import recording
from ...transport.errors import Cancelled, PageferryError, UsageError
from ...transport.links import parse_endpoint
from ...workers.forking import warm_up
from ...workers.guests import GuestUri, parse_guest
from .batch_view import BatchView, batch_summary, make_batch_view, status_table
from .options import (
    given_options,
    integer,
    key_options,
    memory_options,
    page_options,
    trace_option,
)
from .reporting import Outcome, check_report, ending, served, write_report
from .running import Interrupts

if TYPE_CHECKING:
    from ..web.subjects import Subject

# Threads for what blocks: each migration opens and closes things, and some peers do not answer.
_THREADS_EACH = 3
_VERBOSE = ("-v", "-vv", "--verbose")
_ORDER = (
    State.FAILED, State.RUNNING, State.WAITING, State.PENDING, State.CANCELLED, State.COMPLETED,
)  # fmt: skip


class _Batch(click.Group):
    """`batch WHAT` is `batch run WHAT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = (*self.commands, *ctx.help_option_names)
        first = next((i for i, word in enumerate(args) if word not in _VERBOSE), len(args))
        if first < len(args) and args[first] not in known:
            args = [*args[:first], "run", *args[first:]]
        return super().parse_args(ctx, args)


@click.group("batch", cls=_Batch)
def batch_command() -> None:
    """Move many guests or images, some at a time.

    \b
    pageferry batch drain.toml
    pageferry batch 'images/*.mem' tcp://192.0.2.7:4444 --parallel 4
    pageferry batch resume --state drain.toml.state
    pageferry batch status --state drain.toml.state
    """


@batch_command.command("run")
@click.argument("what", metavar="MANIFEST|DIRECTORY|PATTERN")
@click.argument("destination", required=False)
@click.option("--state", "state_path", metavar="PATH", help="The file that knows how it goes. "
              "Default: MANIFEST.state, or pageferry-batch.state for images.")  # fmt: skip
@click.option("--parallel", metavar="N", help="At most so many at once. Default: 4.")
@click.option("--retries", metavar="N", help="How often an item that failed is tried again. "
              "Default: 3.")  # fmt: skip
@click.option("--backoff", metavar="TIME", help="Until the first of them; twice as long each "
              "time. Default: 2s.")  # fmt: skip
@click.option("--fleet", metavar="ADDRESS", help="The dask scheduler that knows the hosts which "
              "items name, such as tcp://192.0.2.1:8786.")  # fmt: skip
@key_options
@memory_options
@trace_option
@page_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def run_command(
    what: str,
    destination: str | None,
    state_path: str | None,
    trace: str | None,
    fleet: str | None,
    as_json: bool,
    quiet: bool,
    report: str | None,
    web: str | None,
    **options: Any,
) -> None:
    """Move what MANIFEST says (TOML, YAML, JSON), or all images of a directory or a pattern to
    DESTINATION: a receiver's address, or image:DIRECTORY/.

    What an item says itself comes before these options, and they before what the manifest says of
    all items. --max-bandwidth is for all together. An item that fails never stops the others.
    """
    warm_up()
    manifest = load(what, destination, given_options(options))
    if not _needs_fleet(manifest.items, fleet) and fleet is not None:
        raise UsageError("--fleet is for items that name the `host` of their source, and none does")
    check_links(
        (item.parameters(), parse_endpoint(item.destination), not item.hosts)
        for item in manifest.items
        if item.to_receiver
    )
    if state_path is None:
        is_file = os.path.isfile(what) and what.endswith((".toml", ".yaml", ".yml", ".json"))
        state_path = f"{what}.state" if is_file else "pageferry-batch.state"
    title = what if destination is None else f"{what} to {destination}"
    pages = {"report": report, "web": web, "quiet": quiet}
    check_report(report, *(item.guest for item in manifest.items))
    _carry_out(BatchState(state_path, manifest), as_json, title, pages, trace, fleet)


def _needs_fleet(items: Sequence[Item], fleet: str | None) -> bool:
    """Whether one of `items` is at another host; an error at once if that cannot be reached."""
    first = next((item for item in items if item.hosts), None)
    if first is None:
        return False
    if fleet is None:
        raise no_fleet(first)
    check_dask()
    return True


@batch_command.command("resume")
@click.option("--state", "state_path", metavar="PATH", required=True, help="Of the batch.")
@click.option("--retry-failed", is_flag=True, help="Try what has failed for good again, but for "
              "guests that may run at their destination.")  # fmt: skip
@click.option("--retry", "retry", metavar="NAME", multiple=True, help="Try this item again, "
              "whatever it failed of. May be repeated.")  # fmt: skip
@click.option("--parallel", metavar="N", help="At most so many at once, from now on.")
@click.option("--max-bandwidth", metavar="RATE", help="Of all together, from now on; 0 is no "
              "limit.")  # fmt: skip
@trace_option
@click.option("--fleet", metavar="ADDRESS", help="The dask scheduler, as it is now.")
@page_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def resume_command(
    state_path: str,
    retry_failed: bool,
    retry: tuple[str, ...],
    parallel: str | None,
    max_bandwidth: str | None,
    trace: str | None,
    fleet: str | None,
    as_json: bool,
    quiet: bool,
    report: str | None,
    web: str | None,
) -> None:
    """Go on with a batch, whatever ended it. What is completed is not sent again."""
    warm_up()
    check_report(report)
    state = BatchState(state_path, None)
    try:
        state.policy = changed(state.policy, integer("parallel", parallel), max_bandwidth)
        if retry_failed:
            state.forgive()
        if retry:
            state.forgive(set(retry))
        if not _needs_fleet([r.item for r in state.rows() if r.state not in ENDED], fleet):
            fleet = None
    except BaseException:
        state.close()
        raise
    _carry_out(
        state, as_json, state_path, {"report": report, "web": web, "quiet": quiet}, trace, fleet
    )


@contextlib.asynccontextmanager
async def _recorded(
    batch: Batch, title: str, pages: dict[str, Any], view: BatchView
) -> AsyncIterator[Outcome]:
    """Set `.report` in it; the pages of the batch are written and served as `recorded` does."""
    outcome = Outcome()
    if pages["report"] is None and pages["web"] is None:
        yield outcome
        return
    from ..report.batch_page import render
    from ..report.batch_recorder import BatchRecorder

    recorder = BatchRecorder(title)

    def on_item(event: dict[str, Any]) -> None:
        recorder.on_item(event)
        view.item(event)

    def on_progress(query: dict[str, Any]) -> None:
        recorder.on_progress(query)
        view.progress(query)

    def subject() -> Subject:
        from ..web.subjects import BatchSubject

        return BatchSubject(recorder, batch.query)

    def write() -> None:
        write_report(pages["report"], lambda: render(recorder.record(outcome.report)), view)

    batch.on_item, batch.on_progress = on_item, on_progress
    async with served(pages, subject, outcome, view):
        recorder.begin(batch.report()["items"])
        recorder.on_progress(batch.query())
        with ending(outcome, write):
            yield outcome


def _carry_out(
    state: BatchState,
    as_json: bool,
    title: str,
    pages: dict[str, Any],
    trace: str | None,
    fleet: str | None,
) -> None:
    """Run the batch to its end, with a display and perhaps a trace; closes `state`. `fleet`: a
    scheduler's address, if there are items for it."""
    quiet = pages["quiet"]
    view = make_batch_view(quiet)

    async def main() -> dict[str, Any]:
        interrupts = Interrupts()
        with interrupts.installed():
            batch = Batch(state, view.item, view.progress)
            threads = 8 + _THREADS_EACH * min(batch.policy.parallel, len(batch))
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
            interrupts.attach(batch)
            try:
                async with contextlib.AsyncExitStack() as stack:
                    if fleet is not None:
                        batch.use(await stack.enter_async_context(Fleet.connected(fleet)))
                    outcome = await stack.enter_async_context(_recorded(batch, title, pages, view))
                    outcome.report = await batch.run()
                    return outcome.report
            except asyncio.CancelledError:
                raise Cancelled(
                    f"interrupted; `pageferry batch resume --state {state.path}` goes on",
                    report=batch.report() | {"status": "cancelled"},
                ) from None

    try:
        with view, recording(trace, *(_memory(state) if trace is not None else ())):
            try:
                report = asyncio.run(main())
            finally:
                if trace is not None:
                    view.say(f"trace: {trace}")
    except PageferryError as e:
        if "report" in e.data and not (as_json or quiet):
            print(batch_summary(e.data["report"]), flush=True)
        raise
    finally:
        state.close()
    if as_json:
        print(json.dumps(report), flush=True)
    elif not quiet:
        print(batch_summary(report), flush=True)


def _memory(state: BatchState) -> Iterator[GuestUri]:
    """What moves, and where it goes."""
    for row in state.rows():
        yield row.item.guest
        if not row.item.to_receiver:
            yield parse_guest(row.item.destination)


@batch_command.command("status")
@click.option("--state", "state_path", metavar="PATH", required=True, help="Of the batch.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def status_command(state_path: str, as_json: bool) -> None:
    """Show what has become of a batch, while it runs or afterwards. The exit code is 0 whatever it
    is."""
    snapshot = look(state_path)
    rows = sorted(snapshot.rows, key=lambda row: _ORDER.index(row.state))
    states = Counter(row.state for row in rows)
    status = verdict(states)
    if status == "active" and snapshot.owner is None:
        status = "interrupted"
    items = [_told(row, snapshot.owner is not None) for row in rows]
    if as_json:
        print(json.dumps({
            "status": status,
            "pid": snapshot.owner,
            "total": len(rows),
            **{state.value: states[state] for state in State},
            "items": items,
        }))  # fmt: skip
        return
    print(status_table(items))
    counts = ", ".join(f"{states[state]} {state.value}" for state in _ORDER if states[state])
    how = f"pid {snapshot.owner} is at it" if snapshot.owner is not None else status
    print(f"\n{len(rows)} item{'s' * (len(rows) != 1)}: {counts}; {how}")
    if status == "interrupted":
        print(f"`pageferry batch resume --state {state_path}` goes on")


def _told(row: Row, owned: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": row.item.name,
        "source": row.item.source,
        "destination": row.item.destination,
        "priority": row.item.priority,
        "state": row.state.value if owned or row.state is not State.RUNNING else "interrupted",
        "attempts": row.attempts,
        "failures": row.failures,
    }
    if row.error is not None and row.state is not State.COMPLETED:
        told["error"] = row.error
    if row.report is not None:
        told["report"] = row.report
    return told
