"""Every fault, while it runs before its memory is there."""

from cells import PAUSED, POSTCOPY, RECOVER
from matrix import check, of


@of(POSTCOPY, PAUSED, RECOVER)
def test_cell(cell, results):
    check(results[cell])
