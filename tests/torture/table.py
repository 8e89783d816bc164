"""docs/torture.md: what there is to know of the matrix, and what came of a run of it. Pure."""

import collections
import io

from cells import (
    ANYWHERE,
    IN_EACH_TEST,
    LEFT_OUT,
    MOMENTS,
    OUTCOMES,
    SNAPSHOTS,
    THROTTLED,
    Kind,
    RunSaid,
)

_HEAD = """# Fault matrix

`make torture` holds each state of a migration open, does each fault to each process and each link,
and looks what has come of it; then it does faults at random moments. It wrote this page. In `make
test` every cell of a demo guest over a network is run too, with a guest of 4 MiB, one channel and
no repetition, and some of the others (`tests/torture/`).

Of each cell it is held that the outcome is the stated one; that the guest runs at one side and not
at the other, every byte of it right (the demo guest's oracle), and that a source that stands still
has not run since; that each end that lives has its error, or pauses, in time; and that no process,
descriptor, thread, shared-memory name or temporary folder is left: of an end that was killed, after
the next start's sweep. A process that is slowed down or saved writes by a law that shows whether
what arrived, or was saved, is of one instant; in the end it runs and has all of its time, with no
note and no cgroup of ours, or it stands still because it was moved. A file of a snapshot is whole,
by its digests and that law, or not there.

The bound is 5 s from the fault to the error at each end that lives, 2 s where a local process is
dead. A run fails at three times the bound, so that a busy machine does not decide; what exceeded
the bound itself is **bold**. A coordinator that was stopped has its time from when it goes on.
"""


def _row(*columns):
    return "| " + " | ".join(columns) + " |\n"


def _moments(file):
    file.write("\n## States\n\n")
    file.write(_row("moment", "status", "held open by", "of") + _row(*["---"] * 4))
    for moment in MOMENTS:
        file.write(_row(moment.name, moment.status.value, moment.by, moment.kind.value))
    file.write("\nLeft out: " + "; ".join(
        f"{status.value} ({why})" for status, why in LEFT_OUT.items()) + ".\n")  # fmt: skip


def _outcomes(file):
    file.write("""
## Outcomes

What comes of a fault follows from what it takes away, and from how far the guest has gone. What is
paused already, or recovering, is recovered before it completes.

""")
    file.write(_row("gone", *(run.value for run in RunSaid)) + _row(*["---"] * 5))
    for gone, by_run in OUTCOMES.items():
        file.write(_row(gone.value, *(by_run[run].value for run in RunSaid)))
    file.write("""
- *source runs on*: both ends fail, and the guest goes on at the source as if nothing had been.
- *arrives, source not told*: the guest runs at the destination. The source has ConfirmationLost and
  stays stopped (or hears of it after all, if it was only late).
- *source stays stopped*: ConfirmationLost. Nobody knows at the source whether the guest runs, so it
  does not go on by itself.
- *guest dies with its host process*: a demo guest is a child of the coordinator that moves it. A VM
  is not.
- *guest lost*: in a postcopy one end alone has not all of the memory. A source whose coordinator is
  killed cannot be taken up by another process, and a destination's takes the demo guest along.

A stream that breaks is a connection that is gone. What is paused is recovered by another way in:
the receiver's own address, since a command that was a receiver cannot be started again.

""")
    _others(file)


def _others(file):
    """Where it is something else."""
    moments = [m for m in MOMENTS if m.kind in (Kind.SAVING, Kind.RESTORING)]
    names = ["slowed down", *(m.name for m in moments)]
    file.write(_row("gone", *names) + _row(*["---"] * (1 + len(names))))
    for gone in dict.fromkeys((*THROTTLED, *SNAPSHOTS)):
        first = THROTTLED[gone].value if gone in THROTTLED else "-"
        by_moment = SNAPSHOTS.get(gone, {})
        rest = [by_moment[m].value if m in by_moment else "-" for m in moments]
        file.write(_row(gone.value, first, *rest))
    file.write(f"""
- *source runs on*, of a process that is slowed down: whoever dies, since it is nobody's child here.
  Who slows it down undoes that when its coordinator dies; if both are killed the next start does.
- *saved, guest is gone*: what stands still is saved whole, though it is killed meanwhile.
- *no file, guest runs on*: also if all of pageferry is killed. A process that was stopped to be
  saved goes on with the next start, or `pageferry clean`. That somebody else lets it go on while it
  is saved is an error, for what is saved would not be of one instant.
- *paused, recovered, completed*, of a lazy restore: it recovers by itself. *guest lost*: it was
  started, and nobody else has its memory. One Ctrl-C says so and does nothing; the second ends it.
- A coordinator that was stopped is both ends of a restore: when it goes on each may take the other
  for lost, or not.

Of these kinds a fault has a row where something may come of it that is not as over a network. Of
them {len(IN_EACH_TEST)} are in `make test`.
""")


def rules():
    """What does not depend on a run."""
    file = io.StringIO()
    file.write(_HEAD)
    _moments(file)
    _outcomes(file)
    return file.getvalue()


def _seconds(results, end):
    """The longest time to the error at an end, and the errors."""
    took = [r.took[end] for r in results if r.took.get(end) is not None]
    errors = sorted({r.errors[end] for r in results if end in r.errors})
    text = ", ".join(errors) or "-"
    if not took:
        return text
    late = max(took) > min(r.bounds[end] for r in results if end in r.bounds)
    time = f"{max(took):.1f} s"
    return f"{text}, {'**' + time + '**' if late else time}"


def _verdict(results):
    wrong = [what for r in results for what in r.wrong]
    if wrong:
        return "SHORT: " + "; ".join(sorted({what[:200].replace("|", "/") for what in wrong}))
    if all(r.skipped for r in results):
        return f"skipped: {results[0].skipped}"
    return "ok"


def _table(file, by_cell):
    for moment in (*MOMENTS, ANYWHERE):
        found = {cell: r for cell, r in by_cell.items() if cell.moment is moment}
        if not found:
            continue
        file.write(f"\n### {moment.name}\n\n")
        file.write(_row("fault", "outcome", "source", "destination", "runs", "verdict"))
        file.write(_row(*["---"] * 6))
        for cell, results in found.items():
            seen = sorted({r.observed for r in results if r.observed})
            file.write(_row(
                cell.what, " / ".join(seen) or "-",
                _seconds(results, "source"), _seconds(results, "destination"),
                str(sum(not r.skipped for r in results)), _verdict(results),
            ))  # fmt: skip


def write(file, results, *, seed, seconds, size):
    """`results`: (cell, Result) of all runs."""
    by_cell = collections.defaultdict(list)
    for cell, result in results:
        by_cell[cell].append(result)
    file.write(rules())
    ran = [r for _, r in results if not r.skipped]
    late = [r for r in ran for end, took in r.took.items() if took > r.bounds[end]]
    ok = sum(not r.wrong for r in ran)
    file.write(
        f"\n## A run\n\nGuests of {size}iB, seed {seed}, {seconds / 60:.0f} minutes: "
        f"{len(by_cell)} cells, {len(ran)} runs, {ok} as they should be, {len(ran) - ok} SHORT; "
        f"{len(late)} errors came later than the bound. Times are the longest of a cell's runs.\n"
    )
    _table(file, by_cell)
