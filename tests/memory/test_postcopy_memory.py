"""What postcopy keeps in shared memory, and how pages come into a guest whose memory is armed. The
guest here is a mapping of this process that nobody touches but through the kernel."""

import contextlib
import math
import os
import random
import select
from pathlib import Path

import numpy as np
import pytest
from armed_guest import ArmedGuest, all_pages, touched
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import DestinationError, HostLacks, RemoteProtocolError
from pageferry.transport.messages import MAX_BLOCK_SIZE, MAX_BLOCKS
from pageferry.transport.pages import NO_RUNS, PAGE_SIZE, runs_of
from pageferry.workers import latency, placing
from pageferry.workers.counters import Counters
from pageferry.workers.guests.base import Region
from pageferry.workers.kernel import userfaultfd
from pageferry.workers.latency import Latency, bucket, middle
from pageferry.workers.placing import ARRIVAL, FramePlacer, GuestMap, GuestPlacer
from pageferry.workers.preemption import FRONT, Preemption, Reader, Writer, page_key
from pageferry.workers.received import WAITING_SLOTS, Received, Waiting, WaitingWriter, unpack

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)

HUGE = 2 << 20


def runs(*pages):
    return runs_of(np.array(pages, np.int64))


# ---- latency -------------------------------------------------------------------------------

# Up to what the histogram can tell apart: 71 minutes.
waits = st.one_of(st.integers(0, 10**7), st.integers(0, 2**32 * 1000 - 1))


@given(waits, waits)
@examples
def test_a_longer_wait_is_in_no_lower_bucket(a, b):
    """And the middle of the bucket says how long it was, to 3 %, from a microsecond on."""
    if a <= b:
        assert bucket(a) <= bucket(b)
    if a >= 1000:
        assert middle(bucket(a)) == pytest.approx(a / 1000, rel=0.03)
    else:
        assert bucket(a) == 0


def test_buckets_follow_each_other():
    """Each middle lies in its own bucket and above the one before."""
    middles = [middle(i) for i in range(32 * 32)]
    assert middles == sorted(set(middles))
    assert [bucket(int(m * 1000)) for m in middles] == list(range(len(middles)))


def test_waits_beyond_all_bounds_are_in_the_last_bucket():
    assert bucket(2**63) == bucket(2**32 * 1000 - 1) == 32 * 32 - 1


def told(*waited):
    """What is reported of these waits."""
    histogram = Latency()
    try:
        writer = histogram.writer()
        for ns in waited:
            writer.add(ns)
        del writer
        return latency.report(histogram.numbers())
    finally:
        histogram.close()


@given(st.lists(st.integers(1000, 10**10), min_size=1, max_size=60))
@examples
def test_what_is_reported_of_waits(waited):
    """Mean and maximum exact, percentiles as of the sorted list but for half a bucket and what is
    rounded, powers of two counted."""
    said, ordered = told(*waited), sorted(waited)
    assert said["postcopy-latency"] == sum(waited) // len(waited)
    octaves = [0] * (ordered[-1] // 1000).bit_length()
    for ns in waited:
        octaves[(ns // 1000).bit_length() - 1] += 1
    assert said["postcopy-latency-dist"] == octaves
    percentiles = said["postcopy-latency-percentiles"]
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = ordered[math.ceil(share * len(ordered)) - 1] / 1000
        assert abs(percentiles[name] - exact) <= exact / 64 + 0.05 + 1e-9
    assert percentiles["max"] == round(ordered[-1] / 1000, 1)


def test_nothing_is_reported_of_no_waits():
    """Nor of numbers that are no histogram."""
    assert told() == {}
    for numbers in ([], [1], [1] * (latency.LENGTH - 1), [1] * (latency.LENGTH + 1)):
        assert latency.report(numbers) == {}


# ---- what has arrived, what is waited for --------------------------------------------------


@pytest.fixture
def received():
    made = []

    def make(*pages):
        made.append(Received(list(pages)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_everything_is_there_until_it_is_expected(received):
    """Holes are: they read as zero. Blocks do not touch each other."""
    there = received(5, 9)
    assert there.missing() == 0
    there.expect(1, runs(0, 3, 4, 8))
    assert there.missing() == 4
    assert there.view(0).tolist() == [1] * 5
    assert there.view(1).tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0]
    there.view(1)[3] = 1
    there.view(1)[3] = 1
    assert there.missing() == 3


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=70), min_size=1, max_size=3))
@examples
def test_what_has_arrived_survives_the_wire(blocks):
    """A bit a page, whatever the number of pages."""
    there = Received([len(block) for block in blocks])
    try:
        for i, block in enumerate(blocks):
            there.view(i)[:] = block
        packed = there.packed()
        for bits, block in zip(packed, blocks, strict=True):
            assert len(bits) == (len(block) + 7) // 8
            assert unpack(bits, len(block)).tolist() == [int(x) for x in block]
        assert there.missing() == sum(not x for block in blocks for x in block)
    finally:
        there.close()


@pytest.mark.parametrize(("size", "pages"), [(0, 1), (1, 9), (2, 8), (3, 9), (1, 0), (100, 1)])
def test_a_bitmap_of_another_length_is_refused(size, pages):
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes"):
        unpack(bytes(size), pages)


@contextlib.contextmanager
def waiting_list():
    waiting = Waiting()
    try:
        yield waiting
    finally:
        waiting.close()


def keys(waiting):
    return sorted(word for word in waiting.words().tolist() if word)


def test_pages_that_are_waited_for():
    """Each is told while it is waited for; a new writer begins with none."""
    with waiting_list() as waiting:
        writer = WaitingWriter(waiting)
        for place in ((0, 0), (0, 7), (3, 7)):
            writer.add(*place)
        assert keys(waiting) == sorted([page_key(0, 0), page_key(0, 7), page_key(3, 7)])
        writer.remove(0, 7)
        writer.remove(0, 7)
        writer.remove(5, 5)
        assert keys(waiting) == sorted([page_key(0, 0), page_key(3, 7)])
        writer = WaitingWriter(waiting)
        assert keys(waiting) == []
        del writer


def test_more_pages_are_waited_for_than_there_are_words():
    """Those beyond are not told, and their end disturbs nobody; words are used again."""
    with waiting_list() as waiting:
        writer = WaitingWriter(waiting)
        for page in range(WAITING_SLOTS + 10):
            writer.add(0, page)
        told = [page_key(0, page) for page in range(WAITING_SLOTS)]
        assert keys(waiting) == told
        for page in range(WAITING_SLOTS, WAITING_SLOTS + 10):
            writer.remove(0, page)
        assert keys(waiting) == told
        writer.remove(0, 5)
        writer.add(1, 5)
        assert keys(waiting) == [*told[:5], *told[6:], page_key(1, 5)]
        for block, page in ((0, p) for p in range(WAITING_SLOTS)):
            writer.remove(block, page)
        assert keys(waiting) == [page_key(1, 5)]
        del writer


# ---- preemption ----------------------------------------------------------------------------

places = st.tuples(st.integers(0, MAX_BLOCKS - 1), st.integers(0, MAX_BLOCK_SIZE // PAGE_SIZE - 1))


@given(places, places)
@examples
def test_a_page_has_a_word_of_its_own(a, b):
    """Never 0, which stands for none, and never too large for a word."""
    assert (page_key(*a) == page_key(*b)) == (a == b)
    assert 0 < page_key(*a) < 2**64
    # blocks follow each other: the last page there can be is below the next block's first
    assert page_key(a[0], MAX_BLOCK_SIZE // PAGE_SIZE - 1) < page_key(a[0] + 1, 0)


def test_the_words_between_postcopy_process_and_senders():
    """Requests that are open, the pace, the last pages in front."""
    preemption = Preemption(32, 100_000)
    try:
        reader, writer = Reader(preemption), Writer(preemption)
        assert not reader.request_open
        assert (reader.piece_pages, reader.credit) == (32, 100_000)
        writer.open(1)
        preemption.pace(8, 50_000)
        assert reader.request_open
        assert (reader.piece_pages, reader.credit) == (8, 50_000)
        writer.open(0)
        assert not reader.request_open
        for n in range(1, FRONT + 3):
            assert not reader.in_front(page_key(0, n))
            writer.to_front(page_key(0, n))
            assert reader.in_front(page_key(0, n))
        seen = [n for n in range(FRONT + 5) if reader.in_front(page_key(0, n))]
        assert seen == list(range(3, FRONT + 3))
        assert (reader.piece_pages, reader.credit) == (8, 50_000)
        assert not reader.request_open
        del reader, writer
    finally:
        preemption.close()


# ---- where pages are in the guest ----------------------------------------------------------


@st.composite
def layouts(draw):
    """Regions that overlap neither in the guest nor in a block, in any order."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    gaps = draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    skipped = draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    blocks = draw(st.lists(st.integers(0, 2), min_size=6, max_size=6))
    order = draw(st.permutations(range(len(sizes))))
    next_page = [0, 0, 0]
    regions, address = [None] * len(sizes), 1 << 30
    firsts = []
    for i, size in enumerate(sizes):
        first = next_page[blocks[i]] + skipped[i]
        next_page[blocks[i]] = first + size
        firsts.append(first)
    for i in order:  # addresses in another order than pages
        address += gaps[i] * PAGE_SIZE
        regions[i] = Region(blocks[i], firsts[i], sizes[i], address, PAGE_SIZE)
        address += sizes[i] * PAGE_SIZE
    return draw(st.permutations(regions))


@given(layouts(), st.integers(0, PAGE_SIZE - 1))
@examples
def test_pages_and_addresses_are_each_others_inverse(regions, within):
    """For every page of every region, at any byte of it; outside there is nothing."""
    where = GuestMap(regions)
    pages = {(r.block, r.first + i): (r, i) for r in regions for i in range(r.pages)}
    addresses = {
        r.address + i * PAGE_SIZE: (r, r.first + i) for r in regions for i in range(r.pages)
    }
    for (block, page), (region, i) in pages.items():
        assert where.region(block, page) == region
        assert where.locate(region.address + i * PAGE_SIZE + within) == (region, page)
    for block in range(4):
        for page in range(80):
            if (block, page) not in pages:
                with pytest.raises(RemoteProtocolError, match=f"page {page} of block {block}"):
                    where.region(block, page)
    for address in range((1 << 30) - PAGE_SIZE, (1 << 30) + 90 * PAGE_SIZE, PAGE_SIZE):
        assert where.locate(address + within) == addresses.get(address)


def test_a_guest_without_memory():
    where = GuestMap([])
    assert where.locate(4096) is None
    with pytest.raises(RemoteProtocolError):
        where.region(0, 0)


# ---- an armed guest ------------------------------------------------------------------------


class Guest(ArmedGuest):
    """An armed guest and who fills it."""

    def __init__(self, parts, **options):
        super().__init__(parts, **options)
        self.received, self.waiting = Received([self.pages]), Waiting()
        self.counters = Counters(1)
        self.received.expect(0, all_pages(self.pages))
        self.arrivals, self.tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.placer = GuestPlacer(self.memory, self.received, self.counters.row(0))
        self.frames = FramePlacer([self.block], self.placer, self.waiting, self.tell)

    def close(self):
        del self.placer, self.frames
        super().close()
        for part in (self.received, self.waiting, self.counters):
            part.close()
        os.close(self.arrivals)
        os.close(self.tell)

    def arrived(self):
        return np.flatnonzero(self.received.view(0)).tolist()

    def already_there(self):
        return self.counters.read(0)["already_there"]

    def told(self):
        """(block, page) that the fault process is told of."""
        try:
            data = os.read(self.arrivals, 1 << 16)
        except BlockingIOError:
            return []
        return [(block, page) for block, page, _ in ARRIVAL.iter_unpack(data)]


@pytest.fixture
def make():
    made = []

    def make_guest(*arguments, **options):
        try:
            made.append(Guest(*arguments, **options))
        except HostLacks as e:
            pytest.skip(str(e))
        return made[-1]

    yield make_guest
    for guest in made:
        guest.close()


def page_of(n):
    return n.to_bytes(2, "little") * (PAGE_SIZE // 2)


def pages_of(*numbers):
    return b"".join(page_of(n) for n in numbers)


def test_pages_of_a_frame_are_installed(make):
    """These and no others, with their content; and they are known to have arrived."""
    guest = make([16])
    guest.frames.place(0, runs(1, 2, 3, 9), pages_of(101, 102, 103, 109))
    assert guest.there() == guest.arrived() == [1, 2, 3, 9]
    for page in (1, 2, 3, 9):
        assert guest.page(page) == page_of(100 + page)
    assert guest.already_there() == 0
    guest.frames.place(0, NO_RUNS, b"")
    assert guest.there() == [1, 2, 3, 9]


def test_zero_pages_are_installed_and_not_left_out(make):
    """A hole would be a fault that nobody answers."""
    guest = make([16])
    guest.frames.place(0, runs(0, 1, 15), b"")
    assert guest.there() == guest.arrived() == [0, 1, 15]
    assert guest.page(15) == bytes(PAGE_SIZE)


def test_a_page_is_installed_once(make):
    """Whoever comes later leaves it as it is, is counted, and installs the pages beside it."""
    guest = make([16])
    guest.frames.place(0, runs(2, 5), pages_of(2, 5))
    guest.frames.place(0, runs(1, 2, 3, 4, 5, 6), pages_of(*[77] * 6))
    assert guest.already_there() == 2
    assert guest.arrived() == guest.there() == [1, 2, 3, 4, 5, 6]
    found = [guest.page(page) for page in range(1, 7)]
    assert found == [page_of(n) for n in (77, 2, 77, 77, 5, 77)]
    guest.frames.place(0, runs(4, 5, 6, 7), b"")
    assert guest.already_there() == 5
    assert guest.page(5) == page_of(5) and guest.page(7) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("content", [page_of(7), b""])
def test_one_page_at_a_time(make, content):
    """The short way of the fault process does what the long one does."""
    guest = make([4, 4])
    region = guest.placer.map.region(0, 5)
    for _ in range(2):
        if content:
            guest.placer.install_page(region, 5, content)
        else:
            guest.placer.install(0, 5, 1, content)
    assert guest.there() == guest.arrived() == [5]
    assert guest.page(5) == (content or bytes(PAGE_SIZE))
    assert guest.already_there() == 1


def test_a_fault_that_is_late_for_its_page_only_wakes(make):
    """The page came after the guest touched it and before the fault was looked at: it is left as
    it is, and did not arrive twice."""
    guest = make([4])
    region = guest.placer.map.region(0, 0)
    guest.frames.place(0, runs(2), pages_of(7))
    assert not guest.placer.zero(region, 2, 1)
    assert guest.page(2) == page_of(7)
    assert guest.placer.zero(region, 3, 1)
    assert guest.there() == [2, 3]
    assert guest.already_there() == 0


def test_pages_on_both_sides_of_a_seam(make):
    """A block that is in several places of the guest."""
    guest = make([4, 3, 5])
    numbers = list(range(2, 10))
    guest.frames.place(0, runs(*numbers), pages_of(*numbers))
    assert guest.there() == guest.arrived() == numbers
    assert [guest.page(n) for n in numbers] == [page_of(n) for n in numbers]


def test_pages_that_are_nowhere_in_the_guest(make):
    """A stranger's frame: refused by the page, nothing beyond memory is written."""
    guest = make([4])
    for pages in ([4], [3, 4], [1000]):
        with pytest.raises(RemoteProtocolError, match="nowhere"):
            guest.frames.place(0, runs(*pages), pages_of(*pages))
    assert 4 not in guest.there()


def test_memory_that_cannot_be_filled(make):
    """An address behind which nothing is armed: an error that says where, not a crash."""
    guest = make([4])
    region = guest.memory.regions[0]
    userfaultfd.unregister(guest.uffd, region.address, 4 * PAGE_SIZE)
    with pytest.raises(DestinationError, match="install"):
        guest.frames.place(0, runs(1), page_of(1))
    assert guest.arrived() == []
    userfaultfd.register_missing(guest.uffd, region.address, 4 * PAGE_SIZE)


@pytest.mark.parametrize("content", [page_of(9), b""])
def test_who_sleeps_on_a_page_wakes_when_it_is_there(make, content):
    """And finds what was installed under his own write."""
    guest = make([4])
    sleeper = guest.touch(2)
    faults = wait_for_faults(guest)
    assert [guest.placer.map.locate(fault.address)[1] for fault in faults] == [2]
    assert guest.there() == []
    guest.frames.place(0, runs(2), content)
    sleeper.join(20)
    assert not sleeper.is_alive()
    assert guest.page(2) == touched(content or bytes(PAGE_SIZE))


def wait_for_faults(guest):
    """What the kernel says of threads that sleep."""
    ready, _, _ = select.select([guest.uffd], [], [], 20)
    assert ready, "nobody touched a missing page"
    return userfaultfd.read_messages(guest.uffd)


# ---- word to the fault process -------------------------------------------------------------


def test_arrivals_that_are_waited_for_are_told(make):
    """Each once, of whatever table of a frame; others are nobody's business."""
    guest = make([16])
    writer = WaitingWriter(guest.waiting)
    guest.frames.tell_arrivals(0, (runs(1, 2), runs(3), NO_RUNS))
    assert guest.told() == []
    for place in ((0, 2), (0, 3), (0, 9), (1, 1)):
        writer.add(*place)
    guest.frames.tell_arrivals(0, (runs(1, 2), NO_RUNS, runs(3, 4)))
    assert sorted(guest.told()) == [(0, 2), (0, 3)]
    del writer


def test_arrivals_in_a_pipe_that_nobody_reads(make):
    """It is full: what is told is lost, and the receiver goes on."""
    guest = make([16])
    writer = WaitingWriter(guest.waiting)
    writer.add(0, 1)
    size = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(guest.tell, bytes(4096))
    guest.frames.tell_arrivals(0, (runs(1), NO_RUNS, NO_RUNS))
    while size:
        size -= len(os.read(guest.arrivals, size))
    assert guest.told() == []
    guest.frames.tell_arrivals(0, (runs(1), NO_RUNS, NO_RUNS))
    assert guest.told() == [(0, 1)]
    del writer


# ---- host pages of more than one page ------------------------------------------------------

# What a region of ordinary memory can be treated as, so that no huge page is needed.
HOST = 4


def pieces_of(hosts, host, draw):
    """Pieces of host pages, (first, count) of pages, in any order, none longer than a host page."""
    pieces = []
    for begin in hosts:
        at = begin * host
        while at < (begin + 1) * host:
            count = min(draw.randint(1, max(1, host // 3)), (begin + 1) * host - at)
            pieces.append((at, count))
            at += count
    draw.shuffle(pieces)
    return pieces


@pytest.mark.parametrize("seed", range(8))
def test_host_pages_are_put_together_from_pieces_in_any_order(make, seed):
    """Two at a time, interleaved; neither is there before its last piece is."""
    guest = make([4 * HOST], page_size=HOST * PAGE_SIZE)
    left = {1: HOST, 2: HOST}
    for first, count in pieces_of([1, 2], HOST, random.Random(seed)):
        numbers = range(first, first + count)
        zero = first % 3 == 0
        guest.frames.place(0, runs(*numbers), b"" if zero else pages_of(*numbers))
        left[first // HOST] -= count
        whole = [p for h in (1, 2) if not left[h] for p in range(h * HOST, (h + 1) * HOST)]
        assert guest.there() == guest.arrived() == whole
        for page in numbers:
            if page in whole and not zero:
                assert guest.page(page) == page_of(page)
    assert left == {1: 0, 2: 0}
    assert guest.already_there() == 0


def test_a_frame_that_covers_several_host_pages(make):
    """The end of one, all of the next, the beginning of a third; the rest comes later."""
    guest = make([4 * HOST], page_size=HOST * PAGE_SIZE)
    guest.frames.place(0, runs(*range(2, 9)), pages_of(*range(2, 9)))
    assert guest.there() == guest.arrived() == [4, 5, 6, 7]
    guest.frames.place(0, runs(0, 1, 9, 10), pages_of(0, 1, 9, 10))
    assert guest.there() == list(range(8))
    guest.frames.place(0, runs(11), b"")
    assert guest.there() == guest.arrived() == list(range(12))
    assert [guest.page(n) for n in range(11)] == [page_of(n) for n in range(11)]
    assert guest.page(11) == bytes(PAGE_SIZE)


def test_a_host_page_that_was_there_stays(make):
    """The fault process was faster."""
    guest = make([2 * HOST], page_size=HOST * PAGE_SIZE)
    guest.placer.install(0, HOST, HOST, pages_of(*range(HOST)))
    guest.frames.place(0, runs(*range(2 * HOST)), pages_of(*[50] * 2 * HOST))
    assert guest.already_there() == HOST
    assert [guest.page(HOST + i) for i in range(HOST)] == [page_of(i) for i in range(HOST)]
    assert guest.page(0) == page_of(50)
    guest.placer.install(0, 0, HOST, b"")
    assert guest.already_there() == 2 * HOST and guest.page(0) == page_of(50)


def test_arrivals_of_host_pages_are_told_by_their_first_page(make):
    guest = make([4 * HOST], page_size=HOST * PAGE_SIZE)
    writer = WaitingWriter(guest.waiting)
    writer.add(0, HOST)
    guest.frames.tell_arrivals(0, (runs(0, 1, 2, 3), NO_RUNS, NO_RUNS))
    assert guest.told() == []
    guest.frames.tell_arrivals(0, (runs(HOST + 1, HOST + 2, 3 * HOST), NO_RUNS, NO_RUNS))
    assert guest.told() == [(0, HOST)]
    del writer


def test_too_many_host_pages_that_are_begun(make):
    """Somebody sends one page of each: it would cost as much memory as there is."""
    guest = make([40 * HOST], page_size=HOST * PAGE_SIZE)
    most = placing._MAX_PARTIAL
    for host in range(most):
        guest.frames.place(0, runs(host * HOST), page_of(host))
    with pytest.raises(RemoteProtocolError, match="not finished"):
        guest.frames.place(0, runs(most * HOST), page_of(1))
    # one that is begun may go on, and makes room for another
    guest.frames.place(0, runs(1, 2, 3), pages_of(1, 2, 3))
    assert guest.there() == [0, 1, 2, 3]
    guest.frames.place(0, runs(most * HOST), page_of(1))


@pytest.fixture
def huge_pages():
    """Four huge pages of 2 MiB, and the pool as it was afterwards."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    free = pool.with_name("free_hugepages")
    try:
        before = pool.read_text()
        pool.write_text(str(int(before) + 4))
    except OSError as e:
        pytest.skip(f"cannot set the pool of huge pages: {e.strerror}")
    try:
        if int(free.read_text()) < 4:
            pytest.skip("no four huge pages can be had here")
        yield
    finally:
        pool.write_text(before)


@pytest.mark.parametrize("seed", range(2))
def test_huge_pages_are_put_together_from_pieces_in_any_order(huge_pages, make, seed):
    """As above, in real huge pages: the kernel takes them whole or not at all."""
    per = HUGE // PAGE_SIZE
    guest = make([4 * per], page_size=HUGE, flags=os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    left = {0: per, 2: per}
    for first, count in pieces_of([0, 2], per, random.Random(seed)):
        numbers = range(first, first + count)
        guest.frames.place(0, runs(*numbers), pages_of(*numbers))
        left[first // per] -= count
        whole = [p for h in (0, 2) if not left[h] for p in range(h * per, (h + 1) * per)]
        assert guest.arrived() == whole
    assert left == {0: 0, 2: 0}
    assert all(guest.page(p) == page_of(p) for p in [*range(per), *range(2 * per, 3 * per)])
    guest.placer.install(0, per, 2 * per, b"")  # the kernel has no huge zero page to give
    assert guest.page(per) == guest.page(2 * per - 1) == bytes(PAGE_SIZE)
    assert guest.page(2 * per + 1) == page_of(2 * per + 1)
    assert guest.already_there() == per
    assert guest.received.missing() == per


def test_a_huge_page_that_is_missing_wakes_who_sleeps_on_it(huge_pages, make):
    per = HUGE // PAGE_SIZE
    guest = make([per], page_size=HUGE, flags=os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    sleeper = guest.touch(17)
    (fault,) = wait_for_faults(guest)
    assert guest.placer.map.locate(fault.address)[1] // per == 0
    guest.frames.place(0, runs(*range(per)), page_of(3) * per)
    sleeper.join(20)
    assert not sleeper.is_alive()
    assert guest.page(17) == touched(page_of(3)) and guest.page(18) == page_of(3)
