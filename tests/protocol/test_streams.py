"""Many connections over one byte stream: both ends of it without the stream, and whoever lies."""

import random
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.carriage import Carriage
from pageferry.transport import streams
from pageferry.transport.errors import (
    LocalProtocolError,
    PeerRefused,
    RemoteProtocolError,
    UsageError,
)
from pageferry.transport.links import Endpoint
from pageferry.transport.stream_addresses import (
    Stream,
    is_stream,
    parse_stream,
    recover_words,
)
from pageferry.transport.streams import (
    CHUNK,
    HEADER,
    LARGE_CHUNK,
    LEAST_BULK,
    MAGIC,
    MAX_CONNECTIONS,
    MOST_NOISE,
    WINDOW,
    Arrived,
    Closed,
    Greeted,
    Kind,
    Left,
    Mux,
    Opened,
    Rank,
    ends_of,
    rank_of,
)

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
URGENT, CONTROL, BULK = ".64", "", ".0"


class End:
    """A Mux with connections that are lists of bytes: `todo` is to be sent, `got` has come."""

    def __init__(self, *, dials):
        self.mux = Mux(dials=dials, name="" if dials else "@there")
        self.todo, self.got, self.open, self.suffixes = {}, {}, set(), {}
        self.waits = {}  # has come, and its reader has not taken it
        self.greeted, self.left = None, None
        self.slow = set()  # readers that take nothing

    def say(self, number, data):
        self.todo[number] = self.todo.get(number, b"") + data
        self.mux.readable(number)

    def frame(self, now, *, idle=True):
        """The next one that goes onto the stream, b"" if none does."""
        out = self.mux.output(idle=idle)
        if out:
            return out
        while (chosen := self.mux.choose()) is not None:
            number, most = chosen
            data, self.todo[number] = self.todo[number][:most], self.todo[number][most:]
            if data:
                return self.mux.data(number, len(data), now) + data
            self.mux.drained(number)
        return b""

    def hear(self, data, now):
        for event in self.mux.receive(data, now):
            match event:
                case Greeted(name):
                    self.greeted = name
                case Opened(number, suffix):
                    self.open.add(number)
                    self.suffixes[number] = suffix
                case Arrived(number, piece):
                    self.got[number] = self.got.get(number, b"") + bytes(piece)
                    self.waits[number] = self.waits.get(number, 0) + len(piece)
                    assert self.waits[number] <= WINDOW
                    self.take(number)
                case Closed(number):
                    self.open.discard(number)
                case Left(reason):
                    self.left = reason

    def take(self, number):
        if number not in self.slow:
            self.mux.taken(number, self.waits.pop(number, 0))


def pair():
    """Both ends, who know each other."""
    source, there = End(dials=True), End(dials=False)
    settle(source, there)
    return source, there


def settle(*ends, now=0.0):
    """Until nobody has anything to say."""
    a, b = ends
    while (to_b := a.frame(now)) or (to_a := b.frame(now)):
        if to_b:
            b.hear(to_b, now)
        else:
            a.hear(to_a, now)


def connect(source, there, *suffixes):
    numbers = [source.mux.open(suffix) for suffix in suffixes]
    settle(source, there)
    assert [there.suffixes[number] for number in numbers] == list(suffixes)
    return numbers


def frames(data):
    """The frames in what is on the stream: kind, connection, size."""
    found, data = [], data.removeprefix(MAGIC)
    while data:
        kind, number, size = HEADER.unpack_from(data)
        follows = size if Kind(kind) not in (Kind.CREDIT, Kind.SEEN) else 0
        found.append((Kind(kind), number, size))
        data = data[HEADER.size + follows :]
    return found


# ---- addresses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stream", "shown"),
    [
        ("exec:ssh a b", Stream("ssh a b"), "exec:ssh a b"),
        ("exec: x -", Stream("x -"), "exec:x -"),
        ("fd:5", Stream(reads=5), "fd:5"),
        ("fd:0", Stream(reads=0), "fd:0"),
        ("fd:0,1", Stream(reads=0, writes=1), "-"),
        ("fd:7,8", Stream(reads=7, writes=8), "fd:7,8"),
        ("-", Stream(reads=0, writes=1), "-"),
    ],
)
def test_streams_that_there_are(text, stream, shown):
    assert is_stream(text)
    assert parse_stream(text) == stream
    assert str(parse_stream(text)) == shown
    assert stream.stdio == (text in ("fd:0", "fd:0,1", "-"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exec:", "names no command"),
        ("exec:  ", "names no command"),
        ("exec:a\0b", "names no command"),
        ("fd:", "is no stream"),
        ("fd:x", "is no stream"),
        ("fd:-1", "is no stream"),
        ("fd:1,2,3", "is no stream"),
        ("fd:2", "2 is stderr"),
        ("fd:0,2", "2 is stderr"),
    ],
)
def test_streams_that_there_are_not(text, why):
    with pytest.raises(UsageError, match=why):
        parse_stream(text)


def test_what_is_no_stream():
    assert not any(map(is_stream, ("tcp://a:1", "ipc:///x", "image:-", "", "--", "fd", "exec")))


def test_names_beside_the_peers_become_names_beside_ours():
    """What the receiver announces is what its host knows it by."""
    carried = Endpoint("ipc", path="@here", stands_for="@there")
    assert carried.sibling("ipc:@there.3") == Endpoint("ipc", path="@here.3")
    assert ends_of(["@here", "@here.3", "@here.2-64"], "@here") == ["", ".3", ".2-64"]
    for wrong in (["@other.1"], ["@here/x"], ["@here.1.2"], ["@here.65"], ["@here.x"]):
        with pytest.raises(RemoteProtocolError):
            ends_of(wrong, "@here")


def test_ranks():
    assert [rank_of(s) for s in (URGENT, ".3-64", CONTROL, BULK, ".63", ".1-0")] == [
        Rank.URGENT, Rank.URGENT, Rank.CONTROL, Rank.BULK, Rank.BULK, Rank.BULK]  # fmt: skip


# ---- the beginning -------------------------------------------------------------------------


def test_who_is_there():
    source, there = pair()
    assert (source.greeted, there.greeted) == ("@there", "")


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_text_before_it_is_skipped(step):
    """A login's banner, however it is cut; with bytes that look like the beginning."""
    source, there = End(dials=True), End(dials=False)
    banner = b"Welcome!\r\n\0pageferry-\0pageferry-stream\nLast login: \xff\0"
    data = banner + there.frame(0.0)
    for at in range(0, len(data), step):
        source.hear(data[at : at + step], 0.0)
    assert source.greeted == "@there"
    assert source.mux.heard().startswith("Welcome!")
    assert "\n" not in source.mux.heard()


def test_text_without_end():
    source = End(dials=True)
    line = b"no such file   \n"
    for _ in range(MOST_NOISE // len(line)):
        source.hear(line, 0.0)
    with pytest.raises(RemoteProtocolError, match=r"64 KiB .* not pageferry's: .*no such file"):
        source.hear(line, 0.0)
    assert len(source.mux.noise) <= MOST_NOISE


@pytest.mark.parametrize(("dials", "who"), [(True, "a source, or it gives back"), (False, "rec")])
def test_two_of_a_kind(dials, who):
    """`exec:cat` gives back what it gets."""
    end = End(dials=dials)
    with pytest.raises(RemoteProtocolError, match=who):
        end.hear(end.frame(0.0), 0.0)


def test_another_version(monkeypatch):
    monkeypatch.setattr(streams, "VERSION", 2)
    newer = End(dials=False).frame(0.0)
    monkeypatch.undo()
    with pytest.raises(PeerRefused, match="version 2") as e:
        End(dials=True).hear(newer, 0.0)
    assert e.value.data["field"] == "protocol"


def test_a_name_that_a_person_could_not_paste():
    with pytest.raises(RemoteProtocolError, match="cannot be shown"):
        End(dials=True).hear(Mux(dials=False, name="@a\x1b[2J").output(idle=True), 0.0)


def test_nothing_before_the_greeting():
    source = End(dials=True)
    with pytest.raises(LocalProtocolError):
        source.mux.open("")
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        source.hear(MAGIC + HEADER.pack(Kind.SEEN, 0, 0), 0.0)


def test_who_opens_connections_and_takes_no_answer_fills_no_memory(monkeypatch):
    monkeypatch.setattr(streams, "_MOST_OUT", 1 << 14)
    there = Mux(dials=False, name="@there")
    there.receive(Mux(dials=True).output(idle=True), 0.0)
    both = [HEADER.pack(kind, number, 0) for number in range(1, 1 << 11)
            for kind in (Kind.OPEN, Kind.CLOSE)]  # fmt: skip
    with pytest.raises(RemoteProtocolError, match="takes no answer"):
        there.receive(b"".join(both), 0.0)


# ---- what goes first -----------------------------------------------------------------------


def test_urgent_before_control_before_bulk_in_turn():
    source, there = pair()
    bulk, other, control, urgent = connect(source, there, ".0", ".1", CONTROL, URGENT)
    for number in (bulk, other, control):
        source.say(number, bytes(2 * CHUNK))
    order = [frames(source.frame(0.0))[0][1] for _ in range(3)]
    source.say(urgent, b"page")
    order += [frames(source.frame(0.0))[0][1] for _ in range(4)]
    assert order == [control, control, bulk, urgent, other, bulk, other]


def test_what_keeps_it_going_comes_before_everything():
    source, there = pair()
    (number,) = connect(source, there, BULK)
    source.say(number, bytes(WINDOW))
    there.say(number, bytes(CHUNK))
    there.hear(source.frame(0.0), 0.0)
    assert frames(there.frame(0.0)) == [(Kind.SEEN, 0, CHUNK)]
    assert frames(there.frame(0.0)) == [(Kind.DATA, number, CHUNK)]


def test_a_reader_that_takes_nothing_holds_up_nobody():
    source, there = pair()
    slow, quick = connect(source, there, ".0", ".1")
    there.slow.add(slow)
    for number in (slow, quick):
        source.say(number, bytes(2 * WINDOW))
    settle(source, there)
    assert len(there.got[slow]) == WINDOW
    assert len(there.got[quick]) == 2 * WINDOW
    there.slow.clear()
    there.take(slow)
    settle(source, there)
    assert len(there.got[slow]) == 2 * WINDOW


def test_bulk_under_way():
    """256 KiB that nobody has seen, as long as nothing is known of the link."""
    source, there = pair()
    bulk, other, urgent = connect(source, there, ".0", ".1", URGENT)
    for number in (bulk, other):
        source.say(number, bytes(WINDOW))
    source.say(urgent, b"page")
    sent = []
    while frame := source.frame(0.0):
        sent.append(frame)
    assert LEAST_BULK - CHUNK < sum(len(f) for f in sent[1:]) <= LEAST_BULK
    for frame in sent[:2]:
        there.hear(frame, 0.0)
    source.hear(there.frame(0.0), 0.0)  # one chunk was seen: room for another
    assert frames(source.frame(0.0))[0][0] is Kind.DATA
    assert not source.frame(0.0)


def link(*, urgent, rate, trip):
    """A Flow after three seconds of a link that is full: bytes a second, seconds."""
    flow, now, queue = streams.Flow(), 0.0, []
    flow.urgent = urgent
    seen = 0
    while now < 3.0:
        while flow.under_way + flow.chunk <= flow.limit:
            flow.went(flow.chunk, now)
        now += 0.001
        queue.append((now + trip, min(flow.sent, seen + round(rate * 0.001))))
        seen = queue[-1][1]
        while queue and queue[0][0] <= now:
            flow.was_seen(queue.pop(0)[1], now)
    return flow


def test_a_long_link_gets_what_its_round_trip_needs():
    """100 MB/s at 20 ms are 2 MB, under way twice; half a second's worth where nobody waits."""
    assert 3_000_000 < link(urgent=1, rate=1e8, trip=0.02).limit < 6_000_000
    assert streams.MOST_BULK >= link(urgent=0, rate=1e8, trip=0.02).limit > 30_000_000


def test_a_slow_link_has_no_more_in_it_than_half_a_second():
    """Or 256 KiB: the control link is behind it."""
    assert link(urgent=0, rate=1e6, trip=0.001).limit < 700_000
    for urgent in (0, 1):
        flow = link(urgent=urgent, rate=1e5, trip=0.001)
        assert (flow.limit, flow.chunk) == (LEAST_BULK, CHUNK)


def test_large_frames_where_the_link_is_fast_and_nobody_waits():
    assert link(urgent=0, rate=1e9, trip=0.0).chunk == LARGE_CHUNK
    assert link(urgent=1, rate=1e9, trip=0.0).chunk == CHUNK


# ---- the end -------------------------------------------------------------------------------


def test_closed_at_either_end():
    source, there = pair()
    one, other = connect(source, there, ".0", ".1")
    source.say(one, b"last words")
    there.hear(source.frame(0.0), 0.0)
    source.mux.close(one)
    there.mux.close(other)
    source.open |= {one, other}
    settle(source, there)
    assert there.got[one] == b"last words"
    assert (source.open, there.open) == ({one}, {other})
    assert source.mux.connections == there.mux.connections == 0


def test_what_comes_for_a_connection_that_was_closed_here_is_dropped():
    source, there = pair()
    (number,) = connect(source, there, BULK)
    source.say(number, bytes(CHUNK))
    frame = source.frame(0.0)
    there.mux.close(number)
    there.hear(frame, 0.0)
    settle(source, there)
    assert number not in there.got
    assert source.mux.connections == there.mux.connections == 0


def test_it_ends_as_it_is_meant_to():
    source, there = pair()
    source.mux.end("enough")
    source.mux.end("again")
    settle(source, there)
    assert there.left == "enough" and there.mux.left and source.mux.ended
    assert source.mux.choose() is None


# ---- all of it -----------------------------------------------------------------------------


@given(st.integers(0, 10**9))
@examples
def test_everything_arrives_once_and_in_order(seed):
    """Connections come and go, talk both ways, are read slowly; the stream cuts as it likes."""
    draw = random.Random(seed)
    source, there = pair()
    numbers = connect(source, there, "", ".64", ".0", ".1", ".2")
    said, on_the_way, now = {source: {}, there: {}}, {source: bytearray(), there: bytearray()}, 0.0
    for _ in range(300):
        now += draw.random() * 0.01
        end, other = draw.choice([(source, there), (there, source)])
        number = draw.choice(numbers)
        match draw.randrange(6):
            case 0:
                data = draw.randbytes(draw.choice([1, 100, CHUNK, 3 * CHUNK + 1]))
                said[end][number] = said[end].get(number, b"") + data
                end.say(number, data)
            case 1:
                end.slow ^= {number}
                if number not in end.slow:
                    end.take(number)
            case 2 | 3:
                on_the_way[other] += end.frame(now, idle=draw.random() < 0.5)
            case _:
                size = draw.choice([1, 15, 16, 100, 1 << 20])
                data, on_the_way[end] = on_the_way[end][:size], on_the_way[end][size:]
                end.hear(data, now)
    for end in (source, there):
        end.slow.clear()
        end.hear(on_the_way[end], now)
        for number in numbers:
            end.take(number)
    settle(source, there, now=now)
    assert there.got == said[source]
    assert source.got == said[there]


# ---- who lies ------------------------------------------------------------------------------

GREETING = End(dials=True).frame(0.0)
OPEN = HEADER.pack(Kind.OPEN, 1, 2) + b".0"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (HEADER.pack(9, 0, 0), "kind 9"),
        (GREETING.removeprefix(MAGIC), "GREETING on the stream, out of turn"),
        (HEADER.pack(Kind.OPEN, 0, 2) + b".0", "not the other end's to open"),
        (OPEN + OPEN, "not the other end's to open"),
        (HEADER.pack(Kind.OPEN, 1, 3) + b".65", "no connection named"),
        (HEADER.pack(Kind.OPEN, 1, 9) + b"/etc/x.sk", "no connection named"),
        (HEADER.pack(Kind.OPEN, 1, 2) + b"\xff\xff", "OPEN on the stream that is none"),
        (HEADER.pack(Kind.OPEN, 1, 1 << 40), "OPEN with"),
        (HEADER.pack(Kind.BYE, 0, 1 << 20), "BYE with"),
        (HEADER.pack(Kind.DATA, 1, 5), "never opened"),
        (OPEN + HEADER.pack(Kind.DATA, 1, 0), "no room"),
        (OPEN + HEADER.pack(Kind.DATA, 1, WINDOW + 1), "no room"),
        (OPEN + HEADER.pack(Kind.DATA, 1, 1 << 63), "no room"),
        (OPEN + HEADER.pack(Kind.CREDIT, 1, 1), "more was taken than was sent"),
        (HEADER.pack(Kind.CREDIT, 7, 1), "never opened"),
        (HEADER.pack(Kind.SEEN, 0, 1), "1 bytes were seen of 0"),
        (HEADER.pack(Kind.CLOSE, 3, 0), "never opened"),
        (OPEN + 2 * HEADER.pack(Kind.CLOSE, 1, 0), "closed twice"),
        (OPEN + HEADER.pack(Kind.CLOSE, 1, 0) + HEADER.pack(Kind.DATA, 1, 1), "no room"),
    ],
)
def test_a_source_that_breaks_the_protocol(data, why):
    there = End(dials=False)
    with pytest.raises(RemoteProtocolError, match=why):
        there.hear(GREETING + data, 0.0)


def test_a_receiver_opens_nothing():
    source = End(dials=True)
    with pytest.raises(RemoteProtocolError, match="not the other end's"):
        source.hear(End(dials=False).frame(0.0) + OPEN, 0.0)


def test_as_many_connections_as_there_can_be():
    source, there = pair()
    for _ in range(MAX_CONNECTIONS):
        assert source.mux.open(BULK)
    assert source.mux.open(BULK) == 0
    settle(source, there)
    with pytest.raises(RemoteProtocolError, match="connections over one stream"):
        there.hear(HEADER.pack(Kind.OPEN, MAX_CONNECTIONS + 1, 2) + b".0", 0.0)


@given(st.lists(st.one_of(
    st.binary(max_size=40),
    st.tuples(st.sampled_from([0, *Kind, 9]), st.integers(0, 4), st.integers(0, 70)).map(
        lambda head: HEADER.pack(*head)),
    st.sampled_from([OPEN, b".0", MAGIC, bytes(64)]),
), max_size=30))  # fmt: skip
@examples
def test_whatever_comes_is_an_error_of_ours_or_bounded(pieces):
    there = End(dials=False)
    there.hear(GREETING, 0.0)
    try:
        for piece in pieces:
            there.hear(piece, 0.0)
            there.frame(0.0)
    except (RemoteProtocolError, PeerRefused):
        pass
    assert there.mux.connections <= MAX_CONNECTIONS
    assert len(there.mux._head) <= 8192


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ssh -o BatchMode=yes there sudo -n pageferry receive --into demo: -",
         "'exec:ssh -o BatchMode=yes there sudo -n pageferry relay ipc://@pageferry-1-ab'"),
        ("ssh there 'cd /srv && pageferry  receive --into demo: -'", None),
        ("ssh there pageferry relay ipc:///run/p.sock", ""),
        ("socat - OPENSSL:there:4444", "'exec:ssh HOST pageferry relay ipc://@pageferry-1-ab'"),
        ("", "'exec:ssh HOST pageferry relay ipc://@pageferry-1-ab'"),
    ],
)  # fmt: skip
def test_how_a_postcopy_whose_stream_broke_goes_on(command, words):
    """By the command that there was, if it can be told what it runs; a shell takes it as it is."""
    found = recover_words(Stream(command, 5), "@pageferry-1-ab")
    if words is None:
        assert shlex.split(found) == ["exec:ssh there 'cd /srv && pageferry relay "
                                      "ipc://@pageferry-1-ab'"]  # fmt: skip
    else:
        assert found == words
    for evil in ("@x'; rm -rf ~ '", "", "@a b", "@" + "x" * 300):
        with pytest.raises(UsageError):
            recover_words(Stream(command, 5), evil)


@pytest.mark.parametrize("command", [
    """ssh there 'sudo sh -c "pageferry receive --into demo: -"'""",
    """ssh there "sudo -u 'me' sh -c 'pageferry receive --into demo: -'\"""",
    """ssh there 'cd "/a b"; pageferry receive --into "x" -'""",
])  # fmt: skip
def test_quotes_within_quotes_are_closed_too(command):
    """The shell there reads them."""
    command = shlex.split(recover_words(Stream(command), "@pf-1"))[0].removeprefix("exec:")
    ssh, there, remote = shlex.split(command)
    (last,) = shlex.split(remote)[-1:]
    assert (ssh, there) == ("ssh", "there") and last.endswith("ipc://@pf-1")


def test_the_line_that_goes_on_is_one_for_a_shell():
    """A monitor may be anywhere."""
    carriage = Carriage()
    carriage.peer, carriage.monitor = "@pf-1", "/run/a b/$x.sock"
    carriage._stream = Stream("ssh there pageferry receive -")
    line = carriage.recovery().partition("`")[2].partition("`")[0]
    assert shlex.split(line) == [
        "pageferry", "recover", "/run/a b/$x.sock", "exec:ssh there pageferry relay ipc://@pf-1",
    ]  # fmt: skip
