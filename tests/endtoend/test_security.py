"""Keys between real processes: the rows of QEMU's TLS tests, and what is to be seen on the wire."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from helpers import Running, pageferry, receiver, same_file, until
from key_ends import Ends

from pageferry.transport.curve import Binds, Dials
from pageferry.transport.keys import KeyDirectory, new_pair
from pageferry.transport.links import parse_endpoint
from pageferry.transport.urgent_links import urgent_link

PAGE = b"nobody but the two of us reads this page! ".ljust(64, b".") * 64


@pytest.fixture
def ends(tmp_path):
    return Ends(tmp_path)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "vm"
    path.write_bytes(PAGE * 400)
    return path


def send(source, endpoint, *options):
    return pageferry("send", str(source), endpoint, "--json", *options)


def failed(done, code, text):
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_right_keys(ends, image, tmp_path, scheme):
    listen = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/s"
    with ends.receiver("--into", f"image:{tmp_path}/to", "--once", listen=listen) as receiving:
        done = send(f"image:{image}", receiving.endpoint, "--keys", ends.here.path, "--verify")
        assert done.returncode == 0, done.stderr
        assert receiving.finish()[0] == 0
    assert same_file(image, tmp_path / "to")


def test_the_table(ends, image, tmp_path):
    """Whoever may not is told why, and the receiver is there for who may."""
    stranger = KeyDirectory.create(str(tmp_path / "stranger"))
    with ends.receiver("--into", f"image:{tmp_path}/to", "--once") as receiving:
        to = receiving.endpoint
        # no key
        failed(send(f"image:{image}", to, "--keys", str(tmp_path / "none")), 2, "keys new")
        # nobody is listed
        failed(send(f"image:{image}", to, "--keys", stranger.path), 2, "keys allow")
        # an unlisted client
        stranger.allow(ends.there.public)
        done = send(f"image:{image}", to, "--keys", stranger.path)
        failed(done, 6, f"keys allow {stranger.public.decode()}")
        # a wrong server key
        ends.here.allow(stranger.public, "another")
        done = send(f"image:{image}", to, "--keys", ends.here.path, "--peer", "another")
        failed(done, 5, "somebody else")
        # which one it is, is not said
        failed(send(f"image:{image}", to, "--keys", ends.here.path), 2, "--peer NAME")
        # a plain client
        failed(send(f"image:{image}", to), 6, "wants a key")
        # the right one, after all that
        done = send(f"image:{image}", to, "--keys", ends.here.path, "--peer", "there")
        assert done.returncode == 0, done.stderr
        assert receiving.finish()[0] == 0
    assert same_file(image, tmp_path / "to")


def test_a_secured_client_on_a_plain_port(ends, image, tmp_path):
    with receiver("--into", f"image:{tmp_path}/to", "--once") as receiving:
        failed(send(f"image:{image}", receiving.endpoint, "--keys", ends.here.path), 5, "no key")
        assert send(f"image:{image}", receiving.endpoint).returncode == 0
        assert receiving.finish()[0] == 0


def test_direct_links_are_refused(ends):
    done = send("demo:?size=4M", "tcp://127.0.0.1:1", "--keys", ends.here.path, "--postcopy", "now",
                "--postcopy-link", "direct")  # fmt: skip
    failed(done, 2, "not encrypted")


def moving(ends, endpoint, *options):
    """A demo guest that is on its way, slowly."""
    return Running(
        "send", "demo:?size=32M&content=random&access=random", endpoint, "--json", "--keys",
        ends.here.path, *options,
    )  # fmt: skip


@pytest.mark.parametrize("end", ["there", "here"])
def test_revoked_in_mid_migration(ends, end):
    """It is cut off at both ends, and the guest goes on at the source."""
    with (
        ends.receiver("--once") as receiving,
        moving(ends, receiving.endpoint, "--max-bandwidth", "1MB") as sending,
    ):
        sending.error_line("round 1")
        directory = getattr(ends, end)
        directory.revoke("here" if end == "there" else "there")
        assert sending.finish()[0] == receiving.finish()[0] == 6


def test_revoked_in_a_postcopy(ends, tmp_path):
    """It pauses; a recovery is refused until the key is allowed again, and then goes on."""
    monitor = f"unix:{tmp_path}/m"
    with (
        ends.receiver("--once") as receiving,
        moving(ends, receiving.endpoint, "--postcopy", "now", "--max-postcopy-bandwidth", "2MB",
               "--monitor", monitor) as sending,
    ):  # fmt: skip

        def is_now(status):
            done = pageferry("status", monitor, "--json")
            return done.returncode == 0 and json.loads(done.stdout)["status"] == status

        until(lambda: is_now("postcopy-active"), "postcopy")
        ends.there.revoke("here")
        until(lambda: is_now("postcopy-paused"), "paused")
        pageferry("recover", monitor)
        sending.error_line("does not know our key")
        until(lambda: is_now("postcopy-paused"), "paused again")
        ends.there.allow(ends.here.public, "here")
        assert pageferry("set", monitor, "max-postcopy-bandwidth=0").returncode == 0
        assert pageferry("recover", monitor).returncode == 0
        code, out, err = receiving.finish()
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["oracle"]["ok"]
        code, out, err = sending.finish()
        assert code == 0, err
        assert json.loads(out)["recoveries"] == 1


def test_a_channel_is_for_one_migration(tmp_path):
    """Who knows where it is, its token and its server key, but has another migration's key, does
    not join; who has this one's does. Without the server key nobody does."""
    ours, theirs, channel = new_pair(), new_pair(), new_pair()
    token = bytes(16)
    binds = Binds(channel.secret, ours.public, "a-uuid")
    with contextlib.ExitStack() as stack:
        listening, intruder, guess, right = (urgent_link(False, 0) for _ in range(4))
        for link in (listening, intruder, guess, right):
            stack.callback(link.close)
        where = listening.listen(parse_endpoint(f"ipc://{tmp_path}/s"), token, binds)
        intruder.dial(where, token, Dials(channel.public, theirs.public, theirs.secret))
        guess.dial(where, token, Dials(theirs.public, ours.public, ours.secret))
        intruder.send(b"intruder")
        guess.send(b"guess")
        right.dial(where, token, Dials(channel.public, ours.public, ours.secret))
        right.send(b"right")
        heard = []
        until(lambda: heard.append(listening.receive()) or heard[-1] is not None, "a message")
        assert heard[-1] == b"right"
        assert listening.send(b"answer")
        until(lambda: right.receive() == b"answer", "an answer")
        assert listening.receive() is None and intruder.receive() is None


def test_serve_and_restore(ends, tmp_path):
    """Here the destination dials."""
    snapshot, path = tmp_path / "vm", tmp_path / "u"
    snapshot.write_bytes(PAGE * 1000)
    listen = ("--listen", "tcp://127.0.0.1:0", "--json")
    with Running("serve", f"image:{snapshot}", *listen, "--keys", ends.there.path) as server:
        restore = ("restore", json.loads(server.line())["endpoint"], "--uffd-socket", str(path))
        failed(pageferry(*restore), 6, "wants a key")
        with Running(*restore, "--json", "--keys", ends.here.path) as restoring:
            until(path.exists, "listening")
            monitor = subprocess.run(
                [sys.executable, "-m", "pageferry.tools.uffd_client", "--socket", str(path),
                 "--image", str(snapshot)], capture_output=True, text=True, check=True,
            )  # fmt: skip
            code, out, err = restoring.finish()
        assert code == 0, err
        assert json.loads(monitor.stdout.splitlines()[0])["wrong-pages"] == 0
        assert json.loads(out)["postcopy-requests"] > 0
        server.process.send_signal(signal.SIGTERM)
        server.finish()


def test_a_batch(ends, image, tmp_path):
    """`keys` of the command line is for all its items; peers are found by the address."""
    ends.here.allow(new_pair().public, "another")
    ends.here.revoke("there")
    ends.here.allow(ends.there.public, "127.0.0.1")
    (tmp_path / "to").mkdir()
    # nothing begins if one of the items will not do
    failed(pageferry("batch", str(image), "tcp://192.0.2.7:1"), 2, "--insecure")
    away = ("batch", str(image), "tcp://192.0.2.7:1", "--keys", ends.here.path)
    failed(pageferry(*away), 2, "--name 192.0.2.7")
    with ends.receiver("--into", f"image:{tmp_path}/to/") as receiving:
        done = pageferry("batch", str(image), receiving.endpoint, "--keys", ends.here.path,
                         "--state", str(tmp_path / "state"))  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert same_file(image, tmp_path / "to" / "vm")


# ---- what is to be seen on the wire ------------------------------------------------------------


class Relay:
    """Between a source that dials an address of ours and a receiver at another: copies bytes and
    keeps them. Nobody else has ports at either. Channels are at ports that the receiver tells; so
    before anything goes back to the source, whatever port the receiver listens at is listened at
    here."""

    def __init__(self, near, address, port):
        self.near, self.address, self.kept, self._lock = near, address, [], threading.Lock()
        self._open, self._sockets, self._threads = {}, [], []
        self.port = self._listen(port, 0)

    def _listen(self, port, here):
        server = socket.create_server((self.near, here))
        self._open[port] = server
        self._start(self._accept, server, port)
        return server.getsockname()[1]

    def _start(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, server, port):
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection((self.address, port))
            self._sockets += [near, far]
            self._start(self._copy, near, far, False)
            self._start(self._copy, far, near, True)

    def _copy(self, source, target, back):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if back:
                    self._follow()
                self.kept.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _follow(self):
        packed = socket.inet_aton(self.address)[::-1].hex().upper()
        with self._lock, open("/proc/net/tcp") as table:
            for line in table:
                where, state = line.split()[1], line.split()[3]
                address, _, port = where.partition(":")
                if (address, state) == (packed, "0A") and int(port, 16) not in self._open:
                    self._listen(int(port, 16), int(port, 16))

    def close(self):
        for server in self._open.values():
            server.shutdown(socket.SHUT_RDWR)
            server.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


@pytest.mark.parametrize("secured", [True, False])
@pytest.mark.parametrize("postcopy", [(), ("--postcopy", "now")])
def test_on_the_wire(ends, image, tmp_path, secured, postcopy):
    """A relay between both ends keeps all bytes: pages are in it without keys, with them not."""
    own = f"{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"
    near, address = f"127.78.{own}", f"127.77.{own}"
    here = ("--keys", ends.here.path) if secured else ()
    there = ("--keys", ends.there.path) if secured else ()
    source = "demo:?size=8M&content=text" if postcopy else f"image:{image}"
    into = () if postcopy else ("--into", f"image:{tmp_path}/to")
    with receiver(*into, *there, "--once", listen=f"tcp://{address}:0") as receiving:
        relay = Relay(near, address, parse_endpoint(receiving.endpoint).port)
        try:
            done = send(source, f"tcp://{near}:{relay.port}", "--codec", "none", *here, *postcopy)
            assert done.returncode == 0, done.stderr
            assert receiving.finish()[0] == 0
        finally:
            relay.close()
    wire = b"".join(relay.kept)
    assert len(wire) > (8 << 20 if postcopy else len(PAGE) * 400)
    # messages of the control link, and pages
    for told in (b"device-state", *(() if postcopy else (PAGE[:64],))):
        assert (told in wire) != secured, told
