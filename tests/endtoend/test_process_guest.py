"""pid: the shared memory of processes that know nothing of it, whole and exact, whatever way they
write it."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shared_writer
from helpers import Running, pattern, receiver, sweep, until
from helpers import pageferry as run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_cgroup import enter, own_cgroup
from shared_writer import PAGE, SharedWriter, one_step

import pageferry
from pageferry.transport.errors import (
    AttachError,
    HostLacks,
    NotConverging,
    SourceError,
    UsageError,
)
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.guests.shared_memory import path_of
from pageferry.workers.kernel.inject import Injection

PAGES = 1500


@pytest.fixture
def memory():
    """The name of a file in /dev/shm, zero and without holes."""
    path = f"/dev/shm/test-pf-{os.getpid()}-a"
    with open(path, "wb") as f:
        f.write(bytes(PAGES * PAGE))
    yield path
    os.unlink(path)


@pytest.fixture
def target():
    path = f"/dev/shm/test-pf-{os.getpid()}-b"
    yield path
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@pytest.fixture
def writer(memory):
    """It writes all of it, for ever, in every way."""
    with SharedWriter("write", memory, PAGES) as writer:
        yield writer


@pytest.fixture
def obeying(memory):
    """It has mapped all of it, and writes as it is told."""
    with SharedWriter("obey", memory, PAGES) as obeying:
        obeying.tell("map", 0, 0, PAGES)
        yield obeying


def content(path):
    return Path(path).read_bytes()


def memfd_of(pid):
    """Its only one."""
    folder = f"/proc/{pid}/fd"
    return next(
        f"{folder}/{n}" for n in os.listdir(folder) if "memfd" in os.readlink(f"{folder}/{n}")
    )


def needs_tracking(writer):
    """Skip where the kernel cannot track what it writes."""
    with contextlib.closing(open_source(parse_guest(f"pid:{writer.pid}"))) as guest:
        if guest.tracking != "pagemap-scan":
            pytest.skip(guest.facts()["dirty-tracking-because"])


# ---- it moves ----------------------------------------------------------------------------------


def test_a_running_process_and_every_byte(memory, target, writer):
    needs_tracking(writer)
    report = pageferry.migrate(
        f"pid:{writer.pid}", f"ram:{target}", downtime_limit=2.0, verify=True
    )
    assert report["status"] == "completed"
    assert report["dirty-tracking"] == "pagemap-scan"
    assert report["last-look"] == "content-hash"
    assert report["attach-pause-us"] > 0
    assert report["source-process"].startswith("stopped (SIGSTOP)")
    assert "registers" in report["not-moved"]
    assert writer.state() == "T"
    assert content(memory) == content(target)
    assert one_step(content(target))


@pytest.mark.parametrize("kind", ["ram", "shm", "image"])
def test_destinations(memory, writer, tmp_path, kind):
    name = f"test-pf-{os.getpid()}-c"
    where = {"ram": f"/dev/shm/{name}", "shm": name, "image": f"{tmp_path}/image"}[kind]
    path = tmp_path / "image" if kind == "image" else Path("/dev/shm", name)
    try:
        pageferry.migrate(f"pid:{writer.pid}", f"{kind}:{where}", downtime_limit=2.0, verify=True)
        assert content(memory) == content(path)
        assert one_step(content(path))
    finally:
        path.unlink(missing_ok=True)


def test_between_two_hosts(memory, target, writer):
    with receiver("--into", f"ram:{target}", "--once") as receiving:
        done = run(
            "send", f"pid:{writer.pid}", receiving.endpoint, "--json", "--downtime-limit", "2s",
            "--codec", "lz4",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert receiving.finish()[0] == 0
    assert report["status"] == "completed"
    assert content(memory) == content(target)
    assert one_step(content(target))


def test_memory_without_a_name(target):
    """A memfd, over what was there before."""
    with open(target, "wb") as f:
        f.write(pattern(PAGES))
    with SharedWriter("write", "memfd:guest", PAGES) as writer:
        pageferry.migrate(
            f"pid:{writer.pid}?mapping=/memfd:guest", f"ram:{target}", downtime_limit=2.0
        )
        assert content(memfd_of(writer.pid)) == content(target)
        assert one_step(content(target))


# Maps memory that has no file at all, and says what it is.
ANONYMOUS = """
import mmap, sys
memory = mmap.mmap(-1, 300 * 4096)
for page in range(0, 300, 3):
    memory[page * 4096 : page * 4096 + 5] = b"guest"
print("ready", flush=True)
sys.stdin.read()
"""


# Memory of shmget(2), which has no descriptor anywhere.
SYSTEM_V = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
number = libc.shmget(0, 300 * 4096, 0o1600)
at = libc.shmat(number, None, 0)
libc.shmctl(number, 0, None)
for page in range(0, 300, 3):
    ctypes.memmove(at + page * 4096, b"guest", 5)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: memory that nobody has a descriptor of")
@pytest.mark.parametrize("program", [ANONYMOUS, SYSTEM_V], ids=["anonymous", "system-v"])
def test_memory_without_a_file(target, program):
    """What forked workers have in common."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        pageferry.migrate(f"pid:{process.pid}", f"ram:{target}", downtime_limit=2.0, verify=True)
        process.kill()
    page = b"guest".ljust(PAGE, b"\0") + bytes(2 * PAGE)
    assert content(target) == page * 100


def test_frozen_where_it_is_alone_in_its_cgroup(memory, target, writer):
    with own_cgroup() as folder:
        enter(folder, writer.pid)
        report = pageferry.migrate(f"pid:{writer.pid}", f"ram:{target}", downtime_limit=2.0)
        assert report["source-process"].startswith(f"frozen ({folder})")
        assert (folder / "cgroup.freeze").read_text() == "1\n"
        assert writer.state() != "T"
        assert content(memory) == content(target)
        assert one_step(content(target))


def test_ram_with_a_pid_is_frozen_too(memory, target, writer):
    with own_cgroup() as folder:
        enter(folder, writer.pid)
        report = pageferry.migrate(
            f"ram:{memory}?pid={writer.pid}", f"ram:{target}", downtime_limit=2.0
        )
        assert report["source-process"].startswith(f"frozen ({folder})")
        assert content(memory) == content(target)


def test_one_that_was_stopped_by_somebody_else(memory, target, writer):
    os.kill(writer.pid, signal.SIGSTOP)
    until(lambda: writer.state() == "T", "it stops")
    report = pageferry.migrate(f"pid:{writer.pid}", f"ram:{target}")
    assert report["source-process"].startswith("stood still before")
    assert report["run-state"] == "paused"
    assert content(memory) == content(target)
    assert writer.state() == "T"


def test_one_that_was_frozen_by_somebody_else(memory, target, writer):
    """Nothing can be done in it: nobody tracks it, and nobody has to."""
    with own_cgroup() as folder:
        enter(folder, writer.pid)
        (folder / "cgroup.freeze").write_text("1")
        until(lambda: "frozen 1" in (folder / "cgroup.events").read_text(), "it freezes")
        with pytest.raises(AttachError, match="is frozen"):
            pageferry.migrate(f"pid:{writer.pid}?tracking=pagemap-scan", f"ram:{target}")
        report = pageferry.migrate(f"pid:{writer.pid}", f"ram:{target}")
        assert "is frozen" in report["dirty-tracking-because"]
        assert content(memory) == content(target)


# ---- what the kernel sees, and what it does not ------------------------------------------------


def just_before(what, act):
    """An `on_started` that does `act` before the guest is first asked for that (a method)."""

    def on_started(migration):
        guest = migration.guest
        method = getattr(guest, what)

        def first(*arguments):
            setattr(guest, what, method)
            act()
            return method(*arguments)

        setattr(guest, what, first)

    return on_started


def telling(obeying, steps):
    return lambda: [obeying.tell(*step) for step in steps]


@pytest.mark.parametrize("when", ["dirty_pages", "stop"])
@pytest.mark.parametrize(
    "steps",
    [
        [("pwrite", *range(3, PAGES, 7))],
        [("fork_and_write", 5, 900)],
        [("map", 5000, 100, 50), ("write", *range(5000, 5050)), ("unmap", 5000, 50)],
        [("unmap", 100, 1000), ("pwrite", 100, 1099), ("map", 100, 100, 1000), ("write", 500)],
        [("move", 0, PAGES, 5000), ("write", 5007)],
        [("advise", 0, PAGES, mmap.MADV_REMOVE), ("write", 7)],
    ],
    ids=["pwrite", "child", "comes-and-goes", "anew", "moves", "hole"],
)
def test_what_happens_when_all_has_been_sent(memory, target, obeying, steps, when):
    """Before the first look, or behind the last one before it is stopped: no round brings it."""
    with open(memory, "r+b") as f:
        f.write(pattern(PAGES))
    report = pageferry.migrate(
        f"pid:{obeying.pid}", f"ram:{target}", downtime_limit=30.0,
        on_started=just_before(when, telling(obeying, steps)),
    )  # fmt: skip
    assert report["status"] == "completed"
    assert report["ram"]["dirty-sync-count"] == 2
    assert content(memory) == content(target)


def counting_scans(scans):
    """An `on_started` that notes in which round all memory is compared with what was sent."""

    def on_started(migration):
        scan = migration._rounds.scan

        async def counted(equipment):
            scans.append((migration.core.round, migration.core.stopped))
            await scan(equipment)

        migration._rounds.scan = counted

    return on_started


def test_all_memory_is_looked_at_once_while_it_runs_and_when_it_is_stopped(target, obeying):
    needs_tracking(obeying)
    obeying.tell("write", *range(PAGES))
    scans = []
    pageferry.migrate(f"pid:{obeying.pid}", f"ram:{target}", on_started=counting_scans(scans))
    assert scans == [(1, False), (1, True)]


def test_rounds_in_between_ask_the_kernel_alone(target, obeying):
    """But what a look at all memory takes belongs to the downtime that is expected of each."""
    needs_tracking(obeying)
    seen, scans, took = [], [], []

    def on_started(migration):
        seen.append(migration)
        counting_scans(scans)(migration)
        written, taken = migration.guest.dirty_pages, migration.convergence.dirty_taken

        def some_is_written(block):
            obeying.tell("write", 5)
            return written(block)

        def noted(pages, since, seconds):
            took.append(seconds)
            taken(pages, since, seconds)

        migration.guest.dirty_pages = some_is_written
        migration.convergence.dirty_taken = noted

    with pytest.raises(NotConverging):
        pageferry.migrate(
            f"pid:{obeying.pid}", f"ram:{target}", downtime_limit=0.001, max_rounds=4,
            on_started=on_started,
        )  # fmt: skip
    assert scans == [(1, False)]
    assert len(took) == 4
    assert min(took) > seen[0]._rounds._scan_seconds > 0
    assert obeying.state() != "T"


def test_by_content_alone(memory, target, writer):
    report = pageferry.migrate(
        f"pid:{writer.pid}?tracking=content-hash", f"ram:{target}", downtime_limit=2.0, verify=True
    )
    assert report["dirty-tracking"] == "content-hash"
    assert "last-look" not in report
    assert "dirty-tracking-because" not in report
    assert content(memory) == content(target)
    assert one_step(content(target))


def test_by_content_where_somebody_else_traces_it(memory, target, writer):
    """The result says why; and who insists hears of it."""
    with Injection(writer.pid):
        with pytest.raises(AttachError, match="is traced by process"):
            pageferry.migrate(f"pid:{writer.pid}?tracking=pagemap-scan", f"ram:{target}")
        with contextlib.closing(open_source(parse_guest(f"pid:{writer.pid}"))) as guest:
            assert guest.tracking == "content-hash"
            assert not guest.last_look_by_content
            assert "is traced by process" in guest.facts()["dirty-tracking-because"]
    assert not os.path.exists(target)


def test_by_content_where_somebody_else_tracks_it(target, obeying):
    """There can be one userfaultfd for a mapping: another pageferry's, or its own."""
    needs_tracking(obeying)
    with contextlib.closing(open_source(parse_guest(f"pid:{obeying.pid}"))):
        with pytest.raises(HostLacks, match="by somebody else already"):
            opens(f"pid:{obeying.pid}?tracking=pagemap-scan")
        report = pageferry.migrate(f"pid:{obeying.pid}", f"ram:{target}")
        assert report["dirty-tracking"] == "content-hash"
        assert "by somebody else already" in report["dirty-tracking-because"]


# ---- it does not move --------------------------------------------------------------------------


def test_cancelled_it_runs_on(memory, target, writer):
    def on_started(migration):
        just_before("dirty_pages", migration.cancel)(migration)

    needs_tracking(writer)
    with pytest.raises(pageferry.PageferryError) as caught:
        pageferry.migrate(f"pid:{writer.pid}", f"ram:{target}", on_started=on_started)
    assert caught.value.exit_code == 130
    assert writer.state() != "T"
    assert not os.path.exists(target)
    needs_tracking(writer)  # nothing of ours is left in it: another may track it


@pytest.mark.parametrize("frozen", [False, True], ids=["signal", "freezer"])
def test_one_that_was_stopped_goes_on_if_it_cannot_arrive(memory, writer, tmp_path, frozen):
    """The destination's folder is gone in the end: what was done to the process is undone."""
    place = tmp_path / "place"
    place.mkdir()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(own_cgroup()) if frozen else None
        if folder is not None:
            enter(folder, writer.pid)
        with pytest.raises(pageferry.PageferryError, match="cannot name"):
            pageferry.migrate(
                f"pid:{writer.pid}", f"image:{place}/out", downtime_limit=30.0,
                on_started=just_before("stop", lambda: place.rename(tmp_path / "elsewhere")),
            )  # fmt: skip
        assert writer.state() != "T"
        if folder is not None:
            assert (folder / "cgroup.freeze").read_text() == "0\n"
        before = content(memory)
        until(lambda: content(memory) != before, "it writes on")


def ending(writer):
    def end():
        writer.process.kill()
        writer.process.wait()

    return end


@pytest.mark.parametrize(
    ("how", "when"),
    [("content-hash", "stop"), ("pagemap-scan", "stop"), ("pagemap-scan", "dirty_pages")],
)
def test_one_that_ends_is_an_error(target, writer, how, when):
    """Before the switchover: it says where its memory may be."""
    needs_tracking(writer)
    with pytest.raises(SourceError, match=f"process {writer.pid} has ended: nothing was moved"):
        pageferry.migrate(
            f"pid:{writer.pid}?tracking={how}", f"ram:{target}", downtime_limit=30.0,
            on_started=just_before(when, ending(writer)),
        )  # fmt: skip
    assert not os.path.exists(target)


def test_one_that_is_killed_when_it_stands_still_has_moved(memory, target, writer):
    report = pageferry.migrate(
        f"pid:{writer.pid}", f"ram:{target}", downtime_limit=30.0,
        on_started=just_before("save_state", ending(writer)),
    )  # fmt: skip
    assert report["source-process"] == "has ended"
    assert content(memory) == content(target)
    assert one_step(content(target))


def test_somebody_lets_it_go_on_meanwhile(target, writer):
    """What it writes from then on would be lost."""

    def let_go():
        os.kill(writer.pid, signal.SIGCONT)
        until(lambda: writer.state() != "T", "it goes on")

    with pytest.raises(SourceError, match="go on while it was being moved"):
        pageferry.migrate(
            f"pid:{writer.pid}", f"ram:{target}", downtime_limit=30.0,
            on_started=just_before("save_state", let_go),
        )  # fmt: skip
    assert not os.path.exists(target)


def test_memory_that_grows_is_an_error(target, obeying):
    with pytest.raises(
        SourceError, match=f"had {PAGES * PAGE} bytes and has {PAGES * PAGE + PAGE}"
    ):
        pageferry.migrate(
            f"pid:{obeying.pid}", f"ram:{target}", downtime_limit=30.0,
            on_started=just_before("stop", lambda: obeying.tell("truncate", PAGES + 1)),
        )  # fmt: skip
    assert obeying.state() != "T"


def test_it_outlives_a_pageferry_that_is_killed(target, writer):
    """And can be tracked by another."""
    needs_tracking(writer)
    with Running(
        "copy", f"pid:{writer.pid}", f"ram:{target}", "--max-bandwidth", "1MB", "--codec", "none"
    ) as running:
        ours = f"pageferry-{running.process.pid}-"
        until(
            lambda: any(
                name.startswith(ours) and name.endswith("-hashes")
                for name in os.listdir("/dev/shm")
            ),
            "it is tracked",
        )
        running.kill()
    sweep(running.process.pid)
    assert writer.state() != "T"
    needs_tracking(writer)


# ---- what is refused ---------------------------------------------------------------------------


def opens(uri):
    """As `pageferry` does; closed again."""
    with contextlib.closing(open_source(parse_guest(uri))) as guest:
        return guest.blocks[0].size


def test_bad_pids(target):
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(SourceError, match=f"there is no process {process.pid}"):
        pageferry.migrate(f"pid:{process.pid}", f"ram:{target}")
    with pytest.raises(UsageError, match="the process that writes the memory"):
        pageferry.migrate(f"pid:{os.getpid()}", f"ram:{target}")
    assert not os.path.exists(target)


def test_a_process_without_shared_memory(obeying):
    obeying.tell("unmap", 0, PAGES)
    with pytest.raises(SourceError, match="has no writable shared memory in tmpfs"):
        opens(f"pid:{obeying.pid}")


def test_what_it_may_not_write_is_not_its_memory(obeying):
    obeying.tell("protect", 0, PAGES, mmap.PROT_READ)
    with pytest.raises(SourceError, match="has no writable shared memory in tmpfs"):
        opens(f"pid:{obeying.pid}")


def test_an_option_that_makes_no_sense(obeying):
    with pytest.raises(UsageError, match="pagemap-scan or content-hash, not 'magic'"):
        opens(f"pid:{obeying.pid}?tracking=magic")


# Maps two memfds of the same name, a file in /dev/shm, and one on a disk.
SEVERAL = """
import mmap, os, sys
def maps(fd, pages):
    os.ftruncate(fd, pages * 4096)
    return mmap.mmap(fd, pages * 4096)
twins = [maps(os.memfd_create("twin"), pages) for pages in (30, 40)]
named = maps(os.open(sys.argv[1], os.O_RDWR), 20)
on_disk = maps(os.open(sys.argv[2], os.O_RDWR | os.O_CREAT), 9)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def several(memory, tmp_path):
    disk = tmp_path / "disk"
    with subprocess.Popen(
        [sys.executable, "-c", SEVERAL, memory, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.disk = disk
        yield process
        process.kill()


def test_several_candidates_are_listed(memory, several):
    """The largest first; what is on a disk is none."""
    with pytest.raises(SourceError) as caught:
        opens(f"pid:{several.pid}")
    assert "maps 3 files of shared memory" in caught.value.message
    sizes = [f"({size}.0 KiB" for size in (160, 120, 80)]
    at = [caught.value.message.find(size) for size in sizes]
    assert -1 not in at
    assert at == sorted(at)
    assert str(several.disk) not in caught.value.message
    assert "?mapping=NAME" in caught.value.message


def test_one_of_several(memory, several):
    assert opens(f"pid:{several.pid}?mapping={memory}") == 20 * PAGE
    with pytest.raises(SourceError, match="2 files of shared memory called /memfd:twin"):
        opens(f"pid:{several.pid}?mapping=/memfd:twin")
    with open(f"/proc/{several.pid}/maps") as maps:
        spans = [line.split()[0] for line in maps if "/memfd:twin" in line]
    sizes = {opens(f"pid:{several.pid}?mapping={span}") for span in spans}
    assert sizes == {30 * PAGE, 40 * PAGE}


def test_none_of_several(several):
    for name in ("/dev/shm/other", str(several.disk)):
        with pytest.raises(SourceError, match="it maps /memfd:twin"):
            opens(f"pid:{several.pid}?mapping={name}")


def test_a_deleted_file_is_found_and_not_what_has_its_name_now(memory, obeying):
    """With or without what the kernel writes behind its name."""
    os.unlink(memory)
    with open(memory, "wb") as f:
        f.write(b"x" * PAGE)
    for name in (memory, f"{memory} (deleted)"):
        assert opens(f"pid:{obeying.pid}?mapping={name}") == PAGES * PAGE


def test_memory_that_somebody_else_writes_too(memory, obeying):
    """It would write on when the process stands still; unless it does not run either."""
    with SharedWriter("obey", memory, PAGES) as other:
        other.tell("map", 0, 0, 1)
        with pytest.raises(SourceError, match=f"is mapped by process {other.pid} .* too"):
            opens(f"pid:{obeying.pid}")
        os.kill(other.pid, signal.SIGSTOP)
        until(lambda: other.state() == "T", "it stops")
        assert opens(f"pid:{obeying.pid}") == PAGES * PAGE


def test_where_its_memory_is(memory, obeying):
    """So that it is not moved onto itself."""
    assert os.path.samefile(path_of(parse_guest(f"pid:{obeying.pid}")), memory)
    os.unlink(memory)
    with open(memory, "wb"):
        assert not os.path.samefile(path_of(parse_guest(f"pid:{obeying.pid}")), memory)


def test_it_is_no_destination(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(pattern(10))
    with pytest.raises(pageferry.PageferryError, match="pid: is a source"):
        pageferry.migrate(f"image:{image}", "pid:1")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_user_s_process(obeying):
    done = subprocess.run(
        [sys.executable, "-c", f"""
import os
from pageferry.workers.guests import open_source, parse_guest, process
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    open_source(parse_guest("pid:{obeying.pid}"))
except Exception as e:
    print(type(e).__name__, e)
"""],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("SourceError cannot read what process")
    assert "as root, or as the process's user" in done.stdout


WITHOUT_ROOT = """
import concurrent.futures.thread, os, subprocess, sys
from pageferry.workers.guests import open_source, parse_guest, process
source = open(sys.argv[1]).read()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
writer = subprocess.Popen(
    ["/usr/bin/python3", "-c", source, "obey", sys.argv[2], "50"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
try:
    assert writer.stdout.readline() == "ready\\n"
    writer.stdin.write('["map", 0, 0, 50]\\n')
    writer.stdin.flush()
    assert writer.stdout.readline() == "null\\n"
    guest = open_source(parse_guest(f"pid:{writer.pid}"))
    print(guest.blocks[0].size, guest.facts().get("dirty-tracking-because", guest.tracking))
    guest.close()
finally:
    writer.kill()
    writer.communicate()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
@pytest.mark.skipif(not os.access("/usr/bin/python3", os.X_OK), reason="needs /usr/bin/python3")
@pytest.mark.parametrize("where", ["memfd:mine", "/dev/shm/{target}-mine"])
def test_one_s_own_process_without_root(target, where):
    """By its descriptor, or by its name; tracked where userfaultfd is allowed."""
    path = where.format(target=os.path.basename(target))
    try:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_ROOT, shared_writer.__file__, path],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{50 * PAGE} ")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


# ---- any of it ---------------------------------------------------------------------------------

numbers = st.integers(0, 199)
deeds = st.one_of(
    st.tuples(st.sampled_from(["write", "pwrite", "fork_and_write"]), numbers),
    st.tuples(st.just("map"), st.integers(300, 400), numbers, st.integers(1, 40)),
    st.tuples(st.just("unmap"), st.integers(300, 400), st.integers(1, 40)),
    st.tuples(st.just("advise"), numbers, st.integers(1, 9), st.just(mmap.MADV_REMOVE)),
)


@given(deeds_of=st.tuples(*[st.lists(deeds, max_size=8)] * 3))
@settings(
    max_examples=8, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_whatever_it_does_it_arrives_whole(target, deeds_of):
    """Before it begins to move, before the first look, and before it is stopped."""
    with SharedWriter("obey", "memfd:any", 240) as obeying:
        obeying.tell("map", 0, 0, 240)
        obeying.tell("write", *range(0, 240, 2))
        before, early, late = (telling(obeying, deeds) for deeds in deeds_of)
        before()

        def on_started(migration):
            just_before("dirty_pages", early)(migration)
            just_before("stop", late)(migration)

        pageferry.migrate(
            f"pid:{obeying.pid}", f"ram:{target}", downtime_limit=30.0, workers=1,
            on_started=on_started,
        )  # fmt: skip
        assert content(memfd_of(obeying.pid)) == content(target)
    os.unlink(target)
