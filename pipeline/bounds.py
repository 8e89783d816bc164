"""What keeps a migration from being faster, by what trials of it used: the processors of senders,
of receivers, of one host that is both, the link, or the first touch of memory. Pure.

Measured numbers in, words out. Nothing here is a model: whoever is busy nearly all the time is the
bound, and a link is one when what is on it does not grow though nobody is busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..transport.quantities import format_rate
from .tuning import Book, Measured, Setting

# Busy for this share of the time is all the time: some of it goes to being woken.
_BUSY = 0.85
# This near to the most that was ever on the wire is all that it carries.
_FULL = 0.9
# Who waits less than this is not kept waiting by a link.
_WAITING = 0.3
# The share of the receivers' time from which the first touch of memory is what they do.
_TOUCHING = 0.4

SENDERS, RECEIVERS, LINK, TOUCH, HOST, LATENCY = (
    "sender-cpu", "receiver-cpu", "link", "first-touch", "host-cpu", "latency",
)  # fmt: skip


@dataclass(frozen=True)
class Use:
    """What a setting used. Processors: on average, of all senders, of all receivers (None:
    unknown); `waiting`: share of the senders' time that they waited for link or receivers; `wire`:
    bytes a second; `touch`: share of the receivers' processor time that went to pages that were
    written for the first time."""

    workers: int
    senders: float
    receivers: float | None
    waiting: float
    wire: float
    touch: float
    cpus: int  # of the destination

    @classmethod
    def of(cls, runs: Sequence[Measured]) -> Use:
        """Of all `runs` of one setting together."""
        seconds = sum(run.seconds for run in runs)
        received = [run.receiver_cpu for run in runs if run.receiver_cpu is not None]
        receivers = sum(received) if len(received) == len(runs) else None
        touched = sum(run.touch * run.size for run in runs)
        workers = runs[0].setting.workers
        return cls(
            workers,
            sum(run.sender_cpu for run in runs) / seconds,
            None if receivers is None else receivers / seconds,
            sum(run.waited for run in runs) / seconds / workers,
            sum(run.wire for run in runs) / seconds,
            min(1.0, touched / receivers) if receivers else 0.0,
            max(run.cpus for run in runs),
        )


@dataclass(frozen=True)
class Bound:
    """`kind`: one of the names above; `text`: sentences for a person."""

    kind: str
    text: str
    use: Use


def link_rate(book: Book) -> float:
    """The most bytes a second that any setting had on the wire."""
    return max(Use.of(book.good(setting)).wire for setting in book.runs)


def bound_of(book: Book, setting: Setting, *, local: bool, cpus: int) -> Bound:
    """What bounds `setting`. `local`: both ends are on this host, of `cpus` processors."""
    use = Use.of(book.good(setting))
    kind = _kind(book, use, local=local, cpus=cpus)
    return Bound(kind, " ".join([_SAYING[kind], *_figures(use, kind, local, cpus)]), use)


def _kind(book: Book, use: Use, *, local: bool, cpus: int) -> str:
    receivers = use.receivers or 0.0
    if local and use.senders + receivers >= _BUSY * cpus:
        return HOST
    # more senders than processors are busy when these are
    if use.senders >= _BUSY * min(use.workers, cpus):
        return SENDERS
    there = min(use.workers, use.cpus or use.workers)
    # without a codec they do little but write, and one at a time
    writing = use.touch >= _TOUCHING and receivers >= _BUSY
    if writing or receivers >= _BUSY * there:
        return TOUCH if use.touch >= _TOUCHING else RECEIVERS
    full = use.wire >= _FULL * link_rate(book) and use.waiting >= _WAITING
    if not local and full:
        return LINK
    return LATENCY


_SAYING = {
    HOST: "Bound by the processors of this host, which both ends share: what one end saves the "
          "other has.",
    SENDERS: "Bound by the processors of the senders: a cheaper codec, or more of them.",
    RECEIVERS: "Bound by the processors of the receivers.",
    TOUCH: "Bound by the first touch of memory at the destination: the kernel makes each page "
           "when it is first written, for one writer of a file at a time. Memory that is there "
           "already arrives faster.",
    LINK: "Bound by the link: only what makes fewer bytes of it is faster.",
    LATENCY: "Nobody is busy all the time: bound by how fast one wakes the other, or by what else "
             "runs on these hosts.",
}  # fmt: skip


def _figures(use: Use, kind: str, local: bool, cpus: int) -> list[str]:
    plural = "s" if use.workers > 1 else ""
    said = [f"{use.workers} sender{plural} used {use.senders:.1f} processors and waited "
            f"{use.waiting:.0%} of the time"]  # fmt: skip
    if use.receivers is not None:
        said.append(f"the receiver{plural} used {use.receivers:.1f}")
        if use.touch:
            said.append(f"{use.touch:.0%} of that for the first touch of pages")
    if local:
        said.append(f"of {cpus} here")
    said.append(f"{format_rate(use.wire)} were on the wire")
    return [", ".join(said) + "."]
