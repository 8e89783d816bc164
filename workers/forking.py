"""How pageferry starts processes: multiprocessing's fork server, and nothing else.

One process imports what workers need and holds no socket, thread or guest memory; each worker
is forked off it in about 10 ms. Spawning each from scratch costs 180 ms of CPU a worker
(numpy, pyzmq), which on two cores delays the first page by half a second. Workers die with
the fork server (PR_SET_PDEATHSIG), and that ends when the coordinator's side of its pipe
closes, however the coordinator ends: no worker holds it (`let_the_server_end`). The resource
tracker outlives them all: it ends, and removes what is left in /dev/shm, when nobody has its pipe
any more, and coordinator and workers do until they are gone.

Imports little but the standard library: the command line starts the fork server before it
imports the rest, so that both import at the same time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker, synchronize, util
from multiprocessing import process as process_module
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from ..transport.errors import HostLacks, WorkerDied
from .leftovers import Leftover, sweep
from .names import FOLDER_VARIABLE, Folder, stem

_PRELOAD = ["pageferry.workers.preload"]
_main_lock = threading.Lock()
_starting: list[float] = []  # since when (time.monotonic) a start is under way
_HUNG_SECONDS = 0.9
_folders: dict[int, str] = {}  # of a process that has, or had, a fork server: its folder
_closing: dict[int, util.Finalize] = {}  # those folders, at the end
_log = logging.getLogger("pageferry.workers")


class _Lock(synchronize.Lock):
    """A lock whose name in /dev/shm goes whenever its owner is killed: the resource tracker knows
    of it before it is there, not afterwards, and the name says whose it is (names.py). (glibc
    makes it under another name first, for some microseconds, and tells nobody which.)"""

    def __init__(self, *, ctx: Any) -> None:
        self._tracked = ""
        try:
            super().__init__(ctx=ctx)
        except BaseException:
            if self._tracked:
                resource_tracker.unregister(self._tracked, "semaphore")
            raise

    def _make_name(self) -> str:
        self._tracked = f"/{stem()}-{secrets.token_hex(4)}"
        resource_tracker.register(self._tracked, "semaphore")
        return self._tracked


class _Context(ForkServerContext):
    def Lock(self) -> synchronize.Lock:  # noqa: N802  its base's name
        return _Lock(ctx=self.get_context())


_context = _Context()


def context() -> ForkServerContext:
    """The one way in which pageferry starts processes and makes locks for them."""
    return _context


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Hide __main__ from multiprocessing while a process starts.

    It would run the caller's script again in every worker. Our workers need none of it, and
    a host tool without `if __name__ == "__main__"` must not fork itself.
    """
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@contextlib.contextmanager
def _environment(**wanted: str) -> Iterator[None]:
    """As what is started meanwhile finds it."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _own_folder(gone: str) -> str:
    """multiprocessing's folder, for the server's socket, is one of ours (names.py), in place of one
    that is `gone`; "" if the program had one before."""
    config: Any = process_module.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") not in (None, gone):
        return ""
    folder = Folder()
    config["tempdir"] = folder.path
    if (last := _closing.pop(os.getpid(), None)) is not None:
        last()  # its descriptor is open still
    _closing[os.getpid()] = util.Finalize(None, folder.close, exitpriority=-100)
    return folder.path


def warm_up() -> None:
    """Start the fork server, without waiting for it: it imports while we do. Any thread may. The
    first time: then remove what killed processes have left."""
    mine = os.getpid()
    try:
        with _hidden_main():
            first = mine not in _folders
            if first or (_folders[mine] and not os.path.isdir(_folders[mine])):
                # or a fork server that ended by itself has taken it along
                _folders[mine] = _own_folder(_folders.get(mine, ""))
                stem()
            context().set_forkserver_preload(_PRELOAD)
            # numpy's linear algebra is not used; its threads would be there at every fork
            with _environment(OPENBLAS_NUM_THREADS="1", **{FOLDER_VARIABLE: _folders[mine]}):
                resource_tracker.ensure_running()
                forkserver.ensure_running()
    except OSError as e:
        raise HostLacks(f"cannot start worker processes ({e}): is TMPDIR usable?") from e
    if first:
        _tell_of(sweep())


def _tell_of(leftovers: list[Leftover]) -> None:
    for found in leftovers:
        if not found.removed:
            _log.warning("%s", found.why)
    if removed := sum(found.removed for found in leftovers):
        _log.info("removed %d leftovers of processes that were killed", removed)


def let_the_server_end() -> None:
    """In every process that is started: do not keep the fork server alive.

    Each child inherits the pipe by whose end the server sees that nobody needs it. One that is
    stopped (SIGSTOP), or sleeps on a page which nobody sends any more, would hold it, and never be
    killed with the server. Idempotent.
    """
    server: Any = forkserver._forkserver
    alive, server._forkserver_alive_fd = server._forkserver_alive_fd, None
    if alive is not None:
        os.close(alive)


def start_process(target: Callable[..., object], args: tuple[Any, ...], name: str) -> BaseProcess:
    """A process that runs `target(*args)`. Blocks until it exists (10 ms when warm)."""
    warm_up()
    process = context().Process(target=target, args=args, name=name, daemon=True)
    with _hidden_main():
        _starting.append(time.monotonic())
        try:
            process.start()
        except (EOFError, ConnectionError) as e:
            raise WorkerDied("the process that starts our processes has ended") from e
        finally:
            _starting.clear()
        # Who starts a process asks all in here whether they have ended, in any thread, and the
        # exit code can be read once: whoever owns the process would find 255. It needs nobody to
        # end it when we exit, since the fork server does (`let_the_server_end`).
        process_module._children.discard(process)  # type: ignore[attr-defined]
    return process


def end_a_hung_server() -> None:
    """Kill the fork server, and with it all that it has started, if it has not started a process
    for which somebody waits; nobody could end that wait. The next start makes another server."""
    server: Any = forkserver._forkserver
    since = next(iter(_starting), None)
    if since is not None and time.monotonic() - since > _HUNG_SECONDS:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)


def cause_of_death(code: int | None) -> str:
    """What the exit code of a dead process says, in words."""
    if code is None or code >= 0:
        return f"exited with status {code}"
    if -code == signal.SIGBUS:
        return "was killed by SIGBUS: a memory file became shorter, or its disk failed"
    if -code == signal.SIGKILL:
        return "was killed (SIGKILL: by somebody, or by the kernel when memory ran out)"
    return f"was killed by {signal.Signals(-code).name}"
