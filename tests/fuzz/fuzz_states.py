"""Targets: device states, and sections with right sums around bytes that were made up.

`sealed` is what the other end could write if it meant harm; sums find accidents only.
"""

from __future__ import annotations

import contextlib
import json
from io import BytesIO
from types import SimpleNamespace

import xxhash

from pageferry.pipeline.device_state import GLOBAL_STATE, RunState, take
from pageferry.pipeline.qemu_stream import read_stream
from pageferry.transport.errors import PeerRefused, RemoteProtocolError, SourceError
from pageferry.transport.vmstate import (
    BOOL,
    U8,
    U16,
    Array,
    Blob,
    Description,
    Field,
    List,
    Map,
    Nullable,
    Saved,
    Section,
    Struct,
    Text,
    join,
    load,
    parse,
    save,
    values_of,
)
from pageferry.transport.vmstate import layout as layouts

BLAME = (RemoteProtocolError, PeerRefused)


def record(
    name: str, content: bytes, said: bytes | layouts.Layout, *, version: int = 1, instance: int = 0
) -> bytes:
    """A section with its sum. `said`: its layout."""
    if isinstance(said, layouts.Layout):
        said = layouts.encode(said)
    raw = name.encode()
    body = b"\4" + bytes([len(raw)]) + raw
    body += b"".join(n.to_bytes(4, "big") for n in (instance, version, len(said), len(content)))
    body += said + content
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "big")


def stream(*records: bytes) -> bytes:
    """Sections with the end of a device state."""
    out = b"PFDS\0\0\0\1" + b"".join(records) + b"\0" + len(records).to_bytes(4, "big")
    return out + xxhash.xxh3_64_intdigest(out).to_bytes(8, "big")


def sealed(description: Description, content: bytes) -> bytes:
    """A device state of one section that holds what was made up."""
    said = description.layout()
    return stream(record(description.name, content, said, version=description.version))


def again(data: bytes, *, content: bytes | None = None, said: bytes | None = None) -> bytes:
    """The same with another content, or layout, of its first section."""
    first, *others = parse(data)
    new = record(
        first.name, bytes(first.content) if content is None else content,
        first.layout if said is None else said, version=first.version, instance=first.instance,
    )  # fmt: skip
    return stream(new, *(bytes(section.record) for section in others))


_INNER = Description("tool/part", fields=(Field("a", U8), Field("b", Text(8))))
TOOL = Description(
    "tool", 3, 1,
    (
        Field("flags", Array(BOOL, 2)), Field("parts", List(Struct(_INNER, SimpleNamespace), 4)),
        Field("by", Map(U8, Nullable(U16), 4), since=2), Field("raw", Blob(16)),
        Field("more", U8, exists=lambda tool, version: tool.flags[0]),
    ),
    subsections=(Description("tool/sub", fields=(Field("c", U16),)),),
)  # fmt: skip
TOOL_STATE = SimpleNamespace(
    flags=[True, False], parts=[SimpleNamespace(a=1, b="x"), SimpleNamespace(a=2, b="")],
    by={1: 2, 3: None}, raw=b"raw", more=9, c=700,
)  # fmt: skip


def states() -> list[bytes]:
    """Inputs of `device-state`: whole ones, and contents of TOOL."""
    whole = [Section(GLOBAL_STATE, RunState("paused")), Section(TOOL, TOOL_STATE)]
    return [save(whole), save(whole[1:]), bytes(parse(save(whole))[1].content), save([])]


def device_state(data: bytes) -> None:
    """As it is, and as the content of a section with right sums: loaded, or refused; shown, or not;
    and what is put together again is what it was."""
    found: list[Saved] = []
    with contextlib.suppress(RemoteProtocolError):
        found = parse(data)
        assert join(found) == data
    tool = [Section(TOOL, SimpleNamespace(), optional=True)]
    for given in (data, sealed(TOOL, data)):
        with contextlib.suppress(*BLAME):
            load(given, tool)
        with contextlib.suppress(*BLAME):
            came = take(given, "demo", tool)
            assert came.runstate in ("running", "paused", "none")
        with contextlib.suppress(RemoteProtocolError):
            for section in parse(given):
                values_of(section)


# ---- QEMU's migration stream ---------------------------------------------------------------


def _u(size: int, *numbers: int) -> bytes:
    return b"".join(number.to_bytes(size, "big") for number in numbers)


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


PAGE = 4096
_BLOCKS = {"pc.ram": 16 * PAGE, "vga.vram": 4 * PAGE}
# An array that is described once, one element by element, a structure with a subsection, one of
# which nothing but the number of bytes is known.
_DEVICE = {
    "name": "0000:00:02.0/dev", "instance_id": 0, "vmsd_name": "dev", "version": 2,
    "fields": [
        {"name": "on", "type": "bool", "size": 1}, {"name": "irq", "type": "int32", "size": 4},
        {"name": "regs", "array_len": 3, "type": "uint16", "size": 2},
        *({"name": "mixed", "index": i, "type": "uint8", "size": 1} for i in range(2)),
        {"name": "bus", "type": "struct", "size": 6, "struct": {
            "vmsd_name": "bus", "version": 1, "fields": [
                {"name": "timer", "type": "timer", "size": 8}],
            "subsections": [{"vmsd_name": "bus/extra", "version": 1, "fields": [
                {"name": "le", "type": "int32 le", "size": 4}]}],
        }},
        {"name": "tmp", "type": "tmp", "vmsd_name": "x", "version": 0, "fields": [], "size": 3},
    ],
}  # fmt: skip
_DEVICE_BYTES = (
    b"\1" + _u(4, 0xFFFFFFFE) + _u(2, 1, 2, 0xFFFF) + b"\7\x08" + _u(8, 1 << 40)
    + b"\5" + _text("bus/extra") + _u(4, 1) + b"\xff\xff\xff\x7f" + b"tmp"
)  # fmt: skip


def _section(kind: int, number: int, content: bytes, start: bytes = b"") -> bytes:
    return bytes([kind]) + _u(4, number) + start + content + b"\x7e" + _u(4, number)


def qemu_stream(*, shared: bool = False, more: bytes = b"", device: object = _DEVICE) -> bytes:
    """A small one, as QEMU saves it. `shared`: with x-ignore-shared; `more`: RAM records."""
    configuration = b"\7" + _u(4, 3) + b"q35"
    if shared:
        configuration += b"\5" + _text("configuration/capabilities") + _u(4, 1, 1)
        configuration += _text("x-ignore-shared")
    blocks = _u(8, sum(_BLOCKS.values()) | 4)
    for name, size in _BLOCKS.items():
        blocks += _text(name) + _u(8, size) + (_u(8, 0xC0000) if shared else b"")
    blocks += _u(8, 0x10)
    pages = _u(8, 0 | 0x08) + _text("pc.ram") + bytes(range(256)) * 16
    pages += _u(8, PAGE | 0x28) + b"x" * PAGE + _u(8, 2 * PAGE | 0x22) + b"\0"
    pages += _u(8, 0x02) + _text("vga.vram") + b"\0" + more
    started = _text("ram") + _u(4, 0, 4)
    said = json.dumps({"page_size": PAGE, "devices": [device]}).encode()
    return b"".join((
        b"QEVM", _u(4, 3), configuration, b"\x08" + _u(2, 1, 0),
        _section(1, 2, blocks, started), _section(2, 2, pages + _u(8, 0x10)),
        _section(3, 2, _u(8, 0x10)),
        _section(4, 9, _DEVICE_BYTES, _text("0000:00:02.0/dev") + _u(4, 0, 2)),
        b"\0\6", _u(4, len(said)), said,
    ))  # fmt: skip


def qemu_streams() -> list[bytes]:
    """Inputs of `qemu-stream`."""
    packed = _u(8, 5 * PAGE | 0x40) + _text("pc.ram") + b"\1" + _u(2, 3) + b"abc"
    packed += _u(8, 6 * PAGE | 0x120) + _u(4, 5) + b"abcde"
    return [qemu_stream(), qemu_stream(shared=True), qemu_stream(more=packed)]


def qemu(data: bytes) -> None:
    """Shown, with numbers that add up, or SourceError."""
    with contextlib.suppress(SourceError):
        found = read_stream(BytesIO(data))
        json.dumps(found, default=bytes.hex)
        assert all(block["size"] > 0 for block in found["blocks"])


TARGETS = {"device-state": device_state, "qemu-stream": qemu}
