"""What a section says of itself: the names and types of its fields, as JSON in front of them.

QEMU appends such a description to its stream, for tools (vmdesc); here it stands in front of each
section and is part of it, so that a loader can say which field does not fit, and `pageferry
inspect` can show what nobody here knows. It comes from the peer: nothing in it is believed.
"""

from __future__ import annotations

import msgspec

# Of one section, bytes of JSON: some ten thousand fields.
MAX_LAYOUT = 1 << 20
# Structures in structures, arrays of arrays.
MAX_DEPTH = 16
# Bytes of a name.
MAX_NAME = 255
# Elements of one section's arrays, all together, where nothing bounds them but the stream.
MAX_VALUES = 1 << 20

# What msgspec raises for bytes that are no layout (messages.UNDECODABLE).
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Shape(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The type of a value. `size`: bytes of a buffer, elements of an array. `of`: its elements;
    `key`: of a map. `struct`: what a structure consists of."""

    type: str
    size: int = 0
    of: Shape | None = None
    key: Shape | None = None
    struct: Layout | None = None

    def __str__(self) -> str:
        # no deeper: a peer's may be nested as deep as it likes
        inner = f" of {self.of.type}" if self.of is not None else ""
        return f"{self.type}{f'[{self.size}]' if self.size else ''}{inner}"


class Column(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A field. `conditional`: a byte in front of it says whether it is there."""

    name: str
    shape: Shape
    conditional: bool = False


class Layout(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is written of a structure or section: its fields in their order, then, if there may be
    subsections at all, how many are there, and of each its place in this list, length, content."""

    name: str
    version: int
    fields: list[Column]
    subsections: list[Layout] = []


_decoder = msgspec.json.Decoder(Layout)


def encode(layout: Layout) -> bytes:
    return msgspec.json.encode(layout)


def decode(data: bytes | memoryview) -> Layout:
    """Raises UNDECODABLE's."""
    return _decoder.decode(data)


def is_name(text: str) -> bool:
    return text.isprintable() and 0 < len(text.encode("utf-8", "replace")) <= MAX_NAME
