"""Peers that mean harm: what they say is bounded before it is memory, ends at most their own
migration, and never reaches the terminal. Strangers beside a job that goes on."""

import asyncio
import contextlib
import json
import signal
import tracemalloc
import uuid

import psutil
import pytest
import zmq
from fuzz_states import record, stream
from helpers import PAGE, Running, pattern, receiver, until_async
from helpers import pageferry as run
from raw_peer import GREETING, RawPeer, long_frame, ready

from pageferry.pipeline import api
from pageferry.pipeline.arrival import Arrival
from pageferry.pipeline.control import Control
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.device_state import compose
from pageferry.pipeline.restoring import Restoring
from pageferry.transport import messages
from pageferry.transport.errors import PageferryError, RemoteProtocolError
from pageferry.transport.links import parse_endpoint
from pageferry.transport.messages import (
    PAGE_SUMS,
    PROTOCOL,
    Abort,
    Armed,
    Block,
    Contents,
    DeviceState,
    DigestRequest,
    Discard,
    Hello,
    Layout,
    Missing,
    Offer,
    Ping,
    Pull,
    Refused,
    Resume,
    Round,
    Run,
    Serving,
    StatePart,
    Welcome,
    decode,
    encode,
)
from pageferry.transport.session import Phase, Role
from pageferry.workers.guests.image import image_state
from pageferry.workers.guests.image_directory import DirectoryDestination
from pageferry.workers.guests.sample import SampleDestination
from pageferry.workers.guests.uri import GuestUri


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "source.mem"
    path.write_bytes(pattern(500))
    return path


def _listening(process):
    """The TCP ports of a receiver: control, and those of its channels."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return {
        connection.laddr.port
        for one in family
        for connection in one.net_connections("tcp")
        if connection.status == "LISTEN"
    }


# ---- strangers ------------------------------------------------------------------------------

# To libzmq the first is a peer of ZMTP 1.0, which has no handshake: it may stay, and is a stray.
TOLERATED = "no ZMTP"
STRANGE = {
    TOLERATED: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
    "another greeting": b"\xff" + b"\xee" * 63 + bytes(100),
    "a mechanism that there is not": GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32 + 64),
    "a message for a handshake": GREETING + b"\x00\x05hello",
    "a command without an end": GREETING + b"\x06" + (1 << 40).to_bytes(8, "big"),
    "2^62 bytes": GREETING + ready(b"x") + long_frame(1 << 62),
    "all bits": GREETING + ready(b"x") + b"\xff" * 64,
    "more than a Hello": GREETING + ready(b"x") + long_frame(messages.MAX_TO_DESTINATION + 1),
}


def test_strangers_are_dropped_and_the_job_goes_on(tmp_path, image):
    """Whatever they begin with, on the control port and on the channels' ports."""
    out = tmp_path / "out"
    image.write_bytes(pattern(4_000))
    with (
        receiver("--into", f"image:{out}", "--once") as there,
        Running("send", f"image:{image}", there.endpoint, "--max-bandwidth", "100kB",
                "--batch-pages", "16", "--workers", "2", "--codec", "none",
                "--monitor", f"unix:{tmp_path}/m") as sending,
        contextlib.ExitStack() as stack,
    ):  # fmt: skip
        sending.error_line("round 1")
        control = int(there.endpoint.rpartition(":")[2])
        ports = _listening(there.process)
        assert len(ports) == 3
        peers = []
        for name, data in STRANGE.items():
            for port in ports if name != "more than a Hello" else {control}:
                peer = RawPeer(port, greeted=False)
                stack.callback(peer.close)
                with contextlib.suppress(ConnectionError):
                    peer.send(data)
                if name != TOLERATED:
                    peers.append(peer)
        for peer in peers:
            peer.wait_until_dropped()
        assert sending.process.poll() is None, sending.finish()
        assert run("set", f"unix:{tmp_path}/m", "max-bandwidth=0").returncode == 0
        code, _, err = sending.finish()
        assert code == 0, err
        assert there.finish()[0] == 0
    assert out.read_bytes() == image.read_bytes()


def test_a_stranger_that_takes_no_answers_holds_up_nobody(tmp_path, image):
    """It asks again and again and reads nothing: answers to others go on, and wait for none of its
    own."""
    out = tmp_path / "out"
    with (
        receiver("--into", f"image:{out}", "--once") as there,
        Running("send", f"image:{image}", there.endpoint, "--max-bandwidth", "100kB",
                "--batch-pages", "16", "--workers", "1", "--codec", "none",
                "--monitor", f"unix:{tmp_path}/m") as sending,
    ):  # fmt: skip
        sending.error_line("round 1")
        peer = RawPeer(int(there.endpoint.rpartition(":")[2]), window=2048)
        peer.wait_until_greeted()
        # a refusal repeats some of it
        said = encode(Resume(PROTOCOL, "x", 1, b"\xff" * 64))
        for _ in range(100):
            peer.send((bytes([0, len(said)]) + said) * 200)
        assert run("set", f"unix:{tmp_path}/m", "max-bandwidth=0").returncode == 0
        code, _, err = sending.finish()
        peer.close()
        assert code == 0, err
        assert there.finish()[0] == 0
    assert out.read_bytes() == image.read_bytes()


def test_claims_take_no_memory(image, tmp_path):
    """Strangers that announce the most that is let through, and say no more: the receiver never
    uses a quarter of that."""
    with (
        receiver("--into", f"image:{tmp_path}/out", "--once") as there,
        contextlib.ExitStack() as stack,
    ):
        port = int(there.endpoint.rpartition(":")[2])
        for i in range(100):
            peer = RawPeer(port, identity=b"stranger%d" % i)
            stack.callback(peer.close)
            peer.send(long_frame(messages.MAX_TO_DESTINATION) + bytes(100))
        assert run("send", f"image:{image}", there.endpoint).returncode == 0
        code, out, err = there.finish()
    assert code == 0, err
    peaks = [process["peak-memory"] for process in json.loads(out)["processes"]]
    assert max(peaks) < 100 * messages.MAX_TO_DESTINATION // 4


def _say(peer, what, times):
    for _ in range(times):
        peer.send(what)


def _memory(process):
    return psutil.Process(process.pid).memory_info().rss


@pytest.mark.parametrize("where", ["control", "channels"])
def test_a_message_without_an_end(tmp_path, where):
    """Parts and parts, each within the bound: cut off long before they are memory; on channels not
    a byte comes in. The migration beside it goes on."""
    with (
        receiver("--once") as there,
        Running("send", "demo:?size=8M&content=random&access=random", there.endpoint, "--json",
                "--max-bandwidth", "2MB", "--monitor", f"unix:{tmp_path}/m") as sending,
        contextlib.ExitStack() as stack,
    ):  # fmt: skip
        sending.error_line("round 1")
        control = int(there.endpoint.rpartition(":")[2])
        ports = {control} if where == "control" else _listening(there.process) - {control}
        family = [psutil.Process(there.process.pid), *psutil.Process(there.process.pid).children()]
        before = [_memory(process) for process in family]
        part = bytes(1 << 20)
        for port in ports:
            peer = RawPeer(port)
            stack.callback(peer.close)
            with pytest.raises(ConnectionError):
                _say(peer, (long_frame(len(part), more=True) + part) * 4, 1 << 10)
        for process, was in zip(family, before, strict=True):
            assert _memory(process) - was < 512 << 20
        assert run("set", f"unix:{tmp_path}/m", "max-bandwidth=0").returncode == 0
        code, _, err = sending.finish()
        assert code == 0, err
        code, out, err = there.finish()
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["oracle"]["ok"]


def test_a_crowd_of_idle_strangers(tmp_path, image):
    """Most of 200 are cut off as others come, the rest soon after; who sends is let in at once."""
    with receiver("--into", f"image:{tmp_path}/out") as there, contextlib.ExitStack() as stack:
        port = int(there.endpoint.rpartition(":")[2])
        crowd = []
        for i in range(200):
            crowd.append(RawPeer(port, identity=b"idle%d" % i))
            stack.callback(crowd[-1].close)
        assert run("send", f"image:{image}", there.endpoint).returncode == 0
        for peer in crowd:
            peer.wait_until_dropped()
        left = [
            one
            for one in psutil.Process(there.process.pid).net_connections("tcp")
            if one.status == "ESTABLISHED"
        ]
        assert not left
        assert run("send", f"image:{image}", there.endpoint).returncode == 0


def test_who_connects_again_is_no_stranger(tmp_path):
    """libzmq does so by itself when a connection breaks; what was begun goes on."""

    async def main():
        there = Destination(parse_endpoint("tcp://127.0.0.1:0"), api.opener(None))
        arriving = asyncio.ensure_future(api.receive_one(there))
        with zmq.Context() as context, contextlib.ExitStack() as stack:

            def connected():
                source = stack.enter_context(context.socket(zmq.DEALER))
                source.linger = 1000
                source.setsockopt(zmq.ROUTING_ID, b"0123456789abcdef")
                source.connect(str(there.endpoint))
                return source

            first = connected()
            first.send(encode(Hello(
                PROTOCOL, "0", str(uuid.uuid4()), "demo", [Block("ram", 64 * PAGE)], 1, 16
            )))  # fmt: skip
            await until_async(lambda: there.arrival is not None, "it begins")
            door = there._doorkeeper._strangers
            first.close()
            await until_async(lambda: not door.numbers(), "it is gone")
            again = connected()
            again.send(encode(Ping(1)))
            await until_async(lambda: len(door.numbers()) == 1, "it is back")
            await until_async(lambda: not door.strangers, "it is welcome")
            again.send(encode(Abort("Cancelled", "that is all")))
            with pytest.raises(PageferryError, match="that is all"):
                await arriving
        there.close()

    asyncio.run(main())


# ---- a source ------------------------------------------------------------------------------


class HostileSource:
    """Says what the test wants to a receiver; hears its answers, pings left out."""

    def __init__(self, context, endpoint):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.ROUTING_ID, uuid.uuid4().bytes)
        self.socket.connect(endpoint)

    def say(self, *what):
        for message in what:
            self.socket.send(message if isinstance(message, bytes) else encode(message))

    def hear(self):
        while True:
            assert self.socket.poll(60_000), "it says nothing"
            message = decode(self.socket.recv())
            if not isinstance(message, Ping):
                return message

    def close(self):
        self.socket.close()


def hello(**changes):
    fields = {
        "protocol": PROTOCOL, "version": "1", "uuid": str(uuid.uuid4()), "kind": "image",
        "blocks": [Block("ram", 100 * PAGE)], "workers": 1, "batch_pages": 256,
        "image_size": 100 * PAGE,
    }  # fmt: skip
    return Hello(**(fields | changes))


def state(*pieces):
    return compose(image_state(list(pieces)), "none", [])


SUMS = {"capabilities": [PAGE_SUMS]}
SAID = {
    "garbage": ({}, [b"\xc1garbage"]),
    "Run before anything": ({}, [Run()]),
    "a second Hello": ({}, [hello()]),
    "pages behind the end": ({}, [Discard(0, [99], [2])]),
    "pages before the beginning": ({}, [Discard(0, [-1], [1])]),
    "more pages than a number holds": ({}, [Discard(0, [1 << 63], [1])]),
    "pages of another block": ({}, [Discard(1, [0], [1])]),
    "a negative block": ({}, [Discard(-1, [0], [1])]),
    "more starts than counts": ({}, [Discard(0, [0, 1], [1])]),
    "contents that nobody compares": ({}, [Contents(0, [0], [1], bytes(16))]),
    "pages to come later": ({}, [Missing(0, [0], [1])]),
    "postcopy out of nothing": ({}, [DeviceState("image", b"", True)]),
    "a state that makes no sense": ({}, [DeviceState("image", b"\xc1")]),
    "a state nested deeper than the stack": (
        {}, [DeviceState("image", stream(record("image", b"", b"[" * 100_000)))],
    ),
    "a state that is cut off": ({}, [DeviceState("image", state()[:-1])]),
    "a state that does not say whether it ran": ({}, [DeviceState("image", image_state([]))]),
    "a state without the image's": ({}, [DeviceState("image", compose(b"", "none", []))]),
    "a state outside of the image": ({}, [DeviceState("image", state((1 << 40, b"x")))]),
    "a state above the bound": (
        {}, [StatePart(bytes(messages.STATE_PART))] * (messages.MAX_STATE // messages.STATE_PART)
        + [StatePart(b"x")],
    ),
    "unverified": (SUMS, [DeviceState("image", state())]),
    "another verification": (SUMS, [DigestRequest()]),
    "verification nobody announced": ({}, [DigestRequest([b"\0"])]),
    "all was there": (SUMS, [DigestRequest([b"\x80"])]),
    "bits of another layout": (SUMS, [DigestRequest([b"\0\0"])]),
    "bits of other blocks": (SUMS, [DigestRequest([])]),
}  # fmt: skip


def test_a_hostile_source_ends_its_own_migration_only(image, tmp_path):
    """Each is told that it broke the protocol; nothing is left of it; the next one is welcome."""
    into = tmp_path / "into"
    into.mkdir()
    with (
        receiver("--into", f"image:{into}/out") as there,
        zmq.Context() as context,
    ):
        for what, (changes, said) in SAID.items():
            source = HostileSource(context, there.endpoint)
            source.say(hello(**changes))
            welcome = source.hear()
            while isinstance(welcome, Refused) and welcome.field == "busy":
                source.say(hello(**changes))
                welcome = source.hear()
            assert isinstance(welcome, Welcome), (what, welcome)
            source.say(*said)
            answer = source.hear()
            assert isinstance(answer, Abort), (what, answer)
            assert answer.error == "RemoteProtocolError", (what, answer)
            source.close()
            assert list(into.iterdir()) == [], what
        sent = run("send", f"image:{image}", there.endpoint)
        while sent.returncode == 6 and "busy" in sent.stderr:
            sent = run("send", f"image:{image}", there.endpoint)
        assert sent.returncode == 0, sent.stderr
        there.process.send_signal(signal.SIGINT)
        there.finish()
    assert (into / "out").read_bytes() == image.read_bytes()


async def arriving(guest):
    """A migration whose source may say what it likes, without a network or a process."""
    control = Control(Role.DESTINATION, lambda data: asyncio.sleep(0), "the source")
    control.session.phase = Phase.MOVING
    here = parse_endpoint("ipc://@nowhere")
    arrival = Arrival(hello(), control, here, lambda _: guest, None, lambda name, data: None)
    arrival.guest = guest
    return arrival


def test_what_a_source_says_is_forgotten():
    """It may say any number of things: what was done with each does not stay."""

    async def main():
        arrival = await arriving(SampleDestination())
        for number in range(100):
            arrival.heard(encode(Round(number, 1)))
        assert arrival._tasks
        await until_async(lambda: not arrival._tasks, "all of it is done")
        assert arrival.statistics.rounds == 99 and not arrival.finished.done()

    asyncio.run(main())


def test_whoever_says_much_takes_no_turn_of_others(tmp_path):
    """A message that is there is taken without waiting: between two all others are heard."""
    messages_said, turns = 500, 0

    async def ticking():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main():
        there = Destination(parse_endpoint(f"ipc://{tmp_path}/s"), lambda _: SampleDestination())
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(str(there.endpoint))
            for _ in range(messages_said):
                stranger.send(b"\xc1garbage")
            ticker = asyncio.ensure_future(ticking())
            try:
                for _ in range(messages_said):
                    before = turns
                    await there._next_message()
                    assert turns > before
            finally:
                ticker.cancel()
                await asyncio.gather(ticker, return_exceptions=True)
                there.close()

    asyncio.run(main())


def test_contents_of_more_pages_than_digests_take_no_memory(tmp_path):
    """The pages of a run, which is three numbers, are counted before there is a list of them."""
    pages = 1 << 26

    async def main():
        guest = DirectoryDestination(GuestUri("image", f"{tmp_path}/"))
        guest.lay_out(hello(name="vm", blocks=[Block("ram", pages * PAGE)], image_size=0))
        arrival = await arriving(guest)
        tracemalloc.start()
        try:
            for digests in (b"", bytes(16), bytes(17)):
                with pytest.raises(RemoteProtocolError, match="digests"):
                    await arrival._compare(Contents(0, [0], [pages], digests))
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
            guest.discard()
            guest.close()

    asyncio.run(main())


# What somebody who pulls a snapshot of 500 pages says after its Offer.
LAID = {
    "garbage": b"\xc1garbage",
    "Armed before anything": Armed(),
    "a second Pull": Pull(PROTOCOL, "1"),
    "pages behind the end": Layout(PAGE, [499], [2]),
    "pages before the beginning": Layout(PAGE, [-1], [2]),
    "pages twice": Layout(PAGE, [0, 1], [2, 1]),
    "no pages in a run": Layout(PAGE, [0], [0]),
    "more starts than counts": Layout(PAGE, [0, 5], [1]),
    "more pages than a number holds": Layout(PAGE, [0], [1 << 64 - 1]),
    "host pages of nothing": Layout(0, [0], [1]),
    "host pages that there are not": Layout(8192, [0], [2]),
    "host pages below zero": Layout(-PAGE, [0], [1]),
    "bits of another layout": Layout(PAGE, [0], [500], b"\xff"),
    "a key that nobody asked for": Layout(PAGE, [0], [500], key=b"x" * 40),
}


def test_a_hostile_destination_of_a_snapshot_ends_its_own_pull_only(image):
    """Each is told that it broke the protocol; who lays out what there is is served."""
    with (
        Running("serve", f"image:{image}", "--listen", "tcp://127.0.0.1:0", "--json",
                "--workers", "1") as server,
        zmq.Context() as context,
    ):  # fmt: skip
        endpoint = json.loads(server.line())["endpoint"]
        for what, said in (*LAID.items(), ("right", Layout(PAGE, [0], [500]))):
            peer = HostileSource(context, endpoint)
            peer.say(Pull(PROTOCOL, "1"))
            assert isinstance(peer.hear(), Offer), what
            peer.say(said)
            answer = peer.hear()
            if what == "right":
                assert isinstance(answer, Serving)
            else:
                assert isinstance(answer, Abort), (what, answer)
                assert answer.error == "RemoteProtocolError", (what, answer)
                told = json.loads(server.line())["error"]
                assert told["class"] == "RemoteProtocolError", (what, told)
            peer.close()
        server.process.send_signal(signal.SIGINT)
        _, _, err = server.finish()
    assert "Traceback" not in err


@pytest.mark.parametrize("length", [0, 15, 17, 256])
def test_a_snapshots_source_with_tokens_that_there_cannot_be(tmp_path, length):
    """As an identity of a socket they may be none at all."""
    good, bad = b"t" * 16, b"t" * length

    async def main():
        restoring = Restoring(parse_endpoint("tcp://127.0.0.1:9"), f"{tmp_path}/uffd")
        restoring._faults = object()
        try:
            for tokens, urgent in (([good, bad], good), ([good, good], bad)):
                said = Serving(["tcp:1", "tcp:2"], tokens, ("tcp:3", urgent), [0], [1])
                with pytest.raises(RemoteProtocolError, match="token"):
                    await restoring._start_workers(said, 2)
        finally:
            restoring._faults = None
            await restoring._close()

    asyncio.run(main())


# ---- a destination -------------------------------------------------------------------------


def welcome(**changes):
    fields = {
        "version": "1", "endpoints": ["tcp:9"], "tokens": [b"t" * 16], "fresh": [True],
    }  # fmt: skip
    return Welcome(**(fields | changes))


ANSWERED = {
    "garbage": (b"\xc1\xff", 5, "does not answer as"),
    "a Hello": (hello(), 5, "does not answer as"),
    "an escape": (Refused("PeerRefused", "x", "\x1b[2J\r\nno"), 6, "[2J"),
    "an error that there is not": (Refused("os.system", "x", "no"), 1, "no"),
    "a short token": (welcome(tokens=[b"t"]), 8, "token"),
    "no token": (welcome(tokens=[]), 8, "channels"),
    "a long token": (welcome(tokens=[b"t" * 1000]), 8, "token"),
    "a socket of this host": (welcome(endpoints=["ipc:/run/dbus"]), 5, "not beside"),
    "no port": (welcome(endpoints=["tcp:0"]), 5, "not beside"),
    "postcopy": (welcome(urgent=("tcp:9", b"t" * 16)), 8, "channels"),
    "blocks that there are not": (welcome(fresh=[True] * 9), 8, "Welcome"),
    "digests of other blocks": (welcome(have=[b""] * 9), 8, "Welcome"),
    "digests of another layout": (welcome(have=[b"x" * 16]), 8, "digests"),
}  # fmt: skip


@pytest.mark.parametrize("what", ANSWERED)
def test_a_hostile_destination(image, what):
    """One clear error at the source, of one line, and nothing for the terminal to act on."""
    answer, code, text = ANSWERED[what]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as there:
        there.linger = 0
        port = there.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        with Running("send", f"image:{image}", endpoint, "--workers", "1", "--json") as sending:
            assert there.poll(60_000)
            identity, said = there.recv_multipart()
            assert isinstance(decode(said), Hello)
            there.send_multipart([identity, answer if type(answer) is bytes else encode(answer)])
            got, out, err = sending.finish()
    assert got == code, err
    assert text in json.loads(out)["error"]["message"]
    assert all(line.isprintable() for line in err.splitlines())
    assert "Traceback" not in err
