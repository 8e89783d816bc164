"""Sessions and the source's core against everything that can happen: connections that break, peers
that say anything. Never two guests that run; the source's guest never goes on once the destination
was told to run, unless that has said that it does not."""

from collections import deque

from fuzz_messages import EXAMPLES
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from two_ends import DestinationEnd, SourceEnd

from pageferry.pipeline import migration as core
from pageferry.pipeline.state import FINAL, Status
from pageferry.transport import messages
from pageferry.transport.errors import GuestGone, PeerLost, RemoteProtocolError, SourceError
from pageferry.transport.messages import decode
from pageferry.transport.session import Phase, Role, Session

POSTCOPY = st.sampled_from(["never", "now", "manual", "auto"])
ANYTHING = st.sampled_from(EXAMPLES)
STARTS = st.sampled_from([True, True, True, False])
TURNS = st.integers(0, 8)
# Where trouble begins.
UNTIL = st.sampled_from([
    Phase.MOVING, Phase.DIGESTING, Phase.LOADING, Phase.STARTING, Phase.STARTING, Phase.RUNNING,
    Phase.RUNNING, Phase.ENDING,
])  # fmt: skip
# A migration of some rounds takes fewer turns.
_LONGEST = 60


def refusal(phase, data):
    """Why a source in `phase` may not be told this; empty if it may."""
    session = Session(Role.SOURCE)
    session.phase = phase
    try:
        session.receive(data)
    except RemoteProtocolError as e:
        assert session.phase is phase
        return e.message
    return ""


class BrokenConnections(RuleBasedStateMachine):
    """Two honest ends. A connection breaks at any moment, with what is on its way, and each end
    notices when it likes; guests fail, people cancel and recover."""

    @initialize(
        postcopy=POSTCOPY, verify=st.booleans(), starts=STARTS, still=st.booleans(), until=UNTIL,
        pauses=st.booleans(), acks=st.booleans(),
    )  # fmt: skip
    def begin(self, postcopy, verify, starts, still, until, pauses, acks):
        self.down, self.up = deque(), deque()
        self.unnoticed = set()
        self.broken = False
        pages = 0 if still else 3
        self.source = SourceEnd(
            lambda data: self.broken or self.down.append(data),
            verify=verify, postcopy=postcopy, pages=pages, pauses=pauses,
        )  # fmt: skip
        self.destination = DestinationEnd(
            lambda data: self.broken or self.up.append(data), starts=starts, acks=acks
        )
        self.source.handle(core.Started())
        for _ in range(_LONGEST):
            if self.source.session.phase is not until:
                self.undisturbed(1)

    @precondition(lambda self: not self.source.idle)
    @rule()
    def go_on(self):
        if isinstance(self.source.todo[0], core.Reconnect):
            self.down.clear()
            self.up.clear()
            self.broken = False
        self.source.step()

    @rule(turns=TURNS)
    def undisturbed(self, turns):
        """Some turns without a trouble: who waits to the next message and who is told it."""
        for _ in range(turns):
            if not self.source.idle:
                self.go_on()
            elif self.down:
                self.arrive_there()
            elif self.up:
                self.arrive_here()
            elif self.destination.may_get_ready:
                self.destination.get_ready()
            elif self.source.core.status is Status.PRE_SWITCHOVER:
                self.source.handle(core.ContinueAsked())

    @precondition(lambda self: self.destination.may_get_ready)
    @rule()
    def get_ready(self):
        self.destination.get_ready()

    @precondition(lambda self: self.down)
    @rule()
    def arrive_there(self):
        self.destination.hear(self.down.popleft())

    @precondition(lambda self: self.up)
    @rule()
    def arrive_here(self):
        self.source.hear(self.up.popleft())

    @precondition(lambda self: not self.broken)
    @rule()
    def break_(self):
        self.broken = True
        self.down.clear()
        self.up.clear()
        self.unnoticed = {"source", "destination"}

    @precondition(lambda self: self.unnoticed)
    @rule(data=st.data())
    def notice(self, data):
        who = data.draw(st.sampled_from(sorted(self.unnoticed)))
        self.unnoticed.discard(who)
        if who == "destination":
            self.destination.fail(PeerLost("silence"))
        elif self.broken and self.source.core.status not in FINAL:
            self.source.fail(PeerLost("silence"), link=True)

    @precondition(lambda self: self.source.core.status not in FINAL)
    @rule(event=st.sampled_from([
        core.CancelAsked(), core.PostcopyAsked(), core.RecoverAsked(), core.ContinueAsked(),
    ]))  # fmt: skip
    def ask(self, event):
        self.source.handle(event)

    @rule(at_source=st.booleans())
    def fail(self, at_source):
        if at_source:
            self.source.fail(SourceError("a worker died"))
        else:
            self.destination.fail(GuestGone("a worker died"))

    @precondition(lambda self: self.destination.postcopy and self.destination.runs)
    @rule()
    def guest_dies(self):
        self.destination.die(GuestGone("it is gone"))

    @invariant()
    def one_guest(self):
        if hasattr(self, "source"):
            assert not (self.source.runs and self.destination.runs)
            assert self.destination.started <= 1

    @invariant()
    def it_stands_still_only_where_the_destination_is_ready(self):
        if hasattr(self, "source") and not self.source.runs:
            assert self.source.acked or not self.destination.acks

    @invariant()
    def nobody_goes_on_by_himself(self):
        if hasattr(self, "source") and self.source.core.run_said and self.source.runs:
            assert self.source.told_it_does_not_run

    @invariant()
    def a_completed_one_runs_there(self):
        if hasattr(self, "source") and self.source.core.status is Status.COMPLETED:
            assert self.destination.started == 1 and not self.source.runs


class HostileDestination(RuleBasedStateMachine):
    """It says anything at any time, or what is right, so that every phase is reached."""

    @initialize(
        postcopy=POSTCOPY, verify=st.booleans(), still=st.booleans(), until=UNTIL, first=ANYTHING
    )
    def begin(self, postcopy, verify, still, until, first):
        self.said = deque()
        pages = 0 if still else 3
        self.source = SourceEnd(self.said.append, verify=verify, postcopy=postcopy, pages=pages)
        self.honest = DestinationEnd(self.source.hear)
        self.source.handle(core.Started())
        for _ in range(_LONGEST):
            if self.source.session.phase is not until:
                self.as_it_should_be(1)
        self.say_anything(first, 0)

    @rule(turns=TURNS)
    def as_it_should_be(self, turns):
        for _ in range(turns):
            if not self.source.idle:
                self.source.step()
            elif self.said:
                self.honest.hear(self.said.popleft())

    @rule(data=ANYTHING, damage=st.sampled_from([0, 0, 0, 1]))
    def say_anything(self, data, damage):
        """Only RemoteProtocolError is raised, with the phase; it ends the connection."""
        data = data[: len(data) - damage]
        why = refusal(self.source.session.phase, data)
        was_over = self.source.core.status in (*FINAL, Status.POSTCOPY_PAUSED)
        self.source.hear(data)
        if why and not was_over:
            assert damage or self.source.session.phase.value in why
            assert self.source.core.status in (*FINAL, Status.POSTCOPY_PAUSED)

    @precondition(lambda self: self.source.core.status is Status.POSTCOPY_PAUSED)
    @rule()
    def recover(self):
        """As somebody asks for it; on a connection where nothing is on its way."""
        self.source.handle(core.RecoverAsked())
        while not self.source.idle:
            self.source.step()
        while self.said and not isinstance(decode(self.said[0]), messages.Resume):
            self.said.popleft()

    @invariant()
    def nobody_goes_on_by_himself(self):
        if hasattr(self, "source") and self.source.core.run_said and self.source.runs:
            assert self.source.told_it_does_not_run

    @invariant()
    def run_comes_last(self):
        """It has not said Run before everything was there, as far as it was told."""
        if hasattr(self, "source") and self.source.session.phase is Phase.STARTING:
            assert self.source.core.run_said and not self.source.runs


class HostileSource(RuleBasedStateMachine):
    """It says anything at any time."""

    @initialize(starts=st.booleans())
    def begin(self, starts):
        self.heard = []
        self.destination = DestinationEnd(self.heard.append, starts=starts)

    @rule(data=ANYTHING, damage=st.sampled_from([0, 0, 0, 0, 0, 0, 1]))
    def say_anything(self, data, damage):
        self.destination.hear(data[: len(data) - damage])

    @rule(postcopy=st.booleans())
    def say_what_is_right(self, postcopy):
        """So that it comes far."""
        missing = [messages.Missing(0, [0], [1])] if postcopy else []
        state = messages.DeviceState("demo", b"", self.destination.postcopy or postcopy)
        talk = [EXAMPLES[0], *map(messages.encode, [*missing, state, messages.Run()])]
        for data in talk:
            self.destination.hear(data)

    @invariant()
    def it_runs_when_it_was_told_to(self):
        if not hasattr(self, "destination"):
            return
        there = self.destination
        said = [type(decode(data)) for data in self.heard]
        assert there.started == said.count(messages.Running) <= 1
        assert not there.runs or messages.StateLoaded in said
        # one error at most; a Resume that is not known is refused as often as it comes
        assert said.count(messages.Abort) <= 1
        if there.runs:
            assert messages.Abort not in said


often = settings(
    max_examples=75, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


def test_connections_break():
    run_state_machine_as_test(BrokenConnections, settings=often)


def test_a_hostile_destination():
    run_state_machine_as_test(HostileDestination, settings=often)


def test_a_hostile_source():
    run_state_machine_as_test(HostileSource, settings=often)
