"""file:PATH on disk: what writes one, and memory of one that is checked before anybody gets it.

Written under no name (files.py): it is there when it is whole, or not at all. Read by whole chunks
into memory of the reader's own, where their digests are compared: so what was compared is what is
sent, whatever happens to the file. What no bit says is there is zero and is never read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from ..transport import snapshot_format as form
from ..transport.errors import DestinationError, SourceError, VerificationFailed
from ..transport.messages import Block
from ..transport.pages import PAGE_SIZE, WORDS, Pages, Runs, runs_of, union
from ..transport.snapshot_format import CHUNK_BYTES, CHUNK_PAGES, DIGEST_BYTES, Index, StoredBlock
from .guests.files import NewFile, open_to_read
from .ram import RamBlock, RamFile
from .segments import Segment

# Looked at together, whatever a file says of its size.
_STEP_PAGES, _STEP_BYTES = 1 << 20, 16 << 20
# Read at once, and kept until others are read: 16 MiB.
_HELD_CHUNKS = 256
_NOTHING = np.empty(0, np.int64)
_DIRECT_HINT = "leave out ?direct=on"


class Tables:
    """Digests and bits of all blocks, as they come to be: a stretch of shared memory a block. Those
    of a chunk are written by the owner of the chunk alone, and read when all have ended."""

    def __init__(self, blocks: list[StoredBlock]) -> None:
        self.blocks = blocks
        self._offsets = np.concatenate(([0], np.cumsum([b.table_bytes for b in blocks]))).tolist()
        self._segment = Segment(self._offsets[-1], "snapshot")

    def digests(self, block: int) -> npt.NDArray[np.uint8]:
        """Shape (chunks, 16)."""
        b = self.blocks[block]
        found: npt.NDArray[np.uint8] = self._segment.array(
            np.uint8, b.digest_bytes, self._offsets[block]
        )
        return found.reshape(-1, DIGEST_BYTES)

    def bits(self, block: int) -> npt.NDArray[np.uint8]:
        """Shape (chunks, 2): the lowest bit is the first page."""
        b = self.blocks[block]
        found: npt.NDArray[np.uint8] = self._segment.array(
            np.uint8, b.table_bytes - b.digest_bytes, self._offsets[block] + b.digest_bytes
        )
        return found.reshape(-1, CHUNK_PAGES // 8)

    def packed(self, block: int) -> bytes:
        """As the file has them."""
        found: bytes = self._segment.array(
            np.uint8, self.blocks[block].table_bytes, self._offsets[block]
        ).tobytes()
        return found

    def close(self) -> None:
        self._segment.close()


class SnapshotWriter:
    """A snapshot that comes to be at `path`. `targets`: where workers write the memory of each
    block, padded to whole pages; with `direct` past the page cache, in whole aligned pages."""

    def __init__(self, path: str, specs: list[Block], *, direct: bool) -> None:
        self.path = path
        self.blocks, self._index_at = form.place(specs)
        self._new = NewFile(path, self._index_at)
        self._file: RamFile | None = None
        self._tables: Tables | None = None
        try:
            self._file = RamFile(self._open(direct), path)
            self._tables = Tables(self.blocks)
        except BaseException:
            self.discard()
            raise
        self.targets = [
            RamBlock(Block(b.spec.name, b.pages * PAGE_SIZE), self._file, b.at) for b in self.blocks
        ]

    def _open(self, direct: bool) -> int:
        if not direct:
            return os.dup(self._new.fd)
        try:
            flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{self._new.fd}", flags)
        except OSError as e:
            raise DestinationError(
                f"{self.path} is in a file system that takes no direct I/O ({e.strerror}): "
                f"{_DIRECT_HINT}"
            ) from e

    @property
    def tables(self) -> Tables:
        assert self._tables is not None
        return self._tables

    def finish(self, kind: str, running: bool, image_size: int, version: str, state: bytes) -> int:
        """All of its memory is written: the rest, and all of it to disk, in this order. Bytes that
        it takes there. It has no name yet: `publish`."""
        blocks = []
        try:
            for i, block in enumerate(self.blocks):
                packed = self.tables.packed(i)
                _write_all(self._new.fd, packed, block.tables_at)
                blocks.append(msgspec.structs.replace(block, sum=form.digest(packed)))
            index = Index(version, kind, running, image_size, blocks, state)
            header, body = form.encode(index, self._index_at)
            _write_all(self._new.fd, body, self._index_at)
            _write_all(self._new.fd, header, 0)
            os.fsync(self._new.fd)
        except OSError as e:
            raise RamBlock.write_error(e, self.path) from e
        return os.fstat(self._new.fd).st_blocks * 512

    def publish(self) -> None:
        """It is finished, and gets its name."""
        self._new.publish()

    def discard(self) -> None:
        """Leave nothing, unless it is published. Idempotent."""
        if self._tables is not None:
            self._tables.close()
        if self._file is not None:
            self._file.close()
        self._new.discard()


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n


class CheckedBlock(RamBlock):
    """A RAM block of a snapshot. `check` compares digests; once a chunk and process. `here`: its
    receiver reads the same file, so that pages are named and not sent (here.py)."""

    def __init__(
        self, stored: StoredBlock, file: RamFile, spec: Block | None = None, here: bool = False
    ) -> None:
        super().__init__(spec or stored.spec, file, stored.at)
        self.stored, self.here = stored, here
        self._unchecked: npt.NDArray[np.bool_] | None = None
        self._held = _NOTHING, np.empty((0, WORDS), np.uint64)

    def __reduce__(self) -> tuple[Any, ...]:
        return (CheckedBlock, (self.stored, self.file, self.spec, self.here))

    def with_spec(self, spec: Block) -> CheckedBlock:
        return CheckedBlock(self.stored, self.file, spec, self.here)

    def data_runs(self, first: int = 0, count: int | None = None) -> Runs:
        """As the bits have it: whoever copied the file may have filled its holes."""
        last = self.pages if count is None else min(self.pages, first + count)
        return union([self._runs(at, min(at + _STEP_PAGES, last))
                      for at in range(first, last, _STEP_PAGES)])  # fmt: skip

    def _runs(self, first: int, last: int) -> Runs:
        at = self.stored.tables_at + self.stored.digest_bytes
        begin = first // 8
        packed = np.frombuffer(os.pread(self.file.fd, -(-last // 8) - begin, at + begin), np.uint8)
        if len(packed) < -(-last // 8) - begin:  # what has no bit would be taken for zero
            raise SourceError(f"{self.file.name} became shorter while it was read")
        bits = np.unpackbits(packed, bitorder="little")[first - begin * 8 : last - begin * 8]
        return runs_of(np.flatnonzero(bits) + first)

    def verified(self, pages: Pages) -> npt.NDArray[np.uint64] | None:
        """What was read is compared, and kept: who looks for zeros first, and then takes the rest,
        gets of the same reading. What was returned never changes."""
        chunks = pages // CHUNK_PAGES
        wanted = np.unique(chunks)
        if len(wanted) <= _HELD_CHUNKS:
            return self._rows(pages, chunks, wanted)
        out = np.empty((len(pages), WORDS), np.uint64)
        for at in range(0, len(wanted), _HELD_CHUNKS):
            part = wanted[at : at + _HELD_CHUNKS]
            begin = np.searchsorted(chunks, part[0])
            end = np.searchsorted(chunks, part[-1], "right")
            out[begin:end] = self._rows(pages[begin:end], chunks[begin:end], part)
        return out

    def _rows(self, pages: Pages, chunks: Pages, wanted: Pages) -> npt.NDArray[np.uint64]:
        held, content = self._held
        at = np.searchsorted(held, chunks)
        if not len(held) or at[-1] == len(held) or not np.array_equal(held[at], chunks):
            self._held = held, content = wanted, self._load(wanted)
            at = np.searchsorted(held, chunks)
        rows = at * CHUNK_PAGES + pages % CHUNK_PAGES
        first, n = int(rows[0]), len(rows)
        return content[first : first + n] if int(rows[-1]) + 1 - first == n else content[rows]

    def _load(self, chunks: Pages) -> npt.NDArray[np.uint64]:
        """All of them, one behind the other; rows behind the block's end are not written."""
        content = np.empty((len(chunks) * CHUNK_PAGES, WORDS), np.uint64)
        buffer, at = content.reshape(-1).data.cast("B"), 0
        for first, count in zip(*map(np.ndarray.tolist, runs_of(chunks)), strict=True):
            self.read_chunks(first, count, buffer[at:])
            at += count * CHUNK_BYTES
        return content

    def check(self, pages: Pages | Sequence[int]) -> None:
        """Compare the chunks of `pages`. VerificationFailed names the first that differs."""
        if self._unchecked is None:
            self._unchecked = np.ones(self.stored.chunks, np.bool_)
        chunks = np.asarray(pages) // CHUNK_PAGES
        chunks = chunks[self._unchecked[chunks]]
        if len(chunks):
            self._check_chunks(np.unique(chunks))

    def _check_chunks(self, chunks: Pages) -> None:
        assert self._unchecked is not None
        first, last = int(chunks[0]), int(chunks[-1])
        digests = self._digests(first, last + 1 - first)
        for chunk in chunks.tolist():
            begin = chunk * CHUNK_BYTES
            end = min(begin + CHUNK_BYTES, self.stored.pages * PAGE_SIZE)
            # read, not mapped: a hole in tmpfs that is looked at through a mapping becomes memory
            content = os.pread(self.file.fd, end - begin, self.start + begin)
            wanted = (chunk - first) * DIGEST_BYTES
            if form.digest(content) != digests[wanted : wanted + DIGEST_BYTES]:
                raise self._damaged(chunk)
            self._unchecked[chunk] = False

    def read_chunks(self, first: int, count: int, buffer: memoryview) -> memoryview:
        """Read chunks that lie together into `buffer`, which has room for them, and compare what
        was read: that part of it, whole pages. VerificationFailed; SourceError if the file became
        shorter."""
        begin = first * CHUNK_BYTES
        view = buffer[: min(count * CHUNK_BYTES, self.stored.pages * PAGE_SIZE - begin)]
        digests, at = self._digests(first, count), 0
        while at < len(view):
            try:
                n = os.preadv(self.file.fd, [view[at:]], self.start + begin + at)
            except OSError as e:
                raise SourceError(f"cannot read {self.file.name}: {e.strerror}") from e
            if n == 0:
                raise SourceError(f"{self.file.name} became shorter while it was read")
            at += n
        for i in range(count):
            content = view[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
            if form.digest(content) != digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]:
                raise self._damaged(first + i)
        return view

    def _digests(self, first: int, count: int) -> bytes:
        at = self.stored.tables_at + first * DIGEST_BYTES
        return os.pread(self.file.fd, count * DIGEST_BYTES, at)

    def _damaged(self, chunk: int) -> VerificationFailed:
        begin = chunk * CHUNK_BYTES
        end = min(begin + CHUNK_BYTES, self.stored.pages * PAGE_SIZE)
        return VerificationFailed(
            f"{self.file.name} is damaged: bytes {begin} to {end} of {self.name} are not "
            f"what was saved; take another copy of it, or another snapshot"
        )


def open_snapshot(path: str) -> tuple[RamFile, Index]:
    """A snapshot, all of it but its memory read and checked. SourceError."""
    fd, size = open_to_read(path, "snapshot")
    file = RamFile(fd, path)
    try:
        header = form.decode_header(os.pread(fd, form.HEADER_BYTES, 0), size)
        index = form.decode_index(header, os.pread(fd, header.length, header.at))
        for block in index.blocks:
            if _digest_of(fd, block.tables_at, block.table_bytes) != block.sum:
                raise SourceError("it is damaged (its digests were changed): take another copy")
    except SourceError as e:
        file.close()
        raise SourceError(f"cannot read the snapshot {path}: {e.message}") from e
    except OSError as e:
        file.close()
        raise SourceError(f"cannot read the snapshot {path}: {e.strerror}") from e
    return file, index


def _digest_of(fd: int, at: int, length: int) -> bytes:
    """As snapshot_format.digest, of a stretch of a file."""
    state = xxhash.xxh3_128()
    for begin in range(at, at + length, _STEP_BYTES):
        state.update(os.pread(fd, min(_STEP_BYTES, at + length - begin), begin))
    return state.digest()
