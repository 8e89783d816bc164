"""Page sums: what a file holds is compared with what was written, the rest must be zero."""

import os

import numpy as np
import pytest

from pageferry.transport.errors import DestinationError, RemoteProtocolError
from pageferry.transport.messages import Block
from pageferry.transport.pages import NO_RUNS, PAGE_SIZE
from pageferry.workers.checks import PIECE, Checks, ReadBack, pack_chunks
from pageferry.workers.digest import CHUNK_PAGES, PART_PAGES
from pageferry.workers.ram import RamBlock, RamFile


def runs(*pairs):
    return (
        np.array([start for start, _ in pairs], np.int64),
        np.array([count for _, count in pairs], np.int64),
    )


@pytest.fixture
def reading(tmp_path):
    """Makes a block of a file, and what reads it back."""
    made = []

    def make(size, start=0, all_of_it=False):
        path = tmp_path / f"ram{len(made)}"
        file = RamFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), str(path))
        os.ftruncate(file.fd, start + size)
        block = RamBlock(Block("ram", size), file, start)
        checks = Checks([block.pages])
        read_back = ReadBack([block], checks, all_of_it)
        made.append((file, checks, read_back))
        return block, checks, read_back

    yield make
    for file, checks, read_back in made:
        read_back.close()
        checks.close()
        file.close()


@pytest.mark.parametrize("start", [0, 5, 8192])
def test_all_that_was_written_is_compared(reading, start):
    """Wherever the block lies; runs above a piece; a last page that is partial."""
    pages = 2 * PIECE // PAGE_SIZE + 3
    block, _, read_back = reading(pages * PAGE_SIZE - 100, start, all_of_it=True)
    table = runs((0, 1), (3, pages - 3))
    content = os.urandom((pages - 2) * PAGE_SIZE)
    for first, at, n in ((0, 0, 1), (3, 1, pages - 3)):
        block.write(first, content[at * PAGE_SIZE : (at + n) * PAGE_SIZE])
    assert read_back.same(0, table, content, 0)
    for at in (0, 3 * PAGE_SIZE, block.size - 1):
        before = os.pread(block.file.fd, 1, start + at)
        os.pwrite(block.file.fd, bytes([before[0] ^ 1]), start + at)
        assert not read_back.same(0, table, content, 0)
        os.pwrite(block.file.fd, before, start + at)
    assert read_back.same(0, table, content, 0)


def test_another_piece_each_time(reading):
    """Frame after frame all pages of all runs are looked at."""
    piece = PIECE // PAGE_SIZE
    table = runs((0, 2), (10, 2 * piece + 1), (100, 1))
    block, _, read_back = reading(101 * PAGE_SIZE)
    content = bytes(int(table[1].sum()) * PAGE_SIZE)
    assert all(read_back.same(0, table, content, number) for number in range(12))
    found = set()
    for page in (0, 1, 10, 10 + piece, 10 + 2 * piece, 100):
        os.pwrite(block.file.fd, b"x", page * PAGE_SIZE)
        hits = [n for n in range(9) if not read_back.same(0, table, content, n)]
        assert hits
        found |= set(hits)
        os.pwrite(block.file.fd, b"\0", page * PAGE_SIZE)
    assert found == set(range(9))
    assert read_back.same(0, NO_RUNS, b"", 5)


def test_what_nobody_sent_is_counted(reading):
    """Holes are nothing, zeros that are there are nothing; a byte anywhere else is."""
    size = (PART_PAGES + 10) * PAGE_SIZE - 7
    block, _, read_back = reading(size)
    assert [read_back.unsent(0, part) for part in (0, 1)] == [0, 0]
    fd = block.file.fd
    os.pwrite(fd, b"sent", 3 * PAGE_SIZE)
    os.pwrite(fd, bytes(3 * PAGE_SIZE), 100 * PAGE_SIZE)  # zeros, and no hole
    for at in (5 * PAGE_SIZE, 7 * PAGE_SIZE - 1, (PART_PAGES - 1) * PAGE_SIZE, size - 1):
        os.pwrite(fd, b"x", at)
    read_back.note(0, runs((3, 1)), True)
    assert [read_back.unsent(0, part) for part in (0, 1)] == [3, 1]
    read_back.note(0, runs((3, 1)), False)  # it was to be zero in the end
    assert read_back.unsent(0, 0) == 4


def test_every_second_page(reading):
    """Runs of one page, checked and not, with data in all of them."""
    block, checks, read_back = reading(64 * PAGE_SIZE)
    os.pwrite(block.file.fd, b"x" * (64 * PAGE_SIZE), 0)
    checks.view(0)[::2] = 1
    assert read_back.unsent(0, 0) == 32


def test_what_was_left_out_counts_as_checked(reading):
    pages = 2 * CHUNK_PAGES + 1
    block, checks, read_back = reading(pages * PAGE_SIZE)
    os.pwrite(block.file.fd, b"x" * (pages * PAGE_SIZE), 0)
    checks.keep([pack_chunks([False, True, True])])
    assert read_back.unsent(0, 0) == CHUNK_PAGES


@pytest.mark.parametrize("kept", [[], [b""], [b"12"], [b"1", b"1"]])
def test_bits_of_another_layout(reading, kept):
    _, checks, _ = reading(CHUNK_PAGES * PAGE_SIZE)
    with pytest.raises(RemoteProtocolError):
        checks.keep(kept)


def test_a_file_that_became_shorter(reading):
    block, _, read_back = reading(8 * PAGE_SIZE)
    os.ftruncate(block.file.fd, PAGE_SIZE)
    with pytest.raises(DestinationError, match="shorter"):
        read_back.same(0, runs((6, 2)), b"x" * (2 * PAGE_SIZE), 0)
