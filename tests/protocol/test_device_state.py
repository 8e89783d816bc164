"""What travels beside memory is put together here and taken apart there."""

from types import SimpleNamespace as Thing

import pytest
from fuzz_states import record, stream

from pageferry.pipeline.device_state import (
    GLOBAL_STATE,
    NONE,
    PAUSED,
    RUNNING,
    RunState,
    check_sections,
    compose,
    run_state,
    take,
)
from pageferry.transport.errors import (
    DestinationError,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    UsageError,
)
from pageferry.transport.vmstate import U8, Description, Field, Section, parse, save
from pageferry.workers.guests.demo import registers_of
from pageferry.workers.guests.demo_process import Registers
from pageferry.workers.guests.image import image_pieces, image_state
from pageferry.workers.guests.states import DEMO, state_of

TOOL = Description("tool", fields=(Field("x", U8),))
REGISTERS = Registers(7, 2, 100, "text", 9, "random", 4)
GUEST = state_of(DEMO, REGISTERS)


def tool(**fields):
    return Section(TOOL, Thing(**fields))


def test_there_and_back():
    """The guest's own bytes, as it gave them; the tool's object; how it ran."""
    there = tool()
    came = take(compose(GUEST, PAUSED, [tool(x=5)]), "demo", [there])
    assert (came.guest, came.runstate, came.running) == (GUEST, PAUSED, False)
    assert registers_of(came.guest, 100) == REGISTERS
    assert there.value == Thing(x=5)
    assert take(compose(b"", RUNNING, []), "ram", []).running
    pieces = [(0, b"head"), (4096, b"")]
    assert image_pieces(take(compose(image_state(pieces), NONE, []), "image", []).guest) == pieces


@pytest.mark.parametrize(("live", "running", "state"), [
    (True, True, RUNNING), (True, False, PAUSED), (False, False, NONE), (False, True, RUNNING),
])  # fmt: skip
def test_run_states(live, running, state):
    assert run_state(live=live, running=running) == state
    assert take(compose(b"", state, []), "x", []).runstate == state


def test_what_nobody_knows_is_refused_before_anything_is_loaded():
    there = tool()
    other = Section(Description("other", fields=TOOL.fields), Thing(x=1), 3)
    data = compose(GUEST, RUNNING, [tool(x=5), other])
    with pytest.raises(
        PeerRefused, match=r"section 'other' \(3\) came, and is not known"
    ) as caught:
        take(data, "demo", [there])
    assert caught.value.data == {"section": "other", "instance": 3}
    assert there.value == Thing()
    with pytest.raises(PeerRefused, match="section 'tool' is missing"):
        take(compose(GUEST, RUNNING, []), "demo", [there])
    # a guest's section is none for a guest of another kind
    with pytest.raises(PeerRefused, match="section 'demo' came"):
        take(compose(GUEST, RUNNING, []), "image", [])


def test_a_guest_that_keeps_what_it_does_not_know():
    """As a snapshot does; and it is taken up as if it came from the source."""
    there = tool()
    kept = take(compose(GUEST, RUNNING, [tool(x=5)]), "demo", [], True)
    assert [section.name for section in parse(kept.guest)] == ["demo", "tool"]
    came = take(compose(kept.guest, RUNNING, []), "demo", [there])
    assert (came.guest, there.value) == (GUEST, Thing(x=5))


@pytest.mark.parametrize(
    "data",
    [
        GUEST, save([Section(GLOBAL_STATE, RunState("\x1b[2Jhalf"))]),
        stream(record("globalstate", b"\0\0\0\7running", GLOBAL_STATE.layout(), instance=1)),
    ],
)  # fmt: skip
def test_a_source_that_does_not_say_whether_it_ran(data):
    with pytest.raises((RemoteProtocolError, PeerRefused), match="globalstate") as caught:
        take(data, "demo", [])
    assert caught.value.data["section"] == "globalstate"
    assert caught.value.message.isprintable()


def test_hooks_that_fail():
    def fail(*_):
        raise OSError("no such device")

    saves = Section(Description("tool", fields=TOOL.fields, pre_save=fail), Thing(x=1))
    with pytest.raises(SourceError, match="'tool': pre_save failed: OSError: no such device"):
        compose(GUEST, RUNNING, [saves])
    loads = Section(Description("tool", fields=TOOL.fields, post_load=fail), Thing())
    with pytest.raises(DestinationError, match="'tool': post_load failed: OSError"):
        take(compose(GUEST, RUNNING, [tool(x=1)]), "demo", [loads])


@pytest.mark.parametrize("name", ["demo", "globalstate", "qemu/extra"])
def test_names_that_tools_cannot_have(name):
    with pytest.raises(UsageError, match="is a guest's"):
        check_sections([Section(Description(name), Thing())])
    with pytest.raises(UsageError, match="two sections are called 'tool'"):
        check_sections([tool(), tool()])
