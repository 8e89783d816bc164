"""Digests of RAM blocks: the content counts, not the file behind it."""

import hashlib
import os

import pytest
import xxhash

from pageferry.transport.errors import SourceError
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE
from pageferry.workers.digest import (
    CHUNK_BYTES,
    PART_PAGES,
    block_digest,
    chunk_digests,
    part_count,
    part_digest,
)
from pageferry.workers.ram import RamBlock, RamFile

PART = PART_PAGES * PAGE_SIZE


@pytest.fixture
def make(tmp_path):
    """Makes blocks; `holes`: whatever is zero is not written."""
    files = []

    def make_block(content, *, start=0, holes=False):
        path = tmp_path / f"ram{len(files)}"
        with open(path, "wb") as f:
            f.truncate(start + len(content))
            for at in range(0, len(content), PAGE_SIZE):
                page = content[at : at + PAGE_SIZE]
                if not holes or any(page):
                    f.seek(start + at)
                    f.write(page)
        files.append(RamFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path)))
        return RamBlock(Block("ram", len(content)), files[-1], start)

    yield make_block
    for file in files:
        file.close()


def digest(block, buffer=CHUNK_BYTES):
    parts = [part_digest(block, part, bytearray(buffer)) for part in range(part_count(block.pages))]
    return block_digest(parts)


def naive(content):
    """The tree of digests, from bytes: chunks of 1 MiB, parts of 64 MiB, the block."""
    xxh, parts = xxhash.xxh3_128_digest, []
    for part in range(0, len(content), 64 << 20):
        chunks = range(part, min(part + (64 << 20), len(content)), 1 << 20)
        parts.append(xxh(b"".join(xxh(content[at : at + (1 << 20)]) for at in chunks)))
    return xxh(b"".join(parts))


def text(pages, tail=0):
    """Pages with content, every other one zero."""
    content = bytearray()
    for i in range(pages):
        content += bytes(PAGE_SIZE) if i % 2 else bytes([i % 255 + 1]) * PAGE_SIZE
    return bytes(content + b"t" * tail)


CHUNK = 256  # pages
CONTENTS = {
    "a page": text(1),
    "less than a page": text(0, tail=99),
    "pages and a tail": text(7, tail=99),
    "a chunk": text(CHUNK),
    "a chunk and a byte": text(CHUNK, tail=1),
    "a hole between chunks": text(CHUNK) + bytes(2 * CHUNK * PAGE_SIZE) + text(3, tail=5),
    "holes around a chunk": bytes(CHUNK * PAGE_SIZE) + text(2) + bytes(CHUNK * PAGE_SIZE),
    "zeros and a tail of zeros": bytes(CHUNK * PAGE_SIZE + 17),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_holes_and_zeros_are_the_same(make, what):
    """As the tree says it, for sparse and dense files, wherever in a file a block lies."""
    content = CONTENTS[what]
    expected = naive(content)
    for start in (0, 5, 8192):
        for holes in (False, True):
            assert digest(make(content, start=start, holes=holes)) == expected
    assert digest(make(content), buffer=CHUNK_BYTES + 100) == expected


@pytest.mark.parametrize("size", [1, PAGE_SIZE, 2 * PAGE_SIZE + 5, (1 << 20) + 3])
def test_a_block_without_data_is_known_without_reading(make, size):
    """The same as if it had been read; the buffer for reading is not touched."""
    dense, sparse = make(bytes(size)), make(bytes(size), holes=True)
    untouched = bytearray(b"\xaa" * CHUNK_BYTES)
    assert part_digest(sparse, 0, untouched) == part_digest(dense, 0, bytearray(CHUNK_BYTES))
    assert untouched == b"\xaa" * CHUNK_BYTES


@pytest.mark.parametrize("at", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, 4 * PAGE_SIZE + 7, -1])
def test_any_byte_counts(make, at):
    """The first, the last, one in a page that was zero."""
    content = bytearray(text(8, tail=50))
    before = digest(make(bytes(content)))
    content[at] ^= 1
    assert digest(make(bytes(content))) != before
    assert digest(make(bytes(content), holes=True)) != before


def test_the_place_and_the_length_count(make):
    """The same bytes elsewhere, or with zeros behind them, are something else."""
    a, b = b"a" * PAGE_SIZE, b"b" * PAGE_SIZE
    contents = [a + b, b + a, a, a + b + bytes(PAGE_SIZE), a + b + b"\0", bytes(PAGE_SIZE) + a + b]
    digests = [digest(make(content)) for content in contents]
    assert len(set(digests)) == len(contents)


def test_parts(tmp_path):
    """64 MiB each: one byte changes one part, and the order of the parts counts."""
    assert [part_count(pages) for pages in (1, PART_PAGES, PART_PAGES + 1)] == [1, 1, 2]
    path = tmp_path / "large"
    size = 2 * PART + 10
    with open(path, "wb") as f:
        f.truncate(size)
        f.seek(PART)
        f.write(b"x")
    file = RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path))
    try:
        block = RamBlock(Block("ram", size), file, 0)

        def parts():
            return [part_digest(block, i, bytearray(CHUNK_BYTES)) for i in range(3)]

        before = parts()
        assert len(set(before)) == 3
        os.pwrite(file.fd, b"y", size - 1)
        after = parts()
    finally:
        file.close()
    assert before[:2] == after[:2] and before[2] != after[2]
    assert block_digest([after[2]]) == naive(bytes(9) + b"y")
    assert block_digest(before) != block_digest(after)
    assert block_digest(after) != block_digest(after[::-1])


def test_a_file_that_became_shorter(make):
    """It is not what was announced: an error, no digest of less."""
    block = make(text(4))
    os.truncate(block.file.name, PAGE_SIZE)
    with pytest.raises(SourceError, match="shorter"):
        digest(block)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("what", CONTENTS)
def test_each_chunk_has_its_digest(make, what, holes):
    """Half a SHA-256, in order; the last one of what is left."""
    content = CONTENTS[what]
    assert chunk_digests(make(content, start=PAGE_SIZE, holes=holes)) == b"".join(
        hashlib.sha256(content[at : at + CHUNK_BYTES]).digest()[:16]
        for at in range(0, len(content), CHUNK_BYTES)
    )
