"""QEMU's own migration stream, as `migrate exec:cat>FILE` saves it: what is in it. Pure.

    "QEVM", 3                                             header
    7  name, subsections                                  configuration
    1 | 4  id, name, instance, version, content           section: first part, or all of it
    2 | 3  id, content                                    section: another part, or the last
    7e id                                                 behind each
    8  command, length, data
    0                                                     end
    6  length, JSON                                       what the content of each device means

In QEMU, migration/savevm.c, ram.c, vmstate.c, scripts/analyze-migration.py. Devices are read by
the description at the end, and nothing else: where that has no structure, by its number of bytes.
RAM is passed over page by page. The file may have been made to mislead: what makes no sense is
SourceError with the section in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

import msgspec

from ..transport.errors import SourceError
from ..transport.messages import UNDECODABLE, printable

MAGIC = b"QEVM"
VERSION = 3
_EOF, _START, _PART, _END, _FULL, _SUBSECTION = range(6)
_VMDESCRIPTION, _CONFIGURATION, _COMMAND, _FOOTER = 6, 7, 8, 0x7E
# The description of a large machine has some hundred KiB; QEMU's own tool looks at 10 MB.
_MAX_DESCRIPTION = 16 << 20
_MAX_DEPTH = 32
# Fields and array elements of a stream, all together.
_MAX_VALUES = 2 << 20
_MAX_COMMANDS = 4096
_COMMANDS = (
    "invalid", "open-return-path", "ping", "postcopy-advise", "postcopy-listen", "postcopy-run",
    "postcopy-ram-discard", "postcopy-resume", "packaged", "recv-bitmap", "enable-colo",
    "switchover-start",
)  # fmt: skip
_INTEGERS = (1, 2, 4, 8)


class _Struct(msgspec.Struct):
    fields: list[_Field] = []
    subsections: list[_Struct] = []
    vmsd_name: str = ""


class _Field(msgspec.Struct):
    name: str
    type: str = ""
    size: int = 0
    array_len: int = 1
    struct: _Struct | None = None


class _Device(_Struct):
    name: str = ""
    instance_id: int = 0


class _Description(msgspec.Struct):
    page_size: int
    devices: list[_Device]


_decoder = msgspec.json.Decoder(_Description)


class _File:
    """A seekable file, read in order; where we are in it, for errors."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, 2)
        file.seek(0)
        self._at = 0  # tell() would be a system call
        self._where: list[str] = []

    @contextlib.contextmanager
    def at(self, part: str) -> Iterator[None]:
        self._where.append(part)
        yield
        self._where.pop()

    def fail(self, why: str) -> NoReturn:
        where = f" in {' '.join(self._where)}" if self._where else ""
        raise SourceError(printable(f"QEMU stream: {why}{where}, at byte {self._at}"))

    @property
    def left(self) -> int:
        return self.size - self._at

    def take(self, n: int) -> bytes:
        # asked first: a file may say that a field has an exabyte
        if n < 0 or n > self.left or len(data := self._file.read(n)) < n:
            self.fail(f"is truncated: {n} bytes were to come")
        self._at += n
        return data

    def peek(self) -> int:
        """The next byte, which stays; -1 at the end."""
        data = self._file.read(1)
        self._file.seek(self._at)
        return data[0] if data else -1

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self, size: int = -1) -> str:
        """With its length in a byte in front, or of `size` bytes."""
        return self.take(self.number(1) if size < 0 else size).decode("utf-8", "replace")

    def tail(self, n: int) -> bytes:
        """The last bytes, `n` at the most."""
        self._file.seek(max(0, self.size - n))
        data = self._file.read()
        self._file.seek(self._at)
        return data

    def pages(self, page_size: int) -> tuple[int, int]:
        """Address and flags of a page's header."""
        value = self.number(8)
        return value & ~(page_size - 1), value & (page_size - 1)


class _Ram:
    """RAM sections: the blocks, and how many pages of each came in which way."""

    _ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
    _XBZRLE, _COMPRESS, _FLUSH = 0x40, 0x100, 0x200

    def __init__(self, page_size: int, *, ignore_shared: bool) -> None:
        self._page_size = page_size
        self._ignore_shared = ignore_shared
        self.blocks: dict[str, dict[str, Any]] = {}
        self._block: dict[str, Any] | None = None

    def read(self, file: _File) -> None:
        """One section, to its end."""
        while True:
            address, flags = file.pages(self._page_size)
            if flags & self._MEM_SIZE:
                self._read_blocks(file, address)
            kind = flags & (self._ZERO | self._PAGE | self._XBZRLE | self._COMPRESS)
            if kind:
                self._read_page(file, address, kind, flags)
            elif flags & self._EOS:
                return
            elif not flags & (self._MEM_SIZE | self._FLUSH):
                file.fail(f"RAM flags {flags:#x}")

    def _read_blocks(self, file: _File, total: int) -> None:
        while total > 0:
            name, size = file.text(), file.number(8)
            if size <= 0 or size > total or name in self.blocks:
                file.fail(f"RAM block {name!r} of {size} bytes, {total} are left")
            block: dict[str, Any] = {"name": name, "size": size}
            block["pages"] = {"total": -(-size // self._page_size)}
            if self._ignore_shared:
                block["address"] = file.number(8)
            self.blocks[name] = block
            total -= size

    def _read_page(self, file: _File, address: int, kind: int, flags: int) -> None:
        if not flags & self._CONTINUE:
            self._block = self.blocks.get(name := file.text())
            if self._block is None:
                file.fail(f"a page of RAM block {name!r}, which there is not")
        if self._block is None or address >= self._block["size"]:
            file.fail(f"a page at {address:#x} of no RAM block")
        what = self._read_content(file, kind)
        pages = self._block["pages"]
        pages[what] = pages.get(what, 0) + 1

    def _read_content(self, file: _File, kind: int) -> str:
        """The page's content is passed over; QEMU's name for how it came."""
        if kind == self._ZERO:
            file.take(1)
            return "duplicate"
        if kind == self._PAGE:
            file.take(self._page_size)
            return "normal"
        if kind == self._XBZRLE:
            file.take(1)
            file.take(file.number(2))
            return "xbzrle"
        if kind == self._COMPRESS:
            file.take(file.number(4))
            return "compressed"
        file.fail(f"a page that came in two ways ({kind:#x})")


class _Devices:
    """Contents of devices, by their descriptions."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._left = _MAX_VALUES
        self._depth = 0

    def read(self, struct: _Struct) -> dict[str, Any]:
        """Fields by name, several of one name as a list; then subsections."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._file.fail("a description nested too deep")
        found: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for field in struct.fields:
            for value in self._values(field):
                self._add(found, seen, field.name, value)
        for subsection in struct.subsections:
            with self._file.at(f"subsection {subsection.vmsd_name!r}"):
                found[subsection.vmsd_name] = self._subsection(subsection)
        self._depth -= 1
        return found

    @staticmethod
    def _add(found: dict[str, Any], seen: dict[str, int], name: str, value: Any) -> None:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] == 1:
            found[name] = value
        elif seen[name] == 2:
            found[name] = [found[name], value]
        else:
            found[name].append(value)

    def _values(self, field: _Field) -> Iterator[Any]:
        self._left -= max(field.array_len, 1)
        if self._left < 0:
            self._file.fail(f"more than {_MAX_VALUES} values")
        for _ in range(field.array_len):
            yield self._value(field)

    def _value(self, field: _Field) -> Any:
        if field.struct is not None:
            return self.read(field.struct)
        data = self._file.take(field.size)
        kind = field.type.removesuffix(" equal")
        if kind == "bool" and field.size == 1:
            return data != b"\0"
        if kind.startswith(("int", "uint", "timer")) and field.size in _INTEGERS:
            return int.from_bytes(data, "little" if kind.endswith(" le") else "big",
                                  signed=kind.startswith("int"))  # fmt: skip
        return data

    def _subsection(self, struct: _Struct) -> dict[str, Any]:
        if self._file.number(1) != _SUBSECTION or self._file.text() != struct.vmsd_name:
            self._file.fail("another one is there than is described")
        self._file.number(4)
        return self.read(struct)


class _Stream:
    def __init__(self, file: BinaryIO) -> None:
        self._file = _File(file)
        self._names: dict[int, tuple[str, int]] = {}
        self._ram: _Ram | None = None
        self._footers: bool | None = None  # whether sections have them
        self._devices = _Devices(self._file)
        self.sections: dict[str, Any] = {}
        self.commands: list[dict[str, Any]] = []
        self.configuration: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        file = self._file
        if file.take(4) != MAGIC or (version := file.number(4)) != VERSION:
            file.fail("is none of version 3")
        said = self._description()
        self._page_size = said.page_size
        if self._page_size & (self._page_size - 1) or not 1024 <= self._page_size <= 1 << 16:
            file.fail(f"pages of {self._page_size} bytes")
        self._known = {(device.name, device.instance_id): device for device in said.devices}
        while (kind := file.number(1)) != _EOF:
            self._part(kind)
        if file.number(1) != _VMDESCRIPTION or file.number(4) != file.left:
            file.fail("something else follows its end")
        return self._result(version)

    def _result(self, version: int) -> dict[str, Any]:
        blocks = list(self._ram.blocks.values()) if self._ram is not None else []
        return {
            "format": "qemu-stream", "version": version, "size": self._file.size,
            "configuration": self.configuration, "page-size": self._page_size,
            "blocks": blocks, "sections": self.sections, "commands": self.commands,
        }  # fmt: skip

    def _description(self) -> _Description:
        """What stands at the end; nobody can read devices without it."""
        tail = self._file.tail(_MAX_DESCRIPTION)
        begin = tail.find(b"{", tail.rfind(b"\0") + 1)
        head = tail[begin - 5 : begin] if begin >= 5 else b""
        if head != bytes([_VMDESCRIPTION]) + (len(tail) - begin).to_bytes(4, "big"):
            self._file.fail("does not end with the description of its devices: is truncated, or "
                            "was saved with suppress-vmdesc")  # fmt: skip
        try:
            return _decoder.decode(tail[begin:])
        except UNDECODABLE as e:
            self._file.fail(f"the description of its devices makes no sense ({e})")

    def _part(self, kind: int) -> None:
        file = self._file
        if kind == _CONFIGURATION:
            with file.at("the configuration"):
                self._configuration()
        elif kind == _COMMAND:
            self._command()
        elif kind in (_START, _FULL):
            section = file.number(4)
            name, instance = file.text(), file.number(4)
            version = file.number(4)
            if section in self._names:
                file.fail(f"a second section {section}")
            self._names[section] = name, instance
            with file.at(f"section {name!r} ({section})"):
                self._section(section, version)
                self._footer(section)
        elif kind in (_PART, _END):
            section = file.number(4)
            name, instance = self._names.get(section, ("", 0))
            with file.at(f"section {name!r} ({section})"):
                if name != "ram" or self._ram is None:
                    file.fail("a part of a section that has none")
                self._ram.read(file)
                self._footer(section)
        else:
            file.fail(f"a section of type {kind}")

    def _footer(self, section: int) -> None:
        """Old machines have none: behind all sections, or behind none."""
        there = self._file.peek() == _FOOTER
        if self._footers not in (None, there):
            self._file.fail("its end is missing")
        self._footers = there
        if there:
            self._file.take(1)
            if (found := self._file.number(4)) != section:
                self._file.fail(f"it ends as section {found}")

    def _section(self, section: int, version: int) -> None:
        name, instance = self._names[section]
        shown: dict[str, Any] = {"instance-id": instance, "version": version}
        device = self._known.get((name, instance))
        if name == "ram":
            capabilities = self.configuration.get("capabilities", ())
            if "mapped-ram" in capabilities:
                self._file.fail("mapped-ram, which is not read here")
            ignored = "x-ignore-shared" in capabilities
            self._ram = _Ram(self._page_size, ignore_shared=ignored)
            self._ram.read(self._file)
        elif device is not None:
            shown["fields"] = self._devices.read(device)
        else:
            self._file.fail("it is not described, so that nobody knows where it ends")
        self.sections[f"{printable(name)} ({section})"] = shown

    def _configuration(self) -> None:
        """Its description came with QEMU 9: what it can have is known."""
        file, found = self._file, self.configuration
        found["machine"] = printable(file.text(min(file.number(4), 1 << 16)))
        while file.peek() == _SUBSECTION:
            file.take(1)
            name = file.text()
            file.number(4)
            match name:
                case "configuration/target-page-bits":
                    found["target-page-bits"] = file.number(4)
                case "configuration/capabilities":
                    names = [file.text() for _ in range(min(file.number(4), 256))]
                    found["capabilities"] = [printable(text) for text in names]
                case "configuration/uuid":
                    found["uuid"] = file.take(16)
                case _:
                    file.fail(f"subsection {name!r} is not known")

    def _command(self) -> None:
        command, size = self._file.number(2), self._file.number(2)
        self._file.take(size)
        if len(self.commands) == _MAX_COMMANDS:
            self._file.fail(f"more than {_MAX_COMMANDS} commands")
        name = _COMMANDS[command] if command < len(_COMMANDS) else str(command)
        self.commands.append({"command": name, "size": size})


def read_stream(file: BinaryIO) -> dict[str, Any]:
    """A whole stream: its blocks with page counts, and what its sections hold. Bytes are bytes.
    SourceError if it is none, or not whole."""
    return _Stream(file).read()
