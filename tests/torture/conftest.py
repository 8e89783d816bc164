"""Each file of cells has one process that runs them (matrix.py)."""

import pytest
from matrix import Matrix


@pytest.fixture(autouse=True)
def _no_leaks():
    """Not as elsewhere: cells run beside each other, all the time. Each looks what its own ends
    have left (runner.py)."""


@pytest.fixture(scope="module")
def results(request):
    wanted = [
        str(item.callspec.params["cell"])
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    matrix = Matrix(wanted)
    yield matrix
    matrix.close()
