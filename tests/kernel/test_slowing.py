"""The real kernel: processes are slowed down by a quota or by stops, and have all of their time
again whoever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import until
from own_cgroup import own_cgroup
from slowed import is_free, notes, used, why_no_quota

from pageferry.transport.errors import HostLacks, SourceError, WorkerDied
from pageferry.workers import leftovers
from pageferry.workers.guests import slowing
from pageferry.workers.guests.slowing import MEANS, QUOTA, STOPS, Slowing
from pageferry.workers.guests.stopping import WriterProcess
from pageferry.workers.kernel import cpu_quota
from pageferry.workers.kernel.cpu_quota import Group, group_of, quota_of
from pageferry.workers.kernel.tasks import is_stopped, threads_of

# One thread that counts now and then, one that waits.
COUNTING = """
import sys, threading, time
def count():
    while True:
        for _ in range(20000):
            pass
        time.sleep(0.002)
threading.Thread(target=count, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def counting():
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(params=MEANS)
def slow(request, counting):
    if request.param == QUOTA and (reason := why_no_quota(counting.pid)):
        pytest.skip(reason)
    made = Slowing(counting.pid, request.param)
    made.begin()
    used(counting.pid, 0.05)
    yield made
    made.close()
    made.close()


def test_it_does_less_and_then_as_much_as_before(counting, slow):
    slow.set(90)
    assert len(notes()) == 1
    used(counting.pid, 0.02)
    slow.set(95)
    used(counting.pid, 0.02)
    slow.check()
    (cost,) = slow.processes()
    slow.lift()
    assert is_free(counting.pid)
    assert cost["peak-memory"] > 0 and cost["cpu-time"] <= slow.processes()[0]["cpu-time"]
    assert slow.processes()[0]["pid"] == cost["pid"]
    report = slow.meter.report()
    assert report["by"] in MEANS and report["max-percentage"] == 95
    assert 90 <= report["mean-percentage"] <= 95
    assert "slow-down" in report
    assert report.get("stopped-time", 1) > 0
    assert ("stopped-time" in report) == (report["by"] == STOPS)
    slow.lift()


def test_a_new_thread_is_slowed_down_as_well_and_one_that_was_named_alone(counting):
    """A quota is for those that run the guest."""
    if reason := why_no_quota(counting.pid):
        pytest.skip(reason)
    leader, busy = counting.pid, threads_of(counting.pid)[1]
    some = Slowing(leader, QUOTA, lambda: [busy])
    some.begin()
    some.set(50)
    groups = {t: Path(f"/proc/{leader}/task/{t}/cgroup").read_text() for t in (leader, busy)}
    assert "pageferry-" in groups[busy] and "pageferry-" not in groups[leader]
    (group,) = some._note.groups
    limit = Path(group.folder, "cpu.max" if group.version == 2 else "cpu.cfs_quota_us").read_text()
    assert 0 < int(limit.split()[0]) <= 100_000 * os.cpu_count() // 2
    some.close()
    assert is_free(leader)


def test_it_can_be_stopped_for_good(counting, slow):
    """And no sweep lets it go on: the note has gone, or says nothing of signals."""
    writer = WriterProcess(counting.pid)
    slow.set(95)
    slow.release()
    writer.stop()
    assert all("T" in states(counting.pid) for _ in range(3))
    slow.lift()
    assert notes() == []
    leftovers.sweep()
    writer.check()
    assert set(states(counting.pid)) == {"T"}
    writer.resume()
    writer.close()
    assert is_free(counting.pid)


def test_who_slows_it_down_by_signals_is_the_only_one(counting):
    """Two would take each other's moments for their own: then it runs where it should not."""
    writer = WriterProcess(counting.pid)
    first, second = Slowing(counting.pid, "signal"), Slowing(counting.pid, "signal")
    first.begin()
    second.begin()
    first.set(95)
    with pytest.raises(HostLacks, match=r"somebody else does|stands still"):
        second.set(50)
    with pytest.raises(SourceError, match="somebody else slows"):
        writer.stop()
    second.close()
    first.close()
    writer.stop()
    writer.resume()
    writer.close()
    assert is_free(counting.pid)


def states(pid):
    return [
        Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
        for task in threads_of(pid)
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_whoever_slows_it_down_is_killed_or_stopped(counting, slow, number, monkeypatch):
    """It has all of its time again, and the migration hears of it."""
    monkeypatch.setattr(slowing, "_STALL_SECONDS", 0.2)
    monkeypatch.setattr(slowing, "_LOOK_SECONDS", 0.0)
    slow.set(98)
    if slow.stops_all:
        until(lambda: is_stopped(counting.pid), "it stands still")
    os.kill(slow._process.pid, number)

    def noticed():
        try:
            slow.check()
        except WorkerDied:
            return True
        return False

    until(noticed, "it is noticed")
    assert is_free(counting.pid)


def test_it_is_lifted_although_whoever_does_that_was_stopped(counting, slow, monkeypatch):
    monkeypatch.setattr(slowing, "_ANSWER_SECONDS", 0.2)
    slow.set(98)
    os.kill(slow._process.pid, signal.SIGSTOP)
    slow.lift()
    assert is_free(counting.pid)


def test_one_that_ends_meanwhile(counting, slow):
    slow.set(90)
    counting.kill()
    counting.wait()
    slow.lift()
    slow.close()
    assert notes() == []


def test_one_that_stands_still_is_left_alone(counting, slow):
    os.kill(counting.pid, signal.SIGSTOP)
    until(lambda: set(states(counting.pid)) == {"T"}, "it stops")
    with pytest.raises(HostLacks, match="stands still"):
        slow.set(50)
    slow.lift()
    assert set(states(counting.pid)) == {"T"}


COORDINATOR = """
import sys
from pageferry.workers.guests.slowing import Slowing
slow = Slowing(int(sys.argv[1]), sys.argv[2])
slow.begin()
slow.set(98)
print(slow._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("everybody", [False, True])
def test_the_coordinator_is_killed(counting, means, everybody):
    """Alone: whoever slows it down sees it, and lifts. All at once: the next start does."""
    if means == QUOTA and (reason := why_no_quota(counting.pid)):
        pytest.skip(reason)
    with subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(counting.pid), means],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as coordinator:  # fmt: skip
        slower = int(coordinator.stdout.readline())
        if means == STOPS:
            until(lambda: is_stopped(counting.pid), "it stands still")
        if everybody:
            os.kill(slower, signal.SIGSTOP)  # it sees nothing
        coordinator.kill()
        coordinator.wait()
        if everybody:
            os.kill(slower, signal.SIGKILL)
            assert len(notes()) == 1
            (shown,) = throttled(dry_run=True)
            assert f"process {counting.pid} was slowed down" in shown.why
            assert len(notes()) == 1
            until(lambda: throttled(dry_run=False) or not notes(), "it is swept")
        until(lambda: not notes(), "it is lifted")
    assert is_free(counting.pid)


def throttled(*, dry_run):
    found = leftovers.clean([], partial=False, dry_run=dry_run)
    return [one for one in found if one.kind == "throttled"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", False),
        ('{"pid": 1', False),
        ('{"pid": 1, "began": "1", "namespace": 0, "groups": []}', True),
        ('{"pid": 1, "began": "1", "namespace": 0, "groups": [{"folder": "/tmp/x", "version": 1, '
         '"enables": false}]}', False),
    ],
)  # fmt: skip
def test_notes_that_say_nothing(text, kept):
    """Half written, of another namespace, of a folder that is none of ours."""
    path = Path("/dev/shm/pageferry-1-0123456789abcdef-0-throttled")
    path.write_text(text)
    try:
        leftovers.sweep()
        assert path.exists() == kept
    finally:
        path.unlink(missing_ok=True)


# ---- cgroups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "quota"),
    [
        (1.0, (100_000, 100_000)),
        (2.5, (250_000, 100_000)),
        (0.1, (10_000, 100_000)),
        (0.01, (1000, 100_000)),
        (0.005, (1000, 200_000)),
        (0.0005, (1000, 1_000_000)),
        (0.0, (1000, 1_000_000)),
    ],
)
def test_quotas_that_the_kernel_takes(cpus, quota):
    assert quota_of(cpus) == quota


def test_what_is_written_where(tmp_path):
    """Version 2, in files that do nothing: a kernel that has its cpu controller there is seldom."""
    above = tmp_path / "vm"
    above.mkdir()
    name = "pageferry-1-0123456789abcdef-01234567"
    group = Group(str(above / name), 2, enables=True)
    group.make()
    assert (above / name / "cgroup.type").read_text() == "threaded"
    assert (above / "cgroup.subtree_control").read_text() == "+cpu"
    group.limit(0.25)
    assert (above / name / "cpu.max").read_text() == "25000 100000"
    group.unlimited()
    assert (above / name / "cpu.max").read_text() == "max 100000"
    assert group_of(group.as_dict()) == group
    with pytest.raises(ValueError, match="none of ours"):
        group_of({"folder": "/sys/fs/cgroup/vm", "version": 2, "enables": False})


def test_threads_of_a_threaded_cgroup(counting):
    """The real version 2, whether or not it has the cpu controller: one thread goes there, all come
    back, and the cgroup above is as it was."""
    with own_cgroup() as above:
        (above / "cgroup.procs").write_text(str(counting.pid))
        group = Group(str(above / "pageferry-1-0123456789abcdef-01234567"), 2)
        busy = threads_of(counting.pid)[1]
        group.make()
        group.enter(busy)
        group.enter(1 << 22)  # it has ended
        assert group.inside() == [busy]
        assert (above / "cgroup.type").read_text() == "domain threaded\n"
        assert (above / "cgroup.procs").read_text() == f"{counting.pid}\n"
        group.remove()
        group.remove()
        assert (above / "cgroup.type").read_text() == "domain\n"
        assert str(busy) in (above / "cgroup.threads").read_text().split()


MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
41 31 0:38 / /sys/fs/cgroup/unified\\040x rw,relatime - cgroup2 cgroup2 rw
"""


def test_where_hierarchies_are_mounted():
    def found(kind, text):
        path = cpu_quota.re.search("^(.*)$", text)
        return cpu_quota._folder(MOUNTS, kind, path)

    assert found(cpu_quota.SECOND, "a/b") == Path("/sys/fs/cgroup/unified x/a/b")
    assert found(cpu_quota.FIRST, "vm") == Path("/sys/fs/cgroup/cpu,cpuacct/vm")
    assert found(cpu_quota.FIRST, "../vm") is None
    assert cpu_quota._folder("", cpu_quota.FIRST, None) is None


def test_time_is_weighed(monkeypatch):
    """Half a second at 50 %, half of that at 80 %: 60 on average; 100 pages a second before and 25
    meanwhile."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = slowing.Meter("guest", "pages-per-second")
    assert meter.report() == {}
    for at, percentage, work in ((0, 0, 0), (1, 50, 100), (2, 80, 130), (2.5, 0, 137.5)):
        now[0] = at
        meter.change(percentage, work)
    now[0] = 100
    assert meter.report() == {
        "by": "guest", "time": 1500, "mean-percentage": 60.0, "max-percentage": 80,
        "slow-down": 75.0, "pages-per-second-before": 100.0, "pages-per-second-throttled": 25.0,
    }  # fmt: skip
