"""The real kernel: writes of another process are found exactly, none missed, none twice."""

import multiprocessing

import numpy as np
import pytest

from pageferry.transport.errors import HostLacks
from pageferry.transport.pages import PAGE_SIZE, pages_of
from pageferry.workers.forking import start_process
from pageferry.workers.guests.handover import HandoverSocket, Mapping, send_mappings
from pageferry.workers.kernel import userfaultfd
from pageferry.workers.kernel.pagemap import PagemapScanner
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
        import os

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
