"""The cells of a test file, run at the same time in a process of their own: each waits most of its
time, for heartbeats. Its results come as lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cells import cells, in_each_test

# Cells at the same time: two such processes (pytest -n 2) keep two processors busy.
AT_ONCE = 12
_HERE = Path(__file__).parent


def of(*moments):
    """pytest's parameters: all cells at these moments that are in the quick form."""
    return pytest.mark.parametrize(
        "cell", [c for c in cells() if c.moment in moments and in_each_test(c)], ids=str
    )


class Matrix:
    """Results by cell, as they come."""

    def __init__(self, wanted):
        self._results = {}
        self._process = subprocess.Popen(
            [sys.executable, _HERE, "--at-once", str(AT_ONCE), "--cells", "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._process.stdin.write("\n".join(wanted))
        self._process.stdin.close()

    def __getitem__(self, cell):
        while str(cell) not in self._results:
            line = self._process.stdout.readline()
            assert line, f"the runner ended with {self._process.wait()}"
            found = json.loads(line)
            self._results[found["cell"]] = found
        return self._results[str(cell)]

    def close(self):
        self._process.terminate()  # it has nothing more to do, unless a test was interrupted
        self._process.wait()
        self._process.stdout.close()


def check(result):
    """A test of a cell."""
    if result["skipped"]:
        pytest.skip(result["skipped"])
    assert not result["wrong"], result
