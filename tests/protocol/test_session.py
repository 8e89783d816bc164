"""The control session: every message in every phase from either end, and every kind of garbage."""

import types
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport import messages
from pageferry.transport.errors import (
    LocalProtocolError,
    PageferryError,
    PeerRefused,
    RemoteProtocolError,
    all_errors,
)
from pageferry.transport.messages import (
    Abort,
    AnyMessage,
    Armed,
    Block,
    Contents,
    DeviceState,
    DigestRequest,
    Digests,
    Discard,
    Discarded,
    Ended,
    Held,
    Hello,
    Layout,
    Missing,
    Offer,
    Paused,
    Ping,
    PostcopyEnd,
    Pull,
    Refused,
    Resume,
    Resumed,
    Round,
    Run,
    Running,
    Serving,
    StateLoaded,
    StatePart,
    SwitchoverAck,
    Welcome,
    decode,
    encode,
)
from pageferry.transport.session import TRANSITIONS, Phase, Role, Session, diagram

examples = settings(max_examples=75, deadline=None, derandomize=True, database=None)

S, D = Role.SOURCE, Role.DESTINATION
EXAMPLES = {
    Hello: Hello(1, "0.1.0", "id", "demo", [Block("ram", 4096)], 2, 128),
    Welcome: Welcome("0.1.0", ["tcp:1", "tcp:2"], [b"a", b"b"], [True]),
    Refused: Refused("PeerRefused", "kind", "no"),
    Discard: Discard(0, [1, 5], [2, 3]),
    Missing: Missing(0, [7], [8]),
    Discarded: Discarded(),
    Round: Round(1, 100),
    DigestRequest: DigestRequest(),
    Digests: Digests([b"x" * 16]),
    Contents: Contents(0, [1], [1], b"x" * 16),
    Held: Held(b"\x80"),
    StatePart: StatePart(b"part"),
    SwitchoverAck: SwitchoverAck(),
    DeviceState: DeviceState("demo", b"state"),
    StateLoaded: StateLoaded(),
    Run: Run(),
    Running: Running("demo"),
    PostcopyEnd: PostcopyEnd(),
    Ended: Ended([1, 2], {"faults": 3}),
    Resume: Resume(1, "id", 2),
    Resumed: Resumed(["tcp:1"], [b"a"], ("tcp:3", b"u"), [b"\xff"]),
    Paused: Paused("the cable"),
    Abort: Abort("PeerLost", "silence"),
    Ping: Ping(),
    Pull: Pull(1, "0.1.0"),
    Offer: Offer("0.1.0", "id", [Block("ram", 4096)], 2),
    Layout: Layout(4096, [0], [1], b"\x80"),
    Serving: Serving(["tcp:1"], [b"a"], ("tcp:3", b"u"), [0], [1]),
    Armed: Armed(),
}

# Who may say what when, and what follows: written down once more, so that a change is meant.
CONVERSATION = {
    (Phase.IDLE, S, Hello): Phase.GREETING,
    (Phase.GREETING, D, Welcome): Phase.MOVING,
    (Phase.GREETING, D, Refused): Phase.CLOSED,
    (Phase.MOVING, S, Discard): Phase.DISCARDING,
    (Phase.MOVING, S, Missing): Phase.DISCARDING,
    (Phase.DISCARDING, D, Discarded): Phase.MOVING,
    (Phase.MOVING, S, Round): Phase.MOVING,
    (Phase.MOVING, S, Contents): Phase.COMPARING,
    (Phase.COMPARING, D, Held): Phase.MOVING,
    (Phase.MOVING, S, DigestRequest): Phase.DIGESTING,
    (Phase.DIGESTING, D, Digests): Phase.MOVING,
    (Phase.MOVING, S, StatePart): Phase.MOVING,
    (Phase.MOVING, D, SwitchoverAck): Phase.MOVING,
    (Phase.DISCARDING, D, SwitchoverAck): Phase.DISCARDING,
    (Phase.COMPARING, D, SwitchoverAck): Phase.COMPARING,
    (Phase.MOVING, S, DeviceState): Phase.LOADING,
    (Phase.LOADING, D, StateLoaded): Phase.LOADED,
    (Phase.LOADED, S, Run): Phase.STARTING,
    (Phase.STARTING, D, Running): Phase.RUNNING,
    (Phase.RUNNING, S, PostcopyEnd): Phase.ENDING,
    (Phase.ENDING, D, Ended): Phase.CLOSED,
    (Phase.IDLE, S, Resume): Phase.RESUMING,
    (Phase.RESUMING, D, Resumed): Phase.RUNNING,
    (Phase.RESUMING, D, Ended): Phase.CLOSED,
    (Phase.RESUMING, D, Refused): Phase.CLOSED,
    (Phase.IDLE, D, Pull): Phase.PULLING,
    (Phase.PULLING, S, Offer): Phase.OFFERED,
    (Phase.PULLING, S, Refused): Phase.CLOSED,
    (Phase.OFFERED, D, Layout): Phase.LAYING_OUT,
    (Phase.LAYING_OUT, S, Serving): Phase.SERVED,
    (Phase.SERVED, D, Armed): Phase.RUNNING,
}
TALKING = set(Phase) - {Phase.IDLE, Phase.CLOSED}
RUN_SAID = {Phase.STARTING, Phase.RUNNING, Phase.ENDING, Phase.RESUMING}


def may_abort(phase, role):
    """Once the source has said Run, only the destination may still say that it is over."""
    return phase in TALKING and not (phase in RUN_SAID and role is S)


def may_pause(phase):
    """Once the source has said Run, and never before: either end, to be taken up again."""
    return phase in RUN_SAID


def expected(phase, role, message):
    """The phase after `role` said `message` in `phase`, or None if it may not."""
    if message is Abort:
        return Phase.CLOSED if may_abort(phase, role) else None
    if message is Paused:
        return Phase.CLOSED if may_pause(phase) else None
    if message is Ping:
        return phase if phase in TALKING else None
    return CONVERSATION.get((phase, role, message))


def ends(phase, speaker):
    """Both ends in `phase`: the one that speaks, the one that hears."""
    speaking, hearing = Session(speaker), Session(D if speaker is S else S)
    speaking.phase = hearing.phase = phase
    return speaking, hearing


def test_there_is_an_example_of_every_message():
    """Or the tests below would not look at all of them."""
    assert set(EXAMPLES) == set(typing.get_args(AnyMessage))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("phase", Phase)
def test_every_message_in_every_phase(phase, role):
    """Legal: both ends move to the same phase. Illegal: either end refuses and stays."""
    for kind, message in EXAMPLES.items():
        following = expected(phase, role, kind)
        speaking, hearing = ends(phase, role)
        assert TRANSITIONS.get((phase, role, kind)) == following, kind
        if following is not None:
            assert hearing.receive(speaking.send(message)) == message
            assert speaking.phase is hearing.phase is following
            continue
        with pytest.raises(LocalProtocolError, match=kind.__name__):
            speaking.send(message)
        with pytest.raises(RemoteProtocolError, match=kind.__name__):
            hearing.receive(encode(message))
        assert speaking.phase is hearing.phase is phase


@pytest.mark.parametrize("role", Role)
def test_may_abort_and_may_pause_say_what_is_legal(role):
    """In every phase, at either end."""
    for phase in Phase:
        session, _ = ends(phase, role)
        assert session.may_abort == may_abort(phase, role)
        assert session.may_pause == may_pause(phase)


def test_nobody_hears_what_only_he_may_say():
    """A message of ours that comes back is the peer's fault."""
    for (phase, role, kind), _ in CONVERSATION.items():
        speaking, _ = ends(phase, role)
        with pytest.raises(RemoteProtocolError):
            speaking.receive(encode(EXAMPLES[kind]))
        assert speaking.phase is phase


def converse(*conversation):
    """The two ends after they have said all of it."""
    source, destination = Session(S), Session(D)
    for role, kind in conversation:
        speaking, hearing = (source, destination) if role is S else (destination, source)
        assert hearing.receive(speaking.send(EXAMPLES[kind])) == EXAMPLES[kind]
    return source, destination


def test_a_whole_migration():
    """From Hello to Running with every message that may come between."""
    source, destination = converse(
        (S, Hello), (D, Ping), (D, Welcome), (S, Ping), (S, Discard), (D, SwitchoverAck),
        (D, Discarded), (S, Round),
        (D, Ping), (S, Round), (S, DigestRequest), (D, Digests), (S, DeviceState), (D, StateLoaded),
        (S, Run), (D, Running),
    )  # fmt: skip
    assert source.phase is destination.phase is Phase.RUNNING
    assert not source.may_abort and destination.may_abort


def test_a_whole_postcopy():
    """What is missing is named before the state; the end comes after Running; then nothing."""
    source, destination = converse(
        (S, Hello), (D, Welcome), (S, Round), (S, Missing), (D, Discarded), (S, Missing),
        (D, Discarded), (S, DeviceState), (D, StateLoaded), (S, Run), (D, Running), (S, Ping),
        (D, Ping), (S, PostcopyEnd), (D, Ping), (D, Ended),
    )  # fmt: skip
    assert source.phase is destination.phase is Phase.CLOSED
    assert not source.may_abort and not destination.may_abort


def test_a_postcopy_that_is_taken_up_again():
    """On a new connection, without a Hello: the destination has the guest."""
    source, destination = converse((S, Resume), (D, Ping), (D, Resumed), (S, Ping))
    assert source.phase is destination.phase is Phase.RUNNING
    assert not source.may_abort and destination.may_abort
    for last in ((D, Refused), (D, Paused), (S, Paused)):
        source, destination = converse((S, Resume), last)
        assert source.phase is destination.phase is Phase.CLOSED


def test_a_snapshot_that_is_restored():
    """The destination dials and speaks first; then it is a postcopy like any other."""
    source, destination = converse(
        (D, Pull), (S, Ping), (S, Offer), (D, Layout), (D, Ping), (S, Serving), (D, Armed),
        (S, PostcopyEnd), (D, Ended),
    )  # fmt: skip
    assert source.phase is destination.phase is Phase.CLOSED
    source, destination = converse((D, Pull), (S, Refused))
    assert source.phase is destination.phase is Phase.CLOSED


def test_every_phase_can_be_reached_and_one_is_the_end():
    """No phase is dead, no phase but CLOSED is a trap."""
    reached, todo = set(), [Phase.IDLE]
    while todo:
        phase = todo.pop()
        if phase not in reached:
            reached.add(phase)
            todo += [after for (before, _, _), after in TRANSITIONS.items() if before is phase]
    assert reached == set(Phase)
    assert set(Phase) - {before for before, _, _ in TRANSITIONS} == {Phase.CLOSED}


def test_the_picture_shows_the_whole_conversation():
    """One arrow for every row of the table but Abort, Paused and Ping."""
    lines = diagram().splitlines()
    arrows = {line.strip() for line in lines[2:]}
    # mermaid takes no dash in a name
    assert arrows == {
        f"{before.value} --> {after.value}: {role.value}: {kind.__name__}".replace("g-o", "g_o")
        for (before, role, kind), after in CONVERSATION.items()
    }
    assert len(lines) == 2 + len(CONVERSATION)


def test_a_message_that_cannot_be_encoded_changes_nothing():
    """A lone surrogate, as in a path that is not UTF-8."""
    session, _ = ends(Phase.GREETING, D)
    with pytest.raises(UnicodeEncodeError):
        session.send(Refused("DestinationError", "destination", "cannot write \udcff"))
    assert session.phase is Phase.GREETING


# ---- messages ------------------------------------------------------------------------------


def values_of(annotation):
    """Values for a field of a message."""
    origin = typing.get_origin(annotation)
    inner = [values_of(argument) for argument in typing.get_args(annotation)]
    if origin is list:
        return st.lists(inner[0], max_size=3)
    if origin is tuple:
        return st.tuples(*inner)
    if origin is dict:
        return st.dictionaries(*inner, max_size=3)
    if origin is types.UnionType:
        return st.one_of(*inner)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return messages_of(annotation)
    plain = {
        int: st.integers(-(2**63), 2**64 - 1),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=20),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[annotation]


def messages_of(kind):
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in msgspec.structs.fields(kind)]
    return st.builds(kind, **{name: values_of(hints[name]) for name in fields})


any_message = st.one_of(*(messages_of(kind) for kind in EXAMPLES))


@given(any_message)
@examples
def test_messages_round_trip(message):
    """Every message with any value in its fields; what a person reads is made readable."""
    data = encode(message)
    if message != (message := messages._readable(message)):
        assert all(map(str.isprintable, texts_of(message)))
    assert decode(data) == message
    assert decode(memoryview(data)) == message


def texts_of(message):
    return [getattr(message, name) for name in messages._TEXTS[type(message)]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot write /tmp/é: no space", "cannot write /tmp/é: no space"),
        ("\x1b]0;owned\x07\x1b[2J\r\nall is well", "�]0;owned��[2J��all is well"),
        ("\u202egpj.exe\u2028", "�gpj.exe�"),
        ("x" * 10_000, "x" * messages.MAX_TEXT),
    ],
)
def test_a_peer_says_nothing_to_the_terminal(text, shown):
    """Escapes, line ends, reversals, and more than anybody reads."""
    assert decode(encode(Abort("PeerLost", text))) == Abort("PeerLost", shown)
    assert decode(encode(Running(text))).detail == shown


def understood(data):
    """The message in `data`, None if it was refused. Nothing else may be raised."""
    try:
        message = decode(data)
    except RemoteProtocolError:
        return None
    assert type(message) in EXAMPLES
    return message


@given(st.binary(max_size=100))
@settings(examples, max_examples=150)
def test_garbage_is_refused(data):
    """Bytes at random are never a message: too much has to fit."""
    assert understood(data) is None


@given(any_message, st.data())
@settings(examples, max_examples=150)
def test_damaged_messages_are_refused_or_are_messages(message, data):
    """A changed, missing or additional byte never raises anything else."""
    whole = bytearray(encode(message))
    at = data.draw(st.integers(0, len(whole) - 1))
    assert understood(bytes(whole[:at])) is None
    assert understood(bytes(whole) + b"\0") is None
    whole[at] ^= data.draw(st.integers(1, 255))
    understood(bytes(whole))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"type": "round", "number": "1", "pages": 0}, "number"),
        ({"type": "round", "pages": 0}, "number"),
        ({"type": "round", "number": 1, "pages": 0, "colour": "red"}, "colour"),
        ({"type": "hello", "protocol": 1, "blocks": [{"name": "a", "size": None}]}, "size"),
        ({"type": "surprise"}, "surprise"),
        ({"number": 1}, "type"),
        ([1, 2], "object"),
    ],
)
def test_a_wrong_message_is_refused_by_the_name_of_what_is_wrong(fields, named):
    """The operator reads it."""
    with pytest.raises(RemoteProtocolError, match=named):
        decode(msgspec.msgpack.encode(fields))


def test_a_message_nested_deeper_than_the_stack_is_refused():
    """A few hundred kilobytes from a stranger must not end the receiver."""
    nested = b"\x91" * 200_000 + b"\xc0"
    for data in (nested, b"\x82\xa1x" + nested + b"\xa4type\xa4ping"):
        with pytest.raises(RemoteProtocolError):
            decode(data)


def test_a_message_above_the_bound_is_refused_unread():
    """Before anything looks into it."""
    with pytest.raises(RemoteProtocolError, match="bytes"):
        decode(bytes(messages.MAX_MESSAGE + 1))


def test_a_text_that_is_not_utf8_is_refused():
    """In a field and in a field's name."""
    good = encode(Running("abc"))
    for old, new in ((b"abc", b"a\xffc"), (b"detail", b"deta\xffl")):
        assert old in good
        assert understood(good.replace(old, new)) is None


def test_errors_travel_by_name():
    """Abort and Refused carry the class and the message; Refused the field as well."""
    for cls in all_errors():
        sent = cls("it broke")
        got = messages.error_of(decode(encode(messages.abort_for(sent))))
        assert type(got) is cls and got.message == "it broke" and got.data == {}
    got = messages.error_of(Refused("PeerRefused", "kind", "no"))
    assert type(got) is PeerRefused and got.data == {"field": "kind"}
    assert type(messages.error_of(Abort("NoSuchError", "hm"))) is PageferryError
