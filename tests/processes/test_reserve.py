"""Worker processes that have one job after the other: what is left of a job, and who gets none."""

import asyncio
import os
import random
import signal
import socket
import threading
import time

import numpy as np
import psutil
import pytest
import zmq
from helpers import PAGE, until
from zmq.utils.monitor import parse_monitor_message

from pageferry.transport.errors import WorkerDied
from pageferry.transport.links import connect, parse_endpoint
from pageferry.transport.messages import Block
from pageferry.transport.pages import NO_RUNS
from pageferry.transport.wire import Frame, Kind, encode_data
from pageferry.workers import jobs, receiver, sender
from pageferry.workers.bandwidth import Bandwidth
from pageferry.workers.counters import Counters
from pageferry.workers.forking import context
from pageferry.workers.leash import Parcel
from pageferry.workers.page_table import PageTable
from pageferry.workers.pool import START_SECONDS, Pool
from pageferry.workers.process import run_worker
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.reserve import Hand, Reserve

PAGES = 300


class Migration:
    """The memory and the two processes of one, without coordinators."""

    def __init__(self, folder, number, reserve, codec="zstd"):
        self.reserve, self.codec = reserve, codec
        content = random.Random(number).randbytes(PAGES * PAGE // 2) + b"text" * (PAGES * PAGE // 8)
        self.token = os.urandom(16)
        self.listen = f"ipc://{folder}/channel-{number}"
        self.here = self._block(folder / f"here-{number}", content)
        self.there = self._block(folder / f"there-{number}", bytes(len(content)))
        self.content = content
        self.failed = asyncio.get_running_loop().create_future()

    def _block(self, path, content):
        path.write_bytes(content)
        file = RamFile(os.open(path, os.O_RDWR), str(path))
        return RamBlock(Block("ram", PAGES * PAGE), file, 0)

    def _pool(self, role):
        said = asyncio.Queue()
        counters = Counters(1)
        failed = lambda error: self.failed.done() or self.failed.set_result(error)  # noqa: E731
        pool = Pool(role, counters, lambda w, job: said.put_nowait(job), failed, self.reserve)
        return pool, said, counters

    async def __aenter__(self):
        self.receivers, hear, self.placed = self._pool("receiver")
        job = receiver.ReceiverJob(
            [self.there], self.placed, self.listen, self.token, [True], context().Lock()
        )
        await self.receivers.start(receiver.main, [job])
        await asyncio.wait_for(hear.get(), 20)
        self.table = PageTable([PAGES], context().Lock())
        self.bandwidth = Bandwidth(0)
        self.senders, self.heard, self.sent = self._pool("sender")
        job = sender.SenderJob(
            [self.here], self.table, self.sent, self.bandwidth, None, self.codec, None, 16
        )
        await self.senders.start(sender.main, [job])
        await asyncio.wait_for(self.heard.get(), 20)
        self.senders.say_all(jobs.Open(self.listen, self.token))
        return self

    async def move(self):
        self.table.mark_dirty(0, (np.array([0]), np.array([PAGES])))
        self.senders.say_all(jobs.Extent(0, 0, PAGES, False))
        self.senders.say_all(jobs.Barrier(1))
        assert isinstance(await asyncio.wait_for(self.heard.get(), 20), jobs.ExtentDone)
        assert isinstance(await asyncio.wait_for(self.heard.get(), 20), jobs.BarrierDone)
        assert self.there.read(0, PAGES * PAGE) == self.content

    @property
    def pids(self):
        return [pool.workers[0].process.pid for pool in (self.senders, self.receivers)]

    async def __aexit__(self, *rest):
        for pool in (self.senders, self.receivers):
            await pool.close()
        self.costs = [pool.costs[0][2] for pool in (self.senders, self.receivers)]
        for part in (self.table, self.bandwidth, self.sent, self.placed):
            part.close()
        for block in (self.here, self.there):
            block.file.close()


def belongings(pid):
    """Descriptors, mappings of files (how often each), threads, nice value, scheduling, name."""
    process = psutil.Process(pid)
    descriptors = sorted(
        f"{fd} {os.readlink(f'/proc/{pid}/fd/{fd}')}" for fd in os.listdir(f"/proc/{pid}/fd")
    )
    with open(f"/proc/{pid}/maps") as file:
        mapped = sorted(line.split(maxsplit=5)[5] for line in file if "/" in line)
    return (
        descriptors, mapped, process.num_threads(), process.nice(), os.sched_getscheduler(pid),
        process.name(),
    )  # fmt: skip


def test_after_fifty_jobs_as_after_the_first(tmp_path):
    """The same two processes; nothing of fifty migrations is open, mapped or running in them."""

    async def main():
        reserve, first = Reserve(2), None
        try:
            for number in range(50):
                async with Migration(tmp_path, number, reserve) as migration:
                    await migration.move()
                found = {hand.process.pid: belongings(hand.process.pid) for hand in reserve.idle}
                first = first or found
                assert found == first
            for descriptors, mapped, threads, *_ in found.values():
                assert not any(str(tmp_path) in name or "/dev/shm" in name for name in mapped)
                assert not any(str(tmp_path) in name or "/dev/shm" in name for name in descriptors)
                assert threads == 1
        finally:
            reserve.close()
        assert (reserve.started, reserve.jobs) == (2, 100)

    asyncio.run(main())


def test_late_frames_of_one_job_are_strays_to_the_next(tmp_path):
    """The same process listens at the same place for another migration: what a sender of the
    first still sends has nobody to take it."""

    async def main():
        reserve = Reserve(2)
        try:
            async with Migration(tmp_path, 1, reserve) as first:
                await first.move()
            async with Migration(tmp_path, 1, reserve) as second:
                assert sorted(second.pids) == sorted(first_pids(first))
                await second.move()
                late = Late(first.token, second.listen)
                try:
                    late.send(b"evil" * 1024)
                    assert await late.turned_away()
                finally:
                    late.close()
                assert second.there.read(0, PAGES * PAGE) == second.content
                assert second.placed.total("normal") == PAGES
        finally:
            reserve.close()

    asyncio.run(main())


class Late:
    """A sender that does not know that its migration is over."""

    def __init__(self, token, where):
        self.context = zmq.Context()
        watched = []
        self.socket = connect(
            self.context, parse_endpoint(where), token, control=False, watched=watched
        )
        (self.watching,) = watched

    async def turned_away(self):
        assert await asyncio.to_thread(self.watching.poll, 10_000), "nothing happens to it"
        event = parse_monitor_message(self.watching.recv_multipart())["event"]
        return event == zmq.Event.HANDSHAKE_FAILED_AUTH

    def send(self, data):
        runs = (np.array([0]), np.array([1]))
        meta = encode_data(Frame(Kind.DATA, 0, 1, 0, 0, NO_RUNS, runs, NO_RUNS), [data])
        self.socket.send_multipart([meta, data])

    def close(self):
        self.socket.disable_monitor()
        self.watching.close()
        self.socket.close(0)
        self.context.term()


def first_pids(migration):
    return [pool.costs[0][1] for pool in (migration.senders, migration.receivers)]


def test_costs_are_those_of_the_job(tmp_path):
    """Processor time and memory of a migration are not those of the ones before."""

    async def main():
        reserve, costs = Reserve(2), []
        try:
            for number in range(12):
                async with Migration(tmp_path, number, reserve) as migration:
                    await migration.move()
                costs.append(migration.costs)
            in_all = sum(
                sum(psutil.Process(hand.process.pid).cpu_times()[:2]) for hand in reserve.idle
            )
        finally:
            reserve.close()
        told = sum(row["cpu_ns"] for pair in costs for row in pair) / 1e9
        assert told <= in_all + 0.05  # clock ticks
        assert all(row["cpu_ns"] > 0 and row["peak_memory"] > 0 for pair in costs for row in pair)
        # were it kept, each would have the pages of all before: half a MiB each
        first, last = (max(row["peak_memory"] for row in costs[i]) for i in (1, -1))
        assert last < first + (4 << 20)

    asyncio.run(main())


def _raises(pipe, index, job):
    return run_worker("pf-test", pipe, job, index, _raise)


def _raise(desk):
    desk.say(jobs.Ready())
    raise WorkerDied("on purpose")


def _keeps_a_file(pipe, index, job):
    """Ends well, but for a descriptor."""
    os.open("/dev/zero", os.O_RDONLY)
    return run_worker("pf-test", pipe, job, index, _until_stop)


def _until_stop(desk):
    desk.say(jobs.Ready())
    assert isinstance(desk.take(), jobs.Stop)


def _ends_well(pipe, index, job):
    ended = run_worker("pf-test", pipe, job, index, _until_stop)
    job.close()
    return ended


def _is_deaf(pipe, index, job):
    return run_worker("pf-test", pipe, job, index, _listen_to_nobody)


def _listen_to_nobody(desk):
    desk.say(jobs.Ready())
    threading.Event().wait()


@pytest.mark.parametrize(
    ("target", "again"),
    [(_ends_well, True), (_raises, False), (_keeps_a_file, False), (_is_deaf, False)],
)  # fmt: skip
def test_who_is_used_again(target, again, monkeypatch):
    """Whoever was told to stop, did, and has nothing left; nobody else, and no process stays."""
    monkeypatch.setattr("pageferry.workers.pool.STOP_SECONDS", 0.5)

    async def main():
        reserve = Reserve(4)
        try:
            pids = [await _one_job(reserve, target) for _ in range(2)]
            assert (pids[0] == pids[1]) is again
            assert len(reserve.idle) == (1 if again else 0)
            assert reserve.started == (1 if again else 2)
        finally:
            reserve.close()
        until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "they are gone")

    asyncio.run(main())


async def _one_job(reserve, target, kill=False):
    counters, said = Counters(1), asyncio.Queue()
    pool = Pool("test", counters, lambda w, job: said.put_nowait(job), said.put_nowait, reserve)
    try:
        await pool.start(target, [counters])
        assert isinstance(await asyncio.wait_for(said.get(), 20), jobs.Ready)
        pid = pool.workers[0].process.pid
        if kill:
            os.kill(pid, signal.SIGKILL)
            assert "SIGKILL" in (await asyncio.wait_for(said.get(), 20)).message
        return pid
    finally:
        await pool.close()
        counters.close()


def test_one_that_is_killed_at_work_or_while_it_waits(tmp_path):
    async def main():
        reserve = Reserve(4)
        try:
            first = await _one_job(reserve, _ends_well, kill=True)
            assert not reserve.idle
            second = await _one_job(reserve, _ends_well)
            os.kill(second, signal.SIGKILL)
            third = await _one_job(reserve, _ends_well)
            assert len({first, second, third}) == 3
            assert [hand.process.pid for hand in reserve.idle] == [third]
        finally:
            reserve.close()

    asyncio.run(main())


def test_no_more_wait_than_may(tmp_path):
    async def main():
        reserve = Reserve(1)
        try:
            async with Migration(tmp_path, 1, reserve) as migration:
                await migration.move()
            assert (reserve.started, len(reserve.idle)) == (2, 1)
            reserve.close()
            async with Migration(tmp_path, 2, reserve) as migration:
                await migration.move()
            assert not reserve.idle
        finally:
            reserve.close()

    asyncio.run(main())


def _idle(reserve, count):
    """So many that wait."""
    hands = [reserve.hire(bool, (1,)) for _ in range(count)]
    for hand in hands:
        assert hand.done(20)
        reserve.give_back(hand)
    return hands


def _stop(hand):
    os.kill(hand.process.pid, signal.SIGSTOP)
    until(lambda: hand.stopped, "it stands still")


def test_nobody_waits_for_one_that_is_stopped(monkeypatch):
    """Neither the next job nor the end: it is killed."""
    monkeypatch.setattr("pageferry.workers.reserve._TAKE_SECONDS", 1e6)
    monkeypatch.setattr("pageferry.workers.reserve._END_SECONDS", 1e6)
    reserve = Reserve(4)
    try:
        stopped = _idle(reserve, 3)
        for hand in stopped:
            _stop(hand)
        new = reserve.hire(bool, (1,))
        assert new not in stopped and not reserve.idle
        assert {hand.exitcode for hand in stopped} == {-signal.SIGKILL}
        assert new.done(20)
        reserve.give_back(new)
        _stop(new)
    finally:
        reserve.close()
    assert new.exitcode == -signal.SIGKILL


def test_a_large_job_for_one_that_reads_nothing():
    """More than a socket holds; the time is one for all of it."""
    hand = Hand()
    try:
        assert hand.give(bool, (1,), 20) and hand.done(20)
        _stop(hand)
        assert not hand.give(bool, (bytes(8 << 20),), 0.05)
        assert hand.late
    finally:
        hand.end()


def test_a_large_job_with_many_descriptors():
    """More of them than one message takes."""
    hand, pairs = Hand(), [socket.socketpair() for _ in range(150)]
    try:
        assert hand.give(_says_hello, (pairs, bytes(8 << 20)), 20)
        for ours, _ in pairs:
            assert ours.recv(5) == b"hello"
        assert hand.done(20)
    finally:
        hand.end()
        for pair in pairs:
            for end in pair:
                end.close()


def _says_hello(pairs, data):
    assert data == bytes(8 << 20)
    for ours, theirs in pairs:
        theirs.sendall(b"hello")
        ours.close()
        theirs.close()
    return True


@pytest.mark.parametrize("size", [0, 5, 12, 13])
def test_a_job_that_breaks_off(size):
    """Its coordinator has been killed: the process ends, and says nothing of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Parcel(bool, (1,)).send(ours, time.monotonic() + 20)
        job = theirs.recv(1000)
    assert len(job) > size
    hand = Hand()
    hand._leash.sendall(job[:size])
    hand.end()
    assert hand.exitcode == 0


class _Unpickled:
    """Does something where it arrives."""

    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what[0], self.what[1:]


@pytest.mark.parametrize(
    ("what", "why"),
    [((signal.pause,), "did not begin within 0 s"), ((os._exit, 3), "status 3 before it began")],
)  # fmt: skip
def test_one_that_does_not_begin_is_not_said_to_have_been_killed(monkeypatch, what, why):
    if what[0] is signal.pause:
        monkeypatch.setattr("pageferry.workers.reserve._BEGIN_SECONDS", 0.1)
    reserve = Reserve(1)
    with pytest.raises(WorkerDied, match=why):
        reserve.hire(bool, (_Unpickled(*what),))
    reserve.close()


def _never_beats(pipe, index, job):
    job.close()
    signal.pause()


def test_each_has_its_own_time_to_begin():
    """Where a host is busy, those that were started before it may have taken long."""

    async def main():
        counters = Counters(2)
        pool = Pool("test", counters, lambda w, job: None, lambda error: None)
        try:
            await pool.start(_never_beats, [counters] * 2)
            pool.check()
            pool.workers[1].began -= START_SECONDS
            with pytest.raises(WorkerDied, match=r"test-1 .* has not answered for 20 s"):
                pool.check()
            pool.workers[0].began -= START_SECONDS
            with pytest.raises(WorkerDied, match="test-0 "):
                pool.check()
        finally:
            for worker in pool.workers:
                worker.process.kill()
            await pool.close()
            counters.close()

    asyncio.run(main())
