"""Pages and runs of pages, against sets of page numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.pages import (
    NO_RUNS,
    PAGE_SIZE,
    apart,
    check_runs,
    complement,
    mark,
    page_count,
    pages_of,
    runs_from_bytes,
    runs_of,
    total_pages,
    union,
)

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)

UNIVERSE = 120
page_sets = st.one_of(
    st.sets(st.integers(0, UNIVERSE - 1)),
    # nearly everything: few, long runs
    st.sets(st.integers(0, UNIVERSE - 1)).map(lambda holes: set(range(UNIVERSE)) - holes),
)


def sorted_array(pages):
    return np.array(sorted(pages), np.int64)


def as_set(runs):
    """The page numbers of `runs`, one Python int at a time."""
    found = set()
    for start, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
        found |= set(range(start, start + count))
    return found


def as_pairs(runs):
    return list(zip(runs[0].tolist(), runs[1].tolist(), strict=True))


@given(page_sets)
@examples
def test_runs_of_holds_exactly_the_pages_in_as_few_runs_as_possible(pages):
    """No page more or less, ascending, and no two runs that touch."""
    runs = runs_of(sorted_array(pages))
    assert as_set(runs) == pages
    assert total_pages(runs) == len(pages)
    pairs = as_pairs(runs)
    assert all(count > 0 for _, count in pairs)
    assert all(a + n < b for (a, n), (b, _) in pairwise(pairs))
    assert runs[0].dtype == runs[1].dtype == np.int64


@given(page_sets)
@examples
def test_pages_of_undoes_runs_of(pages):
    """Runs and page numbers say the same."""
    array = sorted_array(pages)
    assert pages_of(runs_of(array)).tolist() == array.tolist()


@given(page_sets, st.integers(0, UNIVERSE))
@examples
def test_complement_is_the_rest_of_the_block(pages, size):
    """Every page below `size` is in the runs or in the complement, never in both."""
    inside = {page for page in pages if page < size}
    rest = complement(runs_of(sorted_array(inside)), size)
    assert as_set(rest) == set(range(size)) - inside
    assert check_runs(rest, size)
    assert rest[0].dtype == rest[1].dtype == np.int64


@given(page_sets, st.integers(1, 255))
@examples
def test_mark_stores_the_value_where_the_runs_are(pages, value):
    """And nowhere else."""
    table = np.full(UNIVERSE, 200, np.uint8)
    expected = [value if page in pages else 200 for page in range(UNIVERSE)]
    mark(table, runs_of(sorted_array(pages)), value)
    assert table.tolist() == expected


def test_mark_with_more_runs_than_slices_are_worth():
    """Many long runs: more page numbers than are expanded at a time."""
    runs = 1500
    starts = np.arange(runs, dtype=np.int64) * 1000 + 7
    counts = np.full(runs, 900, np.int64)
    table = np.zeros(runs * 1000 + 7, np.uint8)
    mark(table, (starts, counts), 1)
    expected = np.zeros_like(table)
    for start in starts.tolist():
        expected[start : start + 900] = 1
    assert np.array_equal(table, expected)


def test_mark_with_one_run_longer_than_what_is_expanded_at_a_time():
    """The step never becomes empty, however long a run is."""
    runs = 1030
    starts = np.arange(runs, dtype=np.int64) * 2
    counts = np.ones(runs, np.int64)
    counts[-1] = 1 << 21
    table = np.zeros(int(starts[-1] + counts[-1]) + 1, np.uint8)
    mark(table, (starts, counts), 1)
    assert int(table.sum()) == int(counts.sum())
    assert table[-1] == 0 and table[-2] == 1 and table[1] == 0


def naive_check(pairs, pages):
    """What `check_runs` promises, with integers that cannot overflow."""
    end = 0
    for start, count in pairs:
        if count < 1 or start < end or start + count > pages:
            return False
        end = start + count
    return True


edges = st.sampled_from([-(2**63), -1, 0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1])
starts = st.one_of(st.integers(-2, 40), edges)
counts = st.one_of(st.integers(0, 12), st.sampled_from([2**32 - 1, 2**31, 0]))


@given(st.lists(st.tuples(starts, counts), max_size=5), st.sampled_from([1, 16, 40, 2**40]))
@settings(examples, max_examples=125)
def test_check_runs_says_what_a_check_without_overflow_says(pairs, pages):
    """Tables straight from the wire: any 64-bit start, any 32-bit count."""
    table = (
        np.array([start for start, _ in pairs], np.int64),
        np.array([count for _, count in pairs], np.int64),
    )
    assert check_runs(table, pages) is naive_check(pairs, pages)


@given(st.lists(st.sets(st.integers(0, 30), max_size=6), max_size=3))
@examples
def test_apart_says_whether_a_page_is_in_two_tables(sets):
    """As sets say it."""
    tables = [runs_of(np.array(sorted(pages), np.int64)) for pages in sets]
    assert apart(tables) is (sum(map(len, sets)) == len(set().union(*sets)))


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 3), (3, 2), (5, 5)],  # touching runs are no overlap
        [(0, 3), (2, 2), (5, 5)],
        [(3, 2), (0, 3)],
        [(0, 9), (9, 1)],
        [(0, 9), (9, 2)],
        [(0, 9), (10, 1)],
        [(0, 1), (1, 0), (1, 1)],
        [(0, 1), (5, 2**32 - 1)],
        [(0, 1), (2**63 - 1, 1)],
        [(-1, 1), (5, 1)],
        [(0, 1), (-5, 1), (6, 1)],
    ],
)
def test_check_runs_at_its_edges(pairs):
    """In a block of ten pages."""
    table = tuple(np.array(column, np.int64) for column in zip(*pairs, strict=True))
    assert check_runs(table, 10) is naive_check(pairs, 10)


@given(page_sets)
@examples
def test_check_runs_accepts_all_runs_that_we_make(pages):
    """In a block that just holds them, and in no smaller one."""
    runs = runs_of(sorted_array(pages))
    size = max(pages, default=-1) + 1
    assert check_runs(runs, size)
    if pages:
        assert not check_runs(runs, size - 1)


@given(
    st.lists(st.tuples(st.integers(0, 3 * PAGE_SIZE), st.integers(1, 3 * PAGE_SIZE)), max_size=6)
)
@examples
def test_runs_from_bytes_holds_every_page_that_is_touched(steps):
    """Ascending byte ranges, some of them in the same page."""
    ranges, at = [], 0
    for gap, length in steps:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    touched = {
        page
        for begin, end in ranges
        for page in range(begin // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)
    }
    runs = runs_from_bytes(ranges)
    assert as_set(runs) == touched
    assert total_pages(runs) == len(touched)
    assert check_runs(runs, page_count(at))
    assert all(a + n < b for (a, n), (b, _) in pairwise(as_pairs(runs))), "touching runs"


def test_runs_from_bytes_merges_a_range_inside_of_another():
    """The longer one's end counts."""
    runs = runs_from_bytes([(0, 10 * PAGE_SIZE), (PAGE_SIZE, 2 * PAGE_SIZE)])
    assert as_pairs(runs) == [(0, 10)]


@pytest.mark.parametrize(
    ("size", "pages"),
    [(0, 0), (1, 1), (PAGE_SIZE - 1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2), (2**52, 2**40)],
)
def test_page_count_counts_a_tail_as_a_page(size, pages):
    """Bytes to pages, rounded up."""
    assert page_count(size) == pages


def test_no_pages_are_no_runs():
    """The empty set in all its forms."""
    assert as_pairs(runs_of(np.empty(0, np.int64))) == []
    assert as_pairs(runs_from_bytes([])) == []
    assert pages_of(NO_RUNS).tolist() == []
    assert total_pages(NO_RUNS) == 0
    assert check_runs(NO_RUNS, 0)
    assert as_pairs(complement(NO_RUNS, 5)) == [(0, 5)]
    assert as_pairs(complement(NO_RUNS, 0)) == []


@given(st.lists(page_sets, max_size=5), st.randoms(use_true_random=False))
@examples
def test_union_holds_what_any_part_holds(parts, draw):
    """In as few runs as possible, however many parts, and whatever their order."""
    cut = []
    for part in parts:
        starts, counts = runs_of(sorted_array(part))
        order = list(range(len(starts)))
        draw.shuffle(order)
        cut.append((starts[order], counts[order]))
    found = union(cut)
    assert as_set(found) == set().union(*parts)
    assert as_pairs(found) == as_pairs(runs_of(sorted_array(set().union(*parts))))
    assert found[0].dtype == found[1].dtype == np.int64
