"""ram: live memory whose changes are found by content, with and without a process to stop."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from helpers import pattern, until

import pageferry
from pageferry.transport.errors import DestinationTooSmall, NotConverging, SourceError

# Writes random pages of the file it is given, for ever; says so after the first pass.
WRITER = """
import mmap, os, random, sys
fd = os.open(sys.argv[1], os.O_RDWR)
size = os.fstat(fd).st_size
memory = mmap.mmap(fd, size)
draw = random.Random(5)
count = 0
while True:
    at = draw.randrange(size // 4096) * 4096
    memory[at : at + 8] = draw.randbytes(8)
    count += 1
    if count == 200:
        print("ready", flush=True)
"""


@pytest.fixture
def memory():
    path = f"/dev/shm/test-pf-{os.getpid()}-a"
    with open(path, "wb") as f:
        f.write(pattern(2000))
    yield path
    os.unlink(path)


@pytest.fixture
def target():
    path = f"/dev/shm/test-pf-{os.getpid()}-b"
    yield path
    if os.path.exists(path):
        os.unlink(path)


@pytest.fixture
def writer(memory):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, memory], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()


def test_quiet_memory(memory, target):
    report = pageferry.migrate(f"ram:{memory}", f"ram:{target}", verify=True)
    assert report["dirty-tracking"] == "content-hash"
    with open(memory, "rb") as a, open(target, "rb") as b:
        assert a.read() == b.read()


def test_a_writing_process_is_stopped_and_every_byte_arrives(memory, target, writer):
    report = pageferry.migrate(
        f"ram:{memory}?pid={writer.pid}", f"ram:{target}", downtime_limit=2.0, verify=True
    )
    assert report["status"] == "completed"
    assert "stopped" in report["source-process"]
    assert psutil.Process(writer.pid).status() == psutil.STATUS_STOPPED
    with open(memory, "rb") as a, open(target, "rb") as b:
        assert a.read() == b.read()


def test_a_writer_nobody_can_stop_does_not_converge(memory, target, writer):
    with pytest.raises(NotConverging):
        pageferry.migrate(f"ram:{memory}", f"ram:{target}", max_rounds=3)
    assert not os.path.exists(target)
    assert psutil.Process(writer.pid).status() != psutil.STATUS_STOPPED


def test_a_failure_lets_the_writer_go_on(memory, writer):
    """The destination is too small: refused before anything is stopped or written."""
    small = f"/dev/shm/test-pf-{os.getpid()}-c"
    with open(small, "wb") as f:
        f.write(b"x" * 4096)
    try:
        with pytest.raises(DestinationTooSmall, match="enlarge it"):
            pageferry.migrate(f"ram:{memory}?pid={writer.pid}", f"ram:{small}")
        with open(small, "rb") as f:
            assert f.read() == b"x" * 4096
    finally:
        os.unlink(small)
    assert psutil.Process(writer.pid).status() != psutil.STATUS_STOPPED


def test_memory_of_a_process_through_proc(memory, target):
    """/proc/PID/fd/N, also when the file's name is gone."""
    fd = os.memfd_create("guest")
    try:
        os.write(fd, pattern(100))
        pageferry.migrate(f"ram:/proc/{os.getpid()}/fd/{fd}", f"ram:{target}")
        with open(target, "rb") as f:
            assert f.read() == pattern(100)
    finally:
        os.close(fd)


def test_a_writer_that_ends_is_no_failure(memory, target, writer):
    """It may end at any time: then nobody writes any more."""
    writer.kill()
    writer.wait()
    until(lambda: not psutil.pid_exists(writer.pid), "the writer ends")
    with pytest.raises(SourceError, match="no process"):
        pageferry.migrate(f"ram:{memory}?pid={writer.pid}", f"ram:{target}")
