"""Keeps the check for leaks, which collects garbage after every test, cheap in this folder."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_no_garbage():
    """What was there before a file's first test need not be looked at after each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
