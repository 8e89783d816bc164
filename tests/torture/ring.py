"""A process that knows nothing of pageferry and writes its memory all the time, by a law that holds
at every instant: page i has the newest number that is i modulo the number of pages, and behind it
what it always had. So whatever was saved or moved of it is of one instant, or is seen not to be.
"""

import asyncio
import mmap
import os
import random
import time

from pageferry.workers.kernel.libc import die_with_parent
from pageferry.workers.kernel.tasks import is_stopped, threads_of

PAGE = 4096
_TICK_SECONDS = 0.01
_SECONDS = 20.0


# ---- the process -------------------------------------------------------------------------


def serve(spec, wire):
    """Write until somebody ends it: `rate` pages a second."""
    die_with_parent(os.getppid())
    with open(spec["path"], "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    words = memoryview(memory).cast("Q")  # one store each
    pages = len(memory) // PAGE
    number, step = pages - 1, max(1, round(spec["rate"] * _TICK_SECONDS))
    wire.say("up", pid=os.getpid(), server=0)
    while True:
        for _ in range(step):
            number += 1
            words[number % pages * (PAGE // 8)] = number
        time.sleep(_TICK_SECONDS)


# ---- whoever looks at it -----------------------------------------------------------------


def first(pages, seed):
    """What its memory is when it begins."""
    draw = random.Random(seed)
    return b"".join(n.to_bytes(8, "little") + draw.randbytes(PAGE - 8) for n in range(pages))


class Ring:
    """Its memory in a file, and the process `end`, once that is there."""

    def __init__(self, path, pages, seed):
        self.path, self.content = path, first(pages, seed)
        self.end = None
        with open(path, "xb") as file:
            file.write(self.content)

    @property
    def pid(self):
        return self.end.pid

    def memory(self):
        with open(self.path, "rb") as file:
            return file.read()

    def fault(self, data):
        """What is wrong with `data` as its memory at one instant; "" if nothing is."""
        if len(data) != len(self.content):
            return f"{len(data)} bytes in place of {len(self.content)}"
        pages = len(data) // PAGE
        numbers = [int.from_bytes(data[i * PAGE : i * PAGE + 8], "little") for i in range(pages)]
        newest = max(numbers)
        for i, number in enumerate(numbers):
            if number != newest - (newest - i) % pages:
                return f"page {i} has {number}, and the newest is {newest}"
            where = slice(i * PAGE + 8, (i + 1) * PAGE)
            if data[where] != self.content[where]:
                return f"page {i} is not what it was"
        return ""

    def _newest(self):
        data = self.memory()
        return max(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), PAGE))

    def ended(self):
        return not self.end.alive()

    def is_bound(self):
        """What is left of its throttle; "" if nothing is."""
        notes = [name for name in os.listdir("/dev/shm") if name.endswith("-throttled")]
        for name in notes:
            with open(f"/dev/shm/{name}", encoding="utf-8") as note:
                if f'"pid": {self.pid},' in note.read():
                    return name
        for task in threads_of(self.pid):
            with open(f"/proc/{self.pid}/task/{task}/cgroup", encoding="utf-8") as groups:
                if "pageferry-" in (found := groups.read()):
                    return found
        return ""

    async def look(self):
        """It is gone, stands still, runs, or is slowed down still."""
        if self.ended():
            return "is gone"
        until, before = time.monotonic() + _SECONDS, self._newest()
        why = "does not run"
        while time.monotonic() < until:
            if is_stopped(self.pid) and not self.is_bound():
                return "stands still"
            try:
                why = self.is_bound()
            except OSError:  # it came, or went, just now
                why = "?"
            if not why and self._newest() != before:
                return "runs"
            await asyncio.sleep(0.02)
        return f"is slowed down: {why}" if why else "does not run"
