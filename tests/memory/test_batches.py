"""Batches: what a sender makes of pages, taken apart again and compared byte for byte."""

import os
import random

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.codecs import CODECS, Decoders
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE, check_runs, pages_of, total_pages
from pageferry.transport.wire import Frame, Kind, decode, encode_data, payload_matches
from pageferry.workers.batches import BatchMaker, BlockReader, flat, page_hashes
from pageferry.workers.counters import FIELDS, Row
from pageferry.workers.ram import RamBlock, RamFile

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)

TEXT = (b"Call me Ishmael. Some years ago, never mind how long precisely. " * 64)[:PAGE_SIZE]
CODEC_NAMES = [*CODECS, "auto"]
# Pages of the memory below by what is in them; the tail is a page, too.
PATTERN = "zttrzrrtz" * 5
TAIL = 1234


def page(kind, number):
    """A page that no other page equals, unless it is zero."""
    if kind == "z":
        return bytes(PAGE_SIZE)
    if kind == "t":
        return number.to_bytes(8, "little") + TEXT[8:]
    return random.Random(number).randbytes(PAGE_SIZE)


MEMORY = b"".join(page(kind, i) for i, kind in enumerate(PATTERN)) + page("t", 999)[:TAIL]
PAGES = len(PATTERN) + 1


def kind_of(number):
    """What is in a page of the memory: z, t or r."""
    return (PATTERN + "t")[number]


def content_of(number):
    return MEMORY[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].ljust(PAGE_SIZE, b"\0")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The same memory in three places: page-aligned, word-aligned, unaligned."""
    files, made = [], {}
    for name, start in (("page", PAGE_SIZE), ("word", 8), ("byte", 13)):
        path = tmp_path_factory.mktemp("batches") / name
        path.write_bytes(b"#" * start + MEMORY + b"#" * 99)
        files.append(RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path)))
        files[-1].mapping()  # has a descriptor of its own, which is no leak of the first test
        made[name] = RamBlock(Block("ram", len(MEMORY)), files[-1], start)
    yield made
    for file in files:
        file.close()


def new_row():
    return Row(np.zeros(len(FIELDS), np.uint64))


def counted(row, field):
    return int(row._array[FIELDS.index(field)])


def maker_of(codec, row=None):
    """A maker; an automatic one has already met a slow link, so that it compresses."""
    maker = BatchMaker(codec, None, row or new_row())
    if maker.choice is not None:
        maker.choice.waited(1e6)
    return maker


def unpack(batch, decoders):
    """Pages and their content, as the other end gets them: through a frame and a codec."""
    frame = Frame(Kind.DATA, 0, 1, 0, batch.codec, batch.zero, batch.raw, batch.packed)
    meta, payload = encode_data(frame, batch.payload), b"".join(batch.payload)
    assert batch.size == len(payload)
    frame = decode(meta)
    assert payload_matches(meta, frame, payload)
    found = {number: bytes(PAGE_SIZE) for number in pages_of(frame.zero).tolist()}
    packed = b""
    if total_pages(frame.packed):
        codec = decoders.get(frame.codec)
        packed = codec.decompress(payload[frame.raw_size :], total_pages(frame.packed) * PAGE_SIZE)
    for runs, content in ((frame.raw, payload[: frame.raw_size]), (frame.packed, packed)):
        assert check_runs(runs, PAGES)
        for i, number in enumerate(pages_of(runs).tolist()):
            assert number not in found
            found[number] = bytes(content[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
    return found


def array(numbers):
    return np.array(sorted(numbers), np.int64)


# ---- reading -------------------------------------------------------------------------------

SELECTIONS = {
    "one": [5],
    "together": [3, 4, 5, 6],
    "apart": [0, 2, 3, 17],
    "everything": range(PAGES),
    "the tail": [PAGES - 1],
    "up to the tail": [PAGES - 3, PAGES - 2, PAGES - 1],
    "one and the tail": [0, PAGES - 1],
}


@pytest.mark.parametrize("place", ["page", "word", "byte"])
@pytest.mark.parametrize("copy", [False, True])
def test_pages_are_read_as_they_are(blocks, place, copy):
    """Together or apart, in place or copied, with the tail padded with zeros."""
    reader = BlockReader(blocks[place])
    for what, numbers in SELECTIONS.items():
        content = reader.read(array(numbers), copy)
        assert content.shape == (len(numbers), 512) and content.dtype == np.uint64
        assert content.tobytes() == b"".join(content_of(n) for n in numbers), what


def test_a_copy_stays_what_it_was(tmp_path):
    """A live guest writes on; what was copied for a frame does not change, a view does."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    file = RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path))
    try:
        block = RamBlock(Block("ram", 4 * PAGE_SIZE), file, 0)
        reader = BlockReader(block)
        copied, seen = (reader.read(array([1, 2]), copy) for copy in (True, False))
        block.write(1, TEXT)
        assert not copied.any()
        assert seen[0].tobytes() == TEXT
        assert not seen.flags.writeable
        del reader, copied, seen
    finally:
        file.close()


def test_a_block_smaller_than_a_page(tmp_path):
    """It has nothing but a tail."""
    path = tmp_path / "ram"
    path.write_bytes(b"#" * 8 + b"abc")
    file = RamFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))
    try:
        for copy in (False, True):
            content = BlockReader(RamBlock(Block("ram", 3), file, 8)).read(array([0]), copy)
            assert content.tobytes() == b"abc".ljust(PAGE_SIZE, b"\0")
    finally:
        file.close()


@pytest.mark.parametrize("place", ["page", "word", "byte"])
def test_zero_pages_are_found_without_reading_the_others(blocks, place):
    """Together or apart, up to the tail: the same as if all had been read."""
    reader = BlockReader(blocks[place])
    for what, numbers in SELECTIONS.items():
        zeros = [kind_of(n) == "z" for n in numbers]
        assert reader.zero(array(numbers)).tolist() == zeros, what
    every_other = range(0, PAGES, 2)
    assert reader.zero(array(every_other)).tolist() == [kind_of(n) == "z" for n in every_other]


def test_a_zero_tail_and_a_byte_that_is_not(tmp_path):
    """The tail is zero if what there is of it is; more pages than are looked at together."""
    path = tmp_path / "ram"
    pages = 600
    path.write_bytes(bytes(8 + pages * PAGE_SIZE + TAIL))
    file = RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path))
    try:
        for start in (8, 5):
            block = RamBlock(Block("ram", pages * PAGE_SIZE + TAIL), file, start)
            for odd in (0, 1, 255, 256, 599, 600):
                os.pwrite(file.fd, b"\1", start + odd * PAGE_SIZE + 1000)
                zeros = BlockReader(block).zero(array(range(pages + 1)))
                assert np.flatnonzero(~zeros).tolist() == [odd]
                zeros = BlockReader(block).zero(array({0, 1, 255, 256, 599, 600} - {odd}))
                assert zeros.all()
                os.pwrite(file.fd, b"\0", start + odd * PAGE_SIZE + 1000)
    finally:
        file.close()


# ---- batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_everything_in_one_batch(blocks, codec):
    """Zero, text and random pages and the tail, from every kind of block."""
    for place in blocks:
        for copy in (False, True):
            content = BlockReader(blocks[place]).read(array(range(PAGES)), copy)
            batch = maker_of(codec).make(array(range(PAGES)), content)
            assert unpack(batch, Decoders()) == {n: content_of(n) for n in range(PAGES)}


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_any_selection_of_pages(blocks, codec):
    """In batches of one maker, one after the other: what is zero, raw and packed comes back."""
    decoders, maker = Decoders(), maker_of(codec)

    @given(st.sets(st.integers(0, PAGES - 1), min_size=1), st.sampled_from(sorted(blocks)))
    @examples
    def check(numbers, place):
        content = BlockReader(blocks[place]).read(array(numbers), copy=False)
        batch = maker.make(array(numbers), content)
        assert unpack(batch, decoders) == {n: content_of(n) for n in numbers}
        zero = {n for n in numbers if kind_of(n) == "z"}
        assert set(pages_of(batch.zero).tolist()) == zero

    check()


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_a_mixed_batch_is_partly_raw_and_partly_packed(blocks, codec):
    """Random pages beside text travel as they are; each page is counted once."""
    row = new_row()
    content = BlockReader(blocks["page"]).read(array(range(PAGES)), copy=False)
    batch = maker_of(codec, row).make(array(range(PAGES)), content)
    by_kind = {k: {n for n in range(PAGES) if kind_of(n) == k} for k in "ztr"}
    assert set(pages_of(batch.zero).tolist()) == by_kind["z"]
    assert set(pages_of(batch.raw).tolist()) == by_kind["r"]
    assert set(pages_of(batch.packed).tolist()) == by_kind["t"]
    assert batch.codec == CODECS[codec].wire_id
    assert len(batch.payload) == 2
    assert batch.size < (len(by_kind["r"]) + len(by_kind["t"]) / 3) * PAGE_SIZE
    assert counted(row, "raw_pages") == len(by_kind["r"])
    assert counted(row, f"{codec}_pages") == len(by_kind["t"])


def test_a_single_page_is_worth_packing(blocks):
    """Among random ones."""
    numbers = [next(n for n in range(PAGES) if kind_of(n) == "t")]
    numbers += [n for n in range(PAGES) if kind_of(n) == "r"][:9]
    content = BlockReader(blocks["page"]).read(array(numbers), copy=False)
    batch = maker_of("zstd").make(array(numbers), content)
    assert pages_of(batch.packed).tolist() == [min(numbers)]
    assert total_pages(batch.raw) == 9


def test_without_a_codec_nothing_is_packed(blocks):
    """And nothing is copied that need not be: the payload is guest memory itself."""
    row = new_row()
    numbers = [n for n in range(PAGES) if kind_of(n) != "z"]
    content = BlockReader(blocks["page"]).read(array([1, 2, 3]), copy=False)
    batch = maker_of("none", row).make(array([1, 2, 3]), content)
    assert np.shares_memory(np.frombuffer(batch.payload[0], np.uint8), content)
    batch = maker_of("none", row).make(
        array(numbers), BlockReader(blocks["page"]).read(array(numbers), copy=True)
    )
    assert total_pages(batch.packed) == 0
    assert set(pages_of(batch.raw).tolist()) == set(numbers)
    assert counted(row, "raw_pages") == 3 + len(numbers)
    del batch, content


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_zero_pages_have_no_payload(codec):
    """Whatever the codec is."""
    row = new_row()
    batch = maker_of(codec, row).make(array([3, 4, 9]), np.zeros((3, 512), np.uint64))
    assert (batch.codec, batch.payload, batch.size) == (0, [], 0)
    assert pages_of(batch.zero).tolist() == [3, 4, 9]
    assert unpack(batch, Decoders()) == {n: bytes(PAGE_SIZE) for n in (3, 4, 9)}
    assert not any(row._array)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_what_a_codec_does_not_shrink_travels_raw(codec):
    """Random pages, and pages of 80 values in random order: those only pass for compressible."""
    source = random.Random(1)
    noise = b"".join(source.randbytes(PAGE_SIZE) for _ in range(4))
    content = np.frombuffer(noise, np.uint64).reshape(4, 512)
    batch = maker_of(codec).make(array(range(4)), content)
    assert batch.codec == 0 and total_pages(batch.packed) == 0
    assert pages_of(batch.raw).tolist() == [0, 1, 2, 3]
    narrow = bytes(source.choices(range(80), k=4 * PAGE_SIZE))
    content = np.frombuffer(narrow, np.uint64).reshape(4, 512)
    row = new_row()
    batch = maker_of(codec, row).make(array(range(4)), content)
    assert unpack(batch, Decoders()) == {
        n: narrow[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] for n in range(4)
    }
    if codec == "lz4":  # finds repetitions only, and there are none
        assert (batch.codec, counted(row, "raw_pages"), counted(row, "lz4_pages")) == (0, 4, 0)
        assert counted(row, "codec_ns") > 0


def test_auto_compresses_only_when_the_link_is_slow(blocks):
    """Raw until the link was waited for; then every codec is tried."""
    maker = BatchMaker("auto", None, new_row())
    content = BlockReader(blocks["page"]).read(array([1, 2]), copy=False)
    assert maker.make(array([1, 2]), content).codec == 0
    maker.choice.waited(1e6)
    used = {maker.make(array([1, 2]), content).codec for _ in range(3)}
    assert used == {CODECS["lz4"].wire_id, CODECS["zstd"].wire_id}


def test_the_level_is_that_of_the_codec_that_was_asked_for():
    """A higher one makes smaller batches."""
    content = np.frombuffer(MEMORY[: 6 * PAGE_SIZE], np.uint64).reshape(6, 512)[1:3]
    sizes = [
        BatchMaker("zlib", level, new_row()).make(array([0, 1]), content).size for level in (1, 9)
    ]
    assert sizes[1] < sizes[0]


def test_hashes_of_pages(blocks):
    """xxh3-64 of each page; 0 for a zero page, as in the table before anything was sent."""
    content = BlockReader(blocks["byte"]).read(array(range(PAGES)), copy=False)
    assert page_hashes(content).tolist() == [
        0 if kind_of(n) == "z" else xxhash.xxh3_64_intdigest(content_of(n)) for n in range(PAGES)
    ]


def test_flat_is_the_same_memory():
    """No copy, one dimension, bytes."""
    content = np.arange(1024, dtype=np.uint64).reshape(2, 512)
    view = flat(content)
    assert (view.format, view.ndim, len(view)) == ("B", 1, 2 * PAGE_SIZE)
    content[1, 511] = 7
    assert view[-8] == 7
