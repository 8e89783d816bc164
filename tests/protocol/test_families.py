"""Which images are clones: by marks, whatever the order, and bounded."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.families import LEAST_SHARED, Families


def marks(*, seed, changed=()):
    """A sample of 64 pages of image `seed`, some of them its own."""
    return [(page * 512, hash((seed, page, page in changed))) for page in range(64)]


def test_clones_are_of_one_family_and_strangers_of_others():
    families = Families()
    first, second = families.of(marks(seed=1)), families.of(marks(seed=2))
    assert first != second
    assert families.of(marks(seed=1, changed=range(20))) == first
    assert families.of(marks(seed=2, changed=range(32))) == second
    assert families.of(marks(seed=1, changed=range(40))) not in (first, second)


def test_a_smaller_image_that_is_part_of_a_larger_one():
    families = Families()
    larger = families.of(marks(seed=1))
    assert families.of(marks(seed=1)[:16]) == larger


def test_nothing_is_alike_to_nothing():
    families = Families()
    assert families.of([]) is None and families.of([]) is None
    assert len(families) == 0


def test_the_nearest_is_taken():
    families = Families()
    far = families.of(marks(seed=1))
    near = families.of(marks(seed=1, changed=range(40)))
    assert families.of(marks(seed=1, changed=range(38))) == near != far


def test_it_is_bounded_and_forgets_what_was_of_no_use():
    families = Families(most=3)
    numbers = [families.of(marks(seed=seed)) for seed in range(3)]
    assert families.of(marks(seed=0)) == numbers[0]
    families.of(marks(seed=9))
    assert len(families) == 3
    assert families.of(marks(seed=0)) == numbers[0]
    assert families.of(marks(seed=1)) not in numbers
    assert sum(map(len, families._known.values())) == 3 * 64


@given(st.lists(st.lists(st.integers(0, 20), max_size=16), max_size=12))
@settings(max_examples=100, deadline=None)
def test_whoever_joins_has_half_of_the_marks_of_the_first(samples):
    families, founders = Families(), {}
    for pages in samples:
        sample = {(page, 7) for page in pages}
        number = families.of(sample)
        if number is None:
            assert len(sample) < LEAST_SHARED
            continue
        founder = founders.setdefault(number, sample)
        assert related(founder, sample)
        if founder is sample:  # it found nobody
            others = [f for n, f in founders.items() if n != number]
            assert not any(related(f, sample) for f in others)


def related(a, b):
    return len(a & b) >= max(LEAST_SHARED, min(len(a), len(b)) / 2)


def test_a_few_shared_pages_make_no_relatives():
    """The same boot sector, and little else in a disk that is nearly empty."""
    families = Families()
    boot = marks(seed=1)[:3]
    small = [*boot, (9000, 1), (9001, 1)]
    first = families.of(small)
    assert first is not None
    assert families.of([*boot, *marks(seed=2)[3:]]) not in (None, first)
    assert families.of(boot) is None and families.of([*boot, (9000, 1)]) == first
