"""The source's decisions: every path, failure and cancel in every state, any order of events."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.convergence import Convergence
from pageferry.pipeline.migration import (
    Abandoned,
    AskToStop,
    BackgroundDone,
    CancelAsked,
    ChannelsReady,
    Confirmed,
    ContinueAsked,
    CutRound,
    EndPostcopy,
    Failed,
    Finish,
    GuestStopped,
    MayStop,
    Migration,
    MissingTold,
    OpenChannels,
    Pause,
    PostcopyAsked,
    PostcopyEnded,
    Reconnect,
    Reconnected,
    RecoverAsked,
    RoundDone,
    SendBackground,
    SendRound,
    SendRun,
    SendState,
    Started,
    StateLoaded,
    StopGuest,
    TakeDirty,
    TakeInitial,
    Taken,
    TellMissing,
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
    PostcopyFailed,
    SourceError,
    VerificationFailed,
    WorkerDied,
)

examples = settings(max_examples=75, deadline=None, derandomize=True, database=None)

BIG = 10**6  # pages that no downtime limit here allows


def migration(
    *, live=False, can_stop=False, verify=False, limit=0.3, max_rounds=30, postcopy="never",
    after=None, asks=False, pauses=False,
):  # fmt: skip
    found = Convergence(limit, max_rounds)
    return Migration(live, can_stop, verify, found, postcopy, after, asks, pauses)


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


def live_that_asks(seconds):
    """Somebody is asked before it is stopped; what was written until the answer has a round if that
    was long, and nobody is asked again."""
    path = opening(Path({"live": True, "can_stop": True, "asks": True, "max_rounds": 1}))
    path.step(taken(BIG), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(10), AskToStop(), Status.ACTIVE)
    if seconds > 0.05:
        path.step(MayStop(seconds), TakeDirty(), Status.ACTIVE)
        path.step(taken(BIG), SendRound(2, live=True), Status.ACTIVE)
        path.step(done(BIG), TakeDirty(), Status.ACTIVE)
        path.step(taken(10), StopGuest(), Status.DEVICE)
    else:
        path.step(MayStop(seconds), StopGuest(), Status.DEVICE)
    path.step(GuestStopped(), TakeDirty(), Status.DEVICE)
    path.step(taken(12), SendRound(3 if seconds > 0.05 else 2, live=False), Status.DEVICE)
    path.step(done(12), SendState(), Status.DEVICE)
    return ending(path)


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


def live_that_pauses():
    """It stands still and waits; what it wrote last is taken when somebody has said continue."""
    path = opening(Path({"live": True, "can_stop": True, "pauses": True}))
    path.step(taken(BIG), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(10), StopGuest(), Status.ACTIVE)
    path.step(GuestStopped(), None, Status.PRE_SWITCHOVER)
    path.step(ContinueAsked(), TakeDirty(), Status.DEVICE)
    path.step(taken(12), SendRound(2, live=False), Status.DEVICE)
    path.step(done(12), SendState(), Status.DEVICE)
    return ending(path)


def static_that_pauses(acks=False):
    path = Path({"verify": True, "pauses": True})
    path.step(Started(), OpenChannels(), Status.SETUP)
    path.step(ChannelsReady(acks), TakeInitial(), Status.ACTIVE)
    path.step(taken(100), SendRound(1, live=False), Status.ACTIVE)
    if acks:
        path.step(done(100), AskToStop(), Status.ACTIVE)
        path.step(MayStop(7.0), None, Status.PRE_SWITCHOVER)
    else:
        path.step(done(100), None, Status.PRE_SWITCHOVER)
    path.step(ContinueAsked(), Verify(), Status.DEVICE)
    return ending(path, verify=True)


def live_unstoppable_that_waits():
    """For the destination, and for somebody who says continue: what was written meanwhile goes as
    ever, and nobody is waited for again."""
    path = Path({"live": True, "pauses": True, "max_rounds": 1})
    path.step(Started(), OpenChannels(), Status.SETUP)
    path.step(ChannelsReady(acks=True), TakeInitial(), Status.ACTIVE)
    path.step(taken(1000), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(1000), TakeDirty(), Status.ACTIVE)
    path.step(taken(0), AskToStop(), Status.ACTIVE)
    path.step(MayStop(0.0), TakeDirty(), Status.ACTIVE)
    path.step(taken(3), SendRound(2, live=True), Status.ACTIVE)
    path.step(done(3), TakeDirty(), Status.ACTIVE)
    path.step(taken(0), None, Status.PRE_SWITCHOVER)
    path.step(ContinueAsked(), TakeDirty(), Status.DEVICE)
    path.step(taken(5), SendRound(3, live=True), Status.DEVICE)
    path.step(done(5), TakeDirty(), Status.DEVICE)
    path.step(taken(0), SendState(), Status.DEVICE)
    return ending(path)


def live_that_waits_for_the_destination(seconds):
    """As for whoever else is asked; with as many rounds more as there were."""
    path = Path({"live": True, "can_stop": True, "max_rounds": 1})
    path.step(Started(), OpenChannels(), Status.SETUP)
    path.step(ChannelsReady(acks=True), TakeInitial(), Status.ACTIVE)
    path.step(taken(BIG), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(10), AskToStop(), Status.ACTIVE)
    if seconds > 0.05:
        path.step(MayStop(seconds), TakeDirty(), Status.ACTIVE)
        path.step(taken(BIG), SendRound(2, live=True), Status.ACTIVE)
        path.step(done(BIG), TakeDirty(), Status.ACTIVE)
        path.step(taken(10), StopGuest(), Status.DEVICE)
    else:
        path.step(MayStop(seconds), StopGuest(), Status.DEVICE)
    path.step(GuestStopped(), TakeDirty(), Status.DEVICE)
    path.step(taken(0), SendRound(3 if seconds > 0.05 else 2, live=False), Status.DEVICE)
    path.step(done(0), SendState(), Status.DEVICE)
    return ending(path)


PATHS = {
    "live, pauses": live_that_pauses(),
    "static, pauses": static_that_pauses(),
    "static, waits for the destination, pauses": static_that_pauses(acks=True),
    "live, cannot be stopped, waits": live_unstoppable_that_waits(),
    "live, destination is ready": live_that_waits_for_the_destination(0.0),
    "live, waits for the destination": live_that_waits_for_the_destination(60.0),
    "static": static(),
    "static, verified": static(verify=True),
    "static, frames lost": static_with_losses(),
    "live": live(),
    "live, verified": live(verify=True),
    "live, asks": live_that_asks(0.05),
    "live, asks, and waits": live_that_asks(3.0),
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
        assert core.handle(event) == ([] if instruction is None else [instruction]), event
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


@pytest.mark.parametrize("name", PATHS)
def test_continue_in_every_other_state(name):
    """Is forgotten: it does not go on by it later."""
    path = PATHS[name]
    for steps in range(len(path.steps)):
        core = walk(path, steps)
        if core.status is not Status.PRE_SWITCHOVER:
            before = vars(core).copy()
            assert core.handle(ContinueAsked()) == []
            assert vars(core) == before


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
        "asks": st.booleans(),
        "pauses": st.booleans(),
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
    OpenChannels: st.builds(ChannelsReady, st.booleans()),
    TakeInitial: takens,
    TakeDirty: takens,
    SendRound: rounds,
    AskToStop: st.builds(MayStop, st.sampled_from([0.0, 3.0])),
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
    instruction, asked_to_stop, waited = None, False, 0
    event = data.draw(st.sampled_from([Started(), Started(), Started(), CancelAsked()]))
    for _ in range(200):
        before, said = core.status, core.run_said
        instructions = core.handle(event)
        assert core.status in reachable(before)
        if isinstance(event, CancelAsked) and said:
            assert instructions == []
        elif core.status is Status.PRE_SWITCHOVER:
            assert instructions == [] and kind["pauses"] and not core.acks
            waited += 1
            answer = st.just(ContinueAsked())
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
        if core.status is not Status.PRE_SWITCHOVER:
            answer = ANSWERS[type(instruction)]
        event = data.draw(between.get(data.draw(st.integers(0, 15)), answer))
    assert isinstance(instruction, Finish), "it does not end"
    assert core.status in FINAL
    assert (instruction.error is None) == (core.status is Status.COMPLETED)
    assert waited <= 1
    if core.status is Status.COMPLETED:
        assert not instruction.resume and core.run_said and waited == kind["pauses"]
    else:
        by_peer = isinstance(event, Failed) and event.by_peer
        assert instruction.resume == (not core.run_said or by_peer)
    assert core.handle(event) == []


any_event = st.one_of(
    st.sampled_from(
        [
            Started(),
            ChannelsReady(),
            GuestStopped(),
            StateLoaded(),
            Confirmed(),
            CancelAsked(),
            ContinueAsked(),
            ChannelsReady(acks=True),
            MayStop(3.0),
        ]
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


# ---- postcopy: the guest starts before its memory is there -----------------------------------


LOST = PeerLost("the cable")


def leaving(path):
    """From the stop of a guest that is to leave by postcopy to Run."""
    path.step(GuestStopped(), TakeDirty(), Status.DEVICE)
    path.step(taken(500), TellMissing(), Status.DEVICE)
    path.step(MissingTold(), SendState(postcopy=True), Status.DEVICE)
    return path.step(StateLoaded(), SendRun(), Status.DEVICE)


def background(path):
    """From the destination's word that the guest runs to the end."""
    path.step(Confirmed(), SendBackground(), Status.POSTCOPY_ACTIVE)
    path.step(BackgroundDone(), EndPostcopy(), Status.POSTCOPY_ACTIVE)
    return path.step(PostcopyEnded(), Finish(None, resume=False), Status.COMPLETED)


def by_postcopy(mode, **more):
    return opening(Path({"live": True, "can_stop": True, "postcopy": mode, **more}))


def now():
    path = by_postcopy("now")
    path.step(taken(BIG), StopGuest(), Status.DEVICE)
    return background(leaving(path))


def after(rounds):
    """Even though it would not converge sooner; `max_rounds` is not reached."""
    path = by_postcopy(f"after={rounds}", after=rounds)
    for number in range(1, rounds + 1):
        path.step(taken(BIG), SendRound(number, live=True), Status.ACTIVE)
        path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(BIG), StopGuest(), Status.DEVICE)
    return background(leaving(path))


def hopeless():
    """auto: the guest writes as fast as it is moved, and the second round says so."""
    path = by_postcopy("auto")
    for number in (1, 2):
        path.step(taken(BIG), SendRound(number, live=True), Status.ACTIVE)
        path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(BIG), StopGuest(), Status.DEVICE)
    return background(leaving(path))


def out_of_rounds():
    """auto: it might still converge, but the rounds are over."""
    path = by_postcopy("auto", max_rounds=1)
    path.step(taken(BIG), SendRound(1, live=True), Status.ACTIVE)
    path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(BIG // 2), StopGuest(), Status.DEVICE)
    return background(leaving(path))


def asked_before_the_first_round():
    """manual: nothing to cut, and no round begins."""
    path = opening(Path({"live": True, "can_stop": True, "postcopy": "manual"}))
    path.step(PostcopyAsked(), None, Status.ACTIVE)
    path.step(taken(BIG), StopGuest(), Status.DEVICE)
    return background(leaving(path))


def asked_during_a_round(number):
    """manual: the round is cut, and what is left of it goes by postcopy."""
    path = by_postcopy("manual")
    for n in range(1, number):
        path.step(taken(BIG), SendRound(n, live=True), Status.ACTIVE)
        path.step(done(BIG), TakeDirty(), Status.ACTIVE)
    path.step(taken(BIG), SendRound(number, live=True), Status.ACTIVE)
    path.step(PostcopyAsked(), CutRound(), Status.ACTIVE)
    path.step(done(1000, lost=BIG - 1000), TakeDirty(), Status.ACTIVE)
    path.step(taken(BIG), StopGuest(), Status.DEVICE)
    return background(leaving(path))


def recovering():
    """It breaks after Run and before the confirmation, and once more while it recovers."""
    path = by_postcopy("now")
    path.step(taken(BIG), StopGuest(), Status.DEVICE)
    leaving(path)
    path.step(Failed(LOST), Pause(LOST), Status.POSTCOPY_PAUSED)
    path.step(RecoverAsked(), Reconnect(""), Status.POSTCOPY_RECOVER)
    path.step(Failed(LOST), Pause(LOST), Status.POSTCOPY_PAUSED)
    path.step(RecoverAsked("tcp://b:1"), Reconnect("tcp://b:1"), Status.POSTCOPY_RECOVER)
    path.step(Reconnected(300), SendBackground(), Status.POSTCOPY_ACTIVE)
    path.step(Failed(LOST), Pause(LOST), Status.POSTCOPY_PAUSED)
    path.step(RecoverAsked(), Reconnect(""), Status.POSTCOPY_RECOVER)
    path.step(Reconnected(200), SendBackground(), Status.POSTCOPY_ACTIVE)
    path.step(BackgroundDone(), EndPostcopy(), Status.POSTCOPY_ACTIVE)
    return path.step(PostcopyEnded(), Finish(None, resume=False), Status.COMPLETED)


POSTCOPY_PATHS = {
    "now": now(),
    "after=1": after(1),
    "after=3": after(3),
    "auto, hopeless": hopeless(),
    "auto, out of rounds": out_of_rounds(),
    "manual, asked before the first round": asked_before_the_first_round(),
    "manual, asked during round 1": asked_during_a_round(1),
    "manual, asked during round 3": asked_during_a_round(3),
    "recovered": recovering(),
}
IN_POSTCOPY = {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER}
AT_THE_END = [BackgroundDone(), PostcopyEnded(), Confirmed(), PostcopyAsked(), RecoverAsked()]


@pytest.mark.parametrize("name", POSTCOPY_PATHS)
def test_a_postcopy_in_which_all_ends_well(name):
    """Each event, what is done next, the status; nothing after the end."""
    path = POSTCOPY_PATHS[name]
    core = migration(**path.settings)
    for event, instruction, status in path.steps:
        assert core.handle(event) == ([] if instruction is None else [instruction]), event
        assert core.status is status, event
    for event in (*AT_THE_END, Failed(LOST), CancelAsked(), Abandoned(LOST)):
        assert core.handle(event) == []
    assert core.status is Status.COMPLETED


@pytest.mark.parametrize("mode", ["now", "auto", "manual", "after=1"])
def test_a_guest_of_which_nothing_is_left_at_the_stop(mode):
    """What postcopy could bring later is nothing: it ends as ever, and can be resumed until Run."""
    core = migration(
        live=True, can_stop=True, postcopy=mode, after=1 if mode == "after=1" else None,
        max_rounds=1,
    )  # fmt: skip
    core.handle(Started())
    core.handle(ChannelsReady())
    if mode != "now":
        core.handle(taken(BIG))
        core.handle(PostcopyAsked())
        core.handle(done(BIG))
    assert core.handle(taken(BIG)) == [StopGuest()]
    assert core.handle(GuestStopped()) == [TakeDirty()]
    assert core.handle(taken(0)) == [SendRound(core.round, live=False)]
    assert not core.leaving
    assert core.handle(done(0)) == [SendState()]
    assert core.handle(StateLoaded()) == [SendRun()]
    assert core.handle(Confirmed()) == [Finish(None, resume=False)]
    assert core.status is Status.COMPLETED


@pytest.mark.parametrize("mode", ["auto", "manual", "after=5"])
def test_a_guest_that_converges_does_not_need_postcopy(mode):
    """Asked for or not: a switchover within the limit is the better one."""
    path = PATHS["live"]
    core = migration(**path.settings, postcopy=mode, after=5 if mode == "after=5" else None)
    for event, instruction, _ in path.steps:
        assert core.handle(event) == [instruction]
    assert core.status is Status.COMPLETED


def test_manual_waits_until_it_is_asked():
    """However hopeless it is, and when the rounds are over, it has failed."""
    core = migration(live=True, can_stop=True, postcopy="manual", max_rounds=4)
    for event in (Started(), ChannelsReady(), taken(BIG)):
        core.handle(event)
    for number in (2, 3, 4):
        assert core.handle(done(BIG)) == [TakeDirty()]
        assert core.handle(taken(BIG)) == [SendRound(number, live=True)]
    core.handle(done(BIG))
    finish = finish_of(core.handle(taken(BIG)))
    assert type(finish.error) is NotConverging and finish.resume


def test_auto_waits_while_it_gets_better():
    """Each round leaves less than the one before."""
    core = migration(live=True, can_stop=True, postcopy="auto")
    for event in (Started(), ChannelsReady(), taken(BIG)):
        core.handle(event)
    left = BIG
    for number in (2, 3, 4):
        core.handle(done(left))
        left //= 2
        assert core.handle(taken(left)) == [SendRound(number, live=True)]


def test_asked_twice():
    """The second time there is nothing left to cut, or it is cut again; it leaves once."""
    core = walk(POSTCOPY_PATHS["manual, asked during round 1"], 4)
    assert core.handle(PostcopyAsked()) in ([], [CutRound()])
    assert core.handle(done(10, lost=BIG)) == [TakeDirty()]
    assert core.handle(taken(BIG)) == [StopGuest()]
    for event in (GuestStopped(), taken(BIG), MissingTold(), StateLoaded(), Confirmed()):
        assert core.handle(PostcopyAsked()) == []
        core.handle(event)
    assert core.status is Status.POSTCOPY_ACTIVE


def test_asked_when_the_guest_stands_still_for_the_last_round():
    """Too late to be of use: that round is not cut, it would be taken for lost frames."""
    core = walk(PATHS["live"], 9)
    core.postcopy = "manual"
    assert core.stopped
    assert core.handle(PostcopyAsked()) == []
    assert core.handle(done(10, lost=2)) == [SendRound(4, live=False)]


def states_of(path):
    """Each state of a path: steps gone, a migration that has gone them."""
    for steps in range(1, len(path.steps)):
        yield steps, walk(path, steps)


@pytest.mark.parametrize("name", POSTCOPY_PATHS)
def test_failure_in_every_state_of_a_postcopy(name):
    """Before Run: the guest goes on here. After it: paused, never resumed; paused: nothing new."""
    seen = set()
    for steps, core in states_of(POSTCOPY_PATHS[name]):
        before, error = core.status, WorkerDied("sender 0 died")
        seen.add((before, core.run_said))
        instructions = core.handle(Failed(error))
        if not core.run_said:
            assert instructions == [Finish(error, resume=True)], steps
            assert core.status is Status.FAILED
            continue
        assert instructions == ([] if before is Status.POSTCOPY_PAUSED else [Pause(error)]), steps
        assert core.status is Status.POSTCOPY_PAUSED
        assert core.handle(Failed(error)) == []
        assert core.handle(RecoverAsked()) == [Reconnect("")]
    assert {(Status.DEVICE, False), (Status.DEVICE, True)} <= seen
    assert (Status.POSTCOPY_ACTIVE, True) in seen
    if name == "recovered":
        assert {(status, True) for status in IN_POSTCOPY} <= seen


@pytest.mark.parametrize("name", POSTCOPY_PATHS)
def test_failure_that_the_destination_says_in_every_state_of_a_postcopy(name):
    """Until it has said that the guest runs there, it goes on here. From then on it is lost with
    the memory that it had written there: an older one must not run."""
    for steps, core in states_of(POSTCOPY_PATHS[name]):
        before, error = core.status, SourceError("the disk is full")
        finish = finish_of(core.handle(Failed(error, by_peer=True)))
        assert core.status is Status.FAILED
        if before not in IN_POSTCOPY:
            assert finish == Finish(error, resume=True), steps
            continue
        assert not finish.resume
        assert type(finish.error) is PostcopyFailed
        assert "the disk is full" in finish.error.message
        assert finish.error.data["remaining"] == core.remaining * 4096
        assert core.handle(RecoverAsked()) == []


@pytest.mark.parametrize("name", POSTCOPY_PATHS)
def test_cancel_in_every_state_of_a_postcopy(name):
    """Before Run the guest goes on here. After it there is nothing to cancel, except a pause that
    nobody wants to end: then it has failed, and the guest does not go on here."""
    path = POSTCOPY_PATHS[name]
    for steps in range(len(path.steps)):
        core = walk(path, steps)
        before = core.status
        instructions = core.handle(CancelAsked())
        if not core.run_said:
            finish = finish_of(instructions)
            assert type(finish.error) is Cancelled and finish.resume
            assert core.status is Status.CANCELLED
        elif before is Status.POSTCOPY_PAUSED:
            finish = finish_of(instructions)
            assert type(finish.error) is PostcopyFailed and not finish.resume
            assert core.status is Status.FAILED
        else:
            assert instructions == [] and core.status is before
            # it goes on as if nobody had asked
            event, instruction, status = path.steps[steps]
            assert core.handle(event) == [instruction] and core.status is status


@pytest.mark.parametrize("name", POSTCOPY_PATHS)
def test_abandoned_in_every_state_of_a_postcopy(name):
    """Nobody waits for its end: before Run the guest goes on here, after it it is a failure."""
    for steps, core in states_of(POSTCOPY_PATHS[name]):
        error, said = Cancelled("interrupted"), core.run_said
        finish = finish_of(core.handle(Abandoned(error)))
        assert core.status is Status.FAILED
        if said:
            assert not finish.resume, steps
            assert type(finish.error) is PostcopyFailed
            assert "interrupted" in finish.error.message
        else:
            assert finish == Finish(error, resume=True), steps
        assert core.handle(Abandoned(error)) == []


@pytest.mark.parametrize("name", PATHS)
def test_abandoned_in_every_state_without_postcopy(name):
    """It is a failure like any other."""
    for _, core in states_of(PATHS[name]):
        error, said = WorkerDied("sender 0 died"), core.run_said
        finish = finish_of(core.handle(Abandoned(error)))
        assert finish.resume is not said
        assert type(finish.error) is (ConfirmationLost if said else WorkerDied)


def test_a_precopy_that_was_told_to_run_does_not_pause():
    """Postcopy was allowed and not needed: there is nothing to recover, and nothing to resume."""
    path = PATHS["live"]
    core = migration(**path.settings, postcopy="auto")
    for event, _, _ in path.steps[:-1]:
        core.handle(event)
    assert core.run_said and not core.leaving
    finish = finish_of(core.handle(Failed(LOST)))
    assert type(finish.error) is ConfirmationLost and not finish.resume


@pytest.mark.parametrize("steps", [8, 10, 11, 13])
def test_words_of_a_connection_that_is_gone_change_nothing(steps):
    """They were on their way when it broke: while it is paused, and while it recovers."""
    core = walk(POSTCOPY_PATHS["recovered"], steps)
    assert core.status in (Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER)
    before = vars(core).copy()
    for event in (BackgroundDone(), Confirmed(), PostcopyAsked()):
        assert core.handle(event) == []
    if core.status is Status.POSTCOPY_PAUSED:
        assert core.handle(PostcopyEnded()) == []
        assert core.handle(Failed(LOST)) == []
    assert vars(core) | {"asked": False} == before | {"asked": False}


def test_a_destination_that_has_everything_says_so_when_it_is_asked_again():
    """Its last word was lost: what looks like a recovery is the end."""
    core = walk(POSTCOPY_PATHS["recovered"], 8)
    if core.status is Status.POSTCOPY_PAUSED:
        core.handle(RecoverAsked())
    assert core.status is Status.POSTCOPY_RECOVER
    finish = finish_of(core.handle(PostcopyEnded()))
    assert finish.error is None and not finish.resume
    assert core.status is Status.COMPLETED


def test_recover_when_there_is_nothing_to_recover():
    """In every other state; also a second time."""
    for path in (*POSTCOPY_PATHS.values(), *PATHS.values()):
        for steps in range(len(path.steps)):
            core = walk(path, steps)
            before = core.status
            if before is Status.POSTCOPY_PAUSED:
                assert core.handle(RecoverAsked("tcp://b:2")) == [Reconnect("tcp://b:2")]
                before = Status.POSTCOPY_RECOVER
            assert core.handle(RecoverAsked()) == []
            assert core.status is before


def test_a_recovery_that_nobody_asked_for_is_our_bug():
    core = walk(POSTCOPY_PATHS["recovered"], 8)
    assert core.status is Status.POSTCOPY_PAUSED
    with pytest.raises(LocalProtocolError):
        core.handle(Reconnected(5))
    assert core.status is Status.POSTCOPY_PAUSED


def test_what_is_left_is_what_the_destination_lacks():
    """As it said when it was found again."""
    core = walk(POSTCOPY_PATHS["recovered"], 12)
    assert core.status is Status.POSTCOPY_ACTIVE and core.remaining == 300
    finish = finish_of(core.handle(Abandoned(LOST)))
    assert finish.error.data["remaining"] == 300 * 4096


# What the coordinator reports after each instruction of a postcopy.
POSTCOPY_ANSWERS = ANSWERS | {
    TellMissing: st.just(MissingTold()),
    SendBackground: st.just(BackgroundDone()),
    EndPostcopy: st.just(PostcopyEnded()),
    Reconnect: st.builds(Reconnected, pages),
}
postcopy_kinds = st.fixed_dictionaries(
    {
        "live": st.just(True),
        "can_stop": st.just(True),
        "limit": st.sampled_from([0.001, 0.3]),
        "asks": st.booleans(),
        "pauses": st.booleans(),
        "max_rounds": st.integers(1, 6),
        "postcopy": st.sampled_from(["now", "auto", "manual", "after=2"]),
    }
).map(lambda kind: kind | {"after": 2 if kind["postcopy"] == "after=2" else None})
abandoned = st.builds(Abandoned, st.builds(PeerLost))


def resumes(instructions):
    return any(isinstance(i, Finish) and i.resume for i in instructions)


@given(postcopy_kinds, st.data())
@examples
def test_whatever_happens_to_a_postcopy_in_a_legal_order(kind, data):
    """Each instruction answered with any result; failures, cancels and questions at any time: it
    ends, follows the table, and runs in one place."""
    core = migration(**kind)
    instruction, event = None, Started()
    at_any_time = {
        0: failures,
        1: st.just(CancelAsked()),
        2: st.just(PostcopyAsked()),
        3: st.just(RecoverAsked()),
        4: abandoned,
    }
    for _ in range(300):
        before, said = core.status, core.run_said
        instructions = core.handle(event)
        assert core.status in reachable(before)
        assert len(instructions) <= 1
        if said:
            by_peer = isinstance(event, Failed) and event.by_peer
            assert resumes(instructions) == (by_peer and before is Status.DEVICE)
        if instructions and not isinstance(instructions[0], CutRound):
            (instruction,) = instructions
        if isinstance(instruction, SendState):
            assert instruction.postcopy == core.leaving
            assert instruction.postcopy or core.remaining == 0
        if isinstance(instruction, (SendBackground, EndPostcopy, Pause, Reconnect)):
            assert core.run_said and core.leaving
        if isinstance(instruction, Finish):
            break
        if core.status is Status.PRE_SWITCHOVER:
            answer = st.just(ContinueAsked())
        elif isinstance(instruction, Pause):
            answer = st.just(RecoverAsked())
        else:
            answer = POSTCOPY_ANSWERS[type(instruction)]
        event = data.draw(at_any_time.get(data.draw(st.integers(0, 30)), answer))
        # a cancel or a question is answered by nothing: what was under way still is
    assert isinstance(instruction, Finish), "it does not end"
    assert core.status in FINAL
    assert (instruction.error is None) == (core.status is Status.COMPLETED)
    assert core.run_said or core.status is not Status.COMPLETED


any_postcopy_event = st.one_of(
    any_event,
    st.sampled_from(
        [PostcopyAsked(), MissingTold(), BackgroundDone(), PostcopyEnded(), RecoverAsked()]
    ),
    st.builds(Reconnected, pages),
    abandoned,
)


@given(postcopy_kinds | kinds, st.integers(0, 8), st.lists(any_postcopy_event, max_size=25))
@settings(examples, max_examples=200)
def test_a_guest_that_left_is_never_resumed(kind, steps, events):
    """In any order, from the beginning or from the middle of a postcopy: once Run was said, the
    guest goes on here only if the destination itself says, before it said that it runs, that it
    does not."""
    core = migration(**kind)
    if kind.get("postcopy") == "now":
        core = walk(POSTCOPY_PATHS["now"], steps)
    for event in events:
        before, said, ended = core.status, core.run_said, core.status in FINAL
        try:
            instructions = core.handle(event)
        except LocalProtocolError:
            assert core.status is before and not ended
            continue
        assert core.status in reachable(before)
        assert core.run_said or not said
        if said and resumes(instructions):
            assert isinstance(event, Failed) and event.by_peer and before is Status.DEVICE
        if ended:
            assert instructions == [] and core.status is before
