"""Targets: device states, and sections with right sums around bytes that were made up.

`sealed` is what the other end could write if it meant harm; sums find accidents only.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import xxhash

from pageferry.pipeline.device_state import GLOBAL_STATE, RunState, take
from pageferry.transport.errors import PeerRefused, RemoteProtocolError
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


TARGETS = {"device-state": device_state}
