"""What killed processes left goes, what a live one has stays: real processes, killed all at
once."""

import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from helpers import Running, pageferry, until

from pageferry.transport.errors import SourceError
from pageferry.workers import forking, leftovers, names
from pageferry.workers.guests.files import NewFile, PartialFile
from pageferry.workers.guests.stopping import WriterProcess
from pageferry.workers.hollow import HollowNote, hollow_note
from pageferry.workers.kernel.freezer import freezer_of, is_frozen
from pageferry.workers.kernel.libc import lock_file
from pageferry.workers.kernel.tasks import is_stopped
from pageferry.workers.leftovers import clean, sweep

OWNER = """
import json, sys
from pageferry.workers.forking import context, warm_up
from pageferry.workers.names import Folder, stem
from pageferry.workers.segments import Segment
warm_up()
lock, folder, segment = context().Lock(), Folder(), Segment(8192, "test")
open(f"{folder.path}/uffd.sock", "w").close()
print(json.dumps({"stem": stem(), "folder": folder.path, "segment": segment.name}), flush=True)
sys.stdin.read()
folder.close()
segment.close()
"""


class Owner:
    """A process that has one of each."""

    def __init__(self, *within):
        self.process = subprocess.Popen(
            [*within, sys.executable, "-c", OWNER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.told = json.loads(self.process.stdout.readline())

    def names(self):
        """All that is there of it."""
        shared = {
            f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if self.told["stem"] in name
        }
        return shared | ({self.told["folder"]} if os.path.exists(self.told["folder"]) else set())

    def kill_all(self):
        """At once: stopped first, so that none sees another die."""
        kill_family(self.process.pid)
        self.close()

    def close(self):
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        if self.process.poll() is None:
            self.process.communicate()
        self.process.stdin.close()
        self.process.stdout.close()


def kill_family(pid):
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        process.suspend()
    for process in family:
        process.kill()
    until(lambda: not any(alive(process.pid) for process in family), "all are gone")


def alive(pid):
    return leftovers.began_at(pid) != "" and psutil.Process(pid).status() != "zombie"


def removed(found):
    return {leftover.path for leftover in found if leftover.removed}


def test_a_live_owner_s_names_stay_and_a_dead_one_s_go():
    with Owner() as live, Owner() as dead:
        left = dead.names()
        assert {Path(name).name.partition("-")[0] for name in left} == {
            "pageferry",
            "sem.pageferry",
        }
        assert len(left) == 4  # marker, segment, semaphore, folder
        dead.kill_all()
        had = live.names()
        assert left <= removed(clean([], partial=False, dry_run=True))
        assert dead.names() == left
        assert left <= removed(sweep())
        assert dead.names() == set()
        assert live.names() == had
        live.close()
        assert live.names() == set()


def test_a_coordinator_that_is_killed_alone_leaves_nothing():
    """Its helpers see it, and clean up."""
    with Owner() as owner:
        folders = [
            name for name in os.listdir(tempfile.gettempdir()) if f"-{owner.process.pid}-" in name
        ]
        assert len(folders) == 2  # its own, and the one of its fork server's socket
        owner.process.kill()
        owner.close()
        kept = {owner.told["folder"]}
        until(lambda: owner.names() == kept, "its shared memory has gone")
        served = {f"/tmp/{name}" for name in folders} - kept
        until(lambda: not any(map(os.path.exists, served)), "and the folder")
        assert kept <= removed(sweep())


def test_one_that_ends_by_itself_leaves_nothing():
    with Owner() as owner:
        owner.close()
        assert owner.names() == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace of its own needs root")
def test_a_live_owner_in_another_pid_namespace():
    """Its pid is nobody's here, or another's."""
    with Owner("unshare", "--pid", "--fork", "--mount-proc", "--kill-child") as owner:
        had = owner.names()
        assert len(had) == 4
        sweep()
        assert owner.names() == had
        owner.close()


def test_a_number_that_is_used_again():
    """The pid in a dead one's name is ours now: that says nothing."""
    path = f"/dev/shm/pageferry-{os.getpid()}-{'0123456789abcdef'}-0-counters"
    Path(path).write_bytes(bytes(100))
    assert path in removed(sweep())


@pytest.mark.parametrize(
    "name",
    [
        "pageferry-{pid}-0123456789abcdef-counters",  # as they were once: nobody has a lock for it
        "pageferry-12345678-1234-1234-1234-123456789abc",  # memory that was received
        "pageferry-bench-0123456789abcdef-0-x",
        "pageferry-{pid}-0123456789abcdefx-0-counters",  # of a host without locks
    ],
)
def test_names_that_say_nothing_of_an_owner_stay(name):
    path = Path(f"/dev/shm/{name.format(pid=1 << 22)}")
    path.touch()
    try:
        assert str(path) not in removed(sweep())
        assert path.exists()
    finally:
        path.unlink()


def test_another_user_s_stay():
    path = Path("/dev/shm/pageferry-1-0123456789abcdef-0-counters")
    if os.geteuid() != 0:
        pytest.skip("making a file of another user needs root")
    path.touch()
    os.chown(path, 65534, 65534)
    try:
        assert str(path) not in removed(sweep())
        assert path.exists()
    finally:
        path.unlink()


SWEEPER = """
import os
from pageferry.workers.leftovers import sweep
print("ready", flush=True)
while os.getppid() == %d:
    for found in sweep():
        print(found.path, flush=True)
"""


def test_a_name_that_is_just_being_made():
    """Whoever sweeps all the time never meets one without its lock, and is not in its way."""
    sweepers = [
        subprocess.Popen(
            [sys.executable, "-c", SWEEPER % os.getpid()], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        for sweeper in sweepers:
            sweeper.stdout.readline()
        for _ in range(1500):
            marker, folder = names.Marker(), names.Folder()
            Path(f"/dev/shm/{marker.stem}-0-x").touch()
            assert not lock_is_free(f"/dev/shm/{marker.stem}")
            os.unlink(f"/dev/shm/{marker.stem}-0-x")
            assert not lock_is_free(folder.path)
            marker.close()
            folder.close()
    finally:
        for sweeper in sweepers:
            sweeper.kill()
        said = [sweeper.communicate()[0] for sweeper in sweepers]
    assert said == [""] * 3


def lock_is_free(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return lock_file(fd)
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a pipe of another user needs root")
@pytest.mark.parametrize("where", ["/dev/shm", "/tmp"])
def test_another_user_s_pipe_holds_up_nobody(where):
    """Whoever opens it to read waits until somebody writes."""
    path = Path(where, "pageferry-1-0123456789abcdef")
    os.mkfifo(path)
    os.chmod(path, 0o666)
    os.chown(path, 65534, 65534)
    try:
        assert pageferry("clean", timeout=20).returncode == 0
        assert path.exists()
    finally:
        path.unlink()


def test_names_cannot_be_guessed_by_whoever_sees_others():
    """Somebody who takes the next one would keep us from making it."""
    first, second = names.shared_name("x"), names.shared_name("x")
    assert first.rsplit("-", 2)[0] == second.rsplit("-", 2)[0] == names.stem()
    assert len(first.rsplit("-", 2)[1]) == 16
    assert first != second
    assert leftovers._SHARED.fullmatch(first)


def test_a_file_that_is_being_written_for_long(tmp_path, monkeypatch):
    """Where a file cannot be without a name, it has a hidden one until it is whole."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # EISDIR, as where there is none
    new = NewFile(str(tmp_path / "vm.mem"), 4096)
    try:
        (hidden,) = tmp_path.iterdir()
        os.utime(hidden, (time.time() - 7200, time.time() - 7200))
        assert str(hidden) not in removed(clean([str(tmp_path)], partial=True, dry_run=False))
        new.publish()
    finally:
        new.discard()


SWEPT = """
import fcntl, os, sys, threading
from pageferry.workers.kernel.libc import lock_file
from pageferry.workers.kernel.tasks import is_stopped
from pageferry.workers.names import Folder

held = []

def sweep_just_now(event, arguments):
    # it has been made, and is about to be locked
    if event == "open" and not held and ".pageferry-" in str(arguments[0]):
        held.append(None)
        held[0] = os.open(arguments[0], os.O_RDONLY)
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(threading.Timer(0.05, os.close, held[:1]))
        held[1].start()

sys.addaudithook(sweep_just_now)
folder = Folder()
held[1].join()
print(lock_file(os.open(folder.path, os.O_RDONLY)))
folder.close()
"""


def test_a_folder_that_a_sweep_looks_at_while_it_is_made():
    """It is locked in the end all the same, or the next sweep would take it for a dead one's."""
    ran = subprocess.run(
        [sys.executable, "-c", SWEPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == "False\n", ran.stderr


def test_what_arrived_of_an_image(tmp_path):
    """Shown; removed only if that is asked for, and nobody receives it."""
    held = PartialFile(str(tmp_path / "held.mem"), 4096)
    (tmp_path / ".old.mem.pageferry-part").write_bytes(bytes(8192))
    (tmp_path / "whole.mem").write_bytes(b"1")
    young, old = tmp_path / ".a.01234567.pageferry", tmp_path / ".b.01234567.pageferry"
    young.touch()
    old.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    try:
        found = {f.path: f for f in clean([str(tmp_path)], partial=False, dry_run=False)}
        assert "--partial" in found[str(tmp_path / ".old.mem.pageferry-part")].why
        assert found[str(tmp_path / ".old.mem.pageferry-part")].size == 8192
        assert "being received" in found[str(tmp_path / ".held.mem.pageferry-part")].why
        assert removed(found.values()) & set(map(str, tmp_path.iterdir())) == set()
        assert not old.exists() and young.exists()
        gone = clean([str(tmp_path)], partial=True, dry_run=False)
        assert str(tmp_path / ".old.mem.pageferry-part") in removed(gone)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {".held.mem.pageferry-part", "whole.mem", young.name}
    finally:
        held.discard()


STOPPER = """
import sys
from pageferry.workers.guests.stopping import WriterProcess
writer = WriterProcess(int(sys.argv[1]))
writer.stays = len(sys.argv) > 2
writer.stop()
print("stopped", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stays", [False, True], ids=["moved", "saved"])
def test_a_process_that_a_killed_one_stopped(stays):
    """Shown while it stands still, and left as it is; one that was only to be saved goes on."""
    with (
        subprocess.Popen(["sleep", "1000"]) as sleeper,
        subprocess.Popen(
            [sys.executable, "-c", STOPPER, str(sleeper.pid), *(["stays"] if stays else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as stopper,
    ):  # fmt: skip
        stopper.stdout.readline()
        assert not [f for f in clean([], partial=False, dry_run=True) if f.kind == "stopped"]
        kill_family(stopper.pid)
        stopper.wait()  # until then a thread of it may hold its lock
        if stays:
            (found,) = (f for f in clean([], partial=False, dry_run=True) if f.kind == "stopped")
            assert found.removed and os.path.exists(found.path) and is_stopped(sleeper.pid)
            assert found.path in removed(sweep())
            until(lambda: not is_stopped(sleeper.pid), "it goes on")
            sleeper.kill()
            return
        sweep()
        (found,) = (f for f in clean([], partial=False, dry_run=False) if f.kind == "stopped")
        assert not found.removed
        assert f"process {sleeper.pid} was stopped" in found.why
        if "kill -CONT" in found.why:
            os.kill(sleeper.pid, signal.SIGCONT)
        sleeper.kill()
        sleeper.wait()
        assert found.path in removed(sweep())


@pytest.fixture
def saved():
    """A process that somebody has stopped to save it: both."""
    with (
        subprocess.Popen(["sleep", "1000"]) as sleeper,
        subprocess.Popen(
            [sys.executable, "-c", STOPPER, str(sleeper.pid), "stays"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as stopper,
    ):  # fmt: skip
        stopper.stdout.readline()
        yield sleeper, stopper
        if alive(stopper.pid):
            kill_family(stopper.pid)
            stopper.wait()
        sleeper.kill()
        sleeper.wait()
        sweep()


def test_who_was_let_go_on_and_stopped_by_somebody_else_stays_stopped(saved):
    """It may run at another host by now: it has left this one's hands."""
    sleeper, stopper = saved
    kill_family(stopper.pid)
    stopper.wait()
    freezer = freezer_of(sleeper.pid)
    if freezer is not None:
        freezer.thaw()
    os.kill(sleeper.pid, signal.SIGCONT)
    until(lambda: not is_stopped(sleeper.pid), "it goes on")
    until(lambda: psutil.Process(sleeper.pid).status() == "sleeping", "and has run")
    mover = WriterProcess(sleeper.pid)
    mover.stop()
    mover.close()  # it has moved
    try:
        sweep()
        (found,) = (f for f in clean([], partial=False, dry_run=False) if f.kind == "stopped")
        assert not found.removed and "if its memory is not in use elsewhere" in found.why
        assert is_stopped(sleeper.pid) or is_frozen(sleeper.pid)
    finally:
        if freezer is not None:
            freezer.thaw()


def test_who_is_being_saved_is_moved_by_nobody(saved):
    """It would be let go on here: by whoever saves it, or by the next start if he was killed."""
    sleeper, stopper = saved
    mover = WriterProcess(sleeper.pid)
    try:
        for killed in (False, True):
            if killed:
                kill_family(stopper.pid)
                stopper.wait()
            with pytest.raises(SourceError, match=r"to save it .*wait for that snapshot"):
                mover.stop()
            mover.resume()
            assert is_stopped(sleeper.pid) or is_frozen(sleeper.pid)
        sweep()
        mover.stop()
        mover.check()
        mover.resume()
    finally:
        mover.close()


def test_one_that_goes_on_leaves_no_note():
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        writer = WriterProcess(sleeper.pid)
        writer.stop()
        notes = [name for name in os.listdir("/dev/shm") if name.endswith("-stopped")]
        assert len(notes) == 1
        writer.resume()
        writer.close()
        assert not os.path.exists(f"/dev/shm/{notes[0]}")
        sleeper.kill()


def test_a_guest_whose_memory_was_given_back(caplog):
    """Shown as long as it is there, at each start too: it would run with holes in its memory."""
    left = Path("/dev/shm/pageferry-1-0123456789abcdef-0-hollow")
    note = HollowNote(os.getpid())
    note.write()
    (written,) = glob.glob("/dev/shm/pageferry-*-hollow")
    assert not [f for f in clean([], partial=False, dry_run=False) if f.kind == "hollow"]
    assert hollow_note(os.getpid()) == written
    try:
        left.write_text(Path(written).read_text())  # as of one that was killed
        note.drop()
        assert hollow_note(os.getpid()) == str(left)
        if os.geteuid() == 0:  # anybody may write one, and it is not believed
            os.chown(left, 12345, -1)
            assert not hollow_note(1) and hollow_note(os.getpid()) == ""
            os.chown(left, 0, -1)
        (found,) = (f for f in clean([], partial=False, dry_run=False) if f.kind == "hollow")
        assert not found.removed and "must not be resumed" in found.why
        forking._tell_of(sweep())
        assert f"the guest in process {os.getpid()}" in caplog.text
        facts = json.loads(left.read_text())
        with subprocess.Popen("true") as ended:  # and nobody has waited for it
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            zombie = facts | {"pid": ended.pid, "began": leftovers.began_at(ended.pid)}
            for what in (facts | {"began": "1"}, zombie):
                left.write_text(json.dumps(what))
                assert str(left) in removed(sweep())
        left.write_text('{"pid": 1')  # nothing had been given back yet
        assert str(left) in removed(sweep())
    finally:
        left.unlink(missing_ok=True)


def test_what_else_has_the_name_of_a_note():
    """It may be anything, of anybody: it is no note, and costs no descriptor and no time."""
    path = Path("/dev/shm/pageferry-1-0123456789abcdef-0-hollow")
    before = len(os.listdir("/proc/self/fd"))
    for make, remove in (
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.symlink_to("/dev/zero"), path.unlink),
        (lambda: path.write_bytes(b"\xff[1"), path.unlink),
        (lambda: path.write_text("[1]"), path.unlink),
    ):
        make()
        try:
            assert not list(names.notes("hollow", os.getpid()))
            assert len(os.listdir("/proc/self/fd")) == before
        finally:
            remove()


def test_a_run_that_is_killed_and_the_next_start():
    """kill -9 of everything at once, in the middle; one that lives beside goes on."""
    slow = ("copy", "demo:?size=16M&rate=100", "demo:", "--max-bandwidth", "4MB", "--json")
    with Running(*slow) as live, Running(*slow) as dead:
        for running in (live, dead):
            running.error_line("round 1")
        kill_family(dead.process.pid)
        dead.finish()
        pid = f"pageferry-{dead.process.pid}-"
        left = [
            n for n in (*os.listdir("/dev/shm"), *os.listdir(tempfile.gettempdir())) if pid in n
        ]
        assert len(left) > 6
        shown = json.loads(pageferry("clean", "--dry-run", "--json").stdout)
        assert {Path(row["path"]).name for row in shown["leftovers"]} >= set(left)
        done = pageferry("copy", "demo:?size=1M", "demo:")
        assert done.returncode == 0, done.stderr
        assert not [
            n for n in (*os.listdir("/dev/shm"), *os.listdir(tempfile.gettempdir())) if pid in n
        ]
        assert "nothing was left" in pageferry("clean").stdout
        code, out, err = live.finish()
        assert code == 0, err
        assert json.loads(out)["oracle"]["ok"]
