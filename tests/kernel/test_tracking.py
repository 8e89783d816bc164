"""The real kernel: writes of another process are found exactly, none missed, none twice."""

import mmap
import multiprocessing
import os

import numpy as np
import pytest

from pageferry.transport.errors import HostLacks
from pageferry.transport.pages import PAGE_SIZE, pages_of
from pageferry.workers.forking import start_process
from pageferry.workers.guests.handover import HandoverSocket, Mapping, send_mappings
from pageferry.workers.kernel import userfaultfd
from pageferry.workers.kernel.libc import punch_hole
from pageferry.workers.kernel.pagemap import PagemapScanner
from pageferry.workers.placing import address_of
from pageferry.workers.segments import Segment


def _tracked_writer(pipe, segment, handover):
    """Hands over its userfaultfd, then writes the pages it is told to."""
    memory = segment.array(np.uint8, segment.size)
    uffd = userfaultfd.create_tracking()
    userfaultfd.register_write_protect(uffd, memory.ctypes.data, memory.nbytes)
    mapping = Mapping(memory.ctypes.data, memory.nbytes, 0, PAGE_SIZE)
    send_mappings(handover, [mapping], [uffd])
    while (pages := pipe.recv()) is not None:
        memory[np.array(pages, int) * PAGE_SIZE + 17] += 1
        pipe.send("done")


@pytest.fixture
def tracked():
    try:
        os.close(userfaultfd.create_tracking())
    except HostLacks as e:
        pytest.skip(str(e))
    segment = Segment(4096 * PAGE_SIZE, "tracked")
    ours, theirs = multiprocessing.Pipe()
    handover = HandoverSocket()
    process = start_process(_tracked_writer, (theirs, segment, handover.path), "tracked")
    theirs.close()
    mappings, descriptors = handover.accept()
    handover.close()
    scanner = PagemapScanner(process.pid)

    class Tracked:
        def write(self, pages):
            ours.send([int(p) for p in pages])
            assert ours.recv() == "done"

        def collect(self):
            base = mappings[0].base_host_virt_addr
            return set(pages_of(scanner.collect(base, segment.size)).tolist())

    yield Tracked()
    ours.send(None)
    process.join()
    process.close()
    ours.close()
    scanner.close()
    os.close(descriptors[0])
    segment.close()


def test_exactly_what_was_written(tracked):
    tracked.collect()
    assert tracked.collect() == set()
    draw = np.random.Generator(np.random.PCG64(3))
    for size in (1, 2, 100, 4096):
        pages = set(draw.choice(4096, size, replace=False).tolist())
        tracked.write(pages)
        assert tracked.collect() == pages
        assert tracked.collect() == set()


def test_every_other_page(tracked):
    """More regions than a call returns in one go must not be cut off."""
    tracked.collect()
    tracked.write(range(0, 4096, 2))
    assert tracked.collect() == set(range(0, 4096, 2))


def test_many_regions_need_several_calls(tracked, monkeypatch):
    import ctypes

    from pageferry.workers.kernel import pagemap

    monkeypatch.setattr(pagemap, "_REGIONS", 7)
    assert ctypes.sizeof(ctypes.c_uint64) == 8
    tracked.collect()
    tracked.write(range(0, 400, 3))
    assert tracked.collect() == set(range(0, 400, 3))


@pytest.fixture
def watched():
    """Memory of this process, its file and its scanner; armed."""
    try:
        uffd = userfaultfd.create_tracking()
    except HostLacks as e:
        pytest.skip(str(e))
    fd = os.memfd_create("watched")
    os.ftruncate(fd, 1024 * PAGE_SIZE)
    memory = mmap.mmap(fd, 1024 * PAGE_SIZE)
    memory[: 512 * PAGE_SIZE] = b"\1" * (512 * PAGE_SIZE)
    address = address_of(memory)
    userfaultfd.register_write_protect(uffd, address, len(memory))
    scanner = PagemapScanner(os.getpid())

    def collect():
        return set(pages_of(scanner.collect(address, len(memory))).tolist())

    collect()
    yield memory, fd, collect
    scanner.close()
    os.close(uffd)
    memory.close()
    os.close(fd)


def test_written_pages_that_the_kernel_took_away(watched):
    """Reclaimed, or dropped from the page tables: nothing is there that says written or not. Those
    that were written have to be found, in memory and in what was a hole."""
    memory, _, collect = watched
    for page in (3, 5, 700):
        memory[page * PAGE_SIZE] = 7
    for page in (5, 9, 700):  # 9 was not written
        memory.madvise(mmap.MADV_DONTNEED, page * PAGE_SIZE, PAGE_SIZE)
    assert collect() == {3, 5, 700}
    assert collect() == set()
    memory[9 * PAGE_SIZE] = 7
    assert collect() == {9}


def test_what_it_does_not_see(watched):
    """Holes, and writes by write(2): others have to look for them (tracking.py)."""
    memory, fd, collect = watched
    punch_hole(fd, 3 * PAGE_SIZE, PAGE_SIZE)
    os.pwrite(fd, b"z", 12 * PAGE_SIZE)
    assert collect() == set()
    memory[3 * PAGE_SIZE] = 7
    assert collect() == {3}
