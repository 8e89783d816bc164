"""What is in a saved migration, or a memory image: `pageferry inspect`.

What a file is, its first bytes say; one that says nothing is a raw image. A format that is added
is a row of FORMATS.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import xxhash

from ..transport import snapshot_format, vmstate
from ..transport.errors import PageferryError, RemoteProtocolError, SourceError
from ..transport.messages import MAX_STATE
from ..transport.pages import total_pages
from ..workers.guests.image import ImageSource, image_pieces
from ..workers.guests.uri import GuestUri
from ..workers.snapshot_file import CheckedBlock, open_snapshot
from . import qemu_stream

# What of a value is shown, unless all is asked for: bytes, and elements of a list.
_SHOWN_BYTES, _SHOWN_ELEMENTS = 64, 64
# Files of a directory that are shown.
_MAX_FILES = 10_000
_PARTIAL = re.compile(r"\.(.+)\.pageferry-part")

Show = Callable[[BinaryIO, str], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """A kind of file that begins with `magic`. `show(file, path)`: what is in it, bytes as bytes;
    `path` can be opened, if it must be. SourceError if it is not whole."""

    magic: bytes
    show: Show


def _state_stream(file: BinaryIO, path: str) -> dict[str, Any]:
    data = file.read(MAX_STATE + 1)
    if len(data) > MAX_STATE:
        raise SourceError(f"a device state of more than {MAX_STATE >> 20} MiB")
    return {"format": "device-state", "size": len(data), "sections": state_sections(data)}


def state_sections(data: bytes) -> dict[str, Any]:
    """What a device state (transport/vmstate/) holds, by "name (instance)". For formats that have
    one in them."""
    try:
        return {f"{s.name} ({s.instance})": _state_section(s) for s in vmstate.parse(data)}
    except RemoteProtocolError as e:
        raise SourceError(e.message, **e.data) from e


def _state_section(saved: vmstate.Saved) -> dict[str, Any]:
    fields = vmstate.values_of(saved)
    for name, value in fields.items():
        if isinstance(value, bytes) and value.startswith(qemu_stream.MAGIC):
            fields[name] = qemu_stream.read_stream(BytesIO(value))
    return {"version": saved.version, "size": len(saved.content), "fields": fields}


def _qemu_stream(file: BinaryIO, path: str) -> dict[str, Any]:
    return qemu_stream.read_stream(file)


def _image(file: BinaryIO, path: str) -> dict[str, Any]:
    """A raw image or an ELF core."""
    source = ImageSource(GuestUri("image", path))
    try:
        blocks = []
        for block in source.blocks:
            there = total_pages(block.data_runs())
            pages = {"total": block.pages, "data": there, "holes": block.pages - there}
            blocks.append(
                {"name": block.name, "size": block.size, "offset": block.spec.offset,
                 "pages": pages}
            )  # fmt: skip
        core = [block["name"] for block in blocks] != ["ram"]
        found = {"format": "elf-core" if core else "image", "size": source.image_size,
                 "blocks": blocks}  # fmt: skip
        if core:  # headers and notes
            pieces = image_pieces(source.save_state())
            found["others"] = [{"offset": at, "size": len(data)} for at, data in pieces]
        return found
    finally:
        source.close()


def _snapshot(file: BinaryIO, path: str) -> dict[str, Any]:
    """What `pageferry snapshot` wrote."""
    memory, index = open_snapshot(path)
    try:
        blocks = []
        for block in index.blocks:
            there = total_pages(CheckedBlock(block, memory).data_runs())
            pages = {"total": block.pages, "data": there, "holes": block.pages - there}
            blocks.append(
                {"name": block.spec.name, "size": block.spec.size, "offset": block.at,
                 "pages": pages}
            )  # fmt: skip
    finally:
        memory.close()
    return {
        "format": "snapshot", "pageferry": index.version, "kind": index.kind,
        "running": index.running, "size": index.image_size, "blocks": blocks,
        "sections": state_sections(index.state) if index.state else {},
    }  # fmt: skip


FORMATS = (
    Format(snapshot_format.MAGIC, _snapshot),
    Format(vmstate.MAGIC, _state_stream),
    Format(qemu_stream.MAGIC, _qemu_stream),
    Format(b"", _image),  # whatever it is: the last
)


def inspect_saved(
    where: str, stdin: BinaryIO | None = None, *, full: bool = False
) -> dict[str, Any]:
    """What is in the file or directory `where`, as JSON has it (numbers, texts, lists, dicts).

    `where`: a path, image:PATH or file:PATH; "-" is `stdin`, read to its end into a file without a
    name. Long values are shortened unless `full`. SourceError if it cannot be read, or is damaged.
    """
    if where == "-" and stdin is not None:
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stdin, copy, 1 << 20)
            copy.flush()
            found = _inspect(f"/proc/self/fd/{copy.fileno()}", "-")
    else:
        path = re.sub(r"^(image|file):", "", where)
        found = _directory(path) if os.path.isdir(path) else _inspect(path, path)
    shown = _shown(found, full=full)
    assert isinstance(shown, dict)
    return shown


def _inspect(path: str, name: str) -> dict[str, Any]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise SourceError(f"cannot open {name}: {e.strerror}") from e
    with os.fdopen(fd, "rb", buffering=1 << 20) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SourceError(f"cannot read {name}: it is no regular file (a stream is read by -)")
        head = file.read(max(len(known.magic) for known in FORMATS))
        file.seek(0)
        known = next(known for known in FORMATS if head.startswith(known.magic))
        try:
            return {"file": name} | known.show(file, path)
        except SourceError as e:
            raise SourceError(f"{name}: {e.message}", **e.data) from e
        except OSError as e:
            raise SourceError(f"cannot read {name}: {e.strerror}") from e


def _directory(path: str) -> dict[str, Any]:
    """The images that image:DIR/ has received, and what has arrived of others."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as e:
        raise SourceError(f"cannot read {path}: {e.strerror}") from e
    files, partial = [], []
    for entry in entries[:_MAX_FILES]:
        if (match := _PARTIAL.fullmatch(entry.name)) is not None:
            size = entry.stat(follow_symlinks=False)
            partial.append({"name": match[1], "size": size.st_size, "there": size.st_blocks * 512})
        elif entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
            files.append(_one_of_many(entry.path, entry.name))
    return {"format": "directory", "file": path, "files": files, "incomplete": partial,
            "not-shown": max(0, len(entries) - _MAX_FILES)}  # fmt: skip


def _one_of_many(path: str, name: str) -> dict[str, Any]:
    """Without what its sections hold: that is long."""
    try:
        found = _inspect(path, name)
    except PageferryError as e:
        return {"file": name, "error": e.message}
    if isinstance(found.get("sections"), dict):
        found["sections"] = list(found["sections"])
    return found


def _shown(value: Any, *, full: bool) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, bytes):
        if full or len(value) <= _SHOWN_BYTES:
            return value.hex()
        return {"bytes": len(value), "xxh3": xxhash.xxh3_64_hexdigest(value)}
    if isinstance(value, dict):
        return {name: _shown(part, full=full) for name, part in value.items()}
    if isinstance(value, list):
        # what is listed of a file is not a value in it
        if full or len(value) <= _SHOWN_ELEMENTS or isinstance(value[0], dict):
            return [_shown(part, full=full) for part in value]
        return {"elements": len(value), "first": _shown(value[:8], full=full)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
