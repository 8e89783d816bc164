"""The page table: one byte a page, of all blocks, in shared memory."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.pages import runs_of
from pageferry.workers.page_table import CLEAN, DIRTY, GROUP, IN_FLIGHT, PageTable

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture
def make():
    """Makes tables that are closed at the end; a test must drop its views itself."""
    made = []

    def make_table(*pages):
        made.append(PageTable(list(pages)))
        return made[-1]

    yield make_table
    for table in made:
        table.close()


def runs(*pages):
    return runs_of(np.array(pages, np.int64))


def test_a_new_table_is_clean(make):
    """Nothing has to travel before somebody says so."""
    table = make(3, 5)
    for block in (0, 1):
        assert table.view(block).tolist() == [CLEAN] * [3, 5][block]
    assert table.remaining() == 0


def test_blocks_do_not_touch_each_other(make):
    """Marks in one show in no other."""
    table = make(3, 5, 2)
    table.mark_dirty(1, runs(0, 4))
    assert [table.view(block).tolist() for block in range(3)] == [
        [CLEAN] * 3,
        [DIRTY, CLEAN, CLEAN, CLEAN, DIRTY],
        [CLEAN] * 2,
    ]
    table.view(2)[:] = IN_FLIGHT
    assert table.view(1).tolist() == [DIRTY, CLEAN, CLEAN, CLEAN, DIRTY]
    assert table.remaining() == 4


def test_what_is_in_flight_is_not_done(make):
    """It counts as remaining until it is acknowledged."""
    table = make(4)
    table.mark_dirty(0, runs(0, 1, 2))
    view = table.view(0)
    view[0], view[1] = CLEAN, IN_FLIGHT
    assert table.remaining() == 2
    assert table.group_counts(0).tolist() == [2]
    view[1] = CLEAN
    assert table.remaining() == 1
    del view


def test_a_page_written_in_flight_is_dirty_again(make):
    """The coordinator's mark wins, whatever the state was."""
    table = make(3)
    table.view(0)[:] = [CLEAN, IN_FLIGHT, DIRTY]
    table.mark_dirty(0, runs(0, 1, 2))
    assert table.view(0).tolist() == [DIRTY] * 3


@given(st.integers(1, 3000), st.sampled_from([1, 7, 512, 2048, 4096]), st.data())
@examples
def test_group_counts_count_each_group(pages, group, data):
    """What is not clean, in every group, the last one short."""
    states = data.draw(st.lists(st.sampled_from([CLEAN, DIRTY, IN_FLIGHT]), min_size=1, max_size=9))
    table = PageTable([11, pages])
    try:
        content = np.resize(np.array(states, np.uint8), pages)
        table.view(1)[:] = content
        expected = [
            sum(state != CLEAN for state in content[at : at + group].tolist())
            for at in range(0, pages, group)
        ]
        assert table.group_counts(1, group).tolist() == expected
        assert sum(expected) == table.remaining()
        assert table.group_counts(0, group).sum() == 0
    finally:
        table.close()


@pytest.mark.parametrize("group", [GROUP, 3 * GROUP, 1 << 21])
def test_group_counts_of_a_large_block(make, group):
    """Counted in parts: the groups at the seams are whole."""
    pages = 3 * GROUP * 2048 + 5
    table = make(pages)
    dirty = np.arange(0, pages, 100, dtype=np.int64)
    table.mark_dirty(0, (dirty, np.ones_like(dirty)))
    counts = table.group_counts(0, group)
    assert counts.tolist() == np.bincount(dirty // group, minlength=-(-pages // group)).tolist()


def test_workers_see_the_same_bytes(make):
    """A table pickles as an attachment to the same memory; its end is the owner's business."""
    table = make(2, 3)
    theirs = pickle.loads(pickle.dumps(table))
    theirs.view(1)[2] = IN_FLIGHT
    assert table.view(1).tolist() == [CLEAN, CLEAN, IN_FLIGHT]
    theirs.close()
    assert table.remaining() == 1


def test_nothing_is_left_after_close(make):
    """Neither a name nor a mapping; closing twice is harmless."""
    table = make(10)
    name = table._segment.name
    assert os.path.exists(f"/dev/shm/{name}")
    table.close()
    assert not os.path.exists(f"/dev/shm/{name}")
    table.close()
