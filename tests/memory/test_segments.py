"""Shared memory between processes: what is closed is gone, with its last view."""

import gc
import os
import sys

import numpy as np

from pageferry.workers.segments import Segment


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def mapped(name):
    with open("/proc/self/maps") as maps:
        return any(name in line for line in maps)


def test_one_that_is_closed_while_somebody_has_a_view(monkeypatch):
    """The view stays good, and with it the mapping; then nothing is left, and nothing is said."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    before = descriptors()
    segment = Segment(4096, "test")
    name = segment.name
    view = segment.array(np.uint64, 4)
    segment.close()
    segment.close()
    assert not os.path.exists(f"/dev/shm/{name}")
    view[0] = 7
    assert view[0] == 7 and mapped(name)
    del view, segment
    gc.collect()
    assert not mapped(name)
    assert descriptors() == before
    assert said == []
