"""Some pages of an image, to tell clones from strangers: cheap, and the same for the same content.

Reads a few dozen pages at fixed places; what it is good for: pipeline/families.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

import xxhash

from ..transport.pages import PAGE_SIZE

# Places that are looked at: from half as many to so many.
PLACES = 64
# Pages from a place on, of which the first that is not zero counts.
_WINDOW = 8
_ZERO = bytes(PAGE_SIZE)


def sample(path: str) -> list[tuple[int, int]]:
    """Number and digest (xxh3-64) of some pages of a file that are not zero. Empty for what is no
    regular file, cannot be read, or has none there.

    Places are multiples of a power of two, so that files of similar sizes have places in common.
    """
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                return _marks(fd, status.st_size // PAGE_SIZE)
        finally:
            os.close(fd)
    return []


def _marks(fd: int, pages: int) -> list[tuple[int, int]]:
    stride = 1
    while stride * PLACES < pages:
        stride *= 2
    found = []
    for place in range(0, pages, stride):
        first = _next_data(fd, place)
        if first is None:
            break
        count = min(_WINDOW, place + stride - first, pages - first)
        data = os.pread(fd, max(0, count) * PAGE_SIZE, first * PAGE_SIZE)
        for at in range(0, len(data), PAGE_SIZE):
            page = data[at : at + PAGE_SIZE]
            if page != _ZERO:
                found.append((first + at // PAGE_SIZE, xxhash.xxh3_64_intdigest(page)))
                break
    return found


def _next_data(fd: int, page: int) -> int | None:
    """The first page from `page` on that is in no hole; None if none is."""
    try:
        return os.lseek(fd, page * PAGE_SIZE, os.SEEK_DATA) // PAGE_SIZE
    except OSError as e:
        if e.errno == errno.ENXIO:
            return None
        return page  # the file system does not know of holes
