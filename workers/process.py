"""What every worker process does before and after its own job."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar

from . import jobs
from .counters import Counters, Row
from .forking import let_the_server_end
from .kernel.libc import die_with_parent, keep_buffers, set_process_name

if TYPE_CHECKING:
    from .tracing import Writer

# A worker says that it lives at least this often, whatever it does.
HEARTBEAT_SECONDS = 0.25
T = TypeVar("T")


class Desk:
    """A worker's side of its pipe, its row of counters and, if it is traced, its ring."""

    def __init__(self, pipe: Connection, row: Row, trace: Writer | None = None) -> None:
        self.pipe = pipe
        self.row = row
        self.trace = trace
        # Connection.poll builds a selector a call: 20 us, this one 1
        self._poll = select.poll()
        self._poll.register(pipe.fileno(), select.POLLIN)

    def waiting(self) -> bool:
        return bool(self._poll.poll(0))

    def take(self) -> jobs.AnyJob:
        return jobs.decode(self.pipe.recv_bytes(1 << 20))

    def say(self, job: jobs.AnyJob) -> None:
        self.pipe.send_bytes(jobs.encode(job))


def traced(desk: Desk, plain: type[T]) -> type[T]:
    """`plain`, or where it is traced what it is then. Decided once a process: a worker that is not
    traced has nothing to look at while it works."""
    if desk.trace is None:
        return plain
    from .traced import TRACED  # it imports all workers

    return TRACED[plain]


def run_worker(
    name: str, pipe: Connection, counters: Counters, index: int, body: Callable[[Desk], None]
) -> bool:
    """Run `body` as worker `index`: tied to its parent's life, deaf to Ctrl-C.

    Ctrl-C reaches the whole process group; the coordinator alone acts on it. An error is
    told over the pipe; a closed pipe means that the coordinator is gone, and so are we. True if
    `body` ended because it was told to: then the process may do something else (reserve.py).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(os.getppid())
    let_the_server_end()
    set_process_name(name)
    keep_buffers()
    desk = Desk(pipe, counters.row(index), counters.ring(index))
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(counters.row(index), over), daemon=True)
    heart.start()
    try:
        body(desk)
        return True
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as e:
        with contextlib.suppress(OSError):
            desk.say(jobs.failed(e))
    finally:
        over.set()
        heart.join()
    return False


def _beat(row: Row, over: threading.Event) -> None:
    """Say that this process lives, in a thread: one batch at a high level takes seconds."""
    while True:
        row.beat()
        if over.wait(HEARTBEAT_SECONDS):
            row.beat()
            return
