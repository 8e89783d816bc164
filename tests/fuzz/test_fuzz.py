"""Every fuzz target on its corpus, and on two thousand inputs that are made of it, always the same
ones. `make fuzz` looks for more."""

from itertools import islice

import fuzz_corpus
import fuzz_targets
import pytest
from fuzz_draw import mutants

MUTANTS = 2000
# A target whose inputs are whole conversations has fewer of them.
FEWER = {"snapshot": 1000, "placing": 500, "image-state": 500, "batch": 500, "codec": 1000}


@pytest.fixture(autouse=True)
def _close():
    yield
    fuzz_targets.close()


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_target(name):
    """Nothing gets out of it that it does not promise."""
    seeds = fuzz_targets.corpus(name)
    for data in (b"", *seeds, *islice(mutants(seeds), FEWER.get(name, MUTANTS))):
        try:
            fuzz_targets.TARGETS[name](data)
        except BaseException as e:
            e.add_note(f"the input was {data!r}")
            raise


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_the_corpus_has_what_is_made(name):
    """`python tests/fuzz/fuzz_corpus.py` makes it. Bytes are not compared: another zlib
    packs otherwise."""
    there = {path.name: path.stat().st_size for path in (fuzz_targets.CORPUS / name).iterdir()}
    made = set(fuzz_corpus.made(name))
    assert made <= set(there)
    assert all(file.startswith(fuzz_corpus.FOUND) for file in set(there) - made)
    assert max(there.values()) <= 1 << 16
