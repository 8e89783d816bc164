"""Two carriers, a stream between them and sockets at both ends: in one process, step by step."""

import contextlib
import os
import random
import secrets
import socket

import pytest

from pageferry.transport.carrier import Carrier
from pageferry.transport.errors import RemoteProtocolError
from pageferry.transport.streams import CHUNK, WINDOW, Mux


def stream(kind):
    """Descriptors of both ends: what each reads from and writes to."""
    if kind == "socket":
        a, b = socket.socketpair()
        one, other = (a.detach(), b.detach())
        return (one, os.dup(one)), (other, os.dup(other))
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    return (r1, w2), (r2, w1)


class Ends:
    """`source` listens at @NAME-s…, `there` connects to @NAME-t…, where `servers` listen."""

    def __init__(self, kind):
        name = f"@pageferry-test-{os.getpid()}-{secrets.token_hex(4)}"
        here, there = stream(kind)
        self.source = Carrier(Mux(dials=True), *here, f"{name}-s")
        self.there = Carrier(Mux(dials=False, name=f"{name}-t"), *there, f"{name}-t")
        self.servers = {}
        self.sockets = []

    def __enter__(self):
        self.until(lambda: self.source.mux.greeted and self.there.mux.greeted)
        assert self.source.name == self.there.path
        return self

    def step(self):
        for carrier in (self.source, self.there):
            carrier.step(0)

    def until(self, condition):
        for _ in range(100_000):
            if condition():
                return
            self.step()
        raise AssertionError("never")

    def serve(self, suffix):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"\0{self.there.path[1:]}{suffix}")
        sock.listen(64)
        sock.setblocking(False)
        self.servers[suffix] = sock
        self.sockets.append(sock)
        self.source.listen(suffix)

    def dial(self, suffix):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"\0{self.source.path[1:]}{suffix}")
        sock.setblocking(False)
        self.sockets.append(sock)
        return sock

    def connect(self, suffix):
        """Both sockets of a connection."""
        if suffix not in self.servers:
            self.serve(suffix)
        here, found = self.dial(suffix), []

        def accepted():
            try:
                found.append(self.servers[suffix].accept()[0])
            except BlockingIOError:
                return False
            return True

        self.until(accepted)
        found[0].setblocking(False)
        self.sockets.append(found[0])
        return here, found[0]

    def get(self, sock, size):
        got = bytearray()

        def enough():
            with contextlib.suppress(BlockingIOError):
                got.extend(sock.recv(1 << 20))
            return len(got) >= size

        self.until(enough)
        return bytes(got)

    def put(self, sock, data):
        """As much as it takes."""
        try:
            return sock.send(data)
        except BlockingIOError:
            return 0

    def __exit__(self, *rest):
        for sock in self.sockets:
            sock.close()
        for carrier in (self.source, self.there):
            carrier.close()


@pytest.mark.parametrize("kind", ["pipes", "socket"])
def test_both_ways_on_many_connections(kind):
    draw = random.Random(1)
    with Ends(kind) as ends:
        pairs = [ends.connect(s) for s in ("", ".0", ".1", ".64", ".0")]
        flows = [(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]
        todo = {flow: draw.randbytes(draw.randrange(3 * WINDOW)) for flow in flows}
        said, got = dict.fromkeys(flows, 0), {flow: bytearray() for flow in flows}

        def done():
            for flow in flows:
                said[flow] += ends.put(flow[0], todo[flow][said[flow] : said[flow] + 200_000])
                with contextlib.suppress(BlockingIOError):
                    got[flow] += flow[1].recv(300_000)
            return all(len(got[flow]) == len(todo[flow]) for flow in flows)

        ends.until(done)
        assert all(got[flow] == todo[flow] for flow in flows)


def test_an_end_is_an_end_at_the_other_side():
    with Ends("pipes") as ends:
        here, there = ends.connect("")
        here.send(b"last words")
        here.close()
        assert ends.get(there, 10) == b"last words"

        def ended():
            try:
                return there.recv(1) == b""
            except BlockingIOError:
                return False

        ends.until(ended)
        ends.until(lambda: ends.source.idle and ends.there.idle)
        here, there = ends.connect("")
        there.close()
        ends.until(lambda: ends.source.idle and ends.there.idle)


def test_nobody_listens_there():
    with Ends("pipes") as ends:
        ends.source.listen(".7")
        sock = ends.dial(".7")

        def ended():
            try:
                return sock.recv(1) == b""
            except BlockingIOError:
                return False

        ends.until(ended)
        ends.until(lambda: ends.source.idle)


def test_an_urgent_page_passes_bulk_that_nobody_takes():
    """The reader of bulk sleeps, the stream is full of it as far as it may be."""
    with Ends("pipes") as ends:
        bulk, _ = ends.connect(".0")
        urgent, faults = ends.connect(".64")
        sent = 0
        for _ in range(2000):
            sent += ends.put(bulk, bytes(CHUNK))
            ends.step()
        assert WINDOW < sent < WINDOW + (8 << 20)  # it waits in sockets, here and there
        urgent.send(b"page")
        assert ends.get(faults, 4) == b"page"


def test_the_end_of_a_stream():
    with Ends("socket") as ends:
        ends.connect("")
        ends.source.stop_listening()
        ends.source.end("done")
        ends.until(lambda: ends.source.flushed)
        ends.source.shut()
        ends.source.shut()
        ends.until(lambda: ends.there.eof)
        assert ends.there.mux.left and not ends.there.broken
        ends.there.close()
        ends.there.close()
        for _ in range(5):
            ends.source.step(0)
        assert ends.source.eof


def test_nobody_reads_it_any_more():
    with Ends("pipes") as ends:
        here, _ = ends.connect("")
        ends.there.close()
        here.send(b"into nothing")
        for _ in range(10):
            ends.source.step(0)
        assert ends.source.eof and ends.source.broken == "Broken pipe"


def test_what_is_no_carrier():
    (reads, writes), there = stream("pipes")
    carrier = Carrier(Mux(dials=True), reads, writes, "@nobody")
    try:
        os.write(there[1], b"\0pageferry-stream\0" + b"\xff" * 64)
        with pytest.raises(RemoteProtocolError, match="kind 255"):
            carrier.step(0)
    finally:
        carrier.close()
        for fd in there:
            os.close(fd)
