"""A multifd sender: one process, one channel. Reads guest memory, compresses, sends.

Takes extents from the coordinator, cuts their dirty pages into batches, keeps as many bytes
in flight as credit allows, and answers when every page of the extent is acknowledged. The
order of its writes to the page table is in page_table.py. Counterpart: receiver.py; in QEMU,
multifd_send_thread in migration/multifd.c.

In postcopy it is the background: it claims pages piece by piece, because the postcopy process takes
pages out of its extents, stands aside while that answers a request, and keeps little in flight.

A buffer handed to ZeroMQ without a copy must not change until it is sent. A batch of a live
guest is copied first (QEMU learnt that the hard way: "multifd: Copy pages before compressing
them with zlib"); memory that changes anyway is caught by the checksum and sent again.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from ..transport.channel import Acked, Lost, SendingChannel, Synced
from ..transport.codecs import HERE_ID
from ..transport.errors import LocalProtocolError, PeerLost
from ..transport.links import (
    EVENTS,
    NOBLOCK,
    POLLIN,
    SNDMORE,
    Endpoint,
    Gate,
    connect,
    open_channel,
    parse_endpoint,
    short,
    unbind,
)
from ..transport.pages import NO_RUNS, PAGE_SIZE, Pages, runs_of, total_pages
from ..transport.wire import MAX_RUNS, Frame, Kind, encode_data, payload_digest
from . import jobs
from .bandwidth import Bandwidth
from .batches import Batch, BatchMaker, BlockReader, page_hashes
from .counters import Counters
from .deltas import DeltaMaker
from .digest import CHUNK_BYTES, part_digest
from .here import named
from .page_cache import PageCache
from .page_table import CLEAN, DIRTY, IN_FLIGHT, PageTable
from .postcopy import ROUTED
from .preemption import Preemption, Reader, page_key
from .priority import become_background
from .process import HEARTBEAT_SECONDS, Desk, run_worker, traced
from .ram import RamBlock
from .segments import Segment

# Credit: bytes in flight a channel. Deep enough to keep both ends and libzmq's threads busy
# (four frames), shallow enough to stay in the cache: on two cores 8 MiB in flight cost a
# fifth of the throughput. A link with a long round trip gets what it holds on top.
CREDIT = 4 << 20
_MAX_CREDIT = 64 << 20
# Pages looked at together for zeros: as many as a frame's run table can hold.
_WINDOW = MAX_RUNS
_FAST_LINK = 1.25e9  # bytes a second a channel may fill: 10 Gbit/s
# Postcopy: pieces claimed at once while all is zero; how long to stand aside before looking
# around, and how much of that without sleeping; what may be sent at once after a pause.
_MOST_AHEAD = 64
_ASIDE_NS, _SPIN_NS = 5_000_000, 100_000
_POSTCOPY_BURST_NS = 200_000
# No acknowledgement for this long with frames in flight: this channel is gone. A peer or a link
# that is gone altogether shows on the control link, within four seconds.
STALL_SECONDS = 30.0
# Heard nothing, and sent nothing, for this long with frames in flight: an empty frame shows the
# destination whether there is a gap before it.
PROBE_SECONDS = 2.0


@dataclass
class SenderJob:
    """Everything a sender needs, pickled into it once. `preemption`: for postcopy; `route`: without
    preemption, the pipe of requests to be answered in line (postcopy.py); `sums`: frames have sums
    of their pages as they were read (checks.py); `cache`: pages sent before, of a guest that is
    live (deltas.py)."""

    blocks: list[RamBlock]
    table: PageTable
    counters: Counters
    bandwidth: Bandwidth
    hashes: Segment | None
    codec: str
    level: int | None
    batch_pages: int
    credit: int = CREDIT
    tos: int = 0
    preemption: Preemption | None = None
    route: Any = None
    sums: bool = False
    cache: PageCache | None = None

    def close(self) -> None:
        """In the sender, when nothing looks at any of it: it may have another job after this."""
        for part in (self.table, self.counters, self.bandwidth, self.hashes, self.cache):
            if part is not None:
                part.close()
        for block in self.blocks:
            block.file.close()


@dataclass(slots=True)
class _Extent:
    """An extent under way: answered when all of it is sent and nothing is in flight."""

    waiting: int = 0  # frames in flight
    all_sent: bool = False
    lost: int = 0  # pages


@dataclass(slots=True)
class _Sent:
    """What an acknowledgement settles."""

    extent: _Extent
    block: int
    pages: Pages
    hashes: Any
    at: float
    slots: Any = None


class _Stopped(Exception):
    """Stop came in the middle of something."""


def main(pipe: Connection, index: int, job: SenderJob) -> bool:
    """True if it was told to stop, and did."""
    name = f"pf-send-{index}"
    stopped = run_worker(
        name, pipe, job.counters, index, lambda desk: traced(desk, Sender)(desk, job).run()
    )
    job.close()
    return stopped


class Sender:
    """The process's one object."""

    def __init__(self, desk: Desk, job: SenderJob) -> None:
        self.desk, self.job, self.row = desk, job, desk.row
        self.tables: dict[int, Any] = {}
        self.first_page = np.concatenate(([0], np.cumsum([b.pages for b in job.blocks]))).tolist()
        self.maker = BatchMaker(job.codec, job.level, self.row)
        self.named = [named(block) for block in job.blocks]
        # In postcopy: requests wait for what is under way. Not for pages that are named: who needs
        # one reads it. Without preemption they are in line anyway.
        self.small_pieces = job.route is None and not any(self.named)
        self.deltas: DeltaMaker | None = None
        if job.cache is not None:
            self.deltas = DeltaMaker(job.cache, self.first_page, self.row)
        self.channel: SendingChannel[_Sent | None] = SendingChannel(job.credit)
        self.readers: dict[int, BlockReader] = {}
        self.queue: deque[jobs.AnyJob] = deque()
        self.last_answer = self.last_sent = time.monotonic()
        self.started = False
        # where the receiver dials us: its identity
        self.peer, self.peer_came = b"", False
        self.bound: Endpoint | None = None
        self.gate: Gate | None = None
        self.round_trip = float("inf")  # the shortest seen, seconds
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket: zmq.Socket[bytes] | None = None
        self.preemption: Reader | None = None  # in postcopy
        self.answering = False
        self.again: deque[_Sent] = deque()  # in postcopy: what was lost and is still ours
        self.poller = zmq.Poller()
        self.poller.register(desk.pipe.fileno(), zmq.POLLIN)

    def run(self) -> None:
        self.desk.say(jobs.Ready())
        try:
            while True:
                self._take_jobs()
                if self.again:
                    self._send_again()
                elif self.queue:
                    self._do(self.queue.popleft())
                elif not self._send_routed():
                    self._wait()
        except _Stopped:
            pass
        finally:
            if self.socket is not None:
                self.socket.linger = 0  # what counts was acknowledged, and nobody needs the rest
            if self.socket is not None and self.bound is not None:
                unbind(self.socket, self.bound)
            elif self.socket is not None:
                self.socket.close()
            if self.gate is not None:
                self.gate.close()
            self.context.term()

    def _take_jobs(self) -> None:
        while self.desk.waiting():
            job = self.desk.take()
            if isinstance(job, jobs.Stop):
                raise _Stopped
            self.queue.append(job)

    def _do(self, job: jobs.AnyJob) -> None:
        match job:
            case jobs.Open():
                endpoint = parse_endpoint(job.endpoint)
                self.socket = connect(
                    self.context, endpoint, job.token, control=False, tos=self.job.tos,
                    curve=job.curve,
                )  # fmt: skip
                self.poller.register(self.socket, zmq.POLLIN)
            case jobs.Listen():
                self._listen(job)
            case jobs.Extent():
                if self.preemption is not None:
                    self._send_background(job, self.preemption)
                else:
                    self._send_extent(job)
            case jobs.Postcopy():
                self._enter_postcopy()
                self.desk.say(jobs.Ready())
            case jobs.Barrier():
                self._barrier(job)
                self.desk.say(jobs.BarrierDone(job.round))
            case jobs.Scan():
                self._scan(job)
                self.desk.say(jobs.ScanDone())
            case jobs.Digest():
                digest = part_digest(self.job.blocks[job.block], job.part, bytearray(CHUNK_BYTES))
                self.desk.say(jobs.DigestDone(job.block, job.part, digest))
            case _:
                raise LocalProtocolError(f"a sender was told {type(job).__name__}")

    def _listen(self, job: jobs.Listen) -> None:
        """Let the receiver connect; its first message says that it has."""
        self.gate, self.socket, self.bound = open_channel(
            self.context, parse_endpoint(job.endpoint), job.token, job.curve, self.job.tos
        )
        self.poller.register(self.gate.socket, zmq.POLLIN)
        self.peer = job.token
        self.poller.register(self.socket, zmq.POLLIN)
        self.desk.say(jobs.Ready(short(self.bound)))

    def _wait_for_peer(self) -> None:
        begin = time.monotonic()
        while self.peer and not self.peer_came:
            self._wait()
            if time.monotonic() - begin > STALL_SECONDS:
                raise PeerLost("the receiver of a channel did not connect")

    def _table(self, block: int) -> Any:
        if block not in self.tables:
            self.tables[block] = self.job.table.view(block)
        return self.tables[block]

    def _reader(self, block: int) -> BlockReader:
        if block not in self.readers:
            self.readers[block] = BlockReader(self.job.blocks[block])
        return self.readers[block]

    def _send_extent(self, job: jobs.Extent) -> None:
        """Send all dirty pages of an extent. Its answer goes out when the last one is settled,
        which may be while the next extent is under way: the channel never runs dry between."""
        extent = _Extent()
        self.maker.use(job.codec, job.level)
        table = self._table(job.block)
        dirty = np.flatnonzero(table[job.first : job.first + job.count] == DIRTY) + job.first
        for at in range(0, len(dirty), _WINDOW):
            self._send_window(extent, job, dirty[at : at + _WINDOW])
        extent.all_sent = True
        self._answer(extent)

    def _send_window(self, extent: _Extent, job: jobs.Extent, pages: Pages) -> None:
        """Zero pages first, all in one frame; the others batch by batch."""
        if not self.named[job.block]:
            zero = self._reader(job.block).zero(pages)
            if zero.any():
                self._send_zero(extent, job.block, pages[zero], job.live)
                pages = pages[~zero]
        for at in range(0, len(pages), self.job.batch_pages):
            self._send_batch(extent, job.block, pages[at : at + self.job.batch_pages], job.live)
            self._take_jobs()

    # ---- postcopy ------------------------------------------------------------------------

    def _enter_postcopy(self) -> None:
        assert self.job.preemption is not None
        self._wait_for_peer()
        self.preemption = Reader(self.job.preemption)
        self.deltas = None  # pages of the destination are discarded from now on
        if self.job.route is None:
            become_background()
            if self.small_pieces:
                self.channel.credit = self.preemption.credit
        else:
            os.set_blocking(self.job.route.fileno(), False)
            self.poller.register(self.job.route.fileno(), zmq.POLLIN)

    def _send_background(self, job: jobs.Extent, preemption: Reader) -> None:
        """Send what is still nobody's of an extent, claiming a little at a time: more at once
        only while it is all zeros."""
        extent, table = _Extent(), self.job.table
        self.maker.use(job.codec, job.level)
        host = self.job.blocks[job.block].spec.page_size // PAGE_SIZE
        at, end, ahead = job.first, job.first + job.count, 1
        while at < end:
            piece = self._piece(preemption)
            self._my_turn(preemption, piece, 0)
            most = max(min(piece * ahead, MAX_RUNS) // host * host, host)
            pages = table.claim(job.block, at, end - at, most)
            if not len(pages):
                break
            at = int(pages[-1]) + 1
            if len(pages) > piece and self._reader(job.block).zero(pages).all():
                self._send_zero(extent, job.block, pages)
                ahead = min(ahead * 2, _MOST_AHEAD)
            else:
                zeros = self._send_claimed(extent, job.block, pages, piece)
                ahead = 2 if zeros == len(pages) else 1
        extent.all_sent = True
        self._answer(extent)

    def _send_claimed(self, extent: _Extent, block: int, pages: Pages, piece: int) -> int:
        """Send pages that are ours, standing aside between two pieces, unless somebody waits for
        just these; how many are zero."""
        assert self.preemption is not None
        zeros = 0
        for at in range(0, len(pages), piece):
            if at:
                self._my_turn(self.preemption, piece, page_key(block, int(pages[0])))
            zeros += self._send_batch(extent, block, pages[at : at + piece], live=False)
        return zeros

    def _piece(self, preemption: Reader) -> int:
        return preemption.piece_pages if self.small_pieces else self.job.batch_pages

    def _my_turn(self, preemption: Reader, piece: int, key: int) -> None:
        """Wait until a piece may be sent. `key`: the host page that is being sent; if a request is
        for that, it is not stood aside for."""
        while True:
            self._take_jobs()
            self._send_routed()
            if self.small_pieces:
                self.channel.credit = preemption.credit
            if self.again:
                self._send_again()
            elif preemption.request_open and not (key and preemption.in_front(key)):
                self._stand_aside(preemption)
            elif not self.channel.may_send(piece * PAGE_SIZE):
                self._wait_for_credit(piece * PAGE_SIZE)
            elif (delay := self.job.bandwidth.reserve(0, _POSTCOPY_BURST_NS)) > 0:
                self._pause(delay)
            else:
                return

    def _stand_aside(self, preemption: Reader) -> None:
        """Leave the processor and the link to the postcopy process."""
        begin = time.monotonic_ns()
        while preemption.request_open and (now := time.monotonic_ns()) - begin < _ASIDE_NS:
            # a request takes about 100 us: shorter than a sleep
            if now - begin < _SPIN_NS:
                os.sched_yield()
            else:
                time.sleep(_SPIN_NS / 1e9)
        self.row.add("paused_ns", time.monotonic_ns() - begin)

    def _send_again(self) -> None:
        """A lost frame's pages: nobody else may send them."""
        sent = self.again.popleft()
        sent.extent.waiting -= 1
        self.row.add("resent", len(sent.pages))
        self._send_batch(sent.extent, sent.block, sent.pages, live=False)

    def _send_routed(self) -> bool:
        """Without preemption: a page that the destination waits for, next in line."""
        if self.job.route is None or self.preemption is None or self.answering:
            return False
        try:
            data = os.read(self.job.route.fileno(), ROUTED.size)
        except BlockingIOError:
            return False
        if not data:
            return False
        block, first = ROUTED.unpack(data)
        host = self.job.blocks[block].spec.page_size // PAGE_SIZE
        pages = self.job.table.claim(block, first, host, host)
        if len(pages):
            extent = _Extent()  # nobody asked for an answer
            self.answering = True  # one after the other
            self._send_claimed(extent, block, pages, self.job.batch_pages)
            self.answering = False
        return True

    def _send_zero(self, extent: _Extent, block: int, pages: Pages, live: bool = False) -> None:
        hashes = np.zeros(len(pages), np.uint64) if self.job.hashes is not None else None
        batch = Batch(0, runs_of(pages), NO_RUNS, NO_RUNS, [])
        if self.deltas is not None:
            batch.slots = self.deltas.zero(block, pages, keep=live)
        self._send(extent, block, pages, hashes, batch)

    def _answer(self, extent: _Extent) -> None:
        if extent.all_sent and extent.waiting == 0:
            self.desk.say(jobs.ExtentDone(extent.lost))

    def _send_batch(self, extent: _Extent, block: int, pages: Pages, live: bool) -> int:
        """Send a batch; how many of its pages are zero."""
        if name := self.named[block]:
            size = len(pages) * PAGE_SIZE
            batch = Batch(HERE_ID, NO_RUNS, NO_RUNS, runs_of(pages), [name], named=size)
            self._send(extent, block, pages, None, batch)
            return 0
        content = self._reader(block).read(pages, copy=live or self.deltas is not None)
        hashes = page_hashes(content) if self.job.hashes is not None else None
        if self.deltas is None:
            batch = self.maker.make(pages, content)
        else:
            batch = self.deltas.make(
                self.maker, block, pages, content, keep=live, first_round=self.channel.round == 1
            )
        self._send(extent, block, pages, hashes, batch)
        return total_pages(batch.zero)

    def _send(self, extent: _Extent, block: int, pages: Pages, hashes: Any, batch: Batch) -> None:
        """Send one frame, when credit and bandwidth allow."""
        self._wait_for_credit(batch.size)
        self._wait_for_bandwidth(batch.size)
        assert self.socket is not None
        meta = encode_data(
            Frame(
                Kind.DATA, self.channel.next_seq(), self.channel.round, block, batch.codec,
                batch.zero, batch.raw, batch.packed, content_sum=self._content_sum(batch),
                delta=batch.delta,
            ),
            parts := batch.parts,
        )  # fmt: skip
        self.last_sent = time.monotonic()
        sent = _Sent(extent, block, pages, hashes, self.last_sent, batch.slots)
        self._record(sent, batch, len(meta))
        self._address()
        if parts:
            self.socket.send(meta, SNDMORE)
            # several parts (raw, packed, deltas) become one buffer: a copy costs less than a frame
            whole = parts[0] if len(parts) == 1 else b"".join(parts)
            self.socket.send(whole, copy=False)
        else:
            self.socket.send(meta)
        self._read_answers()

    def _address(self) -> None:
        """Where it is the sender who listens, a frame begins with whom it is for."""
        assert self.socket is not None
        if not self.peer:
            return
        try:
            self.socket.send(self.peer, SNDMORE)
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            raise PeerLost("the destination has gone from a channel") from e

    def _content_sum(self, batch: Batch) -> int | None:
        """Of a batch whose pages are all raw the payload's sum is theirs."""
        if not self.job.sums or not batch.plain:
            return None
        return payload_digest([*batch.payload[:-1], batch.plain], 0)

    def _record(self, sent: _Sent, batch: Batch, meta: int) -> None:
        """Own the pages before their first byte is sent."""
        if self.channel.idle:
            self.last_answer = time.monotonic()
        self._store(self._table(sent.block), sent.pages, IN_FLIGHT)
        sent.extent.waiting += 1
        self.channel.sent(sent, batch.size + meta, len(sent.pages))
        zero = total_pages(batch.zero)
        self.row.add("duplicate", zero)
        self.row.add("normal", len(sent.pages) - zero)
        self.row.add("wire_bytes", batch.size + meta)
        self.row.add("frames", 1)
        if not self.started:
            self.started = True
            self.row.set("first_ns", time.monotonic_ns())

    @staticmethod
    def _store(table: Any, pages: Pages, value: int) -> None:
        first, n = int(pages[0]), len(pages)
        if int(pages[-1]) - first + 1 == n:
            table[first : first + n] = value
        else:
            table[pages] = value

    def _wait_for_credit(self, size: int) -> None:
        if self.channel.may_send(size):
            if self.maker.choice is not None:
                self.maker.choice.did_not_wait()
            return
        begin, before = time.monotonic_ns(), self.channel.in_flight
        while not self.channel.may_send(size):
            self._wait()
        spent = time.monotonic_ns() - begin
        self.row.add("wait_ns", spent)
        if self.maker.choice is not None:
            self.maker.choice.waited((before - self.channel.in_flight) / max(spent, 1) * 1e9)

    def _wait_for_bandwidth(self, size: int) -> None:
        if self.preemption is not None:
            # the wait was before the pages were claimed
            self.job.bandwidth.reserve(size, _POSTCOPY_BURST_NS)
            return
        delay = self.job.bandwidth.reserve(size)
        if delay:
            self._pause(delay)

    def _pause(self, delay: int) -> None:
        """Wait `delay` nanoseconds, reading answers."""
        self.row.add("paced_ns", delay)
        until = time.monotonic() + delay / 1e9
        while (left := until - time.monotonic()) > 0:
            if self.socket is not None and self.socket.poll(int(min(left, 0.1) * 1000)):
                self._read_answers()
            elif left < 0.001:
                time.sleep(left)

    def _wait(self) -> None:
        """Sleep until the receiver or the coordinator says something, or a little while."""
        self.poller.poll(int(HEARTBEAT_SECONDS * 1000))
        if self.gate is not None:
            self.gate.answer()
        self._take_jobs()
        if self.socket is not None:
            self._read_answers()
        if self.channel.idle:
            return
        now = time.monotonic()
        if now - self.last_answer > STALL_SECONDS:
            raise PeerLost(f"no acknowledgement for {STALL_SECONDS:.0f} s on a channel")
        quiet = now - max(self.last_answer, self.last_sent)
        if quiet > PROBE_SECONDS and self.channel.may_probe():
            self._probe()

    def _probe(self) -> None:
        """An empty frame: what was lost before it is lost for certain when it arrives."""
        assert self.socket is not None
        meta = encode_data(Frame(Kind.DATA, self.channel.next_seq(), self.channel.round))
        if self._say(meta):
            self.channel.sent(None, 0, 0)
            self.last_sent = time.monotonic()

    def _say(self, meta: bytes) -> bool:
        """Send a frame that is asked for again; False if the peer is away for now, or has enough
        to read."""
        assert self.socket is not None
        try:
            self.socket.send_multipart([self.peer, meta] if self.peer else [meta], NOBLOCK)
        except zmq.ZMQError as e:
            if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _read_answers(self) -> None:
        assert self.socket is not None
        # asking first costs 2 us; an exception for "nothing there" 15
        while int(self.socket.getsockopt(EVENTS)) & POLLIN:
            if self.peer:
                parts = self.socket.recv_multipart(NOBLOCK)
                if parts[0] != self.peer or len(parts) != 2:
                    self.row.add("stray_frames", 1)
                    continue
                meta = parts[1]
            else:
                meta = self.socket.recv(NOBLOCK)
            if not meta:
                self.peer_came = True
                continue
            self.last_answer = time.monotonic()
            for event in self.channel.receive(meta):
                if not isinstance(event, Synced) and event.token is not None:
                    self._settle(event, event.token)

    def _settle(self, event: Acked[Any] | Lost[Any], sent: _Sent) -> None:
        if isinstance(event, Acked):
            if (took := time.monotonic() - sent.at) < self.round_trip and self.preemption is None:
                self.round_trip = took
                self.channel.credit = min(self.job.credit + int(took * _FAST_LINK), _MAX_CREDIT)
            if sent.hashes is not None:
                self._hash_table(sent.block)[sent.pages] = sent.hashes
            if sent.slots is not None and self.deltas is not None:
                self.deltas.acknowledge(sent.slots)
            self._store(self._table(sent.block), sent.pages, CLEAN)
        elif self.preemption is not None:
            self.again.append(sent)
            self.row.add("lost_frames", 1)
            self.row.add("lost_pages", len(sent.pages))
            return
        else:
            self._store(self._table(sent.block), sent.pages, DIRTY)
            sent.extent.lost += len(sent.pages)
            self.row.add("lost_frames", 1)
            self.row.add("lost_pages", len(sent.pages))
        sent.extent.waiting -= 1
        self._answer(sent.extent)

    def _barrier(self, job: jobs.Barrier) -> None:
        number = job.round or self.channel.round
        if self.channel.round != number:
            raise LocalProtocolError(f"barrier of round {job.round} in {self.channel!r}")
        assert self.socket is not None
        while self.again or not self.channel.idle:  # only where pages were not part of an extent
            if self.again:
                self._send_again()
            else:
                self._wait()
        self._address()
        self.socket.send(self.channel.sync())
        self.last_answer = begin = said = time.monotonic()
        while self.channel.round == number:
            self._wait()
            now = time.monotonic()
            if now - said > PROBE_SECONDS:
                self._say(self.channel.sync_again())
                said = now
            if now - begin > STALL_SECONDS:
                raise PeerLost(f"no answer to the barrier of round {job.round}")

    def _hash_table(self, block: int) -> Any:
        assert self.job.hashes is not None
        before = self.first_page[block]
        return self.job.hashes.array(np.uint64, self.job.blocks[block].pages, before * 8)

    def _scan(self, job: jobs.Scan) -> None:
        """Compare memory with the hashes of what was sent; never with what was seen before.

        A page that changed and changed back between two looks equals the look, but not what
        a sender read in between. Holes are zero and are not read.
        """
        table, sent = self._table(job.block), self._hash_table(job.block)
        now = np.zeros(job.count, np.uint64)
        block, reader = self.job.blocks[job.block], self._reader(job.block)
        starts, counts = block.data_runs(job.first, job.count)
        step = self.job.batch_pages
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            for at in range(start, start + count, step):
                n = min(step, start + count - at)
                content = reader.read(np.arange(at, at + n, dtype=np.int64), copy=False)
                now[at - job.first : at - job.first + n] = page_hashes(content)
        changed = np.flatnonzero(now != sent[job.first : job.first + job.count]) + job.first
        if len(changed):
            self._store(table, changed, DIRTY)
