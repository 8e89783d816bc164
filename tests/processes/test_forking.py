"""How processes come and go: nothing of them is left, whoever is killed or stopped."""

import os
import signal
import subprocess
import sys
import threading
from multiprocessing import active_children

import psutil
from helpers import until

from pageferry.workers import forking

# A coordinator with a worker at work, one that waits, and what they share.
_COORDINATOR = """
import operator, sys, time
from multiprocessing import Pipe, forkserver, resource_tracker
from pageferry.workers.counters import Counters
from pageferry.workers.forking import context, start_process
from pageferry.workers.process import run_worker
from pageferry.workers.reserve import Reserve

counters, lock, reserve = Counters(1), context().Lock(), Reserve(1)
idle = reserve.hire(bool, (1,))
assert idle.done(20)
ours, theirs = Pipe()
body = operator.methodcaller("take")
busy = start_process(run_worker, ("pf-test", theirs, counters, 0, body), "busy")
while not counters.read(0)["heartbeat_ns"]:
    time.sleep(0.001)
others = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
print(idle.process.pid, busy.pid, *others, flush=True)
print(lock._semlock.name, flush=True)
sys.stdin.read()
"""


def _gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_coordinator_leaves_nothing_though_its_workers_are_stopped():
    """They cannot see that it is gone. The fork server can, and they are killed with it; then the
    resource tracker removes what nobody uses any more."""
    with subprocess.Popen(
        [sys.executable, "-c", _COORDINATOR],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        pids = [int(pid) for pid in process.stdout.readline().split()]
        lock = process.stdout.readline().strip().removeprefix("/")
        names = [name for name in os.listdir("/dev/shm") if f"-{process.pid}-" in name]
        assert len(names) == 3 and f"sem.{lock}" in names  # with counters, and the marker
        for pid in pids[:2]:
            os.kill(pid, signal.SIGSTOP)
            until(lambda pid=pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "stopped")
        process.kill()
        try:
            until(lambda: all(_gone(pid) for pid in pids), "they are gone", 20)
        finally:
            for pid in pids:
                if not _gone(pid):
                    os.kill(pid, signal.SIGKILL)
    assert not set(names) & set(os.listdir("/dev/shm"))


# The moment between a lock's name and what the standard library tells the resource tracker of it.
_KILLED = """
import logging, os, signal, sys
from multiprocessing import get_logger
from pageferry.workers.forking import context

class Kill(logging.Handler):
    def emit(self, record):
        if "created semlock" in record.msg:
            frame = sys._getframe()
            while "sl" not in frame.f_locals:
                frame = frame.f_back
            print(frame.f_locals["sl"].name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

get_logger().addHandler(Kill())
get_logger().setLevel(logging.DEBUG)
context().Lock()
"""


def test_a_lock_whose_owner_is_killed_as_soon_as_it_has_a_name_leaves_none():
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED], capture_output=True, text=True, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert "leaked semaphore" in killed.stderr  # the tracker has ended: it has that open
    assert killed.stdout.startswith("/pageferry-")
    assert not os.path.exists(f"/dev/shm/sem.{killed.stdout.strip()[1:]}")


def test_two_threads_that_warm_up_leave_the_environment_as_it_was(monkeypatch):
    """The second changes nothing before the first has put back what it changed."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    second = threading.Thread(target=forking.warm_up)

    def waits():
        frame = sys._current_frames().get(second.ident)
        return frame is not None and frame.f_code.co_name == "_hidden_main"

    with forking._hidden_main():
        second.start()
        until(waits, "it waits for its turn")
        assert "OPENBLAS_NUM_THREADS" not in os.environ
    second.join()
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_nobody_else_reads_what_a_process_died_of():
    """multiprocessing asks all children that it knows whenever one is started, and an exit code can
    be read once."""
    process = forking.start_process(signal.pause, (), "test")
    try:
        assert process not in active_children()
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
        assert process not in active_children()
        code = process.exitcode
        process.close()
    assert "SIGKILL" in forking.cause_of_death(code)


_SERVED = """
import os, resource, time
from multiprocessing import forkserver
from pageferry.transport.errors import WorkerDied
from pageferry.workers.forking import start_process
start_process(time.sleep, (0,), "one").join()
server = forkserver._forkserver._forkserver_pid
most = max(map(int, os.listdir(f"/proc/{server}/fd"))) + 1
resource.prlimit(server, resource.RLIMIT_NOFILE, (most, most))
try:
    start_process(time.sleep, (0,), "too many")
except WorkerDied:
    print("died")
while os.path.exists(f"/proc/{server}") and os.waitid(
    os.P_PID, server, os.WEXITED | os.WNOHANG | os.WNOWAIT
) is None:
    time.sleep(0.01)
again = start_process(time.sleep, (0,), "again")
again.join()
print(again.exitcode)
"""


def test_a_fork_server_that_ends_by_itself_is_replaced():
    """By an error of its own it has an orderly end, and takes the folder along that is its
    coordinator's."""
    ran = subprocess.run(
        [sys.executable, "-c", _SERVED], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.split() == ["died", "0"], ran.stderr
