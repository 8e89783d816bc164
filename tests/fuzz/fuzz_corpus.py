"""Makes the corpus: `python tests/fuzz/fuzz_corpus.py`. Valid encodings of everything, each a small
file; names that begin with `found-` are inputs of defects that fuzzing found. One that is not made
here is kept.

Conversations (receiving, session, placing, …) are drawn from bytes, so that these are some at
random; the others are what pageferry itself writes.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator

import fuzz_messages
import fuzz_states
import msgspec
import numpy as np
from fuzz_draw import INTERESTING
from fuzz_targets import CORPUS, TARGETS

from pageferry.transport import messages, snapshot_format, streams, urgent, wire
from pageferry.transport.codecs import CODECS
from pageferry.transport.messages import Block, Hello
from pageferry.transport.pages import PAGE_SIZE, Runs
from pageferry.transport.streams import Mux
from pageferry.transport.vmstate import Description, Section, parse, save
from pageferry.workers.guests.demo_process import Registers
from pageferry.workers.guests.image import image_state
from pageferry.workers.guests.states import DEMO

FOUND = "found-"
_KEY = fuzz_messages._One.key
_UUID = "00112233-4455-6677-8899-aabbccddeeff"
_TALKS = ("receiving", "sending", "answering", "requesting", "session", "placing")


def _runs(*pairs: tuple[int, int]) -> Runs:
    return (
        np.array([start for start, _ in pairs], np.int64),
        np.array([count for _, count in pairs], np.int64),
    )


def _frames() -> Iterator[bytes]:
    data, make = wire.Kind.DATA, wire.Frame
    page = b"\x11" * PAGE_SIZE
    one, two, three = _runs((0, 1)), _runs((1, 1)), _runs((2, 1))
    yield wire.encode_data(make(data, 0, 1, zero=_runs((0, 2048))))
    yield wire.encode_data(make(data, 1, 1, 2, raw=_runs((3, 2), (9, 1))), (page * 3,))
    yield wire.encode_data(make(data, 2, 7, 0, 2, packed=two, content_sum=5), (b"packed",))
    yield wire.encode_data(make(data, 3, 1, 0, 1, one, two, three), (page,))
    yield wire.encode_data(make(data, 4, 1, zero=_runs(*((2 * n, 1) for n in range(40)))))
    delta = wire.Delta(two, 0, 5, 5, 77)
    yield wire.encode_data(make(data, 5, 2, delta=delta, raw=one), (page, b"\3\0\0\1\xee"))
    delta = wire.Delta(_runs((4, 3)), 2, 9, 300, 78)
    yield wire.encode_data(
        make(data, 6, 2, 0, 1, one, two, three, content_sum=5, delta=delta), (page, b"b" * 15)
    )
    for kind in wire.Kind:
        if kind is not data:
            yield wire.encode_control(make(kind, 9, 2, frames=3, pages=700, last=12))


def _urgents() -> Iterator[bytes]:
    kind = urgent.Kind
    yield urgent.encode(kind.REQUEST, 5, 1, 77, held=1000)
    yield urgent.encode(kind.PAGE, 5, 1, 77, 1, 2000, b"\x22" * PAGE_SIZE)
    yield urgent.encode(kind.ZERO, 6, 0, 512, 512)
    yield urgent.encode(kind.ELSEWHERE, 7, 0, 3)
    yield urgent.encode(kind.PLACED, 0, page=3, count=2, payload=struct.pack("<2I", 4, 6))


def _messages() -> Iterator[bytes]:
    yield from fuzz_messages.EXAMPLES
    yield messages.encode(Hello(
        messages.PROTOCOL, "0.1.0", "6f1c1f5e-0d0e-4c57-9d0e-0c0d3b1c2a11", "image",
        [Block("load0@0x0", 1 << 20, offset=4096), Block("b", 4096, offset=1 << 30)], 4, 256,
        [messages.PAGE_SUMS], 1 << 31, "vm1.mem", _KEY,
    ))  # fmt: skip
    yield messages.encode(Hello(
        messages.PROTOCOL, "0.1.0", "6f1c1f5e-0d0e-4c57-9d0e-0c0d3b1c2a11", "qemu",
        [Block("ram0", 1 << 20)], 1, 256, image_size=1 << 20, guest_uuid=_UUID,
        shared=[messages.SharedBlock("ram1", 1 << 20, _UUID, 27, 1234)],
    ))  # fmt: skip
    yield messages.encode(messages.Discard(0, [0, 10, 999], [5, 980, 1]))
    yield messages.encode(messages.Held(b"\xff" * 125))


def _codecs() -> Iterator[bytes]:
    for size, pages in enumerate((1, 2, 3, 16)):
        content = (b"the quick brown fox %d " % pages * PAGE_SIZE)[: pages * PAGE_SIZE]
        for kind in CODECS.values():
            packed = bytes(kind().compress(content))
            if len(packed) <= PAGE_SIZE:
                yield bytes([kind.wire_id, size]) + packed


def _core(*loads: tuple[int, int], notes: bytes = b"") -> bytes:
    """A core of 64 bit with segments of memory (offset, size)."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(loads), 64, 0, 0
    )  # fmt: skip
    for offset, size in loads:
        head += struct.pack("<IIQQQQQQ", 1, 6, offset, 0, offset, size, size, 4096)
    out = bytearray((head + notes).ljust(max(o + s for o, s in loads), b"\0"))
    for offset, size in loads:
        out[offset : offset + size] = b"\x33" * size
    return bytes(out)


def _content(description: Description, value: object) -> bytes:
    return bytes(parse(save([Section(description, value)]))[0].content)


def _cores() -> Iterator[bytes]:
    yield _core((512, 512))
    yield _core((512, 100), (700, 300), notes=b"NOTE")
    yield _core((700, 64), (512, 64)) + b"behind the memory"
    yield b"no core at all"


def _states() -> Iterator[bytes]:
    for pieces in ([], [(0, b"head")], [(0, b"\x7fELF" * 20), (65000, b"tail")]):
        yield bytes(parse(image_state(pieces))[0].content)


def _snapshots() -> Iterator[bytes]:
    """Indexes, and the first page of a file."""
    state = save([Section(DEMO, Registers(5, 2, 0, "text", 1))])
    for kind, specs in (
        ("image", [Block("ram", 5 * PAGE_SIZE)]),
        ("demo", [Block("ram", (4 << 20) + 17)]),
        ("qemu", [Block("ram0", 2 << 20), Block("ram1", 2 << 20, 2 << 20, 2 << 20)]),
        ("ram", [Block(f"load{i}", 100, offset=i << 12) for i in range(9)]),
    ):
        blocks, at = snapshot_format.place(specs)
        blocks = [msgspec.structs.replace(block, sum=bytes(16)) for block in blocks]
        header, body = snapshot_format.encode(
            snapshot_format.Index("0.1.0", kind, True, 1 << 20, blocks, bytes(state)), at
        )
        yield body
    yield header


def _handovers() -> Iterator[bytes]:
    def mapping(address: int, size: int, offset: int, page: int = 4096) -> dict[str, int]:
        return {"base_host_virt_addr": address, "size": size, "offset": offset, "page_size": page,
                "page_size_kib": page}  # fmt: skip

    yield json.dumps([mapping(0x7F0000000000, 64 << 20, 0)]).encode()
    yield json.dumps([mapping(0x7F0000000000, 2 << 20, 0, 2 << 20),
                      mapping(0x7F1000000000, 4 << 20, 4 << 20, 2 << 20)]).encode()  # fmt: skip
    yield b"[]"


def _commands() -> Iterator[bytes]:
    yield b'{"execute": "qmp_capabilities"}\r\n{"execute":"query-migrate","id":7}'
    yield (b' {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1e9, '
           b'"x": "}\\"{"}}\n')  # fmt: skip
    yield (
        b'{"execute":"qmp_capabilities"}{"execute":"yank","arguments":{"instances":'
        b'[{"type":"migration"}]}}{"execute":"migrate-recover","arguments":{"uri":"tcp://a:1"}}'
    )
    yield b"help\n"


def _manifests() -> Iterator[bytes]:
    yield (b'\x00parallel = 4\nmax-bandwidth = "10Gbit"\ndefaults = {codec = "zstd", level = 3}\n'
           b'[hosts.a]\nparallel = 2\n[[items]]\nsource = "image:vm1.mem"\npriority = 5\n'
           b'[[items]]\nsource = "demo:?size=1G"\nname = "x"\nhost = "a"\n')  # fmt: skip
    yield b"\x01" + json.dumps({
        "items": [{"source": "image:a", "downtime-limit": "300ms", "retries": 2, "verify": True}],
        "backoff": "2s",
    }).encode()  # fmt: skip
    yield (b"\x02items:\n- source: image:a\n  postcopy: never\n- &b {source: 'image:b', level: 1, "
           b"codec: lz4}\nretries: 3\n")  # fmt: skip


def _addresses() -> Iterator[bytes]:
    yield from (
        b"tcp://192.0.2.7:4444", b"tcp://[2001:db8::1]:1", b"ipc:///run/x", b"ipc://@name",
        b"image:/a/b?c.mem", b"demo:?size=1G&rate=100&vcpus=2", b"pid:77?tracking=content-hash",
        b"qemu:/run/qmp", b"shm:/psm_1", b"ram:/dev/shm/x?pid=1", b"512MiB", b"10Gbit", b"1.5GB/s",
        b"300ms", b"2 min", b"1h",
    )  # fmt: skip


def _zap() -> Iterator[bytes]:
    # the key has a byte 10, at which a request is cut into parts: nobody is let in by this one
    parts = [b"1.0", b"1", b"pageferry", b"192.0.2.7", b"id", b"CURVE", bytes(range(32))]
    yield b"\n".join(parts)
    yield b"\n".join([*parts[:5], b"NULL"])


def _profiles() -> Iterator[bytes]:
    yield b'# 1.2 GB/s\nworkers = 4\ncodec = "zstd"\nlevel = 1\nbatch-pages = 512\n'
    yield b'downtime-limit = "300ms"\npostcopy = "after=3"\npreempt = false\n'


def _keys() -> Iterator[bytes]:
    yield b"# public key\n" + _KEY + b"\n"
    yield _KEY


def _registers() -> Iterator[bytes]:
    yield _content(DEMO, Registers(5, 2, 0, "text", 1))
    yield _content(DEMO, Registers(99, 0, 20000, "mixed", 7, "random", 4))


def _streams() -> Iterator[bytes]:
    def frame(kind: int, number: int, size: int, follows: bytes = b"") -> bytes:
        return streams.HEADER.pack(kind, number, size) + follows

    kind, source = streams.Kind, Mux(dials=True).output(idle=True).removeprefix(streams.MAGIC)
    opened = frame(kind.OPEN, 1, 0) + frame(kind.OPEN, 2, 2, b".0") + frame(kind.OPEN, 3, 3, b".64")
    data = frame(kind.DATA, 1, 5, b"hello") + frame(kind.DATA, 2, 100, bytes(100))
    end = frame(kind.CLOSE, 2, 0) + frame(kind.BYE, 0, 0)
    yield b"\x42" + source + opened + data + frame(kind.SEEN, 0, 0) + end
    yield b"\x06" + source + opened + frame(kind.DATA, 3, 4, b"page") + frame(kind.CREDIT, 1, 0)
    there = Mux(dials=False, name="@there").output(idle=True)
    yield b"\x81Last login: today\n" + there + frame(kind.BYE, 0, 4, b"done")


def _talks(name: str) -> Iterator[bytes]:
    draw = random.Random(name)
    for size in (8, 40, 200, 1000):
        yield draw.randbytes(size)
        # small bytes choose what could come next
        yield bytes(draw.randrange(64) for _ in range(size))


MAKERS = {
    "frame": _frames, "urgent-message": _urgents, "message": _messages, "codec": _codecs,
    "core": _cores, "snapshot": _snapshots, "image-state": _states, "handover": _handovers,
    "qmp": _commands,
    "batch": _manifests, "address": _addresses, "zap": _zap, "profile": _profiles,
    "key-file": _keys, "demo-state": _registers, "stream": _streams,
    "device-state": lambda: iter(fuzz_states.states()),
    "qemu-stream": lambda: iter(fuzz_states.qemu_streams()),
    **{name: lambda name=name: _talks(name) for name in _TALKS},
}  # fmt: skip


# What fuzzing found, as small as it gets: pages of zeros without a bound, a number so far ahead
# that a counter of 64 bits was too small for what was lost, texts that are not UTF-8, nesting.
_DEEP = b"\x81\xa1x" + b"\x91" * 60000 + b"\xc0"
_ZEROS = wire.Frame(wire.Kind.DATA, 0, 1, zero=_runs((0, 2049)))
_REGISTERS = _content(DEMO, Registers(1, 2, 0, "text", 1))
DEFECTS = {
    "frame": {"zeros": wire.encode_data(_ZEROS)},
    # DATA, number 2**64 - 1, no pages, this round, no payload, whole
    "receiving": {"far-ahead": bytes([0, 200, len(INTERESTING) - 3, 0, 16, 0, 1, 0])},
    "image-state": {"deep": _DEEP},
    "demo-state": {"deep": _DEEP, "not-utf8": _REGISTERS.replace(b"tex", b"t\xffx")},
}


def made(name: str) -> dict[str, bytes]:
    """The files of a target that are made."""
    return {f"{number:02}": data for number, data in enumerate(MAKERS[name]())} | {
        f"{FOUND}{what}": data for what, data in DEFECTS.get(name, {}).items()
    }


def write() -> None:
    for name in TARGETS:
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if not path.name.startswith(FOUND):
                path.unlink()
        for file, data in made(name).items():
            (folder / file).write_bytes(data)


if __name__ == "__main__":
    write()
