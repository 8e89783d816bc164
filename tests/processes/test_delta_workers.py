"""Real senders and receivers with deltas: whoever sends a page, whatever became of it at the
destination between rounds, what arrives is what was read."""

import asyncio
import os
import random
from pathlib import Path

import numpy as np
from coordinator import Coordinator
from helpers import PAGE

from pageferry.pipeline.deltas import Deltas
from pageferry.transport.messages import Block
from pageferry.transport.pages import runs_of
from pageferry.workers import jobs, receiver, sender
from pageferry.workers.bandwidth import Bandwidth
from pageferry.workers.counters import Counters
from pageferry.workers.forking import context
from pageferry.workers.page_table import CLEAN, PageTable
from pageferry.workers.ram import RamBlock, RamFile

PAGES = 64
TOKENS = (b"0123456789abcdef", b"fedcba9876543210")


def block_of(path, content=b""):
    path.write_bytes(content.ljust(PAGES * PAGE, b"\0"))
    return RamBlock(
        Block("ram", PAGES * PAGE), RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path)), 0
    )


class Moving:
    """Two senders, two receivers; the test says what is dirty, and who sends it."""

    def __init__(self, folder: Path) -> None:
        self.memory = bytearray(random.Random(4).randbytes(PAGES * PAGE))
        self.here, self.there = block_of(folder / "here", self.memory), block_of(folder / "there")
        self.table, self.bandwidth = PageTable([PAGES]), Bandwidth(0)
        self.counters, self.others = Counters(2), Counters(2)
        self.deltas = Deltas([PAGES], PAGES * PAGE)
        self.senders, self.receivers = Coordinator(self.counters), Coordinator(self.others)
        self.folder, self.round = folder, 0

    async def __aenter__(self):
        lock = context().Lock()
        job = sender.SenderJob(
            [self.here], self.table, self.counters, self.bandwidth, None, "lz4", None, 16,
            cache=self.deltas.cache,
        )  # fmt: skip
        ends = [f"ipc://{self.folder}/{i}" for i in range(2)]
        await self.receivers.pool.start(
            receiver.main,
            [
                receiver.ReceiverJob(
                    [self.there], self.others, where, token, [True], lock, deltas=True
                )
                for where, token in zip(ends, TOKENS, strict=True)
            ],
        )
        await self.senders.pool.start(sender.main, [job] * 2)
        for coordinator in (self.receivers, self.senders):
            for _ in range(2):
                await coordinator.hear(jobs.Ready)
        for i, worker in enumerate(self.senders.pool.workers):
            worker.say(jobs.Open(ends[i], TOKENS[i]))
        return self

    async def __aexit__(self, *_):
        await self.senders.pool.close()
        await self.receivers.pool.close()
        for part in (self.table, self.bandwidth, self.counters, self.others, self.deltas):
            part.close()
        for block in (self.here, self.there):
            block.file.close()

    def write(self, pages, data, at=0):
        for page in pages:
            begin = page * PAGE + at
            self.memory[begin : begin + len(data)] = data
            os.pwrite(self.here.file.fd, data, begin)

    async def send(self, pages, first, *, live=True):
        """A round: sender `first` has the first half of memory, the other one the second. Returns
        how many pages were lost."""
        self.round += 1
        self.table.mark_dirty(0, runs_of(np.array(pages, np.int64)))
        if live:
            for _ in self.deltas.begin_round(self.round, self.table, self.counters):
                pass
        half = PAGES // 2
        workers = self.senders.pool.workers
        workers[first].say(jobs.Extent(0, 0, half, live))
        workers[1 - first].say(jobs.Extent(0, half, half, live))
        lost = sum([(await self.senders.hear(jobs.ExtentDone)).lost for _ in range(2)])
        self.senders.pool.say_all(jobs.Barrier(self.round))
        for _ in range(2):
            await self.senders.hear(jobs.BarrierDone)
        return lost

    def said(self):
        return self.deltas.report(self.counters)["xbzrle-cache"]

    def deltas_sent(self):
        return self.counters.total("delta_pages"), self.others.total("delta_pages")

    def arrived(self):
        return self.there.read(0, PAGES * PAGE) == self.memory


def test_rounds_that_change_hands(tmp_path):
    """Each round another sender has the pages. The destination's memory is damaged: those pages
    are refused, and travel whole. A new size begins empty. What is sent in the last round is no
    base."""

    async def journey():
        everything = list(range(PAGES))
        async with Moving(tmp_path) as moving:
            assert await moving.send(everything, 0) == 0
            assert moving.arrived() and moving.deltas_sent() == (0, 0)

            moving.write(everything, b"two", at=8)
            assert await moving.send(everything, 1) == 0
            assert moving.arrived() and moving.deltas_sent() == (PAGES, PAGES)
            assert moving.said()["cache-miss"] == 0
            assert moving.said()["encoding-rate"] > 300

            moving.write(everything, b"three", at=99)
            os.pwrite(moving.there.file.fd, b"somebody else's", 20 * PAGE)
            assert await moving.send(everything, 0) == 16  # the frame that has page 20
            assert not moving.arrived()
            assert moving.others.total("lost_frames") == 1
            assert sum(moving.table.view(0) != CLEAN) == 16
            assert await moving.send([], 1) == 0  # those again, and whole
            assert moving.arrived()
            assert moving.said()["cache-miss"] == 16

            moving.write([1, 40], bytes(PAGE))  # zero pages, and back
            assert await moving.send([1, 40], 0) == 0
            moving.write([1, 40], b"\7")
            before = moving.deltas_sent()[1]
            assert await moving.send([1, 40], 1) == 0
            assert moving.arrived() and moving.deltas_sent()[1] == before + 2

            moving.deltas.resize(PAGE)  # one slot
            moving.write([3, 5], b"\7")
            before = moving.deltas_sent()[1]
            for _ in range(2):
                assert await moving.send([3, 5], 0) == 0
            assert moving.arrived() and moving.deltas_sent()[1] == before + 1

            moving.deltas.resize(PAGES * PAGE)
            for text in (b"a", b"b"):
                moving.write([3, 40], text)
                assert await moving.send([3, 40], 1) == 0
            before = moving.deltas_sent()[1]
            for text in (b"c", b"d"):  # it stands still
                moving.write([3, 40], text)
                assert await moving.send([3, 40], 0, live=False) == 0
                assert moving.arrived() and moving.deltas_sent()[1] == before + 2

    asyncio.run(journey())
