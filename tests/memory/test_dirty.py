"""Pages that were written, found on a sample by their hashes: how many, in memory of any shape,
without touching it; and how memory compresses."""

import os
from contextlib import closing, contextmanager

import numpy as np
import pytest

from pageferry.pipeline.dirty_rate import margin
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE, pages_of, runs_from_bytes
from pageferry.workers.compressibility import compressed
from pageferry.workers.dirty import Interrupted, SampledPages, WrittenPart
from pageferry.workers.guests.base import SourceGuest
from pageferry.workers.guests.sample import Sample
from pageferry.workers.kernel.tracking_cost import fault_seconds
from pageferry.workers.ram import RamBlock, RamFile

PAGES = 20_000


@contextmanager
def memory(*sizes):
    """Blocks of so many pages, one behind the other in one file, all holes."""
    fd = os.memfd_create("test-dirty")
    os.ftruncate(fd, sum(sizes) * PAGE_SIZE)
    file, starts = RamFile(fd, "test"), np.cumsum([0, *sizes[:-1]]) * PAGE_SIZE
    try:
        yield [
            RamBlock(Block(f"b{i}", n * PAGE_SIZE), file, int(start))
            for i, (n, start) in enumerate(zip(sizes, starts, strict=True))
        ]
    finally:
        file.close()


def write(block, pages):
    for page in pages:
        block.write(int(page), os.urandom(8).ljust(PAGE_SIZE, b"\1"))


@pytest.mark.parametrize("together", [True, False])
def test_a_sample_finds_what_was_written_within_its_margin(together):
    draw = np.random.Generator(np.random.PCG64(5))
    with memory(PAGES, 500) as blocks, closing(SampledPages(blocks, [4000, 500], 7)) as looking:
        looking.begin()
        assert looking.look() == 0
        dirty = np.arange(3000, 7000) if together else draw.permutation(PAGES)[:4000]
        write(blocks[0], dirty)
        write(blocks[1], range(100))
        found = looking.look()
        # what lies together is met by nearly as many parts as it has
        limit = 2 / 4000 if together else margin(0.2, 4000, PAGES)
        assert found - 100 == pytest.approx(4000, abs=max(limit * 4000, 2 * PAGES / 4000))
        runs = looking.written()
        assert set(pages_of(runs[0])) <= set(dirty) and list(pages_of(runs[1])) == [*range(100)]
        assert looking.cpu > 0 and (looking.total, looking.sample) == (PAGES + 500, 4500)
        looking.begin()
        assert looking.look() == 0


def test_it_fills_no_hole_and_outlives_the_guests_descriptor():
    with memory(PAGES) as blocks, closing(SampledPages(blocks, [PAGES], 7)) as looking:
        looking.begin()
        assert os.fstat(blocks[0].file.fd).st_blocks == 0
        blocks[0].file.close()
        assert looking.look() == 0


def test_a_last_page_that_is_none_counts():
    with memory(3) as (whole,):
        block = RamBlock(Block("odd", 2 * PAGE_SIZE + 100), whole.file, 0)
        with closing(SampledPages([block], [3], 7)) as looking:
            looking.begin()
            os.pwrite(block.file.fd, b"x", 2 * PAGE_SIZE + 5)
            assert looking.look() == 1


def test_nobody_waits_for_what_nobody_wants():
    wanted = [True]
    with (
        memory(PAGES) as blocks,
        closing(SampledPages(blocks, [PAGES], 7, lambda: bool(wanted))) as looking,
    ):
        looking.begin()
        wanted.clear()
        with pytest.raises(Interrupted):
            looking.look()


def test_a_sample_of_what_is_written_holds_nothing_else():
    class Guest(SourceGuest):
        kind, live = "ram", True

        def close(self):
            pass

    with memory(1000) as blocks:
        write(blocks[0], range(1000))
        guest = Guest()
        guest.blocks = blocks
        dirty = [10, 11, 12, 500, 700, 701]
        runs = [runs_from_bytes([(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in dirty])]
        with closing(Sample(WrittenPart(guest, runs), 1 << 20)) as sample:
            assert sample.data == len(dirty) * PAGE_SIZE and sample.live
            with closing(sample.guest()) as source:
                got = source.blocks[0].read(0, sample.data)
        assert got == b"".join(blocks[0].read(p * PAGE_SIZE, PAGE_SIZE) for p in dirty)


def test_compressibility_is_of_the_content_without_zeros():
    with memory(1024) as blocks:
        (block,) = blocks
        assert compressed(block, block.data_runs()) == []
        block.write(0, b"the same again and again " * 8192)
        block.write(600, bytes(256 * PAGE_SIZE))
        for found in compressed(block, block.data_runs()):
            assert found.ratio < 0.1 and found.rate > 1e6
        block.clear(block.data_runs())
        block.write(300, os.urandom(256 * PAGE_SIZE))
        assert [round(f.ratio, 1) for f in compressed(block, block.data_runs())] == [1.0, 1.0]


def test_what_a_fault_costs_is_some_nanoseconds_to_microseconds():
    assert 0 <= fault_seconds() < 0.001
