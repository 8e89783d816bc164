"""A precopy that gets nowhere is noticed once, with figures and with what can be done; and that it
gets on again."""

import pytest

from pageferry.pipeline import migration as core
from pageferry.pipeline.convergence import Convergence, Decision
from pageferry.pipeline.stalls import Stalls
from pageferry.pipeline.throttling import Rules, Throttling

ROUND = core.RoundDone(50_000, 0, 1.0, wire=204_800_000)
# twice as much as was moved
MUCH, LITTLE = core.Taken(100_000, 100_000, 1.0, 0.0), core.Taken(30_000, 30_000, 1.0, 0.0)
FIRST = core.Taken(131_072, 131_072, 0, 0)


def said(*events, limit=0.1, bandwidth=0, throttles=False, rounds=30, **options):
    """The watch, and all notices, of a migration that these events happened to."""
    found = Convergence(limit, rounds, bandwidth)
    throttling = Throttling(Rules(auto_converge=throttles))
    state = core.Migration(True, True, False, found, throttling=throttling, **options)
    stalls, notices = Stalls(), []
    for event in (core.Started(), core.ChannelsReady(), FIRST, *events):
        state.handle(event)
        if (notice := stalls.after(event, state)) is not None:
            notices.append(notice)
    return stalls, notices


def test_a_guest_that_writes_faster_than_it_moves_is_noticed_once():
    stalls, notices = said(*(ROUND, MUCH) * 4)
    assert len(notices) == stalls.count == 1 and stalls.stalled
    text = notices[0].text
    assert "the guest writes 410 MB/s and 205 MB/s are moved" in text
    assert "390.6 MiB stay to be sent" in text and "where 100 ms are allowed" in text
    assert "given up after round 30" in text
    assert notices[0].data["round"] == 2
    # the figures in query-migrate are those of the last look
    assert stalls.report()["stall"]["round"] == 4
    assert stalls.report()["stall"]["count"] == 1


def test_the_first_round_says_nothing():
    """What is written while all memory moves, in a long time, is more than what comes."""
    assert said(ROUND, MUCH)[1] == []
    assert said(ROUND, MUCH, ROUND, LITTLE, ROUND)[1] == []
    assert said()[0].report() == {}


def test_what_gets_on_again_says_so_and_may_stall_again():
    stalls, notices = said(ROUND, MUCH, ROUND, MUCH, ROUND, LITTLE, ROUND, MUCH)
    assert [n.data["over"] for n in notices] == [False, True, False]
    assert notices[1].text.startswith("it gets on again: the guest writes 123 MB/s")
    assert stalls.count == 2


def test_what_fits_is_no_stall():
    assert said(ROUND, MUCH, ROUND, core.Taken(50_000, 50_000, 1.0, 0.0), limit=1.2)[1] == []


@pytest.mark.parametrize(
    ("options", "names", "itself"),
    [
        ({}, ["downtime-limit", "postcopy", "auto-converge"], "given up after round 30"),
        ({"bandwidth": 10**9}, ["downtime-limit", "postcopy", "auto-converge"], "given up"),
        ({"bandwidth": 2 * 10**8}, ["downtime-limit", "max-bandwidth", "postcopy", "auto-converge"],
         "given up"),
        ({"throttles": True}, ["downtime-limit", "postcopy"], "is slowed down"),
        ({"postcopy": "manual"}, ["downtime-limit", "postcopy", "auto-converge"], "given up"),
        ({"postcopy": "after=9", "after": 9}, ["downtime-limit", "auto-converge"],
         "after round 9"),
    ],
)  # fmt: skip
def test_what_can_be_done_is_what_can_be_done_here(options, names, itself):
    _, (notice,) = said(ROUND, MUCH, ROUND, MUCH, **options)
    assert [option["option"] for option in notice.data["options"]] == names
    assert itself in notice.text
    for option in notice.data["options"]:
        assert option["how"] in notice.text
    if options.get("postcopy") == "manual":
        assert "`pageferry start-postcopy MONITOR`" in notice.text


def test_what_is_advised_would_do():
    stalls, (notice,) = said(ROUND, MUCH, ROUND, MUCH, bandwidth=250_000_000)
    values = {o["option"]: o.get("value") for o in notice.data["options"]}
    assert said(ROUND, MUCH, limit=values["downtime-limit"] / 1000)[0].stalled is False
    found = Convergence(values["downtime-limit"] / 1000, 30, 250_000_000)
    found.round_done(50_000, 1.0, wire=204_800_000)
    assert found.decide(MUCH.pages) is Decision.SWITCH_OVER
    assert values["max-bandwidth"] > 410_000_000
    assert "stall" in repr(stalls).lower()


def test_who_leaves_by_postcopy_or_gives_up_stalls_no_more():
    assert said(ROUND, MUCH, ROUND, MUCH, postcopy="auto")[1] == []
    assert said(ROUND, MUCH, ROUND, MUCH, rounds=2)[1] == []
