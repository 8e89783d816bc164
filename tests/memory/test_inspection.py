"""Which pages are zero and which look compressible, against one page at a time."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.pages import PAGE_SIZE, WORDS
from pageferry.workers.inspection import compressible_pages, zero_pages

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)

TEXT = (b"It was a bright cold day in April, and the clocks were striking thirteen. " * 60)[
    :PAGE_SIZE
]
PATTERNS = {
    "zero": bytes(PAGE_SIZE),
    "text": TEXT,
    "random": random.Random(3).randbytes(PAGE_SIZE),
    "first byte": b"\1" + bytes(PAGE_SIZE - 1),
    "last byte": bytes(PAGE_SIZE - 1) + b"\1",
    "ones": b"\xff" * PAGE_SIZE,
    "counter": b"".join(i.to_bytes(8, "little") for i in range(WORDS)),
}


def as_words(pages):
    return np.frombuffer(b"".join(pages), np.uint64).reshape(len(pages), WORDS)


def as_bytes(pages):
    return np.frombuffer(b"".join(pages), np.uint8).reshape(len(pages), PAGE_SIZE)


@given(st.lists(st.sampled_from(sorted(PATTERNS)), max_size=12))
@examples
def test_zero_pages_in_any_mixture(names):
    """Exactly those without a byte that is not zero; memory is only looked at."""
    pages = [PATTERNS[name] for name in names]
    words = as_words(pages)
    assert not words.flags.writeable
    assert zero_pages(words).tolist() == [not any(page) for page in pages]


def test_a_single_byte_anywhere_makes_a_page_that_is_not_zero():
    """Every word of the page, every byte of a word; among zero pages and alone."""
    n = WORDS
    content = np.zeros((n + 1, PAGE_SIZE), np.uint8)
    for i in range(n):
        content[i, 8 * i + i % 8] = 1 << (i % 7)
    zeros = zero_pages(content.view(np.uint64))
    assert np.flatnonzero(zeros).tolist() == [n]
    for i in range(n):
        assert not zero_pages(content[i : i + 1].view(np.uint64))[0]


def test_all_zero_and_no_pages():
    """The short cuts."""
    assert zero_pages(np.zeros((7, WORDS), np.uint64)).all()
    assert zero_pages(np.empty((0, WORDS), np.uint64)).tolist() == []
    assert compressible_pages(np.empty((0, PAGE_SIZE), np.uint8)).tolist() == []


@pytest.mark.parametrize(
    ("name", "good"),
    [(name, name != "random") for name in PATTERNS],
)
def test_what_looks_compressible(name, good):
    """Everything but random bytes."""
    assert compressible_pages(as_bytes([PATTERNS[name]])).tolist() == [good]


def test_random_pages_are_told_from_others_without_exception():
    """A thousand of each, where chance would show."""
    source = random.Random(7)
    noise = as_bytes([source.randbytes(PAGE_SIZE) for _ in range(1000)])
    assert not compressible_pages(noise).any()
    # code and data rarely use more than a quarter of all bytes
    narrow = as_bytes([bytes(source.choices(range(64), k=PAGE_SIZE)) for _ in range(50)])
    assert compressible_pages(narrow).all()


def test_structure_with_the_period_of_the_sample_does_not_hide():
    """Random bytes at every 32nd place only: most of the page is zero."""
    page = bytearray(PAGE_SIZE)
    page[::32] = random.Random(5).randbytes(PAGE_SIZE // 32)
    assert compressible_pages(as_bytes([bytes(page)])).tolist() == [True]


def naive(page):
    """The rule for one page: at most 88 distinct bytes among 128, a different one of each 32."""
    return len({page[32 * i + i % 32] for i in range(128)}) <= 88


def drawn(alphabet, source):
    """A page of bytes below `alphabet` in random order."""
    return bytes(source.choices(range(alphabet), k=PAGE_SIZE))


@given(st.lists(st.integers(1, 256), min_size=1, max_size=8), st.integers(0, 2**32))
@examples
def test_each_page_of_a_small_batch_is_judged_by_its_own_bytes(alphabets, seed):
    """Against the rule for one page; few distinct bytes are good, nearly all of them bad."""
    source = random.Random(seed)
    pages = [drawn(n, source) for n in alphabets]
    together = compressible_pages(as_bytes(pages)).tolist()
    assert together == [naive(page) for page in pages]
    for n, good in zip(alphabets, together, strict=True):
        assert good or n > 88
        assert not good or n < 256


@pytest.mark.parametrize("distinct", [88, 89])
def test_the_bound_itself(distinct):
    """88 distinct bytes are good, 89 are not; the bytes that are not looked at do not count."""
    page = bytearray(random.Random(1).randbytes(PAGE_SIZE))
    for i in range(128):
        page[32 * i + i % 32] = i % distinct
    assert compressible_pages(as_bytes([bytes(page)])).tolist() == [distinct == 88]


@pytest.mark.parametrize("n", [17, 64, 127, 128, 1000])
def test_a_large_batch(n):
    """A few pages speak for all if they agree; otherwise each page is judged by its own bytes."""
    source = random.Random(n)
    text, noise = [TEXT] * n, [source.randbytes(PAGE_SIZE) for _ in range(n)]
    assert compressible_pages(as_bytes(text)).tolist() == [True] * n
    assert compressible_pages(as_bytes(noise)).tolist() == [False] * n
    for mixed in (text[: n // 2] + noise[n // 2 :], noise[: n // 2] + text[n // 2 :]):
        assert compressible_pages(as_bytes(mixed)).tolist() == [naive(page) for page in mixed]
