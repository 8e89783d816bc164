"""Between the two ends: passes on what each says on every link, and does to it what it is told.

It stands in for the destination: it listens, and what the destination says of its own channels
(Welcome, Resumed) is said anew with the relay's. For each peer that connects here one connects
there under the same identity. Runs in an event loop; nothing is kept in order but each link.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import zmq
import zmq.asyncio
from cells import Fault, Line

from pageferry.transport import messages, urgent, wire
from pageferry.transport.curve import CHANNEL_USER, password
from pageferry.transport.links import parse_endpoint
from pageferry.transport.messages import Ping, Resumed, Round, Welcome

_LINES = {  # what goes there, what comes back
    "control": (Line.CONTROL, Line.CONTROL),
    "data": (Line.DATA, Line.ACKS),
    "urgent": (Line.URGENT, Line.REQUESTS),
}


def _counts(line, parts):
    """Whether a fault on `line` is for this message: pings and barriers are another matter, and
    what is said of a round is for the display."""
    match line:
        case Line.CONTROL:
            return not isinstance(messages.decode(parts[0]), Ping | Round)
        case Line.DATA:
            return len(parts) == 2 and wire.decode(parts[0]).kind is wire.Kind.DATA
        case Line.ACKS:
            return wire.decode(parts[0]).kind is wire.Kind.ACK
        case Line.URGENT:
            return urgent.decode(parts[0]).kind in (urgent.Kind.PAGE, urgent.Kind.ZERO)
        case _:
            return urgent.decode(parts[0]).kind == urgent.Kind.REQUEST


def _damaged(parts, draw):
    """One bit is another: in the middle of the last part, or anywhere."""
    index = draw.randrange(len(parts)) if draw else len(parts) - 1
    part = bytearray(parts[index])
    part[draw.randrange(len(part)) if draw else len(part) // 2] ^= 0x10
    return [*parts[:index], bytes(part), *parts[index + 1 :]]


class _Pipe:
    """One link: a ROUTER here, and for each peer of it a DEALER there."""

    def __init__(self, relay, kind, there):
        self.relay, self.kind, self.there = relay, kind, there
        self.port = 0
        self._open()

    def _open(self):
        self.dealers, self.tasks, self.heard = {}, [], set()
        self.router = self.relay.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if self.kind != "control":  # a channel is joined with its token, which is the identity
            self.router.setsockopt(zmq.PLAIN_SERVER, 1)
            self.router.setsockopt(zmq.ZAP_DOMAIN, b"relay")
        self.router.bind(f"tcp://127.0.0.1:{self.port or '*'}")
        self.port = int(self.router.getsockopt(zmq.LAST_ENDPOINT).decode().rpartition(":")[2])
        self._task(self._out())

    def _task(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        task.add_done_callback(lambda done: done.cancelled() or done.result())
        self.tasks.append(task)

    async def _out(self):
        while True:
            identity, *parts = await self.router.recv_multipart()
            if identity not in self.dealers:
                self.dial(identity)
            self.heard.add("there")
            send = self.dealers[identity].send_multipart
            await self.relay.pass_on(_LINES[self.kind][0], (self, identity), parts, send)

    def dial(self, identity):
        dealer = self.dealers[identity] = self.relay.context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.setsockopt(zmq.ROUTING_ID, identity)
        if self.kind != "control":
            dealer.setsockopt(zmq.PLAIN_USERNAME, CHANNEL_USER)
            dealer.setsockopt(zmq.PLAIN_PASSWORD, password(identity))
        dealer.connect(str(self.there))
        self._task(self._back(identity, dealer))

    async def _back(self, identity, dealer):
        async def send(parts):
            await self.router.send_multipart([identity, *parts])

        while True:
            parts = await dealer.recv_multipart()
            self.heard.add("back")
            if self.kind == "control":
                parts = [self.relay.rewritten(parts[0])]
            await self.relay.pass_on(_LINES[self.kind][1], (self, identity), parts, send)

    async def close(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for sock in (self.router, *self.dealers.values()):
            sock.close()

    async def reset(self):
        """The connections break, and are made again; each peer is who it was."""
        known = list(self.dealers)
        await self.close()
        while True:
            with contextlib.suppress(zmq.ZMQError):  # its port is let go of by a thread
                self._open()
                break
            await asyncio.sleep(0.005)
        for identity in known:
            self.dial(identity)


class Relay:
    """All links of one migration. `endpoint`: where the source is to connect; `draw`: a generator
    of random numbers, if damage is to be anywhere."""

    def __init__(self, there, draw=None):
        self._draw = draw
        self.there = parse_endpoint(there)
        self.context = zmq.asyncio.Context()
        self._zap = self.context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._admitting = asyncio.ensure_future(self._admit())
        self.pipes = [_Pipe(self, "control", self.there)]
        self.endpoint = f"tcp://127.0.0.1:{self.pipes[0].port}"
        self._fault = None  # (line, fault), not yet done
        self._kept = None  # line, peer, message: it is to come after the next
        self.done = asyncio.Event()
        self.at = 0.0

    def rewritten(self, data):
        """What the destination says, with channels that lead through here."""
        message = messages.decode(data)
        if not isinstance(message, Welcome | Resumed):
            return data
        # those of the connection before are of no use any more, and stay until the end
        channels = [
            self._beside("data", where, token)
            for where, token in zip(message.endpoints, message.tokens, strict=True)
        ]
        last = message.urgent
        if last is not None:
            last = (self._beside("urgent", *last), last[1])
        return messages.encode(msgspec.structs.replace(message, endpoints=channels, urgent=last))

    def _beside(self, kind, where, token):
        pipe = _Pipe(self, kind, self.there.sibling(where))
        pipe.dial(token)  # the destination is to know the source before that says something
        self.pipes.append(pipe)
        return f"tcp:{pipe.port}"

    def do(self, line, fault):
        """To the next message of `line`."""
        self._fault = (line, fault)

    async def reset(self, line):
        """Returns when the ends hear from each other again, where they do anyway."""
        kind = {Line.CONTROL: "control", Line.DATA: "data", Line.URGENT: "urgent"}[line]
        for pipe in [p for p in self.pipes if p.kind == kind]:
            await pipe.reset()
            while kind == "control" and len(pipe.heard) < 2:
                await asyncio.sleep(0.01)

    async def pass_on(self, line, peer, parts, send):
        if self._kept is not None and self._kept[:2] == (line, peer) and _counts(line, parts):
            kept, self._kept = self._kept[2], None
            self._now()
            await send(parts)
            await send(kept)
            self.done.set()
            return
        if self._fault is None or self._fault[0] is not line or not _counts(line, parts):
            await send(parts)
            return
        fault, self._fault = self._fault[1], None
        self._now()
        match fault:
            case Fault.CORRUPT:
                await send(_damaged(parts, self._draw))
            case Fault.LOSE:
                pass
            case Fault.REPEAT:
                await send(parts)
                await send(parts)
            case Fault.REORDER:
                self._kept = (line, peer, parts)
                return
        self.done.set()

    def _now(self):
        self.at = asyncio.get_running_loop().time()

    async def _admit(self):
        """Whoever comes may join: what lies behind looks itself."""
        while True:
            request = await self._zap.recv_multipart()
            await self._zap.send_multipart([b"1.0", request[1], b"200", b"", b"x", b""])

    async def close(self):
        self._admitting.cancel()
        await asyncio.gather(self._admitting, return_exceptions=True)
        self._zap.close()
        for pipe in self.pipes:
            await pipe.close()
        self.context.term()
