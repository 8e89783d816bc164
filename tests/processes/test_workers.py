"""Real worker processes, driven by a coordinator that is the test: frames lost, damaged, late."""

import asyncio
import fcntl
import os
import random
import signal
import zlib

import numpy as np
import pytest
import xxhash
import zmq
from coordinator import Coordinator
from helpers import PAGE, pattern
from zmq.utils.monitor import parse_monitor_message

from pageferry.transport.channel import Acked, SendingChannel, Synced
from pageferry.transport.curve import CHANNEL_USER, password
from pageferry.transport.errors import PeerLost, RemoteProtocolError, VerificationFailed, WorkerDied
from pageferry.transport.links import connect, open_channel, parse_endpoint, unbind
from pageferry.transport.messages import Block
from pageferry.transport.pages import NO_RUNS
from pageferry.transport.wire import Frame, Kind, decode, encode_control, encode_data
from pageferry.workers import jobs, receiver, sender
from pageferry.workers.bandwidth import Bandwidth
from pageferry.workers.checks import Checks
from pageferry.workers.counters import Counters
from pageferry.workers.forking import context
from pageferry.workers.page_table import CLEAN, DIRTY, PageTable
from pageferry.workers.ram import RamBlock, RamFile

PAGES = 64
TOKEN = b"0123456789abcdef"


def _block(path, content=b""):
    with open(path, "wb") as f:
        f.write(content)
        f.truncate(PAGES * PAGE)
    file = RamFile(os.open(path, os.O_RDWR), str(path))
    return RamBlock(Block("ram", PAGES * PAGE), file, 0)


# ---- a receiver, with the test as its sender ---------------------------------------------


async def _with_receiver(tmp_path, body, fresh=True, content=b"", checked=False):
    block = _block(tmp_path / "memory", content)
    counters = Counters(1)
    checks = Checks([PAGES]) if checked else None
    coordinator = Coordinator(counters)
    zmq_context = zmq.Context()
    try:
        job = receiver.ReceiverJob(
            [block], counters, f"ipc://{tmp_path}/c", TOKEN, [fresh], context().Lock(),
            checks=checks,
        )  # fmt: skip
        await coordinator.pool.start(receiver.main, [job])
        await coordinator.hear(jobs.Ready)
        socket = connect(zmq_context, parse_endpoint(f"ipc://{tmp_path}/c"), TOKEN, control=False)
        await body(coordinator, Line(socket), block)
        socket.close()
    finally:
        await coordinator.pool.close()
        zmq_context.term()
        counters.close()
        if checks is not None:
            checks.close()
        block.file.close()


class Line:
    """The sending end of a channel, with a hand on the wire."""

    def __init__(self, socket):
        self.socket = socket
        self.channel = SendingChannel(1 << 30)

    def send(self, page, data, *, lose=False, damage=None, round_=None):
        runs = (np.array([page]), np.array([len(data) // PAGE]))
        seq = self.channel.next_seq()
        meta = encode_data(
            Frame(Kind.DATA, seq, round_ or self.channel.round, 0, 0, NO_RUNS, runs, NO_RUNS),
            [data],
        )
        self.channel.sent(seq, len(data), len(data) // PAGE)
        data = bytearray(data)
        if damage == "payload":
            data[100] ^= 1
        if damage == "meta":
            meta = meta[:20] + bytes([meta[20] ^ 1]) + meta[21:]
        if not lose:
            self.socket.send_multipart([meta, bytes(data)])

    def zero(self, page, count):
        runs = (np.array([page]), np.array([count]))
        frame = Frame(Kind.DATA, self.channel.next_seq(), self.channel.round, zero=runs)
        self.channel.sent(frame.seq, 0, count)
        self.socket.send(encode_data(frame))

    def sync(self):
        self.socket.send(self.channel.sync())

    async def settle(self):
        """Until nothing is in flight: (acknowledged, lost) frame numbers."""
        acked, lost = [], []
        while not self.channel.idle:
            for event in await self.events():
                (acked if isinstance(event, Acked) else lost).append(event.token)
        return acked, lost

    async def events(self):
        assert await asyncio.to_thread(self.socket.poll, 10_000), "the receiver says nothing"
        return self.channel.receive(self.socket.recv())


def test_frames_are_placed_and_acknowledged(tmp_path):
    data = pattern(PAGES)

    async def body(coordinator, line, block):
        for page in range(0, PAGES, 8):
            line.send(page, data[page * PAGE : (page + 8) * PAGE])
        acked, lost = await line.settle()
        assert (sorted(acked), lost) == (list(range(8)), [])
        line.sync()
        assert await line.events() == [Synced(1)]
        assert block.read(0, PAGES * PAGE) == data

    asyncio.run(_with_receiver(tmp_path, body))


@pytest.mark.parametrize("how", ["lost", "payload", "meta"])
def test_a_lost_or_damaged_frame_is_found_and_nothing_of_it_is_placed(tmp_path, how):
    async def body(coordinator, line, block):
        line.send(0, b"a" * PAGE)
        line.send(1, b"b" * PAGE, lose=how == "lost", damage=None if how == "lost" else how)
        line.send(2, b"c" * PAGE)
        acked, lost = await line.settle()
        assert (sorted(acked), lost) == ([0, 2], [1])
        assert block.read(PAGE, PAGE) == bytes(PAGE)
        line.sync()
        assert await line.events() == [Synced(1)]  # counts agree on what was placed
        line.send(1, b"b" * PAGE)
        await line.settle()
        assert block.read(0, 3 * PAGE) == b"a" * PAGE + b"b" * PAGE + b"c" * PAGE

    asyncio.run(_with_receiver(tmp_path, body))


def test_the_last_frame_lost_shows_at_the_barrier(tmp_path):
    async def body(coordinator, line, block):
        line.send(0, b"a" * PAGE)
        await line.settle()
        line.send(1, b"b" * PAGE, lose=True)
        # nothing follows it, so nobody can know; the barrier's number says so
        line.channel._waiting.clear()
        line.socket.send(line.channel.sync())
        events = await line.events()
        while not any(isinstance(e, Synced) for e in events):
            assert not any(isinstance(e, Acked) for e in events)
            events = await line.events()

    asyncio.run(_with_receiver(tmp_path, body))


def test_a_frame_of_another_round_ends_it(tmp_path):
    """Data of round N that lands after round N+1's would overwrite newer pages."""

    async def body(coordinator, line, block):
        line.sync()
        await line.events()
        line.send(0, b"old!" * 1024, round_=1)
        error = await asyncio.wait_for(coordinator.failed, 20)
        assert isinstance(error, RemoteProtocolError)
        assert "round 1 in round 2" in error.message
        assert block.read(0, PAGE) == bytes(PAGE)

    asyncio.run(_with_receiver(tmp_path, body))


@pytest.mark.parametrize(("fresh", "rounds"), [(False, 1), (True, 2)])
def test_a_zero_page_clears_what_was_there(tmp_path, fresh, rounds):
    content = b"" if fresh else b"\xff" * (PAGES * PAGE)

    async def body(coordinator, line, block):
        if rounds == 2:
            line.send(3, b"x" * (2 * PAGE))
            await line.settle()
            line.sync()
            await line.events()
        line.zero(3, 2)
        await line.settle()
        assert block.read(3 * PAGE, 2 * PAGE) == bytes(2 * PAGE)

    asyncio.run(_with_receiver(tmp_path, body, fresh, content))


@pytest.mark.parametrize(("block_", "page"), [(1, 0), (0, PAGES), (0, PAGES - 1)])
def test_pages_outside_of_memory_end_it(tmp_path, block_, page):
    async def body(coordinator, line, block):
        runs = (np.array([page]), np.array([2]))
        data = bytes([1]) * 2 * PAGE
        meta = encode_data(Frame(Kind.DATA, 0, 1, block_, 0, NO_RUNS, runs, NO_RUNS), [data])
        line.socket.send_multipart([meta, data])
        error = await asyncio.wait_for(coordinator.failed, 20)
        assert isinstance(error, RemoteProtocolError)
        assert block.read(0, PAGES * PAGE) == bytes(PAGES * PAGE)

    asyncio.run(_with_receiver(tmp_path, body))


def _packed(line, page, data, *, content_sum):
    """A packed frame that says `content_sum` of its pages."""
    frame = Frame(
        Kind.DATA, line.channel.next_seq(), 1, 0, 3, NO_RUNS, NO_RUNS,
        (np.array([page]), np.array([len(data) // PAGE])), content_sum=content_sum,
    )  # fmt: skip
    payload = zlib.compress(data)
    line.channel.sent(frame.seq, len(payload), len(data) // PAGE)
    line.socket.send_multipart([encode_data(frame, [payload]), payload])


def test_what_is_placed_is_read_back(tmp_path):
    """Raw and packed pages count as read back, those that are zero again do not."""
    data = pattern(8)

    async def body(coordinator, line, block):
        line.send(0, b"a" * (4 * PAGE))
        _packed(line, 8, data, content_sum=xxhash.xxh3_64_intdigest(data))
        line.zero(2, 1)  # not cleared in a fresh block: it must show
        assert (await line.settle())[1] == []
        os.pwrite(block.file.fd, b"x", 40 * PAGE)
        coordinator.say(jobs.Check(0, 0))
        assert await coordinator.hear(jobs.CheckDone) == jobs.CheckDone(0, 0, 2)

    asyncio.run(_with_receiver(tmp_path, body, checked=True))


def test_pages_that_come_out_otherwise_end_it(tmp_path):
    """What was packed is not what was read at the source."""

    async def body(coordinator, line, block):
        _packed(line, 8, b"a" * PAGE, content_sum=xxhash.xxh3_64_intdigest(b"b" * PAGE))
        error = await coordinator.failure(VerificationFailed)
        assert "from page 8 of ram" in error.message
        assert block.read(8 * PAGE, PAGE) == bytes(PAGE)  # nothing of it was written

    asyncio.run(_with_receiver(tmp_path, body, checked=True))


def test_what_lands_elsewhere_ends_it(tmp_path):
    """The page does not hold what was written: a file that is appended to gets it at its end,
    wherever it should go."""

    async def body(coordinator, line, block):
        fcntl.fcntl(block.file.fd, fcntl.F_SETFL, os.O_APPEND)  # of the receiver's as well
        line.send(3, b"a" * PAGE)
        error = await coordinator.failure(VerificationFailed)
        assert "does not hold what was written" in error.message

    asyncio.run(_with_receiver(tmp_path, body, checked=True))


def test_a_page_that_is_two_things_at_once_ends_it(tmp_path):
    """A frame that has a page twice; nothing of it is written."""

    async def body(coordinator, line, block):
        runs = (np.array([3]), np.array([1]))
        parts = [b"a" * PAGE, zlib.compress(b"b" * PAGE)]
        total = xxhash.xxh3_64_intdigest(b"a" * PAGE + b"b" * PAGE)
        frame = Frame(Kind.DATA, 0, 1, 0, 3, NO_RUNS, runs, runs, content_sum=total)
        line.socket.send_multipart([encode_data(frame, parts), b"".join(parts)])
        error = await coordinator.failure(RemoteProtocolError)
        assert "twice" in error.message
        assert block.read(3 * PAGE, PAGE) == bytes(PAGE)

    asyncio.run(_with_receiver(tmp_path, body, checked=True))


def test_packed_pages_without_a_sum_end_it(tmp_path):
    async def body(coordinator, line, block):
        _packed(line, 8, b"a" * PAGE, content_sum=None)
        await coordinator.failure(VerificationFailed)

    asyncio.run(_with_receiver(tmp_path, body, checked=True))


def test_who_was_not_told_the_token_is_turned_away(tmp_path):
    async def body(coordinator, line, block):
        with zmq.Context() as other:
            watched = []
            socket = connect(
                other, parse_endpoint(f"ipc://{tmp_path}/c"), b"x" * 16, control=False,
                watched=watched,
            )  # fmt: skip
            assert await asyncio.to_thread(watched[0].poll, 10_000)
            event = parse_monitor_message(watched[0].recv_multipart())["event"]
            assert event == zmq.Event.HANDSHAKE_FAILED_AUTH
            socket.disable_monitor()
            watched[0].close()
            socket.close(0)

    asyncio.run(_with_receiver(tmp_path, body))


def test_strays_are_dropped_and_counted(tmp_path):
    """Who knows the token, and is somebody else."""

    async def body(coordinator, line, block):
        with zmq.Context() as other:
            socket = other.socket(zmq.DEALER)
            socket.setsockopt(zmq.ROUTING_ID, b"x" * 16)
            socket.setsockopt(zmq.PLAIN_USERNAME, CHANNEL_USER)
            socket.setsockopt(zmq.PLAIN_PASSWORD, password(TOKEN))
            socket.connect(f"ipc://{tmp_path}/c")
            data = b"evil" * 1024
            runs = (np.array([0]), np.array([1]))
            meta = encode_data(Frame(Kind.DATA, 0, 1, 0, 0, NO_RUNS, runs, NO_RUNS), [data])
            socket.send_multipart([meta, data])
            socket.close()
        line.send(1, b"good" * 1024)
        assert await line.settle() == ([0], [])
        line.sync()
        await line.events()
        assert block.read(0, PAGE) == bytes(PAGE)

    asyncio.run(_with_receiver(tmp_path, body))


def test_a_killed_worker_is_reported_with_its_cause(tmp_path):
    async def body(coordinator, line, block):
        os.kill(coordinator.pool.workers[0].process.pid, signal.SIGKILL)
        error = await asyncio.wait_for(coordinator.failed, 20)
        assert isinstance(error, WorkerDied)
        assert "SIGKILL" in error.message

    asyncio.run(_with_receiver(tmp_path, body))


# ---- a sender, with the test as its receiver ---------------------------------------------


async def _with_sender(tmp_path, body, codec="none"):
    # no zero pages: those would travel first, in a frame of their own
    block = _block(tmp_path / "memory", random.Random(4).randbytes(PAGES * PAGE))
    counters, table = Counters(1), PageTable([PAGES])
    bandwidth = Bandwidth(0)
    coordinator = Coordinator(counters)
    zmq_context = zmq.Context()
    try:
        gate, router, where = open_channel(
            zmq_context, parse_endpoint(f"ipc://{tmp_path}/c"), TOKEN, None
        )
        job = sender.SenderJob([block], table, counters, bandwidth, None, codec, None, 16)
        await coordinator.pool.start(sender.main, [job])
        await coordinator.hear(jobs.Ready)
        coordinator.say(jobs.Open(f"ipc://{tmp_path}/c", TOKEN))
        assert await asyncio.to_thread(gate.socket.poll, 10_000), "the sender does not connect"
        gate.answer()
        table.mark_dirty(0, (np.array([0]), np.array([PAGES])))
        await body(coordinator, router, table)
        gate.close()
        unbind(router, where)
    finally:
        await coordinator.pool.close()
        zmq_context.term()
        for part in (counters, table, bandwidth):
            part.close()
        block.file.close()


async def _receive(router):
    assert await asyncio.to_thread(router.poll, 10_000), "the sender says nothing"
    parts = router.recv_multipart()
    assert parts[0] == TOKEN
    return decode(parts[1])


def _answer(router, kind, first, last):
    router.send_multipart([TOKEN, encode_control(Frame(kind, first, last=last))])


def test_nothing_is_delivered_until_it_is_acknowledged(tmp_path):
    """A lost frame's pages are dirty again, acknowledged ones clean, the answer says how many."""

    async def body(coordinator, router, table):
        coordinator.say(jobs.Extent(0, 0, PAGES, True))
        frames = [await _receive(router) for _ in range(PAGES // 16)]
        assert [frame.seq for frame in frames] == [0, 1, 2, 3]
        assert set(table.view(0).tolist()) == {2}  # all in flight, none taken for delivered
        _answer(router, Kind.ACK, 0, 1)
        _answer(router, Kind.NACK, 2, 2)
        _answer(router, Kind.ACK, 3, 3)
        done = await coordinator.hear(jobs.ExtentDone)
        assert done.lost == 16
        states = table.view(0).tolist()
        assert states[:32] == [CLEAN] * 32
        assert states[32:48] == [DIRTY] * 16
        assert states[48:] == [CLEAN] * 16
        assert coordinator.said.empty()

    asyncio.run(_with_sender(tmp_path, body))


def test_only_dirty_pages_of_the_extent_are_sent(tmp_path):
    async def body(coordinator, router, table):
        view = table.view(0)
        view[:] = CLEAN
        view[[3, 5, 6, 40]] = DIRTY
        coordinator.say(jobs.Extent(0, 0, 32, True))
        frame = await _receive(router)
        pages = set()
        for starts, counts in (frame.zero, frame.raw, frame.packed):
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                pages |= set(range(start, start + count))
        assert pages == {3, 5, 6}
        assert view[40] == DIRTY
        _answer(router, Kind.ACK, 0, 0)
        await coordinator.hear(jobs.ExtentDone)

    asyncio.run(_with_sender(tmp_path, body))


def test_a_barrier_that_counts_differently_ends_it(tmp_path):
    async def body(coordinator, router, table):
        coordinator.say(jobs.Extent(0, 0, 16, False))
        await _receive(router)
        _answer(router, Kind.ACK, 0, 0)
        await coordinator.hear(jobs.ExtentDone)
        coordinator.say(jobs.Barrier(1))
        sync = await _receive(router)
        assert (sync.kind, sync.frames, sync.pages) == (Kind.SYNC, 1, 16)
        wrong = Frame(Kind.SYNC_ACK, sync.seq, 1, frames=1, pages=15)
        router.send_multipart([TOKEN, encode_control(wrong)])
        error = await asyncio.wait_for(coordinator.failed, 20)
        assert isinstance(error, RemoteProtocolError)
        assert "the destination placed 15" in error.message

    asyncio.run(_with_sender(tmp_path, body))


def test_an_answer_to_what_was_never_sent_ends_it(tmp_path):
    async def body(coordinator, router, table):
        coordinator.say(jobs.Extent(0, 0, 16, False))
        await _receive(router)
        _answer(router, Kind.ACK, 0, 99)
        assert isinstance(await asyncio.wait_for(coordinator.failed, 20), RemoteProtocolError)

    asyncio.run(_with_sender(tmp_path, body))


def test_the_last_frame_is_lost_and_nothing_follows(tmp_path):
    """After two seconds without an answer an empty frame comes: it shows the gap."""

    async def body(coordinator, router, table):
        coordinator.say(jobs.Extent(0, 0, 16, False))
        assert (await _receive(router)).seq == 0  # and let it be lost
        probe = await _receive(router)
        assert (probe.kind, probe.seq, probe.page_total) == (Kind.DATA, 1, 0)
        _answer(router, Kind.NACK, 0, 0)
        _answer(router, Kind.ACK, 1, 1)
        assert (await coordinator.hear(jobs.ExtentDone)).lost == 16
        coordinator.say(jobs.Barrier(1))
        sync = await _receive(router)
        assert (sync.kind, sync.frames, sync.pages) == (Kind.SYNC, 1, 0)
        # and let that be lost: it comes again
        again = await _receive(router)
        assert (again.kind, again.seq, again.frames) == (Kind.SYNC, sync.seq, 1)
        answer = encode_control(Frame(Kind.SYNC_ACK, again.seq, 1, frames=1, pages=0))
        for _ in range(2):
            router.send_multipart([TOKEN, answer])
        await coordinator.hear(jobs.BarrierDone)
        coordinator.say(jobs.Extent(0, 16, 16, False))
        assert (await _receive(router)).round == 2

    asyncio.run(_with_sender(tmp_path, body))


def test_an_answer_that_was_lost_ends_it_at_once(tmp_path):
    async def body(coordinator, router, table):
        coordinator.say(jobs.Extent(0, 0, 32, False))
        for _ in range(2):
            await _receive(router)
        _answer(router, Kind.ACK, 1, 1)
        error = await coordinator.failure(PeerLost)
        assert "the answer to frame 0" in error.message

    asyncio.run(_with_sender(tmp_path, body))


def test_an_empty_frame_is_acknowledged(tmp_path):
    async def body(coordinator, line, block):
        line.send(0, b"a" * PAGE, lose=True)
        meta = encode_data(Frame(Kind.DATA, line.channel.next_seq(), 1))
        line.channel.sent(1, 0, 0)
        line.socket.send(meta)
        assert await line.settle() == ([1], [0])

    asyncio.run(_with_receiver(tmp_path, body))


def test_bandwidth_is_exact():
    """The virtual clock moves by size over rate: whoever books, the sum is exact."""
    bandwidth = Bandwidth(1_000_000)
    try:
        bandwidth.reserve(60_000_000)  # a minute ahead: what follows is a backlog
        clock = bandwidth._segment.array(np.int64, 1, 8)
        begin = int(clock[0])
        for size in (1_000, 250_000, 749_000):
            bandwidth.reserve(size)
        assert int(clock[0]) - begin == 1_000_000_000
        bandwidth.set_rate(0)
        assert bandwidth.reserve(1 << 40) == 0
        del clock
    finally:
        bandwidth.close()
