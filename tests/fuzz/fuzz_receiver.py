"""Fuzzes a whole `pageferry receive` over real sockets: strangers, sources that say anything,
channels with frames and messages of any shape. Part of `make fuzz` (TARGET=receiver), in short of
the tests.

After each bout the receiver is alive, whoever was let in has heard one error and the receiver has
told of it in one line, and now and then a good migration ends right while others misbehave. In the
end it uses no more memory, descriptors and names than before.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))

import numpy as np
import psutil
import zmq
from fuzz_channels import sealed
from fuzz_draw import mutants, mutate
from fuzz_messages import EXAMPLES
from fuzz_targets import corpus
from helpers import PAGE, pattern, receiver, until
from helpers import pageferry as run

from pageferry.transport import wire
from pageferry.transport.curve import CHANNEL_USER, password
from pageferry.transport.links import parse_endpoint
from pageferry.transport.messages import (
    PAGE_SUMS,
    PROTOCOL,
    Abort,
    Block,
    Hello,
    Ping,
    Refused,
    Run,
    Welcome,
    decode,
    encode,
)

_PAGES = 64
_WAIT_MS = 60_000
# What is said in one bout.
_MESSAGES, _FRAMES = 300, 1000
# Bouts between two good migrations.
_GOOD_EVERY = 10
# What a receiver that lives on may have more of in the end: what the allocator keeps.
_MOST_GROWTH = 48 << 20
# Of the processes that wait for the next migration, of which there may be more by now.
_MOST_DESCRIPTORS = 32
BROKEN = {"RemoteProtocolError", "VerificationFailed"}


@dataclass
class Figures:
    """Of a run. `frames`, `messages`: what was said on channels and on control links."""

    bouts: int = 0
    frames: int = 0
    messages: int = 0
    good: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    grown: int = 0

    def __str__(self) -> str:
        said = self.frames + self.messages
        return (
            f"receiver: {self.frames} frames and {self.messages} messages in {self.bouts} bouts, "
            f"{said / self.seconds:.0f} a second, beside {self.good} good migrations; ended: "
            f"{self.ended}; memory {self.grown / (1 << 20):+.1f} MiB"
        )


class _Told:
    """What the receiver prints: a line for each migration that ended."""

    def __init__(self, process) -> None:
        self._process, self.errors = process, ""
        self._condition, self._lines = threading.Condition(), []
        self._threads = [threading.Thread(target=f) for f in (self._out, self._err)]
        for thread in self._threads:
            thread.start()

    def _out(self) -> None:
        for line in self._process.stdout:
            with self._condition:
                self._lines.append(json.loads(line))
                self._condition.notify_all()

    def _err(self) -> None:
        for line in self._process.stderr:
            self.errors += line

    def of(self, name: str) -> dict:
        """The line of the migration with that name; the only one."""

        def mine() -> list[dict]:
            return [line for line in self._lines if line.get("name") == name]

        with self._condition:
            assert self._condition.wait_for(mine, _WAIT_MS / 1000), f"nothing is said of {name}"
            assert len(mine()) == 1
            return mine()[0]

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


class _Peer:
    """A source that says what it likes. `token`: on a channel, which is joined with it."""

    def __init__(self, context, endpoint: str, token: bytes = b"") -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.ROUTING_ID, token or uuid.uuid4().bytes)
        if token:
            self.socket.setsockopt(zmq.PLAIN_USERNAME, CHANNEL_USER)
            self.socket.setsockopt(zmq.PLAIN_PASSWORD, password(token))
        self.socket.connect(endpoint)

    def hear(self, *kinds):
        """The next message that is one of these, or the first that is no ping."""
        while True:
            assert self.socket.poll(_WAIT_MS), "it says nothing"
            said = decode(self.socket.recv())
            if isinstance(said, kinds or object) and not isinstance(said, Ping):
                return said

    def close(self) -> None:
        self.socket.close()


class Bouts:
    """Against one receiver."""

    def __init__(self, there, context, into: Path, image: Path, seed: int) -> None:
        self.there, self.context, self.into, self.image = there, context, into, image
        self.draw = random.Random(seed)
        self.figures, self.told = Figures(), _Told(there.process)
        self._numbers = itertools.count()
        self._frame_seeds = corpus("frame")
        self._kinds = itertools.cycle((self._strangers, self._talk, self._channels))

    def bout(self) -> None:
        next(self._kinds)()
        self.figures.bouts += 1
        assert self.there.process.poll() is None, self.told.errors
        assert "Traceback" not in self.told.errors

    # ---- who is never let in, or at once ends its own ----------------------------------------

    def _strangers(self) -> None:
        """Messages and multipart shapes from peers that come and go."""
        made = mutants([*EXAMPLES, encode(self._hello("x"))], self.draw.randrange(1 << 30))
        for _ in range(4):
            peer = _Peer(self.context, self.there.endpoint)
            for _ in range(_MESSAGES // 4):
                parts = [next(made) for _ in range(self.draw.choice((1, 1, 1, 0, 2, 5)))] or [b""]
                peer.socket.send_multipart(parts)
                self.figures.messages += 1
            # if something made it in: this ends it, as nobody may say it twice
            peer.socket.send(encode(Run()))
            peer.socket.send(encode(Hello(0, "end", "", "", [], 1, 1)))
            peer.hear(Refused, Abort)
            peer.close()

    def _hello(self, name: str, **changes) -> Hello:
        fields = {
            "protocol": PROTOCOL, "version": "1", "uuid": str(uuid.uuid4()), "kind": "image",
            "blocks": [Block("ram", _PAGES * PAGE)], "workers": 2,
            "batch_pages": 256, "image_size": _PAGES * PAGE, "name": name,
        }  # fmt: skip
        return Hello(**(fields | changes))

    def _let_in(self, **changes) -> tuple[_Peer, Welcome, str]:
        name = f"fuzz-{next(self._numbers)}"
        peer = _Peer(self.context, self.there.endpoint)
        while True:
            peer.socket.send(encode(self._hello(name, **changes)))
            answer = peer.hear()
            if isinstance(answer, Welcome):
                return peer, answer, name
            assert isinstance(answer, Refused) and answer.field == "busy", answer

    def _over(self, peer: _Peer, name: str, *also: str) -> None:
        """It has heard one error, and the receiver has told of it; nothing is left of it."""
        error = peer.hear(Abort).error
        told = self.told.of(name)["error"]
        assert told["class"] == error and "\n" not in told["message"], told
        self.figures.ended[error] = self.figures.ended.get(error, 0) + 1
        assert error in {*BROKEN, *also}, told
        peer.close()

    def _talk(self) -> None:
        """A source that was let in says anything, until it is thrown out."""
        peer, _, name = self._let_in(capabilities=self.draw.choice(([], [PAGE_SUMS])))
        for message in itertools.islice(mutants(EXAMPLES, self.draw.randrange(1 << 30)), 20):
            peer.socket.send(message)
            self.figures.messages += 1
        peer.socket.send(encode(Run()))
        self._over(peer, name, "PeerLost")  # of a ping that says that more was said

    # ---- channels ----------------------------------------------------------------------------

    def _channels(self) -> None:
        """Damaged frames, shapes that are none and strangers with other tokens change nothing; then
        whole frames that make no sense end it."""
        peer, welcome, name = self._let_in()
        where = parse_endpoint(self.there.endpoint)
        channels = [
            _Peer(self.context, str(where.sibling(endpoint)), token)
            for endpoint, token in zip(welcome.endpoints, welcome.tokens, strict=True)
        ]
        stray = _Peer(self.context, str(where.sibling(welcome.endpoints[0])), b"no such token...")
        with contextlib.suppress(zmq.Again):  # it is not let in, and has nowhere to send to
            for _ in range(100):
                stray.socket.send_multipart(self._damaged(), zmq.NOBLOCK)
        for channel in channels:
            for _ in range(_FRAMES):
                channel.socket.send_multipart(self._damaged())
                self.figures.frames += 1
        for channel in channels:  # all of it was looked at, and nothing of it was taken
            channel.socket.send(wire.encode_control(wire.Frame(wire.Kind.SYNC, 0, 1)))
            assert channel.socket.poll(_WAIT_MS), "a channel says nothing"
            answer = wire.decode(channel.socket.recv())
            assert answer.kind is wire.Kind.SYNC_ACK and answer.frames == 0
        for _ in range(self.draw.randrange(8)):
            channels[0].socket.send_multipart([sealed(self._mutant()), self._payload()])
            self.figures.frames += 1
        nowhere = wire.Frame(wire.Kind.DATA, 1, 2, block=999, zero=(np.zeros(1, int),) * 2)
        channels[1].socket.send(wire.encode_data(nowhere))
        self._over(peer, name)
        for channel in (*channels, stray):
            channel.close()

    def _mutant(self) -> bytes:
        return mutate(self.draw, self.draw.choice(self._frame_seeds), self._frame_seeds)

    def _payload(self) -> bytes:
        return self.draw.randbytes(self.draw.choice((0, 1, 100, PAGE)))

    def _damaged(self) -> list[bytes]:
        """Parts that are no frame: its checksum is wrong, or they are too many."""
        meta = self._mutant()
        while meta in self._frame_seeds:
            meta = self._mutant()
        return [meta, *(self._payload() for _ in range(self.draw.choice((0, 1, 1, 1, 2, 4))))]

    # ---- good ones ---------------------------------------------------------------------------

    def good(self) -> None:
        """A migration that ends right, while others misbehave."""
        name = f"good-{next(self._numbers)}"
        peer, _, bad = self._let_in()
        flood = _Peer(self.context, self.there.endpoint)
        for message in itertools.islice(mutants(EXAMPLES, self.draw.randrange(1 << 30)), 100):
            flood.socket.send(message)
            self.figures.messages += 1
        sent = run("send", f"image:{self.image}", self.there.endpoint, "--name", name,
                   "--workers", "2", timeout=120)  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        assert (self.into / name).read_bytes() == self.image.read_bytes()
        (self.into / name).unlink()
        assert self.told.of(name)["status"] == "completed"
        self.figures.good += 1
        flood.close()
        # it was silent, or is told now
        peer.socket.send(encode(Run()))
        assert peer.hear(Abort).error in {*BROKEN, "PeerLost"}
        assert self.told.of(bad)["error"]
        peer.close()

    def holdings(self) -> tuple[int, int, int]:
        """Bytes, descriptors and shared names of the receiver and its processes."""
        root = psutil.Process(self.there.process.pid)
        family = [root, *root.children(recursive=True)]
        names = [name for name in os.listdir("/dev/shm") if f"-{root.pid}-" in name]
        return (
            sum(one.memory_full_info().uss for one in family), root.num_fds(), len(names),
        )  # fmt: skip


def fuzz(folder: Path, *, seconds: float = 0, bouts: int = 0, seed: int = 0) -> Figures:
    """`bouts` of them, or as many as there are in `seconds`."""
    into, image = folder / "into", folder / "image"
    into.mkdir()
    image.write_bytes(pattern(500))
    with (
        receiver("--into", f"image:{into}/") as there,
        zmq.Context() as context,
    ):
        ring = Bouts(there, context, into, image, seed)
        try:
            for _ in range(3):  # from now on nothing is there for the first time
                ring.bout()
            ring.good()
            ring.figures = Figures()
            before, began = ring.holdings(), time.monotonic()
            while ring.figures.bouts < bouts or time.monotonic() - began < seconds:
                ring.bout()
                if ring.figures.bouts % _GOOD_EVERY == 0:
                    ring.good()
            ring.good()
            ring.figures.seconds = time.monotonic() - began
            until(lambda: ring.holdings()[2] == before[2], "the last one's names are gone")
            after = ring.holdings()
            ring.figures.grown = after[0] - before[0]
            assert ring.figures.grown < _MOST_GROWTH, (before, after)
            assert after[1] - before[1] < _MOST_DESCRIPTORS, (before, after)
            there.process.send_signal(signal.SIGINT)
            ring.told.join()
        finally:
            if there.process.poll() is None:
                there.process.kill()
            ring.told.join()
    return ring.figures


def main(seconds: float, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        print(fuzz(Path(folder), seconds=seconds, seed=seed), flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the receiver is ended too
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(**vars(parser.parse_args())))
