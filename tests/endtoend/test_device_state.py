"""What tools send beside memory, and how the guest ran, through both ends of a migration."""

import asyncio
import os
import threading
from types import SimpleNamespace as Thing

import pytest

import pageferry
from pageferry.pipeline import api
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.transport.errors import (
    DestinationError,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    UsageError,
)
from pageferry.transport.links import Endpoint
from pageferry.transport.vmstate import U16, U64, Description, Field, List, Section
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.demo import DemoDestination


def described(version=2, **hooks):
    """A tool's, that got a field in its second version."""
    fields = (Field("ports", List(U16, 16)), Field("hits", U64, since=2))
    return Description("filter", version, 1, fields, **hooks)


HERE = Thing(ports=[22, 80], hits=7)


@pytest.mark.parametrize("postcopy", ["never", "now"])
def test_a_paused_guest_arrives_paused_with_what_a_tool_sends(postcopy):
    """Saved when it stood still, loaded before it could have run."""
    if postcopy == "now":
        require_postcopy()
    installed = []
    there = Thing(hits=0)
    report = pageferry.migrate(
        "demo:?size=8M&content=text&paused=yes", "demo:", postcopy=postcopy, workers=1,
        state=[Section(described(1), HERE, 3)],
        state_there=[
            Section(described(post_load=lambda _, version: installed.append(version)), there, 3),
            Section(Description("else"), None, optional=True),
        ],
    )  # fmt: skip
    assert there == Thing(ports=[22, 80], hits=0)
    assert installed == [1]
    assert report["run-state"] == "paused"
    assert report["oracle"]["ok"]
    assert report["oracle"]["ran-on"] == report["oracle"]["position"] == 0
    assert "paused" in report["destination"]


def require_postcopy():
    from pageferry.transport.errors import HostLacks
    from pageferry.workers.kernel import userfaultfd

    try:
        os.close(userfaultfd.create_missing())
    except HostLacks as e:
        pytest.skip(str(e))


class NeverRuns(DemoDestination):
    def run(self):
        raise AssertionError("it was told to run")


class Damages(NeverRuns):
    """What of the guest arrives here is changed on the way."""

    def load_state(self, kind, state, running):
        damaged = bytearray(state)
        damaged[-20] ^= 1
        super().load_state(kind, bytes(damaged), running)


async def migrate(guest, into, state, there):
    """The two ends' errors."""
    endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
    listening = Destination(endpoint, lambda hello: into)
    listening.sections = there
    arriving = asyncio.ensure_future(api.receive_one(listening))
    source = Source(guest, endpoint, Parameters(workers=1).checked())
    source.sections = state
    try:
        return await asyncio.gather(source.run(), arriving, return_exceptions=True)
    finally:
        listening.close()


def fail(*_):
    raise OSError("no such bridge")


CASES = [
    # what is sent, what is waited for, the error at both ends, what it says
    (described(), described(post_load=fail), DestinationError, "'filter': post_load failed: OSErr"),
    (described(pre_save=fail), described(), SourceError, "'filter': pre_save failed: OSError"),
    (described(), None, PeerRefused, "section 'filter' came, and is not known here"),
    (described(), described(1), PeerRefused, "'filter': is of version 2, here 1 is the newest"),
]  # fmt: skip


def test_what_fails_names_its_section_and_leaves_the_guest_where_it_was():
    """There it never runs; here it goes on. And then it moves all the same."""
    guest = open_source(parse_guest("demo:?size=4M&rate=1000"))
    uri = parse_guest("demo:")
    try:
        for sent, awaited, error, why in CASES:
            there = [] if awaited is None else [Section(awaited, Thing())]
            ends = asyncio.run(migrate(guest, NeverRuns(uri), [Section(sent, HERE)], there))
            for end in ends:
                assert isinstance(end, error), (why, end)
                assert why in end.message
            assert not guest._stopped
        ends = asyncio.run(migrate(guest, Damages(uri), [], []))
        assert all(isinstance(end, RemoteProtocolError) for end in ends), ends
        assert "section 'demo': is damaged" in ends[0].message
        loaded = Thing()
        sent, arrived = asyncio.run(
            migrate(guest, DemoDestination(uri), [Section(described(), HERE)],
                    [Section(described(), loaded)])
        )  # fmt: skip
        assert sent["run-state"] == arrived["run-state"] == "running"
        assert arrived["oracle"]["ok"] and loaded == HERE
    finally:
        guest.close()


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_hook_that_hangs_ends_its_own_migration_only(monkeypatch, end):
    """Its thread is left behind, and calls no other hook; the guest goes on meanwhile."""
    where = {"source": "switchover", "destination": "arrival"}[end]
    monkeypatch.setattr(f"pageferry.pipeline.{where}.HOOK_SECONDS", 0.2)
    released, threads = threading.Event(), []

    def hang(*_):
        threads.append(threading.current_thread())
        released.wait(60)

    sent = described(pre_save=hang) if end == "source" else described()
    awaited = described(post_load=hang) if end == "destination" else described()
    second = Description("second", pre_load=threads.append)
    guest = open_source(parse_guest("demo:?size=4M&rate=1000"))
    try:
        ends = asyncio.run(migrate(
            guest, NeverRuns(parse_guest("demo:")), [Section(sent, HERE), Section(second, None)],
            [Section(awaited, Thing()), Section(second, None)],
        ))  # fmt: skip
        error = SourceError if end == "source" else DestinationError
        assert all(isinstance(found, error) for found in ends), ends
        assert "hooks of device state took more than" in ends[0].message
        assert not guest._stopped and threads[0].is_alive()
    finally:
        released.set()
        for thread in threads:
            thread.join(60)
        guest.close()
    assert len(threads) == 1


def test_a_guests_name_is_no_tools(tmp_path):
    """Said before anything happens."""
    state = [Section(Description("demo"), Thing())]
    with pytest.raises(UsageError, match="that name is a guest's"):
        pageferry.migrate("image:/nowhere", f"image:{tmp_path}/x", state=state)


def test_an_image_has_no_run_state(tmp_path):
    """But may have company."""
    (tmp_path / "a").write_bytes(b"x" * 5000)
    there = Thing()
    report = pageferry.migrate(
        f"image:{tmp_path}/a", f"image:{tmp_path}/b", workers=1,
        state=[Section(described(), HERE)], state_there=[Section(described(), there)],
    )  # fmt: skip
    assert (report["run-state"], there) == ("none", HERE)
    assert (tmp_path / "b").read_bytes() == b"x" * 5000
