"""`pageferry batch WHAT [DESTINATION]`, `batch resume` and `batch status`: many guests, some at a
time, in a way that survives whatever ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from ...pipeline.batch import Batch, verdict
from ...pipeline.batch_state import BatchState, Row, look
from ...pipeline.manifest import changed, load
from ...pipeline.planner import State
from ...transport.errors import Cancelled, PageferryError
from ...workers.forking import warm_up
from .batch_view import batch_summary, make_batch_view, status_table
from .options import given_options, integer, memory_options
from .running import Interrupts

# Threads for what blocks: each migration opens and closes things, and some peers do not answer.
_THREADS_EACH = 3
_ORDER = (
    State.FAILED, State.RUNNING, State.WAITING, State.PENDING, State.CANCELLED, State.COMPLETED,
)  # fmt: skip


class _Batch(click.Group):
    """`batch WHAT` is `batch run WHAT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
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
@memory_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def run_command(
    what: str,
    destination: str | None,
    state_path: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Move what MANIFEST says (TOML, YAML, JSON), or all images of a directory or a pattern to
    DESTINATION: a receiver's address, or image:DIRECTORY/.

    What an item says itself comes before these options, and they before what the manifest says of
    all items. --max-bandwidth is for all together. An item that fails never stops the others.
    """
    warm_up()
    manifest = load(what, destination, given_options(options))
    if state_path is None:
        is_file = os.path.isfile(what) and what.endswith((".toml", ".yaml", ".yml", ".json"))
        state_path = f"{what}.state" if is_file else "pageferry-batch.state"
    _carry_out(BatchState(state_path, manifest), as_json, quiet)


@batch_command.command("resume")
@click.option("--state", "state_path", metavar="PATH", required=True, help="Of the batch.")
@click.option("--retry-failed", is_flag=True, help="Try what has failed for good again, but for "
              "guests that may run at their destination.")  # fmt: skip
@click.option("--retry", "retry", metavar="NAME", multiple=True, help="Try this item again, "
              "whatever it failed of. May be repeated.")  # fmt: skip
@click.option("--parallel", metavar="N", help="At most so many at once, from now on.")
@click.option("--max-bandwidth", metavar="RATE", help="Of all together, from now on; 0 is no "
              "limit.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def resume_command(
    state_path: str,
    retry_failed: bool,
    retry: tuple[str, ...],
    parallel: str | None,
    max_bandwidth: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Go on with a batch, whatever ended it. What is completed is not sent again."""
    warm_up()
    state = BatchState(state_path, None)
    try:
        state.policy = changed(state.policy, integer("parallel", parallel), max_bandwidth)
        if retry_failed:
            state.forgive()
        if retry:
            state.forgive(set(retry))
    except BaseException:
        state.close()
        raise
    _carry_out(state, as_json, quiet)


def _carry_out(state: BatchState, as_json: bool, quiet: bool) -> None:
    """Run the batch to its end, with a display; closes `state`."""
    view = make_batch_view(quiet)

    async def main() -> dict[str, Any]:
        interrupts = Interrupts()
        with interrupts.installed():
            batch = Batch(state, view.item, view.progress)
            threads = 8 + _THREADS_EACH * min(batch.policy.parallel, len(batch))
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
            interrupts.attach(batch)
            try:
                return await batch.run()
            except asyncio.CancelledError:
                raise Cancelled(
                    f"interrupted; `pageferry batch resume --state {state.path}` goes on",
                    report=batch.report() | {"status": "cancelled"},
                ) from None

    try:
        with view:
            report = asyncio.run(main())
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
