"""The real kernel: processes are stopped, by their cgroup or a signal, and go on as they were."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from helpers import until
from own_cgroup import enter, own_cgroup

from pageferry.transport.errors import SourceError, UsageError
from pageferry.workers.guests import stopping
from pageferry.workers.guests.stopping import WriterProcess
from pageferry.workers.kernel import freezer

# Several threads that count.
COUNTING = """
import sys, threading
counts = [0, 0, 0]
def count(i):
    while True:
        counts[i] += 1
for i in range(3):
    threading.Thread(target=count, args=(i,), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
# Waits (CLONE_VFORK) until its child has ended, which reads first.
WAITING = """
import ctypes, os
number = 56 if os.uname().machine == "x86_64" else 220
if ctypes.CDLL(None).syscall(number, 0x4000 | 17, 0, 0, 0, 0) == 0:
    os.read(0, 1)
    os._exit(0)
os.write(1, b"on")
"""


def states(pid):
    """Of all threads."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/stat") as f:
            found.append(f.read().rpartition(")")[2].split()[0])
    return found


def cpu_time(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def goes_on(pid):
    """It uses the processor again."""
    before = cpu_time(pid)
    until(lambda: cpu_time(pid) > before, "it goes on")
    return True


@pytest.fixture
def counting():
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def writer(counting):
    writer = WriterProcess(counting.pid)
    yield writer
    writer.close()
    writer.close()


@pytest.fixture
def cgroup(counting):
    """The process is alone in it."""
    with own_cgroup() as folder:
        enter(folder, counting.pid)
        yield folder


def frozen(folder):
    return (folder / "cgroup.freeze").read_text() == "1\n"


def test_stopped_by_a_signal_where_it_is_not_alone(counting, writer):
    """pytest is in the same cgroup."""
    writer.stop()
    assert set(states(counting.pid)) == {"T"}
    assert writer.stands_still
    assert writer.describe().startswith("stopped (SIGSTOP)")
    writer.check()
    writer.stop()
    writer.resume()
    assert goes_on(counting.pid)
    assert writer.describe() == "runs"
    writer.resume()


def test_frozen_where_it_is_alone(counting, writer, cgroup):
    writer.stop()
    assert frozen(cgroup)
    assert freezer.is_frozen(counting.pid)
    assert "T" not in states(counting.pid)
    assert writer.describe().startswith(f"frozen ({cgroup})")
    writer.check()
    writer.resume()
    assert not frozen(cgroup)
    assert goes_on(counting.pid)
    assert not freezer.is_frozen(counting.pid)


def test_company_in_the_cgroup_is_not_frozen(counting, writer, cgroup):
    with subprocess.Popen(["sleep", "60"]) as other:
        enter(cgroup, other.pid)
        writer.stop()
        assert not frozen(cgroup)
        assert set(states(counting.pid)) == {"T"}
        other.kill()


def test_company_below_the_cgroup_is_not_frozen(counting, writer, cgroup):
    (cgroup / "below").mkdir()
    writer.stop()
    assert not frozen(cgroup)
    assert set(states(counting.pid)) == {"T"}
    (cgroup / "below").rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_freezer_that_is_not_ours_to_use(counting, cgroup):
    """Another user has to stop it by signal."""
    assert freezer.freezer_of(counting.pid) is not None
    os.setresuid(65534, 0, 0)  # access(2) asks for the real user
    try:
        assert freezer.freezer_of(counting.pid) is None
    finally:
        os.setresuid(0, 0, 0)


def test_one_that_was_stopped_stays_so(counting, writer):
    os.kill(counting.pid, signal.SIGSTOP)
    until(lambda: set(states(counting.pid)) == {"T"}, "it stops")
    writer.stop()
    assert writer.describe().startswith("stood still before")
    writer.resume()
    assert set(states(counting.pid)) == {"T"}


def test_one_that_was_frozen_stays_so(counting, writer, cgroup):
    (cgroup / "cgroup.freeze").write_text("1")
    until(lambda: freezer.is_frozen(counting.pid), "it freezes")
    writer.stop()
    assert writer.describe().startswith("stood still before")
    writer.resume()
    assert frozen(cgroup)
    assert freezer.is_frozen(counting.pid)


def test_one_that_is_frozen_from_above(counting, writer, cgroup):
    """Its own freezer is off, and stays off."""
    (cgroup / "below").mkdir()
    enter(cgroup / "below", counting.pid)
    (cgroup / "cgroup.freeze").write_text("1")
    until(lambda: freezer.is_frozen(counting.pid), "it freezes")
    writer.stop()
    assert not frozen(cgroup / "below")
    writer.resume()
    (cgroup / "cgroup.freeze").write_text("0")
    assert goes_on(counting.pid)
    enter(cgroup, counting.pid)
    (cgroup / "below").rmdir()


def test_somebody_lets_it_go_on(counting, writer):
    writer.stop()
    os.kill(counting.pid, signal.SIGCONT)
    until(lambda: set(states(counting.pid)) != {"T"}, "it goes on")
    with pytest.raises(SourceError, match="go on while it was being moved"):
        writer.check()
    writer.resume()
    writer.check()


def test_somebody_thaws_it(counting, writer, cgroup):
    writer.stop()
    os.kill(counting.pid, signal.SIGCONT)  # means nothing to it
    writer.check()
    (cgroup / "cgroup.freeze").write_text("0")
    assert goes_on(counting.pid)
    with pytest.raises(SourceError, match="go on while it was being moved"):
        writer.check()


def test_one_that_does_not_stop(monkeypatch):
    """It waits in the kernel, where no signal is looked at; later it goes on as if nothing was."""
    monkeypatch.setattr(stopping, "_STOP_SECONDS", 0.05)
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        until(lambda: states(process.pid) == ["D"], "it waits")
        with contextlib.closing(WriterProcess(process.pid)) as writer:
            with pytest.raises(SourceError, match="does not stop"):
                writer.stop()
            assert not writer.stands_still
            writer.resume()
        out, _ = process.communicate(b"x")
        assert out == b"on"
        assert process.returncode == 0


def test_one_that_does_not_freeze(tmp_path):
    """A cgroup made of files, in which nothing happens."""
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    (tmp_path / "cgroup.freeze").write_text("0")
    one = freezer.Freezer(tmp_path, 1)
    with pytest.raises(TimeoutError, match="does not freeze"):
        one.freeze(0.01)
    assert (tmp_path / "cgroup.freeze").read_text() == "1"
    one.thaw()
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


@pytest.mark.parametrize("first", ["stop", "kill"])
def test_one_that_is_killed(counting, writer, first):
    """Before or after it was stopped: nobody writes any more."""
    if first == "stop":
        writer.stop()
    counting.kill()
    until(writer.has_ended, "it ends")
    writer.stop()
    writer.check()
    assert writer.describe() == ("has ended" if first == "stop" else "runs")
    counting.wait()
    assert writer.has_ended()
    writer.check()
    writer.resume()


def test_one_that_is_killed_while_it_is_frozen(counting, writer, cgroup):
    writer.stop()
    counting.kill()
    counting.wait()
    writer.check()
    assert writer.describe() == "has ended"
    writer.resume()
    assert not frozen(cgroup)


def test_a_cgroup_that_is_gone(counting, writer, cgroup):
    writer.stop()
    counting.kill()
    counting.wait()
    cgroup.rmdir()
    writer.resume()
    cgroup.mkdir()


def test_nobody_is_there():
    with subprocess.Popen(["true"]) as process:
        pass
    for pid in (process.pid, 1 << 22):
        with pytest.raises(SourceError, match=f"there is no process {pid}"):
            WriterProcess(pid)
    with pytest.raises(UsageError, match="the process that writes the memory"):
        WriterProcess(os.getpid())


def test_a_thread_is_no_process(counting):
    thread = next(t for t in os.listdir(f"/proc/{counting.pid}/task") if t != str(counting.pid))
    with pytest.raises(SourceError, match="there is no process"):
        WriterProcess(int(thread))
