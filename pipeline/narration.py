"""What happens in a migration, in words for its log. Pure: events and reports in, sentences out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..transport.messages import Block, Hello, Offer, Welcome
from ..transport.pages import PAGE_SIZE
from ..transport.quantities import format_bytes, format_rate, format_seconds
from . import migration as core
from .convergence import Convergence
from .parameters import Parameters


def narrate(
    state: core.Migration, event: core.Event, instructions: Sequence[core.Instruction]
) -> Iterable[str]:
    """What `event` was, and what the core made of it; nothing for what others tell."""
    match event:
        case core.Taken():
            yield _taken(event, state)
        case core.RoundDone():
            again = any(isinstance(i, core.SendRound) for i in instructions)
            yield _round(event, state.round - again)
        case core.CancelAsked():
            yield "somebody asked to cancel it"
        case core.PostcopyAsked():
            yield "somebody asked to start the guest at the destination now"
        case core.ContinueAsked():
            yield "somebody asked to go on"
        case core.MayStop(seconds):
            yield f"it may be stopped, after {format_seconds(seconds)}"
        case core.RecoverAsked():
            yield f"somebody asked to recover{f' at {event.where}' if event.where else ''}"
        case core.Reconnected():
            yield f"connected again: {_pages(event.pages)} still to be sent"
    for instruction in instructions:
        match instruction:
            case core.StopGuest() if state.leaving:
                yield f"the guest is started there before its memory: {_why(state)}"
            case core.StopGuest():
                yield f"switching over: {_expected(state.convergence, state.remaining)}"
            case core.Pause(error):
                yield f"paused: {error.message}"


def why(instructions: Sequence[core.Instruction]) -> str:
    """Why it is over, if it is and not because it is done."""
    ends = [i for i in instructions if isinstance(i, core.Finish)]
    return ends[0].error.message if ends and ends[0].error is not None else ""


def _taken(event: core.Taken, state: core.Migration) -> str:
    text = f"{_pages(event.pages)} to send"
    if state.stopped:
        return f"the guest stands still: {text}"
    if not event.since or not state.live:
        return text
    rate = format_rate(event.written * PAGE_SIZE / event.since)
    text += f", {event.written} written in {format_seconds(event.since)} ({rate})"
    return f"{text}; {_expected(state.convergence, event.pages)}" if state.can_stop else text


def _expected(convergence: Convergence, pages: int) -> str:
    expected = format_seconds(convergence.expected_downtime(pages))
    return f"a downtime of {expected} is expected, {_limit(convergence)}"


def _limit(convergence: Convergence) -> str:
    return f"the limit is {format_seconds(convergence.downtime_limit)}"


def _why(state: core.Migration) -> str:
    if state.asked:
        return "somebody asked"
    if state.round == 0 or state.after is not None:
        return f"--postcopy {state.postcopy}"
    return f"precopy would not get there; {_expected(state.convergence, state.remaining)}"


def _round(event: core.RoundDone, number: int) -> str:
    rate = format_rate(event.pages * PAGE_SIZE / max(event.seconds, 1e-6))
    text = (
        f"round {number}: {_pages(event.pages)}, {event.zero} of them zero, in "
        f"{format_seconds(event.seconds)} ({rate}), {format_bytes(event.wire)} on the wire"
    )
    return f"{text}; {event.lost} pages go again" if event.lost else text


def _pages(count: int) -> str:
    return f"{count} pages ({format_bytes(count * PAGE_SIZE)})"


def _memory(blocks: Sequence[Block]) -> str:
    size = format_bytes(sum(block.size for block in blocks))
    return f"{size} in {len(blocks)} block{'s' * (len(blocks) != 1)}"


def settings(parameters: Parameters) -> str:
    """What a migration was asked to be like."""
    told = parameters.qmp().items()
    return "settings: " + ", ".join(f"{name}={value}" for name, value in told)


def connected(welcome: Welcome, there: str, kind: str, blocks: Sequence[Block]) -> str:
    """At the source, when the destination has agreed."""
    fresh = sum(welcome.fresh)
    return (
        f"connected to {there}, pageferry {welcome.version}: {kind}, {_memory(blocks)}, "
        f"{len(welcome.endpoints)} channels; {fresh} of the blocks fresh there"
    )


def offered(offer: Offer, there: str) -> str:
    """At a restore, when the source has said what it has."""
    return (
        f"connected to {there}, pageferry {offer.version}: snapshot {offer.uuid!r}, "
        f"{_memory(offer.blocks)}, {offer.workers} channels"
    )


def arrived(hello: Hello) -> str:
    """At the destination, when somebody says Hello."""
    name = f" {hello.name!r}" if hello.name else ""
    postcopy = f", {' '.join(hello.capabilities)}" if hello.capabilities else ""
    return (
        f"a source is here, pageferry {hello.version}: {hello.kind}{name}, "
        f"{_memory(hello.blocks)}, {hello.workers} channels{postcopy}"
    )


def ended(report: dict[str, Any]) -> str:
    """The last line of one end."""
    ram = report["ram"]
    return (
        f"{report['status']} after {format_seconds(report['total-time'] / 1000)}: "
        f"{ram['normal']} pages with content, {ram['duplicate']} zero, "
        f"{format_bytes(report['wire-bytes'])} on the wire, "
        f"{report['lost-frames']} frames lost"
    )
