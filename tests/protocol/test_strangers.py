"""Who is cut off a control link, and who never is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.strangers import (
    MOST_BYTES,
    MOST_NEW,
    MOST_STRANGERS,
    NEW_SECONDS,
    STRANGER_SECONDS,
    Strangers,
    on_the_wire,
)

FIRST, LARGEST, QUEUED = 8 << 20, 16 << 20, 16


def door(connections=1):
    found = Strangers(FIRST, LARGEST, QUEUED)
    for number in range(connections):
        found.connected(number, float(number) / 1000)
    return found


def test_who_says_a_message_may_say_another():
    found = door()
    for count in range(1, 100):
        found.heard(0, on_the_wire(FIRST))
        assert not found.to_cut({0: count * on_the_wire(FIRST) + 200}, 1.0)


def test_what_is_no_message():
    """A stranger may have one under way, somebody who is welcome as many as may be queued."""
    found = door(2)
    found.welcome(1)
    assert not found.to_cut({0: FIRST, 1: (QUEUED + 2) * LARGEST}, 1.0)
    cut = found.to_cut({0: FIRST + (1 << 20), 1: (QUEUED + 2) * LARGEST}, 1.0)
    assert list(cut) == [0] and "no message" in cut[0]
    assert list(found.to_cut({1: (QUEUED + 3) * LARGEST}, 1.0)) == [1]
    assert not found.numbers()


def test_who_begins_nothing():
    found = door(2)
    found.welcome(1)
    assert not found.to_cut({}, STRANGER_SECONDS)
    assert list(found.to_cut({}, STRANGER_SECONDS + 1)) == [0]


def test_a_crowd():
    """The oldest go, and those who are welcome are not of it."""
    found = door(MOST_STRANGERS + 10)
    found.welcome(0)
    found.welcome(5)
    assert sorted(found.to_cut({}, 2.0)) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert found.strangers == MOST_STRANGERS


def test_many_that_begin_at_once():
    """As a batch does: none of them is cut off before it could say anything."""
    found = Strangers(FIRST, LARGEST, QUEUED)
    for number in range(MOST_NEW + 1):
        found.connected(number, 1.0)
    assert sorted(found.to_cut({}, 1.0 + NEW_SECONDS)) == [0]
    for number in range(1, 300):
        found.welcome(number)
    found.to_cut({}, 1.1 + NEW_SECONDS)
    assert found.strangers == MOST_STRANGERS and len(found.numbers()) == 299 + MOST_STRANGERS


def test_many_that_stay_below_the_bound():
    """Together they have one as well: those with most go."""
    found = door(20)
    cut = found.to_cut({number: (4 << 20) + number for number in range(20)}, 1.0)
    assert sorted(cut) == [16, 17, 18, 19][: len(cut)] or min(cut) == 20 - len(cut)
    assert (20 - len(cut)) * (4 << 20) <= MOST_BYTES


def test_a_number_that_is_used_again_is_another():
    found = door()
    found.heard(0, 1000)
    found.welcome(0)
    found.gone(0)
    found.heard(0, 1000)  # late
    found.connected(0, 50.0)
    assert list(found.to_cut({}, 50.0 + STRANGER_SECONDS + 1)) == [0]


deeds = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["connected", "gone", "welcome"]), st.integers(0, 99)),
        st.tuples(st.just("heard"), st.integers(0, 99), st.integers(0, FIRST)),
        st.tuples(st.just("look"), st.dictionaries(st.integers(0, 99), st.integers(0, 1 << 34))),
    ),
    max_size=60,
)


@given(deeds)
@settings(derandomize=True, database=None)
def test_strangers_are_always_bounded(all_of_them):
    found, now = Strangers(FIRST, LARGEST, QUEUED), 0.0
    for what, *arguments in all_of_them:
        now += 0.5
        if what == "look":
            cut = found.to_cut(arguments[0], now)
            assert found.strangers <= MOST_STRANGERS
            assert not set(cut) & set(found.numbers())
            assert not found.to_cut(dict.fromkeys(found.numbers(), 0), now)
        elif what == "connected":
            found.connected(*arguments, now)
        else:
            getattr(found, what)(*arguments)
