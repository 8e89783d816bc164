"""What the live view costs the migration that it shows: nobody looks, many do, some do badly.

Each round moves the same image, then a running demo guest, without --web, with it unwatched,
watched by a dozen browsers that read everything, by a dozen that never read, and under a storm of
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...transport.quantities import format_bytes
from . import content, pageferry
from .lab import Lab, free_port, remove, say
from .table import median, number, ratio, ratio_text, render

_MANY = 12
_AGAIN_SECONDS = 0.02
_REQUEST = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
PARTS = ("no view", "nobody looks", "12 look", "12 do not read", "a storm")


@dataclass
class Plan:
    """What to measure. Sizes in bytes."""

    size: int
    reps: int


async def _ask(port: int, path: bytes, read: bool) -> None:
    """One request; all that is answered, or none of it for as long as it takes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_REQUEST % path)
        while read and await reader.read(1 << 18):
            pass
        if not read:
            await asyncio.Event().wait()
    finally:
        writer.transport.abort()


async def _again(ask: Callable[[], Awaitable[None]]) -> None:
    while True:
        with contextlib.suppress(OSError):
            await ask()
        await asyncio.sleep(_AGAIN_SECONDS)


_LOOKERS: dict[str, tuple[bytes, bool]] = {
    "12 look": (b"events", True),
    "12 do not read": (b"events", False),
    "a storm": (b"metrics", True),
}


@contextlib.contextmanager
def _looked_at(part: str, port: int) -> Iterator[None]:
    """From a thread of this process, which has nothing else to do meanwhile."""
    if part not in _LOOKERS:
        yield
        return
    path, read = _LOOKERS[part]
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(_again(lambda: _ask(port, path, read))) for _ in range(_MANY)]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for task in tasks:
            loop.call_soon_threadsafe(task.cancel)
        ended = asyncio.run_coroutine_threadsafe(_all(tasks), loop)
        ended.result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _all(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """All parts in turn."""
    source, destination = lab.path("source"), lab.path("destination")
    content.make(source, "half", plan.size)
    rows: list[dict[str, Any]] = []
    for rep in range(plan.reps):
        for part in PARTS:
            remove(destination)
            image = _run(lab, part, f"image:{source}", f"ram:{destination}", [])
            demo = _run(lab, part, f"demo:?size={plan.size}&rate=20000", "demo:", [])
            rows.append({
                "part": part, "rep": rep, "image": image.total, "demo": demo.total,
                "downtime": demo.report.get("downtime"), "cpu": image.cpu["both"],
            })  # fmt: skip
            say(f"{part}, {rep + 1} of {plan.reps}")
    title = f"an image of {format_bytes(plan.size)}, and a demo guest of that size, on this host"
    return f"{title}\n{_table(rows)}", rows


def _run(
    lab: Lab, part: str, source: str, destination: str, options: list[str]
) -> pageferry.Outcome:
    port = free_port()
    web = [] if part == PARTS[0] else ["--web", str(port)]
    with _looked_at(part, port):
        return pageferry.copy(lab, source, destination, [*options, *web])


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("", "image s", "times as fast", "demo s", "downtime ms", "CPU s (image)")
    plain = {row["rep"]: row["image"] for row in rows if row["part"] == PARTS[0]}
    lines = []
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        speed = ratio({row["rep"]: row["image"] for row in mine}, plain)
        downtimes = [row["downtime"] for row in mine if row["downtime"] is not None]
        lines.append([
            part, number(median([row["image"] for row in mine])), ratio_text(speed),
            number(median([row["demo"] for row in mine])),
            f"{median(downtimes):.0f}" if downtimes else "-",
            number(median([row["cpu"] for row in mine])),
        ])  # fmt: skip
    return render(header, lines)
