"""The plan of a batch: limits, order, shares, retries. Time is what the test says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.planner import (
    ASKED_AHEAD,
    ENDED,
    LEAST_RATE,
    HostLimit,
    Limits,
    Planner,
    State,
    Task,
    backoff,
    jain,
)
from pageferry.tools.bench import drain

HOSTS = ["a", "b", "c"]
rates = st.one_of(st.just(0), st.integers(LEAST_RATE, 10 * LEAST_RATE))


@st.composite
def plans(draw):
    """Tasks and limits that may conflict in every way."""
    count = draw(st.integers(1, 25))
    tasks = [
        Task(
            number,
            f"item{number}",
            draw(st.sampled_from(HOSTS)),
            draw(st.sampled_from(HOSTS)),
            draw(st.integers(-1, 2)),
            draw(rates),
            draw(st.integers(0, 2)),
            alike=draw(st.booleans()),
        )
        for number in range(count)
    ]
    limits = Limits(
        parallel=draw(st.integers(1, 8)),
        max_rate=draw(rates),
        per_source=draw(st.integers(0, 3)),
        per_destination=draw(st.integers(0, 3)),
        hosts={
            host: HostLimit(draw(rates), draw(st.integers(0, 3)))
            for host in HOSTS
            if draw(st.booleans())
        },
        backoff=draw(st.sampled_from([0.5, 1.0])),
        max_backoff=draw(st.sampled_from([1.0, 30.0])),
        put_offs=draw(st.integers(0, 3)),
    )
    return tasks, limits


def host_limit(limits, host, general):
    own = limits.hosts.get(host, HostLimit())
    return own.parallel or general


def check_limits(planner):
    """Whatever the plan: never more than the limits, in number and in bytes."""
    limits, tasks = planner.limits, planner.tasks
    running = [tasks[number] for number in planner.running]
    shares = planner.shares()
    assert set(shares) == set(planner.running)
    assert len(running) <= limits.parallel
    if limits.max_rate:
        assert sum(shares.values()) <= limits.max_rate
        assert all(shares.values())
    for task in running:
        assert not task.max_rate or 0 < shares[task.number] <= task.max_rate
        assert shares[task.number] == 0 or shares[task.number] >= 100_000
    for host in HOSTS:
        for side, general in (
            ("source_host", limits.per_source),
            ("destination_host", limits.per_destination),
        ):
            there = [task for task in running if getattr(task, side) == host]
            allowed = host_limit(limits, host, general)
            assert not allowed or len(there) <= allowed
            capacity = limits.hosts.get(host, HostLimit()).max_rate
            assert not capacity or sum(shares[task.number] for task in there) <= capacity


def check_max_min(planner):
    """Nobody could have more without somebody who has no more than he having less: each share
    stands at its own cap, or at a link that is full and on which nobody has more."""
    limits, shares = planner.limits, planner.shares()
    running = [planner.tasks[number] for number in planner.running]
    slack = len(running) + 1  # rounding down

    def links(task):
        if limits.max_rate:
            yield limits.max_rate, running
        for side in ("source_host", "destination_host"):
            host = getattr(task, side)
            capacity = limits.hosts.get(host, HostLimit()).max_rate
            if capacity:
                yield capacity, [t for t in running if getattr(t, side) == host]

    for task in running:
        share = shares[task.number]
        if share == 0:
            assert not task.max_rate and not list(links(task))
            continue
        at_cap = task.max_rate and share >= task.max_rate - 1
        held = any(
            sum(shares[t.number] for t in users) >= capacity - slack
            and share >= max(shares[t.number] for t in users) - 1
            for capacity, users in links(task)
        )
        assert at_cap or held


def check_nobody_waits_in_vain(planner, families, arrived):
    """Who is pending could not run: there is no room for him, or one of his family is under way
    and none has arrived."""
    limits, tasks = planner.limits, planner.tasks
    running = [tasks[number] for number in planner.running]

    def room(general, capacity, used):
        fitting = max(1, capacity // LEAST_RATE) if capacity else used + 1
        return used < min(general or used + 1, fitting)

    if not room(limits.parallel, limits.max_rate, len(running)):
        return
    led = {families.get(task.number) for task in running} - arrived
    for number, state in planner.states.items():
        if state is State.PENDING:
            task = tasks[number]
            if families.get(number) is not None and families[number] in led:
                continue
            assert not all(
                room(
                    host_limit(limits, getattr(task, side), general),
                    limits.hosts.get(getattr(task, side), HostLimit()).max_rate,
                    sum(getattr(t, side) == getattr(task, side) for t in running),
                )
                for side, general in (
                    ("source_host", limits.per_source),
                    ("destination_host", limits.per_destination),
                )
            )


def answer(planner, families, random):
    """Say whose some of those are that are asked for; who has a limit of its own is alone."""
    for number in planner.asked[: random.randint(1, 20)]:
        family = random.choice([None, "x", "y"])
        planner.related(number, family)
        if not planner.tasks[number].max_rate:
            families[number] = family


def check_families(planner, families, arrived):
    """One at a time, until one has arrived; nobody runs of whom this is not known."""
    leading = [families.get(number) for number in planner.running]
    for family in {"x", "y"} - arrived:
        assert leading.count(family) <= 1
    assert all(number not in planner._unknown for number in planner.running)
    assert len(planner.asked) <= ASKED_AHEAD


@given(plans(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_every_plan_keeps_its_limits_and_ends(plan, random):
    """Items end in any order, well or badly; at every moment the limits hold, nobody waits who
    could run, and in the end every item has ended."""
    planner, now, starts = Planner(*plan), 0.0, 0
    families, arrived = {}, set()
    for _ in range(10_000):
        started = planner.start(now)
        starts += len(started)
        check_limits(planner)
        check_max_min(planner)
        check_families(planner, families, arrived)
        if planner.asked:
            answer(planner, families, random)
            continue
        check_nobody_waits_in_vain(planner, families, arrived)
        if planner.over:
            break
        if planner.running and (planner.next_time() is None or random.random() < 0.8):
            number = random.choice(planner.running)
            match random.randrange(5):
                case 0:
                    again = random.random() < 0.8
                    due = planner.failed(number, now, again=again)
                    task = planner.tasks[number]
                    wanted = again and planner.failures[number] <= task.retries
                    assert (due is not None) == wanted
                    assert due is None or now < due <= now + planner.limits.max_backoff
                case 1:
                    planner.cancelled(number)
                case 2:
                    before = planner.failures[number]
                    due = planner.put_off(number, now)
                    assert due is not None or planner.failures[number] == before + 1
                case _:
                    planner.completed(number)
                    arrived.add(families.get(number))
        else:
            due = planner.next_time()
            assert due is not None, "it would wait for ever"
            now = max(now, due)
    assert planner.over
    assert all(state in ENDED for state in planner.states.values())
    assert starts <= sum(task.retries + 1 + plan[1].put_offs for task in plan[0])


def test_priority_then_order():
    tasks = [Task(0, "a"), Task(1, "b", priority=5), Task(2, "c"), Task(3, "d", priority=5)]
    planner, order = Planner(tasks, Limits(parallel=1)), []
    while not planner.over:
        order += planner.start(0.0)
        planner.completed(planner.running[0])
    assert order == [1, 3, 0, 2]


def test_a_shut_gate_holds_up_nobody_else():
    """Three for one destination with room for one, and one for another."""
    tasks = [Task(n, f"x{n}", "", "x", priority=9) for n in range(3)] + [Task(3, "y", "", "y")]
    planner = Planner(tasks, Limits(parallel=4, per_destination=1))
    assert planner.start(0.0) == [0, 3]
    planner.completed(0)
    assert planner.start(0.0) == [1]
    planner.completed(3)
    assert planner.start(0.0) == []
    planner.completed(1)
    assert planner.start(0.0) == [2]


def test_shares_are_max_min_fair():
    """One has a cap, two share a link; what they leave is the others'."""
    tasks = [
        Task(0, "capped", "", "far", max_rate=200_000),
        Task(1, "slow1", "", "slow"),
        Task(2, "slow2", "", "slow"),
        Task(3, "free", "", "far"),
    ]
    limits = Limits(parallel=4, max_rate=4_000_000, hosts={"slow": HostLimit(1_000_000)})
    planner = Planner(tasks, limits)
    planner.start(0.0)
    assert planner.shares() == {0: 200_000, 1: 500_000, 2: 500_000, 3: 2_800_000}
    planner.completed(1)
    assert planner.shares() == {0: 200_000, 2: 1_000_000, 3: 2_800_000}


def test_nothing_that_limits_is_no_limit():
    planner = Planner([Task(0, "a"), Task(1, "b")], Limits(parallel=2))
    planner.start(0.0)
    assert planner.shares() == {0: 0, 1: 0}


def test_rather_fewer_at_once_than_too_slow():
    """No migration takes a limit below 100 kB/s."""
    planner = Planner([Task(n, str(n)) for n in range(9)], Limits(parallel=9, max_rate=350_000))
    assert len(planner.start(0.0)) == 3
    assert min(planner.shares().values()) >= 100_000


def test_retries_with_backoff():
    """Twice as long each time, until it was tried often enough."""
    limits = Limits(parallel=1, backoff=1.0, max_backoff=3.0)
    planner, now, waits = Planner([Task(0, "a", retries=4)], limits), 0.0, []
    while not planner.over:
        assert planner.start(now) == [0]
        due = planner.failed(0, now)
        if due is not None:
            assert planner.states[0] is State.WAITING
            assert planner.start(now) == []
            waits.append(due - now)
            now = due
    assert planner.states[0] is State.FAILED
    assert len(waits) == 4
    for wait, longest in zip(waits, [1.0, 2.0, 3.0, 3.0], strict=True):
        assert longest / 2 <= wait <= longest


def test_without_room_is_no_failure():
    """It comes back soon, as often as it takes; but not for ever."""
    limits = Limits(parallel=1, backoff=1.0, put_offs=5)
    planner, now = Planner([Task(0, "a", retries=0)], limits), 0.0
    for _ in range(5):
        assert planner.start(now) == [0]
        due = planner.put_off(0, now)
        assert now < due <= now + 2.0
        assert planner.failures[0] == 0
        now = due
    planner.start(now)
    assert planner.put_off(0, now) is None
    assert planner.states[0] is State.FAILED


def test_backoff_is_the_items_own_and_always_the_same():
    limits = Limits()
    assert backoff("a", 3, limits) == backoff("a", 3, limits) != backoff("b", 3, limits)
    assert 30.0 <= backoff("a", 5000, limits) <= 60.0


def test_failures_of_before_count():
    """A batch that is taken up again does not begin to count anew."""
    planner = Planner([Task(0, "a", retries=2, failures=2)], Limits())
    planner.start(0.0)
    assert planner.failed(0, 0.0) is None


def relatives(count, family, *, parallel=4, others=0):
    """So many of one family, then `others` that are alone."""
    tasks = [Task(n, f"clone{n}", retries=1, alike=True) for n in range(count)]
    tasks += [Task(count + n, f"other{n}", alike=True) for n in range(others)]
    planner = Planner(tasks, Limits(parallel=parallel))
    while not planner.start(0.0):
        for number in planner.asked:
            planner.related(number, family if number < count else None)
    return planner


def test_of_relatives_the_first_goes_alone_then_all():
    planner = relatives(6, "f")
    assert planner.running == [0]
    planner.completed(0)
    assert planner.start(0.0) == [1, 2, 3, 4]
    planner.failed(1, 0.0)
    assert planner.start(0.0) == [5]  # one has arrived, whatever becomes of the others


def test_others_go_while_relatives_wait():
    planner = relatives(4, "f", others=2)
    assert planner.running == [0, 4, 5]
    planner.completed(4)
    assert planner.start(0.0) == []
    planner.completed(0)
    assert planner.start(0.0) == [1, 2, 3]


def test_if_the_first_fails_the_next_goes():
    planner = relatives(3, "f")
    due = planner.failed(0, 0.0)
    assert planner.start(0.0) == [1]
    assert planner.start(due) == []  # the first waits like all
    planner.cancelled(1)
    assert planner.start(due) == [0]
    planner.completed(0)
    assert planner.start(due) == [2]


def test_one_family_at_two_destinations():
    """What is there says nothing of what is elsewhere."""
    tasks = [Task(n, f"x{n}", alike=True) for n in range(4)]
    planner = Planner(tasks, Limits(parallel=4))
    assert planner.start(0.0) == [] and planner.asked == [0, 1, 2, 3]
    for number in range(4):
        planner.related(number, (number % 2, "f"))
    assert planner.start(0.0) == [0, 1]
    planner.completed(1)
    assert planner.start(0.0) == [3]


def test_nobody_overtakes_one_that_is_asked_for():
    """Neither the more urgent, nor any number of others; and few are asked for at a time."""
    tasks = [Task(0, "low"), Task(1, "high", priority=1, alike=True)]
    planner = Planner(tasks, Limits(parallel=1))
    assert planner.start(0.0) == [] and planner.asked == [1]
    planner.related(1, None)
    assert planner.start(0.0) == [1]
    planner = Planner([Task(n, str(n), alike=True) for n in range(99)], Limits(parallel=99))
    planner.start(0.0)
    assert planner.asked == list(range(ASKED_AHEAD))
    planner.related(0, None)
    assert planner.start(0.0) == [0]
    assert planner.asked == list(range(1, ASKED_AHEAD + 1))


def test_one_with_a_limit_of_its_own_leads_nobody():
    tasks = [Task(0, "slow", max_rate=200_000, alike=True), Task(1, "a", alike=True)]
    planner = Planner(tasks, Limits(parallel=2))
    planner.start(0.0)
    for number in planner.asked:
        planner.related(number, "f")
    assert planner.start(0.0) == [0, 1]


def test_whose_it_is_can_be_said_once_and_after_a_cancel():
    planner = Planner([Task(0, "a", alike=True)], Limits())
    planner.start(0.0)
    planner.cancel()
    planner.related(0, "f")
    assert planner.start(0.0) == [] and planner.over
    with pytest.raises(ValueError, match="known"):
        planner.related(0, None)


def test_cancel_starts_nothing_more():
    planner = Planner([Task(0, "a"), Task(1, "b", retries=1), Task(2, "c")], Limits(parallel=2))
    planner.start(0.0)
    planner.failed(1, 0.0)
    planner.cancel()
    assert planner.start(100.0) == []
    assert not planner.over
    planner.completed(0)
    assert planner.over
    assert planner.states == {0: State.COMPLETED, 1: State.CANCELLED, 2: State.CANCELLED}


@pytest.mark.parametrize("method", ["completed", "cancelled"])
def test_what_does_not_run_cannot_end(method):
    planner = Planner([Task(0, "a")], Limits())
    with pytest.raises(ValueError, match="does not run"):
        getattr(planner, method)(0)
    with pytest.raises(ValueError, match="does not run"):
        planner.failed(0, 0.0)
    assert planner.start(0.0) == [0]


def test_fairness_index():
    assert jain([5, 5, 5, 5]) == pytest.approx(1.0)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) == 1.0


def test_a_drain_in_simulation():
    """The real planner over a few hosts: every guest arrives, near the least time there is."""
    plan = drain.Plan(guests=400, hosts=20, parallel=20, failing=0.05)
    result = drain.simulate(plan)
    assert result.states == {"completed": 400}
    assert result.attempts > 400
    assert result.seconds < 1.25 * result.least_seconds
    assert 0.999 < result.peak_link <= 1.0
    assert result.fairness > 0.9


def test_a_drain_over_a_narrow_backbone():
    """The limit of all is kept, and it is used."""
    plan = drain.Plan(guests=200, hosts=20, parallel=20, backbone=2_000_000_000, failing=0.0)
    result = drain.simulate(plan)
    assert result.states == {"completed": 200}
    assert 0.999 * plan.backbone < result.peak_rate <= plan.backbone
    assert result.seconds < 1.1 * result.least_seconds
