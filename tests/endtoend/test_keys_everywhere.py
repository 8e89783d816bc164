"""Keys with everything that opens links: postcopy and its recovery, directories, batches, tuning,
snapshots; and who may speak on the control link."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import uuid

import pytest
import zmq
from helpers import PAGE, Running, ask, pageferry, pattern, same_file, until
from key_ends import Ends

from pageferry.transport import messages
from pageferry.transport.keys import KeyDirectory
from pageferry.transport.links import connect, parse_endpoint
from pageferry.transport.messages import Abort, Block, Hello, Refused, Welcome

SLOWLY = ("--max-postcopy-bandwidth", "500kB")


def is_now(monitor, *states):
    done = pageferry("status", monitor, "--json")
    return done.returncode == 0 and json.loads(done.stdout)["status"] in states


@pytest.fixture
def ends(tmp_path):
    return Ends(tmp_path)


def test_a_postcopy_pauses_and_is_recovered(ends, tmp_path):
    """Twice: each connection has keys of its own. Faults go before the background."""
    monitor = f"unix:{tmp_path}/m"
    with (
        ends.receiver("--once") as receiving,
        Running("send", "demo:?size=16M&content=random&rate=200", receiving.endpoint, "--json",
                "--keys", ends.here.path, "--postcopy", "now", "--monitor", monitor,
                *SLOWLY) as sending,
    ):  # fmt: skip
        for _ in range(2):
            until(lambda: is_now(monitor, "postcopy-active"), "postcopy")
            assert pageferry("pause", monitor).returncode == 0
            until(lambda: is_now(monitor, "postcopy-paused"), "paused")
            assert pageferry("recover", monitor).returncode == 0
        until(lambda: is_now(monitor, "postcopy-active", "completed"), "recovered")
        ask(monitor, "migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
        code, out, err = receiving.finish()
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["oracle"]["ok"]
        code, out, err = sending.finish()
        assert code == 0, err
        report = json.loads(out)
        assert (report["recoveries"], report["postcopy-requests"] > 0) == (2, True)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"vm{number}").write_bytes(random.Random(number).randbytes(256 * PAGE))
    return folder


def test_a_batch_into_a_directory_is_resumed(ends, images, tmp_path):
    """The manifest's keys are in its state: who goes on need not say them."""
    out = tmp_path / "out"
    out.mkdir()
    with ends.receiver("--into", f"image:{out}/") as receiving:
        manifest = tmp_path / "m.json"
        manifest.write_text(json.dumps({
            "defaults": {"keys": "here", "workers": 1, "codec": "none", "batch-pages": 16},
            "parallel": 2, "retries": 0, "max-bandwidth": "300kB",
            "items": [{"source": f"image:{images}/vm{n}", "destination": receiving.endpoint}
                      for n in range(4)],
        }))  # fmt: skip
        state = ("--state", str(tmp_path / "state"))
        with Running("batch", str(manifest), *state) as batch:
            until(lambda: any(out.glob(".vm*")), "something arrives")
            batch.process.send_signal(signal.SIGKILL)
            batch.finish()
        ends.there.revoke("here")
        done = pageferry("batch", "resume", *state, "--max-bandwidth", "1GB")
        assert done.returncode != 0
        ends.there.allow(ends.here.public, "here")
        done = pageferry("batch", "resume", *state, "--max-bandwidth", "1GB", "--retry-failed")
        assert done.returncode == 0, done.stderr
    for image in images.iterdir():
        assert same_file(image, out / image.name)


def test_tuning(ends, tmp_path):
    """Its trial runs are migrations like any other."""
    image = tmp_path / "vm"
    image.write_bytes(pattern(1100))
    few = ("--codecs", "none", "--batches", "256", "--workers", "1", "--sample", "4M", "--json")
    with ends.receiver() as receiving:
        tune = ("tune", f"image:{image}", receiving.endpoint, *few)
        refused = pageferry(*tune)
        assert refused.returncode == 6 and "wants a key" in refused.stderr
        done = pageferry(*tune, "--keys", ends.here.path)
        assert done.returncode == 0, done.stderr


def test_a_server_that_comes_back(ends, tmp_path):
    """A restore goes on with the server of the same key, and not with one of another."""
    snapshot, path, listen = tmp_path / "vm", tmp_path / "u", f"ipc://{tmp_path}/s"
    snapshot.write_bytes(random.Random(1).randbytes(16 << 20))
    stranger = KeyDirectory.create(str(tmp_path / "stranger"))
    stranger.allow(ends.here.public)

    @contextlib.contextmanager
    def serving(keys, *more):
        with Running("serve", f"image:{snapshot}", "--listen", listen, "--keys", keys.path,
                     "--json", *more) as server:  # fmt: skip
            server.line()
            yield server

    def stop(server):
        server.process.terminate()
        server.finish()

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(ends.there, "--max-postcopy-bandwidth", "3MB"))
        restore = stack.enter_context(
            Running("restore", listen, "--uffd-socket", str(path), "--json", "--keys",
                    ends.here.path)
        )  # fmt: skip
        until(path.exists, "listening")
        client_of = [sys.executable, "-m", "pageferry.tools.uffd_client", "--socket", str(path),
                     "--image", str(snapshot)]  # fmt: skip
        client = stack.enter_context(subprocess.Popen(client_of, stdout=subprocess.PIPE, text=True))
        restore.error_line("postcopy:")
        stop(first)
        restore.error_line("paused")
        other = stack.enter_context(serving(stranger))
        restore.error_line("somebody else")
        stop(other)
        stack.enter_context(serving(ends.there))
        code, _, err = restore.finish()
        assert code == 0, err
        assert json.loads(client.communicate()[0].splitlines()[0])["wrong-pages"] == 0


# ---- the command line ----------------------------------------------------------------------------


def test_keys_by_the_command_line(tmp_path):
    """The recipe of docs/security.md: what `show` prints last is what `allow` takes; a key is never
    replaced, and errors say what to do."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    made = [pageferry("keys", "new", "--keys", folder).stdout.split()[-1] for folder in (one, two)]
    shown = [pageferry("keys", "show", "--keys", folder) for folder in (one, two)]
    assert [done.stdout.split()[-1] for done in shown] == made
    assert all(done.stdout.endswith(f" {key}\n") for done, key in zip(shown, made, strict=True))
    again = pageferry("keys", "new", "--keys", one)
    assert again.returncode == 2 and "keys show" in again.stderr
    assert pageferry("keys", "allow", made[1], "--keys", one, "--name", "two").returncode == 0
    assert json.loads(pageferry("keys", "list", "--keys", one, "--json").stdout) == {"two": made[1]}
    assert pageferry("keys", "revoke", "two", "--keys", one).returncode == 0
    for wrong, says in (
        (("show", "--keys", f"{one}/none"), "keys new"),
        (("allow", "abc", "--keys", one), "keys show"),
        (("revoke", "two", "--keys", one), "keys list"),
    ):
        done = pageferry("keys", *wrong)
        assert done.returncode == 2 and says in done.stderr, done.stderr


# ---- who may speak on the control link -----------------------------------------------------------


class Speaker:
    """A source by hand, under an identity and keys of its choice."""

    def __init__(self, stack, endpoint, identity, curve):
        context = stack.enter_context(zmq.Context())
        self.socket = stack.enter_context(
            contextlib.closing(
                connect(context, parse_endpoint(endpoint), identity, control=True, curve=curve)
            )
        )

    def say(self, message):
        self.socket.send(messages.encode(message))

    def hear(self, kind):
        while self.socket.poll(20_000):
            message = messages.decode(self.socket.recv())
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__} was heard")


def hello(key):
    return Hello(
        messages.PROTOCOL, "0", str(uuid.uuid4()), "ram", [Block("ram", 64 * PAGE)], 1, 16, key=key
    )


def test_another_peer_s_message_is_not_heard(ends, tmp_path):
    """A peer that is listed as well, and even has the identity of the one that began, cannot end
    that one's migration; that one can."""
    second = KeyDirectory.create(str(tmp_path / "second"))
    second.allow(ends.there.public)
    ends.there.allow(second.public, "second")
    monitor = f"unix:{tmp_path}/m"
    server = ends.there.public
    where = f"image:{tmp_path}/to"
    with (
        ends.receiver("--into", where, "--monitor", monitor) as receiving,
        contextlib.ExitStack() as stack,
    ):
        channel = KeyDirectory.create(str(tmp_path / "channel")).public
        first = Speaker(stack, receiving.endpoint, b"0123456789abcdef", ends.here.dials(server))
        first.say(hello(channel))
        first.hear(Welcome)
        other = Speaker(stack, receiving.endpoint, b"0123456789abcdef", second.dials(server))
        third = Speaker(stack, receiving.endpoint, b"fedcba9876543210", second.dials(server))
        for _ in range(3):
            for _ in range(20):
                other.say(Abort("Cancelled", "not yours to end"))
            third.say(hello(channel))
            assert third.hear(Refused).field == "busy"
        assert is_now(monitor, "active")
        # it is the key that counts: said by the first, the same word ends it
        again = Speaker(stack, receiving.endpoint, b"0123456789abcdef", ends.here.dials(server))
        again.say(Abort("Cancelled", "mine to end"))
        until(lambda: is_now(monitor, "failed", "none", "cancelled"), "it ends")


def test_bytes_are_counted_with_keys_too(ends, tmp_path):
    """What a peer has said is known as it is on the wire: who says much, and all of it messages, is
    not taken for one that says a message without an end."""
    with ends.receiver("--into", f"image:{tmp_path}/to") as receiving, contextlib.ExitStack() as s:
        peer = Speaker(
            s, receiving.endpoint, b"0123456789abcdef", ends.here.dials(ends.there.public)
        )
        watching = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        s.callback(watching.close)
        s.callback(peer.socket.disable_monitor)
        for _ in range(20):  # more than may be under way, all of it messages
            peer.socket.send(bytes(1 << 20))
        peer.say(hello(KeyDirectory.create(str(tmp_path / "channel")).public))
        peer.hear(Welcome)
        assert not watching.poll(0)


def test_a_direct_link_is_refused_by_the_receiver(ends, tmp_path):
    """A source that asks for one all the same is told what to do."""
    with ends.receiver() as receiving, contextlib.ExitStack() as stack:
        channel = KeyDirectory.create(str(tmp_path / "channel")).public
        curve = ends.here.dials(ends.there.public)
        source = Speaker(stack, receiving.endpoint, b"0123456789abcdef", curve)
        asks = [messages.POSTCOPY, messages.DIRECT]
        said = hello(channel)
        said.capabilities.extend(asks)
        source.say(said)
        refused = source.hear(Refused)
    assert "leave it out" in refused.message and refused.field == messages.DIRECT
