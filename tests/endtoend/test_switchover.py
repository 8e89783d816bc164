"""The moment in which the guest is nowhere: who may run it, whatever breaks."""

import asyncio
import os

import pytest
import unsure_guest

from pageferry.pipeline import api
from pageferry.pipeline import source as source_module
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.transport.errors import (
    ConfirmationLost,
    DestinationError,
    RemoteProtocolError,
)
from pageferry.transport.links import Endpoint
from pageferry.workers.guests import open_source, parse_guest


@pytest.fixture
def guest():
    guest = open_source(parse_guest("demo:?size=8M&content=text"))
    yield guest
    guest.close()


async def _migrate(guest, destination_guest, on_source=None):
    endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
    listening = Destination(endpoint, lambda hello: destination_guest)
    arriving = asyncio.ensure_future(api.receive_one(listening))
    source = Source(guest, endpoint, Parameters().checked())
    try:
        if on_source is not None:
            on_source(source, listening)
        return await source.run()
    finally:
        release = getattr(destination_guest, "release", None)
        if release is not None:
            release.set()
        await asyncio.gather(arriving, return_exceptions=True)
        listening.close()


def _runs(guest):
    first = guest.check()
    guest.resume()
    second = guest.check()
    assert first.ok
    assert second.ok
    return second.ran_on >= first.ran_on


def test_a_destination_that_says_it_cannot_run_gives_the_guest_back(guest):
    bad = unsure_guest.FailsToRun(parse_guest("demo:"))
    with pytest.raises(DestinationError, match="on fire"):
        asyncio.run(_migrate(guest, bad))
    assert not guest._stopped  # it was resumed
    assert _runs(guest)


def test_state_that_does_not_load_gives_the_guest_back(guest):
    bad = unsure_guest.BreaksTheState(parse_guest("demo:"))
    with pytest.raises(RemoteProtocolError, match="registers"):
        asyncio.run(_migrate(guest, bad))
    assert not guest._stopped
    assert _runs(guest)


def test_a_lost_confirmation_leaves_the_source_stopped(guest, monkeypatch):
    """The destination runs and cannot say so: the source must not run it a second time."""
    monkeypatch.setattr(source_module, "CONFIRM_SECONDS", 0.5)
    mute = unsure_guest.NeverConfirms(parse_guest("demo:"))
    with pytest.raises(ConfirmationLost, match="stays stopped") as caught:
        asyncio.run(_migrate(guest, mute))
    assert mute.running.is_set()
    assert caught.value.exit_code == 13
    assert guest._stopped


def test_cancel_after_run_was_said_changes_nothing(guest):
    """Too late: the guest arrives."""
    slow = unsure_guest.NeverConfirms(parse_guest("demo:"))

    def on_source(source, listening):
        async def cancel_when_running():
            await asyncio.to_thread(slow.running.wait)
            source.cancel()
            listening.cancel()
            slow.release.set()

        source.helper = asyncio.ensure_future(cancel_when_running())

    report = asyncio.run(_migrate(guest, slow, on_source))
    assert report["status"] == "completed"
    assert guest._stopped
