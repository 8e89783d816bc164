"""One channel, both halves: frames delivered, dropped, corrupted, repeated, in any order."""

import copy
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pageferry.transport.channel import (
    ACK_EVERY,
    MAX_IN_FLIGHT,
    Acked,
    Lost,
    ReceivingChannel,
    SendingChannel,
    Synced,
)
from pageferry.transport.errors import LocalProtocolError, PeerLost, RemoteProtocolError
from pageferry.transport.pages import NO_RUNS, PAGE_SIZE
from pageferry.transport.wire import Frame, Kind, decode, encode_control, encode_data


def run(start, count):
    if count == 0:
        return NO_RUNS
    return np.array([start], np.int64), np.array([count], np.int64)


def data_frame(seq, round_=1, zero=0, raw=1):
    """A DATA frame of `zero` zero pages and `raw` pages, and its payload."""
    payload = bytes([seq % 251 + 1]) * (raw * PAGE_SIZE)
    frame = Frame(Kind.DATA, seq, round_, zero=run(0, zero), raw=run(zero, raw))
    return encode_data(frame, [payload] if payload else []), payload


def ack(first, last, kind=Kind.ACK, round_=1):
    return encode_control(Frame(kind, first, round_, last=last))


def state_of(half):
    """Everything a half remembers, for before-and-after comparisons."""
    return copy.deepcopy(vars(half))


def refused(half, error, method, *arguments):
    """`half` refuses with `error`, and nothing about it changes."""
    before = state_of(half)
    with pytest.raises(error):
        getattr(half, method)(*arguments)
    assert state_of(half) == before


class Pair:
    """Both halves with nothing between them, for tests that need no model."""

    def __init__(self, credit=1 << 20):
        self.sender = SendingChannel(credit)
        self.receiver = ReceivingChannel()

    def send(self, token, **content):
        """One frame, recorded as sent: its meta and payload, to be delivered or not."""
        meta, payload = data_frame(self.sender.next_seq(), self.sender.round, **content)
        self.sender.sent(token, len(meta) + len(payload), decode(meta).page_total)
        return meta, payload

    def deliver(self, meta, payload=b""):
        """Deliver and place at once, as a receiver does; True if there was something to place."""
        data = self.receiver.receive(meta, payload)
        if data is not None:
            self.receiver.placed(data.frame)
        return data is not None

    def answer(self, *, idle=True):
        """All answers of the receiver, and what they mean to the sender."""
        return [
            event
            for answer in self.receiver.answers(idle=idle)
            for event in self.sender.receive(answer)
        ]

    def barrier(self):
        self.deliver(self.sender.sync())
        return self.answer()


# ---- one thing at a time -------------------------------------------------------------------


def test_a_round_in_which_nothing_goes_wrong():
    """Frames, acknowledgements in order, barrier, next round."""
    pair = Pair()
    for token in ("a", "b", "c"):
        assert pair.deliver(*pair.send(token))
    assert not pair.sender.idle
    assert pair.answer() == [Acked("a"), Acked("b"), Acked("c")]
    assert pair.sender.idle and pair.sender.in_flight == 0
    assert pair.barrier() == [Synced(1)]
    assert (pair.sender.round, pair.receiver.round) == (2, 2)
    pair.deliver(*pair.send("d"))
    assert pair.answer() == [Acked("d")]
    assert pair.receiver.lost == 0


def test_a_round_without_frames_has_a_barrier_too():
    """Counts of nothing agree."""
    pair = Pair()
    assert pair.barrier() == [Synced(1)]
    assert pair.barrier() == [Synced(2)]


def test_acknowledgements_wait_for_company_unless_nothing_else_comes():
    """With more to read, every ACK_EVERY frames; at once when idle."""
    pair = Pair()
    for i in range(ACK_EVERY - 1):
        pair.deliver(*pair.send(i))
        assert pair.receiver.answers(idle=False) == []
    pair.deliver(*pair.send("last"))
    assert len(pair.receiver.answers(idle=False)) == 1
    pair.deliver(*pair.send("alone"))
    assert pair.receiver.answers(idle=False) == []
    assert len(pair.receiver.answers(idle=True)) == 1


def test_a_dropped_frame_shows_when_the_next_one_comes():
    """The gap is named; what came before and behind it is acknowledged."""
    pair = Pair()
    pair.deliver(*pair.send("a"))
    pair.send("dropped 1")
    pair.send("dropped 2")
    assert pair.answer() == [Acked("a")]
    pair.deliver(*pair.send("b"))
    assert pair.answer() == [Lost("dropped 1"), Lost("dropped 2"), Acked("b")]
    assert pair.receiver.lost == 2
    assert pair.barrier() == [Synced(1)]


def test_a_damaged_payload_is_told_at_once():
    """Its meta is whole, so its number is known."""
    pair = Pair()
    meta, payload = pair.send("a")
    assert not pair.deliver(meta, payload[:-1] + b"\0")
    assert pair.answer() == [Lost("a")]
    assert pair.receiver.lost == 1


def test_a_damaged_meta_is_told_with_the_next_frame():
    """Nobody knows which frame it was, until the gap shows."""
    pair = Pair()
    meta, payload = pair.send("a")
    assert not pair.deliver(b"\xff" + meta[1:], payload)
    assert pair.answer() == []
    pair.deliver(*pair.send("b"))
    assert pair.answer() == [Lost("a"), Acked("b")]


def test_everything_placed_is_told_before_the_barrier_is_answered():
    """Or the sender would compare counts that lack the last acknowledgement."""
    receiver = ReceivingChannel()
    receiver.placed(receiver.receive(*data_frame(0)).frame)
    assert receiver.receive(encode_control(Frame(Kind.SYNC, 1, 1, frames=1, pages=1))) is None
    kinds = [decode(answer).kind for answer in receiver.answers(idle=False)]
    assert kinds == [Kind.ACK, Kind.SYNC_ACK]


def test_pages_are_counted_in_the_barrier():
    """Zero pages and pages with content alike, lost ones not."""
    pair = Pair()
    pair.deliver(*pair.send("a", zero=3, raw=2))
    meta, payload = pair.send("lost", zero=9, raw=1)
    pair.deliver(meta, payload[1:])
    assert pair.answer() == [Acked("a"), Lost("lost")]
    sync = decode(pair.sender.sync())
    assert (sync.kind, sync.round, sync.frames, sync.pages) == (Kind.SYNC, 1, 1, 5)


@pytest.mark.parametrize("size", [60, 5000, 1 << 22])
def test_frames_go_out_until_credit_is_used_up(size):
    """One frame is always allowed; small ones are bounded by their number as well."""
    sender = SendingChannel(credit=4 << 20)
    sent = 0
    while sender.may_send(size):
        sender.sent(sent, size, 1)
        sent += 1
    assert sent == min(max(1, (4 << 20) // size), MAX_IN_FLIGHT)
    assert sender.in_flight == sent * size
    sender.receive(ack(0, 0))
    assert sender.may_send(size)


def test_a_frame_larger_than_credit_goes_alone():
    """Or it would never go."""
    sender = SendingChannel(credit=100)
    assert sender.may_send(1000)
    sender.sent("large", 1000, 1)
    assert not sender.may_send(0)
    assert sender.receive(ack(0, 0)) == [Acked("large")]
    assert sender.may_send(1000)


def test_more_frames_than_anybody_may_have_in_flight():
    """Sending without asking is our bug, and it is said."""
    sender = SendingChannel(credit=1 << 40)
    for i in range(MAX_IN_FLIGHT):
        sender.sent(i, 0, 1)
    refused(sender, LocalProtocolError, "sent", "one more", 0, 1)


def test_no_barrier_while_frames_are_in_flight_and_none_in_a_barrier():
    """Illegal orders of ours raise and change nothing."""
    pair = Pair()
    frame = pair.send("a")
    refused(pair.sender, LocalProtocolError, "sync")
    pair.deliver(*frame)
    pair.answer()
    sync = pair.sender.sync()
    refused(pair.sender, LocalProtocolError, "sync")
    refused(pair.sender, LocalProtocolError, "sent", "b", 1, 1)
    pair.deliver(sync)
    assert pair.answer() == [Synced(1)]


def test_a_barrier_or_its_answer_that_is_lost_is_said_again():
    """Each is answered, with the same counts, until the next frame; more answers than that are
    illegal."""
    pair = Pair()
    pair.deliver(*pair.send("a"))
    pair.answer()
    lost = pair.sender.sync()
    assert pair.sender.sync_again() == lost
    pair.deliver(lost)
    assert len(pair.receiver.answers(idle=True)) == 1  # lost as well
    pair.deliver(pair.sender.sync_again())
    pair.deliver(lost)
    first, second = pair.receiver.answers(idle=True)
    assert first == second
    assert pair.sender.receive(first) == [Synced(1)]
    refused(pair.sender, LocalProtocolError, "sync_again")
    after = pair.sender.sync()
    pair.deliver(after)
    assert pair.sender.receive(second) == []
    assert pair.answer() == [Synced(2)]
    refused(pair.sender, RemoteProtocolError, "receive", second)
    refused(pair.receiver, RemoteProtocolError, "receive", lost)
    pair.deliver(*pair.send("b"))
    refused(pair.receiver, RemoteProtocolError, "receive", after)


@pytest.mark.parametrize("kind", [Kind.ACK, Kind.NACK])
def test_an_answer_settles_each_frame_once(kind):
    """Ranges may overlap; what is settled stays settled."""
    sender = SendingChannel(credit=1 << 20)
    for token in "abcd":
        sender.sent(token, 10, 1)
    event = Acked if kind is Kind.ACK else Lost
    assert sender.receive(ack(0, 2, kind)) == [event("a"), event("b"), event("c")]
    assert sender.receive(ack(0, 2, kind)) == []
    assert sender.receive(ack(0, 3, Kind.ACK)) == [Acked("d")]
    assert sender.in_flight == 0 and sender.idle


def test_an_answer_that_was_lost_shows_in_the_next():
    """Acknowledgements come in order; what the lost one said is not known. A NACK may pass one
    that waits for company, and says nothing of what is before it."""
    sender = SendingChannel(credit=1 << 20)
    for token in "abc":
        sender.sent(token, 10, 1)
    assert sender.receive(ack(1, 1, Kind.NACK)) == [Lost("b")]
    refused(sender, PeerLost, "receive", ack(2, 2))
    assert sender.receive(ack(0, 0)) == [Acked("a")]
    assert sender.receive(ack(2, 2)) == [Acked("c")]


def test_an_empty_frame_shows_that_the_last_one_was_lost():
    """It is numbered, placed and counted as any, and needs no credit."""
    sender, receiver = SendingChannel(credit=1), ReceivingChannel()
    sender.sent("lost", 10_000, 1)
    assert not sender.may_send(1) and sender.may_probe()
    meta = encode_data(Frame(Kind.DATA, sender.next_seq(), sender.round))
    sender.sent("probe", 0, 0)
    receiver.placed(receiver.receive(meta).frame)
    events = [e for answer in receiver.answers(idle=True) for e in sender.receive(answer)]
    assert events == [Lost("lost"), Acked("probe")]
    receiver.receive(sender.sync())
    assert not sender.may_probe()
    (answer,) = receiver.answers(idle=True)
    assert sender.receive(answer) == [Synced(1)]


def test_illegal_answers_change_nothing():
    """A frame never sent, a range turned round, a kind that only a source says, damage."""
    sender = SendingChannel(credit=1 << 20)
    sender.sent("a", 10, 2)
    sender.sent("b", 10, 2)
    for meta in (
        ack(0, 2),
        ack(0, 2**64 - 1),
        ack(2, 2, Kind.NACK),
        ack(1, 0),
        ack(0, 0, Kind.SYNC_ACK),
        ack(0, 0, Kind.SYNC),
        data_frame(0)[0],
        ack(0, 0)[:-1],
        b"",
    ):
        refused(sender, RemoteProtocolError, "receive", meta)
    assert sender.receive(ack(0, 1)) == [Acked("a"), Acked("b")]


def test_a_barrier_whose_counts_differ_is_refused():
    """One frame or page more or less, or another round."""
    sender = SendingChannel(credit=1 << 20)
    sender.sent("a", 10, 2)
    sender.receive(ack(0, 0))
    good = replace(decode(sender.sync()), kind=Kind.SYNC_ACK)
    assert (good.frames, good.pages, good.round) == (1, 2, 1)
    for change in ({"frames": 0}, {"frames": 2}, {"pages": 1}, {"pages": 3}, {"round": 2}):
        refused(sender, RemoteProtocolError, "receive", encode_control(replace(good, **change)))
    assert sender.receive(encode_control(good)) == [Synced(1)]
    refused(sender, RemoteProtocolError, "receive", encode_control(good))


def test_the_receiver_refuses_what_cannot_come():
    """Repeated frames, frames of another round, answers: raised, and nothing changes."""
    pair = Pair()
    first, second = pair.send("a"), pair.send("b")
    pair.deliver(*first)
    pair.deliver(*second)
    for meta, payload in (
        first,
        second,
        data_frame(2, round_=2),
        data_frame(2, round_=0),
        data_frame(9, round_=2),
        (encode_control(Frame(Kind.SYNC, 2, 2)), b""),
        (encode_control(Frame(Kind.SYNC, 1, 1)), b""),
        (ack(0, 0), b""),
        (ack(0, 0, Kind.NACK), b""),
        (ack(0, 0, Kind.SYNC_ACK), b""),
        *((ack(2, 2, kind), b"") for kind in (Kind.ACK, Kind.NACK, Kind.SYNC_ACK)),
    ):
        refused(pair.receiver, RemoteProtocolError, "receive", meta, payload)
    pair.answer()
    assert pair.barrier() == [Synced(1)]
    refused(pair.receiver, RemoteProtocolError, "receive", *data_frame(3, round_=1))


def test_no_more_can_be_lost_than_was_in_flight():
    """A number far ahead is no gap: what was lost is counted, in 64 bits."""
    receiver = ReceivingChannel()
    for seq in (MAX_IN_FLIGHT + 1, 2**64 - 1):
        refused(receiver, RemoteProtocolError, "receive", *data_frame(seq))
        refused(receiver, RemoteProtocolError, "receive", encode_control(Frame(Kind.SYNC, seq, 1)))
    assert receiver.receive(*data_frame(MAX_IN_FLIGHT)) is not None
    assert receiver.lost == MAX_IN_FLIGHT


# ---- anything at any time ------------------------------------------------------------------


@dataclass
class InModel:
    """What the model knows about a frame it sent."""

    token: int
    size: int
    pages: int
    meta: bytes
    payload: bytes
    fate: str = "under way"  # or "dropped", "placed"


class ChannelMachine(RuleBasedStateMachine):
    """Both halves, a wire in each direction that keeps the order, and a model of the truth."""

    @initialize(credit=st.sampled_from([1, 9000, 30_000, 1 << 20]))
    def begin(self, credit):
        self.sender = SendingChannel(credit)
        self.receiver = ReceivingChannel()
        self.down = deque()  # (seq or None for a barrier, meta, payload)
        self.up = deque()
        self.sent = {}  # seq -> InModel, of all rounds
        self.outstanding = {}  # token -> InModel
        self.to_place = deque()
        self.heard = []
        self.events = []
        self.in_barrier = False
        self.again = False  # a barrier was said again
        self.round_frames = self.round_pages = 0

    # ---- what the two ends do

    @rule(zero=st.integers(0, 3), raw=st.integers(0, 2))
    def send(self, zero, raw):
        raw = raw or int(zero == 0)
        seq, token = self.sender.next_seq(), len(self.sent)
        meta, payload = data_frame(seq, self.sender.round, zero, raw)
        size = len(meta) + len(payload)
        if self.in_barrier:
            refused(self.sender, LocalProtocolError, "sent", token, size, zero + raw)
            return
        if not self.sender.may_send(size):
            assert self.outstanding and self.sender.in_flight + size > self.sender.credit
            return
        self.sender.sent(token, size, zero + raw)
        self.sent[seq] = self.outstanding[token] = InModel(token, size, zero + raw, meta, payload)
        self.down.append((seq, meta, payload))

    @rule()
    def barrier(self):
        if self.outstanding or self.in_barrier:
            refused(self.sender, LocalProtocolError, "sync")
            return
        self.down.append((None, self.sender.sync(), b""))
        self.in_barrier = True

    @rule()
    def barrier_again(self):
        if not self.in_barrier:
            refused(self.sender, LocalProtocolError, "sync_again")
            return
        self.down.append((None, self.sender.sync_again(), b""))
        self.again = True

    @precondition(lambda self: self.in_barrier and self.down)
    @rule()
    def lose_a_barrier(self):
        seq, _, _ = self.down.popleft()
        assert seq is None

    @precondition(lambda self: self.in_barrier and self.up)
    @rule()
    def lose_a_barriers_answer(self):
        assert decode(self.up.popleft()).kind is Kind.SYNC_ACK

    @precondition(lambda self: self.down)
    @rule()
    def deliver(self):
        seq, meta, payload = self.down.popleft()
        data = self.receiver.receive(meta, payload)
        assert (data is None) == (seq is None)
        if data is not None:
            assert data.frame.seq == seq
            self.to_place.append(data.frame)

    @precondition(lambda self: self.to_place)
    @rule()
    def place(self):
        frame = self.to_place.popleft()
        self.receiver.placed(frame)
        self.sent[frame.seq].fate = "placed"

    @rule(idle=st.booleans())
    def answer(self, idle):
        self.up.extend(self.receiver.answers(idle=idle))
        assert self.receiver.answers(idle=False) == []

    @precondition(lambda self: self.up)
    @rule()
    def hear(self):
        meta = self.up.popleft()
        for event in self.sender.receive(meta):
            self.settle(event)
        self.heard.append(meta)

    def settle(self, event):
        if isinstance(event, Synced):
            assert self.in_barrier and not self.outstanding and not self.to_place
            self.in_barrier = False
            self.round_frames = self.round_pages = 0
            return
        record = self.outstanding.pop(event.token)  # KeyError: settled twice
        if isinstance(event, Acked):
            assert record.fate == "placed"
            self.round_frames += 1
            self.round_pages += record.pages
        else:
            assert isinstance(event, Lost) and record.fate == "dropped"

    # ---- what goes wrong between them

    @precondition(lambda self: self.down and self.down[0][0] is not None)
    @rule()
    def drop(self):
        seq, _, _ = self.down.popleft()
        self.sent[seq].fate = "dropped"

    @precondition(lambda self: self.down and self.down[0][0] is not None)
    @rule(data=st.data())
    def corrupt(self, data):
        """A bit flips in the meta or in the payload; then the frame arrives."""
        seq, meta, payload = self.down.popleft()
        parts = [bytearray(meta), bytearray(payload)]
        part = parts[data.draw(st.integers(0, 1)) if payload else 0]
        bit = data.draw(st.integers(0, 8 * len(part) - 1))
        part[bit // 8] ^= 1 << bit % 8
        assert self.receiver.receive(bytes(parts[0]), bytes(parts[1])) is None
        self.sent[seq].fate = "dropped"

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data):
        """A frame that already came, comes again."""
        waiting = {seq for seq, _, _ in self.down}
        gone = sorted(seq for seq in self.sent if seq not in waiting)
        # one dropped behind the last delivered may still come: it did not come before
        gone = [seq for seq in gone if self.sent[seq].fate == "placed"]
        if gone:
            record = self.sent[data.draw(st.sampled_from(gone))]
            refused(self.receiver, RemoteProtocolError, "receive", record.meta, record.payload)

    @rule(step=st.sampled_from([-1, 1, 2]), ahead=st.integers(0, 3))
    def frame_of_another_round(self, step, ahead):
        round_ = self.receiver.round + step
        meta, payload = data_frame(self.sender.next_seq() + ahead, round_)
        refused(self.receiver, RemoteProtocolError, "receive", meta, payload)

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def answer_again(self, data):
        """An old answer settles nothing a second time; an old barrier is refused."""
        meta = data.draw(st.sampled_from(self.heard))
        if decode(meta).kind is Kind.SYNC_ACK and self.again:
            return  # it may come again
        if decode(meta).kind is Kind.SYNC_ACK:
            refused(self.sender, RemoteProtocolError, "receive", meta)
        else:
            before = state_of(self.sender)
            assert self.sender.receive(meta) == []
            assert state_of(self.sender) == before

    @rule(kind=st.sampled_from([Kind.ACK, Kind.NACK]), ahead=st.integers(0, 3))
    def answer_ahead(self, kind, ahead):
        meta = ack(0, self.sender.next_seq() + ahead, kind)
        refused(self.sender, RemoteProtocolError, "receive", meta)

    @rule(frames=st.integers(-1, 1), pages=st.integers(-1, 1))
    def false_barrier(self, frames, pages):
        """Answers to a barrier that nobody asked for, or with other counts."""
        if self.in_barrier and frames == pages == 0:
            return
        meta = encode_control(
            Frame(
                Kind.SYNC_ACK,
                self.sender.next_seq(),
                self.sender.round,
                frames=max(0, self.round_frames + frames) if frames >= 0 else 2**63,
                pages=max(0, self.round_pages + pages) if pages >= 0 else 2**63,
            )
        )
        refused(self.sender, RemoteProtocolError, "receive", meta)

    # ---- what always holds

    @invariant()
    def sender_remembers_exactly_what_is_unsettled(self):
        records = self.outstanding.values()
        assert self.sender.in_flight == sum(record.size for record in records)
        assert self.sender.idle == (not self.outstanding)
        assert self.sender.in_flight <= self.sender.credit or len(records) == 1

    @invariant()
    def rounds_stay_together(self):
        ahead = self.receiver.round - self.sender.round
        assert ahead == 0 or (ahead == 1 and self.in_barrier)

    def teardown(self):
        """Whatever happened: let everything arrive, and every token comes back, once."""
        if not hasattr(self, "sender"):
            return
        self.drain()
        # a gap at the end shows when something follows
        if self.outstanding:
            assert {record.fate for record in self.outstanding.values()} == {"dropped"}
            meta, payload = data_frame(self.sender.next_seq(), self.sender.round)
            seq, token = self.sender.next_seq(), len(self.sent)
            self.sender.sent(token, 1, 1)
            self.sent[seq] = self.outstanding[token] = InModel(token, 1, 1, meta, payload)
            self.down.append((seq, meta, payload))
            self.drain()
        assert not self.outstanding
        lost = sum(record.fate == "dropped" for record in self.sent.values())
        assert self.receiver.lost == lost
        if self.in_barrier:
            self.barrier_again()
        else:
            self.barrier()
        self.drain()
        assert not self.in_barrier
        assert self.sender.round == self.receiver.round

    def drain(self):
        while self.down or self.to_place or self.up:
            while self.down:
                self.deliver()
            while self.to_place:
                self.place()
            self.answer(idle=True)
            while self.up:
                self.hear()
        self.answer(idle=True)
        while self.up:
            self.hear()


ChannelMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestChannel = ChannelMachine.TestCase
