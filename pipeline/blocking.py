"""What asyncio does not promise: that a blocking call is not abandoned, that one that hangs holds
up nobody, that an end is reached, and that a task which breaks is begun anew.

A thread cannot be cancelled. A task that waits for one can, and then the call goes on alone:
a guest is stopped behind the back of whoever has just resumed it. So blocking calls on one
guest come one after the other, and who cleans up waits for the last one first.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_log = logging.getLogger("pageferry")


class Blocking:
    """Calls on one object, in threads, one at a time; none is forgotten."""

    def __init__(self) -> None:
        self._running: asyncio.Future[Any] | None = None

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` in a thread. Cancelled, it still runs to its end: see `idle`."""
        while self.busy:  # others wait for it too, and one of them was first
            await self.idle()
        running = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
        self._running = running
        return await asyncio.shield(running)

    @property
    def busy(self) -> bool:
        """True while a call is under way."""
        return self._running is not None and not self._running.done()

    async def idle(self) -> Any:
        """Wait until no call is under way; the last one's result, or None if it failed."""
        running = self._running
        if running is None:
            return None
        await asyncio.wait([running])
        return None if running.exception() else running.result()


class MayHang:
    """Calls that nobody depends on, and that may never return (a read from storage that is gone):
    not in the threads that all others need, and not waited for at the end.

    After one that took longer than `seconds` there is no other until it is back, so that no more
    than one thread hangs.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: concurrent.futures.Future[Any] | None = None

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises; TimeoutError if it takes too long, or at once while
        the one before is not back."""
        if self._last is not None and not self._last.done():
            raise TimeoutError
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        answer.set_running_or_notify_cancel()

        def run() -> None:
            try:
                answer.set_result(function(*arguments))
            except BaseException as e:
                answer.set_exception(e)

        self._last = answer
        threading.Thread(target=run, name="pageferry-may-hang", daemon=True).start()
        return await asyncio.wait_for(asyncio.wrap_future(answer), self.seconds)


async def to_its_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` to its end, however often this task is cancelled meanwhile; the
    cancellation is raised afterwards."""
    task = asyncio.get_running_loop().create_task(coroutine)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
        except BaseException:
            break
    if cancelled and not task.cancelled() and task.exception() is None:
        raise asyncio.CancelledError
    return task.result()


async def kept_up(attend: Callable[[], Awaitable[None]], pause: float = 1.0) -> None:
    """Run `attend`, which goes on for ever, until cancelled. If it breaks that is logged, and it is
    begun anew after `pause` seconds: a link whose strangers nobody looks after for a moment is
    better than one that is deaf, for a guest may depend on it."""
    while True:
        try:
            await attend()
        except Exception:
            _log.exception("what looks after a link broke, and is begun anew")
        await asyncio.sleep(pause)
