"""The demo guest itself: a process that owns memory and increments one byte per page, in order,
for ever, like the guest of QEMU's migration tests (tests/migration/x86-a-b-bootblock.S), or in
a pseudo-random order with several processors at once, or more bytes of each page.

Its registers say exactly what every byte must be, so a migration that loses or tears one page
is found. It knows nothing of migration but how to hand over its userfaultfd.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from ...transport.errors import HostLacks
from ...transport.pages import PAGE_SIZE
from ..forking import let_the_server_end
from ..kernel import userfaultfd
from ..kernel.libc import die_with_parent, set_process_name, store_byte
from ..ram import RamFile
from .handover import Mapping, send_mappings

CONTENTS = ("zero", "text", "random")
SEQUENTIAL, RANDOM = "sequential", "random"
ACCESSES = (SEQUENTIAL, RANDOM)
MAX_VCPUS = 64
# Registers are summed and multiplied in 64 bits.
MAX_REGISTER = 1 << 62
# Content is made this many bytes at a time.
_CHUNK = 16 << 20
# Pages touched between two looks at the pipe: a stop takes effect within about 100 us.
_BURST = 256
# The same in random order, and for each of many processors: where each page has to be fetched
# first, which takes about 1 ms, a stop still takes effect within 64 ms.
_RANDOM_BURST, _VCPU_BURST = 64, 16
# A guest with a rate wakes this often.
_TICK = 0.001
# One that is slowed down runs for so long, as QEMU's do, and then not for a while.
SLICE_SECONDS = 0.01
# A touch that took longer and faulted waited for its page: one that is there costs about 1 us.
_WAITED_NS = 15_000
# Waits that are kept: 1.6 MB, more than a guest of 512 MiB can have.
_MAX_WAITS = 200_000
# Tells the generator of page orders from that of content.
_ORDER = 0x6F72646572
# A processor whose page has come does not wait 5 ms for the interpreter.
_SWITCH_SECONDS = 0.0001

_Register = Annotated[int, msgspec.Meta(ge=0, le=MAX_REGISTER)]


class Registers(msgspec.Struct):
    """The demo guest's device state.

    `position`: the next page to increment, a place in the pass's order; `passes`: complete
    rounds over memory; `rate`: pages a second, 0 for as fast as it can; `changes`: bytes of a page
    that are incremented, a power of two, at equal distances from byte 0 on.
    """

    position: _Register
    passes: _Register
    rate: _Register
    content: str
    seed: _Register
    access: str = SEQUENTIAL
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=MAX_VCPUS)] = 1
    changes: Annotated[int, msgspec.Meta(ge=1, le=PAGE_SIZE)] = 1


class Verdict(msgspec.Struct, rename="kebab"):
    """What the oracle found. `wrong_pages` is 0 in a guest that lost nothing."""

    pages: int
    wrong_pages: int
    passes: int
    position: int
    ran_on: int
    ok: bool


class Latency(msgspec.Struct, frozen=True):
    """How long touches waited for their page, in microseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Command(msgspec.Struct, frozen=True):
    """To the guest: run, stop, load, check, arming, latency, throttle, hand-over, protect, quit.

    Any but latency and throttle stops it, too; latency ends the taking of times. throttle: it loses
    `percentage` of its time. hand-over: to a socket at
    `path`, a descriptor by which its writes are seen, before it moves on; protect: one by which
    they are held back.
    """

    what: str
    registers: Registers | None = None
    path: str = ""
    percentage: Annotated[int, msgspec.Meta(ge=0, le=99)] = 0


class Answer(msgspec.Struct, frozen=True):
    """From the guest."""

    registers: Registers
    verdict: Verdict | None = None
    latency: Latency | None = None  # None: nothing waited
    unarmed: str = ""  # why missing pages are not caught
    percentage: int = 0  # of its time that it loses


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


def order_of(registers: Registers, pages: int) -> npt.NDArray[np.int64]:
    """The pages in the order in which the present pass of a guest with random access goes."""
    seeds = [registers.seed, registers.passes, _ORDER]
    return np.random.Generator(np.random.PCG64(seeds)).permutation(pages)


def _ahead(registers: Registers, pages: int) -> npt.NDArray[np.bool_]:
    """Which pages the present pass has been at."""
    ahead = np.zeros(pages, np.bool_)
    if registers.access == RANDOM:
        ahead[order_of(registers, pages)[: registers.position]] = True
    else:
        ahead[: registers.position] = True
    return ahead


def check(memory: npt.NDArray[np.uint8], registers: Registers, ran_on: int) -> Verdict:
    """The oracle: every byte against the registers, shape (pages, 4096).

    QEMU's rule (each page equals the one before it, or is one behind, once) follows from it.
    """
    n, wrong = len(memory), 0
    content = Content(registers.content, registers.seed)
    ahead = _ahead(registers, n)
    step = _CHUNK // PAGE_SIZE
    for first in range(0, n, step):
        pages = memory[first : first + step]
        expected = content.chunk(first // step, pages.size).copy()
        passes = (registers.passes + ahead[first : first + step]) % 256
        expected[:, :: PAGE_SIZE // registers.changes] += passes.astype(np.uint8)[:, None]
        same = (pages.view(np.uint64) == expected.view(np.uint64)).all(axis=1)
        wrong += int(np.count_nonzero(~same))
    return Verdict(n, wrong, registers.passes, registers.position, ran_on, wrong == 0)


def _touch(addresses: list[int], value: int) -> list[int]:
    """Store `value` at each address; nothing of how long it took."""
    for address in addresses:
        store_byte(address, value)
    return []


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt + usage.ru_majflt


def _touch_timed(addresses: list[int], value: int) -> list[int]:
    """As `_touch`; returns the nanoseconds of those that waited for their page.

    Page faults are counted, too: without one, who took long waited for a processor.
    """
    waits = []
    for address in addresses:
        faults = _faults()
        begin = time.perf_counter_ns()
        store_byte(address, value)
        took = time.perf_counter_ns() - begin
        if took > _WAITED_NS and _faults() > faults:
            waits.append(took)
    return waits


def reduce_waits(waits: list[int]) -> Latency | None:
    """Nanoseconds as a Latency; None if there are none."""
    if not waits:
        return None
    us = np.array(waits) / 1000
    marks = [us.mean(), *np.percentile(us, [50, 90, 99]), us.max()]
    return Latency(len(waits), *(round(float(mark), 1) for mark in marks))


class Processors:
    """Threads that touch pages at the same time. They last until `close`.

    One store a page, of a value that the registers give: a guest that read first would fault
    twice.
    """

    def __init__(self, vcpus: int) -> None:
        self.vcpus = vcpus
        self._threads = ThreadPoolExecutor(vcpus, "vcpu") if vcpus > 1 else None

    def touch(self, addresses: list[int], value: int, *, timed: bool) -> list[int]:
        """Store `value` at all addresses; returns when all have. What waited, if `timed`."""
        how = _touch_timed if timed else _touch
        if self._threads is None:
            return how(addresses, value)
        parts = [addresses[i :: self.vcpus] for i in range(self.vcpus)]
        done = [self._threads.submit(how, part, value) for part in parts if part]
        return [took for part in done for took in part.result()]

    def close(self) -> None:
        """End the threads. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


class DemoGuest:
    """The guest's processors and their memory.

    Mapping memory touches none of it: it can be armed afterwards.
    """

    def __init__(
        self, pipe: Connection, file: RamFile, page_size: int, registers: Registers
    ) -> None:
        self.pipe = pipe
        self.page_size = page_size
        flat = np.frombuffer(mmap.mmap(file.fd, os.fstat(file.fd).st_size), np.uint8)
        self.memory: npt.NDArray[np.uint8] = flat.reshape(-1, PAGE_SIZE)
        self.base = int(flat.ctypes.data)
        self.unarmed = ""
        self.uffd = -1
        self._processors = Processors(1)
        self.load(registers)
        self.timed = False
        self.percentage = 0  # of its time that it loses

    def load(self, registers: Registers) -> None:
        """Go on where `registers` say. Memory may still have to come: touches are timed."""
        self.registers = registers
        self.steps = 0
        self.timed, self._waits = True, list[int]()
        self._order: npt.NDArray[np.int64] | None = None
        self._burst = _BURST
        self.counters = self.memory[:, :: PAGE_SIZE // registers.changes]
        if registers.access == RANDOM:
            self._burst = max(_RANDOM_BURST, _VCPU_BURST * registers.vcpus)
        if registers.vcpus != self._processors.vcpus:
            self._processors.close()
            self._processors = Processors(registers.vcpus)

    def fill(self) -> None:
        """Give memory its first content."""
        if self.registers.content == "zero":
            return
        content = Content(self.registers.content, self.registers.seed)
        step = _CHUNK // PAGE_SIZE
        for first in range(0, len(self.memory), step):
            part = self.memory[first : first + step]
            part[:] = content.chunk(first // step, part.size)

    def _touch_next(self, n: int) -> None:
        """Increment one byte in each of the next `n` pages of a random order."""
        r = self.registers
        if self._order is None:
            self._order = order_of(r, len(self.memory))
        pages = self._order[r.position : r.position + n]
        addresses = (self.base + pages * PAGE_SIZE).tolist()
        waits = self._processors.touch(addresses, (r.passes + 1) % 256, timed=self.timed)
        self._waits += waits[: _MAX_WAITS - len(self._waits)]

    def step(self, pages: int) -> int:
        """Increment one byte in each of the next `pages` pages; how many that were: less if
        something came by the pipe."""
        left = pages
        while left > 0:
            r = self.registers
            n = min(left, self._burst, len(self.memory) - r.position)
            if r.access == RANDOM:
                self._touch_next(n)
            else:
                self.counters[r.position : r.position + n] += 1
            r.position += n
            if r.position == len(self.memory):
                r.position, r.passes, self._order = 0, r.passes + 1, None
            left -= n
            self.steps += n
            if left and self.pipe.poll(0):
                break
        return pages - left

    def run(self) -> None:
        """Run until told otherwise."""
        begin, done = time.monotonic(), 0
        most = max(_BURST, self._burst)
        until = begin + SLICE_SECONDS
        while not self.pipe.poll(0 if not self.registers.rate else _TICK):
            if self.percentage and time.monotonic() > until:
                if self.pipe.poll(SLICE_SECONDS * self.percentage / (100 - self.percentage)):
                    return
                # it owes nothing for a time in which it was not there
                begin += time.monotonic() - until
                until = time.monotonic() + SLICE_SECONDS
            due = most
            if self.registers.rate:
                due = min(int((time.monotonic() - begin) * self.registers.rate) - done, most)
                due = max(due, 0)
                if due == most:  # never owes more than a burst a look
                    begin, done = time.monotonic(), -most
            done += self.step(due)

    def latency(self) -> Latency | None:
        """What waited since `load`. From now on nothing is timed."""
        waits, self._waits, self.timed = self._waits, [], False
        return reduce_waits(waits)

    def obey(self, command: Command) -> Answer:
        """One command, carried out; but for run, which only begins."""
        verdict = latency = None
        match command.what:
            case "load":
                assert command.registers is not None
                self.load(command.registers)
            case "check":
                verdict = check(self.memory, self.registers, self.steps)
            case "latency":
                latency = self.latency()
            case "hand-over":
                self.track_writes()
                self.hand_over(command.path)
            case "throttle":
                self.percentage = command.percentage
            case "protect":
                self.hold_writes_back()
                self.hand_over(command.path)
                self.let_go()  # if all others who have it die, nobody may sleep for ever
        return Answer(self.registers, verdict, latency, self.unarmed, self.percentage)

    def serve(self) -> None:
        """Obey until told to quit."""
        running = False
        while True:
            if running:
                self.run()
            command = msgspec.msgpack.decode(self.pipe.recv_bytes(), type=Command)
            if command.what == "quit":
                return
            self.pipe.send_bytes(msgspec.msgpack.encode(self.obey(command)))
            goes_on = command.what in ("latency", "throttle")
            running = command.what == "run" or (running and goes_on)

    def track_writes(self) -> None:
        """Have the kernel note what is written; no descriptor where it cannot."""
        self._register(userfaultfd.create_tracking, userfaultfd.register_write_protect)

    def hold_writes_back(self) -> None:
        """Have them wait, as soon as memory is protected; no descriptor where the kernel cannot."""
        self._register(userfaultfd.create_protecting, userfaultfd.register_write_protect)

    def let_go(self) -> None:
        """Of our descriptor."""
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1

    def catch_missing(self) -> None:
        """Have touches of pages that are not there wait; no descriptor where the kernel cannot."""
        self._register(userfaultfd.create_missing, userfaultfd.register_missing)

    def _register(
        self, create: Callable[[], int], register: Callable[[int, int, int], None]
    ) -> None:
        self.let_go()  # of a migration that is over; memory is registered with one at a time
        try:
            uffd = create()
        except HostLacks as e:
            self.unarmed = e.message
            return
        try:
            register(uffd, self.base, self.memory.nbytes)
        except OSError as e:
            os.close(uffd)
            self.unarmed = f"userfaultfd does not take the guest's memory: {e.strerror}"
            return
        self.uffd = uffd

    def hand_over(self, where: str) -> None:
        """The coordinator gets a duplicate; ours keeps the registration while we live."""
        mapping = Mapping(self.base, self.memory.nbytes, 0, self.page_size)
        send_mappings(where, [mapping], [self.uffd] if self.uffd >= 0 else [])

    def close(self) -> None:
        self._processors.close()


def main(
    pipe: Connection,
    file: RamFile,
    page_size: int,
    registers: Registers,
    handover: str,
    arriving: bool,
) -> None:
    """The process. `handover`: where to hand over the userfaultfd, "" if none is wanted: one
    that tracks writes, or in a guest that is `arriving` one that catches missing pages."""
    # Ctrl-C reaches the whole process group; a guest goes on, whoever moves it acts on it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(os.getppid())
    let_the_server_end()
    set_process_name("pf-demo-guest")
    sys.setswitchinterval(_SWITCH_SECONDS)
    guest = DemoGuest(pipe, file, page_size, registers)
    if handover:
        if arriving:
            guest.catch_missing()
        else:
            guest.fill()
            guest.track_writes()
        guest.hand_over(handover)
    try:
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            guest.serve()
    finally:
        guest.close()
