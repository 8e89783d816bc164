"""A guest of two boot sectors, steered and read through its RAM from outside.

It prints 'A' on COM1 when it is up; then, as its parameter block says, it touches pages of
[lo, hi) for ever, and prints 'B' after each pass in order. It is like the boot block of QEMU's own
migration tests (tests/migration/i386), and so is the oracle; but here each page also counts its
writes and the guest counts them all, so that every lost write is found, in random order too.

The source is boot_guest.asm; nasm is needed only to change it.
"""

import base64
import contextlib
import os
import random
import struct
import time
import zlib
from pathlib import Path

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
BUCKETS = 64

SECTORS = 1024
TEMPLATE = SECTORS - 16 * 8  # the block as it is at the start, in the image
DISK = 4 << 20  # SeaBIOS does not boot from less
ROM = 64 << 10
RESET = b"\xea\x00\x04\x00\xf0".ljust(16, b"\0")  # jmp f000:0400, 16 bytes below 4 GiB
CHUNK = 1 << 20
SHOWN = 10

# boot_guest.asm, assembled, compressed
ASSEMBLED = zlib.decompress(
    base64.b85decode(
        "c-qZWO=uHQ5T4!qt&p;7tWr>6tu9(n$Vx#&Ra&9;Rkk37ir&P-8a$Plwh=-"
        "aEh>*<2p&CnD~JW_ao4|WjHFO3?J;;U#DZ%BX=xy~A!dE=CHCa0C+D!=_vU>&GdnYEy`fsELdr_5zK8fbNEjS%"
        "@(`>oABZ&Tx@u)WGNG%g&o6pG^2r&H4POv@W)=kxNEdzM6V(g^b>j&D=*+Eq0A#qgr5hjth}{KIF8XD$yQrH<0"
        "82cZ{KAPrkvn9>McL9jIDn+sZLLE>fOI+yZF3y*c)rlWXDcn-YGZu?PC_~kkasJ$NL0>#OuWN5J211&PX(fU(}"
        "$cP0Xc5v8o4gJ(d>}W)&lh+LhMm`z@N09rPvuHepn(G%fdtE8+o)AJ*M@PVx6e3QwbCGWB}n7E3>%cNt*C8!fq"
        "u-sD^jGyQ}F^BPYJLMHOXBGTOIFcus%2?W*M9|Fp4Jx*@^t`~mJB4pRv8LBfxRPb5e?Rz4=D0Wv^7(<CE>Dw<O"
        "*bDXhxWLy~>9ld#dM5V2unl}Ts;5ZJNbt?kx48bmjrxlrDuX2jv1tmxj%^p$u8TKmYsXtVSc(hP0;?i(sq^C03"
        "F`TXV2c9BlX2%tA4XW0lx<+$J?4?!`)Ym#sV6p*R)H`*lnl6_R{$+ptO-gx?r@N@(O_VMAHO@w%d?Y}^(?Q;#C"
        "11A3nnZ_NC6r$xTp-d8q~;j2eScYTKV$8Z@i&y+kcY*ECPkF}L4t4CcSy>gw;i^rdp2&DNp0-+{!4c-"
        "es$Wsf9}Oz^VAy#Y^DloEtSte+yuTl$9@QO9oCPMRrmuS%^W5"
    )
)


def disk_image(path, **fields):
    """Write a disk that boots the guest; `fields` (mode, lo, hi, ...) is what it starts with."""
    image = _image(fields)[:SECTORS].ljust(DISK, b"\0")
    Path(path).write_bytes(image)
    return path


def rom_image(path, **fields):
    """Write a ROM for QEMU's `-bios` that is the guest: it is up at once."""
    image = _image(fields).ljust(ROM - len(RESET), b"\0") + RESET
    Path(path).write_bytes(image)
    return path


def _image(fields):
    image = bytearray(ASSEMBLED)
    for name, value in fields.items():
        _steered(name)
        struct.pack_into("<Q", image, TEMPLATE + FIELDS[name] - BLOCK, value)
    return bytes(image)


def _steered(name):
    if name not in STEERED:
        raise ValueError(f"{name} is not for setting; these are: {sorted(STEERED)}")


class Ram:
    """Guest RAM in parts that follow each other: files, descriptors, or (file, offset, size)."""

    def __init__(self, *parts):
        self._parts = []
        self._stack = contextlib.ExitStack()
        for part in parts:
            file, offset, size = part if isinstance(part, tuple) else (part, 0, None)
            fd = os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDWR)
            self._stack.callback(os.close, fd)
            self._parts.append((fd, offset, size or os.fstat(fd).st_size))
        self.size = sum(size for _, _, size in self._parts)

    def read(self, address, length):
        return b"".join(
            os.pread(fd, upto - start, start) for fd, start, upto in self._spans(address, length)
        )

    def write(self, address, data):
        view = memoryview(data)
        for fd, start, upto in self._spans(address, len(view)):
            os.pwrite(fd, view[: upto - start], start)
            view = view[upto - start :]

    def _spans(self, address, length):
        """(fd, start, end) in each part that [address, address + length) lies in."""
        if address + length > self.size:
            raise ValueError(f"{address + length:#x} is beyond the RAM of {self.size:#x} bytes")
        begin = 0
        for fd, offset, size in self._parts:
            low, high = max(address, begin), min(address + length, begin + size)
            if low < high:
                yield fd, offset + low - begin, offset + high - begin
            begin += size

    def close(self):
        self._stack.close()


class BootGuest:
    """The guest in this RAM (see Ram; for QEMU: `BootGuest(*vm.ram_parts())`).

    What is written from outside goes into the file, not through QEMU's mapping, so dirty tracking
    there does not see it. The guest answers each `set` by a write of its own to the block's page.
    While memory is still arriving (postcopy), do not use `set`: it would make up the missing page.
    """

    def __init__(self, *ram):
        self.ram = Ram(*ram)

    def up(self):
        return self.get("magic") == int.from_bytes(MAGIC, "little")

    def get(self, name):
        return struct.unpack("<Q", self.ram.read(FIELDS[name], 8))[0]

    def all(self):
        return {name: self.get(name) for name in FIELDS if name != "magic"}

    def set(self, **fields):
        """Change fields at once; a running guest obeys before its next touch."""
        if not self.up():
            raise RuntimeError("the guest is not up: wait for its 'A'")
        for name, value in fields.items():
            _steered(name)
            self._put(name, value)
        self._put("request", self.get("request") + 1)

    def settle(self, limit=20.0):
        """Wait until the running guest obeys the last `set`."""
        _until(lambda: self.get("seen") == self.get("request"), "the guest obeys", limit)

    def advance(self, name="touches", by=1, limit=20.0):
        """Wait until a counter is `by` higher than now; returns it."""
        goal = self.get(name) + by
        _until(lambda: self.get(name) >= goal, f"{name} reaches {goal}", limit)
        return self.get(name)

    def histogram(self, since=None):
        """How many touches took how long: index n for 2^(n-1) .. 2^n - 1 cycles."""
        counts = struct.unpack(f"<{BUCKETS}Q", self.ram.read(HISTOGRAM, BUCKETS * 8))
        return [now - then for now, then in zip(counts, since or [0] * BUCKETS, strict=True)]

    def cycles_per_second(self, span=0.1):
        """The rate of the guest's time stamp counter, from a guest that is touching pages."""
        begin, first = time.monotonic(), self.get("time")
        _until(lambda: time.monotonic() > begin + span and self.get("time") > first, "time passes")
        return (self.get("time") - first) / (time.monotonic() - begin)

    def fill(self, lo, hi, kind="random", seed=1):
        """Content (zero, random, text) for pages of a guest that is stopped or idle.

        The first 16 bytes of each page stay 0: they are the guest's. Use it before any write.
        """
        draw = random.Random(seed)
        for address in range(lo, hi, CHUNK):
            content = bytearray(_content(kind, draw, min(CHUNK, hi - address)))
            for page in range(0, len(content), PAGE):
                content[page : page + 16] = bytes(16)
            self.ram.write(address, content)

    def oracle(self, lo=None, hi=None):
        """`oracle` for this guest's RAM and, unless told otherwise, its range."""
        lo = self.get("lo") if lo is None else lo
        hi = self.get("hi") if hi is None else hi
        return oracle(self.ram, lo, hi)

    def close(self):
        self.ram.close()

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.close()

    def _put(self, name, value):
        self.ram.write(FIELDS[name], struct.pack("<Q", value))


def oracle(ram, lo=LOW, hi=HIGH):
    """What is wrong with the pages [lo, hi) of a guest that is stopped or idle; [] if nothing.

    `ram` is a Ram, or bytes or a mapping of all of it. Two tests. The first bytes of the pages are
    equal, but for one step down by 1: where the guest is in its pass. The writes that the pages
    count are all the writes the guest has counted. [lo, hi) must be all it ever wrote to.
    """
    read = ram.read if isinstance(ram, Ram) else lambda start, size: ram[start : start + size]
    first, counted = bytearray(), 0
    for address in range(lo, hi, CHUNK):
        chunk = bytes(read(address, min(CHUNK, hi - address)))
        first += chunk[::PAGE]
        counted += sum(count for (count,) in struct.iter_unpack("<8xQ4080x", chunk))
    writes, busy = (struct.unpack("<Q", read(FIELDS[x], 8))[0] for x in ("writes", "busy"))
    return _order_problems(first, lo) + _count_problems(counted, writes, busy)


def _order_problems(first, lo):
    """QEMU's check_guests_ram."""
    problems, stepped = [], False
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


def _count_problems(counted, writes, busy):
    """A guest stopped amid a touch may have written one that it has not counted yet."""
    difference = (counted - writes) % 2**64
    if difference <= bool(busy):
        return []
    return [f"the pages count {counted} writes, the guest {writes}"]


def percentile(histogram, share):
    """Below how many cycles this share (0 .. 1) of the touches stayed, a power of two."""
    goal, seen = share * sum(histogram), 0
    for bits, count in enumerate(histogram):
        seen += count
        if count and seen >= goal:
            return 1 << bits
    return 0


def _content(kind, draw, length):
    if kind == "zero":
        return bytes(length)
    if kind == "random":
        return draw.randbytes(length)
    words = [draw.randbytes(draw.randint(2, 6)).hex() for _ in range(500)]
    text = " ".join(draw.choices(words, (1 / n for n in range(1, 501)), k=length // 16)).encode()
    return (text * (length // len(text) + 1))[:length]


def _until(condition, what, limit=20.0):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit:g} s: {what}")
        time.sleep(0.002)
