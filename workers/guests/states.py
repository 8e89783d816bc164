"""Device states of the guests: one section each, called as its kind. Pure.

What a guest's `save_state` returns is a stream (transport/vmstate/) of its section; what its
`load_state` is given is one with the sections of the source's kind. A destination of another kind
has no use for it, and takes memory alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ...transport.errors import RemoteProtocolError
from ...transport.messages import MAX_BLOCKS, MAX_MESSAGE
from ...transport.vmstate import (
    U8,
    U64,
    Blob,
    Description,
    Field,
    List,
    Section,
    Struct,
    Text,
    load,
    save,
)

# Devices and small memories: a 4K screen has 32 MiB.
MAX_QEMU = MAX_MESSAGE // 2
# Of an ELF core what is no memory; between two segments of it some KiB of notes a thread.
MAX_PIECE = 64 << 20

# Version 1 is of before there was random access.
DEMO = Description(
    "demo", 2, 1,
    (
        Field("position", U64), Field("passes", U64), Field("rate", U64),
        Field("content", Text(16)), Field("seed", U64),
        Field("access", Text(16), since=2), Field("vcpus", U8, since=2),
    ),
)  # fmt: skip
# QEMU's own migration stream without the RAM that pageferry moves: opaque here, see
# pipeline/qemu_stream.py for what is in it.
QEMU = Description("qemu", 1, 1, (Field("stream", Blob(MAX_QEMU)),))
_PIECE = Description("piece", 1, 1, (Field("offset", U64), Field("data", Blob(MAX_PIECE))))
IMAGE = Description(
    "image", 1, 1,
    (
        Field("pieces", List(Struct(_PIECE, SimpleNamespace), 2 * MAX_BLOCKS + 1)),
        Field("sum", U64),
    ),
)  # fmt: skip


def state_of(description: Description, value: Any) -> bytes:
    """A device state of one section."""
    return save([Section(description, value)])


def state_into(description: Description, state: bytes, value: Any) -> None:
    """Load one that has this section and no other. RemoteProtocolError, PeerRefused."""
    if not state:
        name = description.name
        raise RemoteProtocolError(f"device state: section {name!r} is missing", section=name)
    load(state, [Section(description, value)])
