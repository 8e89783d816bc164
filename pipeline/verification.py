"""The source's side of verification: what it asks the destination, and which blocks differ.

Knows digests, and who makes them. What is verified when, and what becomes of it, is migration.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..transport import messages
from ..transport.errors import RemoteProtocolError
from ..workers import jobs
from ..workers.checks import pack_chunks
from ..workers.digest import block_digest, part_count
from ..workers.ram import RamBlock
from .control import Ask
from .crew import Crew
from .tasks import Tasks


@dataclass(frozen=True)
class Verdict:
    """`wrong`: names of the blocks that differ; `digests`: of all, if none does."""

    wrong: tuple[str, ...]
    digests: list[str]


async def verify_sums(ask: Ask, blocks: list[RamBlock], kept: list[list[bool]]) -> Verdict:
    """Each frame was compared when it was placed: what is left is what no frame was of. `kept`:
    chunks of each block that the destination has by their digests."""
    answer = await ask(messages.DigestRequest([pack_chunks(chunks) for chunks in kept]))
    assert isinstance(answer, messages.Digests)
    if len(answer.wrong) != len(blocks):
        raise RemoteProtocolError("Digests does not match what was asked for")
    wrong = tuple(b.name for b, n in zip(blocks, answer.wrong, strict=True) if n)
    return Verdict(wrong, [messages.PAGE_SUMS] * len(blocks))


async def verify_digests(ask: Ask, blocks: list[RamBlock], crew: Crew, tasks: Tasks) -> Verdict:
    """Both ends read all of it, at the same time."""
    theirs = tasks.start(ask(messages.DigestRequest()))
    parts = [[b""] * part_count(block.pages) for block in blocks]
    todo: Iterator[jobs.AnyJob] = (
        jobs.Digest(i, part) for i, digests in enumerate(parts) for part in range(len(digests))
    )

    def keep(reply: jobs.DigestDone) -> None:
        parts[reply.block][reply.part] = reply.digest

    await crew.distribute(todo, jobs.DigestDone, keep)
    answer = await theirs
    assert isinstance(answer, messages.Digests)
    ours = [block_digest(digests) for digests in parts]
    if len(answer.digests) != len(ours):
        raise RemoteProtocolError(f"{len(answer.digests)} digests for {len(ours)} blocks")
    wrong = tuple(
        block.name for block, a, b in zip(blocks, ours, answer.digests, strict=True) if a != b
    )
    return Verdict(wrong, [digest.hex() for digest in ours])
