"""image:PATH, a memory image in a file that nobody writes: raw, or an ELF core.

A raw image is one RAM block. In an ELF core (QEMU's dump-guest-memory, gcore) each PT_LOAD
segment is one; the rest of the file (headers, notes) travels as device state, so that a core
arrives byte for byte. Holes cost nothing on either side.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import xxhash

from ...transport.errors import (
    DestinationError,
    RemoteProtocolError,
    SourceError,
    VerificationFailed,
)
from ...transport.messages import MAX_BLOCKS, Block, Hello
from ..ram import RamBlock, RamFile
from .base import DestinationGuest, SourceGuest, layout_size
from .files import NewFile, open_to_read
from .states import IMAGE, MAX_PIECE, state_into, state_of
from .uri import GuestUri

# Of memory and of anything else.
_MAX_SEGMENTS = 2 * MAX_BLOCKS
_ELF_MAGIC, _ET_CORE = b"\x7fELF", 4


def image_state(pieces: list[tuple[int, bytes]], total: int | None = None) -> bytes:
    """The parts of an image that are no RAM, (offset, bytes), as a device state. `total`: their
    sum, if it is another than theirs."""
    parts = [SimpleNamespace(offset=offset, data=data) for offset, data in pieces]
    total = sum_of(pieces) if total is None else total
    return state_of(IMAGE, SimpleNamespace(pieces=parts, sum=total))


def image_pieces(state: bytes) -> list[tuple[int, bytes]]:
    """And back. RemoteProtocolError or PeerRefused for what is none; VerificationFailed if it is
    not what was read at the source."""
    state_into(IMAGE, state, said := SimpleNamespace())
    pieces = [(piece.offset, piece.data) for piece in said.pieces]
    if sum_of(pieces) != said.sum:
        raise VerificationFailed("what belongs to no memory of the image came damaged")
    return pieces


def sum_of(pieces: list[tuple[int, bytes]]) -> int:
    state = xxhash.xxh3_64()
    for offset, data in pieces:
        state.update(f"{offset} {len(data)} ".encode())
        state.update(data)
    return state.intdigest()


class ImageSource(SourceGuest):
    """A memory image."""

    kind = "image"

    def __init__(self, uri: GuestUri) -> None:
        fd, size = open_to_read(uri.rest, "memory image")
        self._file = RamFile(fd, uri.rest)
        self.image_size = size
        try:
            specs = _core_blocks(fd, size, uri.rest) or [Block("ram", size)]
            self._skeleton = _skeleton(fd, size, specs, uri.rest)
        except BaseException:
            self.close()
            raise
        self.blocks = [RamBlock(spec, self._file, spec.offset) for spec in specs]

    def save_state(self) -> bytes:
        return image_state(self._skeleton)

    def close(self) -> None:
        self._file.close()


def _core_blocks(fd: int, size: int, path: str) -> list[Block]:
    """The PT_LOAD segments of an ELF core; empty if the file is none."""
    head = os.pread(fd, 18, 0)
    if head[:4] != _ELF_MAGIC or int.from_bytes(head[16:18], "little") != _ET_CORE:
        return []
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    blocks: list[Block] = []
    try:
        with os.fdopen(os.dup(fd), "rb") as stream:
            core = ELFFile(stream)
            if (
                core.num_segments() > _MAX_SEGMENTS
            ):  # a header may claim 2^32, and each is looked at
                raise SourceError(f"{path} is an ELF core with {core.num_segments()} segments")
            for segment in core.iter_segments("PT_LOAD"):
                header = segment.header
                if header.p_filesz:
                    address = header.p_paddr or header.p_vaddr
                    name = f"load{len(blocks)}@{address:#x}"
                    blocks.append(Block(name, header.p_filesz, offset=header.p_offset))
    except (ELFError, KeyError, ValueError, OSError) as e:
        raise SourceError(f"{path} begins like an ELF core and is damaged: {e}") from e
    if not blocks or len(blocks) > MAX_BLOCKS:
        raise SourceError(f"{path} is an ELF core with {len(blocks)} memory segments")
    blocks.sort(key=lambda block: block.offset)
    at = 0
    for block in blocks:
        if block.offset < at:
            raise SourceError(f"{path} is an ELF core whose memory segments overlap")
        at = block.offset + block.size
    if at > size:
        raise SourceError(f"{path} is a truncated ELF core: {size} of {at} bytes are there")
    return blocks


def _skeleton(fd: int, size: int, blocks: list[Block], path: str) -> list[tuple[int, bytes]]:
    """What lies between and around the blocks, zeros left out."""
    pieces, at = [], 0
    for begin, end in [*((b.offset, b.offset + b.size) for b in blocks), (size, size)]:
        if begin - at > MAX_PIECE:
            raise SourceError(f"{path}: {begin - at} bytes at {at} belong to no memory segment")
        data = os.pread(fd, begin - at, at) if begin > at else b""
        if data.strip(b"\0"):
            pieces.append((at, data))
        at = end
    return pieces


class ImageDestination(DestinationGuest):
    """A new image file, or what replaces one."""

    kind = "image"

    def __init__(self, uri: GuestUri) -> None:
        self._path = uri.rest
        self._new: NewFile | None = None
        self._file: RamFile | None = None
        self._size = 0

    def lay_out(self, hello: Hello) -> None:
        self._size = layout_size(hello.blocks, hello.image_size)
        self._new = NewFile(self._path, self._size)
        self._file = RamFile(os.dup(self._new.fd), self._path)
        self.blocks = [RamBlock(spec, self._file, spec.offset) for spec in hello.blocks]
        self.fresh = [True] * len(hello.blocks)

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        assert self._new is not None
        if kind == "image":
            self._write_pieces(state)
        try:
            os.fsync(self._new.fd)
        except OSError as e:
            raise DestinationError(f"cannot write {self._path}: {e.strerror}") from e

    def _write_pieces(self, state: bytes) -> None:
        assert self._new is not None
        for offset, data in image_pieces(state):
            if offset + len(data) > self._size:
                raise RemoteProtocolError(f"image state outside of the image, at {offset}")
            try:
                os.pwrite(self._new.fd, data, offset)
                there = os.pread(self._new.fd, len(data), offset)
            except OSError as e:
                raise DestinationError(f"cannot write {self._path}: {e.strerror}") from e
            if there != data:
                raise VerificationFailed(f"{self._path} does not hold what was written at {offset}")

    def run(self) -> str:
        assert self._new is not None
        self._new.publish()
        return f"image:{self._path}"

    def discard(self) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._new is not None:
            self._new.discard()
