"""--user: what pageferry is after it gave root up, and that migrations work so."""

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import shared_writer
from for_anybody import within
from helpers import PAGE, Running, ask, pageferry, pattern, receiver, same_file, until
from shared_writer import one_step

from pageferry.transport.keys import KeyDirectory
from pageferry.transport.snapshot_format import ALIGNMENT

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="giving root up needs root")
NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = (
    "setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups",
)  # fmt: skip
ALL_ZERO = "0" * 16


@pytest.fixture
def folder():
    """nobody's, wherever pytest keeps its own."""
    path = tempfile.mkdtemp(dir="/tmp")
    os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    yield Path(path)
    shutil.rmtree(path)


def as_nobody(folder, *arguments):
    return Running(*arguments, "--user", "nobody", within=within(folder))


def receiving(folder, *arguments):
    return receiver(
        *arguments, "--once", "--user", "nobody", listen="tcp://127.0.0.1:0", within=within(folder)
    )


def nothing_left(folder):
    """But for what this process has itself."""
    found = {
        name for name in (*os.listdir("/dev/shm"), *os.listdir(folder)) if "pageferry-" in name
    }
    mine = f"pageferry-{os.getpid()}-"
    return not [name for name in found if "pageferry-" in name and mine not in name]


def given_up(running):
    """All processes of a run, once they are what they are to be: names, with threads checked."""
    leader = psutil.Process(running.process.pid)
    for process in (leader, *leader.children(recursive=True)):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            rows = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            for ids in (rows["Uid"].split(), rows["Gid"].split()):
                assert set(ids) <= {str(NOBODY.pw_uid), str(NOBODY.pw_gid)}, (process, rows)
            assert set(rows["Groups"].split()) <= {str(NOBODY.pw_gid)}
            for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert rows[name] == ALL_ZERO, (process, name)
            assert rows["NoNewPrivs"] == "1", process
    return sorted(process.name() for process in leader.children(recursive=True))


def finish(running):
    code, out, err = running.finish()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_guest_that_runs_moves(folder):
    """With all kinds of processes that there are, and postcopy."""
    monitor = f"unix:{folder}/m"
    with receiving(folder) as there:
        with as_nobody(
            folder, "send", "demo:?size=16M&content=random", there.endpoint, "--json", "--postcopy",
            "now", "--max-postcopy-bandwidth", "1MB", "--monitor", monitor,
        ) as here:  # fmt: skip
            here.error_line("postcopy")
            assert len(given_up(here)) > 4
            assert len(given_up(there)) > 4
            assert os.stat(folder / "m").st_uid == NOBODY.pw_uid
            ask(monitor, "migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
            finish(here)
        assert finish(there)["oracle"]["ok"]
    assert nothing_left(folder)


def test_an_image_moves(folder):
    """It belongs to the user; what root alone may read is not read."""
    image = folder / "vm"
    image.write_bytes(pattern(200))
    image.chmod(0o600)
    with receiving(folder, "--into", f"image:{folder}/to") as there:
        with as_nobody(folder, "send", f"image:{image}", there.endpoint) as refused:
            code, _, err = refused.finish()
        assert (code, "Permission denied" in err) == (3, True), err
        os.chown(image, NOBODY.pw_uid, NOBODY.pw_gid)
        with as_nobody(folder, "send", f"image:{image}", there.endpoint, "--json") as here:
            finish(here)
        finish(there)
    assert same_file(image, folder / "to")
    assert os.stat(folder / "to").st_uid == NOBODY.pw_uid
    assert nothing_left(folder)


def test_a_snapshot_is_served_and_restored(folder):
    snapshot = folder / "vm"
    snapshot.write_bytes(pattern(300))
    snapshot.chmod(0o644)
    listen = ("--listen", "tcp://127.0.0.1:0", "--json")
    with as_nobody(folder, "serve", f"image:{snapshot}", *listen) as server:
        endpoint = json.loads(server.line())["endpoint"]
        socket = folder / "u"
        with as_nobody(
            folder, "restore", endpoint, "--uffd-socket", str(socket), "--json"
        ) as restoring:
            until(socket.exists, "listening")
            given_up(restoring)
            monitor = subprocess.run(
                [*within(folder), *AS_NOBODY, sys.executable, "-m",
                 "pageferry.tools.uffd_client", "--socket", str(socket), "--image", str(snapshot)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert monitor.returncode == 0, monitor.stderr
            finish(restoring)
        assert json.loads(monitor.stdout.splitlines()[0])["wrong-pages"] == 0
        given_up(server)
        server.process.terminate()
        server.finish()
    assert nothing_left(folder)


@pytest.fixture
def writer():
    """A process of nobody's that writes a file in shared memory."""
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip("needs /usr/bin/python3, which nobody may run")
    memory = f"/dev/shm/test-pf-{os.getpid()}-user"
    with open(memory, "wb") as file:
        file.write(bytes(400 * PAGE))
    os.chown(memory, NOBODY.pw_uid, NOBODY.pw_gid)
    os.chmod(memory, 0o600)
    source = Path(shared_writer.__file__).read_text()
    with subprocess.Popen(
        [*AS_NOBODY, python, "-c", source, "write", memory, "400"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.memory = memory
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()
    os.unlink(memory)


@pytest.mark.parametrize("kind", ["pid", "ram"])
def test_a_process_moves(folder, writer, kind):
    """Root attaches to it; then the user that it runs as looks at it and stops it."""
    source = f"pid:{writer.pid}" if kind == "pid" else f"ram:{writer.memory}?pid={writer.pid}"
    with receiving(folder, "--into", f"image:{folder}/to") as there:
        with as_nobody(
            folder, "send", source, there.endpoint, "--json", "--downtime-limit", "5s"
        ) as here:
            report = finish(here)
        finish(there)
    assert report["dirty-tracking"] == ("pagemap-scan" if kind == "pid" else "content-hash")
    assert "stopped (SIGSTOP)" in report["source-process"]
    memory = Path(writer.memory).read_bytes()
    assert memory == (folder / "to").read_bytes() and one_step(memory)
    assert nothing_left(folder)


def test_a_snapshot_of_a_process(folder, writer):
    """Its file is the user's. Live, what the process itself may not is said, and it goes on."""
    file, monitor = folder / "a", f"unix:{folder}/m"
    how = (f"pid:{writer.pid}", f"file:{file}", "--json", "--monitor", monitor)
    with as_nobody(folder, "snapshot", *how) as taking:
        report = finish(taking)
    assert "downtime" in report and os.stat(file).st_uid == NOBODY.pw_uid
    assert one_step(file.read_bytes()[ALIGNMENT : ALIGNMENT + 400 * PAGE])
    file.unlink()
    with as_nobody(folder, "snapshot", *how, "--live") as taking:
        code, _, err = taking.finish()
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        assert code == 0, err
    else:
        assert (code, "vm.unprivileged_userfaultfd=1" in err) == (12, True), err
        assert not file.exists()
    assert psutil.Process(writer.pid).status() != psutil.STATUS_STOPPED
    assert nothing_left(folder)


def test_a_snapshot_without_root(folder):
    """Of a guest of one's own: live, and lazily restored."""
    saved = f"file:{folder}/a"
    for arguments in (
        ("snapshot", "demo:?size=8M&rate=0", saved, "--live"),
        ("restore", saved, "--into", "demo:", "--lazy"),
    ):
        with Running(*arguments, "--json", within=(*within(folder), *AS_NOBODY)) as running:
            report = finish(running)
        assert report["status"] == "completed"
    assert report["oracle"]["ok"]
    assert nothing_left(folder)


def test_a_process_of_another_user(folder):
    """It could not be looked at any more: said before anything is moved."""
    with shared_writer.SharedWriter("obey", "memfd:mine", 50) as its:
        its.tell("map", 0, 0, 50)
        with as_nobody(folder, "send", f"pid:{its.pid}", "tcp://127.0.0.1:1") as running:
            code, _, err = running.finish()
    assert code == 2 and "uid 0's" in err, err


def test_a_process_of_another_group(folder, writer):
    """The kernel shows what it maps to whoever has both."""
    with Running(
        "send", f"pid:{writer.pid}", "tcp://127.0.0.1:1", "--user", "nobody:daemon",
        within=within(folder),
    ) as running:  # fmt: skip
        code, _, err = running.finish()
    assert code == 2 and f"--user {NOBODY.pw_uid}:{NOBODY.pw_gid}" in err, err


@pytest.mark.parametrize(
    ("user", "says"),
    [("nobody-at-all", "no user"), ("nobody:no-such-group", "no group"), ("root", "that is root"),
     ("nobody:root", "that is root"), ("0", "that is root")],
)  # fmt: skip
def test_who_it_cannot_be(user, says):
    done = pageferry("receive", "--listen", "tcp://127.0.0.1:0", "--user", user)
    assert done.returncode == 2 and says in done.stderr, done.stderr


def test_who_is_not_root(folder):
    """May be asked to be who it is, and nobody else."""
    other = next(entry.pw_name for entry in pwd.getpwall() if entry.pw_uid not in (0, 65534))
    for user, code in (("nobody", 4), (other, 2)):
        listen = f"ipc://{folder}/none/s"
        with Running(
            "receive", "--listen", listen, "--user", user, within=(*within(folder), *AS_NOBODY)
        ) as running:
            found, _, err = running.finish()
        assert found == code, err
    assert "needs root" in err


def test_keys_are_the_user_s(folder):
    """They are read again and again: whom they do not belong to is told so."""
    keys = KeyDirectory.create(str(folder / "keys"))
    listen = ("--listen", "tcp://127.0.0.1:0", "--json", "--keys", keys.path)
    with as_nobody(folder, "receive", *listen) as refused:
        code, _, err = refused.finish()
    assert code == 2 and "chown -R" in err, err
    subprocess.run(["chown", "-R", "nobody", keys.path], check=True)
    with as_nobody(folder, "receive", *listen) as running:
        assert "listening" in running.line()
        running.process.terminate()
        running.finish()
    assert nothing_left(folder)
