"""RAM blocks: named, sized stretches of guest memory in a file that can be mapped.

A block is a range of a RamFile: a memory image, a shared-memory file, a memory backend. Both
pickle into worker processes, taking their descriptor along, so that a path that changes or
is deleted meanwhile means nothing. Senders read through a mapping (no copy); receivers write
with pwrite, which fills fresh shared memory twice as fast as storing through a mapping and
reports a full disk as an error where a store would be SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

from ..transport.errors import DestinationError, NoSpace
from ..transport.messages import Block
from ..transport.pages import PAGE_SIZE, WORDS, Pages, Runs, mark, page_count, runs_from_bytes
from ..transport.wire import Buffer
from .kernel.libc import punch_hole

_ZEROS = bytes(1 << 20)


class RamFile:
    """An open file that holds guest memory. Owns its descriptor."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self._map: mmap.mmap | None = None
        self._writable: mmap.mmap | None = None

    # In this process: nobody waits any more for what is read of it all (digest.py).
    given_up = False

    def __repr__(self) -> str:
        return f"<RamFile {self.name} fd={self.fd}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attach_file, (DupFd(self.fd), self.name))

    def mapping(self) -> mmap.mmap:
        """The whole file, mapped for reading; mapped once."""
        if self._map is None:
            size = os.fstat(self.fd).st_size
            self._map = mmap.mmap(self.fd, size, prot=mmap.PROT_READ)
        return self._map

    def writable(self) -> mmap.mmap:
        """The whole file, mapped for writing; mapped once."""
        if self._writable is None:
            self._writable = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return self._writable

    def close(self) -> None:
        """Idempotent. Views of the mapping keep it alive until they are gone."""
        if self._map is not None:
            # where somebody still looks at it, it goes with the last view
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self._writable is not None:
            self._writable.close()
            self._writable = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _attach_file(dup: Any, name: str) -> RamFile:
    return RamFile(dup.detach(), name)


class RamBlock:
    """`spec.size` bytes of `file` from `start`."""

    def __init__(self, spec: Block, file: RamFile, start: int) -> None:
        self.spec = spec
        self.file = file
        self.start = start

    def __repr__(self) -> str:
        return f"<RamBlock {self.spec.name} {self.spec.size} bytes>"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    def pages(self) -> int:
        """Pages of the block, a last partial one included."""
        return page_count(self.spec.size)

    @property
    def aligned(self) -> bool:
        """True if its pages can be read as 64-bit words in place."""
        return self.start % 8 == 0

    def whole_pages(self) -> npt.NDArray[np.uint8]:
        """Its whole pages, shape (n, 4096), as they are in memory now: no copy, read-only."""
        n = self.size // PAGE_SIZE
        flat = np.frombuffer(self.file.mapping(), np.uint8, n * PAGE_SIZE, self.start)
        return flat.reshape(n, PAGE_SIZE)

    def words(self) -> npt.NDArray[np.uint64]:
        """Its whole pages, shape (n, 512). Only if `aligned`."""
        n = self.size // PAGE_SIZE
        flat = np.frombuffer(self.file.mapping(), np.uint64, n * WORDS, self.start)
        return flat.reshape(n, WORDS)

    def tail(self) -> bytes:
        """The bytes behind the last whole page, padded with zeros to a page; b"" if none."""
        begin = self.size // PAGE_SIZE * PAGE_SIZE
        if begin == self.size:
            return b""
        at = self.start + begin
        return self.file.mapping()[at : at + self.size - begin].ljust(PAGE_SIZE, b"\0")

    def with_spec(self, spec: Block) -> RamBlock:
        """The same memory, announced otherwise."""
        return RamBlock(spec, self.file, self.start)

    def verified(self, pages: Pages) -> npt.NDArray[np.uint64] | None:
        """The content of `pages` (ascending), shape (n, 512), where it is known what it must be and
        only a copy of it can be compared with that; VerificationFailed then. None here: what is
        there is right (snapshot_file.py)."""
        return None

    def check(self, pages: Pages | Sequence[int]) -> None:
        """Before `pages` are read: VerificationFailed if they are known to be wrong. Here nothing
        is known (snapshot_file.py)."""

    def data_runs(self, first: int = 0, count: int | None = None) -> Runs:
        """Runs of pages that hold data, holes left out (lseek(2) SEEK_DATA)."""
        begin = self.start + first * PAGE_SIZE
        end = self.start + self.size
        if count is not None:
            end = min(end, begin + count * PAGE_SIZE)
        ranges, at = [], begin
        while at < end:
            try:
                data = os.lseek(self.file.fd, at, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:
                    break
                return runs_from_bytes([(begin - self.start, end - self.start)])
            if data >= end:
                break
            at = min(os.lseek(self.file.fd, data, os.SEEK_HOLE), end)
            ranges.append((data - self.start, at - self.start))
        return runs_from_bytes(ranges)

    def has_data(self, runs: Runs) -> bool:
        """True if a page of `runs` is there, False if all are holes."""
        if not len(runs[0]):
            return False
        first, last = int(runs[0].min()), int((runs[0] + runs[1]).max())
        table = np.zeros(last - first, np.uint8)
        mark(table, (runs[0] - first, runs[1]), 1)
        starts, counts = self.data_runs(first, last - first)
        return any(
            table[start - first : start - first + count].any()
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        )

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; shorter at the end of the block."""
        length = min(length, self.size - offset)
        return os.pread(self.file.fd, length, self.start + offset)

    def write(self, page: int, data: Buffer) -> None:
        """Store whole pages from `page`; what lies behind the block's end is dropped."""
        offset = page * PAGE_SIZE
        view = memoryview(data)[: self.size - offset]
        if self.spec.page_size > PAGE_SIZE:
            # hugetlbfs has no write(2); its pages were reserved when it was mapped
            at = self.start + offset
            self.file.writable()[at : at + len(view)] = view
            return
        try:
            while view:
                n = os.pwrite(self.file.fd, view, self.start + offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            raise self.write_error(e, self.file.name) from e

    def clear(self, runs: Runs) -> None:
        """Make the pages of `runs` zero: holes where the file system can, else zeros."""
        for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
            offset = first * PAGE_SIZE
            length = min(count * PAGE_SIZE, self.size - offset)
            try:
                punch_hole(self.file.fd, self.start + offset, length)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise self.write_error(e, self.file.name) from e
                self._write_zeros(first, length)

    def _write_zeros(self, page: int, length: int) -> None:
        for at in range(0, length, len(_ZEROS)):
            self.write(page + at // PAGE_SIZE, memoryview(_ZEROS)[: length - at])

    @staticmethod
    def write_error(e: OSError, name: str) -> DestinationError:
        """What a failed write to `name` means."""
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
            return NoSpace(f"no space left for {name}: free some and start again")
        return DestinationError(f"cannot write {name}: {e.strerror}")
