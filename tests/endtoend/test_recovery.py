"""A postcopy whose connection is cut: both ends pause, and what is recovered is whole."""

import asyncio
import os
import random
import signal

import pytest
from both_ends import BothEnds
from helpers import until_async

from pageferry.pipeline import api
from pageferry.pipeline import control as control_module
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.transport.errors import PostcopyFailed, UsageError
from pageferry.transport.links import Endpoint
from pageferry.transport.session import Phase
from pageferry.workers.guests import open_source, parse_guest

GUEST = "demo:?size=16M&content=random&access=random&rate=2000"


class Ends(BothEnds):
    """Both ends of a postcopy in one event loop, to be cut at will."""

    def __init__(self, guest, **parameters):
        self.endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
        self.listening = Destination(self.endpoint, api.opener(parse_guest("demo:")))
        asked = {"postcopy": "now", "max_postcopy_bandwidth": 20_000_000, "workers": 2}
        self.source = Source(guest, self.endpoint, Parameters(**(asked | parameters)).checked())

    @property
    def status(self):
        return self.source.core.status

    async def moved(self, pages):
        """Until so many pages have moved, or all have."""
        await until_async(
            lambda: self.source.statistics.pages_done >= pages or self.sending.done(),
            f"{pages} pages moved",
        )

    async def paused(self):
        await until_async(
            lambda: self.status is Status.POSTCOPY_PAUSED or self.sending.done(), "paused"
        )

    async def whole(self):
        """The end: every byte right."""
        report, arrived = await asyncio.gather(self.sending, self.arriving)
        assert report["status"] == arrived["status"] == "completed"
        assert arrived["oracle"]["ok"]
        return report, arrived

    def kill(self, which):
        """SIGKILL for one of the processes that move pages."""
        pools = {
            "sender": self.source._equipment.crew.pool,
            "postcopy": self.source._equipment.background.pool,
            "receiver": self.listening.arrival._pool,
            "fault": self.listening.arrival._faults.pool,
        }
        os.kill(pools[which].workers[0].process.pid, signal.SIGKILL)


@pytest.fixture
def guest():
    guest = open_source(parse_guest(GUEST))
    yield guest
    guest.close()


@pytest.fixture
def impatient(monkeypatch):
    """Silence is a loss after a second."""
    monkeypatch.setattr(control_module, "LOST_SECONDS", 1.0)
    monkeypatch.setattr(control_module, "PING_SECONDS", 0.2)


@pytest.mark.parametrize("link", ["zmq", "direct"])
@pytest.mark.parametrize("how", ["pause", "there", "sender", "postcopy", "receiver", "fault"])
def test_a_cut_pauses_both_ends_and_recover_goes_on(guest, how, link):
    async def run():
        async with Ends(guest, postcopy_link=link) as ends:
            await ends.moved(1000)
            match how:
                case "pause":
                    ends.source.pause()
                case "there":
                    ends.listening.pause()
                case _:
                    ends.kill(how)
            await ends.paused()
            assert ends.source.query()["paused-because"]
            arrival = ends.listening.arrival
            await until_async(lambda: arrival.status is Status.POSTCOPY_PAUSED, "paused there")
            ends.source.recover(None)
            report, arrived = await ends.whole()
        assert report["recoveries"] == 1
        # who is killed between installing a page and noting it has it sent again
        killed = how in ("sender", "receiver", "fault")
        assert arrived["postcopy-already-there"] == 0 or killed

    asyncio.run(run())


def test_cut_at_each_turn_of_the_handshake(guest):
    """Whatever of the new connection has been started by then is let go of."""

    async def run():
        async with Ends(guest) as ends:
            await ends.moved(500)
            ends.source.pause()
            await ends.paused()
            for turns in range(24):
                ends.source.recover(None)
                await until_async(
                    lambda: ends.listening.arrival.status is Status.POSTCOPY_RECOVER, "recovering"
                )
                for _ in range(turns):
                    await asyncio.sleep(0)
                ends.listening.arrival.fail(ConnectionError("cut in the handshake"))
                await ends.paused()
            ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


def test_twice_in_a_row_and_in_the_handshake(guest):
    """The second cut falls into the recovery itself."""

    async def run():
        async with Ends(guest) as ends:
            await ends.moved(500)
            ends.source.pause()
            await ends.paused()
            ends.source.recover(None)
            await until_async(lambda: ends.status is Status.POSTCOPY_RECOVER, "recovering")
            ends.source._failed(ConnectionError("cut in the handshake"), link=True)
            await ends.paused()
            ends.source.recover(str(ends.endpoint))
            await until_async(lambda: ends.status is Status.POSTCOPY_ACTIVE, "active")
            ends.source.pause()
            await ends.paused()
            ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_cuts_at_random_moments(guest, seed):
    """Whatever is killed whenever: complete and equal in the end."""
    draw = random.Random(seed)

    async def run():
        async with Ends(guest, postcopy_link=draw.choice(["zmq", "direct"])) as ends:
            for pages in sorted(draw.randrange(4096) for _ in range(2)):
                await ends.moved(pages)
                if ends.sending.done() or ends.status is not Status.POSTCOPY_ACTIVE:
                    break
                ends.kill(draw.choice(["sender", "postcopy", "receiver", "fault"]))
                await ends.paused()
                if ends.sending.done():
                    break
                ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


def test_a_silent_peer_is_a_pause_too(guest, impatient):
    """Nothing comes any more and nothing says so: heartbeats find it."""

    async def run():
        async with Ends(guest, max_postcopy_bandwidth=4_000_000) as ends:
            await ends.moved(500)
            arrival = ends.listening.arrival

            async def nowhere(data):
                pass

            arrival.control._transmit = nowhere
            await ends.paused()
            ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


def test_the_last_word_is_lost(guest, impatient):
    """The destination has everything, and the source does not hear of it: it asks again."""

    async def run():
        async with Ends(guest) as ends:
            await ends.moved(500)
            control = ends.listening.arrival.control
            transmit = control._transmit

            async def all_but_the_end(data):
                if b"ended" not in data:
                    await transmit(data)

            control._transmit = all_but_the_end
            arrived = await ends.arriving
            assert arrived["oracle"]["ok"]
            ends.arriving = asyncio.ensure_future(api.receive_one(ends.listening))
            await ends.paused()
            ends.source.recover(None)
            report = await ends.sending
            assert report["status"] == "completed"
            assert report["postcopy-latency"] > 0

    asyncio.run(run())


def test_a_recover_that_the_destination_did_not_expect(guest):
    """It has not noticed the break yet when the source is back."""

    async def run():
        async with Ends(guest) as ends:
            await ends.moved(500)
            ends.source._connection.control.session.phase = Phase.CLOSED  # it cannot say goodbye
            ends.source.pause()
            await ends.paused()
            assert ends.listening.arrival.status is Status.POSTCOPY_ACTIVE
            ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


def test_a_fault_process_that_dies_before_the_guest_runs(guest):
    """Between Run and Running: a pause, once it is known that the guest runs."""

    async def run():
        async with Ends(guest) as ends:
            await until_async(lambda: ends.status is Status.DEVICE, "switchover")
            await until_async(lambda: ends.listening.arrival is not None, "arrival")
            arrival = ends.listening.arrival
            await until_async(lambda: arrival._committed or ends.sending.done(), "told to run")
            ends.kill("fault")
            await ends.paused()
            ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


def test_a_stranger_cannot_resume(guest):
    async def run():
        async with Ends(guest) as ends:
            await ends.moved(500)
            ends.source.pause()
            await ends.paused()
            mine, ends.source._connection.identity = ends.source._connection.identity, bytes(16)
            ends.source.recover(None)
            await until_async(
                lambda: "knows of no postcopy" in ends.source.query().get("paused-because", ""),
                "refused",
            )
            ends.source._connection.identity = mine
            ends.source.recover(None)
            await ends.whole()

    asyncio.run(run())


def test_giving_up_while_paused_says_what_is_lost(guest):
    async def run():
        async with Ends(guest) as ends:
            await ends.moved(500)
            with pytest.raises(UsageError, match="nothing to recover"):
                ends.source.recover(None)
            ends.source.pause()
            await ends.paused()
            ends.source.cancel()
            with pytest.raises(PostcopyFailed, match="never arrived"):
                await ends.sending
            ends.listening.cancel()
            with pytest.raises(PostcopyFailed, match="never arrived"):
                await ends.arriving
        assert guest._stopped  # never resumed

    asyncio.run(run())
