"""Trace records as Chrome trace events: whatever they hold, what comes out can be read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.pipeline import trace_events
from pageferry.workers.trace_records import FIELDS, RECORD, SPECS, Kind, Shape

WORD = st.integers(0, (1 << 64) - 1)
HALF = st.integers(0, (1 << 32) - 1)
KINDS = st.one_of(st.sampled_from(list(Kind)).map(int), HALF)
RECORDS = st.lists(
    st.tuples(WORD, WORD, KINDS, HALF, WORD, WORD, WORD, WORD, WORD), max_size=20
)  # fmt: skip
TEXT = st.text(max_size=20)
FACTS = st.dictionaries(st.text(min_size=1, max_size=8), st.one_of(TEXT, WORD, st.booleans()))


def read(events):
    """As a file with these events is read."""
    text = trace_events.BEGIN_FILE + trace_events.BETWEEN.join(events) + trace_events.END_FILE
    return json.loads(text)


def packed(records):
    return b"".join(RECORD.pack(*record) for record in records)


@given(RECORDS, st.integers(1, 1 << 22), TEXT, st.integers(0, 1 << 60))
def test_any_records_become_events_that_can_be_read(records, pid, scope, first_id):
    events = read(trace_events.worker_events(packed(records), pid, scope, first_id))
    known = [dict(zip(FIELDS, r, strict=True)) for r in records if r[2] in set(Kind)]
    shown = [event for event in events if event["ph"] in "Xib"]
    assert len(shown) == len(known)
    for event, record in zip(shown, known, strict=True):
        spec = SPECS[Kind(record["kind"])]
        assert (event["name"], event["cat"], event["ph"]) == (
            spec.name, spec.category, spec.shape.value,
        )  # fmt: skip
        assert event["pid"] == event["tid"] == pid
        assert event["ts"] == pytest.approx(record["begin"] / 1000)
        assert event["args"] == {shown: record[field] for field, shown in spec.arguments}
        if spec.shape is Shape.SPAN:
            assert event["dur"] == pytest.approx(record["took"] / 1000) and event["dur"] >= 0
    begun = {(e["id"], e["name"], e["cat"]): e["ts"] for e in events if e["ph"] == "b"}
    ended = {(e["id"], e["name"], e["cat"]): e["ts"] for e in events if e["ph"] == "e"}
    assert begun.keys() == ended.keys() and len(begun) == sum(e["ph"] == "b" for e in events)
    assert all(ended[key] >= begun[key] for key in begun)
    for event in events:
        if "id" in event:
            assert 0 <= int(event["id"], 16) < 1 << 64


@given(st.binary(max_size=300))
def test_garbage_is_left_out(records):
    events = read(trace_events.worker_events(records, 1, ""))
    assert len(events) <= 2 * (len(records) // RECORD.size)


@given(TEXT, TEXT, st.integers(0, 1 << 63), st.integers(1, 9), FACTS)
def test_what_coordinators_say_is_quoted(name, category, ns, line, facts):
    made = (trace_events.begins, trace_events.mark, trace_events.ends)
    events = read([make(name, category, ns, 7, line, facts) for make in made])
    assert [event["ph"] for event in events] == ["B", "i", "E"]
    for event in events:
        assert (event["name"], event["cat"], event["pid"], event["tid"]) == (
            name,
            category,
            7,
            line,
        )
        assert event["args"] == facts
        assert event["ts"] == pytest.approx(ns / 1000)


def test_arrows_go_from_request_to_install():
    pages = [RECORD.pack(5000, 10, kind, 2, 77, 1, 0, 3, 0)
             for kind in (Kind.REQUEST, Kind.ANSWER, Kind.INSTALL)]  # fmt: skip
    events = read(trace_events.worker_events(b"".join(pages), 1, "uuid"))
    arrows = [event for event in events if event["ph"] in "stf"]
    assert [event["ph"] for event in arrows] == ["s", "t", "f"]
    (key,) = {event["id"] for event in arrows}
    assert int(key, 16) == trace_events.page_id("uuid", 2, 77)
    assert len({trace_events.page_id(s, b, p) for s in "xy" for b in (0, 1) for p in (0, 1)}) == 8
    assert arrows[2]["bp"] == "e"


def test_times_keep_all_their_digits():
    """A double has not enough for nanoseconds of a host that runs for a year."""
    year = 365 * 24 * 3600 * 10**9 + 123
    assert trace_events.microseconds(year) == "31536000000000.123"
    assert '"ts":31536000000000.123' in trace_events.mark("x", "y", year, 1, 1, {})


def test_every_kind_has_a_row():
    assert set(SPECS) == set(Kind)
    assert len({(spec.name, spec.category) for spec in SPECS.values()}) == len(SPECS)
