"""Calls that block, beside an event loop."""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading

import pytest

from pageferry.pipeline.blocking import Blocking, MayHang, kept_up
from pageferry.pipeline.control import find
from pageferry.transport.links import Endpoint


def ours():
    return [thread for thread in threading.enumerate() if thread.name == "pageferry-may-hang"]


@pytest.fixture
def release():
    """Lets whoever hangs go on; at the end all have ended."""
    event = threading.Event()
    yield event
    event.set()
    for thread in ours():
        thread.join()


def test_a_call_that_hangs_takes_one_thread_until_it_is_back(release):
    called = []

    def hangs():
        called.append("hangs")
        release.wait()

    def returns():
        called.append("returns")
        return 7

    async def main():
        calls = MayHang(60.0)
        assert await calls(returns) == 7
        calls.seconds = 0.01
        with pytest.raises(TimeoutError):
            await calls(hangs)
        calls.seconds = 60.0
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await calls(returns)
        assert called == ["returns", "hangs"]
        release.set()
        await asyncio.wrap_future(calls._last)
        assert await calls(returns) == 7

    asyncio.run(main())


def test_neither_others_nor_the_end_wait_for_one_that_hangs(release):
    async def main():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        with pytest.raises(TimeoutError):
            await MayHang(0.01)(release.wait)
        assert await asyncio.to_thread(lambda: 7) == 7

    asyncio.run(main())  # this waits for the threads of the executor
    (thread,) = ours()
    assert thread.daemon  # nor does the interpreter


def test_what_it_raises_is_raised(release):
    async def main():
        with pytest.raises(ZeroDivisionError):
            await MayHang(60.0)(lambda: 1 // 0)

    asyncio.run(main())


def test_what_looks_after_a_link_is_begun_anew_when_it_breaks(caplog):
    times = []

    async def attend():
        times.append(1)
        if len(times) == 1:
            raise OSError("no more descriptors")
        if len(times) == 3:
            await asyncio.get_running_loop().create_future()

    async def main():
        attending = asyncio.ensure_future(kept_up(attend, 0))
        while len(times) < 3:
            await asyncio.sleep(0)
        attending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attending

    asyncio.run(main())
    (record,) = caplog.records
    assert "begun anew" in record.message
    assert "no more descriptors" in record.exc_text


def test_whoever_looks_for_a_peer_that_does_not_answer_can_be_cancelled_at_once():
    """The kernel drops who connects where as many wait as may: a plain connect takes seconds."""

    async def main(port):
        finding = asyncio.ensure_future(find(Endpoint("tcp", "127.0.0.1", port)))
        while not ours():
            await asyncio.sleep(0)
        finding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finding

    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = full.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        asyncio.run(main(port))
        (thread,) = ours()  # nobody has waited for it
        stack.enter_context(full.accept()[0])  # there is room
        thread.join()


def test_calls_that_wait_for_one_another_are_made_one_at_a_time(release):
    """Two wait for a third: when that is over, one of them goes first."""
    under_way, most = [], []

    def call(hold):
        under_way.append(hold)
        most.append(len(under_way))
        if hold is not None:
            hold.wait()
        under_way.pop()

    async def main():
        calls, second = Blocking(), threading.Event()
        waiting = [asyncio.create_task(calls(call, release))]
        await asyncio.sleep(0)
        waiting += [asyncio.create_task(calls(call, hold)) for hold in (second, None)]
        await asyncio.sleep(0)
        release.set()
        await waiting[0]
        await asyncio.sleep(0)
        second.set()
        await asyncio.gather(*waiting)

    asyncio.run(main())
    assert most == [1, 1, 1]
