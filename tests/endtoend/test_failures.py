"""What an operator can get wrong, and what can break: one clear error each, the source intact,
nothing left (the leak check looks after every test)."""

import json
import os
import signal
import socket
import subprocess
import threading

import psutil
import pytest
import zmq
from helpers import Running, pattern, receiver, sweep, until
from helpers import pageferry as run

from pageferry.transport import messages


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "source.mem"
    path.write_bytes(pattern(2000))
    return path


def _children(process, name):
    """Processes of a running pageferry whose name begins with `name`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with open(f"/proc/{child.pid}/comm") as f:
            if f.read().startswith(name):
                found.append(child)
    return found


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["copy", "image:/no/such/file", "image:/tmp/x"], 3, "No such file"),
        (["copy", "image:/etc", "image:/tmp/x"], 3, "no regular file"),
        (["copy", "image:/dev/null", "image:/tmp/x"], 3, "no regular file"),
        (["copy", "{image}", "image:/no/such/folder/x"], 4, "No such file"),
        (["copy", "{image}", "image:/tmp"], 4, "is a directory"),
        (["copy", "{image}", "demo:"], 6, "cannot go on as a demo: guest"),
        (["copy", "{image}", "{image}.2", "--codec", "lzma"], 2, "choose from auto, none, lz4"),
        (["copy", "{image}", "{image}.2", "--codec", "zstd", "--level", "99"], 2, "-7 to 19"),
        (["copy", "{image}", "{image}.2", "--level", "3"], 2, "level needs a codec"),
        (["copy", "{image}", "{image}.2", "--workers", "0"], 2, "--workers"),
        (["copy", "{image}", "{image}.2", "--workers", "many"], 2, "--workers"),
        (["copy", "{image}", "{image}.2", "--max-bandwidth", "fast"], 2, "10Gbit"),
        (["copy", "{image}", "{image}.2", "--downtime-limit", "soon"], 2, "300ms"),
        (["copy", "vm.mem", "image:/tmp/x"], 2, "names no guest"),
        (["copy", "demo:?speed=9", "demo:"], 2, "no option 'speed'"),
        (["copy", "demo:?content=blue", "demo:"], 2, "zero, text, random"),
        (["copy", "ram:/dev/shm/none", "demo:"], 3, "No such file"),
        (["send", "{image}", "tcp://127.0.0.1"], 2, "tcp://HOST:PORT"),
        (["send", "{image}", "tcp://127.0.0.1:1"], 5, "pageferry receive"),
        (["send", "{image}", "ipc:///tmp/no/such/socket"], 5, "cannot connect"),
        (["receive", "--listen", "tcp://192.0.2.1:0", "--insecure"], 4, "cannot listen"),
        (["receive", "--listen", "tcp://192.0.2.1:0"], 2, "--keys DIR"),
        (["receive", "--listen", "tcp://0.0.0.0:0"], 2, "--insecure"),
        (["send", "{image}", "tcp://192.0.2.1:1"], 2, "in the clear"),
        (["receive", "--listen", "here"], 2, "tcp://HOST:PORT"),
    ],
)
def test_one_clear_error(image, arguments, code, text):
    done = run(*[part.replace("{image}", f"image:{image}") for part in arguments])
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_json_errors_are_objects(image):
    done = run("send", f"image:{image}", "tcp://127.0.0.1:1", "--json")
    error = json.loads(done.stdout)["error"]
    assert error["class"] == "ConnectError"
    assert error["exit-code"] == done.returncode == 5


def test_no_space(image, tmp_path):
    """A full disk at the destination, in the middle: told to the source, nothing left."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = run("copy", f"image:{image}", f"image:{folder}/out")
        assert done.returncode == 4
        assert "no space left" in done.stderr
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_garbage_on_the_port(image):
    """Something that is no pageferry accepts the connection and says nothing sensible."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            for _ in range(50):
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n" * 20)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            done = run("send", f"image:{image}", f"tcp://127.0.0.1:{port}")
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert done.returncode == 5
    assert "does not answer as" in done.stderr


def test_strays_do_not_hurt_a_running_migration(tmp_path):
    """Port scanners, garbage, foreign Hellos on every port while a guest moves."""
    with (
        receiver("--into", "demo:", "--once") as there,
        Running("send", "demo:?size=64M&rate=2000", there.endpoint, "--json",
                "--max-bandwidth", "30MB") as sending,
        zmq.Context() as context,
    ):  # fmt: skip
        sending.error_line("round 1")
        ports = {
            connection.laddr.port
            for child in [psutil.Process(there.process.pid),
                          *psutil.Process(there.process.pid).children(recursive=True)]
            for connection in child.net_connections("tcp")
            if connection.status == "LISTEN"
        }  # fmt: skip
        assert len(ports) >= 2
        for port in ports:
            with socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(b"GET / HTTP/1.0\r\n\r\n" * 100)
            with context.socket(zmq.DEALER) as s:
                s.linger = 1000
                s.connect(f"tcp://127.0.0.1:{port}")
                s.send(b"garbage")
                s.send_multipart([b"gar", b"bage", b"more"])
        busy = run("send", "demo:?size=1M", there.endpoint)
        assert busy.returncode == 6
        assert "busy" in busy.stderr
        code, out, err = sending.finish()
        assert code == 0, err
        code, out, err = there.finish()
    assert code == 0, err
    assert json.loads(out)["oracle"]["ok"]


def test_another_version_is_refused_by_name():
    with receiver("--once") as there, zmq.Context() as context:
        with context.socket(zmq.DEALER) as s:
            s.linger = 0
            s.connect(there.endpoint)
            s.send(messages.encode(messages.Hello(
                99, "9.9", "0" * 8, "demo", [messages.Block("b", 4096)], 1, 128
            )))  # fmt: skip
            assert s.poll(10_000)
            refused = messages.decode(s.recv())
        assert isinstance(refused, messages.Refused)
        assert refused.field == "protocol"
        assert "99" in refused.message
        there.process.send_signal(signal.SIGINT)
        assert there.finish()[0] == 130


@pytest.mark.parametrize("victim", ["pf-send-0", "pf-recv-1"])
def test_a_killed_worker(victim):
    """kill -9 of a worker at either end: both ends fail, the source's guest was resumed."""
    with (
        receiver("--into", "demo:", "--once") as there,
        Running("send", "demo:?size=64M", there.endpoint, "--json",
                "--max-bandwidth", "10MB") as sending,
    ):  # fmt: skip
        sending.error_line("round 1")
        end = sending if victim.startswith("pf-send") else there
        until(lambda: _children(end.process, victim), "the worker is there")
        _children(end.process, victim)[0].kill()
        code, _, err = sending.finish()
        assert code == 9, err
        assert "SIGKILL" in err
        there_code, _, there_err = there.finish()
        assert there_code == 9, there_err


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_killed_fork_server(end):
    """All that it has started dies with it, the guest too."""
    with (
        receiver("--into", "demo:", "--once") as there,
        Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "1MB") as sending,
    ):
        sending.error_line("round 1")
        process = (sending if end == "source" else there).process
        _children(process, "pf-")[0].parent().kill()
        code, _, err = sending.finish()
        assert code in (3, 4, 9), err
        assert "gone" in err or "exited" in err or "was killed" in err
        there.finish()
    sweep(process.pid)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_killed_guest(end):
    """kill -9 of the guest itself: known at once, not when it is asked for something."""
    with (
        receiver("--into", "demo:", "--once") as there,
        Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "1MB") as sending,
    ):
        sending.error_line("round 1")
        process = (sending if end == "source" else there).process
        _children(process, "pf-demo-guest")[0].kill()
        code, _, err = sending.finish()
        assert code == (3 if end == "source" else 4), err
        assert "the demo guest is gone" in err
        there.finish()


def test_a_stopped_worker():
    """SIGSTOP of a sender: found by its silence."""
    with (
        receiver("--into", "demo:", "--once") as there,
        Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "10MB") as sending,
    ):
        sending.error_line("round 1")
        victim = _children(sending.process, "pf-send-1")[0]
        victim.suspend()
        code, _, err = sending.finish()
        assert code == 9
        assert "has not answered for" in err
        assert not psutil.pid_exists(victim.pid)
        there.finish()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_dies_or_stalls(how):
    """The receiver dies or stops answering: the sender says so and its guest goes on."""
    with (
        receiver("--into", "demo:", "--once") as there,
        Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "10MB") as sending,
    ):
        sending.error_line("round 1")
        family = [psutil.Process(there.process.pid),
                  *psutil.Process(there.process.pid).children(recursive=True)]  # fmt: skip
        for process in family if how == signal.SIGSTOP else family[:1]:
            process.send_signal(how)
        code, _, err = sending.finish()
        assert code == 7, err
        assert "silent" in err or "no acknowledgement" in err
        for process in family:
            if psutil.pid_exists(process.pid):
                process.send_signal(signal.SIGCONT)
                process.kill()
        sweep(there.process.pid)  # all of it was killed: nobody could clean up


def test_the_source_dies_and_the_destination_discards(tmp_path):
    out = tmp_path / "out.mem"
    with (
        receiver("--into", f"image:{out}", "--once") as there,
        Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "10MB") as sending,
    ):
        sending.error_line("round 1")
        workers = _children(sending.process, "pf-")
        sending.kill()
        code, _, err = there.finish()
        assert code == 7
        assert "silent" in err
        until(lambda: not any(w.is_running() for w in workers), "its workers die with it")
    assert os.listdir(tmp_path) == []


def test_killed_all_at_once_nothing_looks_whole(image, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with Running(
        "copy", f"image:{image}", f"image:{folder}/o", "--max-bandwidth", "1MB"
    ) as running:
        running.error_line("round 1")
        family = psutil.Process(running.process.pid).children(recursive=True)
        running.kill()
        until(lambda: not any(p.is_running() for p in family), "its processes die with it")
    assert os.listdir(folder) == []


def test_receive_goes_on_after_a_failure(image, tmp_path):
    """Without --once, a failed migration is reported and the next one is welcome."""
    out = tmp_path / "out.mem"
    with receiver("--into", f"image:{out}") as there:
        with Running("send", "demo:?size=64M", there.endpoint, "--max-bandwidth", "10MB") as bad:
            bad.error_line("round 1")
            bad.process.send_signal(signal.SIGTERM)
            assert bad.finish()[0] == 130
        assert json.loads(there.line())["error"]["class"] == "Cancelled"
        assert run("send", f"image:{image}", there.endpoint).returncode == 0
        assert json.loads(there.line())["status"] == "completed"
        assert out.read_bytes() == image.read_bytes()
        there.process.send_signal(signal.SIGTERM)
        assert there.finish()[0] == 130
