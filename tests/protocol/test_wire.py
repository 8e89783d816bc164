"""Frames: what was encoded comes back, and nothing else is taken for a frame."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import RemoteProtocolError
from pageferry.transport.pages import NO_RUNS, PAGE_SIZE
from pageferry.transport.wire import (
    HEADER_SIZE,
    MAGIC,
    MAX_BATCH_PAGES,
    MAX_META,
    MAX_PAYLOAD,
    MAX_RUNS,
    VERSION,
    Damaged,
    Delta,
    Frame,
    Kind,
    content_matches,
    decode,
    encode_control,
    encode_data,
    payload_digest,
    payload_matches,
)

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# The header as the format says it, written down once more: see the table in wire.py.
HEADER = struct.Struct("<HBBBBHIQHHHxxIQQ")
CONTROL_KINDS = (Kind.SYNC, Kind.ACK, Kind.NACK, Kind.SYNC_ACK)


def runs(*pairs):
    """Runs from (start, count) pairs."""
    return (
        np.array([start for start, _ in pairs], np.int64),
        np.array([count for _, count in pairs], np.int64),
    )


def pairs(table):
    return list(zip(table[0].tolist(), table[1].tolist(), strict=True))


def seal(head, body=b""):
    """`head` (the header's fields without the last) and `body` under a valid checksum."""
    total = xxhash.xxh3_64_intdigest(HEADER.pack(*head, 0) + body)
    return HEADER.pack(*head, total) + body


def forge(
    *,
    magic=MAGIC,
    version=VERSION,
    kind=Kind.DATA,
    codec=0,
    flags=0,
    block=0,
    round_=1,
    seq=0,
    tables=((), (), ()),
    lengths=None,
    size=0,
    payload_sum=0,
    extra=b"",
):
    """A DATA frame that says anything, and whose checksum is right."""
    body = b"".join(
        struct.pack(f"<{len(table)}Q", *(start for start, _ in table))
        + struct.pack(f"<{len(table)}I", *(count for _, count in table))
        for table in tables
    )
    lengths = lengths or [len(table) for table in tables]
    head = (magic, version, kind, codec, flags, block, round_, seq, *lengths, size, payload_sum)
    return seal(head, body + extra)


def fails(meta):
    """What `decode` makes of `meta`: None, or the error it raises. Nothing else may come out."""
    try:
        decode(meta)
    except (Damaged, RemoteProtocolError) as e:
        return e
    return None


def example_frame():
    """A frame with everything in it, and its payload."""
    payload = [bytes(range(256)) * 16, b"\x5a" * PAGE_SIZE, b"squeezed"]
    frame = Frame(
        Kind.DATA, 7, 3, 2, 1, runs((0, 5), (100, 1)), runs((6, 2)), runs((9, 1), (20, 4))
    )
    return frame, payload


# ---- round trips ---------------------------------------------------------------------------

some_runs = st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 340)), max_size=6)
few_pages = st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 2)), max_size=2)


@st.composite
def data_frames(draw):
    """A frame and the parts of its payload."""
    zero, raw, packed = draw(some_runs), draw(few_pages), draw(some_runs)
    packed = [(start, 1 + count % 100) for start, count in packed]
    seed = draw(st.binary(min_size=1, max_size=8))
    size = sum(count for _, count in raw) * PAGE_SIZE
    content = (seed * (size // len(seed) + 1))[:size]
    if packed:
        content += draw(st.binary(min_size=1, max_size=200))
    cut = draw(st.integers(0, len(content)))
    parts = [part for part in (content[:cut], content[cut:]) if part]
    frame = Frame(
        Kind.DATA,
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(0, 2**16 - 1)),
        draw(st.integers(0, 255)),
        runs(*zero),
        runs(*raw),
        runs(*packed),
    )
    return frame, parts


@given(data_frames(), st.sampled_from([bytes, bytearray, memoryview]))
@examples
def test_data_frame_round_trip(drawn, buffer):
    """Every field and every run arrives; the payload matches, in one part or in several."""
    frame, parts = drawn
    meta = encode_data(frame, parts)
    payload = b"".join(parts)
    got = decode(buffer(meta))
    for name in ("kind", "seq", "round", "block", "codec"):
        assert getattr(got, name) == getattr(frame, name), name
    for name in ("zero", "raw", "packed"):
        assert pairs(getattr(got, name)) == pairs(getattr(frame, name)), name
    assert got.payload_size == len(payload)
    assert got.raw_size == sum(count for _, count in pairs(frame.raw)) * PAGE_SIZE
    assert got.packed_size == len(payload) - got.raw_size
    assert got.page_total == sum(
        count for table in (frame.zero, frame.raw, frame.packed) for _, count in pairs(table)
    )
    assert payload_matches(buffer(meta), got, buffer(payload))


@given(
    st.sampled_from(CONTROL_KINDS),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4),
)
@examples
def test_control_frame_round_trip(kind, round_, numbers):
    """SYNC, ACK, NACK and SYNC_ACK with every number a field holds."""
    seq, frames, pages, last = numbers
    frame = Frame(kind, seq, round_, frames=frames, pages=pages, last=last)
    got = decode(encode_control(frame))
    assert replace(got, meta_sum=0) == frame


def test_the_bytes_of_a_frame_are_these():
    """Two hosts may run two versions of this code: the format does not change by accident."""
    meta = encode_data(
        Frame(Kind.DATA, 0x1122334455667788, 2, 3, 1, runs((1, 2)), NO_RUNS, runs((4, 5))), [b"abc"]
    )
    fields = HEADER.unpack_from(meta)
    assert fields[:12] == (0x4650, 1, 1, 1, 0, 3, 2, 0x1122334455667788, 1, 0, 1, 3)
    assert meta[HEADER_SIZE:] == struct.pack("<QIQI", 1, 2, 4, 5)
    blank = meta[: HEADER_SIZE - 16] + bytes(16) + meta[HEADER_SIZE:]
    payload_sum = xxhash.xxh3_64_intdigest(b"abc", seed=xxhash.xxh3_64_intdigest(blank))
    assert fields[12] == payload_sum
    assert meta == forge(
        codec=1, block=3, round_=2, seq=0x1122334455667788,
        tables=([(1, 2)], [], [(4, 5)]), size=3, payload_sum=payload_sum,
    )  # fmt: skip


def test_the_bytes_of_a_control_frame_are_these():
    """The same header, a body of three numbers."""
    meta = encode_control(Frame(Kind.NACK, 0x1122334455667788, 2, frames=3, pages=4, last=5))
    head = (MAGIC, VERSION, 4, 0, 0, 0, 2, 0x1122334455667788, 0, 0, 0, 0, 0)
    assert meta == seal(head, struct.pack("<QQQ", 3, 4, 5))
    assert [int(kind) for kind in Kind] == [1, 2, 3, 4, 5]
    assert [kind.name for kind in Kind] == ["DATA", "SYNC", "ACK", "NACK", "SYNC_ACK"]


def test_largest_frame_is_accepted():
    """A full batch of single pages, half of them packed, and as many holes."""
    half = MAX_RUNS // 2
    single = runs(*((2 * i, 1) for i in range(half)))
    zero = runs(*((2 * i, 1) for i in range(MAX_RUNS)))
    payload = [bytes(half * PAGE_SIZE), b"x"]
    got = decode(encode_data(Frame(Kind.DATA, 0, 1, 0, 1, zero, single, single), payload))
    assert got.page_total == MAX_RUNS + MAX_BATCH_PAGES
    delta = Delta(zero, 1, 2, 2, 3)
    frame = Frame(Kind.DATA, 0, 1, 0, 1, zero, zero, zero, content_sum=1, delta=delta)
    assert len(encode_data(frame, payload)) == MAX_META


def delta_frame(delta, *, raw=NO_RUNS, packed=NO_RUNS, payload=b"", content_sum=None):
    frame = Frame(
        Kind.DATA, 7, 1, 0, 1, NO_RUNS, raw, packed, content_sum=content_sum, delta=delta
    )  # fmt: skip
    return encode_data(frame, [payload])


def test_the_bytes_of_a_frame_with_deltas_are_these():
    """Behind the runs, and behind the sum: layer, two sizes, what the pages are to be."""
    delta = Delta(runs((8, 3)), 2, 10, 30, 0x0102030405060708)
    payload = bytes(PAGE_SIZE) + b"packed" + bytes(10)
    for content_sum in (None, 9):
        meta = delta_frame(
            delta, raw=runs((1, 1)), packed=runs((4, 2)), payload=payload, content_sum=content_sum
        )
        assert struct.unpack_from("<HHHH", meta, 20) == (0, 1, 1, 1)
        sums = b"" if content_sum is None else struct.pack("<Q", 9)
        tables = struct.pack("<QIQIQI", 1, 1, 4, 2, 8, 3)
        said = struct.pack("<BBBBIIQ", 2, 0, 0, 0, 10, 30, 0x0102030405060708)
        assert meta[HEADER_SIZE:] == tables + sums + said
        got = decode(meta)
        assert pairs(got.delta.pages) == [(8, 3)]
        assert replace(got.delta, pages=NO_RUNS) == replace(delta, pages=NO_RUNS)
        assert (got.raw_size, got.packed_size, got.delta_size) == (PAGE_SIZE, 6, 10)
        assert got.page_total == 6 and got.content_sum == content_sum
        assert [pairs(table) for table in got.tables] == [[], [(1, 1)], [(4, 2)], [(8, 3)]]
        assert payload_matches(meta, got, payload)


@pytest.mark.parametrize(
    ("delta", "payload"),
    [
        (Delta(runs((0, 2)), 0, 4, 5, 0), bytes(4)),  # no layer, and another size
        (Delta(runs((0, 2)), 0, 3, 3, 0), bytes(3)),  # no room for two lengths
        (Delta(runs((0, 2)), 1, 3, 3, 0), bytes(3)),
        (Delta(runs((0, 2)), 1, 9, 2 * 4098 + 1, 0), bytes(9)),  # more than two pages have
        (Delta(runs((0, 2)), 1, 9, 2**32 - 1, 0), bytes(9)),
        (Delta(runs((0, 2)), 1, 0, 4, 0), b""),  # packed to nothing
        (Delta(runs((0, 2)), 0, 4, 4, 0), bytes(3)),  # more than the payload has
        (Delta(runs((0, 2)), 0, 4, 4, 0), bytes(5)),  # less, and nothing else is packed
        (Delta(runs((0, MAX_BATCH_PAGES + 1)), 1, 9, 9000, 0), bytes(9)),  # too many
    ],
)
def test_deltas_that_make_no_sense(delta, payload):
    """Before anything is allocated."""
    with pytest.raises(RemoteProtocolError):
        decode(delta_frame(delta, payload=payload))


def test_pages_of_all_tables_together_are_bounded():
    """So many with content, however they travel."""
    half = MAX_BATCH_PAGES // 2
    delta = Delta(runs((half, half)), 1, 9, half * 2, 0)
    payload = bytes(half * PAGE_SIZE + 9)
    assert decode(delta_frame(delta, raw=runs((0, half)), payload=payload)).page_total == 2 * half
    more = bytes(PAGE_SIZE) + payload
    with pytest.raises(RemoteProtocolError):
        decode(delta_frame(delta, raw=runs((0, half + 1)), payload=more))


# ---- damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["data", "control"])
def test_any_damaged_byte_of_a_meta_is_noticed(which):
    """Every byte, changed to every other value."""
    if which == "data":
        meta = encode_data(*example_frame())
    else:
        meta = encode_control(Frame(Kind.ACK, 3, 1, last=9))
    assert fails(meta) is None
    for at in range(len(meta)):
        for mask in range(1, 256):
            damaged = bytearray(meta)
            damaged[at] ^= mask
            assert fails(damaged) is not None, f"byte {at} ^ {mask:#x}"


@given(data_frames(), st.data())
@examples
def test_any_damaged_bit_of_a_meta_is_noticed(drawn, data):
    """The same for frames of every shape."""
    meta = bytearray(encode_data(*drawn))
    bit = data.draw(st.integers(0, 8 * len(meta) - 1))
    meta[bit // 8] ^= 1 << bit % 8
    assert isinstance(fails(meta), Damaged)


def test_a_truncated_meta_is_noticed():
    """Every prefix, and a meta with something behind it."""
    for meta in (encode_data(*example_frame()), encode_control(Frame(Kind.SYNC, 0, 1))):
        for length in range(len(meta)):
            assert isinstance(fails(meta[:length]), Damaged), length
        assert isinstance(fails(meta + b"\0"), Damaged)


@given(st.binary(max_size=200))
@examples
def test_garbage_is_no_frame(data):
    """Bytes that nobody sealed are damaged, whatever they say."""
    assert isinstance(fails(data), Damaged)


@given(data_frames(), st.data())
@examples
def test_any_damaged_bit_of_a_payload_is_noticed(drawn, data):
    """The meta names the frame, the payload's sum does not match."""
    frame, parts = drawn
    meta, payload = encode_data(frame, parts), bytearray(b"".join(parts))
    got = decode(meta)
    assert payload_matches(meta, got, payload)
    if payload:
        bit = data.draw(st.integers(0, 8 * len(payload) - 1))
        payload[bit // 8] ^= 1 << bit % 8
        assert not payload_matches(meta, got, payload)


def test_a_payload_of_another_length_is_noticed():
    """Truncated, prolonged, absent, or where none belongs."""
    frame, parts = example_frame()
    meta, payload = encode_data(frame, parts), b"".join(parts)
    got = decode(meta)
    assert payload_matches(meta, got, payload)
    for other in (payload[:-1], payload[1:], payload + b"\0", b""):
        assert not payload_matches(meta, got, other)
    empty = encode_data(Frame(Kind.DATA, 0, 1, 0, 0, runs((0, 4))))
    assert payload_matches(empty, decode(empty), b"")
    assert not payload_matches(empty, decode(empty), b"\0")


def test_a_payload_under_another_frames_meta_is_refused():
    """Not only when its bytes differ: a payload's sum is worth nothing in another meta."""
    frame, parts = example_frame()
    payload = b"".join(parts)
    ours = encode_data(frame, parts)
    theirs = encode_data(replace(frame, seq=8), [bytes(len(payload))])
    assert not payload_matches(theirs, decode(theirs), payload)

    # somebody moves our payload and its sum under a sound meta of another frame
    tables = [pairs(frame.zero), pairs(frame.raw), pairs(frame.packed)]
    ours_again = forge(
        codec=1, block=2, round_=3, seq=7, tables=tables, size=len(payload),
        payload_sum=decode(ours).payload_sum,
    )  # fmt: skip
    assert ours_again == ours and payload_matches(ours, decode(ours), payload)
    for change in ({"seq": 8}, {"block": 1}, {"round_": 4}, {"codec": 2}):
        fields = {"codec": 1, "block": 2, "round_": 3, "seq": 7} | change
        moved = forge(
            **fields, tables=tables, size=len(payload), payload_sum=decode(ours).payload_sum
        )
        assert not payload_matches(moved, decode(moved), payload), change


# ---- bounds --------------------------------------------------------------------------------

SINGLES = [(i, 1) for i in range(MAX_RUNS + 1)]
ONE_PAGE = [(0, 1)]

NONSENSE = {
    "another magic": forge(magic=MAGIC + 1),
    "another version": forge(version=VERSION + 1),
    "flags": forge(flags=1),
    "too many zero runs": forge(tables=(SINGLES, (), ())),
    "too many raw runs": forge(tables=((), SINGLES, ()), size=MAX_PAYLOAD),
    "too many packed runs": forge(tables=((), (), SINGLES), size=1),
    "more runs than there are": forge(tables=(ONE_PAGE, (), ()), lengths=(2, 0, 0)),
    "fewer runs than there are": forge(tables=(ONE_PAGE, (), ()), lengths=(0, 0, 0)),
    "a run table that ends early": forge(lengths=(1, 0, 0), extra=bytes(11)),
    "bytes behind the run tables": forge(tables=(ONE_PAGE, (), ()), extra=b"\0"),
    "too many zero pages": forge(tables=([(0, MAX_BATCH_PAGES), (4096, 1)], (), ())),
    "a huge run of zeros": forge(tables=([(0, 2**32 - 1)], (), ())),
    "too many raw pages": forge(tables=((), [(0, MAX_BATCH_PAGES + 1)], ()), size=MAX_PAYLOAD),
    "too many packed pages": forge(tables=((), (), [(0, MAX_BATCH_PAGES + 1)]), size=1),
    "too many pages together": forge(
        tables=((), [(0, 1)], [(1, MAX_BATCH_PAGES)]), size=PAGE_SIZE + 1
    ),
    "a huge count": forge(tables=((), (), [(0, 2**32 - 1)] * 3), size=1),
    "a payload above the bound": forge(tables=((), (), ONE_PAGE), size=MAX_PAYLOAD + 1),
    "raw pages without payload": forge(tables=((), ONE_PAGE, ())),
    "raw pages with half a payload": forge(tables=((), ONE_PAGE, ()), size=PAGE_SIZE - 1),
    "raw pages with too much payload": forge(tables=((), ONE_PAGE, ()), size=PAGE_SIZE + 1),
    "packed pages without payload": forge(tables=((), (), ONE_PAGE)),
    "raw and packed pages, payload for raw": forge(tables=((), ONE_PAGE, [(1, 1)]), size=PAGE_SIZE),
    "payload without pages": forge(size=1),
    "payload of zero pages": forge(tables=(ONE_PAGE, (), ()), size=PAGE_SIZE),
    "kind 0": forge(kind=0, extra=bytes(24)),
    "kind 6": forge(kind=6, extra=bytes(24)),
    "kind 255": forge(kind=255, extra=bytes(24)),
    "control frame that ends early": forge(kind=Kind.ACK, extra=bytes(23)),
    "control frame that goes on": forge(kind=Kind.ACK, extra=bytes(25)),
    "control frame without a body": forge(kind=Kind.SYNC),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_an_intact_frame_that_makes_no_sense_is_the_peers_fault(what):
    """The checksum is right, so it was meant: no damage, but a broken peer."""
    with pytest.raises(RemoteProtocolError):
        decode(NONSENSE[what])


def test_the_bounds_themselves_are_allowed():
    """One less than what is refused above."""
    decode(forge(tables=(SINGLES[:MAX_RUNS], (), ())))
    decode(forge(tables=([(0, MAX_BATCH_PAGES)], (), ())))
    decode(forge(tables=((), [(0, MAX_BATCH_PAGES)], ()), size=MAX_PAYLOAD))
    decode(forge(tables=((), (), [(0, MAX_BATCH_PAGES)]), size=MAX_PAYLOAD))
    decode(forge(tables=((), [(0, 1)], [(1, MAX_BATCH_PAGES - 1)]), size=PAGE_SIZE + 1))
    decode(forge(kind=Kind.ACK, extra=bytes(24)))


@given(
    st.integers(0, 7),
    st.lists(st.sampled_from([0, 1, 2, MAX_RUNS, MAX_RUNS + 1, 2**16 - 1]), min_size=3, max_size=3),
    st.sampled_from([0, 1, PAGE_SIZE, 3 * PAGE_SIZE, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2**32 - 1]),
    st.binary(max_size=80),
)
@settings(examples, max_examples=150)
def test_an_intact_frame_is_within_bounds_or_refused(kind, lengths, size, body):
    """Whatever a peer seals: a frame that holds what it says, or RemoteProtocolError."""
    try:
        frame = decode(forge(kind=kind, lengths=lengths, size=size, extra=body))
    except RemoteProtocolError:
        return
    if frame.kind is Kind.DATA:
        assert [len(t[0]) for t in (frame.zero, frame.raw, frame.packed)] == lengths
        assert frame.payload_size <= MAX_PAYLOAD
        assert 0 <= frame.raw_size <= frame.payload_size
        assert (frame.packed_size > 0) == (lengths[2] > 0)


# ---- sums of the pages themselves ---------------------------------------------------------


def test_the_sum_of_the_pages_arrives():
    """Behind the runs, and it is the pages' as they were before they were packed."""
    frame, payload = example_frame()
    pages = [b"".join(payload[:2]), b"\x07" * (5 * PAGE_SIZE)]
    meta = encode_data(replace(frame, content_sum=payload_digest(pages, 0)), payload)
    got = decode(meta)
    assert payload_matches(meta, got, b"".join(payload))
    assert pairs(got.packed) == [(9, 1), (20, 4)]
    assert content_matches(got, pages)
    assert not content_matches(got, [pages[0], b"\x08" + pages[1][1:]])


def test_packed_pages_need_a_sum_and_raw_ones_do_not():
    frame, payload = example_frame()
    assert not content_matches(decode(encode_data(frame, payload)), [b""])
    raw = Frame(Kind.DATA, 1, raw=runs((6, 1)))
    assert content_matches(decode(encode_data(raw, [bytes(PAGE_SIZE)])), [bytes(PAGE_SIZE)])


@pytest.mark.parametrize("extra", [b"", b"1234567", b"123456789"])
def test_a_sum_that_is_announced_is_there(extra):
    assert isinstance(fails(forge(flags=1, extra=extra)), RemoteProtocolError)
    assert fails(forge(flags=1, extra=b"12345678")) is None


def test_control_frames_have_no_flags():
    meta = encode_control(Frame(Kind.ACK, 1, last=2))
    fields = list(HEADER.unpack_from(meta))
    fields[4] = 1
    assert isinstance(fails(seal(fields[:-1], meta[HEADER_SIZE:])), RemoteProtocolError)
