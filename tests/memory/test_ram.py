"""RAM blocks in sparse files: reading, writing, clearing, holes, the tail."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import DestinationError, NoSpace
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE, pages_of, runs_of, total_pages
from pageferry.workers.ram import RamBlock, RamFile

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)

TAIL = 777


@pytest.fixture
def make(tmp_path):
    """Makes blocks in sparse files; the files are closed at the end."""
    files = []

    def make_block(size, start=0, behind=0, content=b""):
        path = tmp_path / f"ram{len(files)}"
        path.write_bytes(content)
        os.truncate(path, start + size + behind)
        files.append(RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path)))
        return RamBlock(Block("ram", size, offset=start), files[-1], start)

    yield make_block
    for file in files:
        file.close()


def runs(*pages):
    return runs_of(np.array(pages, np.int64))


def whole(block):
    """All bytes of the file behind a block."""
    return os.pread(block.file.fd, os.fstat(block.file.fd).st_size, 0)


def letters(count, first=0):
    """Pages of "a", "b", …"""
    return b"".join(bytes([97 + (first + i) % 26]) * PAGE_SIZE for i in range(count))


# ---- reading and writing -------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 5, PAGE_SIZE])
def test_what_is_written_is_read(make, start):
    """Whole pages at their place; the file around the block is not touched."""
    block = make(4 * PAGE_SIZE, start, behind=100, content=b"#" * start)
    block.write(1, letters(2))
    expected = b"#" * start + bytes(PAGE_SIZE) + letters(2) + bytes(PAGE_SIZE + 100)
    assert whole(block) == expected
    assert block.read(PAGE_SIZE - 1, 3) == b"\0aa"
    assert block.read(3 * PAGE_SIZE - 1, 10**6) == b"b" + bytes(PAGE_SIZE)
    assert block.read(4 * PAGE_SIZE, 10) == b""


def test_what_lies_behind_the_end_of_the_block_is_dropped(make):
    """A last page travels as a whole page; the file does not grow by it."""
    block = make(PAGE_SIZE + TAIL, start=8, behind=50)
    block.write(0, letters(2))
    assert whole(block) == bytes(8) + letters(2)[: PAGE_SIZE + TAIL] + bytes(50)
    block.write(1, letters(1, 5))
    assert block.read(PAGE_SIZE, PAGE_SIZE) == b"f" * TAIL
    assert os.fstat(block.file.fd).st_size == 8 + PAGE_SIZE + TAIL + 50


def test_any_buffer_can_be_written(make):
    """Frames come as memoryviews."""
    block = make(3 * PAGE_SIZE)
    block.write(0, memoryview(letters(2))[PAGE_SIZE:])
    block.write(1, bytearray(letters(1)))
    block.write(2, b"")
    assert whole(block) == letters(1, 1) + letters(1) + bytes(PAGE_SIZE)


@pytest.mark.parametrize("start", [0, 3, 8, PAGE_SIZE])
@pytest.mark.parametrize("size", [1, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE + TAIL])
def test_views_of_the_memory(make, start, size):
    """Whole pages in place, read-only; what is left over as the tail, padded with zeros."""
    data = letters(3)[:size]
    block = make(size, start, behind=50, content=bytes(start) + data + b"#" * 50)
    n = size // PAGE_SIZE
    assert (block.size, block.pages, block.name) == (size, -(-size // PAGE_SIZE), "ram")
    pages = block.whole_pages()
    assert pages.shape == (n, PAGE_SIZE)
    assert pages.tobytes() == data[: n * PAGE_SIZE]
    assert not pages.flags.writeable
    assert block.aligned == (start % 8 == 0)
    if block.aligned:
        assert block.words().tobytes() == data[: n * PAGE_SIZE]
    rest = data[n * PAGE_SIZE :]
    assert block.tail() == (rest.ljust(PAGE_SIZE, b"\0") if rest else b"")
    del pages


def test_views_show_what_is_written_later(make):
    """Guest memory changes under our eyes; nothing is a copy but the tail."""
    block = make(2 * PAGE_SIZE)
    pages, words = block.whole_pages(), block.words()
    block.write(1, letters(1))
    assert pages[1].tobytes() == letters(1) == words[1].tobytes()
    del pages, words


def test_a_file_is_closed_once_whoever_still_looks(make):
    """Views keep the mapping alive, not the descriptor."""
    block = make(PAGE_SIZE, content=letters(1))
    fd, pages = block.file.fd, block.whole_pages()
    block.file.close()
    block.file.close()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at below
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF
    assert pages.tobytes() == letters(1)
    del pages


# ---- clearing ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3, PAGE_SIZE])
def test_cleared_pages_read_as_zero_and_others_do_not(make, start):
    """At any place, the tail included, and never a byte behind the block."""
    size = 5 * PAGE_SIZE + TAIL
    around = b"#" * (start + size + 30)
    block = make(size, start, behind=30, content=around)
    block.clear(runs(1, 2, 5))
    inside = bytearray(b"#" * size)
    inside[PAGE_SIZE : 3 * PAGE_SIZE] = bytes(2 * PAGE_SIZE)
    inside[5 * PAGE_SIZE :] = bytes(TAIL)
    assert whole(block) == b"#" * start + bytes(inside) + b"#" * 30
    block.clear(runs())
    assert block.read(0, 1) == b"#"


def test_clearing_gives_memory_back(make):
    """Holes, where the file system can."""
    block = make(64 * PAGE_SIZE, content=letters(64))
    os.fsync(block.file.fd)
    before = os.fstat(block.file.fd).st_blocks
    block.clear(runs(*range(64)))
    assert os.fstat(block.file.fd).st_blocks < before
    assert os.fstat(block.file.fd).st_size == 64 * PAGE_SIZE


def test_zeros_are_written_where_no_holes_can_be_made(make):
    """More than fits into one buffer of zeros; up to the block's end, and not up to it."""
    size = 300 * PAGE_SIZE + TAIL
    around = b"#" * (size + 10)
    block = make(size, behind=10, content=around)
    block._write_zeros(1, 290 * PAGE_SIZE)
    assert whole(block) == around[:PAGE_SIZE] + bytes(290 * PAGE_SIZE) + around[291 * PAGE_SIZE :]
    block._write_zeros(299, PAGE_SIZE + TAIL)
    assert whole(block)[size - TAIL - PAGE_SIZE :] == bytes(PAGE_SIZE + TAIL) + b"#" * 10


# ---- holes ---------------------------------------------------------------------------------


def holes_are_seen(block):
    """True if the file system tells holes from data at all."""
    return total_pages(block.data_runs()) == 0


@pytest.mark.parametrize("start", [0, 100, 4 * PAGE_SIZE])
def test_data_runs_hold_all_data(make, start):
    """Whatever is outside of them reads as zero; large holes are not in them."""
    pages = 4096
    block = make(pages * PAGE_SIZE + TAIL, start)
    assert holes_are_seen(block)
    written = [0, 1, 1000, 4095, 4096]
    for page in written:
        block.write(page, letters(1))
    runs_ = block.data_runs()
    found = set(pages_of(runs_).tolist())
    assert set(written) <= found <= set(range(pages + 1))
    # what a file system adds to them is a matter of its blocks, not of megabytes
    assert len(found) < pages / 2
    for page in set(range(pages + 1)) - found:
        assert not any(block.read(page * PAGE_SIZE, PAGE_SIZE))


def test_data_runs_of_a_part(make):
    """Pages are numbered from the block's begin; nothing outside of the part is in it."""
    block = make(4096 * PAGE_SIZE)
    for page in (10, 1000, 2000, 3000):
        block.write(page, letters(1))
    everything = set(pages_of(block.data_runs()).tolist())
    for first, count in ((0, 1000), (1000, 1), (999, 1002), (2001, 4000), (4095, 1), (0, 4096)):
        part = set(pages_of(block.data_runs(first, count)).tolist())
        assert part == everything & set(range(first, first + count))
    assert total_pages(block.data_runs(4096, 10)) == 0


def test_data_of_neighbours_is_not_ours(make):
    """What the file holds before and behind a block is in nobody's runs but theirs."""
    block = make(1024 * PAGE_SIZE, start=1024 * PAGE_SIZE, behind=1024 * PAGE_SIZE)
    os.pwrite(block.file.fd, letters(1), 0)
    for page in (2048, 2058, 3000):
        os.pwrite(block.file.fd, letters(1), page * PAGE_SIZE)
    assert [len(part) for part in block.data_runs()] == [0, 0]
    block.write(5, letters(1))
    found = set(pages_of(block.data_runs()).tolist())
    assert 5 in found and len(found) < 512


@pytest.mark.parametrize("start", [0, 4 * PAGE_SIZE])
def test_whether_any_of_some_pages_is_there(make, start):
    """As the runs of data say, also where pages of others lie between and around them."""
    block = make(4096 * PAGE_SIZE, start, behind=PAGE_SIZE, content=b"#" * start)
    assert not block.has_data(runs(0, 17, 4095))
    for page in (16, 2000):
        block.write(page, letters(1))
    there = set(pages_of(block.data_runs()).tolist())
    absent = [page for page in range(4096) if page not in there]
    for page in (0, 15, 16, 17, 1999, 2000, 2001, 4095):
        assert block.has_data(runs(page)) == (page in there)
    assert not block.has_data(runs())
    assert not block.has_data(runs(*absent))
    for page in (16, 2000):
        assert block.has_data(runs(*sorted([*absent, page])))
        starts, counts = runs(*sorted([*absent, page]))
        assert block.has_data((starts[::-1], counts[::-1]))
    block.clear(runs(16))
    assert block.has_data(runs(16)) == (16 in pages_of(block.data_runs()))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 9)), max_size=12))
@examples
def test_any_order_of_writes_and_clears(tmp_path_factory, steps):
    """Against a bytearray; and the data runs never leave out what is not zero."""
    size = 48 * PAGE_SIZE + TAIL
    path = tmp_path_factory.mktemp("ram") / "ram"
    path.write_bytes(b"")
    os.truncate(path, size)
    file = RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path))
    try:
        block, model = RamBlock(Block("ram", size), file, 0), bytearray(size)
        for i, (write, first, count) in enumerate(steps):
            begin, end = first * PAGE_SIZE, min(size, (first + count) * PAGE_SIZE)
            if write:
                block.write(first, letters(count, i))
                model[begin:end] = letters(count, i)[: end - begin]
            else:
                block.clear(runs(*range(first, first + count)))
                model[begin:end] = bytes(end - begin)
        assert whole(block) == model
        found = set(pages_of(block.data_runs()).tolist())
        for page in range(block.pages):
            assert page in found or not any(model[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
    finally:
        file.close()


# ---- what goes wrong -----------------------------------------------------------------------


def test_a_full_disk_is_an_error_of_its_own():
    """/dev/full says ENOSPC to every write."""
    file = RamFile(os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC), "/dev/full")
    try:
        with pytest.raises(NoSpace, match="/dev/full"):
            RamBlock(Block("ram", PAGE_SIZE), file, 0).write(0, letters(1))
    finally:
        file.close()


def test_a_file_that_cannot_be_written(make):
    """The error names it; it is not the disk that is full."""
    block = make(2 * PAGE_SIZE)
    file = RamFile(os.open(block.file.name, os.O_RDONLY | os.O_CLOEXEC), block.file.name)
    try:
        read_only = RamBlock(block.spec, file, 0)
        for change in (lambda: read_only.write(0, letters(1)), lambda: read_only.clear(runs(1))):
            with pytest.raises(DestinationError, match=block.file.name) as caught:
                change()
            assert type(caught.value) is DestinationError
    finally:
        file.close()
