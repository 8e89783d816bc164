"""Deltas between a sender's batch and a receiver's memory: whatever the guest writes and the link
loses, what is there is what was sent; and the cache of pages sent before, beside a plain one."""

import contextlib
import os
import pickle
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.deltas import Deltas
from pageferry.transport.channel import Acked, SendingChannel
from pageferry.transport.codecs import xbzrle
from pageferry.transport.errors import HostLacks, RemoteProtocolError
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE, pages_of, runs_of
from pageferry.transport.wire import Frame, Kind, encode_data
from pageferry.workers import page_cache, segments
from pageferry.workers.batches import Batch, BatchMaker, BlockReader
from pageferry.workers.checks import Checks
from pageferry.workers.counters import FIELDS, Counters, Row
from pageferry.workers.deltas import DeltaMaker
from pageferry.workers.page_cache import LIFETIME, PageCache
from pageferry.workers.page_table import PageTable
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.receiver import Receiver, ReceiverJob

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)
# The last page of the second block is not whole; numbers go through both.
SIZES = (11 * PAGE_SIZE, 6 * PAGE_SIZE - 100)
PAGES = [-(-size // PAGE_SIZE) for size in SIZES]
TOTAL = sum(PAGES)


def array(*pages):
    return np.array(pages, np.int64)


def room(cache, slots):
    """The cache, with so many slots."""
    for _ in cache.make_room(slots * PAGE_SIZE):
        pass
    cache.use_room()
    return cache


class Desk:
    def __init__(self):
        self.row = Row(np.zeros(len(FIELDS), np.uint64))


class Ends:
    """A guest's memory here, a sender's maker, a receiver and its memory there."""

    def __init__(self, codec="zstd", cache_pages=TOTAL, *, deltas=True, sums=False):
        self.files = []
        self.here, self.there = self.blocks("here"), self.blocks("there")
        self.memory = [b.file.writable() for b in self.here]
        self.cache = room(PageCache(TOTAL), cache_pages)
        self.desk = Desk()
        self.row = self.desk.row
        self.makers = [BatchMaker(codec, None, self.row) for _ in range(2)]
        for maker in self.makers:
            if maker.choice is not None:
                maker.choice.waited(1e6)
        # two senders, each with an attachment of its own: any of them may send any page
        self.attached = [pickle.loads(pickle.dumps(self.cache)) for _ in range(2)]
        self.deltas = [DeltaMaker(cache, [0, PAGES[0]], self.row) for cache in self.attached]
        self.sending = SendingChannel(1 << 30)
        self.counters = Counters(1)
        self.checks = Checks(PAGES) if sums else None
        job = ReceiverJob(
            self.there, self.counters, "", b"", [False, False], threading.Lock(),
            deltas=deltas, checks=self.checks, read_all=True,
        )  # fmt: skip
        self.receiver = Receiver(self.desk, job)

    def blocks(self, name):
        found = []
        for i, size in enumerate(SIZES):
            file = RamFile(os.memfd_create(name, os.MFD_CLOEXEC), name)
            os.ftruncate(file.fd, size)
            self.files.append(file)
            found.append(RamBlock(Block(f"ram{i}", size), file, 0))
        return found

    def begin(self, number, *dirty, slots=None):
        """A round begins: these pages of all are to be sent."""
        if slots is not None:
            room(self.cache, slots)
        self.cache.assign(number, array(*dirty))

    def write(self, block, page, data, at=0):
        begin = page * PAGE_SIZE + at
        data = data[: max(0, SIZES[block] - begin)]
        if data:
            self.memory[block][begin : begin + len(data)] = data

    def batch(self, block, *pages, keep=True, first_round=False, who=0):
        content = BlockReader(self.here[block]).read(array(*pages), copy=True)
        return self.deltas[who].make(
            self.makers[who], block, array(*pages), content, keep=keep, first_round=first_round
        )

    def send(self, block, batch, who=0, *, spoil=lambda frame, payload: (frame, payload)):
        """Over a channel; True if it is acknowledged."""
        frame = Frame(
            Kind.DATA, self.sending.next_seq(), self.sending.round, block, batch.codec,
            batch.zero, batch.raw, batch.packed, delta=batch.delta,
        )  # fmt: skip
        frame, payload = spoil(frame, b"".join(batch.parts))
        meta = encode_data(frame, [payload] if payload else [])
        self.sending.sent((batch, who), len(payload), 1)
        data = self.receiver.channel.receive(meta, payload)
        if self.receiver._place(data.frame, payload):
            self.receiver.channel.placed(data.frame)
        else:
            self.receiver.channel.not_placed(data.frame)
        return self.answers()

    def lose(self, batch, who=0):
        """It never arrives, and the frame after it tells."""
        self.sending.sent((batch, who), batch.size, 1)

    def answers(self):
        good = False
        for answer in self.receiver.channel.answers(idle=True):
            for event in self.sending.receive(answer):
                good = isinstance(event, Acked)
                sent, who = event.token
                if good and sent.slots is not None:
                    self.deltas[who].acknowledge(sent.slots)
        return good

    def content(self, block, page, there=True):
        ram = (self.there if there else self.here)[block]
        return ram.read(page * PAGE_SIZE, PAGE_SIZE)

    def count(self, field):
        return int(self.row._array[FIELDS.index(field)])

    def close(self):
        self.receiver.read_back = None
        self.receiver.context.term()
        for part in (*self.attached, self.cache, self.counters, self.checks):
            if part is not None:
                part.close()
        self.memory.clear()
        for file in self.files:
            file.close()


@pytest.fixture
def make():
    made = []

    def ends(*arguments, **options):
        made.append(Ends(*arguments, **options))
        return made[-1]

    yield ends
    for each in made:
        each.close()


def counted(seed):
    return np.random.default_rng(seed).bytes(PAGE_SIZE)


# ---- one page after another ------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "zlib", "auto"])
def test_what_was_sent_before_travels_as_what_differs(make, codec):
    """By any codec; the last page of a block, which is partial, too. The counters are QEMU's."""
    ends = make(codec)
    for page in range(5):
        ends.write(1, page, counted(page))
    ends.write(1, 5, counted(5))
    ends.begin(1, *range(PAGES[0], TOTAL))
    whole = ends.batch(1, *range(6), first_round=True)
    assert whole.delta is None and ends.send(1, whole)
    assert ends.count("xbzrle_misses") == 0  # nothing could be there
    for page in range(6):
        ends.write(1, page, b"\xff\xfe", at=100)
    ends.write(1, 2, counted(99))  # written all over
    ends.begin(2, *range(PAGES[0], TOTAL))
    batch = ends.batch(1, *range(6), who=1)
    assert pages_of(batch.delta.pages).tolist() == [0, 1, 3, 4, 5]
    assert ends.count("xbzrle_overflow") == 1 and ends.count("xbzrle_pages") == 6
    # 5 x (2 of length + 64 + 02 + 2 bytes), unless one of those was the same, and a page
    assert ends.count("xbzrle_bytes") == 5 * 6 + PAGE_SIZE
    assert ends.send(1, batch, 1)
    for page in range(6):
        assert ends.content(1, page) == ends.content(1, page, there=False)
    ends.begin(3, 0, *range(PAGES[0], TOTAL))
    again = ends.batch(1, 0, 2)
    assert again.delta.plain_size == 4  # as they were: no bytes but two lengths
    assert ends.send(1, again)
    assert ends.send(0, ends.batch(0, 0)) and ends.count("xbzrle_misses") == 1
    assert ends.count("delta_pages") == 2 * 7  # here and there


def test_deltas_are_packed_where_that_pays(make):
    """A few bytes are not worth a codec's time; many alike are."""
    ends = make("zstd")
    for number in (1, 2):
        ends.begin(number, *range(11))
        for page in range(11):
            ends.write(0, page, (b"%d" % number + bytes(99)) * 40)
        batch = ends.batch(0, *range(11))
        assert ends.send(0, batch)
    assert batch.delta.layer == 2 and batch.delta.size < batch.delta.plain_size / 4
    ends.write(0, 0, b"x")
    few = ends.batch(0, 0)
    assert few.delta.layer == 0 and len(few.packed_delta) == few.delta.plain_size == 5
    for page in range(11):
        assert ends.content(0, page) == ends.content(0, page, there=False) or page == 0


def test_a_lost_frame_is_no_base(make):
    """Until a page has been acknowledged it travels whole."""
    ends = make()
    ends.begin(1, 0, 1)
    for page, data in ((0, counted(1)), (1, counted(2))):
        ends.write(0, page, data)
    ends.lose(ends.batch(0, 0, 1, first_round=True))
    assert ends.send(0, ends.batch(0, 1, first_round=True))  # shows the gap
    ends.begin(2, 0, 1)
    ends.write(0, 0, b"new")
    batch = ends.batch(0, 0, 1)
    assert pages_of(batch.delta.pages).tolist() == [1]
    assert ends.send(0, batch)
    assert ends.content(0, 0) == ends.content(0, 0, there=False)
    # and what is under way is none either
    first, second = ends.batch(0, 0), ends.batch(0, 0)
    assert first.delta is not None and second.delta is None


def test_another_base_is_noticed_and_nothing_is_placed(make):
    """Not acknowledged; the next time the page travels whole. What else is in the frame waits, too:
    zero pages, and what is whole."""
    ends = make()
    for page in range(3):
        ends.write(0, page, counted(page))
    ends.begin(1, 0, 1, 2)
    assert ends.send(0, ends.batch(0, 0, 2, first_round=True))
    ends.there[0].write(0, counted(77))  # somebody wrote to it
    before = [ends.content(0, page) for page in range(3)]
    ends.write(0, 0, b"abc")
    ends.write(0, 2, bytes(PAGE_SIZE))
    ends.begin(2, 0, 1, 2)
    batch = replace(ends.batch(0, 0, 1), zero=runs_of(array(2)))
    assert batch.delta is not None and not ends.send(0, batch)
    assert [ends.content(0, page) for page in range(3)] == before
    assert ends.receiver.channel.lost == 1
    again = ends.batch(0, 0, 1)
    assert again.delta is None and ends.send(0, again)
    assert ends.content(0, 0) == ends.content(0, 0, there=False)
    ends.write(0, 0, b"def")
    assert ends.batch(0, 0).delta is not None


def test_what_the_guest_writes_meanwhile_is_in_the_next_delta(make):
    """Delta, sum and base come of one copy."""
    ends = make()
    ends.write(0, 3, counted(3))
    ends.begin(1, 3)
    batch = ends.batch(0, 3, first_round=True)
    ends.write(0, 3, b"after it was read")
    assert ends.send(0, batch)
    ends.begin(2, 3)
    batch = ends.batch(0, 3)
    assert batch.delta is not None
    ends.write(0, 3, b"and again", at=2000)
    assert ends.send(0, batch)
    assert ends.content(0, 3)[:17] == b"after it was read"
    ends.begin(3, 3)
    assert ends.send(0, ends.batch(0, 3))
    assert ends.content(0, 3) == ends.content(0, 3, there=False)


def test_a_page_that_became_zero_is_a_base_as_well(make):
    """Zero pages travel as runs; what they are is known."""
    ends = make()
    ends.write(0, 4, counted(4))
    ends.begin(1, 4, 5)
    assert ends.send(0, ends.batch(0, 4, first_round=True))
    ends.write(0, 4, bytes(PAGE_SIZE))
    slots = ends.deltas[0].zero(0, array(4), keep=True)
    batch = ends.batch(0, 5)
    zero = replace(batch, raw=runs_of(array()), zero=runs_of(array(4)), payload=[], slots=slots)
    assert ends.send(0, zero)
    ends.write(0, 4, b"\1\2\3", at=9)
    ends.begin(2, 4)
    batch = ends.batch(0, 4)
    assert batch.delta.plain_size == 2 + 5  # 09 03 010203
    assert ends.send(0, batch)
    assert ends.content(0, 4) == ends.content(0, 4, there=False)


def test_what_is_sent_when_the_guest_stands_still_is_not_kept(make):
    """And what was kept before is no base any more, should there be another round."""
    ends = make()
    ends.write(0, 1, counted(1))
    ends.begin(1, 1)
    assert ends.send(0, ends.batch(0, 1, first_round=True))
    ends.write(0, 1, b"last")
    last = ends.batch(0, 1, keep=False)
    assert last.delta is not None
    ends.lose(last)
    for _ in range(2):
        again = ends.batch(0, 1, keep=False)
        assert again.delta is None and ends.send(0, again)
    assert ends.content(0, 1) == ends.content(0, 1, there=False)


def test_a_slot_that_changes_hands_is_empty(make):
    """What is in it is another page's."""
    ends = make(cache_pages=1)
    for page in (0, 1):
        ends.write(0, page, b"%d" % page)
    ends.begin(1, 0)
    assert ends.send(0, ends.batch(0, 0, first_round=True))
    ends.begin(2, 1)  # of round 1, so it goes at once
    first = ends.batch(0, 1)
    assert first.delta is None and ends.send(0, first)
    ends.begin(3, 0)
    assert ends.batch(0, 0).delta is None  # wanted in the round before: page 1 keeps it
    ends.begin(4, 0)
    again = ends.batch(0, 0)
    assert again.delta is None and ends.send(0, again)
    assert ends.batch(0, 0).delta is not None


def test_page_sums_are_of_deltas_too(make):
    """What is made of them is read back, and has its mark."""
    ends = make("none", sums=True)
    ends.write(0, 1, counted(1))
    ends.begin(1, 1)
    batch = ends.batch(0, 1, first_round=True)
    assert ends.send(0, batch)
    ends.checks.view(0)[:] = 0
    ends.write(0, 1, b"x")
    batch = ends.batch(0, 1)
    assert batch.delta is not None and ends.send(0, batch)
    assert ends.checks.view(0).tolist() == [0, 1, *[0] * 9]


# ---- hostile ---------------------------------------------------------------------------------


def test_deltas_that_nobody_agreed_on_are_refused(make):
    """And in a postcopy, where pages are discarded."""
    ends = make(deltas=False)
    ends.write(0, 1, counted(1))
    ends.begin(1, 1)
    assert ends.send(0, ends.batch(0, 1, first_round=True))
    with pytest.raises(RemoteProtocolError, match="whole"):
        ends.send(0, ends.batch(0, 1))


def test_a_delta_of_a_page_that_is_there_twice_is_refused(make):
    """In the frame: once whole, once as a delta; or outside of the block."""
    for pages in ([1], [11], [2**40]):
        ends = make("none")
        ends.write(0, 1, counted(1))
        ends.begin(1, 1)
        assert ends.send(0, ends.batch(0, 1, first_round=True))
        batch = ends.batch(0, 1)
        batch.delta = replace(batch.delta, pages=runs_of(array(*pages)))
        batch.zero = runs_of(array(1))
        with pytest.raises(RemoteProtocolError, match=r"twice|outside"):
            ends.send(0, batch)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 9])
@given(data=st.binary(max_size=40), claim=st.integers(2, 60))
@settings(examples, max_examples=40)
def test_any_delta_is_refused_or_not_taken(layer, data, claim):
    """Nothing but these two, and the memory is as it was: its sum does not match."""
    ends = Ends()
    try:
        batch = Batch(0, *[runs_of(array())] * 3, [])
        ends.begin(1, 0, 1)
        ends.write(0, 0, b"z")
        batch = ends.batch(0, 0, first_round=True)
        assert ends.send(0, batch)
        batch = ends.batch(0, 0)
        before = ends.content(0, 0), ends.content(0, 1)
        size = claim if layer else len(data)
        batch.packed_delta = data
        batch.delta = replace(
            batch.delta, pages=runs_of(array(0, 1)), layer=layer, size=len(data), plain_size=size
        )
        with contextlib.suppress(RemoteProtocolError):
            assert not ends.send(0, batch)
        assert (ends.content(0, 0), ends.content(0, 1)) == before
    finally:
        ends.close()


# ---- whatever happens ------------------------------------------------------------------------


class Journey:
    """A guest writes, rounds go by, any sender sends any page, frames are lost, memory there is
    damaged, the cache gets another size. What was acknowledged is there, and nothing is refused but
    what was damaged."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.ends = Ends(self.draw.choice(["none", "lz4"]), self.draw.choice([1, 3, 8, TOTAL]))
        self.round = 0
        self.damaged = set()
        self.known = {}  # what is there, by what was acknowledged
        self.dirty = set(range(TOTAL))

    def place(self, page):
        return (0, page) if page < PAGES[0] else (1, page - PAGES[0])

    def some(self, pages, most):
        return self.draw.sample(sorted(pages), min(len(pages), self.draw.randint(0, most)))

    def write(self):
        for page in self.some(range(TOTAL), 8):
            n = self.draw.choice([1, 9, 9, 60, PAGE_SIZE])
            data = bytes(n) if self.draw.random() < 0.1 else self.draw.randbytes(n)
            self.ends.write(*self.place(page), data, at=self.draw.randrange(PAGE_SIZE - n + 1))
            self.dirty.add(page)

    def damage(self):
        """Something writes there that must not."""
        for page in self.some(range(TOTAL), 2) if self.draw.random() < 0.3 else ():
            block, at = self.place(page)
            self.ends.there[block].write(at, self.draw.randbytes(PAGE_SIZE))
            self.damaged.add(page)

    def go(self):
        self.round += 1
        todo, self.dirty = self.dirty, set()
        slots = self.draw.choice([1, 5, TOTAL]) if self.draw.random() < 0.1 else None
        self.ends.begin(self.round, *sorted(todo), slots=slots)
        while todo:
            block = self.place(self.draw.choice(sorted(todo)))[0]
            mine = [p for p in todo if self.place(p)[0] == block]
            pages = sorted(self.draw.sample(mine, self.draw.randint(1, len(mine))))
            todo -= set(pages)
            self.send(block, pages)
            self.write()

    def send(self, block, pages):
        who, keep = self.draw.randrange(2), self.draw.random() < 0.8
        content = {p: self.ends.content(*self.place(p), there=False) for p in pages}
        batch = self.ends.batch(block, *[self.place(p)[1] for p in pages], keep=keep, who=who)
        if self.draw.random() < 0.2:
            self.ends.lose(batch, who)
            self.dirty |= set(pages)
            return
        deltas = set()
        if batch.delta is not None:
            first = 0 if block == 0 else PAGES[0]
            deltas = {p + first for p in pages_of(batch.delta.pages).tolist()}
        if self.ends.send(block, batch, who):
            self.known |= content
            self.damaged -= set(pages)
        else:
            assert deltas & self.damaged
            self.dirty |= set(pages)

    def check(self):
        for page in self.known.keys() - self.damaged:
            there = self.ends.content(*self.place(page))
            assert there == self.known[page]


def test_whatever_happens():
    """Many journeys of ten rounds; together they have met everything there is."""
    met = dict.fromkeys(("delta_pages", "xbzrle_overflow", "xbzrle_misses"), 0)
    refused = 0
    for seed in range(40):
        journey = Journey(seed)
        try:
            for _ in range(10):
                journey.write()
                journey.damage()
                journey.go()
                journey.check()
            met = {field: n + journey.ends.count(field) for field, n in met.items()}
            refused += journey.ends.receiver.channel.lost
        finally:
            journey.ends.close()
    assert met["delta_pages"] > 1000 and met["xbzrle_overflow"] > 100
    assert met["xbzrle_misses"] > 1000 and refused > 100


# ---- the cache -------------------------------------------------------------------------------


class PlainCache:
    """QEMU's page_cache.c, page after page: one place a page, which another one takes only when it
    was not wanted for two rounds. Those that are found come first; round 1 is nobody's choice."""

    def __init__(self, slots):
        self.at = {}
        self.slots = slots

    def assign(self, generation, pages):
        age = generation if generation > 1 else generation - LIFETIME
        found = [p for p in pages if self.at.get(p % self.slots, (None,))[0] == p]
        for page in found:
            self.at[page % self.slots] = (page, age)
        taken = set()
        for page in pages:
            place = page % self.slots
            there = self.at.get(place)
            old = there is None or there[1] + LIFETIME <= generation
            if page not in found and old and place not in taken:
                self.at[place] = (page, age)
                taken.add(place)


@given(
    st.integers(1, 20),
    st.lists(st.sets(st.integers(0, 39), max_size=25), min_size=1, max_size=8),
)
@examples
def test_replacement_is_as_in_a_plain_cache(slots, rounds):
    """Round after round: the same pages are in."""
    cache, plain = room(PageCache(40), slots), PlainCache(slots)
    try:
        for number, dirty in enumerate(rounds, 1):
            pages = array(*sorted(dirty))
            cache.assign(number, pages)
            plain.assign(number, sorted(dirty))
            everything = np.arange(40, dtype=np.int64)
            _, own, valid = cache.find(everything)
            assert set(np.flatnonzero(own).tolist()) == {page for page, _ in plain.at.values()}
            assert not (valid & ~own).any()
            at, own, _ = cache.find(pages)
            cache.store(at[own], np.zeros((1, 512), np.uint64))
            cache.acknowledge(at[own])
    finally:
        cache.close()


def allocated(cache):
    """Bytes of /dev/shm that it has."""
    return os.stat(f"/dev/shm/{cache._segment.name}").st_blocks * 512


def test_it_has_no_more_memory_than_it_was_given():
    """And gives back what it has too much of; above the guest's size there is nothing to keep."""
    cache = PageCache(1000)
    try:
        overhead = 8 * PAGE_SIZE  # tags, ages, states: up to a page more for each
        assert cache.slots == 1 and allocated(cache) <= PAGE_SIZE + overhead
        room(cache, 100)
        assert 100 * PAGE_SIZE <= allocated(cache) <= 100 * PAGE_SIZE + overhead
        taking = cache.make_room(300 * PAGE_SIZE)
        assert list(taking) == [None] and cache.slots == 100  # until they are used
        assert allocated(cache) >= 300 * PAGE_SIZE
        pages = np.arange(300, dtype=np.int64)
        cache.use_room()
        cache.assign(2, pages)
        assert cache.slots == 300 and cache.find(pages)[1].all()
        list(cache.make_room(10 * PAGE_SIZE))
        assert cache.find(pages)[1].all()
        cache.use_room()
        assert cache.slots == 10 and not cache.find(pages)[1].any()
        assert allocated(cache) <= 10 * PAGE_SIZE + overhead
        assert room(cache, 1 << 40).slots == 1000
    finally:
        cache.close()


def test_memory_is_taken_in_steps(monkeypatch):
    """With turns for others in between; and given back so when there are no deltas any more, in a
    postcopy: also if that is broken off, and begun again after a recovery."""
    monkeypatch.setattr(page_cache, "_STEP", 64)
    cache = PageCache(1000)
    try:
        assert len(list(cache.make_room(1 + 3 * 64 * PAGE_SIZE))) == 3
        assert allocated(cache) >= 3 * 64 * PAGE_SIZE
        cache.use_room()
        pages = np.arange(192, dtype=np.int64)
        cache.assign(2, pages)
        cache.acknowledge(pages)
        before = allocated(cache)
        next(cache.drop())
        assert cache.slots == 1 and not cache.find(pages)[1].any()
        assert before - 64 * PAGE_SIZE >= allocated(cache) > 100 * PAGE_SIZE
        assert len(list(cache.drop())) == 2 and not list(cache.drop())
        assert allocated(cache) < 10 * PAGE_SIZE
    finally:
        cache.close()


def test_no_room_is_an_error_and_changes_nothing(monkeypatch):
    """Not SIGBUS at some store."""
    cache = room(PageCache(1000), 100)
    try:
        monkeypatch.setattr(page_cache, "_STEP", 64)
        cache.look_for_room(1000 * PAGE_SIZE)
        take, taken = os.posix_fallocate, []

        def full(fd, offset, length):
            taken.append(length)
            if sum(taken) > 150 * PAGE_SIZE:
                raise OSError(28, "No space left on device")
            take(fd, offset, length)

        before = allocated(cache)
        monkeypatch.setattr(segments.os, "posix_fallocate", full)
        with pytest.raises(HostLacks, match="/dev/shm"):
            list(cache.make_room(1000 * PAGE_SIZE))
        assert len(taken) > 5  # some of it was there
        cache.use_room()
        assert cache.slots == 100 and allocated(cache) <= before + 4 * PAGE_SIZE
        names = set(os.listdir("/dev/shm"))
        with pytest.raises(HostLacks):
            PageCache(1000)
        assert set(os.listdir("/dev/shm")) == names
    finally:
        cache.close()


# ---- the source's side -----------------------------------------------------------------------


def test_rounds_and_what_is_said_of_them(monkeypatch, caplog):
    """Slots go to what is dirty, in all blocks; QEMU's names, rates of the round."""
    table, counters = PageTable([5, 7]), Counters(2)
    deltas = Deltas([5, 7], 8 * PAGE_SIZE)
    try:
        table.mark_dirty(0, runs_of(array(1, 2)))
        table.mark_dirty(1, runs_of(array(0, 6)))
        for _ in deltas.begin_round(1, table, counters):
            pass
        _, own, _ = deltas.cache.find(np.arange(12, dtype=np.int64))
        assert np.flatnonzero(own).tolist() == [1, 2, 5, 11]
        assert deltas.report(counters)["xbzrle-cache"] == {
            "cache-size": 8 * PAGE_SIZE, "bytes": 0, "pages": 0, "cache-miss": 0,
            "cache-miss-rate": 0.0, "encoding-rate": 0.0, "overflow": 0,
        }  # fmt: skip
        for worker, n in ((0, 10), (1, 20)):
            row = counters.row(worker)
            row.add("xbzrle_pages", n)
            row.add("xbzrle_bytes", n * 512)
            row.add("xbzrle_misses", 5)
            row.add("xbzrle_overflow", 1)
        said = deltas.report(counters)["xbzrle-cache"]
        assert (said["pages"], said["bytes"], said["cache-miss"]) == (30, 30 * 512, 10)
        assert (said["cache-miss-rate"], said["encoding-rate"], said["overflow"]) == (0.25, 8.0, 2)
        for _ in deltas.begin_round(2, table, counters):
            pass
        assert deltas.report(counters)["xbzrle-cache"] == said  # of the round before, so far
        counters.row(0).add("xbzrle_misses", 4)
        said = deltas.report(counters)["xbzrle-cache"]
        assert (said["cache-miss-rate"], said["encoding-rate"]) == (1.0, 0.0)
        with pytest.raises(HostLacks):  # nobody has that
            Deltas([1 << 30], 1 << 42)
        deltas.resize(2 * PAGE_SIZE)
        assert deltas.report(None) == {} and deltas.cache.slots == 8
        for _ in deltas.begin_round(3, table, counters):
            pass
        assert deltas.cache.slots == 2
        assert deltas.report(counters)["xbzrle-cache"]["cache-size"] == 2 * PAGE_SIZE
        deltas.resize(7 * PAGE_SIZE)

        def full(fd, offset, length):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(segments.os, "posix_fallocate", full)
        assert list(deltas.begin_round(4, table, counters)) == [None, None]  # a turn a block
        assert deltas.size == 2 * PAGE_SIZE and deltas.cache.slots == 2
        assert "stays 8192" in caplog.text
    finally:
        deltas.close()
        counters.close()
        table.close()


def test_an_encoding_as_long_as_its_page_travels_whole(make):
    """With its length in front it would be more; those behind it are not moved by that."""
    ends = make("none")
    ends.begin(1, 0, 1, 2)
    base = b"\x11" * PAGE_SIZE
    for page in range(3):
        ends.write(0, page, base)
    assert ends.send(0, ends.batch(0, 0, 1, 2, first_round=True))
    ends.write(0, 0, b"\x22" * 4090)  # 00 fa1f + 4090 = 4093: short enough
    ends.write(0, 1, b"\x22" * 4091)  # 4094: not
    ends.write(0, 2, b"\x22")
    lengths, _ = xbzrle.encode(
        np.frombuffer(base * 3, np.uint64).reshape(3, 512),
        BlockReader(ends.here[0]).read(array(0, 1, 2), copy=True),
    )
    assert lengths.tolist() == [4093, 4094, 3]
    ends.begin(2, 0, 1, 2)
    batch = ends.batch(0, 0, 1, 2)
    assert pages_of(batch.delta.pages).tolist() == [0, 2]
    assert ends.send(0, batch)
    for page in range(3):
        assert ends.content(0, page) == ends.content(0, page, there=False)
