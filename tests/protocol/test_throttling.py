"""How much a guest is slowed down: QEMU's steps by tables, the limit by a guest that is simulated,
and what follows for postcopy and for giving up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.convergence import Convergence
from pageferry.pipeline.migration import (
    ChannelsReady,
    Finish,
    Migration,
    RoundDone,
    SendRound,
    Started,
    StopGuest,
    Taken,
    Throttle,
)
from pageferry.pipeline.parameters import Parameters, changed
from pageferry.pipeline.throttling import FIELDS, Rules, Throttling
from pageferry.tools.cli import view
from pageferry.tools.report import sections
from pageferry.transport.errors import NotConverging, UsageError

examples = settings(max_examples=75, deadline=None, derandomize=True, database=None)
MB = 1_000_000
AUTO, LIMIT = {"auto_converge": True}, {"dirty_limit": True}


def after(rules, *rounds):
    """The percentage after each of these rounds: (written, moved, seconds)."""
    throttling = Throttling(Rules(**rules))
    found = []
    for number, one in enumerate(rounds, 1):
        before = throttling.percentage
        assert throttling.round_ended(*one, number) == (throttling.percentage != before)
        found.append(throttling.percentage)
    return found


HIGH, LOW = (60 * MB, 100 * MB, 1.0), (50 * MB, 100 * MB, 1.0)


@pytest.mark.parametrize(
    ("rules", "rounds", "percentages"),
    [
        # twice too much, then a step; half of what is moved is not too much
        ({}, [HIGH] * 6, [0, 20, 20, 30, 30, 40]),
        ({}, [LOW] * 6, [0] * 6),
        # the two need not follow each other, as in QEMU
        ({}, [HIGH, LOW, HIGH, LOW, HIGH, HIGH], [0, 0, 20, 20, 20, 30]),
        ({"threshold": 60}, [HIGH] * 4, [0] * 4),
        ({"threshold": 59}, [HIGH] * 4, [0, 20, 20, 30]),
        ({"initial": 70, "increment": 20}, [HIGH] * 6, [0, 70, 70, 90, 90, 99]),
        ({"initial": 30, "maximum": 45}, [HIGH] * 8, [0, 30, 30, 40, 40, 45, 45, 45]),
        # rounds of half a second count together, as do three of 0.4
        ({}, [(30 * MB, 50 * MB, 0.5)] * 8, [0, 0, 0, 20, 20, 20, 20, 30]),
        ({}, [(30 * MB, 50 * MB, 0.4)] * 6, [0, 0, 0, 0, 0, 20]),
        # nothing moved: it is the link that stands still
        ({}, [(30 * MB, 0, 5.0)] * 4, [0] * 4),
        ({"auto_converge": False}, [HIGH] * 4, [0] * 4),
    ],
)
def test_steps(rules, rounds, percentages):
    assert after(AUTO | rules, *rounds) == percentages


@pytest.mark.parametrize(
    ("now", "written", "step"),
    [
        # of what it has left it would need half: 40, and the increment is less
        (20, 100, 10),
        # 80 % left, allowed 50 of 55: 72 would do
        (20, 55, 8),
        (90, 100, 5),
        (90, 51, 1),
        (90, 500, 9),
        # the maximum
        (98, 500, 1),
    ],
)
def test_steps_at_the_tail(now, written, step):
    """cpu_now - cpu_ideal, or the increment (mig_throttle_guest_down)."""
    rules = AUTO | {"initial": now, "tailslow": True}
    high = (written * MB, 100 * MB, 1.0)
    assert after(rules, high, high, high, high)[-1] == now + step


def test_off_and_other_rules_while_it_runs():
    throttling = Throttling(Rules())
    assert not throttling.configure(Rules(**AUTO))
    throttling.round_ended(*HIGH, 1)
    throttling.round_ended(*HIGH, 2)
    assert throttling.percentage == 20
    assert throttling.configure(Rules(**AUTO, initial=10, maximum=15))
    assert throttling.percentage == 15
    assert throttling.configure(Rules())
    assert throttling.percentage == 0
    throttling.works = False
    assert not throttling.configure(Rules(**AUTO))
    assert not throttling.round_ended(*HIGH, 3)


class Guest:
    """Writes `rate` of `size` bytes in order, over and over, if nobody slows it down; moves over a
    link. Looked at each quarter of a second, as the coordinator does."""

    def __init__(self, rules, rate, link, size):
        self.throttling = Throttling(Rules(**rules))
        self.throttling.total_bytes = size
        self.rate, self.link, self.size = rate, link, size
        self.left, self.number, self.seconds, self.log = size, 0, 0.0, []

    def round(self):
        """Send what is left; what was written meanwhile is left then."""
        moved = written = spent = 0.0
        while moved < self.left:
            tick = min(0.25, (self.left - moved) / self.link)
            moved += tick * self.link
            spent += tick
            written += tick * self.rate * (100 - self.throttling.percentage) / 100
            if moved < self.left - 1:
                self.throttling.looked(int(min(written, self.size)), int(moved), spent)
        self.number += 1
        self.seconds += spent
        self.left = min(int(written), self.size)
        self.throttling.round_ended(self.left, int(moved), spent, self.number)
        self.log.append(self.throttling.percentage)

    def converges(self, downtime=0.3, rounds=60):
        while self.left > downtime * self.link and self.number < rounds:
            self.round()
        return self.left <= downtime * self.link


@pytest.mark.parametrize("rules", [AUTO, LIMIT, AUTO | {"tailslow": True}])
@pytest.mark.parametrize("times", [1, 2, 4, 16, 60])
def test_any_writer_converges(rules, times):
    """Up to the 99 % that it may lose; with the limit in fewer rounds than by steps."""
    guest = Guest(rules, times * 100 * MB, 100 * MB, 200 * MB)
    assert guest.converges(), guest.log


def test_the_limit_follows_what_is_measured():
    """4 times the link, half of which may be written: 12.5 % of the time are left; it is there
    after one look in the second round, and stays."""
    guest = Guest(LIMIT, 400 * MB, 100 * MB, 800 * MB)
    guest.round()
    assert guest.log == [0] or guest.log[0] >= 80
    guest.round()
    assert 87 <= guest.log[-1] <= 90
    assert guest.converges(rounds=8), guest.log
    steps = Guest(AUTO, 400 * MB, 100 * MB, 800 * MB)
    assert steps.converges()
    assert guest.seconds < steps.seconds / 2


def test_the_limit_is_less_when_less_is_written():
    throttling = Throttling(Rules(**LIMIT))
    throttling.round_ended(400 * MB, 100 * MB, 1.0, 1)
    assert throttling.percentage == 88
    seen = []
    for number in range(2, 12):  # it writes 60 MB/s at the most, whatever time it has
        written = min(60 * MB, 400 * MB * (100 - throttling.percentage) // 100)
        throttling.round_ended(written // 4, 100 * MB, 1.0, number)
        seen.append(throttling.percentage)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 60


def test_an_absolute_limit():
    """Whatever the link moves."""
    throttling = Throttling(Rules(**LIMIT, limit=30 * MB))
    throttling.round_ended(60 * MB, 1000 * MB, 1.0, 1)
    assert throttling.percentage == 50


def test_memory_that_is_nearly_all_dirty_says_nothing_of_less():
    """Pages that are written again do not count twice."""
    throttling = Throttling(Rules(**LIMIT))
    throttling.total_bytes = 400 * MB
    assert throttling.looked(350 * MB, 100 * MB, 1.0)
    now = throttling.percentage
    assert not throttling.looked(351 * MB, 200 * MB, 2.0)
    assert throttling.percentage == now


# ---- the migration ----------------------------------------------------------------------------


def migration(rules, postcopy="never", max_rounds=30, limit=0.3):
    core = Migration(True, True, False, Convergence(limit, max_rounds), postcopy)
    core.throttling = Throttling(Rules(**rules))
    for event in (Started(), ChannelsReady(), Taken(25_600, 25_600, 0.0, 0.0)):
        core.handle(event)
    return core


def turn(core, written, pages=25_600):
    """A round of a second, after which `written` pages are to be sent."""
    core.handle(RoundDone(pages, 0, 1.0))
    return core.handle(Taken(written, written, 1.0, 0.001))


def test_the_guest_is_slowed_down_before_the_next_round():
    core = migration(AUTO)
    assert turn(core, 25_600) == [SendRound(2, live=True)]
    assert turn(core, 25_600) == [Throttle(20), SendRound(3, live=True)]
    assert turn(core, 25_600) == [SendRound(4, live=True)]
    assert turn(core, 100) == [StopGuest()]


def test_off_it_is_as_ever():
    core = migration({})
    for number in range(2, 31):
        assert turn(core, 25_600) == [SendRound(number, live=True)]
    (finish,) = turn(core, 25_600)
    assert isinstance(finish, Finish) and finish.resume
    assert "--auto-converge or --dirty-limit" in finish.error.message


@pytest.mark.parametrize("rules", [AUTO, LIMIT])
def test_nobody_is_given_up_who_can_be_slowed_down(rules):
    """However few rounds there may be; in the end it is, with what was tried in the error."""
    core = migration(rules, max_rounds=2)
    said = []
    while not isinstance((told := turn(core, 25_600))[-1], Finish):
        said += [one.percentage for one in told if isinstance(one, Throttle)]
        assert core.round < 200
    assert said == sorted(set(said)) and said[-1] == 99
    assert isinstance(told[-1].error, NotConverging)
    assert "lost 99 % of its time" in told[-1].error.message
    assert core.round >= 10 + 2


@pytest.mark.parametrize("rules", [{}, AUTO, LIMIT])
def test_postcopy_comes_when_nothing_else_helps(rules):
    """--postcopy auto: a guest that can be slowed down more is."""
    core = migration(rules, postcopy="auto")
    while not isinstance(turn(core, 25_600)[-1], StopGuest):
        assert core.round < 40
    assert core.leaving
    assert core.throttling.percentage == (99 if rules else 0)
    assert core.round == 2 if not rules else core.round > 2


def test_postcopy_that_was_asked_for_does_not_wait():
    core = migration(AUTO, postcopy="manual")
    core.asked = True
    assert turn(core, 25_600) == [StopGuest()]


@given(
    st.sampled_from([AUTO, LIMIT, AUTO | {"tailslow": True, "increment": 1}]),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=50),
    st.integers(1, 5),
)
@settings(examples, max_examples=40)
def test_there_is_an_end(rules, writes, max_rounds):
    """Whatever the guest does, the rounds are bounded, and the percentage is one."""
    core = migration(rules, max_rounds=max_rounds, limit=0.001)
    for number in range(max_rounds + 10 * 100):
        told = turn(core, writes[number % len(writes)])
        assert 0 <= core.throttling.percentage <= 99
        if not isinstance(told[-1], SendRound):
            return
    raise AssertionError("it goes on for ever")


# ---- what users say ---------------------------------------------------------------------------


def test_parameters():
    assert not Parameters().throttle.on
    p = Parameters(auto_converge=True, cpu_throttle_initial=30).checked()
    assert p.throttle == Rules(auto_converge=True, initial=30)
    said = Parameters(dirty_limit=True, vcpu_dirty_limit=50 << 20).checked().qmp()
    assert said["dirty-limit"] is True
    assert (said["vcpu-dirty-limit"], said["x-vcpu-dirty-limit-period"]) == (50, 1000)
    assert "auto-converge" not in Parameters(workers=1).qmp()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"auto_converge": True, "dirty_limit": True}, "leave one of them out"),
        ({"cpu_throttle_initial": 0}, "cpu-throttle-initial"),
        ({"cpu_throttle_initial": 100}, "cpu-throttle-initial"),
        ({"cpu_throttle_increment": 0}, "cpu-throttle-increment"),
        ({"max_cpu_throttle": 19}, "max-cpu-throttle"),
        ({"max_cpu_throttle": 100}, "max-cpu-throttle"),
        ({"throttle_trigger_threshold": 0}, "throttle-trigger-threshold"),
        ({"vcpu_dirty_limit": -1}, "vcpu-dirty-limit"),
        ({"vcpu_dirty_limit_period": 0.0}, "vcpu-dirty-limit-period"),
        ({"vcpu_dirty_limit_period": 1.1}, "vcpu-dirty-limit-period"),
    ],
)
def test_bounds(said, named):
    with pytest.raises(UsageError, match=named):
        Parameters(**said).checked()


def test_changes_while_it_runs():
    """As text or as JSON; QEMU's numbers of a dirty limit are MB."""
    p = changed(
        Parameters(workers=1),
        {"auto-converge": "on", "cpu-throttle-initial": "35", "cpu-throttle-increment": 5,
         "max-cpu-throttle": 80, "cpu-throttle-tailslow": True, "throttle-trigger-threshold": 40,
         "vcpu-dirty-limit": 12, "x-vcpu-dirty-limit-period": 500},
    )  # fmt: skip
    assert p.throttle == Rules(True, False, 35, 5, True, 80, 40, 12 << 20, 0.5)
    assert changed(p, {"auto-converge": False, "dirty-limit": True}).throttle.dirty_limit
    assert changed(p, {"vcpu-dirty-limit": "10MB"}).vcpu_dirty_limit == 10 * MB
    with pytest.raises(UsageError, match="leave one of them out"):
        changed(p, {"dirty-limit": True})


json_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([1])
)


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), json_values))
@examples
def test_any_change_is_legal_or_refused(arguments):
    try:
        p = changed(Parameters(workers=1), arguments)
    except UsageError:
        return
    assert p.checked() == p


# ---- what people see --------------------------------------------------------------------------

RUNNING = {
    "status": "active", "total-time": 900, "cpu-throttle-percentage": 40,
    "ram": {"remaining": 1 << 20, "total": 1 << 24, "dirty-sync-count": 3},
    "progress": {"rate": 10**8, "dirty-rate": 10**8, "eta": None},
}  # fmt: skip
THROTTLE = {"by": "cgroup", "time": 1500, "mean-percentage": 61.2, "max-percentage": 80,
            "slow-down": 58.7}  # fmt: skip


def test_what_is_shown_while_it_runs():
    assert "slowed down by 40 %" in view.phase_line(RUNNING)
    assert "the guest is slowed down by 40 %" in sections.now(RUNNING)
    assert "40 %" in sections.figures(RUNNING)
    unthrottled = {k: v for k, v in RUNNING.items() if k != "cpu-throttle-percentage"}
    assert "slowed" not in view.phase_line(unthrottled) + sections.now(unthrottled)


def test_what_is_shown_in_the_end():
    ended = RUNNING | {"status": "completed", "wire-bytes": 1, "codec-pages": {}}
    ended["ram"] = RUNNING["ram"] | {"normal": 1, "duplicate": 0}
    assert (
        "by cgroup, for 1.5 s: 61 % of its time on average, 80 % at the most; it did 59 % less"
        in view.summary(ended | {"throttle": THROTTLE})
    )
    assert "none: not ours" in view.summary(ended | {"throttle-because": "not ours"})
    assert "throttle" not in view.summary(ended)
    shown = sections.figures(ended | {"throttle": THROTTLE})
    assert "80 %" in shown and "59 %" in shown
