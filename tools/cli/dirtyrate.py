"""`pageferry dirtyrate SOURCE`: how fast a guest writes, without moving it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from ...pipeline.dirty_rate import DIRTY_BITMAP, PAGE_SAMPLING, Asked
from ...pipeline.measuring import dirty_rate
from ...transport.errors import Cancelled
from ...transport.pages import PAGE_SIZE
from ...transport.quantities import format_bytes, format_rate, format_seconds, parse_duration
from ...workers.guests import parse_guest
from .options import integer
from .running import Interrupts


@click.command("dirtyrate")
@click.argument("source")
@click.option("--seconds", metavar="N", default="1", show_default=True,
              help="How long writes are looked at (QEMU: calc-time).")  # fmt: skip
@click.option("--mode", metavar="MODE", default="",
              help=f"{DIRTY_BITMAP}: the kernel tracks what is written; {PAGE_SAMPLING}: some "
              f"pages are compared. Default: tracking where that can be.")  # fmt: skip
@click.option("--sample-pages", metavar="N", help=f"Pages of a GiB that are compared, with --mode "
              f"{PAGE_SAMPLING}. Default: 512, and 16384 in all at the least.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="QEMU's DirtyRateInfo, and more.")
def dirtyrate_command(
    source: str, seconds: str, mode: str, sample_pages: str | None, as_json: bool
) -> None:
    """Measure how fast the guest SOURCE writes. It is neither stopped nor changed.

    \b
    pageferry dirtyrate qemu:/run/vm/pageferry.qmp --seconds 5
    pageferry dirtyrate pid:4711 --mode page-sampling
    """
    where = parse_guest(source)
    asked = Asked(seconds_of(seconds), mode, integer("sample-pages", sample_pages) or 0).checked()

    async def main() -> dict[str, Any]:
        with Interrupts().installed():
            try:
                return await dirty_rate(where, asked)
            except asyncio.CancelledError:
                raise Cancelled("interrupted; the source is as it was") from None

    found = asyncio.run(main())
    print(json.dumps(found) if as_json else told(found), flush=True)


def seconds_of(text: str) -> float:
    """Seconds: a bare number is seconds here, as QEMU's calc-time."""
    return parse_duration(f"{text}s" if text.replace(".", "", 1).isdecimal() else text)


def told(found: dict[str, Any]) -> str:
    """A measurement as a person reads it."""
    rows = [("dirty rate", _rate(found)), ("working set", _working_set(found))]
    rows.append(("mode", _mode(found)))
    if found["mode"] != "none":
        rows.append(("cost", _cost(found)))
    if found["saturated"]:
        rows.append(("", "most of its memory was written: it may write faster than that"))
    return "\n".join(f"{name:<15}{text}" for name, text in rows)


def _rate(found: dict[str, Any]) -> str:
    pages = found["dirty-pages-rate"]
    text = f"{format_rate(pages * PAGE_SIZE)}, {pages} pages a second"
    if "margin" in found:
        text += f", give or take {found['margin']:.0%}"
    return text


def _working_set(found: dict[str, Any]) -> str:
    parts = [
        f"{format_bytes(look['pages'] * PAGE_SIZE)} in {format_seconds(look['time'] / 1000)}"
        for look in found["working-set"]
    ]
    return f"{', '.join(parts)}; of {format_bytes(found['pages'] * PAGE_SIZE)}"


def _mode(found: dict[str, Any]) -> str:
    if found["mode"] == "none":
        return "none: nobody writes it"
    text = str(found["mode"])
    if "sampled-pages" in found:
        text += f": {found['sampled-pages']} pages were compared"
    if "dirty-tracking-because" in found:
        text += f" ({found['dirty-tracking-because']})"
    return text


def _cost(found: dict[str, Any]) -> str:
    cost = found["cost"]
    text = f"{cost['cpu-time']:.0f} ms of processor time here"
    if found["mode"] == PAGE_SAMPLING:
        return f"{text}; the guest is only read"
    text += (
        f"; the guest took {cost['faults']} faults, {cost['guest-slow-down']:.2%} of a processor"
    )
    if "attach-pause-us" in found:
        text += f", and stood still for {found['attach-pause-us'] / 1000:.1f} ms"
    return text
