"""When the guest is stopped: rate, downtime, the number of rounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.convergence import FIXED_SECONDS, Convergence, Decision
from pageferry.transport.pages import PAGE_SIZE

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)

MIB = 1 << 20
PAGES_IN_A_MIB = MIB // PAGE_SIZE


def measured(limit=0.3, max_rounds=30, pages=25_600, seconds=1.0):
    """After one round of 100 MiB in a second."""
    convergence = Convergence(limit, max_rounds)
    convergence.round_done(pages, seconds)
    return convergence


def test_the_rate_is_that_of_the_last_round():
    """Bytes of guest memory a second."""
    convergence = measured()
    assert convergence.rate == 100 * MIB
    convergence.round_done(25_600, 0.5)
    assert convergence.rate == 200 * MIB
    assert convergence.rounds == 2


def test_a_short_round_does_not_change_the_rate():
    """It says more about latency; only without any rate it is better than nothing."""
    convergence = measured()
    convergence.round_done(1023, 10.0)
    assert convergence.rate == 100 * MIB
    convergence.round_done(1024, 1.0)
    assert convergence.rate == 4 * MIB
    fresh = Convergence(0.3, 30)
    fresh.round_done(256, 1.0)
    assert fresh.rate == MIB


def test_zero_pages_say_nothing_of_the_rate():
    """They cost next to nothing; what a guest writes is seldom zero."""
    convergence = Convergence(0.3, 30)
    convergence.round_done(100_000, 1.0, zero=100_000 - 25_600, wire=200 * MIB)
    assert convergence.rate == 100 * MIB
    convergence.round_done(10**6, 1.0, zero=10**6, wire=1000)
    assert convergence.rate == 100 * MIB


def test_the_first_round_counts_as_if_dirty_pages_did_not_compress():
    """It holds everything the guest ever had; later ones are measured as they are."""
    convergence = Convergence(0.3, 30)
    convergence.round_done(25_600, 1.0, wire=40 * MIB)
    assert (convergence.rate, convergence.wire_share) == (40 * MIB, 1.0)
    convergence.round_done(25_600, 1.0, wire=40 * MIB)
    assert (convergence.rate, convergence.wire_share) == (100 * MIB, 0.4)


def test_a_bandwidth_limit_bounds_what_is_expected():
    """Whatever was moved before it was set; what compresses well may move faster than it."""
    convergence = measured(limit=10.0)
    left = 100 * PAGES_IN_A_MIB
    assert convergence.expected_downtime(left) == pytest.approx(FIXED_SECONDS + 1)
    convergence.max_bandwidth = 20 * MIB
    assert convergence.expected_downtime(left) == pytest.approx(FIXED_SECONDS + 5)
    convergence.wire_share = 0.5
    assert convergence.expected_downtime(left) == pytest.approx(FIXED_SECONDS + 2.5)
    convergence.max_bandwidth = 10**12
    assert convergence.expected_downtime(left) == pytest.approx(FIXED_SECONDS + 1)


def test_what_a_switchover_costs():
    """What is left at the measured rate, taking the last set, and the fixed part."""
    convergence = measured()
    convergence.dirty_taken(1000, since=2.0, took=0.05)
    assert convergence.dirty_rate == 500 * PAGE_SIZE
    expected = FIXED_SECONDS + 0.05 + 0.1
    assert convergence.expected_downtime(10 * PAGES_IN_A_MIB) == pytest.approx(expected)


def test_the_guest_is_stopped_as_soon_as_the_rest_fits():
    """Into the limit, the fixed cost taken off: 27 MiB at 100 MiB/s and 300 ms."""
    convergence = measured(limit=0.3)
    fits = int((0.3 - FIXED_SECONDS) * 100 * PAGES_IN_A_MIB)
    assert convergence.decide(fits - 1) is Decision.SWITCH_OVER
    assert convergence.decide(fits + 1) is Decision.NEXT_ROUND
    convergence.dirty_taken(0, 1.0, took=0.1)
    assert convergence.decide(fits - 1) is Decision.NEXT_ROUND


def test_nothing_left_is_always_a_switchover():
    """Even if the fixed cost alone is above the limit: it will not get better."""
    convergence = measured(limit=0.001, max_rounds=1)
    assert convergence.decide(0) is Decision.SWITCH_OVER
    assert convergence.decide(1) is Decision.GIVE_UP


def test_without_a_rate_nothing_is_known():
    """A first round that moved nothing: a switchover with all that is left would be a guess; with
    a few pages it would do on any link. A guest that only writes zeros must not go on for ever."""
    convergence = Convergence(0.3, 2)
    convergence.round_done(0, 1.0)
    assert convergence.decide(10**6) is Decision.NEXT_ROUND
    assert convergence.decide(0) is convergence.decide(100) is Decision.SWITCH_OVER
    convergence.round_done(500, 1.0, zero=500, wire=9000)
    assert convergence.rate == 0
    assert convergence.decide(100) is Decision.SWITCH_OVER
    assert convergence.decide(10**6) is Decision.GIVE_UP


def test_it_gives_up_after_the_last_round():
    """Not before, and not if the rest fits after all."""
    convergence = measured(max_rounds=3)
    assert convergence.decide(10**6) is Decision.NEXT_ROUND
    convergence.round_done(25_600, 1.0)
    assert convergence.decide(10**6) is Decision.NEXT_ROUND
    convergence.round_done(25_600, 1.0)
    assert convergence.decide(10**6) is Decision.GIVE_UP
    assert convergence.decide(1) is Decision.SWITCH_OVER
    convergence.max_rounds = 4
    assert convergence.decide(10**6) is Decision.NEXT_ROUND


def test_a_higher_limit_lets_a_guest_go():
    """The monitor may raise it while it runs."""
    convergence = measured(limit=0.1)
    assert convergence.decide(100 * PAGES_IN_A_MIB) is Decision.NEXT_ROUND
    convergence.downtime_limit = 2.0
    assert convergence.decide(100 * PAGES_IN_A_MIB) is Decision.SWITCH_OVER


def test_the_time_that_is_left():
    """This round, the ones that follow it, the downtime; unknown where there will be no end."""
    convergence = Convergence(1.0, 30)
    mib = PAGES_IN_A_MIB
    everything = 1000 * mib
    assert convergence.eta(200 * mib, 100 * MIB, 0, 0.0, everything) == pytest.approx(
        2.0 + FIXED_SECONDS
    )
    # 400 in 4 s, meanwhile 200; these in 2 s, meanwhile 100; in 1 s, and 50: that is stopped for
    assert convergence.eta(400 * mib, 100 * MIB, 0, 50.0 * MIB, everything) == pytest.approx(
        4.0 + 2.0 + 1.0 + 0.5 + FIXED_SECONDS
    )
    # what is dirty already has to go as well
    assert convergence.eta(400 * mib, 100 * MIB, 50 * mib, 0.0, everything) == pytest.approx(
        4.5 + FIXED_SECONDS
    )
    assert convergence.eta(400 * mib, 100 * MIB, 0, 99.0 * MIB, everything) is None
    assert convergence.eta(1, 0.0, 0, 0.0, everything) is None


@given(
    st.integers(1000, 10**6), st.floats(0.0, 0.9), st.floats(0.05, 5.0), st.floats(0.0, 0.99),
    st.floats(1e6, 1e10),
)  # fmt: skip
@examples
def test_the_time_that_is_left_is_what_it_takes(total, share, limit, begun, rate):
    """At a steady rate and a guest that writes steadily, from any moment of the first round on."""
    dirty_rate = share * rate
    convergence = Convergence(limit, 10**6)
    end, pages = 0.0, float(total)
    while True:
        seconds = pages * PAGE_SIZE / rate
        end += seconds
        pages = min(total, dirty_rate * seconds / PAGE_SIZE)
        downtime = FIXED_SECONDS + pages * PAGE_SIZE / rate
        if downtime <= limit:
            end += downtime
            break
    now = begun * total * PAGE_SIZE / rate
    left, written = round(total * (1 - begun)), min(total, round(dirty_rate * now / PAGE_SIZE))
    eta = convergence.eta(left, rate, written, dirty_rate, total)
    # a page more or less may decide on a round more
    assert eta == pytest.approx(end - now, rel=0.02, abs=limit + 2 * FIXED_SECONDS)


def test_a_limit_that_no_switchover_keeps_has_a_time_all_the_same():
    """With nothing left the guest is stopped whatever that takes; and what is left comes to nothing
    long before the last of so many rounds."""
    for rounds in (30, 10_000):
        convergence = Convergence(0.02, rounds, rounds=1, rate=100.0 * MIB)
        assert convergence.decide(0) is Decision.SWITCH_OVER
        mib = PAGES_IN_A_MIB
        assert convergence.eta(200 * mib, 100 * MIB, 0, 0.0, 1000 * mib) == pytest.approx(
            2.0 + FIXED_SECONDS
        )
    # half as much each time, down to less than a page
    eta = convergence.eta(400 * mib, 100 * MIB, 0, 50.0 * MIB, 1000 * mib)
    assert eta == pytest.approx(8.0 + FIXED_SECONDS, abs=0.001)


def test_the_dirty_rate_now_is_that_of_this_round_as_far_as_it_says_something():
    """The first round has none before it; a look just after a round began says next to nothing."""
    convergence = Convergence(0.3, 30)
    assert convergence.dirty_rate_now(0, 0.0) == 0
    assert convergence.dirty_rate_now(PAGES_IN_A_MIB, 0.5) == 2 * MIB
    convergence.dirty_taken(100 * PAGES_IN_A_MIB, 1.0, 0.0)
    assert convergence.dirty_rate_now(0, 0.0) == 100 * MIB
    assert convergence.dirty_rate_now(0, 0.02) == pytest.approx(100 * MIB, rel=0.02)
    assert convergence.dirty_rate_now(5000 * PAGES_IN_A_MIB, 100.0) == pytest.approx(
        50 * MIB, rel=0.03
    )


def test_hopeless_is_a_guest_that_writes_as_fast_as_we_send():
    """Then one round more leaves no less."""
    convergence = measured()
    convergence.dirty_taken(50 * PAGES_IN_A_MIB, 1.0, 0.0)
    assert not convergence.hopeless
    convergence.dirty_taken(100 * PAGES_IN_A_MIB, 1.0, 0.0)
    assert convergence.hopeless
    assert Convergence(0.3, 30).hopeless


amounts = st.integers(0, 2**40)
times = st.floats(0, 1e6)
observations = st.one_of(
    st.tuples(st.just("round"), amounts, times, times),
    st.tuples(st.just("taken"), amounts, times, times),
)


@given(st.lists(observations, max_size=8), amounts, amounts, st.floats(1e-3, 2000))
@examples
def test_more_pages_never_switch_over_sooner(history, a, b, limit):
    """Whatever was measured, zero pages and zero seconds included."""
    convergence = Convergence(limit, 5)
    for what, pages, since, took in history:
        if what == "round":
            convergence.round_done(pages, since)
        else:
            convergence.dirty_taken(pages, since, took)
    less, more = sorted((a, b))
    assert 0 < convergence.expected_downtime(less) <= convergence.expected_downtime(more)
    if convergence.decide(more) is Decision.SWITCH_OVER:
        assert convergence.decide(less) is Decision.SWITCH_OVER
    decision = convergence.decide(more)
    assert (decision is Decision.GIVE_UP) == (
        convergence.rounds >= 5 and decision is not Decision.SWITCH_OVER
    )
    etas = [convergence.eta(p, convergence.rate, 0, 0.0, more + 1) for p in (less, more)]
    assert None in etas or 0 <= etas[0] <= etas[1]
