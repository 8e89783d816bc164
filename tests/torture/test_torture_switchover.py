"""Every fault, while it stands still; and snapshots, saved and restored."""

from cells import (
    JUMPING,
    LEAVING,
    LOADING,
    RESTORING,
    SAVING,
    SAVING_LIVE,
    STARTING,
    WAITING,
)
from matrix import check, of


@of(WAITING, LOADING, STARTING, LEAVING, JUMPING, SAVING, SAVING_LIVE, RESTORING)
def test_cell(cell, results):
    check(results[cell])
