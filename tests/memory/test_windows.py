"""Where a process maps a file, and what has changed about that, against dictionaries of pages."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.pages import PAGE_SIZE, pages_of
from pageferry.workers.guests.tracking import Window, common, joined, within, without

examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# for each page of an address space: the page of the file there, if any
layouts = st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=24)
# the same, mostly in runs
runs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=6).map(
    lambda parts: [
        x for first, n in parts for x in [None] * (n % 3) + list(range(first, first + n))
    ]
)
spaces = st.one_of(layouts, runs).map(
    lambda layout: {at: page for at, page in enumerate(layout) if page is not None}
)


def windows_of(space):
    """Each page by itself."""
    return [
        Window(at * PAGE_SIZE, PAGE_SIZE, page * PAGE_SIZE) for at, page in sorted(space.items())
    ]


def space_of(windows):
    return {
        w.address // PAGE_SIZE + i: w.offset // PAGE_SIZE + i
        for w in windows
        for i in range(w.length // PAGE_SIZE)
    }


def in_order(windows):
    return all(a.end <= b.address for a, b in pairwise(windows))


@given(spaces)
@examples
def test_joined_is_the_same_in_as_few_as_there_can_be(space):
    windows = joined(windows_of(space))
    assert space_of(windows) == space
    breaks = [at for at in space if space.get(at - 1) != space[at] - 1]
    assert len(windows) == len(breaks)
    assert joined(windows) == windows
    assert [set(pages_of(w.pages()).tolist()) for w in windows] == [
        set(space_of([w]).values()) for w in windows
    ]


@given(spaces, spaces, st.booleans())
@examples
def test_what_stays_goes_and_comes(old, new, split):
    """However finely either is cut."""
    before = joined(windows_of(old))
    after = windows_of(new) if split else joined(windows_of(new))
    kept = common(before, after)
    assert space_of(kept) == dict(old.items() & new.items())
    for whole in (before, after):
        rest = without(whole, kept)
        assert space_of(rest) == dict(space_of(whole).items() - space_of(kept).items())
        assert in_order(kept)
        assert in_order(rest)
        assert all(w.length > 0 for w in kept + rest)


@given(st.sets(st.integers(0, 40)), st.integers(0, 45))
@examples
def test_within_leaves_out_what_is_behind_the_end(pages, end):
    ordered = np.array(sorted(pages), np.int64)
    found = within((ordered, np.ones(len(ordered), np.int64)), end)
    assert set(pages_of(found).tolist()) == {page for page in pages if page < end}
    whole = within((np.array([3]), np.array([40])), end)
    assert set(pages_of(whole).tolist()) == set(range(3, min(43, end)))
