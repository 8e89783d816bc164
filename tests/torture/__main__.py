"""Runs cells of the fault matrix, many at the same time: a JSON line for what came of each.

    python tests/torture [--cells FILE] [--only TEXT] [--at-once N]
    python tests/torture --full docs/torture.md        (make torture)

The full form has larger guests and several channels, repeats each cell, then does faults at random
moments, and writes the table of docs/torture.md.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time

from cells import cells, cells_at_random
from hosts import Nursery
from kinds import run_cell
from table import write

# Cells that are being started at the same time, and that are there.
_STARTING, _AT_ONCE = 2, 12
_FULL = {"size": "32M", "workers": 2, "varied": True}


async def run_all(wanted, at_once, told, **how):
    """`wanted`: (cell, seed); `told(cell, result)` of each that is over."""
    nursery = Nursery()
    room, starting = asyncio.Semaphore(at_once), asyncio.Semaphore(_STARTING)

    async def one(cell, seed):
        async with room:
            told(cell, await run_cell(cell, nursery, starting, seed=seed, **how))

    try:
        await asyncio.gather(*(one(cell, seed) for cell, seed in wanted))
    finally:
        nursery.close()


def _say(cell, result):
    print(json.dumps(result.as_dict()), flush=True)


def _full(path, at_once, seed, repeats, at_random):
    """The whole matrix, then random moments; True if all was as it should be."""
    draw, begin = random.Random(seed), time.monotonic()
    print(f"seed {seed}", file=sys.stderr)
    every = list(cells()) * repeats
    anywhere = [draw.choice(cells_at_random()) for _ in range(at_random)]
    results = []

    def told(cell, result):
        results.append((cell, result))
        print(f"{len(results)} of {len(every) + at_random}: {result.cell}: "
              f"{result.skipped or result.wrong or result.observed}", file=sys.stderr)  # fmt: skip

    wanted = [(cell, draw.randrange(1 << 32)) for cell in (*every, *anywhere)]
    asyncio.run(run_all(wanted, at_once, told, **_FULL))
    with open(path, "w", encoding="utf-8") as file:
        write(file, results, seed=seed, seconds=time.monotonic() - begin, size=_FULL["size"])
    return not any(result.wrong for _, result in results)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", help="a file with names of cells, - for stdin")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--at-once", type=int, default=_AT_ONCE)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--full", metavar="FILE", help="where the table goes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-random", type=int, default=200)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cells clean up
    if given.full:
        how = (given.at_once, given.seed, given.repeats, given.at_random)
        sys.exit(not _full(given.full, *how))
    names = None
    if given.cells:
        with open(0 if given.cells == "-" else given.cells, encoding="utf-8") as file:
            names = set(file.read().splitlines())
    wanted = [
        (cell, given.seed) for cell in (*cells(), *cells_at_random())
        if given.only in str(cell) and (names is None or str(cell) in names)
    ]  # fmt: skip
    begin = time.monotonic()
    asyncio.run(run_all(wanted, given.at_once, _say))
    print(f"{len(wanted)} cells, {time.monotonic() - begin:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
