"""Every fault, while it runs before its memory is there."""

from cells import LAZILY, PAUSED, POSTCOPY, RECOVER, STREAM_POSTCOPY
from matrix import check, of


@of(POSTCOPY, PAUSED, RECOVER, STREAM_POSTCOPY, LAZILY)
def test_cell(cell, results):
    check(results[cell])
