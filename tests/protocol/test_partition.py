"""Extents: who sends what in a round. No page without an owner, none with two."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.partition import Span, cut, extent_target
from pageferry.transport.pages import PAGE_SIZE

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def blocks(draw):
    """Pages of a block, pages of a group, dirty pages in each group."""
    group = draw(st.sampled_from([1, 4, 512]))
    pages = draw(st.integers(1, 20 * group))
    shares = draw(st.lists(st.sampled_from([0, 0, 1, 30, 70, 100]), min_size=20, max_size=20))
    largest = [min(group, pages - first) for first in range(0, pages, group)]
    counts = [-(-n * share // 100) for n, share in zip(largest, shares, strict=False)]
    return pages, group, np.array(counts, np.int64)


@given(blocks(), st.integers(0, 3), st.integers(1, 3000))
@examples
def test_extents_cover_every_dirty_group_once_and_no_clean_one(drawn, block, target):
    """Whole groups, ascending, within the block; and they know how many pages they hold."""
    pages, group, counts = drawn
    spans = list(cut(block, pages, group, counts, target))
    owner = {}
    end = 0
    for span in spans:
        assert span.block == block
        assert span.first >= end and span.count > 0
        end = span.first + span.count
        assert end <= pages
        # a host page has one owner: extents begin and end where groups do
        assert span.first % group == 0
        assert end % group == 0 or end == pages
        groups = range(span.first // group, -(-end // group))
        for index in groups:
            assert index not in owner
            owner[index] = span
        assert span.dirty == sum(int(counts[index]) for index in groups)
        assert span.dirty <= target or len(groups) == 1
    assert set(owner) == set(np.flatnonzero(counts).tolist())


@given(blocks(), st.integers(1, 3000))
@examples
def test_extents_are_as_large_as_they_may_be(drawn, target):
    """Two neighbours would not fit into one: handing out costs something, too."""
    pages, group, counts = drawn
    spans = list(cut(0, pages, group, counts, target))
    for a, b in pairwise(spans):
        if a.first + a.count == b.first:
            assert a.dirty + int(counts[b.first // group]) > target


def test_a_block_that_ends_within_a_group():
    """The last extent ends with the block."""
    counts = np.array([512, 0, 3], np.int64)
    assert list(cut(7, 1030, 512, counts, 8192)) == [Span(7, 0, 512, 512), Span(7, 1024, 6, 3)]


def test_a_clean_block_has_no_extents():
    """Nothing to send is no work."""
    assert list(cut(0, 2048, 512, np.zeros(4, np.int64), 512)) == []


def test_huge_host_pages_stay_whole():
    """1 GiB pages: a group of 262144 pages has one owner, however small extents should be."""
    group = (1 << 30) // PAGE_SIZE
    counts = np.array([5, group], np.int64)
    spans = list(cut(0, 2 * group, group, counts, 512))
    assert spans == [Span(0, 0, group, 5), Span(0, group, group, group)]


@pytest.mark.parametrize(
    ("dirty", "workers", "target"),
    [
        (0, 1, 512),
        (1000, 4, 512),  # a little work is not cut further
        (16 * 4 * 1000, 4, 1000),  # 16 turns each
        (10**9, 1, 8192),  # and no extent is longer than 32 MiB of pages
        (10**9, 64, 8192),
    ],
)
def test_the_size_of_an_extent(dirty, workers, target):
    """So that everybody has some and all end together."""
    assert extent_target(dirty, workers) == target
