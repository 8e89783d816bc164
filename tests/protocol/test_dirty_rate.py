"""Dirty rates: what is asked, the working set as a curve, and what is said of it."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.dirty_rate import (
    Asked,
    Cost,
    Look,
    Measurement,
    WorkingSet,
    asked,
    information,
    margin,
    sampled,
    together,
    unfinished,
)
from pageferry.transport.errors import UsageError

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)
GIB_PAGES = (1 << 30) // 4096


def curve(*looks, total=100_000):
    return WorkingSet(total, tuple(Look(t, n) for t, n in looks))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs calc-time"),
        ({"calc-time": "1"}, "calc-time must be a whole number"),
        ({"calc-time": True}, "calc-time must be a whole number"),
        ({"calc-time": 0}, "from 50 ms to 60 s"),
        ({"calc-time": 61}, "from 50 ms to 60 s"),
        ({"calc-time": 49, "calc-time-unit": "millisecond"}, "from 50 ms to 60 s"),
        ({"calc-time": 1, "calc-time-unit": "hour"}, "calc-time-unit is second or millisecond"),
        ({"calc-time": 1, "mode": "dirty-ring"}, "take dirty-bitmap"),
        ({"calc-time": 1, "mode": "guess"}, "mode is page-sampling or dirty-bitmap"),
        ({"calc-time": 1, "mode": 7}, "mode is page-sampling or dirty-bitmap"),
        ({"calc-time": 1, "sample-pages": 127}, "from 128 to 16384"),
        ({"calc-time": 1, "sample-pages": 512, "mode": "dirty-bitmap"}, "leave it out"),
        ({"calc-time": 1, "calc": 1}, "has no argument 'calc'"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(arguments, said):
    with pytest.raises(UsageError, match=said):
        asked(arguments)


def test_what_is_asked_in_qemus_words():
    assert asked({"calc-time": 2}) == Asked(2.0, "page-sampling")
    found = asked({"calc-time": 250, "calc-time-unit": "millisecond", "sample-pages": 1024})
    assert (found.seconds, found.sample_pages) == (0.25, 1024)


def test_a_sample_is_qemus_and_in_a_small_guest_enough():
    assert sampled(GIB_PAGES, 512) == 512
    assert sampled(3 * GIB_PAGES, 1000) == 3000
    assert sampled(64 * GIB_PAGES, 0) == 64 * 512
    assert sampled(GIB_PAGES, 0) == 16384
    assert sampled(100, 0) == 100  # all there are


def test_between_looks_the_curve_is_a_line_and_behind_them_goes_on():
    one = curve((1.0, 1000), (2.0, 3000))
    assert [one.pages(t) for t in (0.0, 0.5, 1.0, 1.5, 2.0)] == [0, 500, 1000, 2000, 3000]
    assert one.pages(3.0) == 5000
    assert one.pages(1000.0) == 100_000  # there are no more
    assert curve().pages(5.0) == 0
    # a hot spot that is all written soon stays as large as it is
    assert curve((0.5, 700), (1.0, 700)).pages(60.0) == 700


@examples
@given(st.integers(1, 50_000), st.integers(100, 200_000), st.floats(0.2, 5))
def test_a_guest_that_goes_round_is_followed_beyond_what_was_seen(rate, total, seconds):
    """Each page counts once: of `total` pages no more than there are, however long it writes."""
    looks = [(seconds * share, min(total, rate * seconds * share)) for share in (0.1, 0.5, 1)]
    found = curve(*looks, total=total)
    if rate * seconds <= total or rate * seconds / 2 >= total:
        for later in (1.5, 3, 20):
            want = min(total, rate * seconds * later)
            assert found.pages(seconds * later) == pytest.approx(want, rel=0.01, abs=1)
    assert found.rate == pytest.approx(min(total, rate * seconds) * 4096 / seconds)
    assert found.write_rate >= found.rate
    assert found.saturated == (min(total, rate * seconds) >= 0.8 * total)


def test_a_guest_that_is_slowed_writes_as_much_in_more_time():
    one = curve((1.0, 1000), (2.0, 1500))
    half = one.slowed(0.5)
    assert [half.pages(t) for t in (1.0, 2.0, 4.0)] == [500, 1000, 1500]
    assert one.slowed(0).pages(100) == 0


def test_several_runs_are_their_means():
    both = together([curve((1.0, 100), (2.0, 300)), curve((1.2, 200), (2.2, 500))])
    assert both.looks == (Look(1.1, 150), Look(2.1, 400))
    assert both.total == 100_000


def test_the_margin_holds():
    """Of samples drawn by chance 95 of 100 are within it; one each of equal parts are better."""
    draw, pages, sample = random.Random(3), 50_000, 2000
    dirty = set(draw.sample(range(pages), 5000))
    limit = margin(0.1, sample, pages)
    assert 0.05 < limit < 0.15
    off = [
        abs(sum(p in dirty for p in draw.sample(range(pages), sample)) / sample / 0.1 - 1)
        for _ in range(300)
    ]
    assert 0.90 <= sum(o <= limit for o in off) / len(off) <= 0.99
    assert margin(0.1, pages, pages) == margin(0.0, sample, pages) == 0.0


def test_what_is_said_has_qemus_names():
    found = Measurement(
        Asked(1.0, "page-sampling", 1024), "page-sampling", 77.9,
        WorkingSet(2 * GIB_PAGES, (Look(0.5, 15_000), Look(1.0, 25_600))),
        Cost(0.0315), 2048, {"attach-pause-us": 2000},
    )  # fmt: skip
    told = information(found)
    assert {k: told[k] for k in ("status", "start-time", "calc-time", "sample-pages", "mode")} == {
        "status": "measured", "start-time": 77, "calc-time": 1.0, "sample-pages": 1024,
        "mode": "page-sampling",
    }  # fmt: skip
    assert (told["dirty-rate"], told["dirty-pages-rate"]) == (100, 25_600)
    assert told["write-pages-rate"] == 30_000  # in the shorter interval
    assert told["working-set"][0] == {"time": 500, "pages": 15_000}
    assert told["margin"] == round(margin(25_600 / 2 / GIB_PAGES, 2048, 2 * GIB_PAGES), 3)
    assert told["attach-pause-us"] == 2000


def test_the_cost_to_the_guest_is_that_of_its_faults():
    cost = Cost(0.002, 20_000, 1.5e-6)
    assert cost.slow_down(1.0) == pytest.approx(0.03)
    found = Measurement(Asked(1.0), "dirty-bitmap", 0, curve((1.0, 20_000)), cost)
    told = information(found)
    assert told["cost"] == {
        "cpu-time": 2.0, "faults": 20_000, "fault-ns": 1500, "guest-slow-down": 0.03
    }  # fmt: skip
    assert "margin" not in told and told["sample-pages"] == 0


def test_before_and_while_it_is_measured():
    assert unfinished(None, 0, 0)["status"] == "unstarted"
    going = unfinished(Asked(0.25, "page-sampling", 0, "millisecond"), 12.5, GIB_PAGES)
    assert (going["status"], going["calc-time"], going["start-time"]) == ("measuring", 250, 12)
    assert going["sample-pages"] == 16384 and "dirty-rate" not in going
    failed = unfinished(Asked(1.0), 0, 100, "it went away")
    assert (failed["status"], failed["error"]) == ("unstarted", "it went away")
    assert not math.isnan(WorkingSet(0).rate)
