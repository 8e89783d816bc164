"""Writes that are held back, step by step: guard and saver in this process, on memory of its own,
with threads that write to it."""

import mmap
import multiprocessing
import os
import select
import threading

import numpy as np
import pytest
from helpers import GIVE_UP, pattern

from pageferry.transport.errors import HostLacks, SourceError
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE
from pageferry.transport.snapshot_format import ALIGNMENT, CHUNK_BYTES
from pageferry.workers import jobs
from pageferry.workers.claims import CLAIMED, FREE, SAVED, TODO, WRITTEN, Claims
from pageferry.workers.counters import Counters
from pageferry.workers.guard import Guard
from pageferry.workers.guests.base import ArmedMemory, Region
from pageferry.workers.guests.protecting import protect_process
from pageferry.workers.kernel import userfaultfd
from pageferry.workers.kernel.libc import store_byte
from pageferry.workers.process import Desk
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.saver import LettingGo, Saver, SaverJob
from pageferry.workers.snapshot_file import SnapshotWriter

CHUNKS = 8
PAGES = CHUNKS * 16


class Bench:
    """Protected memory with content in all but its last chunk, and who saves it."""

    def __init__(self, path):
        self.fd = os.memfd_create("guard")
        self.before = pattern(PAGES - 16).ljust(PAGES * PAGE_SIZE, b"\0")
        os.ftruncate(self.fd, len(self.before))
        os.pwrite(self.fd, self.before[: -16 * PAGE_SIZE], 0)
        self.map = mmap.mmap(self.fd, len(self.before))
        self.base = int(np.frombuffer(self.map, np.uint8).ctypes.data)
        uffd = userfaultfd.create_protecting()
        userfaultfd.register_write_protect(uffd, self.base, len(self.before))
        self.memory = ArmedMemory(uffd, [Region(0, 0, PAGES, self.base, PAGE_SIZE)])
        block = RamBlock(Block("ram", len(self.before)), RamFile(self.fd, "ram"), 0)
        self.writer = SnapshotWriter(str(path), [block.spec], direct=False)
        self.claims = Claims([CHUNKS], multiprocessing.get_context("spawn").Lock())
        self.counters = Counters(2)
        self.states = self.claims.view(0)
        self.ours, theirs = multiprocessing.Pipe()
        job = SaverJob([block], self.writer.targets, self.writer.tables, self.claims,
                       self.counters, self.memory)  # fmt: skip
        self.guard = Guard(Desk(theirs, self.counters.row(0)), job)
        self.saver = Saver(Desk(theirs, self.counters.row(1)), job)
        self.theirs, self.block, self.threads = theirs, block, []

    def protect(self):
        LettingGo(self.memory)(0, 0, CHUNKS, on=True)

    def write(self, page):
        """Begin to; returns when the kernel says that it sleeps."""
        at = self.base + page * PAGE_SIZE + 100
        thread = threading.Thread(target=store_byte, args=(at, 0xEE))
        thread.start()
        self.threads.append(thread)
        assert select.select([self.memory.uffd], [], [], GIVE_UP)[0]
        return thread

    def write_copies(self):
        writing = self.guard.begin_writing()
        self.guard.kept.put(None)
        writing.join()

    def saved(self):
        """What the snapshot has of it."""
        return os.pread(self.writer._new.fd, len(self.before), ALIGNMENT)

    def now(self, page):
        return os.pread(self.fd, 1, page * PAGE_SIZE + 100)[0]

    def close(self):
        self.memory.disarm()
        for thread in self.threads:
            thread.join(GIVE_UP)
            assert not thread.is_alive()
        self.memory.close()
        self.states = None
        self.guard = self.saver = None
        self.writer.discard()
        self.claims.close()
        self.counters.close()
        self.ours.close()
        self.theirs.close()
        self.block.file.close()
        self.map.close()


@pytest.fixture
def bench(tmp_path):
    try:
        made = Bench(tmp_path / "a")
    except HostLacks as e:
        pytest.skip(str(e))
    yield made
    made.close()


def goes_on(thread):
    thread.join(GIVE_UP)
    return not thread.is_alive()


def test_a_write_waits_until_its_chunk_is_copied(bench):
    """Then the guard writes what was there before, when it has the time; holes too."""
    bench.protect()
    bench.guard.saving = True
    for page in (5, PAGES - 1):
        thread = bench.write(page)
        assert bench.now(page) == bench.before[page * PAGE_SIZE + 100]
        bench.guard._serve()
        assert goes_on(thread)
        assert bench.now(page) == 0xEE
        assert bench.states[page // 16] == FREE
    bench.write_copies()
    assert [bench.states[i] for i in (0, 1, CHUNKS - 1)] == [SAVED, TODO, SAVED]
    bench.saver._save(jobs.Extent(0, 0, PAGES, True))
    assert bench.claims.all_saved()
    assert bench.saved() == bench.before
    assert bench.counters.total("requests") == 2


def test_a_write_to_what_a_saver_is_copying(bench):
    """It sleeps until the saver has let go, whether that wakes it or the guard."""
    bench.protect()
    bench.guard.saving = True
    assert bench.claims.claim(bench.states, 2, 1) == [2]
    thread = bench.write(2 * 16 + 3)
    bench.guard._serve()
    bench.guard._serve()
    assert bench.guard.copied == [(0, 2)]
    assert thread.is_alive() and bench.states[2] == CLAIMED
    bench.saver._save_chunks(0, 2, 1)
    bench.guard._serve()
    assert goes_on(thread) and not bench.guard.copied
    assert (
        bench.saved()[2 * CHUNK_BYTES : 3 * CHUNK_BYTES]
        == (bench.before[2 * CHUNK_BYTES : 3 * CHUNK_BYTES])
    )


def test_who_falls_asleep_just_when_a_chunk_is_let_go(bench):
    """Its message is read when the chunk is saved: it is woken, and finds the chunk let go."""
    bench.protect()
    bench.guard.saving = True
    thread = bench.write(17)
    assert bench.claims.claim(bench.states, 1, 1) == [1]
    bench.states[1] = SAVED
    for address, length in LettingGo(bench.memory).where(0, 1, 1):
        # let go, and nobody is woken: UFFDIO_WRITEPROTECT_MODE_DONTWAKE is 2
        userfaultfd.fcntl.ioctl(
            bench.memory.uffd, userfaultfd._WRITEPROTECT,
            bytearray(userfaultfd.struct.pack("QQQ", address, length, 2)),
        )  # fmt: skip
    assert thread.is_alive()
    bench.guard._serve()
    assert goes_on(thread)


def test_before_the_instant_writes_are_let_go_and_noted(bench):
    bench.protect()
    thread = bench.write(3 * 16)
    bench.guard._serve()
    assert goes_on(thread)
    assert bench.states.tolist() == [TODO] * 3 + [WRITTEN] + [TODO] * 4
    assert bench.guard._command(jobs.Hold(b"a", True)) and bench.guard.held
    assert jobs.decode(bench.ours.recv_bytes()) == jobs.Ready("", b"a")
    LettingGo(bench.memory)(0, 3, 1, on=True)
    bench.states[3] = TODO
    assert bench.guard._command(jobs.Hold(b"b", False)) and not bench.guard.held
    thread = bench.write(3 * 16)
    bench.guard._serve()
    assert goes_on(thread) and bench.states[3] == FREE


def test_copies_that_find_no_room_are_written_first(bench):
    bench.protect()
    bench.guard.saving = True
    while bench.guard.free.qsize() > 1:
        bench.guard.free.get()
    writing = bench.guard.begin_writing()
    for chunk in range(3):
        thread = bench.write(chunk * 16 + chunk)
        bench.guard._serve()
        assert goes_on(thread)
    bench.guard.kept.put(None)
    writing.join()
    assert bench.states[:4].tolist() == [SAVED, SAVED, SAVED, TODO]
    assert bench.saved()[: 3 * CHUNK_BYTES] == bench.before[: 3 * CHUNK_BYTES]


def test_a_mapping_that_is_gone_is_an_error(bench):
    with mmap.mmap(-1, 1 << 20) as elsewhere:
        at = int(np.frombuffer(elsewhere, np.uint8).ctypes.data)
        with pytest.raises(SourceError, match="not mapped as it was"):
            userfaultfd.write_protect(bench.memory.uffd, at, 4096, on=True)


def test_huge_pages_cannot_be_held_back(bench):
    block = RamBlock(Block("ram", 2 << 20, 2 << 20), bench.block.file, 0)
    with pytest.raises(HostLacks, match=r"on huge pages.*without --live"):
        protect_process(1, [block])


def test_what_can_be_let_go_of_is_although_another_region_is_mapped_no_more(bench):
    bench.protect()
    thread = bench.write(5)
    gone = mmap.mmap(-1, PAGE_SIZE)
    address = int(np.frombuffer(gone, np.uint8).ctypes.data)
    gone.close()
    regions = bench.memory.regions
    bench.memory.regions = [Region(0, 0, 1, address, PAGE_SIZE), *regions]
    with pytest.raises(OSError, match="Errno"):
        bench.memory.disarm()
    assert goes_on(thread)
    bench.memory.regions = regions
