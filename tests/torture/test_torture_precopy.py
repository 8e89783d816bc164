"""Every fault, before the guest stands still."""

from cells import ASKING, ROUND_1, ROUND_N, SETUP
from matrix import check, of


@of(SETUP, ROUND_1, ROUND_N, ASKING)
def test_cell(cell, results):
    check(results[cell])
