"""The urgent channel's two kinds of link, in one process: what arrives, from whom, and what does
not."""

import asyncio
import contextlib
import os
import select
import socket

import pytest
from urgent_peer import UrgentPeer

from pageferry.transport.errors import ConnectError, DestinationError, RemoteProtocolError
from pageferry.transport.links import Endpoint, parse_endpoint
from pageferry.transport.urgent import MAX_MESSAGE
from pageferry.transport.urgent_links import urgent_link
from pageferry.transport.wire import MAX_PAYLOAD

TOKEN, WRONG = b"0123456789abcdef", b"0123456789abcdeF"
LINKS = [(direct, scheme) for direct in (False, True) for scheme in ("ipc", "tcp")]


@pytest.fixture(params=LINKS, ids=lambda kind: f"{'direct' if kind[0] else 'zmq'}-{kind[1]}")
def kind(request):
    return request.param


@contextlib.contextmanager
def links(direct, count):
    made = [urgent_link(direct, 0) for _ in range(count)]
    try:
        yield made
    finally:
        for link in made:
            link.close()


def where(tmp_path, scheme):
    return parse_endpoint(f"ipc://{tmp_path}/u" if scheme == "ipc" else "tcp://127.0.0.1:0")


async def some(peer, count):
    return [await peer.message() for _ in range(count)]


def test_messages_arrive_whole_and_in_order(tmp_path, kind):
    """Pages one way, requests and reports the other."""
    direct, scheme = kind
    small, large = [0, 1, 48, 1072, 3], [0, 1, 48, MAX_MESSAGE, 4144, MAX_MESSAGE]

    async def body(listening, dialling):
        assert not listening.connected and not dialling.connected
        endpoint = listening.listen(where(tmp_path, scheme), TOKEN)
        assert endpoint.scheme == "ipc" or endpoint.port
        assert listening.receive() is None
        assert not listening.send(b"nobody is there")
        dialling.dial(endpoint, TOKEN)
        assert listening.connected and dialling.connected
        here, there = UrgentPeer(listening, None), UrgentPeer(dialling, None)
        for a, b, sizes in ((here, there, small), (there, here, large)):
            messages = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
            receiving = asyncio.create_task(some(b, len(sizes)))
            for message in messages:
                await a.send(message)
            while not receiving.done():  # what the kernel did not take yet goes on from here
                a.link.receive()
                await asyncio.sleep(0)
            assert await receiving == messages
        assert not listening.broken and not dialling.broken

    with links(direct, 2) as (listening, dialling):
        asyncio.run(body(listening, dialling))


def test_who_does_not_know_the_token_is_turned_away(tmp_path, kind):
    """Nothing that he says is heard, nothing is said to him, and the one who knows it gets in."""
    direct, scheme = kind

    async def body(listening, stranger, friend):
        endpoint = listening.listen(where(tmp_path, scheme), TOKEN)
        stranger.dial(endpoint, WRONG)
        stranger.send(b"evil")
        friend.dial(endpoint, TOKEN)
        peer = UrgentPeer(listening, None)
        await UrgentPeer(friend, None).send(b"good")
        assert await peer.message() == b"good"
        await peer.send(b"for a friend")
        assert await UrgentPeer(friend, None).message() == b"for a friend"
        assert stranger.receive() is None
        assert listening.receive() is None
        assert not listening.broken and not friend.broken

    with links(direct, 3) as three:
        asyncio.run(body(*three))


def test_nobody_listens(tmp_path):
    """A direct link says so at once, where."""
    with links(True, 2) as (one, two):
        for endpoint in (Endpoint("ipc", path=f"{tmp_path}/no"), Endpoint("tcp", "127.0.0.1", 1)):
            with pytest.raises(ConnectError, match="cannot connect to"):
                one.dial(endpoint, TOKEN)
            assert not one.connected
        with pytest.raises(DestinationError):
            two.listen(parse_endpoint(f"ipc://{tmp_path}/no/such"), TOKEN)


def test_the_path_is_ours_alone_and_goes_with_the_link(tmp_path, kind):
    direct, scheme = kind
    if scheme == "tcp":
        return
    with links(direct, 1) as (listening,):
        listening.listen(where(tmp_path, scheme), TOKEN)
        assert os.stat(tmp_path / "u").st_mode & 0o777 == 0o600
        listening.close()
        assert not (tmp_path / "u").exists()
        assert not listening.connected
    # the path of a process that was killed is no obstacle
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "u"))
    with links(direct, 1) as (listening,):
        listening.listen(where(tmp_path, scheme), TOKEN)


# ---- the direct link, byte by byte -----------------------------------------------------------


@pytest.fixture
def raw(tmp_path):
    """A listening direct link, and a way to connect to it without one."""
    made = []
    with links(True, 1) as (listening,):
        listening.listen(where(tmp_path, "ipc"), TOKEN)

        def connected():
            made.append(socket.socket(socket.AF_UNIX))
            made[-1].connect(str(tmp_path / "u"))
            return made[-1]

        yield listening, connected
        for sock in made:
            sock.close()


def look(link):
    """Nothing comes any more, however often its descriptor says that something happened."""
    assert link.receive() is None
    while select.select([link.fd], [], [], 0)[0] and not link.broken:
        assert link.receive() is None


def framed(message):
    return len(message).to_bytes(4, "little") + message


def test_a_message_that_comes_byte_by_byte(raw):
    """The token, the length, the bytes: whole at the last one, and not before."""
    listening, connected = raw
    sock = connected()
    for message, stream in ((b"first", TOKEN + framed(b"first")), (b"second", framed(b"second"))):
        for at in range(len(stream)):
            assert listening.receive() is None
            sock.sendall(stream[at : at + 1])
        assert listening.receive() == message
    assert listening.receive() is None and not listening.broken


def test_several_messages_that_come_in_one_piece(raw):
    """With the token before and half of another behind."""
    listening, connected = raw
    sock = connected()
    sock.sendall(TOKEN + framed(b"a") + framed(b"") + framed(b"ccc") + framed(b"dddd")[:6])
    assert [listening.receive() for _ in range(4)] == [b"a", b"", b"ccc", None]
    sock.sendall(framed(b"dddd")[6:])
    assert listening.receive() == b"dddd"


def test_the_descriptor_says_when_something_comes(raw):
    """A peer, bytes of it, its end."""
    listening, connected = raw

    def readable():
        return bool(select.select([listening.fd], [], [], 0)[0])

    assert not readable()
    sock = connected()
    assert readable()
    assert listening.receive() is None
    sock.sendall(TOKEN + framed(b"a"))
    assert readable()
    assert listening.receive() == b"a" and listening.receive() is None
    assert not readable()
    sock.close()
    assert readable()


def test_the_longest_message_is_waited_for(raw):
    listening, connected = raw
    connected().sendall(TOKEN + MAX_PAYLOAD.to_bytes(4, "little") + b"x")
    assert listening.receive() is None and not listening.broken


@pytest.mark.parametrize("excess", [1, 1 << 20, 0xFFFFFFFF - MAX_PAYLOAD])
def test_a_length_above_the_bound_is_refused(raw, excess):
    """Before anything is kept for it."""
    listening, connected = raw
    connected().sendall(TOKEN + (MAX_PAYLOAD + excess).to_bytes(4, "little"))
    with pytest.raises(RemoteProtocolError, match=str(MAX_PAYLOAD + excess)):
        listening.receive()


def test_a_peer_that_is_gone(raw):
    """What it said to the end is heard, half a message is not; then it is broken for good."""
    listening, connected = raw
    sock = connected()
    sock.sendall(TOKEN + framed(b"last words") + framed(b"half")[:5])
    sock.close()
    assert listening.receive() == b"last words"
    look(listening)
    assert listening.broken
    assert not listening.send(b"anybody?")
    with pytest.raises(OSError, match=r"No such file|refused"):
        connected()  # nobody listens any more
    assert listening.receive() is None and listening.receive() is None
    assert listening.broken


def test_a_peer_that_resets_the_connection(tmp_path):
    """As if it had never been: no exception of the socket's comes through."""
    with links(True, 1) as (dialling,), socket.create_server(("127.0.0.1", 0)) as server:
        dialling.dial(Endpoint("tcp", "127.0.0.1", server.getsockname()[1]), TOKEN)
        sock, _ = server.accept()
        # linger 0: close sends RST
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        sock.close()
        assert select.select([dialling.fd], [], [], 20)[0]
        assert dialling.receive() is None
        assert dialling.broken
        assert not dialling.send(b"anybody?")


@pytest.mark.parametrize("said", [b"", TOKEN[:-1], WRONG, WRONG + framed(b"evil")])
def test_a_stranger_does_not_break_it(raw, said):
    """Gone before it said the token, or with another: the next one is welcome."""
    listening, connected = raw
    stranger = connected()
    stranger.sendall(said)
    assert listening.receive() is None
    assert not listening.send(b"who are you?")
    stranger.close()
    friend = connected()
    friend.sendall(TOKEN + framed(b"good"))
    got = [listening.receive() for _ in range(3)]
    assert [message for message in got if message is not None] == [b"good"]
    assert not listening.broken


def test_more_than_the_kernel_takes(tmp_path):
    """It is kept up to a bound, then refused; all that was taken arrives, in order."""

    async def body(listening, dialling):
        endpoint = listening.listen(where(tmp_path, "ipc"), TOKEN)
        dialling.dial(endpoint, TOKEN)
        sent = 0
        while dialling.send(bytes([sent]) * (1 << 20)):
            sent += 1
            assert sent < 200, "it takes without end"
        assert 8 <= sent < 200
        peer, got = UrgentPeer(listening, None), []
        while len(got) < sent:
            assert dialling.receive() is None  # goes on sending
            message = listening.receive()
            if message is not None:
                got.append(message)
        assert [message[0] for message in got] == list(range(sent))
        assert all(message == message[:1] * (1 << 20) for message in got)
        assert dialling.send(b"there is room again")
        assert await peer.message() == b"there is room again"

    with links(True, 2) as two:
        asyncio.run(body(*two))
