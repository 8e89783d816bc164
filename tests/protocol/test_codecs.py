"""Codecs: one suite that every codec passes at every level, and the choice between them."""

import contextlib
import random
import tracemalloc
import zlib

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.codecs import BY_WIRE_ID, CODECS, Decoders, make_codec
from pageferry.transport.codecs.choice import CANDIDATES, CodecChoice
from pageferry.transport.errors import RemoteProtocolError, UsageError
from pageferry.transport.pages import PAGE_SIZE

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)

LEVELS = {
    "none": [0],
    "lz4": [0, 1, 9, 12],
    "zstd": [-7, 0, 1, 3, 19],
    "zlib": [1, 6, 9],
}
CASES = [(name, level) for name, levels in LEVELS.items() for level in levels]
COMPRESSING = [name for name in LEVELS if name != "none"]
# What a codec may allocate beyond the size it is asked for.
SLACK = 1 << 20


def random_bytes(size, seed=1):
    return random.Random(seed).randbytes(size)


SAMPLES = {
    "zero": bytes(4 * PAGE_SIZE),
    "text": (b"All work and no play makes Jack a dull boy. " * 400)[: 3 * PAGE_SIZE],
    "random": random_bytes(2 * PAGE_SIZE),
    "mixed": bytes(PAGE_SIZE) + random_bytes(PAGE_SIZE) + b"ab" * (PAGE_SIZE // 2),
    "one byte": b"\x01",
}


def refused_without_memory(codec, data, size):
    """`codec` refuses `data` as RemoteProtocolError, and never holds much more than `size`."""
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            codec.decompress(data, size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size + SLACK


def test_the_suite_knows_every_codec_and_its_bounds():
    """A new codec gets its levels tested, the lowest and the highest among them."""
    assert set(LEVELS) == set(CODECS)
    for name, levels in LEVELS.items():
        bounds = CODECS[name].levels
        assert (min(levels), max(levels)) == (bounds.lowest, bounds.highest)
        assert bounds.default in levels


def test_wire_ids_are_these():
    """What a peer of another version would read."""
    ids = {name: cls.wire_id for name, cls in CODECS.items()}
    assert ids == {"none": 0, "lz4": 1, "zstd": 2, "zlib": 3}
    assert {wire_id: cls.name for wire_id, cls in BY_WIRE_ID.items()} == {
        wire_id: name for name, wire_id in ids.items()
    }


@pytest.mark.parametrize(("name", "level"), CASES)
def test_round_trip(name, level):
    """All samples, from and to every kind of buffer."""
    codec = make_codec(name, level)
    assert (codec.name, codec.wire_id, codec.level) == (name, CODECS[name].wire_id, level)
    for what, data in SAMPLES.items():
        for buffer in (bytes, bytearray, memoryview):
            packed = bytes(codec.compress(buffer(data)))
            assert bytes(codec.decompress(buffer(packed), len(data))) == data, what


@pytest.mark.parametrize(("name", "level"), CASES)
def test_round_trip_of_anything(name, level):
    """Whole pages and any other length, repetitive or not; any level can be read by any other."""
    codec, reader = make_codec(name, level), make_codec(name)

    @given(st.binary(min_size=1, max_size=300), st.integers(1, 60))
    @examples
    def check(piece, times):
        data = piece * times
        assert bytes(reader.decompress(codec.compress(data), len(data))) == data

    check()


@pytest.mark.parametrize("name", COMPRESSING)
def test_it_compresses(name):
    """Or it would not be worth its place."""
    codec = make_codec(name)
    for what in ("zero", "text"):
        assert len(codec.compress(SAMPLES[what])) < len(SAMPLES[what]) / 4


@pytest.mark.parametrize("name", LEVELS)
def test_a_batch_of_another_size_is_refused(name):
    """One byte or one page more or less than announced."""
    codec = make_codec(name)
    for data in SAMPLES.values():
        packed = codec.compress(data)
        for wrong in (1, -1, PAGE_SIZE, -PAGE_SIZE):
            if len(data) + wrong >= 0:
                with pytest.raises(RemoteProtocolError):
                    codec.decompress(packed, len(data) + wrong)


@pytest.mark.parametrize("name", LEVELS)
def test_a_truncated_batch_is_refused(name):
    """At any place, the empty prefix included."""
    codec = make_codec(name)
    for what in ("text", "mixed"):
        data = SAMPLES[what]
        packed = bytes(codec.compress(data))
        step = max(1, len(packed) // 100)
        for length in [*range(0, len(packed), step), len(packed) - 1]:
            with pytest.raises(RemoteProtocolError):
                codec.decompress(packed[:length], len(data))


@pytest.mark.parametrize("name", LEVELS)
def test_garbage_is_refused_or_has_the_right_size(name):
    """Damage that a codec cannot see (the frame's checksum does) still yields no other size."""
    codec = make_codec(name)

    def read(data, size):
        with contextlib.suppress(RemoteProtocolError):
            assert len(codec.decompress(data, size)) == size

    @given(st.binary(max_size=200), st.sampled_from([0, 1, 200, PAGE_SIZE]))
    @examples
    def garbage(data, size):
        read(data, size)

    @given(st.sampled_from(sorted(SAMPLES)), st.data())
    @examples
    def damaged(what, data):
        packed = bytearray(codec.compress(SAMPLES[what]))
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= data.draw(st.integers(1, 255))
        read(packed, len(SAMPLES[what]))
        read(packed + b"\0", len(SAMPLES[what]))

    garbage()
    damaged()


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_bomb_is_refused_before_it_is_memory(name):
    """64 MiB of zeros where a page was announced."""
    codec = make_codec(name)
    bomb = bytes(codec.compress(bytes(64 << 20)))
    assert len(bomb) < SLACK
    refused_without_memory(codec, bomb, PAGE_SIZE)


def zstd_frame(claim, *blocks):
    """A Zstandard frame (RFC 8878) that claims `claim` bytes and holds `blocks`."""
    header = b"\x28\xb5\x2f\xfd" + b"\xe0" + claim.to_bytes(8, "little")
    body = b""
    for i, (kind, size, data) in enumerate(blocks):
        last = i == len(blocks) - 1
        body += (last | kind << 1 | size << 3).to_bytes(3, "little") + data
    return header + body


RLE, RAW = 1, 0


def test_a_zstd_frame_that_claims_more_than_there_is_memory():
    """The library would allocate what the frame claims."""
    codec = make_codec("zstd")
    for claim in (2**62, 2**40, 1 << 30, PAGE_SIZE + 1):
        refused_without_memory(codec, zstd_frame(claim, (RLE, 1, b"x")), PAGE_SIZE)
    # the frame itself is sound: with a true claim it is read
    sound = zstd_frame(PAGE_SIZE, (RLE, PAGE_SIZE, b"x"))
    assert codec.decompress(sound, PAGE_SIZE) == b"x" * PAGE_SIZE


def test_a_zstd_frame_that_claims_less_than_it_holds():
    """The claim fits, the blocks do not: 64 of 128 KiB each."""
    codec = make_codec("zstd")
    blocks = [(RLE, 1 << 17, b"x")] * 64
    refused_without_memory(codec, zstd_frame(PAGE_SIZE, *blocks), PAGE_SIZE)
    refused_without_memory(codec, zstd_frame(PAGE_SIZE, (RAW, 8, b"too few.")), PAGE_SIZE)


def test_a_zstd_frame_that_claims_nothing():
    """Without its content size a frame is refused, whatever is in it; so is a skippable one."""
    codec = make_codec("zstd")
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PAGE_SIZE))
    refused_without_memory(codec, silent, PAGE_SIZE)
    refused_without_memory(codec, b"\x50\x2a\x4d\x18" + bytes(4), PAGE_SIZE)


def test_a_zlib_stream_that_goes_on():
    """One byte too many, a stream without its end, and one with a wrong checksum."""
    codec = make_codec("zlib")
    page = bytes(PAGE_SIZE)
    refused_without_memory(codec, zlib.compress(page + b"\0"), PAGE_SIZE)
    endless = zlib.compressobj()
    unfinished = endless.compress(page) + endless.flush(zlib.Z_SYNC_FLUSH)
    refused_without_memory(codec, unfinished, PAGE_SIZE)
    refused_without_memory(codec, zlib.compress(page)[:-1] + b"\x77", PAGE_SIZE)


def test_an_lz4_block_with_a_size_in_front_is_refused():
    """The library's own format says a size; ours comes from the frame."""
    codec = make_codec("lz4")
    with_size = lz4.block.compress(random_bytes(PAGE_SIZE), store_size=True)
    refused_without_memory(codec, with_size, PAGE_SIZE)


@pytest.mark.parametrize("name", LEVELS)
def test_levels_outside_of_the_range_are_refused(name):
    """By the codec's name and its range."""
    levels = CODECS[name].levels
    for level in (levels.lowest - 1, levels.highest + 1, 1000):
        with pytest.raises(UsageError, match=f"{name} has levels {levels.lowest} to"):
            make_codec(name, level)


def test_an_unknown_codec_is_refused():
    """With a list of those there are."""
    with pytest.raises(UsageError, match=r"'brotli'.*none, lz4, zstd, zlib"):
        make_codec("brotli")


def test_decoders_are_made_once_and_unknown_ids_are_the_peers_fault():
    """A receiver keeps one of each that it was sent."""
    decoders = Decoders()
    for wire_id, cls in BY_WIRE_ID.items():
        assert type(decoders.get(wire_id)) is cls
        assert decoders.get(wire_id) is decoders.get(wire_id)
    for wire_id in (4, 255):
        with pytest.raises(RemoteProtocolError, match=str(wire_id)):
            decoders.get(wire_id)


# ---- the choice ----------------------------------------------------------------------------

BATCH = 128 * PAGE_SIZE
# (bytes of pages a second, packed / plain) on some machine
SPEEDS = {"lz4": (700e6, 0.5), "zstd": (300e6, 0.25)}


def teach(choice, name):
    """What a batch compressed with `name` teaches."""
    if name != "none":
        speed, ratio = SPEEDS[name]
        choice.learn(name, BATCH, int(BATCH * ratio), BATCH / speed)


def settled(rate):
    """A choice that has waited for a link of `rate` bytes a second and tried every codec."""
    choice = CodecChoice()
    choice.waited(rate)
    for _ in range(10):
        teach(choice, choice.choose(1.0))
        choice.waited(rate)
    return choice


def test_as_long_as_the_link_is_not_waited_for_nothing_is_compressed():
    """Whatever is known about codecs."""
    choice = CodecChoice()
    for name in SPEEDS:
        teach(choice, name)
    for _ in range(100):
        assert choice.choose(1.0) == "none"
        choice.did_not_wait()


def test_every_candidate_is_tried_once_the_link_is_slow():
    """An unknown codec is the next one, so that it becomes known."""
    choice = CodecChoice()
    choice.waited(50e6)
    tried = []
    for _ in range(len(CANDIDATES) - 1):
        tried.append(choice.choose(1.0))
        teach(choice, tried[-1])
    assert sorted(tried) == sorted(set(CANDIDATES) - {"none"})


@pytest.mark.parametrize(
    ("rate", "best"),
    [
        (10e6, "zstd"),  # 40 MB/s of pages against 20 and 10
        (100e6, "zstd"),  # 300 against 200 and 100
        (200e6, "lz4"),  # 400 against 300 and 200
        (600e6, "lz4"),  # 700 against 600
        (800e6, "none"),  # 800 against 700
        (10e9, "none"),
    ],
)
def test_the_codec_that_moves_the_most_pages_is_chosen(rate, best):
    """min(speed, link / ratio), the example in the module's head."""
    choice = settled(rate)
    assert choice.choose(1.0) == best
    assert choice.page_rate(best) == max(choice.page_rate(name) for name in CANDIDATES)


def test_batches_that_look_incompressible_travel_raw():
    """However slow the link is."""
    choice = settled(10e6)
    assert choice.choose(0.05) == "none"
    assert choice.choose(0.0) == "none"
    assert choice.choose(0.5) == "zstd"
    fresh = CodecChoice()
    fresh.waited(10e6)
    assert fresh.choose(0.0) == "none"


def test_it_recovers_when_the_link_gets_faster():
    """Batches that leave without waiting raise the estimate, until compressing slows us down."""
    choice = settled(10e6)
    assert choice.choose(1.0) == "zstd"
    chosen = []
    for _ in range(1000):
        name = choice.choose(1.0)
        teach(choice, name)
        choice.did_not_wait()
        if name not in chosen:
            chosen.append(name)
    assert chosen == ["zstd", "lz4", "none"]
    for _ in range(20):
        choice.waited(10e6)
    assert choice.choose(1.0) == "zstd"


def test_a_few_batches_without_waiting_say_nothing():
    """Credit alone lets some go; only dozens of them in a row mean that the link is faster."""
    choice = settled(10e6)
    before = choice.link
    for _ in range(20):
        choice.did_not_wait()
    assert choice.link == before
    choice.waited(10e6)
    for _ in range(20):
        choice.did_not_wait()
    assert choice.link == before
    for _ in range(20):
        choice.did_not_wait()
    assert choice.link == pytest.approx(1.25 * before)


def test_a_single_slow_batch_does_not_turn_the_choice():
    """An observation weighs a fifth: a hiccup of the machine is not the codec's speed."""
    choice = settled(200e6)
    assert choice.choose(1.0) == "lz4"
    choice.learn("lz4", BATCH, BATCH // 2, BATCH / 350e6)
    assert choice.choose(1.0) == "lz4"


def test_a_codec_that_became_worse_is_left():
    """The guest's memory changed: what was compressible no longer is."""
    choice = settled(100e6)
    for _ in range(30):
        choice.learn("zstd", BATCH, BATCH, BATCH / 300e6)
    assert choice.choose(1.0) == "lz4"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("waited"), st.floats(0, 1e12)),
            st.tuples(st.just("quiet"), st.just(0.0)),
            st.tuples(st.sampled_from([*CANDIDATES, "zlib"]), st.floats(0, 10)),
        ),
        max_size=60,
    ),
    st.floats(0, 1),
)
@examples
def test_the_choice_is_always_a_candidate(observations, compressible):
    """Whatever was observed: zero rates, zero seconds, empty batches, codecs it did not ask for."""
    choice = CodecChoice()
    for what, number in observations:
        if what == "waited":
            choice.waited(number)
        elif what == "quiet":
            choice.did_not_wait()
        else:
            choice.learn(what, int(number * 1e6), int(number * 5e5), number)
    assert choice.choose(compressible) in CANDIDATES
