"""Where we are in a section: bytes out, bytes in, and the name of the field that is at fault.

Numbers are big-endian, as in QEMU's streams. Every length is compared with what is left before
anything is allocated.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ..errors import DestinationError, PageferryError, PeerRefused, RemoteProtocolError, SourceError
from ..messages import printable

_COUNT = struct.Struct(">I")


class Place:
    """The section `name` (`instance`), and the path of the field that is being looked at."""

    def __init__(self, name: str, instance: int = 0) -> None:
        self.name = name
        self.instance = instance
        self._path: list[str] = []

    @contextlib.contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Within the field (or element, "[3]") `part`."""
        self._path.append(part)
        try:
            yield
        finally:
            self._path.pop()

    def error(self, cls: type[PageferryError], why: str) -> PageferryError:
        """An error that says where; its data has `section`, `instance` and, if there is one,
        `field`."""
        path = "".join(part if part.startswith("[") else f".{part}" for part in self._path)
        data: dict[str, Any] = {"section": self.name, "instance": self.instance}
        where = f"device state: section {self.name!r}"
        if self.instance:
            where += f" ({self.instance})"
        if path:
            data["field"] = printable(path.lstrip("."))
            where += f" field {data['field']!r}"
        # names and types are the peer's, and a person reads them
        return cls(printable(f"{where}: {why}"), **data)

    def call(self, cls: type[PageferryError], what: str, function: Callable[..., Any],
             *arguments: Any) -> Any:  # fmt: skip
        """What a hook or condition returns; its exception as `cls`, with the place."""
        try:
            return function(*arguments)
        except Exception as e:
            why = e.message if isinstance(e, PageferryError) else f"{type(e).__name__}: {e}"
            raise self.error(cls, f"{what} failed: {why}") from e


class Writer(Place):
    """What is saved. What cannot be is SourceError."""

    def __init__(self, name: str, instance: int = 0) -> None:
        super().__init__(name, instance)
        self.data = bytearray()

    def fail(self, why: str) -> NoReturn:
        raise self.error(SourceError, why)

    def flag(self, value: bool) -> None:
        self.data.append(1 if value else 0)

    def count(self, n: int) -> None:
        self.data += _COUNT.pack(n)

    def hook(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.call(SourceError, what, function, *arguments)


class Reader(Place):
    """What is loaded: all of `data`, which the peer made."""

    def __init__(self, data: bytes | memoryview, name: str, instance: int = 0) -> None:
        super().__init__(name, instance)
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def damaged(self, why: str) -> NoReturn:
        """The bytes make no sense."""
        raise self.error(RemoteProtocolError, why)

    def refuse(self, why: str) -> NoReturn:
        """They do, and do not fit."""
        raise self.error(PeerRefused, why)

    def take(self, n: int) -> memoryview:
        if n > self.left:
            self.damaged(f"ends too early: {n} bytes were to come, {self.left} are there")
        begin, self._at = self._at, self._at + n
        return self._data[begin : self._at]

    def flag(self) -> bool:
        value = self.take(1)[0]
        if value > 1:
            self.damaged(f"{value} is neither 0 nor 1")
        return value == 1

    def count(self) -> int:
        n: int = _COUNT.unpack(self.take(_COUNT.size))[0]
        return n

    def hook(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.call(DestinationError, what, function, *arguments)

    @contextlib.contextmanager
    def within(self, length: int) -> Iterator[None]:
        """The next `length` bytes, all of which must be taken."""
        if length > self.left:
            self.damaged(f"ends too early: {length} bytes were to come, {self.left} are there")
        outer, end = self._data, self._at + length
        self._data = outer[:end]
        yield
        self.end()
        self._data = outer

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            self.damaged(f"is {self.left} bytes longer than what it says of itself")
