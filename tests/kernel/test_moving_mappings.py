"""The real kernel: what a process writes is found, however it maps and unmaps meanwhile: every page
that was written, and none that was not, but for mappings that are new or gone."""

import mmap
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared_writer import PAGE, READ, READ_WRITE, SharedWriter

from pageferry.transport.errors import AttachError, HostLacks, SourceError
from pageferry.transport.pages import check_runs, pages_of
from pageferry.workers.guests import tracking
from pageferry.workers.guests.tracking import WriteTracker, windows
from pageferry.workers.ram import RamFile

PAGES = 2048


class Tracked:
    """A process, its memory, and what is said to have been written."""

    def __init__(self, target, **how):
        fd = os.open(f"/proc/{target.pid}/fd/{target.fd}", os.O_RDWR)
        self.target, self.file = target, RamFile(fd, "the memory")
        self.tell = target.tell
        try:
            self.tracker = WriteTracker(target.pid, [self.file], **how)
        except BaseException:
            self.file.close()
            raise

    def start(self):
        self.tracker.prepare()
        self.tracker.start()

    def written(self):
        runs = self.tracker.written(0)
        assert check_runs(runs, os.fstat(self.file.fd).st_size // PAGE)
        return set(pages_of(runs).tolist())

    def close(self):
        self.tracker.close()
        self.file.close()


def its_memory(pid):
    """Its descriptor of the memory: the only memfd."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/memfd:"):
            return fd
    raise AssertionError("it has no memfd")


@pytest.fixture
def target():
    with SharedWriter("obey", "memfd:tracked", PAGES) as target:
        target.fd = its_memory(target.pid)
        yield target


@pytest.fixture
def follow(target):
    """Start to track it, whatever it maps by then."""
    made = []

    def follow(**how):
        try:
            made.append(Tracked(target, **{"moving": True} | how))
            made[0].start()
        except HostLacks as e:
            pytest.skip(str(e))
        return made[0]

    yield follow
    for tracked in made:
        tracked.close()


def test_a_new_mapping_counts_throughout_then_exactly(follow):
    tracked = follow()
    assert tracked.written() == set()
    tracked.tell("map", 0, 100, 600)
    assert tracked.written() == set(range(100, 700))
    assert tracked.written() == set()
    tracked.tell("write", 0, 7, 599)
    assert tracked.written() == {100, 107, 699}
    tracked.tell("read", 8)
    assert tracked.written() == set()


def test_what_is_gone_counts_throughout(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("write", 3)
    tracked.tell("unmap", 0, 50)
    assert tracked.written() == set(range(50))
    assert tracked.written() == set()


def test_only_the_part_that_is_gone_counts(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("write", 3, 21, 40)
    tracked.tell("unmap", 20, 5)
    assert tracked.written() == {3, *range(20, 25), 40}
    tracked.tell("write", 3, 40)
    assert tracked.written() == {3, 40}


def test_only_the_part_that_is_new_counts(follow, target):
    """Beside the old one: the kernel makes one mapping of both, and so do we."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("map", 50, 50, 10)
    tracked.tell("write", 3)
    assert tracked.written() == {3, *range(50, 60)}
    tracked.tell("write", 3, 55)
    assert tracked.written() == {3, 55}
    assert len(windows(tracked.target.pid, tracked.file)) == 1


def test_the_same_mapping_made_anew_between_two_looks(follow, target):
    """Nothing in /proc/PID/maps tells it from the old one; but nobody tracks it."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("map", 0, 0, 50)
    tracked.tell("write", 3)
    assert tracked.written() == set(range(50))
    tracked.tell("write", 3)
    assert tracked.written() == {3}


def test_a_part_made_anew_between_two_looks(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("write", 3)
    tracked.tell("map", 20, 20, 5)
    assert tracked.written() == {3, *range(20, 25)}
    tracked.tell("write", 3, 22)
    assert tracked.written() == {3, 22}


def test_a_mapping_that_moves(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("move", 0, 50, 1000)
    assert tracked.written() == set(range(50))
    tracked.tell("write", 1003)
    assert tracked.written() == {3}
    tracked.tell("move", 1000, 50, 0)
    tracked.tell("write", 5)
    assert tracked.written() == set(range(50))


def test_moved_away_and_back_between_two_looks(follow, target):
    """The kernel lets go of what is moved: it has to be found out."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("move", 0, 50, 1000)
    tracked.tell("move", 1000, 50, 0)
    assert tracked.written() == set(range(50))
    tracked.tell("write", 5)
    assert tracked.written() == {5}


def test_advice_splits_a_mapping_and_changes_nothing(follow, target):
    target.tell("map", 0, 0, 600)
    target.tell("write", *range(600))
    tracked = follow()
    for first in range(0, 600, 20):
        tracked.tell("advise", first, 10, mmap.MADV_RANDOM)
    tracked.tell("advise", 100, 3, mmap.MADV_DONTFORK)
    assert tracked.written() == set()
    tracked.tell("write", 5, 15, 101, 599)
    assert tracked.written() == {5, 15, 101, 599}
    tracked.tell("advise", 0, 600, mmap.MADV_NORMAL)
    assert tracked.written() == set()


def test_what_may_not_be_written_for_a_while(follow, target):
    """Read only at a look: gone, and new when it may be written again. Between looks: nothing."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("write", 3)
    tracked.tell("protect", 20, 5, READ)
    assert tracked.written() == {3, *range(20, 25)}
    tracked.tell("write", 3, 30)
    assert tracked.written() == {3, 30}
    tracked.tell("protect", 20, 5, READ_WRITE)
    assert tracked.written() == set(range(20, 25))
    tracked.tell("protect", 20, 5, READ)
    tracked.tell("protect", 20, 5, READ_WRITE)
    tracked.tell("write", 22)
    assert tracked.written() == {22}


def test_other_memory_in_the_middle(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("cover", 20, 5)
    tracked.tell("write", 3, 22)
    assert tracked.written() == {3, *range(20, 25)}
    tracked.tell("write", 22)
    assert tracked.written() == set()


def test_two_mappings_of_the_same_pages(follow, target):
    target.tell("map", 0, 0, 50)
    target.tell("map", 100, 25, 50)
    tracked = follow()
    tracked.tell("write", 30, 106, 149)  # pages 30, 31, 74
    assert tracked.written() == {30, 31, 74}
    tracked.tell("write", 30, 105)
    assert tracked.written() == {30}


def test_a_mapping_longer_than_the_file(follow, target):
    tracked = follow()
    tracked.tell("map", 0, PAGES - 10, 50)
    assert tracked.written() == set(range(PAGES - 10, PAGES))
    tracked.tell("truncate", PAGES - 5)
    tracked.tell("write", 2)
    tracked.tell("unmap", 0, 50)
    assert tracked.written() == set(range(PAGES - 10, PAGES - 5))


def test_what_is_not_seen(follow, target):
    """For these whoever uses it needs another look (pid: compares contents)."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    tracked.tell("pwrite", 5)
    tracked.tell("fork_and_write", 6)
    tracked.tell("map", 100, 0, 50)
    tracked.tell("write", 107)
    tracked.tell("unmap", 100, 50)
    assert tracked.written() == set()


# ---- while we look -----------------------------------------------------------------------------


@pytest.fixture
def meanwhile(monkeypatch):
    """Something happens just before a mapping is registered."""

    def meanwhile(act):
        register = tracking.register_write_protect

        def and_then(uffd, start, length):
            act()
            register(uffd, start, length)

        monkeypatch.setattr(tracking, "register_write_protect", and_then)

    return meanwhile


def test_what_goes_while_we_look_counts(follow, meanwhile):
    tracked, todo = follow(), [("unmap", 0, 50)]
    tracked.tell("map", 0, 0, 50)
    meanwhile(lambda: tracked.tell(*todo.pop()) if todo else None)
    assert tracked.written() == set(range(50))
    assert not todo
    assert tracked.written() == set()


def test_what_takes_its_place_while_we_look_is_found_next_time(follow, meanwhile):
    tracked, todo = follow(), [("cover", 0, 50)]
    tracked.tell("map", 0, 0, 50)
    meanwhile(lambda: tracked.tell(*todo.pop()) if todo else None)
    assert tracked.written() == set(range(50))
    tracked.tell("map", 0, 0, 50)
    tracked.tell("write", 3)
    assert tracked.written() == set(range(50))
    tracked.tell("write", 4)
    assert tracked.written() == {4}


def test_it_gives_up_on_one_that_changes_at_every_look(follow, meanwhile):
    """A mapping that is elsewhere each time."""
    tracked, at = follow(), [0]

    def move():
        tracked.tell("move", at[0], 50, at[0] + 100)
        at[0] += 100

    tracked.tell("map", 0, 0, 50)
    meanwhile(move)
    with pytest.raises(SourceError, match="has changed how it maps the memory"):
        tracked.written()
    assert at[0] == 800


def test_after_giving_up_nothing_is_thought_to_be_tracked(follow, meanwhile, monkeypatch):
    tracked = follow()
    tracked.tell("map", 0, 0, 50)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_LOOKS", 0)
        with pytest.raises(SourceError):
            tracked.written()
    tracked.tell("write", 3)
    assert tracked.written() == set(range(50))


# ---- ends --------------------------------------------------------------------------------------


def execute(target):
    target.process.stdin.write('["execute"]\n')
    target.process.stdin.flush()
    assert target.line() == "ready\n"


def test_it_becomes_another_program(follow, target):
    """Its memory is a new one then, which the userfaultfd knows nothing of."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    execute(target)
    assert tracked.written() == set(range(50))
    assert tracked.written() == set()
    tracked.tell("map", 0, 0, 50)
    with pytest.raises(SourceError, match="another program"):
        tracked.written()


def test_it_becomes_another_program_that_looks_the_same(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    execute(target)
    tracked.tell("map", 0, 0, 50)
    with pytest.raises(SourceError, match="another program"):
        tracked.written()


def test_it_ends(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow()
    target.process.kill()
    target.process.wait()
    with pytest.raises(SourceError, match="cannot read what process"):
        tracked.written()


def test_it_is_as_it_was_afterwards(follow, target):
    """Another tracker may come, but not while this one is there."""
    target.tell("map", 0, 0, 50)
    tracked = follow()
    other = Tracked(target, moving=True)
    with pytest.raises(HostLacks, match="by somebody else"):
        other.start()
    tracked.tracker.close()
    other.start()
    target.tell("write", 9)
    assert other.written() == {9}
    other.close()


# ---- strict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [("map", 50, 50, 10), ("unmap", 10, 10), ("map", 0, 0, 50), ("move", 0, 50, 1000),
     ("protect", 0, 10, READ)],
)  # fmt: skip
def test_a_change_that_is_not_expected_is_an_error(follow, target, change):
    """Even if nobody could see it."""
    target.tell("map", 0, 0, 50)
    tracked = follow(moving=False)
    tracked.tell("write", 3)
    assert tracked.written() == {3}
    tracked.tell(*change)
    with pytest.raises(SourceError, match="has changed how it maps the memory meanwhile"):
        tracked.written()


def test_splits_are_no_change(follow, target):
    target.tell("map", 0, 0, 50)
    tracked = follow(moving=False)
    tracked.tell("advise", 10, 10, mmap.MADV_RANDOM)
    tracked.tell("write", 3, 12)
    assert tracked.written() == {3, 12}


# ---- any of it ---------------------------------------------------------------------------------

SLOTS, FILE, LONGEST = 24, 16, 8
OPERATIONS = ["map", "map", "unmap", "cover", "move", "protect", "advise", "write", "write",
              "write", "read", "look", "look"]  # fmt: skip
some = st.integers(0, 47)
steps = st.tuples(st.sampled_from(OPERATIONS), some, some, some)


class Model:
    """What is mapped where, and what a look must say. `slots` has, for each page of the arena, the
    page of the file, whether it may be written, and which mapping that is, or None."""

    def __init__(self):
        self.slots = [None] * (SLOTS + LONGEST)
        self.advice = [mmap.MADV_NORMAL] * len(self.slots)
        self.made = 0
        self.seen = list(self.slots)
        self.wrote = []

    def fit(self, what, a, b, c):
        """The step that these numbers stand for, of those that the kernel would not refuse."""
        pages = 1 + c % LONGEST
        if what == "map":
            return what, a % SLOTS, b % FILE, pages
        if what in ("unmap", "cover"):
            return what, a % SLOTS, pages
        where = [i for i, slot in enumerate(self.slots) if slot and (slot[1] or what != "write")]
        if not where:
            return None
        at = where[a % len(where)]
        if what in ("write", "read"):
            return what, at
        if what == "move":
            one = self._run(at, pages, lambda i: self.slots[i] == self._next(i - 1))
            to = b % SLOTS
            return (what, at, one, to) if to + one <= at or at + one <= to else None
        several = self._run(at, pages, lambda i: self.slots[i])
        choices = {
            "protect": (READ, READ_WRITE),
            "advise": (mmap.MADV_RANDOM, mmap.MADV_NORMAL, mmap.MADV_DONTNEED),
        }[what]
        return what, at, several, choices[b % len(choices)]

    def _run(self, at, most, belongs):
        """How many from `at`, up to `most`."""
        return next((i for i in range(1, most) if not belongs(at + i)), most)

    def _next(self, i):
        """What follows in the same mapping of the kernel; of other advice there is none."""
        page, *rest = self.slots[i]
        return (page + 1, *rest) if self.advice[i] == self.advice[i + 1] else ()

    def take(self, what, at, *rest):
        if what == "map":
            first, pages = rest
            self.made += 1
            self._put(at, [(first + i, True, self.made) for i in range(pages)])
        elif what in ("unmap", "cover"):
            self._put(at, [None] * rest[0])
        elif what == "move":
            pages, to = rest
            self.made += 1
            moved, advice = self.slots[at : at + pages], self.advice[at]
            self._put(at, [None] * pages)
            self._put(to, [(page, writable, self.made) for page, writable, _ in moved], advice)
        elif what == "protect":
            pages, access = rest
            for i in range(at, at + pages):
                page, _, which = self.slots[i]
                self.slots[i] = (page, access == READ_WRITE, which)
        elif what == "advise" and rest[1] != mmap.MADV_DONTNEED:
            self.advice[at : at + rest[0]] = [rest[1]] * rest[0]
        elif what == "write":
            self.wrote.append((at, self.slots[at]))

    def _put(self, at, slots, advice=mmap.MADV_NORMAL):
        self.slots[at : at + len(slots)] = slots
        self.advice[at : at + len(slots)] = [advice] * len(slots)

    def look(self):
        """Pages that must be reported: written where it is tracked, or changed; no others may."""
        now = [slot if slot and slot[1] else None for slot in self.slots]
        changed = {
            slot[0]
            for old, new in zip(self.seen, now, strict=True)
            if old != new
            for slot in (old, new)
            if slot is not None
        }
        kept = {slot[0] for at, slot in self.wrote if slot == now[at] == self.seen[at]}
        self.seen, self.wrote = now, []
        return changed | kept


@pytest.fixture
def arena():
    """One process for all examples; each begins with nothing mapped."""
    with SharedWriter("obey", "memfd:tracked", SLOTS + FILE) as target:
        target.fd = its_memory(target.pid)
        try:
            tracked = Tracked(target, moving=True)
            tracked.start()
        except (HostLacks, AttachError) as e:
            pytest.skip(str(e))
        yield tracked
        tracked.close()


@given(plan=st.lists(steps, max_size=40))
@settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_whatever_it_does_just_what_it_wrote_is_found(arena, plan):
    arena.tell("unmap", 0, SLOTS + LONGEST)
    arena.written()
    model = Model()
    for what, *numbers in [*plan, ("look", 0, 0, 0)]:
        if what == "look":
            assert arena.written() == model.look()
        elif step := model.fit(what, *numbers):
            arena.tell(*step)
            model.take(*step)
