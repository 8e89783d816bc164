"""A multifd receiver: one process, one channel. Checks, decompresses, places, acknowledges.

Treats every byte as hostile: the frame layer bounds sizes, this one checks blocks and pages
against the layout before anything is decompressed or written. A message from an identity
other than the channel's token is a stray; it is counted and dropped. Counterpart: sender.py;
in QEMU, multifd_recv_thread in migration/multifd.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import zmq

from ..transport.channel import ReceivingChannel
from ..transport.codecs import HERE_ID, Decoders
from ..transport.curve import Binds, Dials
from ..transport.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    VerificationFailed,
    WorkerDied,
)
from ..transport.links import (
    NOBLOCK,
    Endpoint,
    Gate,
    connect,
    open_channel,
    parse_endpoint,
    short,
    unbind,
)
from ..transport.pages import PAGE_SIZE, Runs, apart, check_runs, total_pages
from ..transport.wire import Buffer, Delta, Frame, content_matches
from . import jobs
from .checks import Checks, ReadBack
from .counters import Counters
from .deltas import restore
from .digest import CHUNK_BYTES, part_digest
from .guests.base import ArmedMemory
from .here import HereReader
from .placing import FramePlacer, GuestPlacer
from .priority import become_background
from .process import HEARTBEAT_SECONDS, Desk, run_worker, traced
from .ram import RamBlock
from .received import Received, Waiting
from .snapshot_file import CheckedBlock

_CODEC_FIELD = {1: "lz4_pages", 2: "zstd_pages", 3: "zlib_pages"}


@dataclass
class ArmedGuest:
    """An armed guest, as a receiver needs it. `tell`: the pipe to the fault process; `removing`: a
    lock, if the guest may give memory back (placing.py)."""

    memory: ArmedMemory
    received: Received
    waiting: Waiting
    tell: Any
    removing: Any = None


@dataclass
class ReceiverJob:
    """Everything a receiver needs, pickled into it once.

    `listen`: where to listen; an ipc path is its own, a tcp port is 0.
    `fresh[i]`: block i reads as zero, so round 1 need not clear anything.
    `writing`: held while pages are written. The kernel lets one writer into a file at a time
    and has the others spin; waiting here instead leaves the processor to the senders (two
    receivers, one fresh file: half the processor time a byte, same rate).
    `guest`: what postcopy needs; `installing`: the guest runs already; `dial`: `listen` is where
    the sender does, and we connect. `checks`: what is written is read back, some of it or
    (`read_all`) all; `curve`: only with keys; `deltas`: pages may come as what differs from what
    is there (deltas.py); `here`: blocks of a snapshot whose pages may be named, and are read here
    (here.py).
    """

    blocks: list[RamBlock]
    counters: Counters
    listen: str
    token: bytes
    fresh: list[bool]
    writing: Any
    guest: ArmedGuest | None = None
    installing: bool = False
    dial: bool = False
    checks: Checks | None = None
    read_all: bool = False
    curve: Binds | Dials | None = None
    deltas: bool = False
    here: Sequence[CheckedBlock] = ()

    def close(self) -> None:
        """In the receiver, when nothing looks at any of it: it may have another job after this."""
        self.writing = None  # traced, it holds the ring
        self.counters.close()
        if self.checks is not None:
            self.checks.close()
        for block in (*self.blocks, *self.here):
            block.file.close()


# Nobody writes a frame for this long: whoever holds the lock is dead or stopped.
_LOCK_SECONDS = 30.0


def main(pipe: Connection, index: int, job: ReceiverJob) -> bool:
    """True if it was told to stop, and did."""
    name = f"pf-recv-{index}"
    stopped = run_worker(
        name, pipe, job.counters, index, lambda desk: traced(desk, Receiver)(desk, job).run()
    )
    job.close()
    return stopped


class Receiver:
    """The process's one object."""

    def __init__(self, desk: Desk, job: ReceiverJob) -> None:
        self.desk, self.job, self.row = desk, job, desk.row
        self.channel = ReceivingChannel()
        self.decoders = Decoders()
        self.placer: FramePlacer | None = None
        self.read_back: ReadBack | None = None
        if job.checks is not None:
            self.read_back = ReadBack(job.blocks, job.checks, job.read_all)
        self.here = HereReader(job.here) if job.here else None
        if job.installing:
            self._start_installing()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.gate: Gate | None = None

    def run(self) -> None:
        endpoint = self._link()
        try:
            self.desk.say(jobs.Ready(short(endpoint) if endpoint is not None else ""))
            poller = zmq.Poller()
            poller.register(self.desk.pipe.fileno(), zmq.POLLIN)
            poller.register(self.socket, zmq.POLLIN)
            if self.gate is not None:
                poller.register(self.gate.socket, zmq.POLLIN)
            while self._commands():
                while self._message():
                    pass
                if self.gate is not None:
                    self.gate.answer()
                poller.poll(int(HEARTBEAT_SECONDS * 1000))
        finally:
            if endpoint is not None:
                unbind(self.socket, endpoint)
            else:
                self.socket.close()
            if self.gate is not None:
                self.gate.close()
            self.context.term()
            self.read_back = None  # its views end before their segment

    def _link(self) -> Endpoint | None:
        """Listen, or dial; where we listen. `prefix`: what stands before an answer on a ROUTER."""
        where, curve = parse_endpoint(self.job.listen), self.job.curve
        if self.job.dial:
            assert not isinstance(curve, Binds)
            self.prefix: list[bytes] = []
            self.socket = connect(
                self.context, where, self.job.token, control=False, data=True, curve=curve
            )
            self.socket.send(b"")  # we are here
            return None
        self.prefix = [self.job.token]
        assert not isinstance(curve, Dials)
        self.gate, self.socket, endpoint = open_channel(self.context, where, self.job.token, curve)
        return endpoint

    def _commands(self) -> bool:
        """Jobs of the coordinator; False when told to stop."""
        while self.desk.waiting():
            job = self.desk.take()
            match job:
                case jobs.Stop():
                    return False
                case jobs.Digest():
                    block = self.job.blocks[job.block]
                    digest = part_digest(block, job.part, bytearray(CHUNK_BYTES))
                    self.desk.say(jobs.DigestDone(job.block, job.part, digest))
                case jobs.Check():
                    if self.read_back is None:
                        raise LocalProtocolError("a check of what was never read back")
                    wrong = self.read_back.unsent(job.block, job.part)
                    self.desk.say(jobs.CheckDone(job.block, job.part, wrong))
                case jobs.Postcopy():
                    self._start_installing()
                    self.desk.say(jobs.Ready())
                case _:
                    raise LocalProtocolError(f"a receiver was told {type(job).__name__}")
        return True

    def _start_installing(self) -> None:
        guest = self.job.guest
        if guest is None:
            raise LocalProtocolError("postcopy into memory that is not armed")
        become_background()
        placer = GuestPlacer(guest.memory, guest.received, self.row, guest.removing)
        self.placer = FramePlacer(self.job.blocks, placer, guest.waiting, guest.tell.fileno())

    def _message(self) -> bool:
        """Handle one message; False if none is waiting or it is time to look at the pipe."""
        try:
            parts = self.socket.recv_multipart(NOBLOCK, copy=False)
        except zmq.Again:
            self._answer(idle=True)
            return False
        if self.prefix:
            if parts[0].bytes != self.job.token:
                parts = []
            parts = parts[1:]
        if not 1 <= len(parts) <= 2:
            self.row.add("stray_frames", 1)
            return True
        payload: Buffer = parts[1].buffer if len(parts) == 2 else b""
        data = self.channel.receive(parts[0].buffer, payload)
        self.row.set("lost_frames", self.channel.lost)
        if data is not None:
            if self._place(data.frame, payload):
                self.channel.placed(data.frame)
            else:
                self.channel.not_placed(data.frame)
                self.row.set("lost_frames", self.channel.lost)
            self.row.add("wire_bytes", sum(len(part.buffer) for part in parts))
        self._answer(idle=False)
        return not self.desk.waiting()

    def _answer(self, *, idle: bool) -> None:
        for answer in self.channel.answers(idle=idle):
            try:
                self.socket.send_multipart([*self.prefix, answer])
            except zmq.ZMQError as e:
                if e.errno != zmq.EHOSTUNREACH:
                    raise
                # the sender is gone for the moment; what it does not hear it sends again

    def _block_of(self, frame: Frame) -> RamBlock:
        """The block of a frame; RemoteProtocolError unless each of its pages is there, once."""
        if frame.block >= len(self.job.blocks):
            raise RemoteProtocolError(f"frame for block {frame.block}, which was not announced")
        block = self.job.blocks[frame.block]
        tables = frame.tables
        for runs in tables:
            if not check_runs(runs, block.pages):
                raise RemoteProtocolError(f"frame with pages outside of block {block.name}")
        if not apart(tables):
            raise RemoteProtocolError(f"frame that has a page of block {block.name} twice")
        return block

    def _place(self, frame: Frame, payload: Buffer) -> bool:
        """Put the pages of a frame where they belong; False if they are made of other pages than
        are here: then nothing was written."""
        block = self._block_of(frame)
        restored: Buffer = b""
        if frame.delta is not None:
            made = self._restore(block, frame.delta, payload)
            if made is None:
                return False
            restored = made
        if self.placer is None and (self.channel.round > 1 or not self.job.fresh[frame.block]):
            block.clear(frame.zero)
        view = memoryview(payload)
        raw = frame.raw_size
        packed, unpacked = self._unpacked(frame, view)
        # who reads pages itself has no sender to leave the processor to
        turns = self.placer is None or self.here is None
        if turns and not self.job.writing.acquire(timeout=_LOCK_SECONDS):
            raise WorkerDied("another receiver does not finish a write")
        try:
            if self.placer is None:
                _write_runs(block, frame.raw, view[:raw])
                _write_runs(block, packed, unpacked)
                if frame.delta is not None:
                    _write_runs(block, frame.delta.pages, restored)
            else:
                self.placer.place(frame.block, frame.raw, view[:raw])
                self.placer.place(frame.block, packed, unpacked)
                self.placer.place(frame.block, frame.zero, b"")
        finally:
            if turns:
                self.job.writing.release()
        if self.read_back is not None:
            self._compare(frame, (view[:raw], unpacked, restored))
        if self.placer is not None:
            self.placer.tell_arrivals(frame.block, (frame.raw, frame.packed, frame.zero))
        self._count(frame)
        return True

    def _unpacked(self, frame: Frame, payload: memoryview) -> tuple[Runs, Buffer]:
        """Those packed pages of a frame that are to be placed, and their content."""
        runs, raw = frame.packed, frame.raw_size
        if not len(runs[0]):
            return runs, b""
        packed = payload[raw : raw + frame.packed_size]
        if frame.codec == HERE_ID:
            return self._read_here(frame, packed)
        codec = self.decoders.get(frame.codec)
        content = codec.decompress(packed, total_pages(runs) * PAGE_SIZE)
        if self.read_back is not None and not content_matches(frame, (payload[:raw], content)):
            raise self._not_the_same(frame, runs, "was to get other than was read")
        return runs, content

    def _read_here(self, frame: Frame, name: memoryview) -> tuple[Runs, Buffer]:
        """Pages that a frame names, as they are in the file: those that are wanted still."""
        if self.here is None or not self.here.has(frame.block, name):
            raise RemoteProtocolError("frame that names pages of a file which is not here")
        runs = frame.packed
        if self.placer is not None:
            runs = self.placer.wanted(frame.block, runs)
        return runs, self.here.read(frame.block, runs)

    def _restore(self, block: RamBlock, delta: Delta, payload: Buffer) -> Buffer | None:
        """The pages that come of a frame's deltas, the end of its payload."""
        if not self.job.deltas or self.placer is not None:
            raise RemoteProtocolError("frame with deltas, where pages travel whole")
        return restore(block, delta, memoryview(payload)[-delta.size :], self.decoders)

    def _compare(self, frame: Frame, contents: tuple[Buffer, Buffer, Buffer]) -> None:
        """Read back what was placed: raw pages, packed pages, those of deltas."""
        assert self.read_back is not None
        self.read_back.note(frame.block, frame.zero, False)
        for runs, content in zip(frame.tables[1:], contents, strict=True):
            if not self.read_back.same(frame.block, runs, content, frame.seq):
                raise self._not_the_same(frame, runs, "does not hold what was written")
            self.read_back.note(frame.block, runs, True)

    def _not_the_same(self, frame: Frame, runs: Runs, what: str) -> VerificationFailed:
        block = self.job.blocks[frame.block]
        return VerificationFailed(
            f"{block.file.name} {what}, in some of {total_pages(runs)} pages from page "
            f"{int(runs[0][0])} of {block.name}",
            blocks=[block.name],
        )

    def _count(self, frame: Frame) -> None:
        zero, raw, packed, delta = map(total_pages, frame.tables)
        self.row.add("duplicate", zero)
        self.row.add("normal", raw + packed + delta)
        self.row.add("raw_pages", raw)
        self.row.add("delta_pages", delta)
        if packed and frame.codec in _CODEC_FIELD:
            self.row.add(_CODEC_FIELD[frame.codec], packed)
        self.row.add("frames", 1)


def _write_runs(block: RamBlock, runs: Runs, content: Buffer) -> None:
    view, at = memoryview(content), 0
    for first, count in zip(runs[0].tolist(), runs[1].tolist(), strict=True):
        block.write(first, view[at : at + count * PAGE_SIZE])
        at += count * PAGE_SIZE
