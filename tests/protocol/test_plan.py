"""Plans: predictions are what the decisions of a migration make of curves and rates; what is
recommended, and why."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.convergence import FIXED_SECONDS
from pageferry.pipeline.dirty_rate import Look, WorkingSet
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.plan import (
    MODES,
    POSTCOPY,
    PRECOPY,
    THROTTLED,
    Goal,
    Guest,
    Speed,
    Tried,
    bandwidth_needed,
    downtime_needed,
    is_tight,
    predict,
)
from pageferry.pipeline.plan_report import choose, options_of, report_of
from pageferry.pipeline.planning import wanted_by
from pageferry.pipeline.tuning import Setting
from pageferry.transport.errors import UsageError

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)

PAGES = 131_072  # 512 MiB
SIZE = PAGES * 4096
LINK = 200_000_000
PLAIN = Setting(2, "none", None, 256)
ZSTD = Setting(2, "zstd", None, 256)


def round_and_round(rate, total=PAGES, seconds=2.0):
    """A guest that writes `rate` pages a second, one after the other."""
    looks = [seconds * share for share in (0.05, 0.1, 0.2, 0.5, 1.0)]
    return WorkingSet(total, tuple(Look(t, min(total, rate * t)) for t in looks))


def guest(rate=0, **more):
    return replace(Guest(True, True, True, True, PAGES, round_and_round(rate), 0.001), **more)


def tried(setting=PLAIN, rate=1e9, wire=1.0, written=None, **more):
    speed = Speed(rate, wire)
    return replace(Tried(setting, speed, written or speed, 0.1, 0.02), **more)


def test_an_idle_guest_is_one_round_and_a_switchover():
    found = predict(guest(), tried(), Goal(LINK))
    assert found.converges and [r.live for r in found.rounds] == [True, False]
    assert found.total == pytest.approx(0.1 + SIZE / LINK + 0.02, rel=0.01)
    assert found.downtime == pytest.approx(0.02 + 0.001, abs=0.001)
    assert found.wire == SIZE


def test_rounds_shrink_by_what_is_written_meanwhile():
    """Each round is as long as what was written in the one before takes: a geometric series."""
    found = predict(guest(20_000), tried(), Goal(LINK))
    share = 20_000 * 4096 / LINK
    sizes = [r.pages for r in found.rounds]
    for before, after in pairwise(sizes):
        assert after / before == pytest.approx(share, rel=0.06)
    # it is stopped as soon as it fits, by the rule that decides in reality, and not before
    left = found.live_rounds[-1].written * 4096
    assert FIXED_SECONDS + left / LINK <= 0.3 < FIXED_SECONDS + left / share / LINK
    assert found.downtime == pytest.approx(0.02 + left / LINK, rel=0.05)


def test_a_hot_spot_is_written_again_and_again_and_stays_small():
    """Its rate is above the link's, and still it converges: it is the working set that matters."""
    hot = WorkingSet(PAGES, tuple(Look(t, min(5000, 100_000 * t)) for t in (0.1, 0.2, 0.5, 1, 2)))
    found = predict(guest(curve=hot), tried(), Goal(LINK))
    assert hot.write_rate > LINK
    assert found.converges
    assert found.downtime == pytest.approx(0.02 + 5000 * 4096 / LINK, rel=0.05)


def test_twice_the_link_converges_only_if_it_is_slowed_or_leaves():
    writer = guest(2 * LINK // 4096)
    precopy, throttled, postcopy = (predict(writer, tried(), Goal(LINK), m) for m in MODES)
    assert not precopy.converges and "not converging" in precopy.why
    assert len(precopy.live_rounds) == 30 and precopy.downtime is None
    assert throttled.converges and throttled.downtime <= 0.3
    assert 50 < throttled.throttle <= 99 and 0.2 < throttled.slow_down < 1
    assert postcopy.converges and postcopy.downtime < 0.1
    # two rounds of all memory, and all of it once more behind the guest, over most of the link
    assert postcopy.total == pytest.approx((2 + 1 / 0.85) * SIZE / LINK, rel=0.05)
    late = predict(replace(writer, discard=1e-6), tried(), Goal(LINK), POSTCOPY)
    assert late.downtime - postcopy.downtime == pytest.approx(PAGES * 1e-6, rel=0.01)
    assert postcopy.total < throttled.total


def test_memory_that_nobody_writes():
    found = predict(
        guest(live=False, can_stop=False, can_throttle=False, can_leave=False),
        tried(rate=1e9),
        Goal(max_rounds=1),
    )
    assert (found.converges, found.downtime, len(found.rounds)) == (True, None, 1)
    assert found.total == pytest.approx(0.1 + SIZE / 1e9 + 0.02, rel=0.01)


def test_memory_that_nobody_can_stop_is_moved_when_nothing_changes_any_more():
    still = predict(guest(can_stop=False, can_throttle=False, can_leave=False), tried(), Goal(LINK))
    assert still.converges and still.downtime is None
    assert not predict(guest(1000, can_stop=False), tried(), Goal(LINK)).converges


def test_what_compresses_is_bound_by_the_link_until_these_hosts_are():
    speed = Speed(400e6, 0.25)
    assert speed.seconds(1e9, 50_000_000) == 5.0
    assert speed.bound_by_link(50_000_000)
    assert speed.seconds(1e9, 1_000_000_000) == speed.seconds(1e9, 0) == 2.5
    assert not speed.bound_by_link(1_000_000_000) and not speed.bound_by_link(0)


def test_a_last_look_at_all_memory_is_part_of_the_downtime_and_not_of_each_round():
    without, with_it = (predict(guest(20_000, scan=x), tried(), Goal(LINK, 0.4)) for x in (0, 0.2))
    assert with_it.downtime == pytest.approx(without.downtime + 0.1, rel=0.2)
    assert with_it.downtime <= 0.4
    each = predict(guest(20_000, scan=0.2, scan_always=True), tried(), Goal(LINK, 0.4))
    assert each.total > with_it.total
    # one worker needs twice as long for it as two
    alone = tried(replace(PLAIN, workers=1))
    slower = predict(guest(20_000, scan=0.2), alone, Goal(LINK, 0.6))
    assert slower.downtime > predict(guest(20_000, scan=0.2), tried(), Goal(LINK, 0.6)).downtime


def test_first_round_and_later_ones_have_their_own_content():
    """Memory is zero, and what is written is random: the rule counts it so, as in reality."""
    case = tried(written=Speed(1e9, 1.0), memory=Speed(1e10, 0.01, 0.99))
    found = predict(guest(20_000), case, Goal(LINK))
    assert found.rounds[0].seconds == pytest.approx(SIZE / 1e10, rel=0.01)
    # what fits is judged by the rate of content, so a first round of zeros says little
    assert found.converges and found.downtime <= 0.35


@examples
@given(
    st.integers(0, 300_000), st.integers(20_000_000, 2_000_000_000), st.floats(0.02, 2),
    st.floats(0.1, 1.0), st.sampled_from(MODES),
)  # fmt: skip
def test_whatever_is_planned_is_consistent(rate, link, limit, wire, mode):
    goal = Goal(link, limit)
    found = predict(guest(rate), tried(wire=wire), goal, mode)
    assert found.total >= SIZE * wire / link
    assert found.converges == (found.downtime is not None)
    assert 0 <= found.throttle <= 99 and 0 <= found.slow_down < 1
    assert len(found.live_rounds) <= 30 or mode == THROTTLED
    if found.converges and found.downtime > limit:
        # only by what is written between the decision and the stop, or by postcopy
        assert found.downtime < limit + 0.05


def test_what_is_needed_does_and_less_does_not():
    writer, case = guest(100_000), tried()
    link = bandwidth_needed(writer, case, Goal(LINK))
    assert predict(writer, case, Goal(link)).converges
    assert not predict(writer, case, Goal(round(link * 0.97))).converges
    limit = downtime_needed(writer, case, Goal(LINK))
    assert predict(writer, case, Goal(LINK, limit * 1.001)).converges
    assert not predict(writer, case, Goal(LINK, limit * 0.97)).converges
    assert bandwidth_needed(guest(10**7), case, Goal(LINK)) is None  # not on these hosts
    assert is_tight(predict(writer, case, Goal(LINK, limit * 1.01)), Goal(LINK, limit * 1.01))


# ---- what is recommended -----------------------------------------------------------------------


def test_precopy_where_it_converges():
    choice = choose(guest(20_000), [tried()], Goal(LINK))
    assert choice.mode == PRECOPY
    assert " ".join(options_of(choice, Goal(LINK), "200MB")) == (
        "--workers 2 --codec none --max-bandwidth 200MB --downtime-limit 300ms"
    )


def test_a_codec_where_the_link_is_the_bound_and_nothing_where_it_is_not():
    both = [tried(), tried(ZSTD, rate=4e8, wire=0.3)]
    assert choose(guest(), both, Goal(LINK)).tried.setting == ZSTD
    assert choose(guest(), both, Goal()).tried.setting == PLAIN
    # and if only with it precopy converges, then that
    assert choose(guest(60_000), both, Goal(LINK)).mode == PRECOPY


def test_as_fast_with_less_is_better():
    one = tried(replace(PLAIN, workers=1), rate=9.8e8)
    assert choose(guest(), [one, tried()], Goal()).tried.setting.workers == 1
    slow = tried(replace(PLAIN, workers=1), rate=5e8)
    assert choose(guest(), [slow, tried()], Goal()).tried.setting.workers == 2


def test_a_gentle_throttle_before_postcopy_and_postcopy_before_a_hard_one():
    gentle = choose(guest(52_000), [tried()], Goal(LINK, max_rounds=12))
    assert gentle.mode == THROTTLED and gentle.found.slow_down < 0.2
    hard = guest(4 * LINK // 4096)
    assert choose(hard, [tried()], Goal(LINK)).mode == POSTCOPY
    assert choose(replace(hard, can_leave=False), [tried()], Goal(LINK)).mode == THROTTLED


def test_why_and_what_else_would_do():
    writer, goal = guest(100_000), Goal(LINK)
    choice = choose(writer, [tried()], goal)
    report = report_of(choice, writer, goal, bandwidth="200MB")
    json.dumps(report)
    assert not report["converges"] and report["mode"] == POSTCOPY
    assert report["settings"][-2:] == ["--postcopy", "auto"]
    # the link is not wider for those pages that come after the guest
    assert "--max-postcopy-bandwidth 200MB" in " ".join(report["settings"])
    why = " ".join(report["why"])
    for part in (
        "512.0 MiB hold something", "bound by the link", "The guest writes 410 MB/s",
        "200 MB/s can be moved", "does not converge", "--auto-converge would slow it down",
        "--postcopy auto would start it there after 2 rounds", "--downtime-limit ", "Gbit/s",
    ):  # fmt: skip
        assert part in why
    needed = report["needed"]
    assert predict(writer, tried(), Goal(LINK, needed["downtime-limit"] / 1000)).converges
    assert predict(writer, tried(), Goal(needed["bandwidth"])).converges


def test_that_nothing_is_sure():
    told = " ".join(report_of(
        choose(guest(20_000), [tried()], Goal(LINK, 0.23)), guest(20_000), Goal(LINK, 0.23)
    )["why"])  # fmt: skip
    assert "near to the limit" in told
    long = guest(100, pages=PAGES * 100)
    told = " ".join(report_of(choose(long, [tried()], Goal(LINK)), long, Goal(LINK))["why"])
    assert "--seconds 60 says more" in told
    for load, said in ((0.4, False), (3.1, True)):
        report = report_of(choose(long, [tried()], Goal(LINK)), long, Goal(LINK), load=load)
        assert ("3.1 processes for each processor" in " ".join(report["why"])) == said
    busy = guest(10**6)
    told = " ".join(report_of(choose(busy, [tried()], Goal(LINK)), busy, Goal(LINK))["why"])
    assert "so it may write faster" in told


def test_an_image_is_time_and_nothing_else():
    image = guest(live=False, can_stop=False, can_throttle=False, can_leave=False)
    report = report_of(choose(image, [tried()], Goal(LINK)), image, Goal(LINK))
    assert list(report["modes"]) == [PRECOPY] and "downtime" not in report
    assert "--downtime-limit" not in report["settings"]
    assert report["why"][-1].startswith("Nobody writes this memory")


def test_what_a_plan_may_be_asked_for():
    """As many workers as pay, unless somebody says so; and nothing that it cannot predict."""
    found = wanted_by(Parameters(max_bandwidth=10**6, level=3, codec="zstd"), 0.5, 4 << 20, "1MB")
    assert (found.workers, found.codec, found.level) == (0, "zstd", 3)
    assert (found.goal.bandwidth, found.bandwidth, found.seconds) == (10**6, "1MB", 0.5)
    for parameters, how, why in (
        ({"codec": "xbzrle+zstd"}, {}, "without deltas"),
        ({"codec": "auto", "level": 3}, {}, "level needs a codec"),
        ({"workers": 1 << 20}, {}, "workers"),
        ({}, {"sample": 4096}, "at least 4M"),
        ({}, {"seconds": 61.0}, "from 0.1 to 60"),
    ):
        with pytest.raises(UsageError, match=why):
            wanted_by(Parameters(**parameters), **how)
