"""The tasks of one end of a migration: run beside each other, ended together, and none of them
breaks unheard.

Must not know what they do, nor what an error means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class OnFailure(Protocol):
    """What is told of an error. `link`: it is one of the control link; `by_peer`: the peer said
    so itself."""

    def __call__(
        self, error: BaseException, *, link: bool = False, by_peer: bool = False
    ) -> None: ...


class Tasks:
    """Those that are under way. `failed`: told what one raises."""

    def __init__(self, failed: OnFailure) -> None:
        self.failed = failed
        self._tasks: list[asyncio.Task[Any]] = []

    def __repr__(self) -> str:
        return f"<Tasks {len(self._tasks)}>"

    def start(self, coroutine: Coroutine[Any, Any, T], *, link: bool = False) -> asyncio.Task[T]:
        """Run `coroutine` beside; what it raises becomes an event. `link`: it speaks for the
        control link, and is listened to after the destination was told to run as well."""

        def done(task: asyncio.Task[T]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.failed(error, link=link)

        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(done)
        self._tasks.append(task)
        return task

    async def end(self) -> None:
        """Cancel all, and wait until they are over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
