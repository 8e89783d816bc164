"""Every fault, while it stands still."""

from cells import JUMPING, LEAVING, LOADING, STARTING, WAITING
from matrix import check, of


@of(WAITING, LOADING, STARTING, LEAVING, JUMPING)
def test_cell(cell, results):
    check(results[cell])
