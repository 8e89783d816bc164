"""A page-fault client that behaves as Firecracker does when it restores a snapshot, or misbehaves.

    python -m pageferry.tools.uffd_client --socket PATH --image SNAPSHOT

Maps anonymous memory, registers it with a userfaultfd, hands that over on a unix socket (a JSON
array of mappings, the descriptor beside it) and keeps the connection while it lives. Then it
reads every page in a random order, gives some back (madvise, as a balloon does) and compares
with the snapshot. An example for who integrates a monitor, and what the tests drive.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import sys
import time

from ..workers.guests.handover import hand_over
from ..workers.kernel import userfaultfd
from ..workers.placing import address_of

_PAGE, _HUGE = 4096, 2 << 20
_MAP_HUGETLB = 0x40000
KINDS = (
    "garbage", "no-descriptor", "silent", "gone", "overlap", "outside", "odd-pages", "huge-number",
)  # fmt: skip


class Memory:
    """Guest memory as the monitor maps it: anonymous, with nothing in it."""

    def __init__(self, size: int, huge: bool) -> None:
        self.page_size = _HUGE if huge else _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB if huge else 0)
        self.map = mmap.mmap(-1, size, flags=flags)
        if not huge:
            self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.address = address_of(memoryview(self.map))
        self.size = size
        self.uffd = userfaultfd.create_missing(userfaultfd.FEATURE_EVENT_REMOVE)
        userfaultfd.register_missing(self.uffd, self.address, size)

    def mappings(self, regions: int) -> list[dict[str, int]]:
        """The memory in `regions` stretches, as Firecracker has one below and one above 4 GiB."""
        part = self.size // regions // self.page_size * self.page_size
        edges = [part * i for i in range(regions)] + [self.size]
        return [
            {
                "base_host_virt_addr": self.address + a,
                "size": b - a,
                "offset": a,
                "page_size": self.page_size,
                "page_size_kib": self.page_size,
            }
            for a, b in itertools.pairwise(edges)
        ]


def read_all(memory: Memory, image: bytes, seed: int, remove: int) -> tuple[int, list[float]]:
    """Touch every page in a random order, `remove` stretches given back between; wrong pages, and
    what each touch took, in microseconds."""
    draw = random.Random(seed)
    pages = list(range(0, memory.size, memory.page_size))
    draw.shuffle(pages)
    expected = bytearray(image[: memory.size])
    turns = set(draw.sample(range(len(pages)), min(remove, len(pages))))
    waits: list[float] = []
    wrong = 0
    for i, at in enumerate(pages):
        if i in turns:
            _give_back(memory, expected, draw)
        begin = time.perf_counter_ns()
        memory.map[at]
        waits.append((time.perf_counter_ns() - begin) / 1000)
        if memory.map[at : at + memory.page_size] != expected[at : at + memory.page_size]:
            wrong += 1
    for at in range(0, memory.size, memory.page_size):
        if memory.map[at : at + memory.page_size] != expected[at : at + memory.page_size]:
            wrong += 1
    return wrong, waits


def _give_back(memory: Memory, expected: bytearray, draw: random.Random) -> None:
    count = draw.randint(1, 16)
    start = draw.randrange(0, memory.size // memory.page_size) * memory.page_size
    length = min(count * memory.page_size, memory.size - start)
    memory.map.madvise(mmap.MADV_DONTNEED, start, length)
    expected[start : start + length] = bytes(length)


def misbehave(path: str, kind: str, memory: Memory) -> None:
    """Hand over what no monitor should."""
    mappings = memory.mappings(1)
    message, descriptors = json.dumps(mappings).encode(), [memory.uffd]
    match kind:
        case "garbage":
            message = b"\xff\x00 this is no handover {["
        case "no-descriptor":
            descriptors = []
        case "silent" | "gone":
            message, descriptors = b"", []
        case "overlap":
            message = json.dumps(mappings * 2).encode()
        case "outside":
            message = json.dumps([mappings[0] | {"offset": memory.size * 16}]).encode()
        case "odd-pages":
            message = json.dumps([mappings[0] | {"page_size": 3000}]).encode()
        case "huge-number":
            message = json.dumps([mappings[0] | {"size": 1 << 70}]).encode()
    connection = hand_over(path, message, descriptors)
    if kind == "silent":
        connection.recv(1)  # until it is turned away
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--socket", required=True, help="where `pageferry restore` listens")
    parser.add_argument("--image", required=True, help="the snapshot, to compare with")
    parser.add_argument("--regions", type=int, default=2)
    parser.add_argument("--huge", action="store_true", help="pages of 2 MiB")
    parser.add_argument("--remove", type=int, default=0, help="stretches to give back meanwhile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--second-descriptor", action="store_true", help="send a memory file too")
    parser.add_argument("--misbehave", choices=KINDS)
    parser.add_argument("--die-after", type=int, default=-1, help="exit after so many pages")
    options = parser.parse_args()
    with open(options.image, "rb") as f:
        image = f.read()
    page = _HUGE if options.huge else _PAGE
    memory = Memory(len(image) // page * page, options.huge)
    if options.misbehave:
        misbehave(options.socket, options.misbehave, memory)
        return
    descriptors = [memory.uffd]
    if options.second_descriptor:
        descriptors.append(os.memfd_create("guest-memory"))
    message = json.dumps(memory.mappings(options.regions)).encode()
    connection = hand_over(options.socket, message, descriptors)
    if options.die_after >= 0:
        for at in range(0, options.die_after * memory.page_size, memory.page_size):
            memory.map[at]
        os._exit(0)
    wrong, waits = read_all(memory, image, options.seed, options.remove)
    waits.sort()
    print(json.dumps({
        "pages": len(waits), "wrong-pages": wrong, "p50": waits[len(waits) // 2],
        "p99": waits[len(waits) * 99 // 100], "max": waits[-1],
    }), flush=True)  # fmt: skip
    # the connection says that we live; the restore ends when all memory is there
    connection.recv(1)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
