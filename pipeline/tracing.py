"""Which trace is on. A context variable: who starts a migration says where its trace goes, and all
tasks below find it. What a trace is: trace_file.py, which nobody imports who has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ..workers.guests import GuestUri
from ..workers.guests.shared_memory import path_of

if TYPE_CHECKING:
    from .trace_file import Trace

_current: ContextVar[Trace | None] = ContextVar("pageferry-trace", default=None)


def current() -> Trace | None:
    """The trace that is on for this task."""
    return _current.get()


@contextlib.contextmanager
def recording(path: str | None, *memory: GuestUri) -> Iterator[None]:
    """What is started in here is traced into the file `path`, if there is one; UsageError if it
    cannot be written, or is a file with `memory`."""
    if path is None:
        yield
        return
    from .trace_file import Trace

    trace = Trace(path, tuple(_file_of(uri) for uri in memory))
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)
        trace.close()


def _file_of(uri: GuestUri) -> str:
    if uri.kind in ("image", "file"):
        return uri.rest
    return path_of(uri) if uri.kind in ("ram", "shm") else ""
