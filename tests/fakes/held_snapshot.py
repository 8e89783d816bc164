"""A live snapshot of process PID to PATH that stops short after its instant, as a program: it says
"held PID-OF-GUARD" and does no more. Whoever started it kills it."""

import asyncio
import sys

from pageferry.pipeline.snapshot import Snapshot
from pageferry.workers.forking import warm_up
from pageferry.workers.guests import open_source, parse_guest


class Held(Snapshot):
    """No extent is given to anybody."""

    def _extents(self):
        print(f"held {self._guard.workers[0].process.pid}", flush=True)
        sys.stdin.read()
        return iter(())


def main(pid, path):
    warm_up()
    guest = open_source(parse_guest(f"pid:{pid}?tracking=content-hash"))
    asyncio.run(Held(guest, path, 1, live=True).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
