"""Every fault, before the guest stands still."""

from cells import ASKING, QUOTA, ROUND_1, ROUND_N, SETUP, STOPS, STREAM
from matrix import check, of


@of(SETUP, ROUND_1, ROUND_N, ASKING, STOPS, QUOTA, STREAM)
def test_cell(cell, results):
    check(results[cell])
