"""A multifd sender: one process, one channel. Reads guest memory, compresses, sends.

Takes extents from the coordinator, cuts their dirty pages into batches, keeps as many bytes
in flight as credit allows, and answers when every page of the extent is acknowledged. The
order of its writes to the page table is in page_table.py. Counterpart: receiver.py; in QEMU,
multifd_send_thread in migration/multifd.c.

A buffer handed to ZeroMQ without a copy must not change until it is sent. A batch of a live
guest is copied first (QEMU learnt that the hard way: "multifd: Copy pages before compressing
them with zlib"); memory that changes anyway is caught by the checksum and sent again.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from ..transport.channel import Acked, Lost, SendingChannel, Synced
from ..transport.errors import LocalProtocolError, PeerLost
from ..transport.links import connect, parse_endpoint
from ..transport.pages import NO_RUNS, Pages, runs_of
from ..transport.wire import MAX_RUNS, Frame, Kind, encode_data
from . import jobs
from .bandwidth import Bandwidth
from .batches import Batch, BatchMaker, BlockReader, page_hashes
from .counters import Counters
from .digest import CHUNK_BYTES, part_digest
from .page_table import CLEAN, DIRTY, IN_FLIGHT, PageTable
from .process import HEARTBEAT_SECONDS, Desk, run_worker
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
# No acknowledgement for this long with frames in flight: this channel is gone. A peer or a link
# that is gone altogether shows on the control link, within four seconds.
STALL_SECONDS = 30.0


@dataclass
class SenderJob:
    """Everything a sender needs, pickled into it once."""

    blocks: list[RamBlock]
    table: PageTable
    counters: Counters
    bandwidth: Bandwidth
    hashes: Segment | None
    codec: str
    level: int | None
    batch_pages: int
    credit: int = CREDIT


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


class _Stopped(Exception):
    """Stop came in the middle of something."""


def main(pipe: Connection, index: int, job: SenderJob) -> None:
    run_worker(f"pf-send-{index}", pipe, job.counters, index, lambda desk: Sender(desk, job).run())


class Sender:
    """The process's one object."""

    def __init__(self, desk: Desk, job: SenderJob) -> None:
        self.desk, self.job, self.row = desk, job, desk.row
        self.tables: dict[int, Any] = {}
        self.first_page = np.concatenate(([0], np.cumsum([b.pages for b in job.blocks]))).tolist()
        self.maker = BatchMaker(job.codec, job.level, self.row)
        self.channel: SendingChannel[_Sent] = SendingChannel(job.credit)
        self.readers: dict[int, BlockReader] = {}
        self.queue: deque[jobs.AnyJob] = deque()
        self.last_answer = time.monotonic()
        self.started = False
        self.round_trip = float("inf")  # the shortest seen, seconds
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket: zmq.Socket[bytes] | None = None
        self.poller = zmq.Poller()
        self.poller.register(desk.pipe.fileno(), zmq.POLLIN)

    def run(self) -> None:
        self.desk.say(jobs.Ready())
        try:
            while True:
                self._take_jobs()
                if self.queue:
                    self._do(self.queue.popleft())
                else:
                    self._wait()
        except _Stopped:
            pass
        finally:
            if self.socket is not None:
                self.socket.close()
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
                self.socket = connect(self.context, endpoint, job.token, control=False)
                self.poller.register(self.socket, zmq.POLLIN)
            case jobs.Extent():
                self._send_extent(job)
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
        table = self._table(job.block)
        dirty = np.flatnonzero(table[job.first : job.first + job.count] == DIRTY) + job.first
        for at in range(0, len(dirty), _WINDOW):
            self._send_window(extent, job, dirty[at : at + _WINDOW])
        extent.all_sent = True
        self._answer(extent)

    def _send_window(self, extent: _Extent, job: jobs.Extent, pages: Pages) -> None:
        """Zero pages first, all in one frame; the others batch by batch."""
        zero = self._reader(job.block).zero(pages)
        if zero.any():
            self._send_zero(extent, job.block, pages[zero])
            pages = pages[~zero]
        for at in range(0, len(pages), self.job.batch_pages):
            self._send_batch(extent, job.block, pages[at : at + self.job.batch_pages], job.live)
            self._take_jobs()

    def _send_zero(self, extent: _Extent, block: int, pages: Pages) -> None:
        hashes = np.zeros(len(pages), np.uint64) if self.job.hashes is not None else None
        self._send(extent, block, pages, hashes, Batch(0, runs_of(pages), NO_RUNS, NO_RUNS, []))

    def _answer(self, extent: _Extent) -> None:
        if extent.all_sent and extent.waiting == 0:
            self.desk.say(jobs.ExtentDone(extent.lost))

    def _send_batch(self, extent: _Extent, block: int, pages: Pages, live: bool) -> None:
        content = self._reader(block).read(pages, copy=live)
        hashes = page_hashes(content) if self.job.hashes is not None else None
        self._send(extent, block, pages, hashes, self.maker.make(pages, content))

    def _send(self, extent: _Extent, block: int, pages: Pages, hashes: Any, batch: Batch) -> None:
        """Send one frame, when credit and bandwidth allow."""
        self._wait_for_credit(batch.size)
        self._wait_for_bandwidth(batch.size)
        assert self.socket is not None
        meta = encode_data(
            Frame(
                Kind.DATA, self.channel.next_seq(), self.channel.round, block, batch.codec,
                batch.zero, batch.raw, batch.packed,
            ),
            batch.payload,
        )  # fmt: skip
        self._record(_Sent(extent, block, pages, hashes, time.monotonic()), batch, len(meta))
        if batch.payload:
            self.socket.send(meta, zmq.SNDMORE)
            # two parts (raw and packed) become one buffer: the copy costs less than a frame
            whole = batch.payload[0] if len(batch.payload) == 1 else b"".join(batch.payload)
            self.socket.send(whole, copy=False)
        else:
            self.socket.send(meta)
        self._read_answers()

    def _record(self, sent: _Sent, batch: Batch, meta: int) -> None:
        """Own the pages before their first byte is sent."""
        if self.channel.idle:
            self.last_answer = time.monotonic()
        self._store(self._table(sent.block), sent.pages, IN_FLIGHT)
        sent.extent.waiting += 1
        self.channel.sent(sent, batch.size + meta, len(sent.pages))
        zero = int(batch.zero[1].sum())
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
        delay = self.job.bandwidth.reserve(size)
        if delay == 0:
            return
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
        self._take_jobs()
        if self.socket is not None:
            self._read_answers()
        if time.monotonic() - self.last_answer > STALL_SECONDS and not self.channel.idle:
            raise PeerLost(f"no acknowledgement for {STALL_SECONDS:.0f} s on a channel")

    def _read_answers(self) -> None:
        assert self.socket is not None
        # asking first costs 2 us; an exception for "nothing there" 15
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            meta = self.socket.recv(zmq.NOBLOCK)
            self.last_answer = time.monotonic()
            for event in self.channel.receive(meta):
                if not isinstance(event, Synced):
                    self._settle(event)

    def _settle(self, event: Acked[_Sent] | Lost[_Sent]) -> None:
        sent = event.token
        if isinstance(event, Acked):
            if (took := time.monotonic() - sent.at) < self.round_trip:
                self.round_trip = took
                self.channel.credit = min(self.job.credit + int(took * _FAST_LINK), _MAX_CREDIT)
            if sent.hashes is not None:
                self._hash_table(sent.block)[sent.pages] = sent.hashes
            self._store(self._table(sent.block), sent.pages, CLEAN)
        else:
            self._store(self._table(sent.block), sent.pages, DIRTY)
            sent.extent.lost += len(sent.pages)
            self.row.add("lost_frames", 1)
            self.row.add("lost_pages", len(sent.pages))
        sent.extent.waiting -= 1
        self._answer(sent.extent)

    def _barrier(self, job: jobs.Barrier) -> None:
        if self.channel.round != job.round:
            raise LocalProtocolError(f"barrier of round {job.round} in {self.channel!r}")
        assert self.socket is not None
        self.socket.send(self.channel.sync())
        self.last_answer = begin = time.monotonic()
        while self.channel.round == job.round:
            self._wait()
            if time.monotonic() - begin > STALL_SECONDS:
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
