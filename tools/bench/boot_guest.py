"""A guest of two boot sectors, steered and read through its RAM from outside.

It prints 'A' on COM1 when it is up; then, as its parameter block says, it touches pages of
[lo, hi) for ever, and prints 'B' after each pass in order. It is like the boot block of QEMU's own
migration tests (tests/migration/i386), and so is the oracle; but here each page also counts its
writes and the guest counts them all, so that every lost write is found, in random order too.

The source is boot_guest.asm; nasm is needed only to change it. Knows no QEMU and no measurement:
only the image, and the RAM that it is given.
"""

from __future__ import annotations

import base64
import contextlib
import mmap
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

PAGE = 4096
LOW, HIGH = 1 << 20, 100 << 20
IDLE, IN_ORDER, AT_RANDOM, READ_AT_RANDOM = range(4)

BLOCK = 0x8000
MAGIC = b"FERRYVM1"
FIELDS = {
    name: BLOCK + 8 * index
    for index, name in enumerate(
        (
            "magic",
            "request",
            "seen",
            "mode",
            "lo",
            "hi",
            "delay",
            "position",
            "random",
            "touches",
            "writes",
            "passes",
            "busy",
            "longest",
            "backwards",
            "time",
        )
    )
}
# what the guest takes over when the request number changes, and what it only ever writes
STEERED = {"mode", "lo", "hi", "delay", "position", "random", "longest"}
HISTOGRAM = BLOCK + 0x200
BUCKETS = 256  # four an octave

SECTORS = 1024
TEMPLATE = SECTORS - 16 * 8  # the block as it is at the start, in the image
DISK = 4 << 20  # SeaBIOS does not boot from less
ROM = 64 << 10
RESET = b"\xea\x00\x04\x00\xf0".ljust(16, b"\0")  # jmp f000:0400, 16 bytes below 4 GiB
CHUNK = 1 << 20
SHOWN = 10

# A file, a descriptor, or (one of these, offset, size).
File: TypeAlias = str | Path | int
Part: TypeAlias = File | tuple[File, int, int]

# boot_guest.asm, assembled, compressed
ASSEMBLED = zlib.decompress(
    base64.b85decode(
        "c-qBOU1-x#6h2AQwZcZ?oHEcsoCY2EkjOyCRMxS&JIO!>ioS^tS=rO5-H%YZY7x1NmExm<Zv$~)eN6moYNdmrY$!"
        "tU#Zm`mD|BOpxs}>@Z(8@{(_TCe`M!Jd<^0@pNTsTn@m$=Due^cqYl!F!Yp@`1e>xPbRW!v+fnY#;SzB0a0>LAuK"
        "-4`lcE=XIZV)bd#wW@tkTv}w0BDX|a|4KQXG_yT0N^`wyqIqm`Ods%L;+0xZ1f|;%RF;L5A&j_wJ-otzSCTXh!+x"
        "x1T@UH$>VXdj*ph>xYfW)5>7!P43OodTO=xDJt5v9oc6_b*s0bKTk{}$(2HzNx=LObIW#-yZD@gd5h2znJ>d6h*V"
        "1%9iY;-7f4ej=*EUzRZ9BHcqA%+M%x9wh3ilo1@PpORakZ;3-G+MGqyPyq*@|$T6`f?`QCh_ZggI%NP!;d~;L3?Y"
        "HN(HKcm<^kB08`_ct(4*<0@s~zuUFvnl8ZJ`~k*}1}FqrneY>VlM&MS^1J8^Knh4l1{o=o(Y#_BGDFz{(l7f*Ms8"
        "joR%q8$^U`N^kQ+p^oaCjKK(O7xGm_|Fw{+UU3zAF_%^s8b9PF0PQ-4n>=vI5SgDw@9hPz6WEko&2vu_UBv0Yct<"
        "yTC<vPyFa&PVkmsJDKez+?lMP}9_<a-vv3_?PwVH!0;_mhPg8H&Hs@tTGnr$p%|VcsjEiwB&wktVVRWUPAF1!Z{*"
        "sK}yD9mgg_aA9PrwWc(eaH^d=6S)+*3KS}TnYm}s1yKOt0x^H9ln9#t!rhn-Uhp)^Sch5cDZ=On3hs}6S*^XyZ5H"
        "^4<&pST^x(@3dWEK7Z%;zWG"
    )
)


def disk_image(path: str | Path, **fields: int) -> str | Path:
    """Write a disk that boots the guest; `fields` (mode, lo, hi, ...) is what it starts with."""
    image = _image(fields)[:SECTORS].ljust(DISK, b"\0")
    Path(path).write_bytes(image)
    return path


def rom_image(path: str | Path, **fields: int) -> str | Path:
    """Write a ROM for QEMU's `-bios` that is the guest: it is up at once."""
    image = _image(fields).ljust(ROM - len(RESET), b"\0") + RESET
    Path(path).write_bytes(image)
    return path


def _image(fields: dict[str, int]) -> bytes:
    image = bytearray(ASSEMBLED)
    for name, value in fields.items():
        _steered(name)
        struct.pack_into("<Q", image, TEMPLATE + FIELDS[name] - BLOCK, value)
    return bytes(image)


def _steered(name: str) -> None:
    if name not in STEERED:
        raise ValueError(f"{name} is not for setting; these are: {sorted(STEERED)}")


class Ram:
    """Guest RAM in parts that follow each other: files, descriptors, or (file, offset, size)."""

    def __init__(self, *parts: Part) -> None:
        self._parts: list[tuple[int, int, int]] = []  # descriptor, offset, size
        self._stack = contextlib.ExitStack()
        for part in parts:
            file, offset, size = part if isinstance(part, tuple) else (part, 0, 0)
            fd = os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDWR)
            self._stack.callback(os.close, fd)
            self._parts.append((fd, offset, size or os.fstat(fd).st_size))
        self.size = sum(size for _, _, size in self._parts)

    def read(self, address: int, length: int) -> bytes:
        return b"".join(
            os.pread(fd, upto - start, start) for fd, start, upto in self._spans(address, length)
        )

    def write(self, address: int, data: bytes | bytearray) -> None:
        view = memoryview(data)
        for fd, start, upto in self._spans(address, len(view)):
            os.pwrite(fd, view[: upto - start], start)
            view = view[upto - start :]

    def _spans(self, address: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(fd, start, end) in each part that [address, address + length) lies in."""
        if address + length > self.size:
            raise ValueError(f"{address + length:#x} is beyond the RAM of {self.size:#x} bytes")
        begin = 0
        for fd, offset, size in self._parts:
            low, high = max(address, begin), min(address + length, begin + size)
            if low < high:
                yield fd, offset + low - begin, offset + high - begin
            begin += size

    def close(self) -> None:
        self._stack.close()


class BootGuest:
    """The guest in this RAM (see Ram; for QEMU: `BootGuest(*vm.ram_parts())`).

    What is written from outside goes into the file, not through QEMU's mapping, so dirty tracking
    there does not see it. The guest answers each `set` by a write of its own to the block's page.
    While memory is still arriving (postcopy), do not use `set`: it would make up the missing page.
    """

    def __init__(self, *ram: Part) -> None:
        self.ram = Ram(*ram)

    def up(self) -> bool:
        return self.get("magic") == int.from_bytes(MAGIC, "little")

    def get(self, name: str) -> int:
        return _unsigned(self.ram.read(FIELDS[name], 8))

    def all(self) -> dict[str, int]:
        return {name: self.get(name) for name in FIELDS if name != "magic"}

    def set(self, **fields: int) -> None:
        """Change fields at once; a running guest obeys before its next touch."""
        if not self.up():
            raise RuntimeError("the guest is not up: wait for its 'A'")
        for name, value in fields.items():
            _steered(name)
            self._put(name, value)
        self._put("request", self.get("request") + 1)

    def settle(self, limit: float = 20.0) -> None:
        """Wait until the running guest obeys the last `set`."""
        _until(lambda: self.get("seen") == self.get("request"), "the guest obeys", limit)

    def advance(self, name: str = "touches", by: int = 1, limit: float = 20.0) -> int:
        """Wait until a counter is `by` higher than now; returns it."""
        goal = self.get(name) + by
        _until(lambda: self.get(name) >= goal, f"{name} reaches {goal}", limit)
        return self.get(name)

    def histogram(self, since: Sequence[int] | None = None) -> list[int]:
        """How many touches took how long: at an index, so many cycles as `edges` says."""
        counts = struct.unpack(f"<{BUCKETS}Q", self.ram.read(HISTOGRAM, BUCKETS * 8))
        return [now - then for now, then in zip(counts, since or [0] * BUCKETS, strict=True)]

    def cycles_per_second(self, span: float = 0.1) -> float:
        """The rate of the guest's time stamp counter, from a guest that is touching pages."""
        begin, first = time.monotonic(), self.get("time")
        _until(lambda: time.monotonic() > begin + span and self.get("time") > first, "time passes")
        return (self.get("time") - first) / (time.monotonic() - begin)

    def fill(self, lo: int, hi: int, kind: str = "random", seed: int = 1) -> None:
        """Content (zero, random, text) for pages of a guest that is stopped or idle.

        The first 16 bytes of each page stay 0: they are the guest's. Use it before any write.
        """
        draw = random.Random(seed)
        for address in range(lo, hi, CHUNK):
            content = bytearray(_content(kind, draw, min(CHUNK, hi - address)))
            for page in range(0, len(content), PAGE):
                content[page : page + 16] = bytes(16)
            self.ram.write(address, content)

    def oracle(self, lo: int | None = None, hi: int | None = None) -> list[str]:
        """`oracle` for this guest's RAM and, unless told otherwise, its range."""
        lo = self.get("lo") if lo is None else lo
        hi = self.get("hi") if hi is None else hi
        return oracle(self.ram, lo, hi)

    def close(self) -> None:
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _put(self, name: str, value: int) -> None:
        self.ram.write(FIELDS[name], struct.pack("<Q", value))


def oracle(ram: Ram | bytes | bytearray | mmap.mmap, lo: int = LOW, hi: int = HIGH) -> list[str]:
    """What is wrong with the pages [lo, hi) of a guest that is stopped or idle; [] if nothing.

    `ram` is a Ram, or bytes or a mapping of all of it. Two tests. The first bytes of the pages are
    equal, but for one step down by 1: where the guest is in its pass. The writes that the pages
    count are all the writes the guest has counted. [lo, hi) must be all it ever wrote to.
    """

    def read(start: int, size: int) -> bytes:
        return ram.read(start, size) if isinstance(ram, Ram) else bytes(ram[start : start + size])

    first, counted = bytearray(), 0
    for address in range(lo, hi, CHUNK):
        chunk = read(address, min(CHUNK, hi - address))
        first += chunk[::PAGE]
        counted += sum(count for (count,) in struct.iter_unpack("<8xQ4080x", chunk))
    writes, busy = (_unsigned(read(FIELDS[name], 8)) for name in ("writes", "busy"))
    return _order_problems(first, lo) + _count_problems(counted, writes, busy)


def _order_problems(first: bytearray, lo: int) -> list[str]:
    """QEMU's check_guests_ram."""
    problems: list[str] = []
    stepped = False
    for index in range(1, len(first)):
        before, here = first[index - 1], first[index]
        if here == before:
            continue
        if not stepped and here == (before - 1) % 256:
            stepped = True
            continue
        where = lo + index * PAGE
        problems.append(f"page {where:#x} starts with {here}, the one before with {before}")
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"and {len(problems) - SHOWN} more pages"]
    return problems


def _count_problems(counted: int, writes: int, busy: int) -> list[str]:
    """A guest stopped amid a touch may have written one that it has not counted yet."""
    difference = (counted - writes) % 2**64
    if difference <= bool(busy):
        return []
    return [f"the pages count {counted} writes, the guest {writes}"]


def edges(index: int) -> tuple[int, int]:
    """The cycles that a counter of the histogram is for: from, and less than."""
    octave, quarter = divmod(index, 4)
    return (4 + quarter << octave) >> 2, (5 + quarter << octave) >> 2


def percentile(histogram: Sequence[int], share: float) -> float:
    """Below how many cycles this share (0 .. 1) of the touches stayed. Within a counter's cycles
    they are taken for evenly spread."""
    goal, seen = share * sum(histogram), 0
    for index, count in enumerate(histogram):
        seen += count
        if count and seen >= goal:
            low, high = edges(index)
            return high - (high - low) * (seen - goal) / count
    return 0


def mean(histogram: Sequence[int]) -> float:
    """How many cycles a touch took, each taken for the middle of its counter's; 0 without any."""
    total = sum(sum(edges(index)) / 2 * count for index, count in enumerate(histogram))
    return total / max(1, sum(histogram))


def _content(kind: str, draw: random.Random, length: int) -> bytes:
    if kind == "zero":
        return bytes(length)
    if kind == "random":
        return draw.randbytes(length)
    words = [draw.randbytes(draw.randint(2, 6)).hex() for _ in range(500)]
    weights = [1 / n for n in range(1, 501)]
    text = " ".join(draw.choices(words, weights, k=length // 16)).encode()
    return (text * (length // len(text) + 1))[:length]


def _unsigned(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _until(condition: Callable[[], Any], what: str, limit: float = 20.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit:g} s: {what}")
        time.sleep(0.002)
