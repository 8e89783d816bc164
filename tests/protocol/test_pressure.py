"""What a guest is told of how much of its time it loses."""

import asyncio

import pytest

from pageferry.pipeline.blocking import Blocking
from pageferry.pipeline.journal import Journal
from pageferry.pipeline.pressure import Pressure
from pageferry.pipeline.throttling import Rules
from pageferry.workers.guests.base import SourceGuest


class Told(SourceGuest):
    """Notes what it is told."""

    kind, blocks, live, can_throttle = "told", (), True, True

    def __init__(self):
        self.told = []

    def throttle(self, percentage):
        self.told.append(percentage)

    def close(self):
        pass


async def pressure_on(guest, percentage):
    made = Pressure(guest, Rules(auto_converge=True), Blocking(), Journal("source", "an-id"))
    made.throttling.percentage = percentage
    await made.set(percentage)
    return made


@pytest.mark.parametrize("long", [True, False])
def test_who_is_waited_for_long_costs_the_guest_no_time(long):
    """And what is set meanwhile is what it loses afterwards."""
    guest = Told()

    async def main():
        pressure = await pressure_on(guest, 80)
        async with pressure.eased(0 if long else 3600):
            while long and guest.told[-1] != 0:
                await asyncio.sleep(0)
            if long:
                pressure.throttling.percentage = 90
                await pressure.set(90)
                assert guest.told == [80, 0]
        assert guest.told == ([80, 0, 90] if long else [80])
        await pressure.lift()
        assert guest.told[-1] == 0

    asyncio.run(main())


def test_who_is_not_slowed_down_is_told_nothing():
    """It may be one that cannot be."""
    guest = Told()

    async def main():
        pressure = Pressure(guest, Rules(), Blocking(), Journal("source", "an-id"))
        async with pressure.eased(0):
            while not pressure._eased:
                await asyncio.sleep(0)
        await pressure.lift()

    asyncio.run(main())
    assert guest.told == []


def test_it_is_lifted_although_nobody_waited_for_what_it_was_told_last():
    """The percentage is 0 again, and the call that says so was never made."""
    guest = Told()

    async def main():
        pressure = await pressure_on(guest, 80)
        pressure.throttling.percentage = pressure._now = 0
        await pressure.lift()

    asyncio.run(main())
    assert guest.told == [80, 0]
