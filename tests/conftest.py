"""Every test leaves nothing behind: no child, thread, descriptor, shared-memory name."""

import gc
import os
import tempfile
import threading
import time
from multiprocessing import forkserver, resource_tracker

import psutil
import pytest
from apart import set_apart

from pageferry.workers.forking import start_process, warm_up

# What is left of a killed process goes when its helpers have seen that.
_HELPERS_SECONDS = 20.0


def pytest_configure():
    """One of several (`pytest -n 2`) works where it sees no other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        set_apart()


@pytest.fixture(scope="session", autouse=True)
def _warm():
    """Start the fork server once: it stays, by design, until pytest ends. And what is there before
    the first test is no test's: the collector need not go through all of it after each."""
    warm_up()
    process = start_process(os.getpid, (), "warm-up")
    process.join()
    process.close()
    gc.collect()
    gc.freeze()


def _own_helpers():
    return {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}


def _children():
    mine = _own_helpers()
    found = {}
    for child in psutil.Process().children(recursive=True):
        if child.pid not in mine and child.is_running():
            found[child.pid] = child.name()
    return found


def _descriptors():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


def _left(folder):
    """pageferry's names in a folder, but for those of other runs that are alive."""
    found = set()
    for name in os.listdir(folder):
        owner = name.split("-")[1] if name.startswith("pageferry-") else ""
        if owner == str(os.getpid()) or (owner.isdigit() and not psutil.pid_exists(int(owner))):
            found.add(f"{folder}/{name}")
    return found


def _names():
    return _left("/dev/shm") | _left(tempfile.gettempdir())


@pytest.fixture(autouse=True)
def _no_leaks(_warm):
    """Compare what there is before and after."""
    before = (_descriptors(), _names(), set(threading.enumerate()))
    shared = _children()  # of a fixture of the whole module
    yield
    gc.collect()
    children = {pid: name for pid, name in _children().items() if pid not in shared}
    descriptors = {
        fd: target
        for fd, target in _descriptors().items()
        if fd not in before[0] and not target.startswith("/proc/")
    }
    threads = set(threading.enumerate()) - before[2]
    assert not children, f"processes left: {children}"
    assert not descriptors, f"descriptors left: {descriptors}"
    left = _names() - before[1]
    until = time.monotonic() + _HELPERS_SECONDS
    while left and time.monotonic() < until:  # helpers of one that was killed are at it
        time.sleep(0.01)
        left = _names() - before[1]
    assert not left, f"names left: {left}"
    assert not threads, f"threads left: {threads}"
