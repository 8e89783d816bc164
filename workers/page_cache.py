"""Pages as the destination has them, in shared memory: what deltas are made of (`--codec xbzrle`).

A slot holds one page. Which page may be in a slot is a matter of its number alone (as in QEMU's
migration/page_cache.c): page modulo slots; and a page takes another's slot only if that was not
wanted for two rounds. Who writes, and when, so that no two ever touch the same slot:

  1. Between rounds, after the barrier, only the coordinator writes: `assign` gives the slots for
     the round that begins, to pages that are to be sent in it; what it gives away becomes EMPTY.
  2. During a round a slot is its page's, and so its sender's (page_table.py says whose a page is).
     That sender alone writes, for each batch: (1) EMPTY, (2) the page, as its frame will make it,
     (3) the frame to ZeroMQ; later, on ACK, VALID. On NACK nothing: it stays EMPTY.
  3. In a postcopy senders drop it, and say so. When all have, only the coordinator writes (`drop`).

So what is VALID is what the destination has said that it placed, and nothing that came later was
sent. Whoever sends a page without keeping it (the guest stands still: nobody will want it) stores
EMPTY all the same. Tags change between rounds alone: whose a slot is, anybody may look up.

The memory of the slots is taken before they are used: a full /dev/shm is an error then. The
segment is as large as the guest, for there may be so many slots one day; what is not taken costs
nothing.
Knows no frame and no encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..transport.errors import HostLacks
from ..transport.pages import PAGE_SIZE, WORDS, Pages
from .segments import Segment

EMPTY, VALID = 0, 1
# Memory taken at a time (25 ms): whoever takes it has other things to do as well.
_STEP = (64 << 20) // PAGE_SIZE
# Rounds in which a page's slot is its own after it was wanted (QEMU: CACHED_PAGE_LIFETIME).
LIFETIME = 2

Slots = npt.NDArray[np.int64]


class PageCache:
    """Slots for pages of a guest of `pages` pages, numbered through all of its blocks. The
    coordinator owns it; senders attach."""

    def __init__(self, pages: int) -> None:
        """With one slot, until more is taken."""
        self.pages = pages
        self._slots = 0  # those there is room for: the coordinator's own
        # number of slots; then for each page that is in one, its round, whether it is there
        self._tags_at = 8
        self._ages_at = self._tags_at + 8 * pages
        self._states_at = self._ages_at + 4 * pages
        self._data_at = -(-(self._states_at + pages) // PAGE_SIZE) * PAGE_SIZE
        self._arrays: dict[str, Any] = {}
        size_of_all = self._data_at + pages * PAGE_SIZE
        self._segment = Segment(size_of_all, "xbzrle", reserve=False)
        try:
            self._segment.take(0, self._tags_at)
            for _ in self.make_room(PAGE_SIZE):
                pass
        except BaseException:
            self.close()
            raise
        self.use_room()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": {}}

    def __repr__(self) -> str:
        return f"<PageCache {self._slots} slots>"

    def _array(self, name: str) -> Any:
        if not self._arrays:
            array, pages = self._segment.array, self.pages
            data = array(np.uint64, pages * WORDS, self._data_at)
            self._arrays = {
                "slots": array(np.int64, 1),
                "tags": array(np.int64, pages, self._tags_at),  # page + 1, 0 for none
                "ages": array(np.int32, pages, self._ages_at),
                "states": array(np.uint8, pages, self._states_at),
                "data": data.reshape(pages, WORDS),
            }
        return self._arrays[name]

    @property
    def slots(self) -> int:
        """Slots that are in use."""
        return int(self._array("slots")[0])

    # ---- the coordinator's ---------------------------------------------------------------

    def _slots_of(self, size: int) -> int:
        """More than the guest has pages are not needed."""
        return max(1, min(size // PAGE_SIZE, self.pages))

    def look_for_room(self, size: int) -> None:
        """HostLacks if there is no memory for `size` bytes of pages now. Takes none."""
        self._segment.look_for_room((self._slots_of(size) - self._slots) * PAGE_SIZE)

    def make_room(self, size: int) -> Iterator[None]:
        """Take memory for `size` bytes of pages, step by step; they are used from `use_room` on.
        HostLacks if there is none: then all is as before."""
        slots = self._slots_of(size)
        try:
            for at, each in ((self._tags_at, 8), (self._ages_at, 4), (self._states_at, 1)):
                self._segment.take(at, slots * each)
            for first in range(self._slots, slots, _STEP):
                count = min(_STEP, slots - first)
                self._segment.take(self._data_at + first * PAGE_SIZE, count * PAGE_SIZE)
                yield
        except HostLacks:
            self._give_back(self._slots, slots)
            raise
        self._slots = slots

    def _give_back(self, slots: int, end: int) -> None:
        """The pages of slots [slots, end)."""
        at = self._data_at + slots * PAGE_SIZE
        self._segment.give_back(at, (end - slots) * PAGE_SIZE)

    def use_room(self) -> None:
        """Between rounds: have as many slots as there is room for. Where that is another number
        all of them are empty, as in QEMU."""
        before = self.slots
        if before == self._slots:
            return
        self._array("tags")[:before] = 0
        self._array("slots")[0] = self._slots
        self._give_back(self._slots, before)

    def drop(self) -> Iterator[None]:
        """When no sender touches it any more, and none will: one empty slot is left, the memory of
        the others is given back, step by step. One that was broken off goes on where it was."""
        before = self.slots
        self._array("tags")[:before] = 0
        self._array("slots")[0] = 1
        while self._slots > 1:
            first = max(1, self._slots - _STEP)
            self._give_back(first, self._slots)
            self._slots = first
            yield

    def assign(self, generation: int, pages: Pages) -> None:
        """Between rounds: give slots to `pages`, ascending, which are to be sent in the round
        `generation`; call it for all of them, some at a time. Those of the first round, which are
        nobody's choice, leave theirs to others at once."""
        tags, ages = self._array("tags"), self._array("ages")
        age = generation if generation > 1 else generation - LIFETIME
        at = pages % self.slots
        own = tags[at] == pages + 1
        ages[at[own]] = age
        pages, at = pages[~own], at[~own]
        free = (tags[at] == 0) | (ages[at] + LIFETIME <= generation)
        # of several for one slot the first gets it: numpy stores in order, the last one stays
        pages, at = pages[free][::-1], at[free][::-1]
        self._array("states")[at] = EMPTY
        tags[at] = pages + 1
        ages[at] = age

    # ---- a sender's ----------------------------------------------------------------------

    def find(self, pages: Pages) -> tuple[Slots, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The slots that `pages` would be in; whether they are theirs, and valid."""
        at = pages % self.slots
        own: npt.NDArray[np.bool_] = self._array("tags")[at] == pages + 1
        return at, own, own & (self._array("states")[at] == VALID)

    def content(self, slots: Slots) -> npt.NDArray[np.uint64]:
        """What is in these slots, shape (n, 512): in place if they lie together."""
        data: npt.NDArray[np.uint64] = self._array("data")[_index(slots)]
        return data

    def store(self, slots: Slots, content: npt.NDArray[np.uint64] | None) -> None:
        """What is about to be sent; not valid before it is acknowledged. None: it is not kept."""
        if not len(slots):
            return
        where = _index(slots)
        self._array("states")[where] = EMPTY
        if content is not None:
            self._array("data")[where] = content

    def acknowledge(self, slots: Slots) -> None:
        """What was stored there the destination has."""
        if len(slots):
            self._array("states")[_index(slots)] = VALID

    def close(self) -> None:
        self._arrays.clear()
        self._segment.close()


def _index(slots: Slots) -> Any:
    """`slots` for numpy, as a slice if they lie together: that copies nothing."""
    n = len(slots)
    if n and int(slots[-1]) - int(slots[0]) == n - 1 and bool((np.diff(slots) == 1).all()):
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return slots
