"""kill -9 of a batch, again and again at random moments, each time resumed: is every image equal in
the end, and how many bytes were sent twice?

Bytes are those of the loopback interface, which no kill can hide: all that went over it from the
first start to the last end, both ways, with headers, handshakes, digests and what was lost in
sockets, against the same for one run with the same settings that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...transport.quantities import format_bytes
from . import content, pageferry
from .lab import BenchError, Child, Lab, loopback_bytes, members, say, wait_for
from .table import megabytes, number, render

_PAGE = 4096
_KINDS = ("random", "text", "half")
_SECONDS = 1800.0
_LOOK_SECONDS = 0.002
# A kill comes up to this long after its number of bytes: also while nothing travels.
_DELAY_SECONDS = 0.05


@dataclass
class Plan:
    """What to do. `size`: of an image, bytes; `clones`: of each image that is none, as many as fit;
    `changed`: pages of a clone that are its own; `rate`: of the batch, bytes a second, 0 without
    limit."""

    images: int
    size: int
    clones: int
    changed: int
    kills: int
    seed: int
    parallel: int
    workers: int
    codec: str
    rate: int
    directory: str


@dataclass
class Row:
    """A batch from its start to its last end. `wire`: bytes; `attempts`: of all items."""

    what: str
    kills: int = 0
    seconds: float = 0.0
    wire: int = 0
    attempts: int = 0
    equal: bool = False


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """Once undisturbed, once with kills."""
    here = lab.path("images", plan.directory)
    _make(here, plan)
    try:
        calm = _run(lab, plan, here, Row("undisturbed"), [])
        draw = random.Random(plan.seed)
        moments = sorted(draw.uniform(0.0, 0.95 * calm.wire) for _ in range(plan.kills))
        killed = _run(lab, plan, here, Row(f"killed (seed {plan.seed})"), moments, draw)
    finally:
        shutil.rmtree(here, ignore_errors=True)
    title = (
        f"{plan.images} images of {format_bytes(plan.size)}: random, text, half; to each "
        f"{plan.clones} clones with {plan.changed} pages of their own; in {plan.directory}"
    )
    return f"{title}\n{_table([calm, killed])}", [
        asdict(row) | {"sent-twice": sent_twice(calm, row)} for row in (calm, killed)
    ]


def sent_twice(calm: Row, row: Row) -> float:
    """Percent of the bytes of an undisturbed run."""
    return 100 * (row.wire - calm.wire) / calm.wire


def _table(rows: list[Row]) -> str:
    header = ("", "kills", "s", "attempts", "wire MB", "sent twice", "equal")
    lines = [
        [row.what, str(row.kills), number(row.seconds, 1), str(row.attempts), megabytes(row.wire),
         f"{sent_twice(rows[0], row):.2f} %" if row is not rows[0] else "-",
         "yes" if row.equal else "NO"]
        for row in rows
    ]  # fmt: skip
    return render(header, lines)


# ---- images ----------------------------------------------------------------------------------


def _make(directory: str, plan: Plan) -> None:
    """Clones are not beside each other by name."""
    os.mkdir(directory)
    draw = np.random.default_rng(plan.seed)
    families = -(-plan.images // (plan.clones + 1))
    try:
        for i in range(plan.images):
            path = f"{directory}/vm{i:03}.mem"
            if i < families:
                content.make(path, _KINDS[i % len(_KINDS)], plan.size, first=i * 1000)
            else:
                shutil.copyfile(f"{directory}/vm{i % families:03}.mem", path)
                _change(path, plan, draw)
    except OSError as e:
        raise BenchError(f"no space in {directory}: {e}") from e


def _change(path: str, plan: Plan, draw: np.random.Generator) -> None:
    pages = plan.size // _PAGE
    with open(path, "r+b") as file:
        for page in draw.choice(pages, min(plan.changed, pages), replace=False).tolist():
            file.seek(page * _PAGE)
            file.write(draw.bytes(_PAGE))


def _equal(here: str, there: str, plan: Plan) -> bool:
    names = sorted(os.listdir(here))
    return sorted(os.listdir(there)) == names and all(
        content.same(f"{here}/{name}", f"{there}/{name}", plan.size) for name in names
    )


# ---- runs ------------------------------------------------------------------------------------


def _run(
    lab: Lab, plan: Plan, here: str, row: Row, moments: list[float],
    draw: random.Random | None = None,
) -> Row:  # fmt: skip
    """The batch to its end, killed at each of `moments`: bytes on the wire since its beginning. One
    that is past when a run begins comes when that has sent something too."""
    there = lab.path("there", plan.directory)
    state = lab.path("state", plan.directory)
    os.mkdir(there)
    try:
        with _receiver(lab, plan, there) as endpoint:
            before, begin = loopback_bytes(), time.monotonic()
            command = ["batch", f"{here}/", endpoint, *_options(plan)]
            while True:
                least = loopback_bytes()
                sending = lab.start([*lab.pageferry, *command, "--state", state, "--json"])
                if draw is None or not moments:
                    break
                least += round(draw.uniform(0, moments[-1] / plan.kills / 4))
                if not _reached(sending, max(before + moments.pop(0), least)):
                    break
                time.sleep(draw.uniform(0, _DELAY_SECONDS))
                if not _kill(sending):
                    break
                row.kills += 1
                say(f"kill {row.kills}: {megabytes(loopback_bytes() - before)} MB so far")
                command = ["batch", "resume", "--quiet"]
            sending.join(_SECONDS)
            row.seconds = time.monotonic() - begin
            row.wire = loopback_bytes() - before
        row.attempts = sum(item["attempts"] for item in pageferry.last_object(sending)["items"])
        row.equal = _equal(here, there, plan)
    finally:
        shutil.rmtree(there, ignore_errors=True)
        for suffix in ("", "-wal", "-shm"):
            Path(state + suffix).unlink(missing_ok=True)
    say(f"{row.what}: {row.seconds:.1f} s, {megabytes(row.wire)} MB")
    return row


def _options(plan: Plan) -> list[str]:
    """Soon again where the receiver still holds what a killed batch left."""
    found = [
        "--parallel",
        str(plan.parallel),
        "--codec",
        plan.codec,
        "--backoff",
        "200ms",
        "--quiet",
    ]
    if plan.workers:
        found += ["--workers", str(plan.workers)]
    if plan.rate:
        found += ["--max-bandwidth", str(plan.rate)]
    return found


@contextlib.contextmanager
def _receiver(lab: Lab, plan: Plan, there: str) -> Iterator[str]:
    """One for all runs of a batch, with room for what a killed one leaves for some seconds."""
    receive = lab.start(
        [*lab.pageferry, "receive", "--listen", "tcp://127.0.0.1:0", "--into", f"image:{there}/",
         "--at-once", str(2 * plan.parallel), "--json", "--quiet"]
    )  # fmt: skip
    try:
        yield wait_for("the receiver to listen", lambda: pageferry.endpoint_of(receive))
    finally:
        receive.kill()


def _reached(sending: Child, moment: float) -> bool:
    """Wait for so many bytes on the wire; False if the batch ends before."""
    while loopback_bytes() < moment:
        if not sending.running():
            return False
        time.sleep(_LOOK_SECONDS)
    return sending.running()


def _kill(sending: Child) -> bool:
    """SIGKILL for the batch's own process, nothing else; its processes are to end by themselves.
    False if it ended before."""
    if not sending.running():
        return False
    os.kill(sending.pid, signal.SIGKILL)
    wait_for("the end of a killed batch's processes", lambda: not members(sending), 10.0)
    sending.join(check=False)
    for name in os.listdir("/dev/shm"):  # killed between making a segment and saying whose it is
        if name.startswith(f"pageferry-{sending.pid}-"):
            os.unlink(f"/dev/shm/{name}")
    return sending.code == -signal.SIGKILL
