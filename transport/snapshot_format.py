"""file:PATH, a snapshot: where everything is in it, and what its header and index say. Pure.

    0          header, one page: magic, version, where the index is, how long, its digest, its own
    2 MiB      RAM blocks, each at a multiple of 2 MiB, each page at a fixed place; zero pages are
               holes (QEMU 9's mapped-ram has the same idea)
    behind     of each block: a digest of each chunk of 64 KiB (xxh3-128), a bit for each page that
               holds anything
    last       the index (msgpack): kind of guest, blocks, the device state

Digests find what went wrong, not who did it: whoever may write the file may write the digests. All
that is read here is taken for hostile: each number is checked against the size of the file before
anything is allocated or read by it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
import xxhash

from .errors import SourceError
from .messages import MAX_BLOCK_SIZE, MAX_BLOCKS, MAX_STATE, UNDECODABLE, Block
from .pages import PAGE_SIZE, page_count

MAGIC, VERSION = b"PGFERRY\x1a", 1
CHUNK_PAGES = 16
CHUNK_BYTES = CHUNK_PAGES * PAGE_SIZE
DIGEST_BYTES = 16
ALIGNMENT = 2 << 20
# Magic, version, unused, where the index is, its length, its digest; then a digest of all that.
_HEADER = struct.Struct("<8sIIQQ16s")
HEADER_BYTES = PAGE_SIZE
# The device state, and some hundred bytes a block.
MAX_INDEX = MAX_STATE + (64 << 20)
_PAGE_SIZES = {1 << bits for bits in range(12, 31)}
_MAX_NAME = 255


class StoredBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block in the file: bytes of it from `at`, its digests and bits from `tables_at`;
    `sum`: of these (xxh3-128)."""

    spec: Block
    at: int
    tables_at: int
    sum: bytes = b""

    @property
    def pages(self) -> int:
        return page_count(self.spec.size)

    @property
    def chunks(self) -> int:
        return -(-self.pages // CHUNK_PAGES)

    @property
    def digest_bytes(self) -> int:
        return self.chunks * DIGEST_BYTES

    @property
    def table_bytes(self) -> int:
        """Digests and, behind them, bits: two bytes a chunk."""
        return self.digest_bytes + self.chunks * CHUNK_PAGES // 8


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a snapshot that is no memory. `kind`: of the guest, as Hello has it; `state` as
    DeviceState has it; `version`: of the pageferry that wrote it."""

    version: str
    kind: str
    running: bool
    image_size: int
    blocks: list[StoredBlock]
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class Header:
    """Where the index is: bytes of the file."""

    at: int
    length: int
    digest: bytes


def digest(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _up(at: int, to: int) -> int:
    return -(-at // to) * to


def place(specs: list[Block]) -> tuple[list[StoredBlock], int]:
    """Where blocks go, and where the index may begin."""
    places, at = [], ALIGNMENT
    for spec in specs:
        places.append(at)
        at = _up(at + spec.size, ALIGNMENT)
    found = []
    for spec, where in zip(specs, places, strict=True):
        block = StoredBlock(spec, where, at)
        found.append(block)
        at = _up(at + block.table_bytes, PAGE_SIZE)
    return found, at


def encode(index: Index, at: int) -> tuple[bytes, bytes]:
    """Header and index; the index is to be at byte `at`."""
    body = msgspec.msgpack.encode(index)
    head = _HEADER.pack(MAGIC, VERSION, 0, at, len(body), digest(body))
    return (head + digest(head)).ljust(HEADER_BYTES, b"\0"), body


def decode_header(data: bytes, size: int) -> Header:
    """The header of a file of `size` bytes; SourceError for what is none of ours, or not whole."""
    if data[: len(MAGIC)] != MAGIC:
        raise SourceError("it is no snapshot of pageferry (a raw image is image:PATH)")
    if len(data) < HEADER_BYTES:
        raise _truncated()
    _, version, _, at, length, body = _HEADER.unpack_from(data)
    if version != VERSION:  # first: another version may lay out its header as it likes
        raise SourceError(
            f"it is a snapshot of format {version}, and this pageferry reads {VERSION}: restore it "
            f"with the version that wrote it"
        )
    if digest(data[: _HEADER.size]) != data[_HEADER.size : _HEADER.size + DIGEST_BYTES]:
        raise _damaged("its header was changed")
    if length > MAX_INDEX or at < ALIGNMENT:
        raise _damaged(f"its header says that {length} bytes of index are at {at}")
    if at + length > size:
        raise _truncated()
    return Header(at, length, body)


def decode_index(header: Header, data: bytes) -> Index:
    """The index; SourceError unless everything in it fits a file that ends with it."""
    if len(data) < header.length:
        raise _truncated()
    if digest(data) != header.digest:
        raise _damaged("its index was changed")
    try:
        index = msgspec.msgpack.decode(data, type=Index)
    except UNDECODABLE as e:
        raise _damaged(f"its index makes no sense: {e}") from e
    _check(index, header.at)
    return index


def _check(index: Index, end: int) -> None:
    for text in (index.kind, index.version):  # they are shown
        if not (1 <= len(text) <= _MAX_NAME and text.isprintable()):
            raise _damaged("what kind of guest it is of, or who wrote it, cannot be shown")
    if not 1 <= len(index.blocks) <= MAX_BLOCKS:
        raise _damaged(f"it has {len(index.blocks)} blocks of memory")
    if len(index.state) > MAX_STATE:
        raise _damaged(f"its device state has {len(index.state)} bytes")
    if not 0 <= index.image_size <= MAX_BLOCK_SIZE * 2:
        raise _damaged(f"it says that its image has {index.image_size} bytes")
    for block in index.blocks:
        _check_block(block)
    if len({block.spec.name for block in index.blocks}) != len(index.blocks):
        raise _damaged("two blocks of memory have one name")
    # in this order, each behind the one before
    stretches = [(block.at, block.spec.size) for block in index.blocks]
    stretches += [(block.tables_at, block.table_bytes) for block in index.blocks]
    at = ALIGNMENT
    for begin, length in stretches:
        if begin < at or begin + length > end:
            raise _damaged(f"its index says that {length} bytes are at {begin}")
        at = begin + length


def _check_block(block: StoredBlock) -> None:
    spec = block.spec
    if not 1 <= spec.size <= MAX_BLOCK_SIZE or spec.page_size not in _PAGE_SIZES:
        raise _damaged(f"it has a block of {spec.size} bytes on pages of {spec.page_size}")
    if not 0 <= spec.offset <= MAX_BLOCK_SIZE:
        raise _damaged(f"it has a block whose offset is {spec.offset}")
    if block.at % ALIGNMENT or block.tables_at % PAGE_SIZE or len(block.sum) != DIGEST_BYTES:
        raise _damaged(f"it has a block at {block.at}, and tables at {block.tables_at}")
    if not (1 <= len(spec.name) <= _MAX_NAME and spec.name.isprintable()):
        raise _damaged("it has a block whose name cannot be shown")


def _truncated() -> SourceError:
    return SourceError("it is truncated: copy it once more from where it came from")


def _damaged(how: str) -> SourceError:
    return SourceError(f"it is damaged ({how}): take another copy of it, or another snapshot")
