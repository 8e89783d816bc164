"""The index of pages by content: it finds what is there, never gives what is not asked for, and is
bounded."""

import hashlib
import os

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from twin_page import twin

from pageferry.transport.errors import SourceError
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE
from pageferry.workers.content import (
    DIGEST_BYTES,
    ContentIndex,
    asked_pages,
    equal_digests,
    page_digests,
    sure_digests,
    take_digests,
)
from pageferry.workers.ram import RamBlock, RamFile


def page(number):
    """Content number `number`; 0 is zero."""
    return bytes(PAGE_SIZE) if number == 0 else number.to_bytes(8, "big") * (PAGE_SIZE // 8)


class Image:
    """A file of such pages, and a block that is all of it."""

    def __init__(self, path, numbers):
        self.path = path
        path.write_bytes(b"".join(map(page, numbers)))
        self.file = RamFile(os.open(path, os.O_RDWR), str(path))
        self.block = RamBlock(Block("ram", max(1, len(numbers)) * PAGE_SIZE), self.file, 0)
        self.pages = np.arange(len(numbers), dtype=np.int64)

    def numbers(self):
        data = self.path.read_bytes()
        return [int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data), PAGE_SIZE)]

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.file.close()


def digests_of(numbers):
    return b"".join(xxhash.xxh3_128_digest(page(n)) for n in numbers)


def sure_of(numbers):
    return b"".join(hashlib.sha256(page(n)).digest()[:DIGEST_BYTES] for n in numbers)


numbers = st.lists(st.integers(0, 12), min_size=1, max_size=600)


@settings(max_examples=60, deadline=None)
@given(known=st.lists(numbers, max_size=4), wanted=numbers)
def test_what_any_file_has_is_found_and_nothing_else_is_written(tmp_path_factory, known, wanted):
    folder = tmp_path_factory.mktemp("content")
    index = ContentIndex()
    for i, content in enumerate(known):
        with Image(folder / str(i), content) as image:
            index.add(str(image.path), 0, image.pages, digests_of(content))
    with Image(folder / "new", [999] * len(wanted)) as new:
        may = index.knows(digests_of(wanted))
        have = index.fetch(new.block, new.pages, digests_of(wanted), sure_of(wanted))
        assert may.tolist() == have.tolist()
        anywhere = {number for content in known for number in content} - {0}
        assert have.tolist() == [int(number in anywhere) for number in wanted]
        expected = [n if there else 999 for n, there in zip(wanted, have.tolist(), strict=True)]
        assert new.numbers() == expected


@given(numbers, numbers)
def test_equal_and_chosen_digests(ours, theirs):
    count = min(len(ours), len(theirs))
    a, b = digests_of(ours[:count]), digests_of(theirs[:count])
    same = equal_digests(a, b)
    assert same.tolist() == [int(x == y) for x, y in zip(ours, theirs, strict=False)]
    which = np.flatnonzero(same)
    assert take_digests(a, which) == take_digests(b, which) == digests_of(ours[i] for i in which)


def test_digests_of_a_block(tmp_path):
    content = [1, 2, 3, 0, 5] * 200
    with Image(tmp_path / "image", content) as image:
        assert page_digests(image.block, image.pages) == digests_of(content)
        some = np.array([0, 1, 7, 300, 301, 999])
        assert page_digests(image.block, some) == digests_of([content[i] for i in some])
        assert page_digests(image.block, some[:0]) == b""
        assert sure_digests(image.block, some) == sure_of([content[i] for i in some])
        image.file.given_up = True
        with pytest.raises(SourceError, match="given up"):
            page_digests(image.block, image.pages)


def test_a_page_that_was_made_to_be_taken_for_another(tmp_path):
    """It is found, and not taken."""
    wanted = page(1)
    made = twin(wanted, b"planted!")
    assert made != wanted
    assert b"planted!" in made
    assert xxhash.xxh3_128_digest(made) == xxhash.xxh3_128_digest(wanted)
    index = ContentIndex()
    with Image(tmp_path / "old", [5]) as old, Image(tmp_path / "new", [999]) as new:
        os.pwrite(old.file.fd, made, 0)
        index.add(str(old.path), 0, old.pages, page_digests(old.block, old.pages))
        assert index.knows(digests_of([1])).all()
        assert not index.fetch(new.block, new.pages, digests_of([1]), sure_of([1])).any()
        assert new.numbers() == [999]


@pytest.mark.parametrize("what", ["changed", "shorter", "gone", "a pipe", "a link"])
def test_a_file_that_is_not_what_it_was(tmp_path, what):
    """A hint and no more: a miss, and what is right in it is still taken."""
    content = list(range(1, 301))
    index = ContentIndex()
    with Image(tmp_path / "old", content) as old, Image(tmp_path / "new", [999] * 300) as new:
        index.add(str(old.path), 0, old.pages, digests_of(content))
        right = set()
        match what:
            case "changed":
                os.pwrite(old.file.fd, b"x", 100 * PAGE_SIZE + 9)
                right = set(content) - {101}
            case "shorter":
                os.ftruncate(old.file.fd, 50 * PAGE_SIZE + 100)
                right = set(content[:50])
            case "gone":
                old.path.unlink()
            case "a pipe":
                old.path.unlink()
                os.mkfifo(old.path)
            case "a link":
                old.path.rename(tmp_path / "elsewhere")
                old.path.symlink_to(tmp_path / "elsewhere")
        have = index.fetch(new.block, new.pages, digests_of(content), sure_of(content))
        assert {n for n, there in zip(content, have, strict=True) if there} == right
        assert new.numbers() == [n if n in right else 999 for n in content]


def test_to_be_found_is_not_enough(tmp_path):
    """What decides is the other digest, all of it."""
    index = ContentIndex()
    with Image(tmp_path / "old", [1]) as old, Image(tmp_path / "new", [999]) as new:
        index.add(str(old.path), 0, old.pages, digests_of([1]))
        almost = sure_of([1])[:15] + b"?"
        assert not index.fetch(new.block, new.pages, digests_of([1]), almost).any()
        assert new.numbers() == [999]


def test_it_is_bounded_and_forgets_what_was_of_no_use(tmp_path):
    index = ContentIndex(most=100)
    with Image(tmp_path / "new", [999]) as new:
        for i in range(5):
            content = list(range(i * 40 + 1, i * 40 + 41))
            with Image(tmp_path / str(i), content) as image:
                index.add(str(image.path), 0, image.pages, digests_of(content))
            assert len(index) <= 100
            if i >= 1:  # of the first, so that it stays
                assert index.fetch(new.block, new.pages, digests_of([1]), sure_of([1])).all()
        assert not index.fetch(new.block, new.pages, digests_of([41]), sure_of([41])).any()
        assert index.fetch(new.block, new.pages, digests_of([161]), sure_of([161])).all()
    with Image(tmp_path / "large", list(range(1, 301))) as large:
        index.add(str(large.path), 0, large.pages, digests_of(range(1, 301)))
        assert len(index) == 100


def test_blocks_that_do_not_begin_a_file(tmp_path):
    path = tmp_path / "core"
    path.write_bytes(b"head" + page(7) + page(8))
    index = ContentIndex()
    index.add(str(path), 4, np.arange(2), digests_of([7, 8]))
    with Image(tmp_path / "new", [999, 999]) as new:
        assert index.fetch(new.block, new.pages, digests_of([8, 7]), sure_of([8, 7])).all()
        assert new.numbers() == [8, 7]


def test_a_last_partial_page_has_no_digest(tmp_path):
    with Image(tmp_path / "image", [1, 2]) as image:
        block = RamBlock(Block("ram", PAGE_SIZE + 5), image.file, 0)
        runs = np.array([0]), np.array([2])
        assert asked_pages(runs, block).tolist() == [0]
    assert len(xxhash.xxh3_128_digest(b"")) == DIGEST_BYTES
