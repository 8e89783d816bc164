"""Which items of a batch run next, at which rate, and when one that failed is tried again. Pure:
time is an argument, and nothing here knows what an item moves, or how.

Every item passes gates: the outgoing side of its source host and the incoming side of its
destination host. A gate lets so many through at once and has a link of some capacity. Who runs is
a matter of priority, then of order; an item behind a shut gate holds up nobody behind open ones.
Relatives (images that are clones of one another, and go to one destination) have a gate of their
own: one at a time, until one has arrived; then all that follow have what is equal from it. So that
this is known, an item that may have relatives is asked for before it runs.
Rates are max-min fair (Bertsekas and Gallager, Data Networks, 6.5.2: filling), with the batch's
own limit as a link that all share.
"""

from __future__ import annotations

import enum
import heapq
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

# A migration takes no limit below 100 kB/s (Parameters): rather fewer items at once. The rest is
# for rounding.
LEAST_RATE = 101_000
# Items whose relatives are asked for at the same time.
ASKED_AHEAD = 16


class State(enum.Enum):
    """What has become of an item."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"  # it failed, and its time comes again
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (State.COMPLETED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Task:
    """An item as the planner sees it. `number`: its place in the order; `max_rate`: bytes a second,
    0 without limit; `retries`: how often it is tried again after it failed; `failures`: how often
    it has failed before; `alike`: it may have relatives, and does not run before `related` says
    whose."""

    number: int
    name: str
    source_host: str = ""
    destination_host: str = ""
    priority: int = 0
    max_rate: int = 0
    retries: int = 0
    failures: int = 0
    alike: bool = False


@dataclass(frozen=True)
class HostLimit:
    """One host's own limits, each for what leaves it and for what comes in. `max_rate`: bytes a
    second; `parallel`: items at once; 0 without limit."""

    max_rate: int = 0
    parallel: int = 0


@dataclass(frozen=True)
class Limits:
    """Of the whole batch. `parallel`: items at once, at least 1; `per_source`, `per_destination`:
    the same for each host, unless `hosts` says otherwise, 0 without limit; `max_rate`: bytes a
    second, 0 without limit; `backoff`, `max_backoff`: seconds; `put_offs`: how often an item may
    find its destination without room before that counts as a failure."""

    parallel: int = 4
    max_rate: int = 0
    per_source: int = 0
    per_destination: int = 0
    hosts: Mapping[str, HostLimit] = field(default_factory=dict)
    backoff: float = 1.0
    max_backoff: float = 60.0
    put_offs: int = 1000


def backoff(name: str, failures: int, limits: Limits) -> float:
    """Seconds until an item that has failed `failures` times is tried again: twice as long each
    time, at most max_backoff, and up to half of it less, by its name: those that failed together do
    not come back together, and the same batch waits the same times."""
    longest = min(limits.max_backoff, limits.backoff * 2.0 ** min(failures - 1, 60))
    share = zlib.crc32(f"{name}/{failures}".encode()) / (1 << 32)
    return longest * (0.5 + share / 2)


class _Gate:
    """One side of a host: how many are through, and who was last seen waiting before it."""

    def __init__(self, index: int, limit: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        # below this number each of them has a rate that a migration takes
        fitting = max(1, capacity // LEAST_RATE) if capacity else 0
        self.limit = min(limit or fitting, fitting or limit)
        self.inside = 0
        self.queue: list[tuple[int, int]] = []  # a heap of (-priority, number)

    @property
    def open(self) -> bool:
        return not self.limit or self.inside < self.limit


class Planner:
    """The plan of one batch. Methods raise ValueError where a task's state does not allow them, and
    change nothing then."""

    def __init__(self, tasks: Sequence[Task], limits: Limits) -> None:
        """`tasks`: those that are still to run."""
        self.limits = limits
        self.tasks = {task.number: task for task in tasks}
        self.states = dict.fromkeys(self.tasks, State.PENDING)
        self._to_end = len(self.tasks)
        self.failures = {number: task.failures for number, task in self.tasks.items()}
        self._put_off = dict.fromkeys(self.tasks, 0)
        self._due: list[tuple[float, int]] = []
        self._running: dict[int, None] = {}
        self._shares: dict[int, int] | None = None
        # Everybody is in one queue: of the gate that was shut when it was last looked at, or of
        # the first, which is no host's and always open.
        self._gates = [_Gate(0, 0, 0)]
        self._sides: dict[tuple[str, str], _Gate] = {}
        # The heads of queues whose gates are open, a heap of (head, index of the gate).
        self._heads: list[tuple[tuple[int, int], int]] = []
        self._way: dict[int, tuple[_Gate, ...]] = {
            number: self._gates_of(task) for number, task in self.tasks.items()
        }
        self._families: dict[Hashable, _Gate] = {}
        self._family: dict[int, _Gate] = {}  # of those that have one
        self._unknown = {task.number for task in self.tasks.values() if task.alike}
        # Those that would be looked at next, and are in no queue until it is known whose they are.
        self._asked: dict[tuple[int, int], None] = {}
        # The links that an item shares with others: 0 is the batch's own, others have their gate's
        # index.
        self._links = {
            number: [0] * bool(limits.max_rate) + [gate.index for gate in gates if gate.capacity]
            for number, gates in self._way.items()
        }
        fitting = max(1, limits.max_rate // LEAST_RATE) if limits.max_rate else limits.parallel
        self._parallel = min(limits.parallel, fitting)
        for number in self.tasks:
            self._enqueue(self._gates[0], number)

    # ---- what is asked -------------------------------------------------------------------

    @property
    def running(self) -> list[int]:
        """In the order in which they were started."""
        return list(self._running)

    @property
    def over(self) -> bool:
        """Nothing runs and nothing will."""
        return self._to_end == 0

    @property
    def asked(self) -> list[int]:
        """Items whose relatives are to be found out, the most urgent first: `start` starts nobody
        behind the first of them. Tell by `related`, and call `start` again."""
        return [number for _, number in sorted(self._asked)]

    def next_time(self) -> float | None:
        """When `start` should be called again, whatever else happens; None: only after something
        has ended."""
        while self._due and self.states[self._due[0][1]] is not State.WAITING:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def start(self, now: float) -> list[int]:
        """Those that run from now on, in order."""
        while (due := self.next_time()) is not None and due <= now:
            number = heapq.heappop(self._due)[1]
            self.states[number] = State.PENDING
            self._enqueue(self._gates[0], number)
        started = []
        while len(self._running) < self._parallel:
            following = self._next()
            if following is None:
                break
            self.states[following] = State.RUNNING
            self._running[following] = None
            for gate in self._way[following]:
                gate.inside += 1
            started.append(following)
            self._shares = None
        return started

    def shares(self) -> dict[int, int]:
        """What each running item may use, in bytes a second; 0 where nothing limits it."""
        if self._shares is None:
            self._shares = self._filled()
        return self._shares

    # ---- what is told --------------------------------------------------------------------

    def related(self, number: int, family: Hashable | None) -> None:
        """All that have the same `family` go to one destination and are alike; None: alone. One
        with a limit of its own is alone: others would wait for it at that rate."""
        if number not in self._unknown:
            raise ValueError(f"it is known whose item {number} is")
        self._unknown.remove(number)
        if family is not None and not self.tasks[number].max_rate:
            gate = self._families.get(family)
            if gate is None:
                gate = self._families[family] = self._new_gate(1, 0)
            self._family[number] = gate
            self._way[number] += (gate,)
        key = self._key(number)
        if key in self._asked:
            del self._asked[key]
            self._enqueue(self._gates[0], number)

    def completed(self, number: int) -> None:
        """It ran, and all is well."""
        self._leave(number)
        if number in self._family:
            self._family[number].limit = 0  # for good: whoever comes now has it from this one
        self._end(number, State.COMPLETED)

    def failed(self, number: int, now: float, *, again: bool = True) -> float | None:
        """It ran and failed. When it is tried again (its time, as `now`); None if never: it was
        tried often enough, or trying `again` makes no sense."""
        self._leave(number)
        self.failures[number] += 1
        task = self.tasks[number]
        if not again or self.failures[number] > task.retries:
            self._end(number, State.FAILED)
            return None
        return self._wait(number, now, self.failures[number])

    def put_off(self, number: int, now: float) -> float | None:
        """It ran and its destination had no room: tried again soon, and that is no failure until it
        has happened too often. Otherwise as `failed`."""
        if self._put_off[number] >= self.limits.put_offs:
            return self.failed(number, now)
        self._leave(number)
        self._put_off[number] += 1
        # room may be there any moment: never long
        return self._wait(number, now, min(self._put_off[number], 2))

    def _wait(self, number: int, now: float, times: int) -> float:
        due = now + backoff(self.tasks[number].name, times, self.limits)
        self.states[number] = State.WAITING
        heapq.heappush(self._due, (due, number))
        return due

    def cancelled(self, number: int) -> None:
        """It ran and was cancelled."""
        self._leave(number)
        self._end(number, State.CANCELLED)

    def cancel(self) -> None:
        """Nothing is started any more. What runs is told by its own end."""
        for number, state in self.states.items():
            if state in (State.PENDING, State.WAITING):
                self._end(number, State.CANCELLED)

    def _end(self, number: int, state: State) -> None:
        self.states[number] = state
        self._to_end -= 1

    # ---- gates and queues ----------------------------------------------------------------

    def _gates_of(self, task: Task) -> tuple[_Gate, _Gate]:
        return (
            self._gate("out", task.source_host, self.limits.per_source),
            self._gate("in", task.destination_host, self.limits.per_destination),
        )

    def _gate(self, side: str, host: str, limit: int) -> _Gate:
        gate = self._sides.get((side, host))
        if gate is None:
            own = self.limits.hosts.get(host, HostLimit())
            gate = self._new_gate(own.parallel or limit, own.max_rate)
            self._sides[side, host] = gate
        return gate

    def _new_gate(self, limit: int, capacity: int) -> _Gate:
        gate = _Gate(len(self._gates), limit, capacity)
        self._gates.append(gate)
        return gate

    def _key(self, number: int) -> tuple[int, int]:
        """In the order of these they run."""
        return -self.tasks[number].priority, number

    def _enqueue(self, gate: _Gate, number: int) -> None:
        key = self._key(number)
        heapq.heappush(gate.queue, key)
        if gate.open and gate.queue[0] == key:
            self._show_head(gate)

    def _show_head(self, gate: _Gate) -> None:
        """An entry that is no longer true is found out when it is taken."""
        if gate.queue:
            heapq.heappush(self._heads, (gate.queue[0], gate.index))

    def _next(self) -> int | None:
        """The first of all that no gate keeps from running; None if there is none, or somebody
        before it is asked for. Whoever is kept waits before that gate until it opens, so nobody is
        looked at in vain twice."""
        while self._heads:
            key, index = heapq.heappop(self._heads)
            gate = self._gates[index]
            if not gate.open or not gate.queue or gate.queue[0] != key:
                continue
            number = key[1]
            unknown = number in self._unknown
            if self._must_wait(key, unknown):
                self._show_head(gate)
                return None
            heapq.heappop(gate.queue)
            self._show_head(gate)
            if self.states[number] is not State.PENDING:  # cancelled meanwhile
                continue
            if unknown:
                self._asked[key] = None
                continue
            shut = next((g for g in self._way[number] if not g.open), None)
            if shut is None:
                return number
            self._enqueue(shut, number)
        return None

    def _must_wait(self, key: tuple[int, int], unknown: bool) -> bool:
        """Whether somebody before it is asked for, or too many are."""
        if unknown:
            return len(self._asked) >= ASKED_AHEAD
        return bool(self._asked) and key > min(self._asked)

    def _leave(self, number: int) -> None:
        if self.states[number] is not State.RUNNING:
            raise ValueError(f"item {number} does not run: it is {self.states[number].value}")
        del self._running[number]
        self._shares = None
        for gate in self._way[number]:
            was_open = gate.open
            gate.inside -= 1
            if not was_open:
                self._show_head(gate)

    # ---- rates ---------------------------------------------------------------------------

    def _filled(self) -> dict[int, int]:
        """All rates grow together; who meets its own limit or a full link stays where it is.

        One pass over limits in the order in which they are met: a link whose users have all met a
        lower limit is met later than it was thought, so its entry is looked at again.
        """
        if not self._running:
            return {}
        users: dict[int, list[int]] = {}  # link -> items
        for number in self._running:
            for link in self._links[number]:
                users.setdefault(link, []).append(number)
        left = {
            link: float(self._gates[link].capacity if link else self.limits.max_rate)
            for link in users
        }
        count = {link: len(numbers) for link, numbers in users.items()}
        # (level, is it a link, link or item)
        met = [(left[link] / n, True, link) for link, n in count.items()]
        met += [
            (float(cap), False, number)
            for number in self._running
            if (cap := self.tasks[number].max_rate)
        ]
        heapq.heapify(met)
        levels: dict[int, float] = {}
        while met:
            level, is_link, which = heapq.heappop(met)
            if is_link:
                if not count[which]:
                    continue
                now = left[which] / count[which]
                if now > level:
                    heapq.heappush(met, (now, True, which))
                    continue
                level = now
                full = [number for number in users[which] if number not in levels]
            else:
                full = [which] if which not in levels else []
            for number in full:
                levels[number] = level
                for link in self._links[number]:
                    left[link] -= level
                    count[link] -= 1
        # rounded down, so that a sum never exceeds its limit
        return {number: int(levels.get(number, 0.0)) for number in self._running}


def jain(rates: Sequence[float]) -> float:
    """Jain's fairness index (Jain, Chiu, Hawe 1984): 1 if all have the same, 1/n if one has all."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 1.0
