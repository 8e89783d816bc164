"""Which images are clones of one another, by samples of their pages. Pure: knows no files.

An image belongs to the family whose first member has at least half of its marks (a mark: a page's
number and digest), and a few of them, or the other way round; else it founds one. A guess, and
nothing depends on it but what travels first: relatives that travel together have nothing of each
other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

# Marks of a family take about 10 KiB. Who is forgotten founds his family anew.
MOST_FAMILIES = 1024
# Strangers share a boot sector and an empty file system's first pages; fewer say nothing.
LEAST_SHARED = 4

Mark = tuple[int, int]


class Families:
    """All that were found so far; bounded, what was of no use for longest is forgotten."""

    def __init__(self, most: int = MOST_FAMILIES) -> None:
        self._most = most
        self._founders: OrderedDict[int, frozenset[Mark]] = OrderedDict()
        self._known: dict[Mark, set[int]] = {}  # mark -> families whose founder has it
        self._number = 0

    def __repr__(self) -> str:
        return f"<Families {len(self._founders)}>"

    def __len__(self) -> int:
        return len(self._founders)

    def of(self, sample: Iterable[Mark]) -> int | None:
        """The number of an image's family; None if its sample says too little: it is alike to all
        and none."""
        marks = frozenset(sample)
        if len(marks) < LEAST_SHARED:
            return None
        shared = Counter(family for mark in marks for family in self._known.get(mark, ()))
        alike = [
            family
            for family, count in shared.items()
            if count >= LEAST_SHARED and 2 * count >= min(len(marks), len(self._founders[family]))
        ]
        if not alike:
            return self._found(marks)
        # of those that share as many, the oldest: the same images give the same families
        best = min(alike, key=lambda family: (-shared[family], family))
        self._founders.move_to_end(best)
        return best

    def _found(self, marks: frozenset[Mark]) -> int:
        self._number += 1
        self._founders[self._number] = marks
        for mark in marks:
            self._known.setdefault(mark, set()).add(self._number)
        if len(self._founders) > self._most:
            forgotten, theirs = self._founders.popitem(last=False)
            for mark in theirs:
                self._known[mark].discard(forgotten)
                if not self._known[mark]:
                    del self._known[mark]
        return self._number
