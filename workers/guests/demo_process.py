"""The demo guest itself: a process that owns memory and increments one byte per page, in order,
for ever, like the guest of QEMU's migration tests (tests/migration/x86-a-b-bootblock.S).

Its registers say exactly what every byte must be, so a migration that loses or tears one page
is found. It knows nothing of migration but how to hand over its userfaultfd.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...transport.errors import HostLacks
from ...transport.pages import PAGE_SIZE
from ..kernel import userfaultfd
from ..kernel.libc import die_with_parent, set_process_name
from ..segments import Segment
from .handover import Mapping, send_mappings

CONTENTS = ("zero", "text", "random")
# Content is made this many bytes at a time.
_CHUNK = 16 << 20
# Pages touched between two looks at the pipe: a stop takes effect within about 100 us.
_BURST = 256
# A guest with a rate wakes this often.
_TICK = 0.001


class Registers(msgspec.Struct):
    """The demo guest's device state.

    `position`: the next page to increment; `passes`: complete rounds over memory; `rate`:
    pages a second, 0 for as fast as it can.
    """

    position: int
    passes: int
    rate: int
    content: str
    seed: int


class Verdict(msgspec.Struct, rename="kebab"):
    """What the oracle found. `wrong_pages` is 0 in a guest that lost nothing."""

    pages: int
    wrong_pages: int
    passes: int
    position: int
    ran_on: int
    ok: bool


class Command(msgspec.Struct, frozen=True):
    """To the guest: run, stop, load, check, quit."""

    what: str
    registers: Registers | None = None


class Answer(msgspec.Struct, frozen=True):
    """From the guest."""

    registers: Registers
    verdict: Verdict | None = None


def _text_block(seed: int) -> npt.NDArray[np.uint8]:
    """Text-like data: words drawn with a Zipf law, 1 MiB, the same for the same seed."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(4000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    text = " ".join(draw.choices(words, weights, k=300_000)).encode()
    return np.frombuffer(text[: 1 << 20], np.uint8)


class Content:
    """What memory held before the first increment. Byte 0 of each page is 0."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self._text = _text_block(seed) if kind == "text" else None

    def chunk(self, index: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes [index * 16 MiB, … + size), shape (pages, 4096)."""
        if self.kind == "random":
            generator = np.random.Generator(np.random.PCG64([self.seed, index]))
            flat = np.frombuffer(bytearray(generator.bytes(size)), np.uint8)
        elif self._text is not None:
            turned = np.roll(self._text, index * 40961)
            flat = np.resize(turned, size)
        else:
            flat = np.zeros(size, np.uint8)
        pages = flat.reshape(-1, PAGE_SIZE)
        pages[:, 0] = 0
        return pages


def check(memory: npt.NDArray[np.uint8], registers: Registers, ran_on: int) -> Verdict:
    """The oracle: every byte against the registers, shape (pages, 4096).

    QEMU's rule (each page equals the one before it, or is one behind, once) follows from it.
    """
    n, wrong = len(memory), 0
    content = Content(registers.content, registers.seed)
    step = _CHUNK // PAGE_SIZE
    for first in range(0, n, step):
        pages = memory[first : first + step]
        expected = content.chunk(first // step, pages.size).copy()
        number = np.arange(first, first + len(pages))
        expected[:, 0] = (registers.passes + (number < registers.position)) % 256
        same = (pages.view(np.uint64) == expected.view(np.uint64)).all(axis=1)
        wrong += int(np.count_nonzero(~same))
    return Verdict(n, wrong, registers.passes, registers.position, ran_on, wrong == 0)


class DemoGuest:
    """The guest's processor."""

    def __init__(self, pipe: Connection, segment: Segment, registers: Registers) -> None:
        self.pipe = pipe
        flat: npt.NDArray[np.uint8] = segment.array(np.uint8, segment.size)
        self.memory = flat.reshape(-1, PAGE_SIZE)
        self.counters = self.memory[:, 0]
        self.registers = registers
        self.steps = 0

    def fill(self) -> None:
        """Give memory its first content."""
        if self.registers.content == "zero":
            return
        content = Content(self.registers.content, self.registers.seed)
        step = _CHUNK // PAGE_SIZE
        for first in range(0, len(self.memory), step):
            part = self.memory[first : first + step]
            part[:] = content.chunk(first // step, part.size)

    def step(self, pages: int) -> None:
        """Increment one byte in each of the next `pages` pages, in order."""
        while pages > 0:
            r = self.registers
            n = min(pages, _BURST, len(self.memory) - r.position)
            self.counters[r.position : r.position + n] += 1
            r.position += n
            if r.position == len(self.memory):
                r.position, r.passes = 0, r.passes + 1
            pages -= n
            self.steps += n

    def run(self) -> None:
        """Run until told otherwise."""
        begin, done = time.monotonic(), 0
        while not self.pipe.poll(0 if not self.registers.rate else _TICK):
            due = _BURST
            if self.registers.rate:
                due = min(int((time.monotonic() - begin) * self.registers.rate) - done, _BURST)
                due = max(due, 0)
                if due == _BURST:  # never owes more than a burst a look
                    begin, done = time.monotonic(), -_BURST
            self.step(due)
            done += due

    def serve(self) -> None:
        """Obey until told to quit."""
        while True:
            command = msgspec.msgpack.decode(self.pipe.recv_bytes(), type=Command)
            verdict = None
            match command.what:
                case "load":
                    assert command.registers is not None
                    self.registers = command.registers
                    self.steps = 0
                case "check":
                    verdict = check(self.memory, self.registers, self.steps)
                case "quit":
                    return
            self.pipe.send_bytes(msgspec.msgpack.encode(Answer(self.registers, verdict)))
            if command.what == "run":
                self.run()


def _track_writes(memory: npt.NDArray[Any]) -> int:
    """A userfaultfd over `memory` that tracks writes; -1 where the kernel cannot."""
    try:
        uffd = userfaultfd.create_tracking()
        userfaultfd.register_write_protect(uffd, memory.ctypes.data, memory.nbytes)
    except (HostLacks, OSError):
        return -1
    return uffd


def main(pipe: Connection, segment: Segment, registers: Registers, handover: str) -> None:
    """The process. `handover`: where to hand over the userfaultfd; "" at the destination."""
    die_with_parent(os.getppid())
    set_process_name("pf-demo-guest")
    guest = DemoGuest(pipe, segment, registers)
    if handover:
        guest.fill()
        uffd = _track_writes(guest.memory)
        mapping = Mapping(guest.memory.ctypes.data, guest.memory.nbytes, 0, PAGE_SIZE)
        send_mappings(handover, [mapping], [uffd] if uffd >= 0 else [])
        # the coordinator holds a duplicate; ours keeps the registration while we live
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        guest.serve()
