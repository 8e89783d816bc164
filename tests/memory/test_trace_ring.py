"""A trace ring: in whatever order writer and reader move, only what is counted is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.workers import trace_records
from pageferry.workers.counters import Counters
from pageferry.workers.trace_records import RECORD, Kind
from pageferry.workers.tracing import Rings

CAPACITY = 8


@pytest.fixture(scope="module")
def rings():
    made = Rings(2, CAPACITY)
    yield made
    made.close()


def numbers(data):
    return [record[trace_records.FIELDS.index("number")] for record in RECORD.iter_unpack(data)]


STEPS = st.lists(
    st.one_of(st.tuples(st.just("write"), st.integers(1, 12)),
              st.tuples(st.sampled_from(["look", "next writer", "next reader"]), st.just(0))),
    max_size=40,
)  # fmt: skip


@given(STEPS)
def test_only_what_is_counted_is_lost(rings, steps):
    """In order, once, and a record that found no room is one that was counted."""
    writer, reader = rings.writer(0), rings.reader(0)
    reader.take(ended=True)
    before = reader.dropped
    written, got, room = [], [], CAPACITY
    for step, many in steps:
        if step == "write":
            for _ in range(many):
                dropped = reader.dropped
                number = len(written) + reader.dropped - before
                writer.add(Kind.FRAME, 1, number=number)
                if reader.dropped == dropped:
                    written.append(number)
        elif step == "look":
            got += numbers(reader.take())
        elif step == "next writer":  # the process was another one's successor
            writer = rings.writer(0)
        else:  # and so was its reader, after the last one read to the end
            got += numbers(reader.take(ended=True))
            reader = rings.reader(0)
        assert len(written) - len(got) <= room
        assert got == written[: len(got)]
    got += numbers(reader.take(ended=True))
    assert got == written


def test_a_record_is_believed_a_look_later(rings):
    """What head was at a look is read at the next; what was copied is given back at the next."""
    writer, reader = rings.writer(1), rings.reader(1)
    dropped = reader.dropped
    for number in range(CAPACITY):
        writer.add(Kind.READ, 1, number=number)
    assert numbers(reader.take()) == []
    writer.add(Kind.READ, 1)
    assert reader.dropped == dropped + 1  # full
    assert numbers(reader.take()) == list(range(CAPACITY))
    writer.add(Kind.READ, 1)
    assert reader.dropped == dropped + 2  # not given back yet
    assert numbers(reader.take()) == []
    writer.add(Kind.READ, 1, number=99)
    assert reader.dropped == dropped + 2
    assert numbers(reader.take(ended=True)) == [99]


def test_rings_do_not_meet(rings):
    one, other = rings.writer(0), rings.writer(1)
    readers = rings.reader(0), rings.reader(1)
    for _ in range(CAPACITY):
        one.add(Kind.READ, 1, block=(1 << 32) - 1, page=(1 << 64) - 1, number=1)
        other.add(Kind.READ, 1, number=2)
    assert numbers(readers[0].take(ended=True)) == [1] * CAPACITY
    assert numbers(readers[1].take(ended=True)) == [2] * CAPACITY


def test_durations_are_not_negative(rings):
    writer, reader = rings.writer(0), rings.reader(0)
    writer.add(Kind.READ, 1)
    ((begin, took, *_),) = RECORD.iter_unpack(reader.take(ended=True))
    assert begin == 1 and took > 0


def test_without_a_recorder_there_is_no_ring():
    counters = Counters(1)
    assert counters.ring(0) is None
    counters.close()
