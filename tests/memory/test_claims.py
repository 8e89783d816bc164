"""Who sends which page once the guest runs elsewhere: claims in the page table, in any order of
claims, frames, requests, losses and broken connections, against a model of both ends."""

import threading
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pageferry.transport.errors import WorkerDied
from pageferry.transport.pages import runs_of
from pageferry.workers import page_table
from pageferry.workers.page_table import CLEAN, DIRTY, IN_FLIGHT, PageTable
from pageferry.workers.received import Received, unpack
from pageferry.workers.release import may_go

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)
states = st.sampled_from([CLEAN, DIRTY, IN_FLIGHT])


class Lock:
    """A lock that somebody else may get first: `meanwhile` runs before it is taken."""

    def __init__(self):
        self._lock = threading.Lock()
        self.meanwhile = None

    def acquire(self, *arguments, **options):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return self._lock.acquire(*arguments, **options)

    def release(self):
        self._lock.release()


@pytest.fixture
def make():
    """Makes tables that are closed at the end; a test must drop its views itself."""
    made = []

    def make_table(*pages):
        made.append(PageTable(list(pages), Lock()))
        return made[-1]

    yield make_table
    for table in made:
        table.close()


# ---- one call ------------------------------------------------------------------------------


@given(st.lists(states, min_size=1, max_size=40), st.data())
@examples
def test_a_claim_takes_the_first_dirty_pages(content, data):
    """Of its range, as many as it may, and touches nothing else."""
    first = data.draw(st.integers(0, len(content)))
    count = data.draw(st.integers(0, len(content) - first))
    most = data.draw(st.integers(1, 50))
    table = PageTable([3, len(content)], threading.Lock())
    try:
        table.view(1)[:] = content
        got = table.claim(1, first, count, most).tolist()
        assert got == [p for p in range(first, first + count) if content[p] == DIRTY][:most]
        after = [IN_FLIGHT if p in got else state for p, state in enumerate(content)]
        assert table.view(1).tolist() == after
        assert table.view(0).tolist() == [CLEAN] * 3
    finally:
        table.close()


@pytest.mark.parametrize("state", [CLEAN, DIRTY, IN_FLIGHT])
@pytest.mark.parametrize("host", [1, 4, 512])
def test_claiming_one_host_page(make, state, host):
    """All of it or nothing, and only if it is nobody's."""
    table = make(3 * host)
    table.view(0)[:] = state
    with memoryview(table.view(0).data) as view:
        assert table.claim_one(view, host, host) == (state == DIRTY)
    now = IN_FLIGHT if state == DIRTY else state
    assert table.view(0).tolist() == [state] * host + [now] * host + [state] * host


def test_what_is_claimed_cannot_be_claimed_again(make):
    """By neither way."""
    table = make(8)
    table.mark_dirty(0, runs_of(np.arange(8)))
    with memoryview(table.view(0).data) as view:
        assert table.claim_one(view, 2, 1)
        assert table.claim(0, 0, 8, 3).tolist() == [0, 1, 3]
        assert not table.claim_one(view, 3, 1)
        assert not table.claim_one(view, 2, 1)
    assert table.claim(0, 0, 8, 8).tolist() == [4, 5, 6, 7]
    assert table.claim(0, 0, 8, 8).tolist() == []


@pytest.mark.parametrize("taken", [(0,), (1,), (0, 1), (0, 1, 2), (2, 5)])
def test_pages_that_go_while_a_claim_waits_for_the_lock(make, taken):
    """None of them is claimed twice; and nothing is said to be left of a range that has more."""
    table = make(8)
    table.view(0)[:] = DIRTY

    def meanwhile():
        with memoryview(table.view(0).data) as view:
            assert all(table.claim_one(view, page, 1) for page in taken)

    table._lock.meanwhile = meanwhile
    claimed, left = [], list(taken)
    while len(pages := table.claim(0, 0, 8, 2)):
        claimed += pages.tolist()
    assert sorted(claimed + left) == list(range(8))


@pytest.mark.parametrize("host", [2, 4])
def test_a_host_page_that_goes_bit_by_bit_before_ones_eyes(make, host):
    """Half of it still looks free when the claim begins: no other is claimed by halves for it."""
    table = make(4 * host)
    table.view(0)[:] = DIRTY
    table.view(0)[: host // 2] = IN_FLIGHT  # who claims it is at this point

    def meanwhile():
        table.view(0)[:host] = IN_FLIGHT

    table._lock.meanwhile = meanwhile
    claimed = table.claim(0, 0, 4 * host, host).tolist()
    assert claimed == list(range(host, 2 * host))


def test_a_process_that_died_with_the_lock(make, monkeypatch):
    """Who waits for it says so and has claimed nothing; a new lock will do."""
    monkeypatch.setattr(page_table, "_LOCK_SECONDS", 0.01)
    table = make(4)
    table.view(0)[:] = DIRTY
    table._lock.acquire()
    with memoryview(table.view(0).data) as view:
        with pytest.raises(WorkerDied):
            table.claim(0, 0, 4, 4)
        with pytest.raises(WorkerDied):
            table.claim_one(view, 0, 1)
        assert table.view(0).tolist() == [DIRTY] * 4
        table.renew_lock(threading.Lock())
        assert table.claim_one(view, 0, 1)
    assert table.claim(0, 0, 4, 4).tolist() == [1, 2, 3]


@pytest.mark.parametrize("most", [0, 5])
def test_the_lock_is_free_after_a_claim(make, most):
    """After one that got something, one that got nothing and one that failed."""
    table = make(4)
    table.view(0)[:] = DIRTY
    table.claim(0, 0, 4, most)
    with memoryview(bytes(4)) as read_only, pytest.raises(IndexError):
        table.claim_one(read_only, 7, 1)
    with memoryview(table.view(0).data) as view:
        table.claim_one(view, 0, 1)
    assert table._lock.acquire(blocking=False)


@given(st.lists(states, min_size=1, max_size=30), st.sampled_from([1, 2, 4, 8]))
@examples
def test_host_pages_are_dirty_as_a_whole(content, host):
    """If any part of one is; the last may be short."""
    table = PageTable([len(content)], threading.Lock())
    try:
        table.view(0)[:] = content
        table.whole_host_pages(0, host)
        expected = []
        for at in range(0, len(content), host):
            part = content[at : at + host]
            expected += [DIRTY if any(part) else CLEAN] * len(part)
        assert table.view(0).tolist() == expected
    finally:
        table.close()


@given(st.lists(st.tuples(states, st.booleans()), min_size=1, max_size=40))
@examples
def test_to_resume_is_to_believe_the_destination(pages):
    """What it has is clean and the rest is dirty, whatever the table said."""
    table, received = PageTable([2, len(pages)]), Received([2, len(pages)])
    try:
        table.view(1)[:] = [state for state, _ in pages]
        received.view(1)[:] = [there for _, there in pages]
        table.resume(1, unpack(received.packed()[1], len(pages)))
        assert table.view(1).tolist() == [CLEAN if there else DIRTY for _, there in pages]
        assert table.view(0).tolist() == [CLEAN, CLEAN]
    finally:
        table.close()
        received.close()


# ---- everybody at once ---------------------------------------------------------------------

BLOCKS = [16, 8]
SENDERS = 2
POSTCOPY = "postcopy"
senders = st.integers(0, SENDERS - 1)


def content_of(block, page):
    return f"content of {block}:{page}"


class Sender:
    """What a sender has, and what is on the way to and from its receiver."""

    def __init__(self):
        self.extent = None  # block, first page not looked at, end
        self.claimed = deque()  # block, pages: frames that are to be sent
        self.again = deque()
        self.wire = deque()  # block, pages, content
        self.back = deque()  # block, pages, arrived
        self.partial = {}  # the receiver's: (block, host page) -> {page: content}

    @property
    def idle(self):
        return not (self.extent or self.claimed or self.again or self.wire or self.back)


class ClaimMachine(RuleBasedStateMachine):
    """Senders and the postcopy process as in workers/, on a real page table; the destination is a
    model that installs each page once. Host pages have HOST pages."""

    HOST = 1

    @initialize(dirty=st.lists(st.integers(0, sum(BLOCKS) - 1), min_size=1, unique=True))
    def begin(self, dirty):
        self.lock = Lock()
        self.table = PageTable(BLOCKS, self.lock)
        self.received = Received(BLOCKS)
        self.memory = {}  # at the destination: what was installed
        self.before = set()  # what was there before anything was missing
        self.gone = set()  # what the source has given back, and cannot send any more
        self.already_there = 0
        self.told = Counter()  # host pages: times they may be sent and installed again
        for block, pages in enumerate(BLOCKS):
            offset = sum(BLOCKS[:block])
            runs = runs_of(np.array(sorted(d - offset for d in dirty if 0 <= d - offset < pages)))
            self.table.mark_dirty(block, runs)
            self.table.whole_host_pages(block, self.HOST)
            table = self.table.view(block)
            self.received.expect(block, runs_of(np.flatnonzero(table != CLEAN)))
            self.before |= {(block, page) for page in np.flatnonzero(table == CLEAN).tolist()}
        self.connect()

    def connect(self):
        """New workers on the old table."""
        self.senders = [Sender() for _ in range(SENDERS)]
        self.owner = {}
        self.sent = Counter()
        self.again_allowed = Counter()
        self.requests, self.answers, self.reports = deque(), deque(), deque()
        self.wanted = set()  # host pages
        self.under_way = set()  # host pages of the postcopy process
        self.extents = deque(
            (block, first, min(first + 8, pages))
            for block, pages in enumerate(BLOCKS)
            for first in range(0, pages, 8)
        )
        self.started_with = {
            (block, page)
            for block, pages in enumerate(BLOCKS)
            for page in range(pages)
            if self.state(block, page) == DIRTY
        }

    def state(self, block, page):
        return int(self.table.view(block)[page])

    def content(self, block, page):
        assert (block, page) not in self.gone, "sent after it was given back"
        return content_of(block, page)

    @rule()
    def give_back(self):
        for block in range(len(BLOCKS)):
            pages = np.flatnonzero(may_go(self.table.view(block), self.HOST)).tolist()
            self.gone |= {(block, page) for page in pages}

    def own(self, who, block, pages):
        for page in pages:
            assert (block, page) not in self.owner, "claimed by two"
            self.owner[block, page] = who

    # ---- senders

    @rule(i=senders)
    def take_extent(self, i):
        if self.senders[i].extent is None and self.extents:
            self.senders[i].extent = self.extents.popleft()

    @rule(i=senders, piece=st.integers(1, 6), others_first=st.booleans())
    def claim(self, i, piece, others_first=False):
        """`others_first`: requests are answered between its look and its claim."""
        self.lock.meanwhile = self.answer_all if others_first else None
        self.claim_now(i, piece)
        self.lock.meanwhile = None

    def answer_all(self):
        while self.requests:
            self.answer()

    def claim_now(self, i, piece):
        sender = self.senders[i]
        if sender.extent is None or sender.claimed:
            return
        block, at, end = sender.extent
        most = max(piece // self.HOST * self.HOST, self.HOST)
        pages = self.table.claim(block, at, end - at, most).tolist()
        if not pages:
            sender.extent = None
            return
        self.own(i, block, pages)
        sender.extent = (block, pages[-1] + 1, end) if pages[-1] + 1 < end else None
        sender.claimed.extend((block, pages[at : at + piece]) for at in range(0, len(pages), piece))

    @rule(i=senders)
    def send(self, i):
        """A frame: one that was lost, or the next of what is claimed."""
        sender = self.senders[i]
        if not (sender.again or sender.claimed):
            return
        block, pages = (sender.again or sender.claimed).popleft()
        self.table.view(block)[pages] = IN_FLIGHT
        for page in pages:
            assert self.owner[block, page] == i, "sent by somebody else"
            self.sent[block, page] += 1
        sender.wire.append((block, pages, [self.content(block, page) for page in pages]))

    @rule(i=senders)
    def arrive(self, i):
        """A frame is placed: host pages that are whole are installed, the others wait."""
        sender = self.senders[i]
        if not sender.wire:
            return
        block, pages, content = sender.wire.popleft()
        for page, data in zip(pages, content, strict=True):
            host = page // self.HOST * self.HOST
            part = sender.partial.setdefault((block, host), {})
            part[page] = data
            if len(part) == self.HOST:
                self.install(block, host, sender.partial.pop((block, host)))
        sender.back.append((block, pages, True))

    @rule(i=senders)
    def lose_frame(self, i):
        sender = self.senders[i]
        if sender.wire:
            block, pages, _ = sender.wire.popleft()
            sender.back.append((block, pages, False))
            self.again_allowed.update((block, page) for page in pages)

    @rule(i=senders, piece=st.integers(1, 6), turns=st.integers(1, 12), give_back=st.booleans())
    def undisturbed(self, i, piece, turns, give_back):
        """One sender goes on for a while, as far as its next frames are heard of; `give_back`: and
        the coordinator looks each time."""
        sender = self.senders[i]
        for _ in range(turns):
            if sender.back:
                self.hear(i)
            elif sender.wire:
                self.arrive(i)
            elif sender.again or sender.claimed:
                self.send(i)
            elif sender.extent is not None:
                self.claim_now(i, piece)
            else:
                self.take_extent(i)
            if give_back:
                self.give_back()

    @rule(i=senders)
    def hear(self, i):
        """Acknowledged, or lost: then it is still ours."""
        sender = self.senders[i]
        if not sender.back:
            return
        block, pages, arrived = sender.back.popleft()
        assert all(self.owner[block, page] == i for page in pages)
        if arrived:
            self.table.view(block)[pages] = CLEAN
        else:
            sender.again.append((block, pages))

    # ---- the destination

    def install(self, block, host, pages):
        """As the kernel does: a page that is there stays as it is."""
        for page, data in pages.items():
            if self.received.view(block)[page]:
                self.already_there += 1
                assert self.told[block, host] > 0, "installed twice for no reason"
            else:
                self.memory[block, page] = data
        self.received.view(block)[host : host + self.HOST] = 1
        self.wanted.discard((block, host))

    @rule(block=st.sampled_from(range(len(BLOCKS))), data=st.data())
    def fault(self, block, data):
        host = data.draw(st.integers(0, BLOCKS[block] // self.HOST - 1)) * self.HOST
        if not self.received.view(block)[host] and (block, host) not in self.wanted:
            self.wanted.add((block, host))
            self.requests.append((block, host))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def ask_again(self, data):
        block, host = data.draw(st.sampled_from(sorted(self.wanted)))
        self.requests.append((block, host))
        self.told[block, host] += 1
        self.again_allowed.update((block, page) for page in range(host, host + self.HOST))

    @precondition(lambda self: self.answers)
    @rule()
    def take_answer(self):
        block, host, pages = self.answers.popleft()
        if pages is not None:
            self.install(block, host, pages)
            self.reports.append((block, host))

    @rule()
    def say_all_that_is_placed(self):
        """Makes good every report that was lost."""
        self.reports.extend(
            (block, host)
            for block, pages in enumerate(BLOCKS)
            for host in range(0, pages, self.HOST)
            if self.received.view(block)[host]
        )

    # ---- the postcopy process

    @precondition(lambda self: self.requests)
    @rule()
    def answer(self):
        block, host = self.requests.popleft()
        pages = range(host, host + self.HOST)
        if (block, host) not in self.under_way:
            with memoryview(self.table.view(block).data) as view:
                mine = self.table.claim_one(view, host, self.HOST)
            if not mine:
                self.answers.append((block, host, None))
                return
            self.own(POSTCOPY, block, pages)
            self.under_way.add((block, host))
        for page in pages:
            assert self.owner[block, page] == POSTCOPY, "sent by somebody else"
            self.sent[block, page] += 1
        self.answers.append((block, host, {page: self.content(block, page) for page in pages}))

    @precondition(lambda self: self.reports)
    @rule()
    def hear_report(self):
        block, host = self.reports.popleft()
        if (block, host) in self.under_way:
            self.under_way.remove((block, host))
            self.table.view(block)[host : host + self.HOST] = CLEAN

    # ---- what goes wrong between them

    @precondition(lambda self: self.requests)
    @rule()
    def lose_request(self):
        self.requests.popleft()

    @precondition(lambda self: self.answers)
    @rule()
    def lose_answer(self):
        self.answers.popleft()

    @precondition(lambda self: self.reports)
    @rule()
    def lose_report(self):
        self.reports.popleft()

    @rule(with_the_lock=st.booleans())
    def cut(self, with_the_lock):
        """The connection breaks, all workers end, maybe one of them while it claims; then the
        destination says what it has."""
        wanted = self.wanted
        if with_the_lock:
            self.table._lock.acquire()
        self.lock = Lock()
        self.table.renew_lock(self.lock)
        for block, bits in enumerate(self.received.packed()):
            self.table.resume(block, unpack(bits, BLOCKS[block]))
        self.connect()
        # who slept sleeps on; he is asked for again by the rule above
        self.wanted = wanted

    # ---- what always holds

    @invariant()
    def a_claim_is_for_good(self):
        for block, page in self.owner:
            assert self.state(block, page) != DIRTY

    @invariant()
    def nobody_owns_what_nobody_claimed(self):
        for block, pages in enumerate(BLOCKS):
            for page in range(pages):
                if (block, page) not in self.owner:
                    dirty = (block, page) in self.started_with
                    assert self.state(block, page) == (DIRTY if dirty else CLEAN)

    @invariant()
    def host_pages_have_one_owner(self):
        for block, pages in enumerate(BLOCKS):
            for host in range(0, pages, self.HOST):
                owners = {self.owner.get((block, host + i)) for i in range(self.HOST)}
                assert len(owners) == 1

    @invariant()
    def what_is_clean_is_there(self):
        """Or is in the hands of the one receiver that puts its host page together."""
        for (block, page), who in self.owner.items():
            if self.state(block, page) == CLEAN:
                host = page // self.HOST * self.HOST
                waiting = who != POSTCOPY and page in self.senders[who].partial.get(
                    (block, host), ()
                )
                assert (block, page) in self.memory or waiting

    @invariant()
    def what_is_given_back_is_there(self):
        """So that nobody has to send it again, whatever is cut."""
        for place in getattr(self, "gone", ()):
            assert self.state(*place) == CLEAN
            assert place in self.memory or place in self.before

    @invariant()
    def pages_are_sent_once_unless_something_was_lost(self):
        for place, times in self.sent.items():
            assert times <= 1 + self.again_allowed[place]

    def teardown(self):
        """Whatever happened: at the end everything is clean, there, and right."""
        if not hasattr(self, "table"):
            return
        try:
            self.drain()
            self.check_everything_is_there()
        finally:
            self.table.close()
            self.received.close()

    def drain(self):
        steps = (self.take_extent, self.send, self.arrive, self.hear)
        while self.extents or not all(sender.idle for sender in self.senders):
            for i in range(SENDERS):
                self.claim(i, 3)
                for step in steps:
                    step(i)
        self.drain_urgent()
        for block, host in sorted(self.wanted):
            self.requests.append((block, host))
            self.told[block, host] += 1
            self.again_allowed.update((block, page) for page in range(host, host + self.HOST))
        self.drain_urgent()
        self.say_all_that_is_placed()
        self.drain_urgent()

    def drain_urgent(self):
        while self.requests or self.answers or self.reports:
            while self.requests:
                self.answer()
            while self.answers:
                self.take_answer()
            while self.reports:
                self.hear_report()

    def check_everything_is_there(self):
        assert self.table.remaining() == 0
        assert self.received.missing() == 0
        assert not self.wanted and not self.under_way
        assert not any(sender.partial for sender in self.senders)
        everything = {(b, page) for b, pages in enumerate(BLOCKS) for page in range(pages)}
        assert set(self.memory) == everything - self.before
        assert all(data == content_of(*place) for place, data in self.memory.items())


class HostPageMachine(ClaimMachine):
    """The same on host pages of four pages."""

    HOST = 4


for _machine in (ClaimMachine, HostPageMachine):
    _machine.TestCase.settings = settings(
        max_examples=50, stateful_step_count=60, deadline=None, derandomize=True, database=None
    )
TestClaims = ClaimMachine.TestCase
TestHostPageClaims = HostPageMachine.TestCase
