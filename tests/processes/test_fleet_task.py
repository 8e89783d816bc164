"""The worker's side of a fleet without dask: its task and `exchange` in one event loop, sources as
processes of their own."""

import asyncio
import json
import os
import signal

import msgspec
import psutil
import pytest
from helpers import PAGE, pattern, same_file, sweep, until_async

from pageferry._version import __version__
from pageferry.pipeline import fleet_task
from pageferry.pipeline.fleet_attempt import BEGIN, HAND_OVER, Attempt, Heard, News
from pageferry.pipeline.fleet_source import Job
from pageferry.pipeline.fleet_task import exchange, run_item
from pageferry.pipeline.manifest import Item, Settings
from pageferry.transport.errors import (
    Cancelled,
    ConfirmationLost,
    HostLacks,
    PeerLost,
    SourceError,
    WorkerDied,
)

SLOW = 200_000


def image(tmp_path, pages=64):
    (tmp_path / "a.mem").write_bytes(pattern(pages) if pages < 100 else os.urandom(pages * PAGE))
    return Item("a", f"image:{tmp_path}/a.mem", f"image:{tmp_path}/b.mem", hosts=("x",),
                settings=Settings(workers=1, codec="none", batch_pages=16))  # fmt: skip


GUEST = Item(
    "guest", "demo:?size=4M", "demo:", hosts=("x",), settings=Settings(workers=1, codec="none")
)


class Batch:
    """One attempt and who asks about it."""

    def __init__(self, item, max_bandwidth=0):
        self.attempt, self.token = Attempt(max_bandwidth), os.urandom(8).hex()
        self.item, self.progress, self.asked = item, None, []

    def run(self, version=__version__, guest=""):
        job = msgspec.json.encode(Job(self.item, self.attempt.orders.max_bandwidth))
        return asyncio.ensure_future(run_item(self.token, version, job, guest))

    async def talk(self):
        """One exchange."""
        said = msgspec.json.encode(self.attempt.orders)
        news = msgspec.json.decode(await exchange(self.token, said), type=News)
        self.progress = news.progress or self.progress
        if news.asks:
            self.asked.append(news.asks)
        heard = self.attempt.heard(news)
        if heard is Heard.ASKS_TO_HAND_OVER:
            self.attempt.may_hand_over()
        return heard

    async def follow(self, task, condition=lambda: False):
        """Talk until it is over, or `condition` holds."""
        while not (task.done() or condition()):
            assert await self.talk() is not Heard.LOST


def sources():
    live = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in live if "pageferry.pipeline.fleet_source" in
            " ".join(p.cmdline())]  # fmt: skip


def test_an_image(tmp_path):
    async def main():
        batch = Batch(image(tmp_path))
        task = batch.run()
        await batch.follow(task)
        return await task, batch

    (_, report, error), batch = asyncio.run(main())
    assert error is None and report["status"] == "completed"
    assert same_file(tmp_path / "a.mem", tmp_path / "b.mem")
    assert batch.asked == [BEGIN]


def test_a_guest_asks_before_it_is_stopped():
    async def main():
        batch = Batch(GUEST)
        task = batch.run()
        await batch.follow(task)
        return await task, batch

    (_, report, error), batch = asyncio.run(main())
    assert error is None and report["oracle"]["ok"]
    assert batch.asked == [BEGIN, HAND_OVER]


def test_what_goes_wrong_is_told(tmp_path):
    async def main():
        batch = Batch(Item("a", "image:/no/such.mem", f"image:{tmp_path}/b", hosts=("x",)))
        task = batch.run()
        await batch.follow(task)
        return await task

    _, report, error = asyncio.run(main())
    assert report is None and isinstance(error, SourceError) and "/no/such.mem" in str(error)


def test_limits_and_cancel_while_it_runs(tmp_path):
    """It is slow until it may be faster; it is cancelled, and says so."""

    async def main():
        batch = Batch(image(tmp_path, 1024), SLOW)
        task = batch.run()
        await batch.follow(task, lambda: batch.progress is not None)
        assert not task.done()
        batch.attempt.limit(0)
        await batch.follow(task)
        assert (await task)[2] is None
        again = Batch(batch.item, SLOW)
        (tmp_path / "b.mem").unlink()
        task = again.run()
        await again.follow(task, lambda: again.progress is not None)
        again.attempt.cancel()
        await again.follow(task)
        return (await task)[2]

    assert isinstance(asyncio.run(main()), Cancelled)
    assert not (tmp_path / "b.mem").exists()


def test_a_second_run_does_not_begin(tmp_path):
    """As dask begins it when the first has been lost: it is told of the first, and ends."""

    async def main():
        batch = Batch(image(tmp_path))
        first = batch.run()
        await batch.follow(first, lambda: batch.attempt.begun)
        orders = batch.attempt.orders
        await batch.follow(first)
        assert (await first)[2] is None
        (tmp_path / "b.mem").unlink()
        second = batch.run()
        while not second.done():
            assert await batch.talk() is Heard.LOST
        assert batch.attempt.orders == orders and batch.attempt.is_mine(orders.run)
        run, _, error = await second
        assert not batch.attempt.is_mine(run)
        return error

    error = asyncio.run(main())
    assert isinstance(error, PeerLost) and "nothing was begun" in str(error)
    assert not (tmp_path / "b.mem").exists()


def test_nobody_asks_for_it(tmp_path, monkeypatch):
    """Neither before it begins nor while it runs does it go on without a batch."""
    monkeypatch.setattr(fleet_task, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(fleet_task, "_LOOK_SECONDS", 0.05)

    async def main():
        _, report, error = await Batch(image(tmp_path)).run()
        assert report is None and isinstance(error, PeerLost)
        batch = Batch(image(tmp_path, 1024), SLOW)
        task = batch.run()
        await batch.follow(task, lambda: batch.progress is not None)
        return (await task)[2]

    assert isinstance(asyncio.run(main()), Cancelled)
    assert not (tmp_path / "b.mem").exists()


def test_a_batch_that_goes_after_it_gave_leave(monkeypatch):
    """What may be handed over is: the guest runs at one place, whoever still asks."""

    async def main():
        batch = Batch(GUEST)
        task = batch.run()
        await batch.follow(task, lambda: batch.attempt.handed_over)
        monkeypatch.setattr(fleet_task, "LEASE_SECONDS", 0.0)  # the last that it hears is its leave
        await exchange(batch.token, msgspec.json.encode(batch.attempt.orders))
        return await task

    _, report, error = asyncio.run(main())
    assert error is None and report["oracle"]["ok"]


@pytest.mark.parametrize("leave", [False, True])
def test_a_source_that_is_killed(tmp_path, leave):
    """Without leave to hand over its guest is where it was; with it, nobody knows."""

    async def main():
        batch = Batch(GUEST if leave else image(tmp_path, 1024), 0 if leave else SLOW)
        task = batch.run()
        await batch.follow(task, lambda: HAND_OVER in batch.asked or (not leave and batch.progress))
        (process,) = sources()
        if leave:  # it gets it, and no time to use it
            process.send_signal(signal.SIGSTOP)
            await batch.talk()
            (run,) = [r for t, r in fleet_task._runs.items() if t == batch.token]
            await until_async(lambda: run.asks == "", "it is told")
        family = [process, *process.children(recursive=True)]
        process.kill()
        await batch.follow(task)
        await asyncio.to_thread(psutil.wait_procs, family, 30)
        sweep(process.pid)
        return (await task)[2]

    error = asyncio.run(main())
    assert isinstance(error, ConfirmationLost if leave else WorkerDied)
    assert "signal 9" in str(error)


def test_its_worker_closes(tmp_path):
    """Dask cancels what runs in its event loop; the source ends by itself."""

    async def main():
        batch = Batch(image(tmp_path, 1024), SLOW)
        task = batch.run()
        await batch.follow(task, lambda: batch.progress is not None)
        found = sources()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() and len(found) == 1
        await asyncio.to_thread(psutil.wait_procs, found, 30)
        return found

    assert not any(p.is_running() for p in asyncio.run(main()))
    assert not (tmp_path / "b.mem").exists()


def test_one_guest_once(tmp_path, monkeypatch):
    """The source of a batch that was killed still is at it: the next waits until it has ended."""
    monkeypatch.setattr(fleet_task, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(fleet_task, "_LOOK_SECONDS", 0.05)

    async def main():
        old = Batch(image(tmp_path, 1024), SLOW)
        first = old.run(guest="pid:7")
        await old.follow(first, lambda: old.progress is not None)
        new = Batch(old.item)
        second = new.run(guest="pid:7")
        await new.follow(second, lambda: new.attempt.begun)
        assert first.done() and isinstance((await first)[2], Cancelled)
        await new.follow(second)
        return (await second)[2]

    assert asyncio.run(main()) is None
    assert same_file(tmp_path / "a.mem", tmp_path / "b.mem")


def test_another_version(tmp_path):
    async def main():
        return await Batch(image(tmp_path)).run(version="0.0.0")

    error = asyncio.run(main())[2]
    assert isinstance(error, HostLacks) and "install the same" in str(error)


def test_nobody_knows_it():
    async def main():
        return json.loads(await exchange("nothing", b"{}"))

    assert asyncio.run(main())["run"] == ""
