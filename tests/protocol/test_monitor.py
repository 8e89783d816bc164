"""The monitor's conversation, sans-IO: one line in, one answer out, whatever the line holds."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry._version import __version__
from pageferry.pipeline.dirty_rate import asked
from pageferry.pipeline.monitor import Conversation, Splitter, monitor_path
from pageferry.pipeline.parameters import Parameters, changed
from pageferry.transport.errors import PeerRefused, UsageError

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class DirtyRates:
    """Measures nothing; remembers what is asked."""

    def __init__(self, told):
        self.told = told

    def start(self, arguments):
        self.told.append(("calc-dirty-rate", asked(arguments)))

    def query(self):
        return {"status": "measuring"}


class Guest:
    """What a monitor looks at: parameters that can be changed, commands that are remembered."""

    def __init__(self):
        self.parameters = Parameters(workers=1)
        self.cancelled = 0
        self.frozen = False
        self.asked = []

    def query(self):
        return {"status": "active", "ram": {"total": 4096}}

    def query_parameters(self):
        return self.parameters.qmp()

    def set_parameters(self, arguments):
        if self.frozen:
            raise PeerRefused("ask the source")
        self.parameters = changed(self.parameters, arguments)

    def cancel(self):
        self.cancelled += 1

    def can_be_yanked(self):
        return not self.frozen

    def yank(self):
        self._ask("yank")

    def start_postcopy(self):
        self._ask("start-postcopy")

    def go_on(self):
        self._ask("continue")

    def pause(self):
        self._ask("pause")

    def recover(self, where):
        self._ask("recover", where)

    @property
    def dirty_rates(self):
        return None if self.frozen else DirtyRates(self.asked)

    def _ask(self, *what):
        if self.frozen:
            raise UsageError("not now")
        self.asked.append(what)


def conversation(negotiated=True):
    talk = Conversation(Guest())
    if negotiated:
        assert say(talk, execute="qmp_capabilities") == {"return": {}}
    return talk


def say(talk, **command):
    return talk.answer(json.dumps(command).encode())


def error_class(answer):
    assert set(answer) - {"id"} == {"error"}
    assert answer["error"]["desc"]
    return answer["error"]["class"]


def test_the_greeting_names_the_version():
    """As a QMP client expects it before anything is said."""
    greeting = Conversation.greeting()
    version = greeting["QMP"]["version"]
    numbers = [version["qemu"][part] for part in ("major", "minor", "micro")]
    assert ".".join(map(str, numbers)) == ".".join(__version__.split(".")[:3])
    assert greeting["QMP"]["capabilities"] == []


def test_nothing_is_answered_before_capabilities_are_negotiated():
    """Known and unknown commands alike; afterwards they are, and asking again does no harm."""
    talk = conversation(negotiated=False)
    for command in (
        "query-migrate", "migrate_cancel", "query-commands", "migrate-start-postcopy", "no-such",
    ):  # fmt: skip
        answer = say(talk, execute=command)
        assert error_class(answer) == "CommandNotFound"
        assert "negotiation" in answer["error"]["desc"]
    assert talk._migration.cancelled == 0 and talk._migration.asked == []
    assert not talk.negotiated
    assert say(talk, execute="qmp_capabilities") == {"return": {}}
    assert talk.negotiated
    assert say(talk, execute="query-migrate")["return"]["status"] == "active"
    assert say(talk, execute="qmp_capabilities") == {"return": {}}


def test_every_command_that_is_listed_is_there():
    """And no other."""
    talk = conversation()
    listed = {row["name"] for row in say(talk, execute="query-commands")["return"]}
    assert listed == {
        "calc-dirty-rate", "query-dirty-rate",
        "qmp_capabilities", "query-commands", "query-migrate", "query-migrate-parameters",
        "migrate-set-parameters", "migrate_cancel", "query-version", "migrate-start-postcopy",
        "migrate-pause", "migrate-recover", "yank", "query-yank", "migrate-set-capabilities",
        "query-migrate-capabilities", "migrate-continue",
    }  # fmt: skip
    needed = {
        "yank": {"instances": []}, "migrate-set-capabilities": {"capabilities": []},
        "calc-dirty-rate": {"calc-time": 1}, "migrate-continue": {"state": "active"},
    }  # fmt: skip
    for command in listed:
        arguments = needed.get(command, {})
        assert "return" in say(talk, execute=command, arguments=arguments)
    for command in ("migrate", "quit", "", "QUERY-MIGRATE"):
        answer = say(talk, execute=command)
        assert error_class(answer) == "CommandNotFound"


def test_queries_return_what_the_migration_says():
    """Unchanged."""
    talk = conversation()
    assert say(talk, execute="query-migrate")["return"] == talk._migration.query()
    parameters = say(talk, execute="query-migrate-parameters")["return"]
    assert parameters == talk._migration.parameters.qmp()
    assert say(talk, execute="query-version")["return"]["package"] == "pageferry"


def test_dirty_rates_are_measured_at_the_source():
    talk = conversation()
    ask = {"calc-time": 200, "calc-time-unit": "millisecond"}
    assert say(talk, execute="calc-dirty-rate", arguments=ask) == {"return": {}}
    assert talk._migration.asked == [("calc-dirty-rate", asked(ask))]
    assert say(talk, execute="query-dirty-rate")["return"] == {"status": "measuring"}
    wrong = say(talk, execute="calc-dirty-rate", arguments={"calc-time": 99})
    assert error_class(wrong) == "GenericError" and "60 s" in wrong["error"]["desc"]
    talk._migration.frozen = True  # no source
    for command in ("calc-dirty-rate", "query-dirty-rate"):
        answer = say(talk, execute=command, arguments=ask)
        assert error_class(answer) == "GenericError"
        assert "ask its source" in answer["error"]["desc"]


def test_parameters_can_be_set():
    """And show in the next query."""
    talk = conversation()
    arguments = {"max-bandwidth": 10**6, "downtime-limit": 700, "max-rounds": 3}
    assert say(talk, execute="migrate-set-parameters", arguments=arguments) == {"return": {}}
    shown = say(talk, execute="query-migrate-parameters")["return"]
    assert {name: shown[name] for name in arguments} == arguments


def test_capabilities_that_can_be_set():
    """Those that slow a guest down; any other is refused, and so is half a row."""
    talk = conversation()

    def told(*rows):
        return say(talk, execute="migrate-set-capabilities", arguments={"capabilities": list(rows)})

    def shown():
        rows = say(talk, execute="query-migrate-capabilities")["return"]
        return {row["capability"]: row["state"] for row in rows}

    assert shown() == {"auto-converge": False, "dirty-limit": False}
    assert told({"capability": "auto-converge", "state": True}) == {"return": {}}
    assert shown() == {"auto-converge": True, "dirty-limit": False}
    assert talk._migration.parameters.auto_converge
    for row in (
        {"capability": "colo", "state": True},
        {"capability": "auto-converge"},
        1,
        {},
        {"capability": [], "state": True},
        {"capability": "auto-converge", "state": 1},
    ):
        assert error_class(told(row)) == "GenericError"
    assert error_class(say(talk, execute="migrate-set-capabilities")) == "GenericError"
    both = told({"capability": "dirty-limit", "state": True})
    assert "leave one of them out" in both["error"]["desc"]
    assert shown() == {"auto-converge": True, "dirty-limit": False}


def test_errors_of_ours_become_error_answers():
    """Class and text; what was wrong changes nothing."""
    talk = conversation()
    before = talk._migration.parameters
    for arguments in ({"max-rounds": 0}, {"colour": 1}, {"max-bandwidth": "²"}):
        answer = say(talk, execute="migrate-set-parameters", arguments=arguments)
        assert error_class(answer) == "GenericError"
        assert next(iter(arguments)) in answer["error"]["desc"] or "²" in answer["error"]["desc"]
    assert talk._migration.parameters == before
    talk._migration.frozen = True
    answer = say(talk, execute="migrate-set-parameters", arguments={"max-rounds": 3})
    assert answer["error"]["desc"] == "ask the source"


def test_cancel_is_passed_on():
    """Each time it is asked for."""
    talk = conversation()
    assert say(talk, execute="migrate_cancel") == {"return": {}}
    assert say(talk, execute="migrate_cancel") == {"return": {}}
    assert talk._migration.cancelled == 2


def test_postcopy_commands_are_passed_on():
    """In order; an address only if one is given."""
    talk = conversation()
    for command, arguments in (
        ("migrate-start-postcopy", {}),
        ("migrate-pause", {}),
        ("migrate-recover", {}),
        ("migrate-recover", {"uri": "tcp://b:4444"}),
    ):
        assert say(talk, execute=command, arguments=arguments) == {"return": {}}
    assert talk._migration.asked == [
        ("start-postcopy",), ("pause",), ("recover", None), ("recover", "tcp://b:4444"),
    ]  # fmt: skip


@pytest.mark.parametrize(("arguments", "desc"), [
    ({}, "Parameter 'state' is missing"),
    ({"state": "asleep"}, "Parameter 'state' does not accept value 'asleep'"),
    ({"state": ["active"]}, "Parameter 'state' does not accept value '['active']'"),
    ({"state": "pre-switchover"}, "Migration not in expected state: active"),
])  # fmt: skip
def test_continue_names_the_state_that_the_migration_is_in(arguments, desc):
    """QEMU's words for all others; then the migration never hears of it."""
    talk = conversation()
    answer = say(talk, execute="migrate-continue", arguments=arguments)
    assert answer["error"] == {"class": "GenericError", "desc": desc}
    assert talk._migration.asked == []
    assert say(talk, execute="migrate-continue", arguments={"state": "active"}) == {"return": {}}
    assert talk._migration.asked == [("continue",)]


@pytest.mark.parametrize("command", ["migrate-start-postcopy", "migrate-pause", "migrate-recover"])
def test_postcopy_commands_at_the_wrong_time(command):
    """The migration's own error is the answer."""
    talk = conversation()
    talk._migration.frozen = True
    answer = say(talk, execute=command)
    assert error_class(answer) == "GenericError"
    assert answer["error"]["desc"] == "not now"


@pytest.mark.parametrize("uri", [4, ["tcp://b:1"], {"a": 1}, True])
def test_an_address_to_recover_at_is_text(uri):
    """Or the migration never hears of it."""
    talk = conversation()
    answer = say(talk, execute="migrate-recover", arguments={"uri": uri})
    assert error_class(answer) == "GenericError"
    assert "uri" in answer["error"]["desc"]
    assert talk._migration.asked == []


@pytest.mark.parametrize("identity", [7, "abc", None, [1, {"a": 2}], {"x": "y"}, 0, ""])
def test_the_id_of_a_command_is_echoed(identity):
    """Any JSON, with answers and with errors; without one there is none."""
    talk = conversation()
    for command in ("query-migrate", "no-such"):
        assert say(talk, execute=command, id=identity)["id"] == identity
        assert "id" not in say(talk, execute=command)
    assert say(talk, execute="query-migrate", arguments=[1], id=identity)["id"] == identity


NONSENSE = [
    b"",
    b"hello",
    b"{",
    b'{"execute": "query-migrate"',
    b"[]",
    b"3",
    b"null",
    b'"query-migrate"',
    b"{}",
    b'{"arguments": {}}',
    b'{"execute": 3}',
    b'{"execute": null}',
    b'{"execute": ["query-migrate"]}',
    b'{"execute": "query-migrate", "arguments": [1]}',
    b'{"execute": "query-migrate", "arguments": "x"}',
    b'{"execute": "\xff\xfe"}',
    b'{"\xff": 1}',
    b'{"execute": "query-migrate"} trailing',
    b'{"execute": "query-migrate", "id": ' + b"9" * 5000 + b"}",
    b"[" * 200_000,
    b'{"execute": "query-migrate", "arguments": ' + b'{"a":' * 100_000,
]


@pytest.mark.parametrize("line", NONSENSE, ids=lambda line: line[:40].decode("latin1"))
def test_a_line_that_makes_no_sense_is_answered(line):
    """With an error; the next command is answered as ever."""
    talk = conversation()
    assert error_class(talk.answer(line)) == "GenericError"
    assert say(talk, execute="query-migrate")["return"]["status"] == "active"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
commands = st.fixed_dictionaries(
    {
        "execute": st.sampled_from(
            ["migrate-set-parameters", "query-migrate", "migrate_cancel", "migrate-recover"]
        )
    },
    optional={
        "arguments": json_values
        | st.dictionaries(
            st.sampled_from(["max-bandwidth", "downtime-limit", "max-rounds", "uri", "x"]),
            json_values,
        ),
        "id": json_values,
    },
)


@given(
    st.one_of(json_values, commands, commands).map(json.dumps).map(str.encode)
    | st.binary(max_size=60)
)
@examples
def test_any_line_is_answered_with_one_object(line):
    """`answer` never raises, and says either return or error."""
    answer = conversation().answer(line)
    assert len({"return", "error"} & set(answer)) == 1
    assert set(answer) <= {"return", "error", "id"}
    json.dumps(answer)


def test_where_a_monitor_may_be():
    """unix:PATH, short enough for a socket."""
    assert monitor_path("unix:/run/x.sock") == "/run/x.sock"
    for where in ("", "/run/x", "unix:", "tcp:localhost:1", "unix:/" + "x" * 120):
        with pytest.raises(UsageError, match="unix:PATH"):
            monitor_path(where)


# ---- the stream ----------------------------------------------------------------------------

objects = st.dictionaries(st.text(max_size=6), json_values, max_size=3).map(
    lambda value: json.dumps(value).encode()
)
texts = st.text(st.sampled_from('{}[]"\\ aé'), max_size=12).map(
    lambda text: json.dumps({"a": text}, ensure_ascii=False).encode()
)


@given(
    st.lists(
        st.tuples(objects | texts, st.sampled_from([b"", b"\n", b"\r\n", b" \t "])), max_size=5
    ),
    st.lists(st.integers(1, 20), max_size=20),
)
@examples
def test_a_stream_is_cut_into_objects_wherever_it_is_cut_into_reads(sent, reads):
    """With line ends or without; braces and quotes in strings are text."""
    stream = b"".join(piece + gap for piece, gap in sent)
    splitter, got = Splitter(), []
    for length in [*reads, len(stream)]:
        got += splitter.feed(stream[:length])
        stream = stream[length:]
    assert got == [piece for piece, _ in sent]


def test_what_is_no_object_ends_with_its_line():
    """So that it can be answered, and the next command is read."""
    splitter = Splitter()
    assert splitter.feed(b"hello {}\n{}[1]") == [b"hello {}\n", b"{}"]
    assert splitter.feed(b"\n") == [b"[1]\n"]


def test_a_command_that_does_not_end():
    """A client cannot make us keep more and more."""
    splitter = Splitter()
    for _ in range(6):
        assert splitter.feed(b'{"a": "' + b"x" * 9999) == []
    with pytest.raises(ValueError, match="does not end"):
        splitter.feed(b"x" * 9999)


MIGRATION = {"type": "migration"}


def test_yank_cuts_what_is_there():
    talk = conversation()
    assert say(talk, execute="query-yank") == {"return": [MIGRATION]}
    assert say(talk, execute="yank", arguments={"instances": [MIGRATION]}) == {"return": {}}
    assert say(talk, execute="yank", arguments={"instances": []}) == {"return": {}}
    assert talk._migration.asked == [("yank",)]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"instances": [MIGRATION, {"type": "chardev", "id": "c"}]}, "DeviceNotFound"),
        ({"instances": [{"type": "block-node", "node-name": "n"}]}, "DeviceNotFound"),
        ({"instances": [{"type": "postcopy"}]}, "GenericError"),
        ({"instances": [{}]}, "GenericError"),
        ({"instances": ["migration"]}, "GenericError"),
        ({"instances": [{"type": ["migration"]}]}, "GenericError"),
        ({"instances": MIGRATION}, "GenericError"),
        ({}, "GenericError"),
        ({"instances": [], "more": 1}, "GenericError"),
    ],
)
def test_yank_cuts_all_or_nothing(arguments, kind):
    """As QEMU's does: the instances are looked for before any is yanked."""
    talk = conversation()
    assert error_class(say(talk, execute="yank", arguments=arguments)) == kind
    assert talk._migration.asked == []


def test_nothing_to_yank():
    talk = conversation()
    talk._migration.frozen = True
    assert say(talk, execute="query-yank") == {"return": []}
    answer = say(talk, execute="yank", arguments={"instances": [MIGRATION]})
    assert error_class(answer) == "DeviceNotFound"
