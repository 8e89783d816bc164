"""XBZRLE: vectors by hand from QEMU's documentation, a plain coder beside ours, what no page has.

The format (docs/devel/migration/main or docs/xbzrle.txt of QEMU):

    page = zrun nzrun | zrun nzrun page
    zrun = length;  nzrun = length byte...;  length = uleb128 encoded integer
"""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.codecs import xbzrle
from pageferry.transport.errors import RemoteProtocolError
from pageferry.transport.pages import PAGE_SIZE

examples = settings(max_examples=75, deadline=None, derandomize=True, database=None)

ZERO = bytes(PAGE_SIZE)


def words(pages):
    """Pages as the encoder takes them."""
    return np.frombuffer(b"".join(pages), np.uint64).reshape(len(pages), PAGE_SIZE // 8)


def encode(old, new):
    """Each page's encoding, None where it has to travel whole."""
    lengths, data = xbzrle.encode(words(old), words(new))
    found, at, data = [], 0, data.tobytes()
    for length in lengths.tolist():
        found.append(None if length == xbzrle.OVERFLOW else data[at : at + length])
        at += max(0, length)
    assert at == len(data)
    return found


def decode(old, encodings):
    """The pages that come of it."""
    pages = np.frombuffer(bytearray(b"".join(old)), np.uint8).reshape(-1, PAGE_SIZE)
    xbzrle.decode(pages, np.array([len(e) for e in encodings], np.int64), b"".join(encodings))
    return [page.tobytes() for page in pages]


def written(base, *places):
    """`base` with other bytes: (offset, bytes) each."""
    page = bytearray(base)
    for at, data in places:
        page[at : at + len(data)] = data
    return bytes(page)


# ---- by hand ---------------------------------------------------------------------------------

# name: base, page, encoding. ULEB128: seven bits a byte, the lowest first, 0x80 where another
# follows; so 127 is 7f, 128 is 80 01, 1000 = 7 * 128 + 104 is e8 07, 4095 = 31 * 128 + 127 is
# ff 1f.
COUNTED = bytes(range(1, 256)) * 17
VECTORS = {
    # the example of QEMU's docs (xbzrle.txt): 1001 = 7 * 128 + 105 (e9 07) as they were, 15 others;
    # 68 00 00 as they were, 1 other; 1 as it was, 1 other; 2 + 1 + 15 + 2 + 1 + 2 + 1 = 24 bytes
    "the documentation's": (
        written(ZERO, (1001, bytes.fromhex("05060708090a0b0c0d0e0f101112136800006b006d"))),
        written(ZERO, (1001, bytes.fromhex("0102030405060708090a0b0c0d0e0f680000670069"))),
        "e907 0f 0102030405060708090a0b0c0d0e0f 03 01 67 01 01 69",
    ),
    # 8 bytes as they were, then 4 others
    "a run inside": (ZERO, written(ZERO, (8, b"\1\2\3\4")), "08 04 01020304"),
    # nothing differs: no bytes at all
    "as it was": (COUNTED[:PAGE_SIZE], COUNTED[:PAGE_SIZE], ""),
    # the first byte: no zeros before it
    "the first byte": (ZERO, written(ZERO, (0, b"\x55")), "00 01 55"),
    # the last byte: 4095 before it, and nothing is left behind it
    "the last byte": (ZERO, written(ZERO, (4095, b"\xaa")), "ff1f 01 aa"),
    # 127 is the last number of one byte, 128 the first of two
    "127 before": (ZERO, written(ZERO, (127, b"\1")), "7f 01 01"),
    "128 before": (ZERO, written(ZERO, (128, b"\1")), "8001 01 01"),
    "127 others": (ZERO, written(ZERO, (0, b"\7" * 127)), "00 7f" + "07" * 127),
    "128 others": (ZERO, written(ZERO, (0, b"\7" * 128)), "00 8001" + "07" * 128),
    # two runs with one byte between them, which is as it was: 10 zeros, 2 others, 1, 1; the rest
    "one byte between": (ZERO, written(ZERO, (10, b"\1\2\0\3")), "0a 02 0102 01 01 03"),
    # a word written whole, but for one byte that happens to be the same (5 at its place)
    "a byte that is the same": (
        written(ZERO, (1000, b"\1\2\3\4\5\6\7\x08")),
        written(ZERO, (1000, b"\x11\x12\x13\x14\5\x16\x17\x18")),
        "e807 04 11121314 01 03 161718",
    ),
    # over the edge of a word (8 bytes) and of a cache line: one run, 60 = 3c zeros before it
    "over an edge": (ZERO, written(ZERO, (60, b"\xff" * 8)), "3c 08" + "ff" * 8),
    # to zero: a byte is another one, too
    "to zero": (b"\xee" * PAGE_SIZE, written(b"\xee" * PAGE_SIZE, (2, b"\0")), "02 01 00"),
    # 4093 others behind 3: 1 (zeros) + 2 (4093 = 31 * 128 + 125: fd 1f) + 4093 = 4096 bytes, and
    # nothing behind them: it fits just so
    "just a page": (ZERO, written(ZERO, (3, b"\1" * 4093)), "03 fd1f" + "01" * 4093),
    # one more, and it would be 4097
    "a byte too long": (ZERO, written(ZERO, (2, b"\1" * 4094)), None),
    # all of it: 1 + 2 + 4096
    "all of it": (ZERO, b"\1" * PAGE_SIZE, None),
    # 4091 others from the start: 1 + 2 + 4091 = 4094, and room for two bytes, which QEMU wants
    # before it looks that the rest (5 bytes) is as it was
    "room for a pair": (ZERO, written(ZERO, (0, b"\1" * 4091)), "00 fb1f" + "01" * 4091),
    # 4092: 4095 bytes would fit, but there is no room for a pair behind them
    "no room for a pair": (ZERO, written(ZERO, (0, b"\1" * 4092)), None),
    # every other byte: 2048 runs of 1 + 1 + 1
    "every other byte": (ZERO, b"\1\0" * 2048, None),
    # every fourth: 1024 of them; the first 00 01 xx, all others 03 01 xx
    "every fourth byte": (ZERO, b"\1\0\0\0" * 1024, "000101" + "030101" * 1023),
}


@pytest.mark.parametrize("name", VECTORS)
def test_by_hand(name):
    """Each alone."""
    old, new, encoding = VECTORS[name]
    expected = None if encoding is None else bytes.fromhex(encoding)
    assert encode([old], [new]) == [expected]
    if expected is not None:
        assert decode([old], [expected]) == [new]


def test_by_hand_all_at_once():
    """A batch is its pages, one behind the other; what overflows leaves nothing behind."""
    old, new, encodings = zip(*VECTORS.values(), strict=True)
    expected = [None if e is None else bytes.fromhex(e) for e in encodings]
    assert encode(old, new) == expected
    assert encode(old[::-1], new[::-1]) == expected[::-1]
    fits = [i for i, e in enumerate(expected) if e is not None]
    assert decode([old[i] for i in fits], [expected[i] for i in fits]) == [new[i] for i in fits]
    assert encode([], []) == []


# ---- beside a plain coder --------------------------------------------------------------------


def uleb(n):
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7])


def plain_encode(old, new):
    """xbzrle_encode_buffer of QEMU's migration/xbzrle.c, byte after byte; None for -1."""
    out, i = b"", 0
    while i < PAGE_SIZE:
        if len(out) + 2 > PAGE_SIZE:
            return None
        begin = i
        while i < PAGE_SIZE and old[i] == new[i]:
            i += 1
        if i == PAGE_SIZE:
            return out
        out += uleb(i - begin)
        if len(out) + 2 > PAGE_SIZE:
            return None
        begin = i
        while i < PAGE_SIZE and old[i] != new[i]:
            i += 1
        out += uleb(i - begin)
        if len(out) + i - begin > PAGE_SIZE:
            return None
        out += new[begin:i]
    return out


class Bad(Exception):
    pass


def plain_number(data, i):
    if not data[i] & 0x80:
        return data[i], i + 1
    if data[i + 1] & 0x80:
        raise Bad
    return data[i] & 0x7F | data[i + 1] << 7, i + 2


def plain_decode(old, data):
    """xbzrle_decode_buffer, with the page that comes of it; Bad for -1."""
    out, i, d = bytearray(old), 0, 0
    while i < len(data):
        if len(data) - i < 2:
            raise Bad
        count, after = plain_number(data, i)
        if i and not count:
            raise Bad
        i, d = after, d + count
        if d > PAGE_SIZE or len(data) - i < 2:
            raise Bad
        count, i = plain_number(data, i)
        if not count or d + count > PAGE_SIZE or i + count > len(data):
            raise Bad
        out[d : d + count] = data[i : i + count]
        d, i = d + count, i + count
    return bytes(out)


@st.composite
def pairs(draw):
    """A page and what became of it."""
    noise = random.Random(draw(st.integers(0, 2**32)))
    old = noise.randbytes(PAGE_SIZE) if draw(st.booleans()) else ZERO
    new = bytearray(old)
    kind = draw(st.sampled_from(["places", "every", "half", "all", "long"]))
    if kind == "places":
        for _ in range(draw(st.integers(0, 12))):
            at, n = draw(st.integers(0, PAGE_SIZE - 1)), draw(st.sampled_from([1, 2, 7, 8, 9, 200]))
            new[at : at + n] = noise.randbytes(len(new[at : at + n]))
    elif kind == "every":
        step = draw(st.integers(1, 600))
        for at in range(draw(st.integers(0, 7)), PAGE_SIZE, step):
            new[at] ^= noise.randrange(256)
    elif kind == "long":
        at, n = draw(st.integers(0, 9)), draw(st.integers(4080, 4096))
        new[at : at + n] = bytes(b ^ 1 for b in new[at : at + n])
    else:
        n = PAGE_SIZE if kind == "all" else PAGE_SIZE // 2
        new[:n] = noise.randbytes(n)
    return old, bytes(new)


@given(st.lists(pairs(), min_size=1, max_size=6))
@examples
def test_any_batch_is_as_the_plain_coder_says(batch):
    """Bit for bit, and back."""
    old, new = zip(*batch, strict=True)
    found = encode(old, new)
    assert found == [plain_encode(*pair) for pair in batch]
    kept = [i for i, encoding in enumerate(found) if encoding is not None]
    made = decode([old[i] for i in kept], [found[i] for i in kept])
    assert made == [new[i] for i in kept]
    for i in kept:
        assert plain_decode(old[i], found[i]) == new[i]


# ---- hostile ---------------------------------------------------------------------------------


@st.composite
def encodings(draw):
    """Mostly something that a page could have."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=24))
    data = b""
    for _ in range(draw(st.integers(0, 5))):
        same, other = draw(st.integers(0, 1400)), draw(st.integers(0, 40))
        data += uleb(same) + uleb(other) + bytes(draw(st.integers(0, 9)) == 0 or [7] * other)
    if data and draw(st.booleans()):
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return data


@given(st.lists(encodings(), min_size=1, max_size=4))
@examples
def test_anything_is_read_as_the_plain_coder_reads_it(batch):
    """Or refused, if one of them is; then no page was touched."""
    old = [bytes([i + 1]) * PAGE_SIZE for i in range(len(batch))]
    pages = np.frombuffer(bytearray(b"".join(old)), np.uint8).reshape(-1, PAGE_SIZE)
    lengths = np.array([len(e) for e in batch], np.int64)
    try:
        expected = [plain_decode(*pair) for pair in zip(old, batch, strict=True)]
    except (Bad, IndexError):
        with pytest.raises(RemoteProtocolError):
            xbzrle.decode(pages, lengths, b"".join(batch))
        expected = old
    else:
        xbzrle.decode(pages, lengths, b"".join(batch))
    assert [page.tobytes() for page in pages] == expected


@pytest.mark.parametrize(
    "encoding",
    [
        "00",  # a number, and nothing more
        "00 01",  # one other byte, which is not there
        "00 02 ff",  # two, and one is there
        "80 80 01 ff",  # a number of three bytes
        "05 80",  # a number that does not end
        "05 00",  # a run of none
        "00 01 ff 00 01 ff",  # no zeros between two runs
        "ff1f 02 aabb",  # a byte behind the page
        "8020 01 ff",  # begins behind it
        "00 01 ff ff1f 01 ff",  # the second one does: 1 + 4095
        "00 01 ff 03",  # a number left over
    ],
)
def test_what_no_page_has(encoding):
    """Between two pages that are sound: nothing of theirs is taken for its own."""
    good = bytes.fromhex("00 01 ee")
    batch = [good, bytes.fromhex(encoding), good]
    with pytest.raises(RemoteProtocolError):
        decode([ZERO] * 3, batch)
    with pytest.raises(RemoteProtocolError):
        decode([ZERO], batch[1:2])


def test_lengths_that_do_not_match():
    """More, less, below zero, another number of pages."""
    pages = np.zeros((2, PAGE_SIZE), np.uint8)
    for lengths in ([3, 4], [3, 2], [-3, 9], [6], [2, 2, 2]):
        with pytest.raises(RemoteProtocolError):
            xbzrle.decode(pages, np.array(lengths, np.int64), bytes.fromhex("0001ee0001ee"))
    assert not pages.any()
