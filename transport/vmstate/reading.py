"""What a section holds, by what it says of itself: for tools that show it, and know none of it.

Everything is the peer's word, the types as well. What does not make sense is RemoteProtocolError.
"""

from __future__ import annotations

from typing import Any

from .coding import Reader
from .kinds import NUMBERS
from .layout import MAX_DEPTH, MAX_VALUES, Column, Layout, Shape
from .stream import Saved


def values_of(saved: Saved) -> dict[str, Any]:
    """Fields by name: numbers, texts, bytes, lists, dicts (structures). A map is a list of pairs,
    for its keys may be structures. A field that is not there is left out; subsections come last,
    by their names."""
    values = _Values(Reader(saved.content, *saved.key))
    found = values.structure(saved.layout)
    values.source.end()
    return found


class _Values:
    """One section being read; bounded in depth and number of values."""

    def __init__(self, source: Reader) -> None:
        self.source = source
        self._depth = 0
        self._left = MAX_VALUES

    def structure(self, layout: Layout) -> dict[str, Any]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.source.damaged(f"is nested deeper than {MAX_DEPTH}")
        found: dict[str, Any] = {}
        for column in layout.fields:
            with self.source.at(column.name):
                self._field(column, found)
        if layout.subsections:
            self._subsections(layout, found)
        self._depth -= 1
        return found

    def _field(self, column: Column, found: dict[str, Any]) -> None:
        if not column.conditional or self.source.flag():
            value = self._value(column.shape)
            if column.shape.type != "unused":
                found[column.name] = value

    def _subsections(self, layout: Layout, found: dict[str, Any]) -> None:
        for _ in range(self._count(self.source.count())):
            index, length = self.source.count(), self.source.count()
            if index >= len(layout.subsections):
                self.source.damaged(f"has no subsection {index}")
            inner = layout.subsections[index]
            with self.source.at(inner.name), self.source.within(length):
                found[inner.name] = self.structure(inner)

    def _count(self, n: int) -> int:
        """`n` more values are to come."""
        self._left -= n
        if self._left < 0:
            self.source.damaged(f"has more than {MAX_VALUES} values")
        return n

    def _value(self, shape: Shape) -> Any:
        source = self.source
        self._count(1)
        match shape:
            case Shape(type=name) if name in NUMBERS:
                return NUMBERS[name].load_all(source, 1)[0]
            case Shape(type="bool"):
                return source.flag()
            case Shape(type="buffer" | "unused"):
                return bytes(source.take(max(shape.size, 0)))
            case Shape(type="blob"):
                return bytes(source.take(source.count()))
            case Shape(type="text"):
                return str(source.take(source.count()), "utf-8", "replace")
            case Shape(type="struct", struct=Layout() as layout):
                return self.structure(layout)
            case Shape(of=Shape() as of):
                return self._composed(shape, of)
            case _:
                source.damaged(f"is of a type that is not known: {shape.type[:40]}")

    def _composed(self, shape: Shape, of: Shape) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.source.damaged(f"is nested deeper than {MAX_DEPTH}")
        found: Any
        match shape:
            case Shape(type="array"):
                found = self._elements(of, max(shape.size, 0))
            case Shape(type="list"):
                found = self._elements(of, self.source.count())
            case Shape(type="nullable"):
                found = self._value(of) if self.source.flag() else None
            case Shape(type="map", key=Shape() as key):
                n = self._count(self.source.count())
                found = [[self._value(key), self._value(of)] for _ in range(n)]
            case _:
                self.source.damaged(f"is of a type that is not known: {shape.type[:40]}")
        self._depth -= 1
        return found

    def _elements(self, of: Shape, n: int) -> list[Any]:
        self._count(n)
        if (number := NUMBERS.get(of.type)) is not None:
            return number.load_all(self.source, n)
        found = []
        for i in range(n):
            with self.source.at(f"[{i}]"):
                found.append(self._value(of))
        return found
