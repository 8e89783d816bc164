"""The source's decisions: every path, failure and cancel in every state, any order of events."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.convergence import Convergence
from pageferry.pipeline.migration import (
    CancelAsked,
    ChannelsReady,
    Confirmed,
    Failed,
    Finish,
    GuestStopped,
    Migration,
    OpenChannels,
    RoundDone,
    SendRound,
    SendRun,
    SendState,
    Started,
    StateLoaded,
    StopGuest,
    TakeDirty,
    TakeInitial,
    Taken,
    Verified,
    Verify,
)
from pageferry.pipeline.state import FINAL, TRANSITIONS, Status
from pageferry.transport.errors import (
    Cancelled,
    ConfirmationLost,
    LocalProtocolError,
    NotConverging,
    PeerLost,
    SourceError,
    VerificationFailed,
    WorkerDied,
)

examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)

BIG = 10**6  # pages that no downtime limit here allows


def migration(*, live=False, can_stop=False, verify=False, limit=0.3, max_rounds=30):
    return Migration(live, can_stop, verify, Convergence(limit, max_rounds))


def taken(pages, written=None):
    return Taken(pages, pages if written is None else written, since=1.0, took=0.001)


def done(pages, lost=0):
    return RoundDone(pages, lost, seconds=1.0)


@dataclass
class Path:
    """One way through a migration: an event, what is done, the status after it."""

    settings: dict
    steps: list = field(default_factory=list)

    def step(self, event, instruction, status):
        self.steps.append((event, instruction, status))
        return self


def opening(path):
    path.step(Started(), OpenChannels(), Status.SETUP)
    return path.step(ChannelsReady(), TakeInitial(), Status.ACTIVE)


def ending(path, verify=False):
    if verify:
        path.step(Verified(), SendState(), Status.DEVICE)
    path.step(StateLoaded(), SendRun(), Status.DEVICE)
    return path.step(Confirmed(), Finish(None, resume=False), Status.COMPLETED)


def static(verify=False):
    path = opening(Path({"verify": verify}))
    path.step(taken(100), SendRound(1, live=False), Status.ACTIVE)
    path.step(done(100), Verify() if verify else SendState(), Status.DEVICE)
    return ending(path, verify)


def static_with_losses():
    path = opening(Path({}))
    path.step(taken(100), SendRound(1, live=False), Status.ACTIVE)
    path.step(done(60, lost=40), SendRound(2, live=False), Status.ACTIVE)
    path.step(done(39, lost=1), SendRound(3, live=False), Status.ACTIVE)
    path.step(done(1), SendState(), Status.DEVICE)
    return ending(path)


def live(verify=False):
    """A guest that can be stopped; it is, once little is left."""
    path = opening(Path({"live": True, "can_stop": True, "verify": verify}))
    path.step(taken(BIG), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(BIG // 2), SendRound(2, live=True), Status.ACTIVE)
    path.step(done(BIG // 2, lost=7), TakeDirty(), Status.ACTIVE)
    path.step(taken(10), StopGuest(), Status.DEVICE)
    path.step(GuestStopped(), TakeDirty(), Status.DEVICE)
    path.step(taken(12), SendRound(3, live=False), Status.DEVICE)
    path.step(done(10, lost=2), SendRound(4, live=False), Status.DEVICE)
    path.step(done(2), Verify() if verify else SendState(), Status.DEVICE)
    return ending(path, verify)


def live_unstoppable(verify=False):
    """Memory whose writer is not known: it has moved when a scan finds nothing changed."""
    path = opening(Path({"live": True, "verify": verify}))
    path.step(taken(1000), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(1000), TakeDirty(), Status.ACTIVE)
    path.step(taken(1), SendRound(2, live=True), Status.ACTIVE)
    path.step(done(0, lost=1), TakeDirty(), Status.ACTIVE)
    path.step(taken(1), SendRound(3, live=True), Status.ACTIVE)
    path.step(done(1), TakeDirty(), Status.ACTIVE)
    path.step(taken(0), Verify() if verify else SendState(), Status.DEVICE)
    return ending(path, verify)


PATHS = {
    "static": static(),
    "static, verified": static(verify=True),
    "static, frames lost": static_with_losses(),
    "live": live(),
    "live, verified": live(verify=True),
    "live, cannot be stopped": live_unstoppable(),
    "live, cannot be stopped, verified": live_unstoppable(verify=True),
}


def walk(path, steps=None):
    """A migration that has gone the first `steps` steps of `path`."""
    core = migration(**path.settings)
    for event, _, _ in path.steps[:steps]:
        core.handle(event)
    return core


def finish_of(instructions):
    """The one instruction there is at the end."""
    assert len(instructions) == 1 and isinstance(instructions[0], Finish)
    return instructions[0]


# ---- the ways through ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_a_migration_in_which_all_goes_well(name):
    """Each event, what is done next, the status; nothing after the end."""
    path = PATHS[name]
    core = migration(**path.settings)
    assert core.status is Status.NONE
    for event, instruction, status in path.steps:
        assert core.handle(event) == [instruction], event
        assert core.status is status, event
    for event in (*(step[0] for step in path.steps), Failed(PeerLost()), CancelAsked()):
        assert core.handle(event) == []
    assert core.status is Status.COMPLETED


@pytest.mark.parametrize("name", PATHS)
def test_failure_in_every_state(name):
    """The guest goes on here, until the destination was told to run: then it stays stopped."""
    path = PATHS[name]
    for steps in range(1, len(path.steps)):
        core = walk(path, steps)
        told_to_run = any(isinstance(event, StateLoaded) for event, _, _ in path.steps[:steps])
        assert core.run_said == told_to_run
        error = WorkerDied("sender 0 died")
        finish = finish_of(core.handle(Failed(error)))
        assert core.status is Status.FAILED
        assert finish.resume is not told_to_run
        if told_to_run:
            assert type(finish.error) is ConfirmationLost
            assert "sender 0 died" in finish.error.message
        else:
            assert finish.error is error
        assert core.handle(Failed(error)) == core.handle(CancelAsked()) == []
        assert core.handle(Confirmed()) == []
        assert core.status is Status.FAILED


@pytest.mark.parametrize("name", PATHS)
def test_failure_that_the_peer_says_in_every_state(name):
    """The destination's own word that the guest does not run there always lets it run here."""
    path = PATHS[name]
    for steps in range(1, len(path.steps)):
        core = walk(path, steps)
        error = SourceError("no space")
        assert core.handle(Failed(error, by_peer=True)) == [Finish(error, resume=True)]
        assert core.status is Status.FAILED


@pytest.mark.parametrize("name", PATHS)
def test_cancel_in_every_state(name):
    """It is over and the guest goes on here; too late once the destination was told to run."""
    path = PATHS[name]
    for steps in range(len(path.steps)):
        core = walk(path, steps)
        instructions = core.handle(CancelAsked())
        if core.run_said:
            assert instructions == []
            # it goes on as if nobody had asked
            assert core.handle(Confirmed()) == [Finish(None, resume=False)]
            continue
        finish = finish_of(instructions)
        assert type(finish.error) is Cancelled and finish.resume
        assert core.status is Status.CANCELLED
        for event, _, _ in path.steps[steps:]:
            assert core.handle(event) == []
        assert core.handle(Failed(PeerLost())) == []
        assert core.status is Status.CANCELLED


# ---- decisions -----------------------------------------------------------------------------


def test_frames_that_are_lost_again_and_again():
    """Five more rounds, then the link is to blame; a static source is as it was."""
    core = migration()
    for event in (Started(), ChannelsReady(), taken(100)):
        core.handle(event)
    for number in range(2, 7):
        assert core.handle(done(0, lost=100)) == [SendRound(number, live=False)]
    finish = finish_of(core.handle(done(0, lost=100)))
    assert type(finish.error) is PeerLost and finish.resume
    assert "5 rounds" in finish.error.message


def test_frames_that_are_lost_in_a_live_round_are_dirty_pages():
    """They neither count as a failure nor are they forgotten."""
    core = migration(live=True, can_stop=True, max_rounds=1000)
    for event in (Started(), ChannelsReady(), taken(BIG)):
        core.handle(event)
    for number in range(2, 40):
        assert core.handle(done(0, lost=BIG)) == [TakeDirty()]
        assert core.remaining == BIG
        assert core.handle(taken(BIG)) == [SendRound(number, live=True)]


@pytest.mark.parametrize("can_stop", [True, False])
def test_a_guest_that_writes_faster_than_it_moves(can_stop):
    """After max_rounds it goes on here, and the error has the figures."""
    core = migration(live=True, can_stop=can_stop, max_rounds=3)
    for event in (Started(), ChannelsReady(), taken(BIG)):
        core.handle(event)
    for number in (2, 3):
        assert core.handle(done(BIG)) == [TakeDirty()]
        assert core.handle(taken(BIG)) == [SendRound(number, live=True)]
    assert core.handle(done(BIG)) == [TakeDirty()]
    finish = finish_of(core.handle(taken(BIG)))
    assert type(finish.error) is NotConverging and finish.resume
    assert core.status is Status.FAILED
    assert not core.stopped
    data = finish.error.data
    assert data["rounds"] == 3
    assert data["remaining"] == BIG * 4096
    assert data["rate"] == data["dirty_rate"] == BIG * 4096
    expected = core.convergence.expected_downtime(BIG)
    assert expected > 1 and data["expected_downtime_ms"] == round(expected * 1000)
    assert "after 3 rounds" in finish.error.message
    assert f"{BIG * 4096 >> 20} MiB are left" in finish.error.message
    assert "--downtime-limit" in finish.error.message


def test_the_last_round_may_still_do():
    """If the rest fits at the last look, the guest is moved."""
    core = migration(live=True, can_stop=True, max_rounds=1)
    for event in (Started(), ChannelsReady(), taken(BIG), done(BIG)):
        core.handle(event)
    assert core.handle(taken(10)) == [StopGuest()]


def test_digests_that_differ():
    """Named; the destination never runs, the guest goes on here."""
    core = walk(PATHS["static, verified"], 4)
    finish = finish_of(core.handle(Verified(("ram", "rom"))))
    assert type(finish.error) is VerificationFailed and finish.resume
    assert finish.error.data == {"blocks": ["ram", "rom"]}
    assert "ram, rom" in finish.error.message
    assert core.status is Status.FAILED


def test_a_guest_that_was_stopped_for_nothing_goes_on_here():
    """It stood still for the last round, and then the link broke."""
    core = walk(PATHS["live"], 8)
    assert core.stopped and not core.run_said
    error = PeerLost()
    assert core.handle(Failed(error)) == [Finish(error, resume=True)]


def test_confirmed_before_it_was_told_to_run_is_our_bug():
    """In every state before Run, and it changes nothing."""
    for path in PATHS.values():
        for steps in range(len(path.steps)):
            core = walk(path, steps)
            if core.run_said:
                break
            before = core.status
            with pytest.raises(LocalProtocolError):
                core.handle(Confirmed())
            assert core.status is before and not core.run_said


def test_a_migration_begins_once():
    """Started, and only Started or a cancel, begins it."""
    core = migration()
    for event in (ChannelsReady(), Failed(PeerLost())):
        with pytest.raises(LocalProtocolError):
            core.handle(event)
        assert core.status is Status.NONE
    core.handle(Started())
    with pytest.raises(LocalProtocolError):
        core.handle(Started())
    assert core.status is Status.SETUP


# ---- any order -----------------------------------------------------------------------------

kinds = st.fixed_dictionaries(
    {
        "live": st.booleans(),
        "can_stop": st.booleans(),
        "verify": st.booleans(),
        "limit": st.sampled_from([0.001, 0.3, 10.0]),
        "max_rounds": st.integers(1, 6),
    }
).map(lambda kind: kind | {"can_stop": kind["live"] and kind["can_stop"]})
pages = st.sampled_from([0, 1, 1000, 10**5, 10**8])
seconds = st.sampled_from([0.0, 1e-3, 1.0, 100.0])
takens = st.builds(Taken, pages, pages, seconds, seconds)
rounds = st.builds(RoundDone, pages, st.sampled_from([0, 0, 0, 1, 10**5]), seconds)
verifieds = st.builds(Verified, st.sampled_from([(), (), ("ram",)]))
failures = st.builds(Failed, st.builds(PeerLost), st.booleans())

# What the coordinator reports after each instruction.
ANSWERS = {
    OpenChannels: st.just(ChannelsReady()),
    TakeInitial: takens,
    TakeDirty: takens,
    SendRound: rounds,
    StopGuest: st.just(GuestStopped()),
    Verify: verifieds,
    SendState: st.just(StateLoaded()),
    SendRun: st.just(Confirmed()),
}


def reachable(before):
    """Statuses that one event may lead to, by the table (a cancel goes through several)."""
    found, todo = set(), [before]
    while todo:
        status = todo.pop()
        if status not in found:
            found.add(status)
            todo += TRANSITIONS[status]
    return found


@given(kinds, st.data())
@examples
def test_whatever_happens_in_a_legal_order(kind, data):
    """Each instruction answered with any result, failures and cancels at any time: it ends, the
    statuses follow the table, the guest is stopped only if it can be, and runs in one place."""
    core = migration(**kind)
    instruction, asked_to_stop = None, False
    event = data.draw(st.sampled_from([Started(), Started(), Started(), CancelAsked()]))
    for _ in range(200):
        before, said = core.status, core.run_said
        instructions = core.handle(event)
        assert core.status in reachable(before)
        if isinstance(event, CancelAsked) and said:
            assert instructions == []
        else:
            (instruction,) = instructions
        if isinstance(instruction, StopGuest):
            assert kind["can_stop"] and not asked_to_stop
            asked_to_stop = True
        if isinstance(instruction, SendRound):
            assert instruction.live == (kind["live"] and not asked_to_stop)
        if isinstance(instruction, SendState):
            assert core.remaining == 0 and (asked_to_stop or not kind["can_stop"])
        if isinstance(instruction, Finish):
            break
        # now and then something comes between
        between = {0: failures, 1: st.just(CancelAsked())}
        answer = ANSWERS[type(instruction)]
        event = data.draw(between.get(data.draw(st.integers(0, 15)), answer))
    assert isinstance(instruction, Finish), "it does not end"
    assert core.status in FINAL
    assert (instruction.error is None) == (core.status is Status.COMPLETED)
    if core.status is Status.COMPLETED:
        assert not instruction.resume and core.run_said
    else:
        by_peer = isinstance(event, Failed) and event.by_peer
        assert instruction.resume == (not core.run_said or by_peer)
    assert core.handle(event) == []


any_event = st.one_of(
    st.sampled_from(
        [Started(), ChannelsReady(), GuestStopped(), StateLoaded(), Confirmed(), CancelAsked()]
    ),
    takens,
    rounds,
    verifieds,
    failures,
)


@given(kinds, st.lists(any_event, max_size=25))
@examples
def test_whatever_happens_in_any_order(kind, events):
    """Events that make no sense are our bug and said so; a status never goes astray."""
    core = migration(**kind)
    finished = None
    for event in events:
        before, said = core.status, core.run_said
        try:
            instructions = core.handle(event)
        except LocalProtocolError:
            assert before not in FINAL
            assert core.status is before
            # a failure or a cancel is legal at any time after the start
            assert before is Status.NONE or not isinstance(event, (Failed, CancelAsked))
            continue
        assert core.status in reachable(before)
        assert core.run_said or not said
        ends = [i for i in instructions if isinstance(i, Finish)]
        if before in FINAL:
            assert instructions == [] and core.status is before
        if ends:
            assert finished is None
            (finished,) = ends
            by_peer = isinstance(event, Failed) and event.by_peer
            if finished.resume:
                assert not said or by_peer
            else:
                assert said
        assert (finished is not None) == (core.status in FINAL)
