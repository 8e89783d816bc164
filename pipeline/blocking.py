"""Two things asyncio does not promise: that a blocking call is not abandoned, and that an end is
reached.

A thread cannot be cancelled. A task that waits for one can, and then the call goes on alone:
a guest is stopped behind the back of whoever has just resumed it. So blocking calls on one
guest come one after the other, and who cleans up waits for the last one first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Blocking:
    """Calls on one object, in threads, one at a time; none is forgotten."""

    def __init__(self) -> None:
        self._running: asyncio.Future[Any] | None = None

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` in a thread. Cancelled, it still runs to its end: see `idle`."""
        await self.idle()
        running = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
        self._running = running
        return await asyncio.shield(running)

    async def idle(self) -> Any:
        """Wait until no call is under way; the last one's result, or None if it failed."""
        running = self._running
        if running is None:
            return None
        await asyncio.wait([running])
        return None if running.exception() else running.result()


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
