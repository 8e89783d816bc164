"""Memory images: raw files of any size, ELF cores built here by hand, and what arrives."""

import os
import struct
import uuid
from dataclasses import dataclass

import pytest
from fuzz_states import record, sealed, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import (
    DestinationError,
    RemoteProtocolError,
    SourceError,
    VerificationFailed,
)
from pageferry.transport.messages import PROTOCOL, Block, Hello
from pageferry.transport.pages import PAGE_SIZE, pages_of
from pageferry.workers.guests.image import (
    ImageDestination,
    ImageSource,
    image_pieces,
    image_state,
)
from pageferry.workers.guests.states import IMAGE
from pageferry.workers.guests.uri import GuestUri

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)

PT_LOAD, PT_NOTE = 1, 4
ET_EXEC, ET_CORE = 2, 4
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")


@dataclass
class Segment:
    """A program header and what it points to."""

    offset: int
    data: bytes
    physical: int = 0
    virtual: int = 0
    kind: int = PT_LOAD
    memory: int | None = None  # p_memsz, if it is not the size of the data

    def header(self):
        size = len(self.data)
        memory = size if self.memory is None else self.memory
        return SEGMENT.pack(self.kind, 6, self.offset, self.virtual, self.physical, size, memory, 1)


def elf(*segments, kind=ET_CORE, size=0):
    """A 64-bit little-endian ELF file; `size` makes it longer than its segments do."""
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    out = bytearray(
        HEADER.pack(
            identity, kind, 62, 1, 0, HEADER.size, 0, 0,
            HEADER.size, SEGMENT.size, len(segments), 0, 0, 0,
        )
    )  # fmt: skip
    for segment in segments:
        out += segment.header()
    out += bytes(max(0, size - len(out)))
    for segment in segments:
        end = segment.offset + len(segment.data)
        out += bytes(max(0, end - len(out)))
        out[segment.offset : end] = segment.data
    return bytes(out)


def many_segments(count):
    """A core whose first section header says how many segments there are: more than fit in 16 bits
    (elf(5), PN_XNUM)."""
    core = bytearray(elf(Segment(0x1000, pattern(4096)), size=0x3000))
    struct.pack_into("<Q", core, 0x28, 0x2000)  # e_shoff
    struct.pack_into("<HHHH", core, 0x38, 0xFFFF, 64, 1, 0)  # e_phnum, e_shentsize, e_shnum
    struct.pack_into("<I", core, 0x2000 + 44, count)  # sh_info
    return bytes(core)


def pattern(length, seed=1):
    """Bytes that differ from page to page."""
    return b"".join((seed * 1000003 + i).to_bytes(8, "little") for i in range(length // 8 + 1))[
        :length
    ]


# Notes first, as gcore and QEMU write them; segments neither at page boundaries nor whole
# pages, one of them without data, and something between and behind them.
CORE = (
    elf(
        Segment(500, b"CORE notes!" * 9, kind=PT_NOTE),
        Segment(0x1003, pattern(3 * PAGE_SIZE + 17, 2), physical=0x100000, virtual=0xFFFF0000),
        Segment(0x6000, b"", virtual=0x400000, memory=PAGE_SIZE),
        Segment(0x6000, pattern(2 * PAGE_SIZE, 3), virtual=0x7F0000000000),
        Segment(0x9000, pattern(100, 4), virtual=0x7F0000900000),
        size=0x9500,
    )[:-1]
    + b"!"
)


@pytest.fixture
def opened(tmp_path):
    """Writes an image and opens it as a source; closed at the end."""
    sources = []

    def make(content):
        path = tmp_path / f"image{len(sources)}"
        path.write_bytes(content)
        sources.append(ImageSource(GuestUri("image", str(path))))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def hello_of(source):
    return Hello(
        PROTOCOL, "0", str(uuid.UUID(int=1)), source.kind,
        [block.spec for block in source.blocks], 1, 128, image_size=source.image_size,
    )  # fmt: skip


def pieces_of(source):
    return image_pieces(source.save_state())


def shape(source):
    return [(block.spec.offset, block.size) for block in source.blocks]


def arrive(source, path):
    """Move `source` into a new file at `path`, all in this process; before `run`."""
    destination = ImageDestination(GuestUri("image", str(path)))
    destination.lay_out(hello_of(source))
    for ours, theirs in zip(source.blocks, destination.blocks, strict=True):
        for page in range(ours.pages):
            data = ours.read(page * PAGE_SIZE, PAGE_SIZE).ljust(PAGE_SIZE, b"\0")
            if any(data):
                theirs.write(page, data)
    destination.load_state(source.kind, source.save_state(), False)
    return destination


# ---- raw images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [1, 17, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE + 17]
)
def test_a_raw_image_is_one_block(opened, tmp_path, size):
    """Of its very size; nothing lies around it; it arrives byte for byte."""
    source = opened(pattern(size))
    assert shape(source) == [(0, size)]
    assert (source.kind, source.image_size) == ("image", size)
    assert not source.live and not source.can_stop and not source.running
    assert pieces_of(source) == []
    destination = arrive(source, tmp_path / "copy")
    assert destination.fresh == [True]
    assert destination.run() == f"image:{tmp_path}/copy"
    destination.close()
    assert (tmp_path / "copy").read_bytes() == pattern(size)


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fEL",
        b"\x7fELF",
        b"\x7fELF" + bytes(100),
        elf(Segment(0x1000, pattern(5000)), kind=ET_EXEC),
        b"ELF" + CORE,
    ],
    ids=["too short", "only the magic", "no core", "a program", "magic elsewhere"],
)
def test_what_is_no_core_is_a_raw_image(opened, content):
    """A guest's memory may begin with anything."""
    assert shape(opened(content)) == [(0, len(content))]


def test_holes_of_a_raw_image_are_known(tmp_path):
    """Only what holds data has to travel, and the copy is as sparse."""
    path, copy = tmp_path / "sparse", tmp_path / "copy"
    with open(path, "wb") as f:
        f.truncate(16 << 20)
        f.seek(8 << 20)
        f.write(pattern(PAGE_SIZE))
    source = ImageSource(GuestUri("image", str(path)))
    try:
        found = set(pages_of(source.initial_pages(0)).tolist())
        assert (8 << 20) // PAGE_SIZE in found
        assert len(found) < 1024
        destination = arrive(source, copy)
        destination.run()
        destination.close()
    finally:
        source.close()
    assert os.stat(copy).st_size == 16 << 20
    assert os.stat(copy).st_blocks * 512 < 4 << 20
    with open(copy, "rb") as f:
        f.seek(8 << 20)
        assert f.read(PAGE_SIZE + 1) == pattern(PAGE_SIZE) + b"\0"


# ---- ELF cores -----------------------------------------------------------------------------


def test_each_segment_of_a_core_is_a_block(opened):
    """In the order of the file, named by address: the physical one if there is one."""
    source = opened(CORE)
    assert shape(source) == [
        (0x1003, 3 * PAGE_SIZE + 17),
        (0x6000, 2 * PAGE_SIZE),
        (0x9000, 100),
    ]
    assert [block.name for block in source.blocks] == [
        "load0@0x100000",
        "load1@0x7f0000000000",
        "load2@0x7f0000900000",
    ]
    assert [block.aligned for block in source.blocks] == [False, True, True]
    assert source.blocks[0].read(0, 10**6) == pattern(3 * PAGE_SIZE + 17, 2)
    assert source.blocks[1].whole_pages().tobytes() == pattern(2 * PAGE_SIZE, 3)
    assert source.blocks[0].tail() == pattern(3 * PAGE_SIZE + 17, 2)[-17:].ljust(PAGE_SIZE, b"\0")


def test_the_rest_of_a_core_is_its_state(opened):
    """Headers and notes, what lies between segments and behind them; not what is all zero."""
    pieces = pieces_of(opened(CORE))
    assert [(offset, len(data)) for offset, data in pieces] == [
        (0, 0x1003),
        (0x9000 + 100, 0x500 - 100),
    ]
    for offset, data in pieces:
        assert CORE[offset : offset + len(data)] == data
    assert b"CORE notes!" in pieces[0][1]
    # between the first and the second segment there are zeros
    assert not any(CORE[0x1003 + 3 * PAGE_SIZE + 17 : 0x6000])


def test_a_core_arrives_byte_for_byte(opened, tmp_path):
    """And nothing of it can be seen before."""
    destination = arrive(opened(CORE), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    destination.run()
    destination.close()
    assert (tmp_path / "copy").read_bytes() == CORE
    assert sorted(os.listdir(tmp_path)) == ["copy", "image0"]


def test_segments_in_another_order_than_in_the_file(opened, tmp_path):
    """Blocks follow the file: offsets that only grow are what a destination accepts."""
    content = elf(
        Segment(0x5000, pattern(PAGE_SIZE, 5), physical=0x1000),
        Segment(0x3000, pattern(PAGE_SIZE, 6), physical=0x2000),
    )
    source = opened(content)
    assert shape(source) == [(0x3000, PAGE_SIZE), (0x5000, PAGE_SIZE)]
    destination = arrive(source, tmp_path / "copy")
    destination.run()
    destination.close()
    assert (tmp_path / "copy").read_bytes() == content


def test_segments_that_touch_and_a_segment_with_the_headers_in_it(opened, tmp_path):
    """Some tools map the file's beginning as well."""
    content = bytearray(elf(Segment(0, b""), Segment(PAGE_SIZE, pattern(PAGE_SIZE, 7))))
    # the first segment covers the headers themselves
    struct.pack_into("<QQ", content, HEADER.size + 32, PAGE_SIZE, PAGE_SIZE)
    source = opened(bytes(content))
    assert shape(source) == [(0, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)]
    assert pieces_of(source) == []
    destination = arrive(source, tmp_path / "copy")
    destination.run()
    destination.close()
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (CORE[:-0x600], r"truncated ELF core: \d+ of \d+ bytes"),
        (CORE[:0x2000], "truncated ELF core"),
        (CORE[:100], "damaged|truncated"),
        (CORE[:40], "damaged"),
        (CORE[:18], "damaged"),
        (
            elf(Segment(0x1000, pattern(5000)), Segment(0x2000, pattern(5000))),
            "segments overlap",
        ),
        (
            elf(Segment(0x1000, pattern(5000)), Segment(0x1000, pattern(5000))),
            "segments overlap",
        ),
        (elf(Segment(500, b"note", kind=PT_NOTE)), "0 memory segments"),
        (elf(Segment(500, b"", memory=PAGE_SIZE)), "0 memory segments"),
        (elf(), "0 memory segments|damaged"),
        (many_segments(1 << 20), "1048576 segments"),
    ],
    ids=[
        "end missing", "half of it", "part of a header", "header missing", "only the type",
        "overlap", "the same place", "notes only", "no data", "nothing", "a million segments",
    ],
)  # fmt: skip
def test_cores_that_are_refused(opened, content, why):
    """SourceError with the path and what is wrong with it; no descriptor is left open."""
    with pytest.raises(SourceError, match=f"image0.*({why})"):
        opened(content)


def test_a_core_with_more_around_its_segments_than_a_core_has(tmp_path):
    """64 MiB that belong to no segment would travel as state."""
    path = tmp_path / "core"
    path.write_bytes(elf(Segment(0x1000, pattern(PAGE_SIZE))))
    os.truncate(path, (64 << 20) + 3 * PAGE_SIZE)
    with pytest.raises(SourceError, match="belong to no memory segment"):
        ImageSource(GuestUri("image", str(path)))


def test_any_damaged_header_is_an_image_or_refused(tmp_path):
    """Every field of both kinds of headers, with any byte changed: no other exception."""
    path = tmp_path / "core"
    headers = HEADER.size + 5 * SEGMENT.size

    @given(
        st.lists(st.tuples(st.integers(4, headers - 1), st.integers(0, 255)), max_size=3),
        st.sampled_from([len(CORE), len(CORE), headers, 200]),
    )
    @examples
    def check(changes, length):
        content = bytearray(CORE)
        for at, value in changes:
            content[at] = value
        path.write_bytes(content[:length])
        try:
            source = ImageSource(GuestUri("image", str(path)))
        except SourceError:
            return
        end = 0
        for block in source.blocks:
            assert block.size > 0 and block.spec.offset >= end
            end = block.spec.offset + block.size
        assert end <= length
        source.close()

    check()


@pytest.mark.parametrize("encoding", [0, 2, 255])
def test_a_core_of_another_byte_order_is_no_crash(tmp_path, encoding):
    """Big-endian or nonsense in EI_DATA, with every later byte of the header read that way."""
    content = bytearray(CORE)
    content[5] = encoding
    path = tmp_path / "core"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="core"):
        ImageSource(GuestUri("image", str(path)))


# ---- destinations --------------------------------------------------------------------------


def laid_out(path, *blocks, size=0):
    destination = ImageDestination(GuestUri("image", str(path)))
    hello = Hello(PROTOCOL, "0", str(uuid.UUID(int=1)), "image", list(blocks), 1, 128, [], size)
    destination.lay_out(hello)
    return destination


def test_memory_of_another_kind_of_guest_becomes_a_raw_image(tmp_path):
    """Blocks at their offsets; the other guest's device state is not for us."""
    path = tmp_path / "vm"
    destination = laid_out(path, Block("a", PAGE_SIZE), Block("b", 10, PAGE_SIZE, 2 * PAGE_SIZE))
    destination.blocks[0].write(0, pattern(PAGE_SIZE))
    destination.blocks[1].write(0, pattern(PAGE_SIZE))
    destination.load_state("demo", b"registers", True)
    destination.run()
    destination.close()
    assert path.read_bytes() == pattern(PAGE_SIZE) + bytes(PAGE_SIZE) + pattern(10)


@pytest.mark.parametrize("end", ["discard", "close"])
def test_a_guest_that_does_not_arrive_leaves_nothing(tmp_path, end):
    """And what was there is still there."""
    path = tmp_path / "vm"
    path.write_bytes(b"old")
    destination = laid_out(path, Block("ram", PAGE_SIZE))
    destination.blocks[0].write(0, pattern(PAGE_SIZE))
    getattr(destination, end)()
    getattr(destination, end)()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["vm"]


def state_of(*pieces):
    return image_state(list(pieces))


@pytest.mark.parametrize("state", [image_state([(0, b"x")], 1), image_state([], 1)])
def test_state_that_was_damaged(tmp_path, state):
    destination = laid_out(tmp_path / "vm", Block("ram", PAGE_SIZE))
    try:
        with pytest.raises(VerificationFailed, match="damaged"):
            destination.load_state("image", state, False)
    finally:
        destination.discard()


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"garbage",
        sealed(IMAGE, bytes(4)),
        sealed(IMAGE, b"\0\0\0\1" + bytes(16)),
        state_of((PAGE_SIZE, b"x")),
        state_of((0, b"fine"), (PAGE_SIZE - 1, b"xy")),
        state_of((2**64 - 1, b"x")),
        stream(record("image", b"", b"[" * 100_000)),
    ],
    ids=[
        "empty", "garbage", "no sum", "half a piece", "behind", "over the end", "far",
        "nested",
    ],
)  # fmt: skip
def test_state_that_makes_no_sense_is_the_peers_fault(tmp_path, state):
    """Nothing is written outside of what was announced."""
    destination = laid_out(tmp_path / "vm", Block("ram", PAGE_SIZE))
    try:
        with pytest.raises(RemoteProtocolError, match=r"image state|device state"):
            destination.load_state("image", state, False)
    finally:
        destination.discard()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path):
    """Said before anything moves."""
    with pytest.raises(DestinationError, match="cannot create"):
        laid_out(tmp_path / "no" / "vm", Block("ram", PAGE_SIZE))


def test_closing_before_anything_was_done(tmp_path):
    """A Hello that was refused."""
    destination = ImageDestination(GuestUri("image", str(tmp_path / "vm")))
    destination.discard()
    destination.close()
    assert os.listdir(tmp_path) == []
