"""A short soak (`make soak` is the long one): a guest goes there and back, and nothing is left."""

import asyncio

import pytest
from soak import Soak, draw_trip, growth


@pytest.mark.parametrize("seed", [7, 8])
def test_a_guest_goes_there_and_back(seed):
    lines = []
    soak = Soak(seed, lines.append)
    asyncio.run(soak.run(6))
    assert len(lines) == soak.looks == sum(soak.outcomes.values()) == 6


def test_trips_are_drawn_from_seed_and_number():
    drawn = [str(draw_trip(3, number)) for number in range(200)]
    assert [str(draw_trip(3, number)) for number in range(200)] == drawn
    assert [str(draw_trip(4, number)) for number in range(200)] != drawn
    for said in ("keys", "cancel in", "yank in", "pause", "direct", "precopy", "reserve"):
        assert any(said in one for one in drawn), said


def test_growth_is_that_of_a_line_without_the_beginning():
    assert growth([0, *range(1000, 1900, 100)]) == pytest.approx(100)
    assert growth([5] * 20) == pytest.approx(0)
