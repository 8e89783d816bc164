"""A drain of many guests over many hosts, by the planner of batches with a simulated clock.

Half of the hosts are emptied into the other half. A guest moves at the rate that the planner gives
it until its memory is there, or fails on the way and is tried again. No bytes, no sockets, no
sleeping: what is measured of this host is only what a decision costs.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...pipeline.planner import HostLimit, Limits, Planner, Task, jain
from ...transport.quantities import format_bytes, format_rate, format_seconds

# Guests' memory in GiB, and how common each is.
_SIZES = {2: 30, 4: 30, 8: 20, 16: 12, 32: 6, 64: 2}


@dataclass(frozen=True)
class Plan:
    """Rates in bytes a second; `failing`: the share of attempts that fail, half way."""

    guests: int = 10_000
    hosts: int = 500
    link: int = 1_250_000_000
    backbone: int = 0
    parallel: int = 500
    per_host: int = 2
    failing: float = 0.01
    seed: int = 1


@dataclass
class Result:
    """Of one drain. Times in simulated seconds but for `costs`, which are real ones: of each
    decision (what to start, and everybody's new share)."""

    states: Counter[str]
    seconds: float
    least_seconds: float
    bytes_moved: float
    peak_rate: float
    peak_link: float
    fairness: float
    worst_fairness: float
    attempts: int
    costs: list[float]


def tasks_of(plan: Plan) -> tuple[list[Task], dict[int, float]]:
    """Guests and their sizes. Sources hold as many each; a guest goes to where least is."""
    draw = random.Random(plan.seed)
    half = max(1, plan.hosts // 2)
    sizes, load = {}, [0.0] * half
    tasks = []
    for number in range(plan.guests):
        gib = draw.choices(list(_SIZES), list(_SIZES.values()))[0]
        sizes[number] = (gib << 30) * draw.uniform(0.5, 1.0)  # what of it holds anything
        there = min(range(half), key=load.__getitem__)
        load[there] += sizes[number]
        tasks.append(
            Task(
                number, f"guest{number}", f"old{number % half}", f"new{there}",
                priority=int(gib >= 32),  # the long ones first
                retries=10,
            )
        )  # fmt: skip
    return tasks, sizes


def simulate(plan: Plan) -> Result:
    """From the first decision to the last guest."""
    tasks, sizes = tasks_of(plan)
    by_number = {task.number: task for task in tasks}
    names = {host for task in tasks for host in (task.source_host, task.destination_host)}
    limits = Limits(
        plan.parallel, plan.backbone, plan.per_host, plan.per_host,
        {name: HostLimit(plan.link) for name in names},
    )  # fmt: skip
    draw = random.Random(plan.seed + 1)
    planner = Planner(tasks, limits)
    left: dict[int, float] = {}
    fails: set[int] = set()
    costs: list[float] = []
    now = moved = peak = peak_link = weighted = 0.0
    worst, attempts = 1.0, 0
    while True:
        begin = time.perf_counter()
        started = planner.start(now)
        shares = planner.shares()
        costs.append(time.perf_counter() - begin)
        for number in started:
            attempts += 1
            left[number] = sizes[number]
            if draw.random() < plan.failing:
                fails.add(number)
                left[number] /= 2
        due = planner.next_time()
        if not shares and due is None:
            break
        step = min((left[number] / rate for number, rate in shares.items()), default=1e30)
        if due is not None:
            step = min(step, max(0.0, due - now))
        fairness = jain(list(shares.values()))
        weighted += fairness * step
        worst = min(worst, fairness)
        peak = max(peak, float(sum(shares.values())))
        peak_link = max(peak_link, _busiest(shares, by_number))
        now += step
        for number, rate in shares.items():
            moved += rate * step
            left[number] -= rate * step
            if left[number] < 1.0:  # less than a byte is rounding
                if number in fails:
                    fails.discard(number)
                    planner.failed(number, now)
                else:
                    planner.completed(number)
    return Result(
        Counter(state.value for state in planner.states.values()),
        now, _least(tasks, sizes, plan), moved, peak, peak_link / plan.link,
        weighted / now, worst, attempts, costs,
    )  # fmt: skip


def _busiest(shares: dict[int, int], tasks: dict[int, Task]) -> float:
    """Bytes a second on the link that has most."""
    use: dict[str, float] = {}
    for number, rate in shares.items():
        for host in (tasks[number].source_host, tasks[number].destination_host):
            use[host] = use.get(host, 0.0) + rate
    return max(use.values(), default=0.0)


def _least(tasks: Sequence[Task], sizes: dict[int, float], plan: Plan) -> float:
    """No plan is faster: the fullest link at its full rate, or all of it over the backbone."""
    load: dict[str, float] = {}
    for task in tasks:
        for host in (task.source_host, task.destination_host):
            load[host] = load.get(host, 0.0) + sizes[task.number]
    least = max(load.values()) / plan.link
    return max(least, sum(sizes.values()) / plan.backbone) if plan.backbone else least


def table(result: Result, plan: Plan) -> str:
    """For people."""
    costs = sorted(result.costs)
    ended = ", ".join(f"{count} {state}" for state, count in sorted(result.states.items()))
    full = plan.backbone or min(plan.parallel, plan.hosts // 2 * plan.per_host) * plan.link
    full = min(full, plan.hosts // 2 * plan.link)
    rows = [
        ("guests", f"{ended}, {result.attempts} attempts"),
        ("moved", format_bytes(result.bytes_moved)),
        ("time", f"{format_seconds(result.seconds)}, {result.seconds / result.least_seconds:.2f} "
                 f"times the least that the links allow ({format_seconds(result.least_seconds)})"),
        ("peak of a host's link", f"{result.peak_link:.1%}"),
        ("peak of all", f"{format_rate(result.peak_rate)}, {result.peak_rate / full:.1%} of what "
                        f"there is"),
        ("mean of all", f"{result.bytes_moved / result.seconds / full:.1%} of what there is"),
        ("fairness (Jain)", f"{result.fairness:.3f} on average over time, "
                            f"{result.worst_fairness:.3f} at worst"),
        ("a decision", f"{1e6 * sum(costs) / len(costs):.0f} us on average, "
                       f"{1e6 * costs[int(len(costs) * 0.99)]:.0f} us p99, "
                       f"{1e6 * costs[-1]:.0f} us at most, {len(costs)} of them"),
    ]  # fmt: skip
    return "\n".join(f"{name:<24}{text}" for name, text in rows)
