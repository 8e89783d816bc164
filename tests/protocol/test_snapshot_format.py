"""The header and the index of a snapshot: where things go, and what is not believed."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport import snapshot_format as form
from pageferry.transport.errors import SourceError
from pageferry.transport.messages import MAX_BLOCK_SIZE, Block
from pageferry.transport.pages import PAGE_SIZE
from pageferry.transport.snapshot_format import ALIGNMENT, Index

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)
SPECS = [Block("low", 3 << 20), Block("odd", 5 * PAGE_SIZE + 17, PAGE_SIZE, 3 << 20)]


def made(specs=SPECS, **changes):
    """An index that is right, and where it is."""
    blocks, at = form.place(specs)
    blocks = [msgspec.structs.replace(block, sum=bytes(16)) for block in blocks]
    index = Index("1", "ram", True, 4 << 20, blocks, b"registers")
    return msgspec.structs.replace(index, **changes), at


def read(header, body, at, size=None):
    found = form.decode_header(header, at + len(body) if size is None else size)
    return form.decode_index(found, body[: found.length])


def changed_block(**changes):
    index, at = made()
    first = msgspec.structs.replace(index.blocks[0], **changes)
    return msgspec.structs.replace(index, blocks=[first, *index.blocks[1:]]), at


def test_what_was_written_is_read():
    """Blocks are apart and aligned; the header is one page."""
    index, at = made()
    header, body = form.encode(index, at)
    assert read(header, body, at) == index
    assert len(header) == PAGE_SIZE
    assert [block.at for block in index.blocks] == [ALIGNMENT, 3 * ALIGNMENT]
    assert [block.table_bytes for block in index.blocks] == [48 * 18, 18]
    assert at > index.blocks[1].tables_at > index.blocks[0].tables_at >= 4 * ALIGNMENT


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=20))
@examples
def test_places_fit_whatever_the_sizes_are(sizes):
    """No two things overlap, and the check agrees."""
    index, at = made([Block(str(i), size) for i, size in enumerate(sizes)])
    assert read(*form.encode(index, at), at) == index


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 4095])
def test_a_file_that_ends_in_its_header(size):
    index, at = made()
    with pytest.raises(SourceError, match="truncated" if size >= 8 else "no snapshot"):
        form.decode_header(form.encode(index, at)[0][:size], size)


def test_a_file_that_ends_in_its_index():
    """Or before it; also if it has become shorter since it was looked at."""
    index, at = made()
    header, body = form.encode(index, at)
    for missing in (1, len(body), len(body) + 1):
        with pytest.raises(SourceError, match="truncated: copy it once more"):
            form.decode_header(header, at + len(body) - missing)
    with pytest.raises(SourceError, match="truncated"):
        form.decode_index(form.decode_header(header, at + len(body)), body[:-1])


def test_another_version_says_so():
    """Before anything else of it is looked at."""
    index, at = made()
    header, body = form.encode(index, at)
    other = header[:8] + (2).to_bytes(4, "little") + header[12:]
    with pytest.raises(SourceError, match="format 2, and this pageferry reads 1"):
        form.decode_header(other, at + len(body))


def test_something_else_says_so():
    with pytest.raises(SourceError, match="image:PATH"):
        form.decode_header(b"\x7fELF" + bytes(5000), 5004)


@given(st.integers(0, 63), st.integers(1, 255))
@examples
def test_a_changed_header_is_found(at, by):
    """Whatever bit it is."""
    index, where = made()
    header, body = form.encode(index, where)
    header = header[:at] + bytes([header[at] ^ by]) + header[at + 1 :]
    with pytest.raises(SourceError):
        form.decode_header(header, where + len(body))


@given(st.data())
@examples
def test_a_changed_index_is_found(data):
    index, at = made()
    header, body = form.encode(index, at)
    where = data.draw(st.integers(0, len(body) - 1))
    body = body[:where] + bytes([body[where] ^ data.draw(st.integers(1, 255))]) + body[where + 1 :]
    with pytest.raises(SourceError, match="its index was changed"):
        read(header, body, at)


@pytest.mark.parametrize(
    ("index", "what"),
    [
        (made(blocks=[]), "0 blocks"),
        (made(image_size=-1), "its image has -1"),
        (made([Block("same", 1 << 20), Block("same", 1 << 20)]), "one name"),
        (changed_block(at=0), "bytes are at 0"),
        (changed_block(at=4096), "at 4096"),
        (changed_block(at=-ALIGNMENT), "bytes are at -"),
        (changed_block(at=1 << 62), "bytes are at"),
        (changed_block(tables_at=0), "bytes are at 0"),
        (changed_block(tables_at=1 << 62), "bytes are at"),
        (changed_block(sum=b""), "it has a block at"),
        (changed_block(spec=Block("low", 0)), "a block of 0 bytes"),
        (changed_block(spec=Block("low", -5)), "a block of -5 bytes"),
        (changed_block(spec=Block("low", MAX_BLOCK_SIZE)), "bytes are at"),
        (changed_block(spec=Block("low", MAX_BLOCK_SIZE + 1)), "a block of"),
        (changed_block(spec=Block("low", 4096, 4097)), "pages of 4097"),
        (changed_block(spec=Block("low", 4096, 4096, -1)), "offset is -1"),
        (changed_block(spec=Block("\n", 4096)), "cannot be shown"),
        (changed_block(spec=Block("x" * 256, 4096)), "cannot be shown"),
    ],
)
def test_an_index_that_was_made_up_is_not_believed(index, what):
    """Its digests are right: whoever writes the file writes these too."""
    index, at = index
    with pytest.raises(SourceError, match=what):
        read(*form.encode(index, at), at)


def test_a_header_that_was_made_up_is_not_believed():
    """No number in it is taken before it was compared with the file's size."""
    _, at = made()
    for where, length in ((at, form.MAX_INDEX + 1), (0, 10), (1 << 63, 1 << 40)):
        head = form._HEADER.pack(form.MAGIC, form.VERSION, 0, where, length, bytes(16))
        with pytest.raises(SourceError):
            form.decode_header((head + form.digest(head)).ljust(PAGE_SIZE, b"\0"), 1 << 40)
    head = form._HEADER.pack(form.MAGIC, form.VERSION, 0, at, 3, form.digest(b"\xc1\xc1\xc1"))
    header = form.decode_header((head + form.digest(head)).ljust(PAGE_SIZE, b"\0"), 1 << 40)
    with pytest.raises(SourceError, match="makes no sense"):
        form.decode_index(header, b"\xc1\xc1\xc1")
