"""What happens, in words: each decision is said with its reason."""

import pytest

from pageferry.pipeline import migration as core
from pageferry.pipeline import narration
from pageferry.pipeline.convergence import Convergence
from pageferry.pipeline.parameters import Parameters
from pageferry.transport.errors import Cancelled, PeerLost

ROUND = core.RoundDone(4096, 0, 0.1, zero=96, wire=16_000_000)


def migration(*events, live=True, limit=0.3, **options):
    """One that these events happened to; and all that was said of them."""
    made = core.Migration(live, live, False, Convergence(limit, 2), **options)
    told = []
    for event in (core.Started(), core.ChannelsReady(), core.Taken(4096, 4096, 0, 0), *events):
        instructions = made.handle(event)
        told += narration.narrate(made, event, instructions)
    return made, told


def test_rounds_and_the_switchover():
    _, told = migration(
        ROUND, core.Taken(100, 100, 0.1, 0.01), core.GuestStopped(), core.Taken(120, 20, 0.1, 0.001)
    )
    assert told == [
        "4096 pages (16.0 MiB) to send",
        "round 1: 4096 pages (16.0 MiB), 96 of them zero, in 100 ms (168 MB/s), 15.3 MiB on the "
        "wire",
        "100 pages (400.0 KiB) to send, 100 written in 100 ms (4 MB/s); a downtime of 43 ms is "
        "expected, the limit is 300 ms",
        "switching over: a downtime of 43 ms is expected, the limit is 300 ms",
        "the guest stands still: 120 pages (480.0 KiB) to send",
    ]


def test_a_round_that_is_said_after_the_next_was_decided():
    """A static source whose frames were lost sends again at once."""
    _, told = migration(core.RoundDone(4000, 96, 0.1), live=False)
    assert told[-1].startswith("round 1: ") and told[-1].endswith("; 96 pages go again")


@pytest.mark.parametrize(
    ("options", "events", "reason"),
    [
        ({"postcopy": "now"}, [], "--postcopy now"),
        ({"postcopy": "after=1", "after": 1}, [ROUND, core.Taken(4000, 4000, 0.1, 0)],
         "--postcopy after=1"),
        ({"postcopy": "manual"}, [core.PostcopyAsked(), ROUND, core.Taken(4000, 4000, 0.1, 0)],
         "somebody asked"),
        ({"postcopy": "auto"},
         [ROUND, core.Taken(4000, 4000, 0.1, 0), ROUND, core.Taken(4000, 4000, 0.1, 0)],
         "precopy would not get there; a downtime of "),
    ],
)  # fmt: skip
def test_why_a_postcopy_starts(options, events, reason):
    _, told = migration(*events, limit=0.031, **options)
    assert told[-1].startswith(f"the guest is started there before its memory: {reason}")


def test_pause_and_recovery():
    made, _ = migration(postcopy="now")
    told = []
    for event in (
        core.GuestStopped(), core.Taken(4096, 0, 0.1, 0), core.MissingTold(), core.StateLoaded(),
        core.Confirmed(), core.Failed(PeerLost("gone")), core.RecoverAsked("tcp://192.0.2.9:1"),
        core.Reconnected(17),
    ):  # fmt: skip
        told += narration.narrate(made, event, made.handle(event))
    assert told[1:] == [
        "paused: gone",
        "somebody asked to recover at tcp://192.0.2.9:1",
        "connected again: 17 pages (68.0 KiB) still to be sent",
    ]


def test_why_it_is_over():
    made, _ = migration()
    assert (
        narration.why(made.handle(core.CancelAsked()))
        == Cancelled("cancelled; the source is as it was").message
    )
    assert narration.why([core.StopGuest()]) == narration.why([core.Finish(None, False)]) == ""


def test_settings_have_all_that_may_be_asked_for():
    told = narration.settings(Parameters(workers=3).checked())
    assert told.startswith("settings: multifd-channels=3, ")
    assert "downtime-limit=300" in told
