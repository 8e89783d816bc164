"""What a migration waits for before its switchover: somebody who says continue, a destination that
becomes ready. Until then the guest can go on at the source, whatever happens."""

import asyncio
import json
import os
import threading

import pytest
from both_ends import BothEnds
from helpers import Running, ask, blocks_on_disk, receiver, until_async
from helpers import pageferry as run

from pageferry.pipeline import api
from pageferry.pipeline.deltas import Deltas
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.monitor import Conversation
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.pipeline.state import Status
from pageferry.transport.errors import (
    Cancelled,
    DestinationError,
    HostLacks,
    PageferryError,
    PeerLost,
    RemoteProtocolError,
    UsageError,
    WorkerDied,
)
from pageferry.transport.links import Endpoint
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.image import ImageSource
from pageferry.workers.guests.process import ProcessSource
from pageferry.workers.guests.shared_memory import RamSource

GUEST = "demo:?size=8M&rate=5000&content=text"


class Ends(BothEnds):
    """Both ends in one event loop; `states` are those that the source went through."""

    def __init__(self, guest, into="demo:", hook=None, **parameters):
        self.guest = guest
        endpoint = Endpoint("ipc", path=f"@test-pf-{os.getpid()}")
        self.listening = Destination(endpoint, api.opener(parse_guest(into)))
        self.listening.before_switchover = hook
        asked = {"workers": 1} | parameters
        self.source = Source(guest, endpoint, Parameters(**asked).checked())
        self.states = []
        self.source.on_event = lambda name, data: self.states.append(data.get("status"))

    @property
    def status(self):
        return self.source.core.status

    async def waits(self):
        """Until it waits for somebody who says continue."""
        await until_async(
            lambda: self.status is Status.PRE_SWITCHOVER or self.sending.done(), "pre-switchover"
        )

    async def whole(self):
        report, arrived = await asyncio.gather(self.sending, self.arriving)
        assert report["status"] == arrived["status"] == "completed"
        return report, arrived


@pytest.fixture
def guest():
    guest = open_source(parse_guest(GUEST))
    yield guest
    guest.close()


def runs(guest):
    verdict = guest.verdict()
    guest.resume()
    return verdict.ok and guest.verdict().ok


@pytest.mark.parametrize("postcopy", ["never", "now"])
def test_it_waits_with_the_guest_stopped_until_somebody_says_continue(guest, postcopy):
    """QEMU's state, command and errors; the wait is shown, and is part of the downtime."""

    async def main():
        async with Ends(guest, pause_before_switchover=True, postcopy=postcopy) as ends:
            talk = Conversation(ends.source)
            talk.answer(b'{"execute": "qmp_capabilities"}')

            def say(state):
                command = {"execute": "migrate-continue", "arguments": {"state": state}}
                return talk.answer(json.dumps(command).encode())

            assert "expected state" in say("pre-switchover")["error"]["desc"]
            await ends.waits()
            assert guest._stopped
            shown = ends.source.query()
            assert (shown["status"], shown["waiting-for"]) == ("pre-switchover", "migrate-continue")
            there = ends.listening.arrival
            assert there.status is Status.ACTIVE and not there._committed
            assert "state: pre-switchover" in say("device")["error"]["desc"]
            assert say("pre-switchover") == {"return": {}}
            report, arrived = await ends.whole()
        assert arrived["oracle"]["ok"]
        assert 0 < report["pre-switchover-time"] <= report["downtime"]
        assert "waiting-for" not in report
        states = [state for state in ends.states if state]
        assert states[:4] == ["setup", "active", "pre-switchover", "device"]

    asyncio.run(main())


def test_whatever_ends_it_while_it_waits_lets_the_guest_go_on(guest):
    """Cancel, yank, a worker that dies, a destination that gives up or is gone. Then it moves."""

    async def one(how, error):
        async with Ends(guest, pause_before_switchover=True) as ends:
            await ends.waits()
            match how:
                case "cancel":
                    ends.source.cancel()
                case "yank":
                    ends.source.yank()
                case "worker":
                    ends.source._equipment.crew.pool.workers[0].process.kill()
                case "there":
                    ends.listening.cancel()
                case "silence":
                    ends.source._failed(PeerLost("silence"), link=True)
            with pytest.raises(error):
                await ends.sending
            assert ends.states[-1] in ("failed", "cancelled")
            assert not guest._stopped
        guest._guest.patience.hurried = False  # nobody is in a hurry any more
        assert runs(guest)

    for how, error in (
        ("cancel", Cancelled), ("yank", PeerLost), ("worker", WorkerDied), ("there", Cancelled),
        ("silence", PeerLost),
    ):  # fmt: skip
        asyncio.run(one(how, error))

    async def it_moves():
        async with Ends(guest, pause_before_switchover=True) as ends:
            await ends.waits()
            ends.source.go_on()
            assert (await ends.whole())[1]["oracle"]["ok"]

    guest.resume()
    asyncio.run(it_moves())


def test_memory_that_nobody_stops_is_looked_at_again(tmp_path):
    """What is written until somebody says continue arrives."""
    memory = tmp_path / "memory"
    memory.write_bytes(os.urandom(64 * 4096))
    source = open_source(parse_guest(f"ram:{memory}"))

    async def main():
        async with Ends(source, f"image:{tmp_path}/copy", pause_before_switchover=True) as ends:
            await ends.waits()
            with memory.open("r+b") as file:
                file.seek(20 * 4096)
                file.write(b"\x55" * 8192)
            ends.source.go_on()
            await ends.whole()

    try:
        asyncio.run(main())
    finally:
        source.close()
    assert (tmp_path / "copy").read_bytes() == memory.read_bytes()


# ---- the destination's acknowledgement -------------------------------------------------------


def test_the_guest_runs_until_the_destination_is_ready(guest):
    """It is awaited without a round; what was written meanwhile goes when it is there."""
    ready, told = asyncio.Event(), []

    async def hook(hello):
        told.append(hello.kind)
        await ready.wait()

    async def main():
        async with Ends(guest, hook=hook) as ends:
            await until_async(
                lambda: ends.source.query().get("waiting-for") == "switchover-ack", "it waits"
            )
            assert not guest._stopped and ends.status is Status.ACTIVE
            written = guest.written_so_far()
            if written is not None:
                await until_async(lambda: guest.written_so_far() > 200, "it writes")
            ready.set()
            report, arrived = await ends.whole()
        assert arrived["oracle"]["ok"] and told == ["demo"]
        assert report["switchover-ack-time"] > 0 and "switchover-ack-to-stop-time" in report
        assert report["downtime"] < report["total-time"]

    asyncio.run(main())


def test_a_destination_that_does_not_become_ready(guest, tmp_path):
    """The migration has failed at both ends, the guest goes on; of an image nothing is left."""
    image = tmp_path / "image"
    image.write_bytes(b"\x11" * 8192)

    async def hook(hello):
        raise DestinationError("the storage is not there")

    async def fails(source, into):
        async with Ends(source, into, hook=hook) as ends:
            for end in (ends.sending, ends.arriving):
                with pytest.raises(DestinationError, match="storage is not there"):
                    await end

    asyncio.run(fails(guest, "demo:"))
    assert not guest._stopped and runs(guest)
    source = open_source(parse_guest(f"image:{image}"))
    try:
        asyncio.run(fails(source, f"image:{tmp_path}/copy"))
    finally:
        source.close()
    assert os.listdir(tmp_path) == ["image"]


def test_what_nobody_stops_is_not_asked_for_before_it_is_stopped(tmp_path):
    """A batch would write down that a guest is handed over, and not try an image again."""
    image, asked = tmp_path / "image", []
    image.write_bytes(b"\x11" * 8192)

    async def hook(hello):
        pass

    async def ask_somebody():
        asked.append(True)

    async def main(source):
        async with Ends(source, f"image:{tmp_path}/copy", hook=hook) as ends:
            ends.source.before_stop = ask_somebody
            await ends.whole()
            assert ends.source._ack.heard and not asked

    source = open_source(parse_guest(f"image:{image}"))
    try:
        asyncio.run(main(source))
    finally:
        source.close()


def test_rounds_that_a_wait_granted_stay_when_something_else_is_set(guest):
    """It would be given up at the next look. Nor is there looked for room that nobody asked for."""
    p = Parameters(codec="xbzrle", xbzrle_cache_size=1 << 42).checked()
    source = Source(guest, Endpoint("ipc", path="@nobody"), p)
    equipment = source._equip()
    equipment.deltas.close()
    equipment.deltas = Deltas([1 << 30], 4096)  # as of a guest that is large
    try:
        source.convergence.max_rounds += 12
        source.set_parameters({"downtime-limit": 500})
        assert source.convergence.max_rounds == 42 and source.convergence.downtime_limit == 0.5
        source.set_parameters({"max-rounds": 10})
        assert source.convergence.max_rounds == 22 and source.parameters.max_rounds == 10
        with pytest.raises(HostLacks):
            source.set_parameters({"xbzrle-cache-size": 1 << 42})
    finally:
        equipment.deltas.close()
        equipment.close()


def test_a_source_that_does_not_wait_is_refused(guest):
    async def hook(hello):
        await asyncio.Event().wait()

    async def main():
        async with Ends(guest, hook=hook) as ends:
            ends.source._ack.wait = lambda: asyncio.sleep(0)
            with pytest.raises(RemoteProtocolError, match="did not wait"):
                await ends.sending

    asyncio.run(main())
    assert not guest._stopped and runs(guest)


def test_by_the_command_line(tmp_path):
    """The destination's command is awaited, then somebody who says continue."""
    image, out, monitor = tmp_path / "vm.mem", tmp_path / "out", f"unix:{tmp_path}/mon"
    image.write_bytes(os.urandom(1 << 20))
    os.mkfifo(tmp_path / "fifo")
    command = f"sh -c 'echo $PAGEFERRY_NAME > {out}; cat {tmp_path}/fifo'"
    with (
        receiver("--into", f"image:{tmp_path}/copy", "--once", "--before-switchover", command)
        as there,
        Running(
            "send", f"image:{image}", there.endpoint, "--pause-before-switchover", "--monitor",
            monitor, "--json",
        ) as sending,
    ):  # fmt: skip
        sending.error_line("not ready yet")
        early = run("continue", monitor)
        assert early.returncode == 2 and "expected state: active" in early.stderr
        (tmp_path / "fifo").write_text("ready")
        sending.error_line("`pageferry continue` switches over")
        assert not (tmp_path / "copy").exists()
        assert ask(monitor, "query-migrate")["status"] == "pre-switchover"
        assert run("continue", monitor).returncode == 0
        code, said, err = sending.finish()
        assert code == 0, err
        assert there.finish()[0] == 0
    report = json.loads(said)
    assert report["switchover-ack-time"] > 0 and report["pre-switchover-time"] > 0
    assert out.read_text() == "vm.mem\n"
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


# ---- release-ram -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["pause", "receiver", "fault"])
def test_memory_is_given_back_as_it_arrives(cut):
    """Also if the connection breaks in the middle; what arrives is right, and in the end nothing is
    left here."""
    guest = open_source(parse_guest("demo:?size=16M&content=random&access=random&rate=2000"))
    memory = f"/proc/self/fd/{guest.blocks[0].file.fd}"
    full = blocks_on_disk(memory)
    assert full > 15 << 20

    async def main():
        async with Ends(
            guest, postcopy="now", release_ram=True, workers=2, max_postcopy_bandwidth=20_000_000
        ) as ends:
            await until_async(
                lambda: ends.source.core.released > 512 or ends.sending.done(),
                "something is given back",
            )
            assert blocks_on_disk(memory) <= full - (2 << 20)
            pools = {
                "receiver": ends.listening.arrival._pool,
                "fault": ends.listening.arrival._faults.pool,
            }
            if cut == "pause":
                ends.source.pause()
            else:
                pools[cut].workers[0].process.kill()
            await until_async(
                lambda: ends.status is Status.POSTCOPY_PAUSED or ends.sending.done(), "paused"
            )
            assert ends.source._remainder.releasing._release.lacking() == 0
            ends.source.recover(None)
            report, arrived = await ends.whole()
            assert arrived["oracle"]["ok"]
            assert report["recoveries"] == 1
            assert report["released-bytes"] == 16 << 20 and report["release-cpu-time"] > 0
            assert blocks_on_disk(memory) == 0

    try:
        asyncio.run(main())
    finally:
        guest.close()


def test_a_destination_that_has_all_of_it_may_leave_while_the_rest_is_given_back(guest):
    """Tens of GiB take many seconds: a stream that ends meanwhile is no postcopy that broke."""
    giving, go_on = threading.Event(), threading.Event()

    async def main():
        async with Ends(guest, postcopy="now", release_ram=True) as ends:
            await until_async(lambda: ends.source._remainder is not None, "it will give back")
            release = ends.source._remainder.releasing._release
            everything = release.everything

            def slowly():
                giving.set()
                assert go_on.wait(30)
                everything()

            release.everything = slowly
            assert (await ends.arriving)["oracle"]["ok"]
            await until_async(lambda: giving.is_set() or ends.sending.done(), "the rest goes")
            ends.source.link_broke(PeerLost("the other end has closed the stream"))
            ends.source._failed(WorkerDied("the urgent channel broke"))
            go_on.set()
            report = await asyncio.wait_for(ends.sending, 30)
            assert report["status"] == "completed" and report["released-bytes"] == 8 << 20
            assert blocks_on_disk(f"/proc/self/fd/{guest.blocks[0].file.fd}") == 0

    asyncio.run(main())


def test_what_is_left_when_it_is_given_up():
    """The error says that nothing here can be started any more."""
    guest = open_source(parse_guest("demo:?size=16M&content=random&access=random&rate=2000"))

    async def main():
        async with Ends(
            guest, postcopy="now", release_ram=True, max_postcopy_bandwidth=20_000_000
        ) as ends:
            await until_async(
                lambda: ends.source.core.released > 512 or ends.sending.done(), "given back"
            )
            ends.source.pause()
            await until_async(lambda: ends.status is Status.POSTCOPY_PAUSED, "paused")
            ends.source.cancel()
            with pytest.raises(PageferryError, match="were given back") as caught:
                await ends.sending
            assert "can be started any more" in caught.value.message
            ends.listening.cancel()
        assert guest._stopped

    try:
        asyncio.run(main())
    finally:
        guest.close()


def test_until_the_destination_has_confirmed_nothing_is_given_back(guest):
    """It may have to go on here: its start fails, and it does."""
    before = blocks_on_disk(f"/proc/self/fd/{guest.blocks[0].file.fd}")

    async def main():
        async with Ends(guest, postcopy="now", release_ram=True) as ends:
            await until_async(lambda: ends.listening.arrival is not None, "arrival")
            arrival = ends.listening.arrival
            await until_async(lambda: arrival.guest is not None, "a guest there")

            def fails():
                raise DestinationError("the power supply is on fire")

            arrival.guest.run = fails
            with pytest.raises(DestinationError, match="on fire"):
                await ends.sending
            assert ends.source.query()["released-bytes"] == 0

    asyncio.run(main())
    assert blocks_on_disk(f"/proc/self/fd/{guest.blocks[0].file.fd}") >= before
    assert not guest._stopped and runs(guest)


def test_only_memory_that_is_the_guest_s_alone_is_given_back():
    """Never a file of somebody's."""
    for kind in (RamSource, ImageSource, ProcessSource):
        assert not kind.can_release

    async def main(source):
        async with Ends(source, postcopy="manual", release_ram=True) as ends:
            with pytest.raises(UsageError, match="release-ram is for"):
                await ends.sending
            ends.arriving.cancel()

    source = open_source(parse_guest(GUEST))
    source.can_release = False
    try:
        asyncio.run(main(source))
    finally:
        source.close()
