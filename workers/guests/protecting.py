"""The writes of another, unmodified process to its shared memory, held back: for a live snapshot.

What goes through its page tables is held back: its own writes, KVM's, those of system calls that
it makes. As with tracking (tracking.py) there is what does not, and whoever uses it has to exclude
that: other processes and children, write(2) to the file, mappings that are made meanwhile, devices
that were given a page before it was protected. What has no page table yet (a hole) is held back
too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ...transport.errors import HostLacks, SourceError
from ...transport.pages import PAGE_SIZE
from ..kernel.remote import Planted, plant_protecting
from ..kernel.userfaultfd import register_write_protect
from ..ram import RamBlock
from .base import ArmedMemory, Region
from .process_memory import refuse_other_writers
from .tracking import windows


def protect_process(
    pid: int, blocks: list[RamBlock], plant: Callable[[], Planted] | None = None
) -> ArmedMemory:
    """The memory of `blocks` wherever process `pid` maps it, registered; nothing is protected yet.
    One thread of it stands still for some milliseconds. AttachError, HostLacks, SourceError.
    `plant`: how it gets its userfaultfd, if there is another way for it."""
    for block in blocks:
        if block.spec.page_size > PAGE_SIZE:
            raise no_huge_pages(block.file.name)
        refuse_other_writers(pid, block.file)
    regions = regions_of(pid, blocks)
    planted = plant() if plant is not None else plant_protecting(pid)
    memory = ArmedMemory(planted.uffd, regions)
    try:
        for region in regions:
            _register(memory.uffd, region, blocks[region.block].file.name)
        if regions_of(pid, blocks) != regions:
            raise changed(pid)
    except BaseException:
        memory.close()
        raise
    return memory


def regions_of(pid: int, blocks: list[RamBlock]) -> list[Region]:
    """Where process `pid` can write `blocks`, each the whole of its file; a page may be in several
    places. SourceError if it can write none of one."""
    found: list[Region] = []
    for index, block in enumerate(blocks):
        places = windows(pid, block.file)
        if not places:
            raise SourceError(f"process {pid} does not map {block.file.name} writable")
        for place in places:
            first = place.offset // PAGE_SIZE
            pages = min(place.length // PAGE_SIZE, block.pages - first)  # may be longer
            if pages > 0:
                found.append(Region(index, first, pages, place.address, PAGE_SIZE))
    return found


def changed(pid: int) -> SourceError:
    return SourceError(
        f"process {pid} has changed how it maps its memory while that was being saved: start again"
    )


def no_huge_pages(name: str) -> HostLacks:
    return HostLacks(
        f"{name} is on huge pages: writes to them cannot be held back page by page; take the "
        f"snapshot without --live"
    )


def _register(uffd: int, region: Region, name: str) -> None:
    try:
        register_write_protect(uffd, region.address, region.pages * PAGE_SIZE)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise HostLacks(
                f"writes to {name} are watched by somebody else already: another pageferry?"
            ) from e
        raise HostLacks(
            f"the kernel cannot hold back writes to {name} ({e.strerror}): it can for files in "
            f"tmpfs (/dev/shm) and memfds; take the snapshot without --live"
        ) from e
