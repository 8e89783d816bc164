"""Memory that is given back at the source: only what is CLEAN, only whole host pages, and never
what a recovery would send again."""

import asyncio
import os
import resource
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.releasing import Releasing
from pageferry.transport.messages import Block
from pageferry.transport.pages import runs_of
from pageferry.workers import hollow
from pageferry.workers.page_table import CLEAN, DIRTY, IN_FLIGHT, PageTable
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.release import Release

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
PAGE = 4096


class Memory:
    """Two blocks in one file, all of it there, and their page table."""

    def __init__(self, pages, host=1):
        self.file = RamFile(os.memfd_create("release"), "release")
        os.pwrite(self.file.fd, b"\x11" * (2 * pages * PAGE), 0)
        spec = [Block(name, pages * PAGE, host * PAGE) for name in ("a", "b")]
        self.blocks = [RamBlock(s, self.file, i * pages * PAGE) for i, s in enumerate(spec)]
        self.table = PageTable([pages, pages])
        for i in range(2):
            self.table.mark_dirty(i, runs_of(np.arange(pages)))
        self.release = Release(self.blocks, self.table)

    def there(self, block):
        """Whether each page of a block is still there."""
        found = np.zeros(self.blocks[block].pages, bool)
        starts, counts = self.blocks[block].data_runs()
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            found[start : start + count] = True
        return found.tolist()

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.table.close()
        self.file.close()


states = st.sampled_from([CLEAN, CLEAN, DIRTY, IN_FLIGHT])


@given(st.lists(states, min_size=8, max_size=8), st.lists(states, min_size=8, max_size=8))
@examples
def test_what_is_clean_goes_and_nothing_else(first, later):
    """In both blocks; what becomes CLEAN later goes later, and what is gone is not looked for."""
    with Memory(8) as memory:
        memory.table.view(0)[:] = first
        assert memory.release.some(1.0) == (CLEAN in first)
        assert memory.there(0) == [state != CLEAN for state in first]
        assert memory.there(1) == [True] * 8
        assert not memory.release.some(1.0)
        after = [CLEAN if a == CLEAN else b for a, b in zip(first, later, strict=True)]
        memory.table.view(0)[:] = after
        memory.table.view(1)[3] = CLEAN
        assert memory.release.some(1.0)
        assert memory.there(0) == [state != CLEAN for state in after]
        assert memory.there(1) == [True] * 3 + [False] + [True] * 4
        assert memory.release.pages == after.count(CLEAN) + 1
        assert memory.release.lacking() == 0


def test_a_host_page_goes_as_a_whole():
    """A receiver acknowledges parts that it has put by, and would lose them if it were killed."""
    with Memory(12, host=4) as memory:
        memory.table.view(0)[:] = [
            *[CLEAN] * 3,
            IN_FLIGHT,
            *[CLEAN] * 4,
            *[CLEAN] * 2,
            *[DIRTY] * 2,
        ]
        assert memory.release.some(1.0)
        assert memory.there(0) == [True] * 4 + [False] * 4 + [True] * 4
        memory.table.view(0)[3] = CLEAN
        assert memory.release.some(1.0)
        assert memory.there(0) == [False] * 8 + [True] * 4


@pytest.mark.parametrize("kept", [True, False])
def test_a_destination_that_lacks_what_it_had_acknowledged(kept):
    """It is counted; one that keeps its word lacks nothing, whatever else it lacks."""
    with Memory(8) as memory:
        memory.table.view(0)[2:6] = CLEAN
        memory.release.some(1.0)
        received = np.array([0, 0, 1, 1, 1, kept, 0, 1], np.uint8)
        memory.table.resume(0, received)
        assert memory.release.lacking() == (0 if kept else 1)


def test_in_little_time_something_is_done_and_the_rest_later():
    """It looks at the clock between pieces; each call goes on where the last one was."""
    with Memory(3 << 12) as memory:
        for i in range(2):
            memory.table.view(i)[:] = CLEAN
        steps = 0
        while memory.release.some(0.0):
            steps += 1
            assert memory.release.pages <= steps << 12
        assert memory.release.pages == 6 << 12 and steps == 6
        assert os.fstat(memory.file.fd).st_blocks == 0


def test_when_all_has_arrived_all_goes():
    """Whatever the page table says: it may be older than the destination's word."""
    with Memory(8) as memory:
        memory.table.view(0)[1] = CLEAN
        memory.release.everything()
        assert os.fstat(memory.file.fd).st_blocks == 0
        assert os.fstat(memory.file.fd).st_size == 16 * PAGE
        assert memory.release.pages == 16


def test_no_page_goes_before_it_is_noted(monkeypatch, tmp_path, caplog):
    """What is to say of the guest that it must not be resumed cannot be written: nothing goes."""
    with Memory(8) as memory:
        memory.table.view(0)[:] = CLEAN
        guest = SimpleNamespace(
            blocks=memory.blocks, can_release=True, released=False, process=os.getpid()
        )
        releasing = Releasing(guest, memory.table, SimpleNamespace(released=0))
        monkeypatch.setattr(hollow, "SHARED_MEMORY", str(tmp_path / "full"))
        releasing.everything()
        assert memory.there(0) == [True] * 8 and not guest.released
        assert "cannot be noted" in caplog.text
        (tmp_path / "full").mkdir()
        releasing.everything()
        assert memory.there(0) == [False] * 8 and guest.released
        assert len(list((tmp_path / "full").iterdir())) == 1
        releasing.close(arrived=True)
        assert not list((tmp_path / "full").iterdir())


def test_a_note_that_cannot_be_filled_is_none(monkeypatch, tmp_path, caplog):
    """As on a /dev/shm that is full: nothing of it stays, and the warning says where."""
    with Memory(8) as memory:
        guest = SimpleNamespace(
            blocks=memory.blocks, can_release=True, released=False, process=os.getpid()
        )
        releasing = Releasing(guest, memory.table, SimpleNamespace(released=0))
        monkeypatch.setattr(hollow, "SHARED_MEMORY", str(tmp_path))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            releasing.everything()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert memory.there(0) == [True] * 8 and not guest.released
        assert str(tmp_path) in caplog.text and not list(tmp_path.iterdir())


def test_memory_that_cannot_be_given_back_is_kept(caplog):
    """The postcopy needs none of it: a warning, and no error."""
    with Memory(8) as memory:
        memory.table.view(0)[:] = CLEAN
        guest = SimpleNamespace(blocks=memory.blocks, can_release=True, released=False, process=0)
        releasing = Releasing(guest, memory.table, SimpleNamespace(released=0))
        fd = memory.file.fd
        kept, read_only = os.dup(fd), os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        os.dup2(read_only, fd)  # the kernel refuses to make holes through that
        asyncio.run(releasing.keep_on())
        assert "no more memory is given back" in caplog.text
        os.dup2(kept, fd)
        for each in (kept, read_only):
            os.close(each)
        assert memory.there(0) == [True] * 8 and guest.released
