"""The moment in which the guest is nowhere: who may run it, whatever breaks."""

import asyncio
import os
import threading

import pytest
import unsure_guest

from pageferry.pipeline import api, switchover
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.transport import messages
from pageferry.transport.errors import (
    ConfirmationLost,
    DestinationError,
    PeerLost,
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
    first = guest.verdict()
    guest.resume()
    second = guest.verdict()
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
    with pytest.raises(RemoteProtocolError, match="behind section 'demo' it ends"):
        asyncio.run(_migrate(guest, bad))
    assert not guest._stopped
    assert _runs(guest)


def test_a_lost_confirmation_leaves_the_source_stopped(guest, monkeypatch):
    """The destination runs and cannot say so: the source must not run it a second time."""
    monkeypatch.setattr(switchover, "CONFIRM_SECONDS", 0.5)
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


def test_a_receiver_that_is_stopped_after_run_keeps_the_guest(guest):
    """Run has come, then the receiver is told to end: the guest arrived, and is reported so."""

    class Waits(unsure_guest.NeverConfirms):
        discarded = False

        def discard(self):
            self.discarded = True
            super().discard()

    there = Waits(parse_guest("demo:"))
    reports = []

    async def both():
        endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
        listening = Destination(endpoint, lambda hello: there)
        arriving = asyncio.ensure_future(
            api.receive(listening, lambda report, error: reports.append(report), once=False)
        )
        source = Source(guest, endpoint, Parameters().checked())
        sending = asyncio.ensure_future(source.run())
        await asyncio.to_thread(there.running.wait)
        arriving.cancel()
        await asyncio.sleep(0)
        there.release.set()
        report = await sending
        await asyncio.gather(arriving, return_exceptions=True)
        listening.close()
        return report

    assert asyncio.run(both())["status"] == "completed"
    assert not there.discarded
    assert reports[0]["status"] == "completed"
    assert guest._stopped


def test_a_sender_that_dies_after_run_was_said_changes_nothing(guest):
    """Nothing is needed from it any more."""
    slow = unsure_guest.NeverConfirms(parse_guest("demo:"))

    def on_source(source, listening):
        async def kill_when_running():
            await asyncio.to_thread(slow.running.wait)
            for worker in source._equipment.crew.pool.workers:
                worker.process.kill()
                await asyncio.to_thread(worker.process.join)
            slow.release.set()

        source.helper = asyncio.ensure_future(kill_when_running())

    assert asyncio.run(_migrate(guest, slow, on_source))["status"] == "completed"


class SlowToStop:
    """A guest whose stop takes a while; `stopping` says that it has begun."""

    def __init__(self, guest):
        self._guest = guest
        self.stopping, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._guest, name)

    def stop(self):
        self.stopping.set()
        self.go_on.wait(60)
        self._guest.stop()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_cancel_while_the_guest_is_being_stopped(guest, times):
    """A thread cannot be cancelled: whoever resumes the guest waits until it has stopped. A
    second and third cancel do not hurry it."""
    slow = SlowToStop(guest)

    async def cancel_it():
        there = unsure_guest.DemoDestination(parse_guest("demo:"))
        migrating = asyncio.ensure_future(_migrate(slow, there))
        await asyncio.to_thread(slow.stopping.wait)
        for _ in range(times):
            migrating.cancel()
            await asyncio.sleep(0)
        slow.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await migrating

    asyncio.run(cancel_it())
    assert not guest._stopped
    assert _runs(guest)


def test_a_control_message_that_is_lost_ends_it(guest):
    """The connection breaks once, ZeroMQ reconnects in silence and what was under way is gone:
    the next ping tells, and the guest goes on where it was."""

    class Forgetful(Destination):
        def _greet(self, *what):
            arrival = super()._greet(*what)
            if arrival is not None:
                transmit = arrival.control._transmit

                async def forget_once(message):
                    if isinstance(messages.decode(message), messages.StateLoaded):
                        return
                    await transmit(message)

                arrival.control._transmit = forget_once
            return arrival

    async def migrate():
        endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
        listening = Forgetful(endpoint, api.opener(parse_guest("demo:")))
        arriving = asyncio.ensure_future(api.receive_one(listening))
        try:
            await Source(guest, endpoint, Parameters().checked()).run()
        finally:
            await asyncio.gather(arriving, return_exceptions=True)
            listening.close()

    with pytest.raises(PeerLost, match="a message was lost"):
        asyncio.run(migrate())
    assert _runs(guest)


def test_a_callback_that_fails_does_not_decide(guest, caplog):
    """Progress and events are for whoever watches; the migration does not depend on them."""

    def on_source(source, listening):
        def broken(*arguments):
            raise BrokenPipeError("nobody watches")

        source.on_progress = source.on_event = broken

    there = unsure_guest.DemoDestination(parse_guest("demo:"))
    assert asyncio.run(_migrate(guest, there, on_source))["status"] == "completed"
    assert "callback failed" in caplog.text


def test_whoever_wants_to_is_asked_once_while_the_guest_runs():
    """The migration is active until then."""
    statuses = []

    async def main():
        def started(migration):
            async def ask():
                statuses.append((migration.core.status, migration.core.stopped))

            migration.before_stop = ask

        return await api.migrate_async("demo:?size=8M&rate=100", "demo:", on_started=started)

    assert asyncio.run(main())["status"] == "completed"
    assert statuses == [(Status.ACTIVE, False)]
