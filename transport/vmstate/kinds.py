"""Types of fields: how a value is written, read, and said to be.

Each has `save(out, value, owner)`, `load(source, there, before, owner)` and `shape()`. `there` is
the peer's shape, of which `fits` has made sure that it is ours as far as this kind goes; `before`
is what the field holds now; `owner` the object that it is a field of.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .coding import Reader, Writer
from .layout import Shape


class Kind(ABC):
    """The type of a field. `has_value`: there is an attribute of the owner that holds it."""

    has_value = True

    @abstractmethod
    def shape(self) -> Shape:
        """As the stream says it."""

    @abstractmethod
    def save(self, out: Writer, value: Any, owner: object) -> None: ...

    @abstractmethod
    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        """The value; where there is an object already that is loaded into, this object."""

    def fits(self, source: Reader, there: Shape) -> None:
        """PeerRefused if the peer's field is of another type."""
        ours = self.shape()
        if (there.type, there.size) != (ours.type, ours.size):
            source.refuse(f"is {there} there and {ours} here")
        if (there.of is None) != (ours.of is None) or (there.key is None) != (ours.key is None):
            source.damaged(f"{there.type} of nothing")
        if (there.struct is None) != (ours.struct is None):
            source.damaged("a structure without fields")


@dataclass(frozen=True)
class Number(Kind):
    """A number of fixed size. `type`: as in QEMU's descriptions; `code`: as in struct(3)."""

    type: str
    code: str

    def shape(self) -> Shape:
        return Shape(self.type)

    @property
    def bytes(self) -> int:
        return struct.calcsize(f">{self.code}")

    def save(self, out: Writer, value: Any, owner: object) -> None:
        self.save_all(out, [value])

    def save_all(self, out: Writer, values: Sequence[Any]) -> None:
        try:
            out.data += struct.pack(f">{len(values)}{self.code}", *values)
        except (struct.error, OverflowError) as e:
            shown = values[0] if len(values) == 1 else values
            out.fail(f"{_short(shown)} is no {self.type}: {e}")

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        return self.load_all(source, 1)[0]

    def load_all(self, source: Reader, n: int) -> list[Any]:
        return list(struct.unpack(f">{n}{self.code}", source.take(n * self.bytes)))


@dataclass(frozen=True)
class Bool(Kind):
    """A byte that is 0 or 1."""

    def shape(self) -> Shape:
        return Shape("bool")

    def save(self, out: Writer, value: Any, owner: object) -> None:
        if value not in (True, False):
            out.fail(f"{_short(value)} is no bool")
        out.flag(bool(value))

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> bool:
        return source.flag()


U8, U16, U32, U64 = (
    Number(f"uint{8 << i}", code) for i, code in enumerate("BHIQ")
)  # fmt: skip
I8, I16, I32, I64 = (
    Number(f"int{8 << i}", code) for i, code in enumerate("bhiq")
)  # fmt: skip
FLOAT64 = Number("float64", "d")
BOOL = Bool()
NUMBERS = {kind.type: kind for kind in (U8, U16, U32, U64, I8, I16, I32, I64, FLOAT64)}


@dataclass(frozen=True)
class Buffer(Kind):
    """Exactly `size` bytes."""

    size: int

    def shape(self) -> Shape:
        return Shape("buffer", self.size)

    def save(self, out: Writer, value: Any, owner: object) -> None:
        data = _bytes(out, value)
        if len(data) != self.size:
            out.fail(f"has {len(data)} bytes, not {self.size}")
        out.data += data

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> bytes:
        return bytes(source.take(self.size))


@dataclass(frozen=True)
class Unused(Kind):
    """`size` bytes that an older version had here: zeros are written, what comes is not looked at
    (QEMU: VMSTATE_UNUSED)."""

    size: int
    has_value = False

    def shape(self) -> Shape:
        return Shape("unused", self.size)

    def save(self, out: Writer, value: Any, owner: object) -> None:
        out.data += bytes(self.size)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        source.take(self.size)
        return before

    def fits(self, source: Reader, there: Shape) -> None:
        # whatever was there once, of that many bytes
        size = there.size if there.type in ("buffer", "unused") else _size_of(there)
        if size != self.size:
            source.refuse(f"is {there} there and {self.size} unused bytes here")


def _size_of(shape: Shape) -> int:
    number = NUMBERS.get(shape.type)
    return number.bytes if number is not None else 1 if shape.type == "bool" else -1


@dataclass(frozen=True)
class Counted(Kind):
    """Base of what comes with its length in front (u32). `most`: how long it may be, at both ends.
    `count`: a field of the same object that has the length too (QEMU: VMSTATE_VARRAY_…); it must
    agree, at both ends, and come before."""

    most: int
    count: str = ""

    def save_count(self, out: Writer, n: int, owner: object) -> None:
        if n > self.most:
            out.fail(f"has {n} elements, {self.most} at the most")
        if self.count and (said := getattr(owner, self.count, None)) != n:
            out.fail(f"has {n} elements, and {self.count!r} says {said}")
        out.count(n)

    def load_count(self, source: Reader, owner: object) -> int:
        n = source.count()
        if n > self.most:
            source.refuse(f"has {n} elements, here {self.most} at the most")
        if self.count and (said := getattr(owner, self.count, None)) != n:
            source.damaged(f"has {n} elements, and {self.count!r} says {said}")
        return n


@dataclass(frozen=True)
class Blob(Counted):
    """Up to `most` bytes."""

    def shape(self) -> Shape:
        return Shape("blob")

    def save(self, out: Writer, value: Any, owner: object) -> None:
        data = _bytes(out, value)
        self.save_count(out, len(data), owner)
        out.data += data

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> bytes:
        return bytes(source.take(self.load_count(source, owner)))


@dataclass(frozen=True)
class Text(Counted):
    """A text, UTF-8, of up to `most` bytes."""

    def shape(self) -> Shape:
        return Shape("text")

    def save(self, out: Writer, value: Any, owner: object) -> None:
        if not isinstance(value, str):
            out.fail(f"{_short(value)} is no text")
        try:
            data = value.encode()
        except UnicodeEncodeError:
            out.fail(f"{_short(value)} is not UTF-8")
        self.save_count(out, len(data), owner)
        out.data += data

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> str:
        try:
            return str(source.take(self.load_count(source, owner)), "utf-8")
        except UnicodeDecodeError:
            source.damaged("is no text")


@dataclass(frozen=True)
class Array(Kind):
    """Exactly `length` elements, a list. Structures are loaded into the objects that are there."""

    of: Kind
    length: int

    def shape(self) -> Shape:
        return Shape("array", self.length, of=self.of.shape())

    def save(self, out: Writer, value: Any, owner: object) -> None:
        values = _sequence(out, value)
        if len(values) != self.length:
            out.fail(f"has {len(values)} elements, not {self.length}")
        save_elements(out, self.of, values, owner)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> list[Any]:
        return load_elements(source, self.of, there, self.length, before, owner)


@dataclass(frozen=True)
class List(Counted):
    """Up to `most` elements of `of`, a list (QEMU: VMSTATE_VARRAY, QTAILQ, QLIST)."""

    of: Kind = U8

    def __init__(self, of: Kind, most: int, count: str = "") -> None:
        super().__init__(most, count)
        object.__setattr__(self, "of", of)

    def shape(self) -> Shape:
        return Shape("list", of=self.of.shape())

    def save(self, out: Writer, value: Any, owner: object) -> None:
        values = _sequence(out, value)
        self.save_count(out, len(values), owner)
        save_elements(out, self.of, values, owner)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> list[Any]:
        n = self.load_count(source, owner)
        return load_elements(source, self.of, there, n, before, owner)


@dataclass(frozen=True)
class Map(Counted):
    """Up to `most` entries, a dict, in the order in which it has them (QEMU: GTREE)."""

    key: Kind = U64
    of: Kind = U64

    def __init__(self, key: Kind, of: Kind, most: int) -> None:
        super().__init__(most)
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "of", of)

    def shape(self) -> Shape:
        return Shape("map", of=self.of.shape(), key=self.key.shape())

    def save(self, out: Writer, value: Any, owner: object) -> None:
        if not isinstance(value, Mapping):
            out.fail(f"{_short(value)} is no mapping")
        self.save_count(out, len(value), owner)
        for key, element in value.items():
            with out.at(f"[{_short(key)}]"):
                self.key.save(out, key, owner)
                self.of.save(out, element, owner)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> dict[Any, Any]:
        assert there.key is not None and there.of is not None  # `fits` has looked
        known = before if isinstance(before, Mapping) else {}
        found: dict[Any, Any] = {}
        self.key.fits(source, there.key)
        self.of.fits(source, there.of)
        for i in range(self.load_count(source, owner)):
            with source.at(f"[{i}]"):
                key = self.key.load(source, there.key, None, owner)
                if key in found:
                    source.damaged(f"{_short(key)} is there twice")
                found[key] = self.of.load(source, there.of, known.get(key), owner)
        return found


@dataclass(frozen=True)
class Nullable(Kind):
    """`of`, or None: a byte says which (QEMU: pointers that may be NULL)."""

    of: Kind

    def shape(self) -> Shape:
        return Shape("nullable", of=self.of.shape())

    def save(self, out: Writer, value: Any, owner: object) -> None:
        out.flag(value is not None)
        if value is not None:
            self.of.save(out, value, owner)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        assert there.of is not None  # `fits` has looked
        self.of.fits(source, there.of)
        return self.of.load(source, there.of, before, owner) if source.flag() else None


@dataclass(frozen=True)
class Equal(Kind):
    """`of`, which must be the same at both ends (QEMU: VMSTATE_…_EQUAL)."""

    of: Kind

    def shape(self) -> Shape:
        return self.of.shape()

    def save(self, out: Writer, value: Any, owner: object) -> None:
        self.of.save(out, value, owner)

    def fits(self, source: Reader, there: Shape) -> None:
        self.of.fits(source, there)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        value = self.of.load(source, there, before, owner)
        if value != before:
            source.refuse(f"is {_short(value)} there and {_short(before)} here")
        return before


def save_elements(out: Writer, of: Kind, values: Sequence[Any], owner: object) -> None:
    if isinstance(of, Number):
        of.save_all(out, values)
        return
    for i, value in enumerate(values):
        with out.at(f"[{i}]"):
            of.save(out, value, owner)


def load_elements(
    source: Reader, of: Kind, there: Shape, n: int, before: Any, owner: object
) -> list[Any]:
    """`n` elements; structures into those of `before`, as far as there are some."""
    assert there.of is not None  # `fits` has looked
    of.fits(source, there.of)
    if isinstance(of, Number):
        return of.load_all(source, n)
    known = list(before) if isinstance(before, Sequence) else []
    found = []
    for i in range(n):
        with source.at(f"[{i}]"):
            found.append(of.load(source, there.of, known[i] if i < len(known) else None, owner))
    return found


def _sequence(out: Writer, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        out.fail(f"{_short(value)} is no list")
    return list(value)


def _bytes(out: Writer, value: Any) -> bytes | bytearray | memoryview:
    if isinstance(value, bytes | bytearray):
        return value
    if isinstance(value, memoryview):
        return value.cast("B")
    out.fail(f"{_short(value)} is no bytes")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
