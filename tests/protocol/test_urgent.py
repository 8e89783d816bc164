"""The urgent channel: what was encoded comes back, damage is never another message, and the two
halves agree on what is placed whatever is lost between them."""

import copy
import struct
from collections import deque

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pageferry.transport import urgent
from pageferry.transport.errors import LocalProtocolError, RemoteProtocolError
from pageferry.transport.pages import PAGE_SIZE
from pageferry.transport.urgent import (
    HEADER_SIZE,
    MAGIC,
    MAX_HOST_PAGES,
    MAX_MESSAGE,
    MAX_PLACED,
    VERSION,
    Answering,
    Elsewhere,
    Kind,
    Message,
    Page,
    Placed,
    Request,
    Requesting,
    decode,
    encode,
)

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# The header as the format says it, written down once more: see the table in urgent.py.
HEAD = struct.Struct("<HBBHHIIQ")
SUMS = struct.Struct("<QQ")
U32 = 2**32 - 1


def forge(
    *, magic=MAGIC, version=VERSION, kind=Kind.REQUEST, block=0, count=0, number=0, held=0, page=0,
    payload=b"",
):  # fmt: skip
    """A message with valid sums, whatever it says."""
    head = HEAD.pack(magic, version, kind, block, count, number, held, page)
    head_digest = xxhash.xxh3_64_intdigest(head)
    total = xxhash.xxh3_64_intdigest(payload, head_digest) if payload else 0
    return head + SUMS.pack(total, xxhash.xxh3_64_intdigest(head, total)) + payload


def refused(half, *messages):
    """`half` refuses each of them, and nothing about it changes."""
    for message in messages:
        before = copy.deepcopy(vars(half))
        with pytest.raises(RemoteProtocolError):
            half.receive(message)
        assert vars(half) == before


# ---- messages ------------------------------------------------------------------------------

numbers = st.integers(0, U32)
fields = st.fixed_dictionaries(
    {
        "number": numbers,
        "block": st.integers(0, 0xFFFF),
        "page": st.integers(0, 2**64 - 1),
        "held": numbers,
    }
)


@st.composite
def messages(draw):
    """A kind, the fields of it, a payload that fits."""
    kind = draw(st.sampled_from(Kind))
    count, payload = draw(st.integers(0, MAX_HOST_PAGES)), b""
    if kind is Kind.PAGE:
        count = draw(st.integers(1, 3))
        payload = draw(st.binary(min_size=1, max_size=30)).ljust(count * PAGE_SIZE, b"\xa5")
    elif kind is Kind.PLACED:
        placed = draw(st.lists(numbers, max_size=MAX_PLACED))
        count, payload = len(placed), struct.pack(f"<{len(placed)}I", *placed)
    return Message(kind=kind, count=count, payload=payload, **draw(fields))


def written(message):
    return encode(
        message.kind, message.number, message.block, message.page, message.count, message.held,
        message.payload,
    )  # fmt: skip


@given(messages())
@examples
def test_messages_round_trip(message):
    """Every kind with any value in its fields, as the format says it."""
    data = written(message)
    assert decode(data) == decode(memoryview(data)) == message
    assert len(data) == HEADER_SIZE + len(message.payload)
    assert data == forge(
        kind=message.kind, block=message.block, count=message.count, number=message.number,
        held=message.held, page=message.page, payload=message.payload,
    )  # fmt: skip


def understood(data):
    """The message in `data`, None if it was refused or counts as lost. Nothing else is raised."""
    try:
        return decode(data)
    except RemoteProtocolError:
        return None


@given(messages(), st.integers(1, 255))
@settings(examples, max_examples=40)
def test_no_changed_byte_passes(message, change):
    """Each byte of the header, and of the payload near both its ends."""
    data = bytearray(written(message))
    edge = HEADER_SIZE + 16
    for at in {*range(min(len(data), edge)), *range(max(0, len(data) - 16), len(data))}:
        data[at] ^= change
        assert understood(bytes(data)) is None, at
        data[at] ^= change
    assert decode(bytes(data)) == message


def test_no_changed_byte_of_a_page_passes():
    """Every one of them."""
    data = bytearray(encode(Kind.PAGE, 3, 1, 2, 1, 4, bytes(range(256)) * 16))
    for at in range(len(data)):
        data[at] ^= 0x10
        assert understood(bytes(data)) is None, at
        data[at] ^= 0x10


@given(messages(), st.data())
@examples
def test_what_is_cut_short_or_too_long_counts_as_lost(message, data):
    whole = written(message)
    assert decode(whole[: data.draw(st.integers(0, len(whole) - 1))]) is None
    assert decode(whole + data.draw(st.binary(min_size=1, max_size=9))) is None


@given(messages(), messages())
@examples
def test_a_payload_belongs_to_its_header(one, other):
    """The page of one answer is not taken for that of another."""
    a, b = written(one), written(other)
    mixed = a[:HEADER_SIZE] + b[HEADER_SIZE:]
    if mixed not in (a, b):
        assert understood(mixed) is None


@given(st.binary(max_size=3 * HEADER_SIZE))
@settings(examples, max_examples=150)
def test_garbage_counts_as_lost(data):
    assert decode(data) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"magic": MAGIC + 1},
        {"version": VERSION + 1},
        {"version": 0},
        {"kind": 0},
        {"kind": 6},
        {"kind": 255},
        {"kind": Kind.REQUEST, "count": MAX_HOST_PAGES + 1},
        {"kind": Kind.ZERO, "count": MAX_HOST_PAGES + 1},
        {"kind": Kind.ELSEWHERE, "count": 0xFFFF},
        {"kind": Kind.PAGE, "count": MAX_HOST_PAGES + 1},
        {"kind": Kind.PAGE, "count": 0},
        {"kind": Kind.PLACED, "count": MAX_PLACED + 1, "payload": bytes(4 * MAX_PLACED + 4)},
    ],
)
def test_what_is_intact_and_makes_no_sense_is_refused(wrong):
    """Somebody speaks another protocol, or means harm: to ask again would not help."""
    with pytest.raises(RemoteProtocolError):
        decode(forge(**wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": Kind.PAGE, "count": 2, "payload": bytes(PAGE_SIZE)},
        {"kind": Kind.PAGE, "count": 1},
        {"kind": Kind.PAGE, "count": 1, "payload": bytes(PAGE_SIZE + 1)},
        {"kind": Kind.PLACED, "count": 2, "payload": bytes(4)},
        {"kind": Kind.PLACED, "payload": bytes(4)},
        {"kind": Kind.REQUEST, "payload": b"x"},
        {"kind": Kind.ZERO, "count": 1, "payload": bytes(PAGE_SIZE)},
    ],
)
def test_a_payload_of_another_length_counts_as_lost(wrong):
    """Even under valid sums."""
    assert decode(forge(**wrong)) is None


def test_bounds_are_legal():
    """The largest host page, the longest report, the last number, more time than fits."""
    whole = encode(Kind.PAGE, U32, 0xFFFF, 2**64 - 1, MAX_HOST_PAGES, U32 + 5, bytes(2 << 20))
    assert len(whole) == MAX_MESSAGE
    message = decode(whole)
    assert (message.number, message.count, message.held) == (U32, MAX_HOST_PAGES, U32)
    longest = encode(Kind.PLACED, 0, count=MAX_PLACED, payload=bytes(4 * MAX_PLACED))
    assert decode(longest).count == MAX_PLACED


# ---- the two halves ------------------------------------------------------------------------


def test_a_page_that_is_asked_for_answered_and_placed():
    """Content, zeros, and one that comes by another channel."""
    source, destination = Answering(), Requesting()
    content = b"c" * PAGE_SIZE
    request = source.receive(destination.ask(1, 8, "a"))
    assert request == Request(0, 1, 8)
    page = destination.receive(source.page(request, "A", content, 77))
    assert page == Page(0, "a", 1, 8, content, 77)
    request = source.receive(destination.ask(2, 9, "b"))
    zero = destination.receive(source.page(request, "B", b"", 0))
    assert zero == Page(1, "b", 2, 9, b"", 0)
    request = source.receive(destination.ask(0, 5, "c"))
    assert destination.receive(source.elsewhere(request)) == Elsewhere("c", 0, 5)
    assert not source.idle and destination.unsaid == 0
    destination.placed(1)
    assert destination.unsaid == 1
    assert source.receive(destination.report()) == Placed(["B"])
    assert destination.unsaid == 0 and not source.idle
    assert source.receive(destination.report()) == Placed([])
    destination.placed(0)
    assert source.receive(destination.report()) == Placed(["A"])
    assert source.idle


def test_a_report_before_anything_was_asked():
    """Said from time to time, whether there is news or not."""
    source, destination = Answering(), Requesting()
    assert source.receive(destination.report()) == Placed([])
    assert source.receive(destination.ask(0, 1, "a")) == Request(0, 0, 1)


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_a_report_after_requests_were_lost(lost):
    """The source has heard of none of them: nothing is settled, nobody is to blame."""
    source, destination = Answering(), Requesting()
    for _ in range(lost):
        destination.ask(0, 1, "a", instead=destination.last)
    assert source.receive(destination.report()) == Placed([])
    request = source.receive(destination.ask(0, 1, "a", instead=destination.last))
    assert request == Request(lost, 0, 1)


def test_a_report_does_not_settle_what_is_on_its_way():
    """Sent, and asked for again before it came; the second request is lost, the report is not."""
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 1, "a"))
    answer = source.page(request, "A", b"", 0)
    destination.ask(0, 1, "a", instead=0)
    assert source.receive(destination.report()) == Placed([])
    assert not source.idle
    destination.receive(answer)
    destination.placed(0)
    assert source.receive(destination.report()) == Placed(["A"])


def test_a_report_when_the_last_request_was_lost():
    """Its page had come by then: the source has not heard of the number, and all is settled."""
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 1, "a"))
    answer = source.page(request, "A", b"", 0)
    destination.ask(0, 1, "a", instead=0)  # lost
    destination.receive(answer)
    destination.placed(0)
    destination.forget(1)
    assert source.receive(destination.report()) == Placed(["A"])
    assert source.receive(destination.report()) == Placed([])
    assert source.receive(destination.ask(0, 2, "b")) == Request(2, 0, 2)


def test_a_report_settles_an_answer_that_was_lost_when_its_page_is_there():
    """Sent twice; the first came late, the second never: nobody will ask for the page again."""
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 1, "a"))
    answer = source.page(request, "A", b"", 0)
    request = source.receive(destination.ask(0, 1, "a", instead=0))
    source.forget(0)
    source.page(request, "A again", b"", 0)  # lost
    destination.receive(answer)
    destination.placed(0)
    destination.forget(1)
    assert source.receive(destination.report()) == Placed(["A again"])
    assert source.idle


def test_a_report_that_was_lost_is_made_good_by_the_next():
    source, destination = Answering(), Requesting()
    for page in range(3):
        request = source.receive(destination.ask(0, page, page))
        destination.receive(source.page(request, page, b"", 0))
    destination.placed(0)
    destination.placed(2)
    destination.report()  # lost
    assert source.receive(destination.report()) == Placed([0])  # 1 is being installed
    destination.placed(1)
    assert source.receive(destination.report()).tokens == [1, 2]
    assert source.idle


def test_more_placed_pages_than_a_report_holds():
    """The next report has the others, and only then they are settled."""
    source, destination = Answering(), Requesting()
    for page in range(MAX_PLACED + 10):
        request = source.receive(destination.ask(0, page, page))
        destination.receive(source.page(request, page, b"", 0))
        destination.placed(page)
    assert source.receive(destination.report()).tokens == list(range(MAX_PLACED))
    assert destination.unsaid == 10 and not source.idle
    assert source.receive(destination.report()).tokens == [MAX_PLACED + i for i in range(10)]
    assert source.idle


def test_a_late_answer_is_as_good_as_one_in_time():
    """Asked for again, and then the first answer comes; the second is one for the same page."""
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 4, "a"))
    first = source.page(request, "A", b"", 0)
    request = source.receive(destination.ask(0, 4, "a", instead=0))
    source.forget(0)
    second = source.page(request, "A again", b"", 0)
    assert destination.receive(first).token == destination.receive(second).token == "a"
    destination.placed(0)
    destination.placed(1)
    assert source.receive(destination.report()) == Placed(["A again"])
    assert source.idle


def test_an_answer_that_nobody_waits_for_any_more():
    """The page came by another way: the answer is taken if it comes, and missed if it does not."""
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 1, "a"))
    destination.forget(0)
    destination.forget(0)
    destination.forget(7)
    assert source.receive(destination.report()) == Placed([])
    assert destination.receive(source.elsewhere(request)) == Elsewhere("a", 0, 1)
    refused(destination, source.elsewhere(request))


def test_requests_that_the_source_refuses():
    """A number that came, one before it, and everything that only a source says."""
    source, destination = Answering(), Requesting()
    first, second = destination.ask(0, 1, "a"), destination.ask(0, 2, "b")
    source.receive(first)
    source.receive(second)
    refused(source, first, second, forge(kind=Kind.REQUEST, number=1, page=9))
    for kind in (Kind.PAGE, Kind.ZERO, Kind.ELSEWHERE):
        payload = bytes(PAGE_SIZE) if kind is Kind.PAGE else b""
        refused(source, forge(kind=kind, number=1, page=2, count=1, payload=payload))
    assert source.receive(forge(kind=Kind.REQUEST, number=7)) == Request(7, 0, 0)  # 2 to 6 lost


def test_reports_that_the_source_refuses():
    """Of numbers that nobody asked for, alone or beside one that was."""
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 1, "a"))
    source.page(request, "A", b"", 0)
    for placed in ([1], [0, 5], [U32]):
        payload = struct.pack(f"<{len(placed)}I", *placed)
        refused(source, forge(kind=Kind.PLACED, count=len(placed), payload=payload))
    assert not source.idle


def test_a_number_that_is_reported_twice_is_settled_once():
    source, destination = Answering(), Requesting()
    request = source.receive(destination.ask(0, 1, "a"))
    source.page(request, "A", b"", 0)
    report = forge(kind=Kind.PLACED, count=2, payload=struct.pack("<2I", 0, 0))
    assert source.receive(report) == Placed(["A"])
    assert source.receive(report) == Placed([])


def test_answers_that_the_destination_refuses():
    """To no request, twice, with another page, and what only a destination says."""
    source, destination = Answering(), Requesting()
    refused(destination, forge(kind=Kind.ZERO))
    request = source.receive(destination.ask(1, 2, "a"))
    refused(
        destination,
        forge(kind=Kind.ZERO, number=1, block=1, page=2),
        forge(kind=Kind.ZERO, number=0, block=1, page=3),
        forge(kind=Kind.ELSEWHERE, number=0, block=2, page=2),
        forge(kind=Kind.PAGE, number=U32, count=1, payload=bytes(PAGE_SIZE)),
        forge(kind=Kind.REQUEST, number=0, block=1, page=2),
        forge(kind=Kind.PLACED),
    )
    answer = source.page(request, "A", b"", 0)
    assert destination.receive(answer).page == 2
    refused(destination, answer, source.elsewhere(request))


def test_damage_changes_nothing():
    """At either end: it counts as lost."""
    source, destination = Answering(), Requesting()
    data = destination.ask(0, 1, "a")
    request = source.receive(data)
    for half, message in ((source, data), (destination, source.page(request, "A", b"", 0))):
        before = copy.deepcopy(vars(half))
        assert half.receive(message[:-1] + bytes([message[-1] ^ 1])) is None
        assert half.receive(message[:20]) is None
        assert vars(half) == before


def test_more_requests_than_there_are_numbers(monkeypatch):
    """Our own limit: the last number may be used."""
    monkeypatch.setattr(urgent, "_MAX_NUMBER", 3)
    destination = Requesting()
    for _ in range(4):
        destination.ask(0, 0, "a")
    before = copy.deepcopy(vars(destination))
    with pytest.raises(LocalProtocolError):
        destination.ask(0, 0, "a")
    assert vars(destination) == before


# ---- whatever is lost ----------------------------------------------------------------------

# The last one is with a multifd channel from the beginning.
PAGES = [(0, 0), (0, 1), (1, 0), (1, 1)]
OTHERS = {(1, 1)}
TRIES = 3


class UrgentMachine(RuleBasedStateMachine):
    """Both halves as the two processes use them (workers/fault.py, workers/postcopy.py), and a wire
    in each direction that keeps the order and loses what it likes."""

    @initialize()
    def begin(self):
        self.source, self.destination = Answering(), Requesting()
        self.down, self.up = deque(), deque()
        self.heard_by_source, self.heard_by_destination = [], []
        # destination
        self.wanted = {}  # page -> number of its last request
        self.to_install = deque()
        self.installed = set()
        # source
        self.unclaimed = set(PAGES) - OTHERS
        self.under_way = {}  # page -> number of its last answer
        self.clean = set()

    # ---- the destination

    @rule(page=st.sampled_from(PAGES))
    def fault(self, page):
        if page not in self.installed and page not in self.wanted:
            self.down.append(self.destination.ask(*page, page))
            self.wanted[page] = self.destination.last

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def ask_again(self, data):
        self.again(data.draw(st.sampled_from(sorted(self.wanted))))

    def again(self, page):
        self.down.append(self.destination.ask(*page, page, instead=self.wanted[page]))
        self.wanted[page] = self.destination.last

    @precondition(lambda self: self.to_install)
    @rule()
    def install(self):
        number, page = self.to_install.popleft()
        self.installed.add(page)
        self.destination.placed(number)

    @rule()
    def report(self):
        self.down.append(self.destination.report())

    @precondition(lambda self: self.up)
    @rule()
    def hear_answer(self):
        data = self.up.popleft()
        event = self.destination.receive(data)
        self.heard_by_destination.append(data)
        page = (event.block, event.page)
        assert event.token == page
        if isinstance(event, Page):
            assert bytes(event.content) == self.content(page)
            self.to_install.append((event.number, page))
            self.close(page)
        else:
            assert page in OTHERS | self.clean
            if page in self.installed:
                self.close(page)

    @rule(page=st.sampled_from(sorted(OTHERS)))
    def comes_by_a_multifd_channel(self, page):
        self.installed.add(page)
        self.close(page)

    def close(self, page):
        if page in self.wanted:
            self.destination.forget(self.wanted.pop(page))

    # ---- the source

    @staticmethod
    def content(page):
        """One page is zero."""
        return b"" if page == (0, 1) else bytes([page[0] * 16 + page[1] + 1]) * PAGE_SIZE

    @precondition(lambda self: self.down)
    @rule()
    def hear_request(self):
        data = self.down.popleft()
        event = self.source.receive(data)
        self.heard_by_source.append(data)
        if isinstance(event, Placed):
            for page in event.tokens:
                assert page in self.installed, "settled and never placed"
                if self.under_way.pop(page, None) is not None:
                    self.clean.add(page)
            return
        page = (event.block, event.page)
        if page in self.under_way:
            self.source.forget(self.under_way[page])
        elif page in self.unclaimed:
            self.unclaimed.remove(page)
        else:
            self.up.append(self.source.elsewhere(event))
            return
        self.under_way[page] = event.number
        self.up.append(self.source.page(event, page, self.content(page), 0))

    # ---- what goes wrong between them

    @precondition(lambda self: self.down)
    @rule()
    def lose_request(self):
        self.down.popleft()

    @precondition(lambda self: self.up)
    @rule()
    def lose_answer(self):
        self.up.popleft()

    @precondition(lambda self: self.up or self.down)
    @rule(data=st.data())
    def damage(self, data):
        wire, half = data.draw(
            st.sampled_from(
                [w for w in ((self.down, self.source), (self.up, self.destination)) if w[0]]
            )
        )
        message = bytearray(wire.popleft())
        bit = data.draw(st.integers(0, 8 * len(message) - 1))
        message[bit // 8] ^= 1 << bit % 8
        before = copy.deepcopy(vars(half))
        assert half.receive(bytes(message)) is None
        assert vars(half) == before

    @precondition(lambda self: self.heard_by_source)
    @rule(data=st.data())
    def request_comes_again(self, data):
        message = data.draw(st.sampled_from(self.heard_by_source))
        if decode(message).kind == Kind.REQUEST:
            refused(self.source, message)
        else:
            before = copy.deepcopy(vars(self.source))
            assert self.source.receive(message) == Placed([])
            assert vars(self.source) == before

    @precondition(lambda self: self.heard_by_destination)
    @rule(data=st.data())
    def answer_comes_again(self, data):
        refused(self.destination, data.draw(st.sampled_from(self.heard_by_destination)))

    @rule(ahead=st.integers(1, 3), page=st.sampled_from(PAGES))
    def what_nobody_asked_for(self, ahead, page):
        number = self.destination.last + ahead
        place = {"block": page[0], "page": page[1]}
        refused(self.destination, forge(kind=Kind.ZERO, number=number, **place))
        payload = struct.pack("<I", number)
        refused(self.source, forge(kind=Kind.PLACED, count=1, payload=payload))

    def teardown(self):
        """Whatever was lost: who asks often enough gets his page, and then one report will do."""
        if not hasattr(self, "source"):
            return
        self.installed |= OTHERS
        for _ in range(TRIES):
            self.drain()
            for page in list(self.wanted):
                self.again(page)
        self.drain()
        assert self.wanted == {}
        self.report()
        self.drain()
        assert self.source.idle and not self.under_way
        assert self.destination.unsaid == 0
        assert self.clean == self.installed - OTHERS

    def drain(self):
        while self.down or self.up or self.to_install:
            while self.down:
                self.hear_request()
            while self.up:
                self.hear_answer()
            while self.to_install:
                self.install()


UrgentMachine.TestCase.settings = settings(
    max_examples=75, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestUrgent = UrgentMachine.TestCase
