"""Sections in a row: what travels, and what is kept in a file.

    magic "PFDS", version (u32)
    section   4, name (u8 + bytes), instance, version, layout length, content length (u32 each),
              layout (JSON), content, sum (u64)
    end       0, number of sections (u32), sum (u64)

A section's sum (xxh3-64) is of all its bytes, so that damage is found by name; that at the end is
of all bytes before it, so that nothing is lost, doubled or put elsewhere. Sums find accidents:
who may write the stream may write its sums.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import xxhash

from ..errors import (
    DestinationError,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    UsageError,
)
from ..wire import Buffer
from . import layout
from .coding import Reader, Writer
from .description import Section, twice

MAGIC = b"PFDS"
VERSION = 1
# QEMU_VM_SECTION_FULL and QEMU_VM_EOF.
_FULL, _END = 4, 0
# In one stream.
MAX_SECTIONS = 4096
# Of one section's content: messages.MAX_STATE bounds all of it on the way.
MAX_CONTENT = 256 << 20
_HEAD = struct.Struct(">4sI")
_SIZES = struct.Struct(">IIII")
_LAST = struct.Struct(">BIQ")
_SUM = struct.Struct(">Q")


@dataclass(frozen=True)
class Saved:
    """A section as it came. `record`: all its bytes."""

    name: str
    instance: int
    version: int
    layout: layout.Layout
    content: memoryview
    record: memoryview

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.instance


def save(sections: Iterable[Section]) -> bytes:
    """A stream of `sections`, without those that are not needed. SourceError names what cannot be
    saved, UsageError sections of one name and instance."""
    sections = list(sections)
    if (key := twice(sections)) is not None:
        raise UsageError(f"two sections are called {key[0]!r} ({key[1]})")
    return _stream([record for s in sections if (record := _record(s))])


def _record(section: Section) -> list[Buffer]:
    """A section in parts, so that what is large is copied once; none if it is not needed."""
    description = section.description
    out = Writer(*section.key)
    if description.needed is not None and not out.hook("needed", description.needed, section.value):
        return []
    description.save(out, section.value, section.version)
    said = layout.encode(description.layout(section.version))
    if len(out.data) > MAX_CONTENT or len(said) > layout.MAX_LAYOUT:
        out.fail(f"is too large: {len(out.data)} bytes, described by {len(said)}")
    name = description.name.encode()
    version = description.version if section.version is None else section.version
    head = bytes([_FULL, len(name)]) + name
    head += _SIZES.pack(section.instance, version, len(said), len(out.data)) + said
    total = xxhash.xxh3_64(head)
    total.update(out.data)
    return [head, out.data, _SUM.pack(total.intdigest())]


def _stream(records: Sequence[Sequence[Buffer]]) -> bytes:
    if len(records) > MAX_SECTIONS:
        raise SourceError(f"a device state of {len(records)} sections, {MAX_SECTIONS} at the most")
    parts: list[Buffer] = [_HEAD.pack(MAGIC, VERSION)]
    parts += (part for record in records for part in record)
    parts.append(bytes([_END]) + len(records).to_bytes(4, "big"))
    total = xxhash.xxh3_64()
    for part in parts:
        total.update(part)
    return b"".join((*parts, _SUM.pack(total.intdigest())))


def join(saved: Iterable[Saved]) -> bytes:
    """A stream of these sections."""
    return _stream([[section.record] for section in saved])


def parse(data: bytes | memoryview) -> list[Saved]:
    """The sections of a stream, none of them looked into. RemoteProtocolError says where it is
    truncated, damaged, or goes on."""
    view = memoryview(data)
    if len(view) < _HEAD.size or view[:4] != MAGIC:
        raise RemoteProtocolError("this is no device state, or only the beginning of one")
    version = _HEAD.unpack_from(view)[1]
    if version != VERSION:
        raise RemoteProtocolError(f"a device state of version {version}: {VERSION} is known here")
    at, found = _HEAD.size, list[Saved]()
    while True:
        kind = _part(view, at, 1, found)[0]
        if kind == _END:
            break
        if kind != _FULL:
            raise _broken(found, f"something of type {kind} follows")
        if len(found) == MAX_SECTIONS:
            raise RemoteProtocolError(f"a device state of more than {MAX_SECTIONS} sections")
        found.append(_section(view, at, found))
        at += len(found[-1].record)
    _check_end(view, at, found)
    return found


def _part(view: memoryview, at: int, n: int, found: list[Saved]) -> memoryview:
    if len(view) - at < n:
        raise _broken(found, "it ends")
    return view[at : at + n]


def _broken(found: list[Saved], why: str) -> RemoteProtocolError:
    if not found:
        return RemoteProtocolError(f"device state: before its first section {why}")
    name = found[-1].name
    return RemoteProtocolError(f"device state: behind section {name!r} {why}", section=name)


def _section(view: memoryview, at: int, found: list[Saved]) -> Saved:
    length = _part(view, at + 1, 1, found)[0]
    raw = bytes(_part(view, at + 2, length, found))
    name = "".join(c if c.isprintable() else "\ufffd" for c in raw.decode("utf-8", "replace"))
    reader = Reader(b"", name)
    sizes_at = at + 2 + length
    if len(view) - sizes_at < _SIZES.size:
        reader.damaged("the device state ends in it")
    instance, version, said, size = _SIZES.unpack_from(view, sizes_at)
    reader.instance = instance
    begin = sizes_at + _SIZES.size
    end = begin + said + size
    if len(view) - end < _SUM.size:
        reader.damaged("the device state ends in it")
    if xxhash.xxh3_64_intdigest(view[at:end]) != _SUM.unpack_from(view, end)[0]:
        reader.damaged("is damaged: its sum does not match")
    if said > layout.MAX_LAYOUT or size > MAX_CONTENT:
        reader.damaged(f"is too large: {size} bytes, described by {said}")
    if not layout.is_name(name) or name.encode() != raw:
        reader.damaged("has no name that can be shown")
    if any(section.key == (name, instance) for section in found):
        reader.damaged("is there twice")
    try:
        decoded = layout.decode(view[begin : begin + said])
    except layout.UNDECODABLE as e:
        reader.damaged(f"describes itself in a way that makes no sense: {e}")
    if (decoded.name, decoded.version) != (name, version):
        reader.damaged(f"is called {decoded.name!r} and of version {decoded.version} in its layout")
    record = view[at : end + _SUM.size]
    return Saved(name, instance, version, decoded, view[begin + said : end], record)


def _check_end(view: memoryview, at: int, found: list[Saved]) -> None:
    _, count, total = _LAST.unpack(_part(view, at, _LAST.size, found))
    if count != len(found):
        raise RemoteProtocolError(f"a device state of {count} sections, {len(found)} are there")
    if xxhash.xxh3_64_intdigest(view[: at + 5]) != total:
        raise RemoteProtocolError("device state: is damaged: the sum at its end does not match")
    if (rest := len(view) - at - _LAST.size) > 0:
        raise _broken(found, f"and its end {rest} more bytes follow")


def load(
    data: bytes | memoryview | Iterable[Saved],
    sections: Iterable[Section],
    is_given_up: Callable[[], bool] = lambda: False,
) -> None:
    """All that came, into the objects of `sections`, in the order in which it came.

    Nothing is loaded, and no hook called, unless the stream is whole and each section of it is
    known here and each that must be there is there. PeerRefused says what does not fit,
    RemoteProtocolError what makes no sense, DestinationError which hook failed, or that it
    `is_given_up`: asked before each section.
    """
    came = parse(data) if isinstance(data, bytes | bytearray | memoryview) else list(data)
    known = {section.key: section for section in sections}
    for saved in came:
        if saved.key not in known:
            raise _refused(*saved.key, "came, and is not known here")
    there = {saved.key for saved in came}
    for key, section in known.items():
        if key not in there and not section.may_be_absent:
            raise _refused(*key, "is missing in what came")
    for saved in came:
        if is_given_up():
            raise DestinationError(f"device state: given up before section {saved.name!r}")
        load_one(saved, known[saved.key])


def load_one(saved: Saved, section: Section) -> None:
    """One section; its fields may be loaded in part when it fails."""
    reader = Reader(saved.content, *saved.key)
    section.description.load(reader, saved.layout, section.value)
    reader.end()


def _refused(name: str, instance: int, why: str) -> PeerRefused:
    where = f"section {name!r}" + (f" ({instance})" if instance else "")
    return PeerRefused(f"device state: {where} {why}", section=name, instance=instance)
