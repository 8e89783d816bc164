"""Who comes and goes at a control link, by the thousand, early, and when descriptors are out."""

import asyncio
import contextlib
import os
import resource
import socket
import threading
import time

import pytest
import zmq
import zmq.asyncio
from helpers import until_async
from raw_peer import GREETING, RawPeer, long_frame, ready

from pageferry.transport.doorkeeper import Doorkeeper
from pageferry.transport.links import bind, connect, parse_endpoint, stop_watching, unbind


@contextlib.asynccontextmanager
async def door():
    """A control link that nobody attends to yet, and what was said of who was cut off."""
    context = zmq.asyncio.Context()
    sock, endpoint = bind(context, parse_endpoint("tcp://127.0.0.1:0"), control=8 << 20)
    said = []
    found = Doorkeeper(sock, endpoint, 0, 0, sealed=False, on_cut=said.append)
    try:
        yield sock, endpoint, found, said
    finally:
        found.close()
        unbind(sock, endpoint)
        context.term()


def come_and_go(port, times):
    for n in range(times):
        socket.create_connection(("127.0.0.1", port), timeout=20).close()
        if n % 50 == 49:
            time.sleep(0.005)  # a listener's queue has a hundred places


def test_who_comes_and_goes_by_the_thousand():
    """All others have turns between them, and who stays is known."""

    async def main():
        async with door() as (_, endpoint, found, _):
            attending = asyncio.ensure_future(found.attend())
            await asyncio.to_thread(come_and_go, endpoint.port, 1500)
            with contextlib.closing(RawPeer(endpoint.port)) as last:
                await asyncio.to_thread(last.wait_until_greeted)
                await until_async(lambda: found._strangers.strangers == 1, "they are gone again")
                attending.cancel()

    asyncio.run(main())


def test_who_comes_before_anybody_attends():
    """Libzmq's thread waits for nobody to hear of it: neither a peer that is in order nor the end
    of the link waits for libzmq then. (Its own queue would be full after 2,000 events.)"""

    async def main():
        async with door() as (sock, endpoint, found, _):
            await asyncio.to_thread(come_and_go, endpoint.port, 1500)
            with contextlib.closing(RawPeer(endpoint.port)) as last:
                await asyncio.to_thread(last.wait_until_greeted)
                last.send(bytes([0, 5]) + b"hello")
                found.heard(await sock.recv_multipart(copy=False))
                found.welcome()
                assert len(found._strangers.numbers()) == 1
                assert found._strangers.strangers == 0
            await asyncio.to_thread(come_and_go, endpoint.port, 1500)

    asyncio.run(main())


@pytest.fixture
def few_descriptors():
    """Call it, and there are none left."""
    before, held = resource.getrlimit(resource.RLIMIT_NOFILE), []

    def take():
        most = max(map(int, os.listdir("/proc/self/fd"))) + 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))

    yield take
    for fd in held:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_descriptors_they_are_cut_off_all_the_same(few_descriptors):
    async def main():
        async with door() as (_, endpoint, found, said):
            with contextlib.closing(RawPeer(endpoint.port)) as peer:
                await asyncio.to_thread(peer.wait_until_greeted)
                attending = asyncio.ensure_future(found.attend())
                await until_async(lambda: found._strangers.strangers == 1, "it has come")
                attending.cancel()
                few_descriptors()
                peer.send(long_frame(1 << 20, more=True) + bytes(1 << 17))
                with pytest.raises(OSError, match="Too many"):
                    os.dup(0)

                def cut():
                    found._look()
                    return said

                await until_async(cut, "it is cut off")
                peer.wait_until_dropped()

    asyncio.run(main())


class Attended:
    """A monitor's socket. Once it is closed, or about to be, another connection is made."""

    def __init__(self, events, again):
        self._events, self._again = events, again

    def close(self):
        self._events.close()
        self._again()


def test_who_is_told_no_more_of_a_link_does_not_hold_it_up():
    """A connection is made while its watching ends: libzmq's thread tells nobody, and waits for
    nobody. (Closed in the other order, both wait for each other for ever.)"""
    with socket.create_server(("127.0.0.1", 0)) as listener, zmq.Context() as context:
        listener.settimeout(20)
        made = []

        def make():
            peer, _ = listener.accept()
            peer.settimeout(20)
            made.append(peer)
            peer.sendall(GREETING + ready())
            while b"READY" not in peer.recv(256):
                pass

        def again():
            made[0].close()
            make()

        where, watched = f"tcp://127.0.0.1:{listener.getsockname()[1]}", []
        sock = connect(context, parse_endpoint(where), b"0" * 16, control=True, watched=watched)
        make()
        assert watched[0].poll(20_000)
        ending = threading.Thread(
            target=stop_watching, args=(sock, Attended(watched[0], again)), daemon=True
        )
        ending.start()
        ending.join(40)
        assert not ending.is_alive()
        assert len(made) == 2
        sock.close(0)
        for peer in made:
            peer.close()
