"""What the statistics make of counters: rates."""

import contextlib
import time

from pageferry.pipeline.statistics import Statistics
from pageferry.transport.pages import PAGE_SIZE
from pageferry.workers.counters import Counters


def test_a_first_look_says_a_rate():
    """Since the set-up was over: whoever looks once, after half of it, sees how fast it goes."""
    with contextlib.closing(Counters(1)) as counters:
        statistics = Statistics("source")
        statistics.counters = counters
        row = counters.row(0)
        row.add("normal", 1000)
        row.add("wire_bytes", 5000)
        assert statistics.rates() == (0.0, 0.0)  # of what came before, nothing is known
        looked = Statistics("source")
        looked.counters = counters
        looked.set_up = time.monotonic() - 10
        guest, wire = looked.rates()
        assert 0 < wire <= 500 and 0 < guest <= 100 * PAGE_SIZE
        assert 0 < looked.steady_rate() <= 100 * PAGE_SIZE
        del row
