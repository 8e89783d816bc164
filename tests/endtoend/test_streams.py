"""Migrations over a byte stream: a command's pipes, descriptors, stdin and stdout; and what comes
of a stream that breaks. The command is another pageferry, or the test stands in between."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from helpers import Running, command, pageferry, pattern, same_file, sweep, until, until_async
from key_ends import Ends as KeyEnds

from pageferry.pipeline import api, carriage
from pageferry.pipeline.carriage import local_endpoint
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.state import Status
from pageferry.transport.carrier import take
from pageferry.transport.errors import (
    ConnectError,
    PageferryError,
    PeerLost,
    RemoteProtocolError,
    UsageError,
    WorkerDied,
)
from pageferry.transport.stream_addresses import Stream, parse_stream
from pageferry.workers import carrier
from pageferry.workers.guests import parse_guest

GUEST = "demo:?size=16M&content=random&access=random&rate=2000"
POSTCOPY = {"postcopy": "now", "max_postcopy_bandwidth": 8_000_000, "workers": 2}


def words(*arguments):
    """A pageferry for a shell."""
    return shlex.join(command(*arguments))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "from"
    path.write_bytes(pattern(2000))
    return path


class Between:
    """Two ends in one event loop, and the bytes between them: `cut` ends both, after `limit` bytes
    by itself; `hold` lets nothing through."""

    def __init__(self, source, into, *, keys=("", ""), limit=None, step=65536, **parameters):
        (self.here, mine), (self.there, other) = socket.socketpair(), socket.socketpair()
        self.pumps = [(mine, other), (other, mine)]
        self.limit, self.step, self.passed = limit, step, 0
        self.reports, self.migration = [], None
        self.listening = Destination(local_endpoint(), api.opener(parse_guest(into)), keys=keys[1])
        self.source = parse_guest(source)
        self.parameters = Parameters(**(parameters | {"keys": keys[0]}))

    async def __aenter__(self):
        loop = asyncio.get_running_loop()
        self.pumping = [loop.create_task(self._pump(*pair)) for pair in self.pumps]
        self.arriving = loop.create_task(self._receive())
        self.sending = loop.create_task(self._send())
        return self

    async def _receive(self):
        def told(report, error):
            self.reports.append(report)

        await api.receive_stream(Stream(reads=self.there.detach()), self.listening, told)

    async def _send(self):
        def started(migration):
            self.migration = migration

        return await api.send(
            self.source, Stream(reads=self.here.detach()), self.parameters, on_started=started
        )

    async def _pump(self, reads, writes):
        loop = asyncio.get_running_loop()
        for sock in (reads, writes):
            sock.setblocking(False)
        while True:
            data = await loop.sock_recv(reads, self.step)
            if self.limit is not None and self.passed + len(data) > self.limit:
                self.cut()
                return
            self.passed += len(data)
            if not data:
                with contextlib.suppress(OSError):
                    writes.shutdown(socket.SHUT_WR)
                return
            try:
                await loop.sock_sendall(writes, data)
            except OSError:
                return

    def cut(self):
        for sock, _ in self.pumps:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    async def moved(self, pages):
        await until_async(
            lambda: self.sending.done() or (
                self.migration and self.migration.statistics.pages_done >= pages), "moved",
        )  # fmt: skip
        assert not self.sending.done(), self.sending

    async def is_status(self, status):
        await until_async(
            lambda: self.migration.core.status is status or self.sending.done(), str(status)
        )
        assert self.migration.core.status is status

    async def whole(self):
        report, _ = await asyncio.gather(self.sending, self.arriving)
        assert report["status"] == "completed"
        (arrived,) = self.reports
        return report, arrived

    async def failed(self):
        """The errors of both ends."""
        found = await asyncio.gather(self.sending, self.arriving, return_exceptions=True)
        assert all(isinstance(error, PageferryError) for error in found), found
        return found

    async def __aexit__(self, *rest):
        tasks = [self.sending, self.arriving, *self.pumping]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock, _ in self.pumps:
            sock.close()


# ---- as QEMU's tests of the same name ----------------------------------------------------------


def test_precopy_exec(image, tmp_path):
    """What a login prints before, and the far end to stderr; nothing but pipes connects them."""
    there = words("receive", "--into", f"image:{tmp_path}/to", "-")
    noisy = f"echo 'Welcome to this host'; echo 'a warning' >&2; exec {there}"
    done = pageferry("send", f"image:{image}", f"exec:{noisy}", "--json", "--workers", "3")
    assert done.returncode == 0, done.stderr
    assert same_file(image, tmp_path / "to")
    report = json.loads(done.stdout)
    assert report["status"] == "completed" and report["verified"]
    assert [p["name"] for p in report["processes"]][-1] == "carrier-0"
    told = [line for line in done.stderr.splitlines() if line.startswith("exec:echo: ")]
    assert told[0] == "exec:echo: a warning"
    assert any("result" in line and "completed" in line for line in told)  # of the far end's stdout


def test_precopy_fd():
    """A socket at each end, and a guest that writes; the bytes are cut up somehow."""

    async def run():
        async with Between(GUEST, "demo:", step=7919, workers=2) as ends:
            return await ends.whole()

    _, arrived = asyncio.run(run())
    assert arrived["oracle"]["ok"]


# ---- everything works over it ------------------------------------------------------------------


def test_postcopy_with_a_link_of_its_own():
    """(Over ZeroMQ: below.)"""

    async def run():
        async with Between(GUEST, "demo:", **POSTCOPY, postcopy_link="direct") as ends:
            return await ends.whole()

    report, arrived = asyncio.run(run())
    assert arrived["oracle"]["ok"]
    assert report["postcopy-requests"] > 0


def test_keys_within_the_stream(image, tmp_path):
    ends = KeyEnds(tmp_path)

    async def run(keys):
        async with Between(f"image:{image}", f"image:{tmp_path}/to", keys=keys) as between:
            return await between.whole()

    asyncio.run(run((ends.here.path, ends.there.path)))
    assert same_file(image, tmp_path / "to")
    with pytest.raises(PageferryError, match="wants a key"):
        asyncio.run(run(("", ends.there.path)))


def test_a_cut_postcopy_goes_on_by_relay():
    """The receiver listens at its host all the same."""

    async def run():
        async with Between(GUEST, "demo:", **POSTCOPY) as ends:
            await ends.moved(1000)
            ends.cut()
            await ends.is_status(Status.POSTCOPY_PAUSED)
            arrival = ends.listening.arrival
            await until_async(lambda: arrival.status is Status.POSTCOPY_PAUSED, "paused there")
            ends.migration.recover(None)  # a descriptor cannot be opened again
            await until_async(
                lambda: "pageferry relay ipc://@" in ends.migration.query()["paused-because"],
                "said how",
            )
            await ends.is_status(Status.POSTCOPY_PAUSED)
            ends.migration.recover(f"exec:{words('relay', str(ends.listening.endpoint))}")
            return await ends.whole()

    report, arrived = asyncio.run(run())
    assert arrived["oracle"]["ok"]
    assert report["recoveries"] == 1


def test_a_paused_postcopy_goes_on_over_the_stream_that_is_whole():
    async def run():
        async with Between(GUEST, "demo:", **POSTCOPY) as ends:
            await ends.moved(1000)
            ends.migration.pause()
            await ends.is_status(Status.POSTCOPY_PAUSED)
            ends.migration.recover(None)
            return await ends.whole()

    assert asyncio.run(run())[1]["oracle"]["ok"]


# ---- what breaks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("no-such-command --x", ConnectError, r"127: there is no such command.*no-such-command"),
        ("echo out of order >&2; exit 3", ConnectError, "ended with status 3.* it said: out of or"),
        ("true", ConnectError, "ended with status 0, before a pageferry answered"),
        ("kill -9 $$", ConnectError, "was killed by SIGKILL, before"),
        ("echo Last login: today; exit 1", ConnectError, "status 1.*no pageferry's: Last login"),
        ("exec cat > /dev/null", ConnectError, "has closed its stdout: it goes one way"),
        ("exec cat", RemoteProtocolError, "both ends of the stream are a source, or it gives back"),
        ("yes filler", RemoteProtocolError, "64 KiB came over the stream .* filler filler"),
        ("yes text | head -c 3000000 >&2; exit 4", ConnectError, "status 4.*said: text"),
        ("exec sleep 100", ConnectError, "nothing of pageferry came over .* within 1 s"),
        ("echo hm; exec sleep 100", ConnectError, "within 1 s.* was no pageferry's: hm"),
    ],
)  # fmt: skip
def test_a_command_that_is_no_receiver(text, error, says, monkeypatch, caplog):
    """In one sentence, with what it said; and it is gone. Of one that never answers it is said
    before what is waited for."""
    monkeypatch.setattr(carrier, "GREETING_SECONDS", 1.0 if "sleep" in text else 60.0)
    monkeypatch.setattr(carriage, "_SAY_SECONDS", 0.3 if "sleep" in text else 60.0)

    async def run():
        ours = carriage.Carriage()
        try:
            await ours.dial(parse_stream(f"exec:{text}"))
        finally:
            await ours.close(hurry=True)

    with pytest.raises(error, match=says):
        asyncio.run(run())
    waits = f"exec:{text}: no `pageferry receive … -` (or relay) has answered at its other end yet"
    assert (waits in caplog.text) == ("sleep" in text)


@pytest.mark.parametrize("limit", [40, 3000, 300_000])
def test_a_stream_that_ends_in_the_middle(image, tmp_path, limit):
    """Of the greeting, the handshake, the memory."""

    async def run():
        async with Between(f"image:{image}", f"image:{tmp_path}/to", limit=limit) as ends:
            return await ends.failed()

    here, there = asyncio.run(run())
    assert isinstance(here, ConnectError if limit == 40 else PeerLost), here
    assert isinstance(there, ConnectError | PeerLost), there
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("whose", ["here", "there"])
def test_a_carrier_that_is_killed(image, tmp_path, whose):
    async def run():
        async with Between(
            f"image:{image}", f"image:{tmp_path}/to", max_bandwidth=2_000_000, codec="none"
        ) as ends:
            await ends.moved(100)
            carriers = [p for p in psutil.Process().children(recursive=True)
                        if _name(p) == "pf-carrier"]  # fmt: skip
            mine = ends.migration.carriage.processes()[0]["pid"]
            (killed,) = [p for p in carriers if (p.pid == mine) == (whose == "here")]
            killed.kill()
            return await ends.failed()

    errors = asyncio.run(run())
    first, second = errors if whose == "here" else errors[::-1]
    assert isinstance(first, WorkerDied) and "carrier-0 was killed" in str(first)
    assert isinstance(second, PeerLost)


def _name(process):
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


def _runs(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _below(process):
    """All that a process has started, the command's too."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if p.is_running()]


@pytest.mark.parametrize("how", ["command", "interrupt", "kill"])
def test_nothing_is_left_behind(tmp_path, how):
    """The command is killed; Ctrl-C; pageferry is killed: both ends and what is between end."""
    there = words("receive", "--quiet", "--into", "demo:", "-")
    guest = "demo:?size=32M&content=random&rate=100"
    with Running(
        "send", guest, f"exec:echo $$ > {tmp_path}/pid; {there}; exit 5", "--max-bandwidth", "4MB",
        "--codec", "none",
    ) as sending:  # fmt: skip
        sending.error_line("round 1")
        shell = psutil.Process(int((tmp_path / "pid").read_text()))
        (other,) = shell.children()
        everybody = [shell, *_below(sending.process)]
        match how:
            case "command":
                other.kill()
            case "interrupt":
                sending.process.send_signal(signal.SIGINT)
            case "kill":
                sending.process.kill()
        code, _, said = sending.finish()
        until(lambda: not any(map(_runs, everybody)), "all ended")
    assert code == {"command": 7, "interrupt": 130, "kill": -9}[how], said
    if how == "command":
        assert "ended with status 5 in the middle" in said
    if how != "interrupt":
        sweep({"command": other.pid, "kill": sending.process.pid}[how])


# ---- descriptors -------------------------------------------------------------------------------


def _listening():
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen()
    return sock.detach()


def _datagrams():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    other.close()
    return one.detach()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: os.open(path, os.O_RDWR | os.O_CREAT), "is no socket"),
        (lambda path: os.open(os.devnull, os.O_RDWR), "is no socket"),
        (lambda path: _listening(), "no connected stream"),
        (lambda path: _datagrams(), "no connected stream"),
        (lambda path: socket.socket().detach(), "without a peer"),
    ],
)
def test_descriptors_that_are_no_stream(make, why, tmp_path):
    fd = make(tmp_path / "x")
    try:
        with pytest.raises(UsageError, match=why):
            take(Stream(reads=fd))
    finally:
        os.close(fd)
    with pytest.raises(UsageError, match=f"descriptor {fd} is not open"):
        take(Stream(reads=fd))


def test_pairs_that_are_no_stream(tmp_path):
    reads, writes = os.pipe()
    controls, terminal = os.openpty()
    file = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        for pair, why in (
            ((reads, file), "is a file"),
            ((terminal, writes), "is a terminal"),
            ((reads, os.open(os.devnull, os.O_WRONLY)), "is /dev/null"),
        ):
            with pytest.raises(UsageError, match=why):
                take(Stream(reads=pair[0], writes=pair[1]))
            if why == "is /dev/null":
                os.close(pair[1])
    finally:
        for fd in (reads, writes, controls, terminal, file):
            os.close(fd)


def test_stdin_and_stdout_are_nobody_elses(tmp_path):
    """After the first word nothing that is printed, by anybody, is on the stream."""
    code = (
        "from pageferry.transport.carrier import claim, take\n"
        "from pageferry.transport.stream_addresses import parse_stream\n"
        "import os\n"
        "stream = claim(parse_stream('fd:0'))\n"
        "print('a result', flush=True)\n"
        "os.system('echo of a child; cat')\n"
        "os.write(stream.writes, os.read(stream.reads, 5))\n"
        "assert str(stream) == 'fd:0'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="hello", capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("hello", "a result\nof a child\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("receive", "--into", "demo:"), "say --listen"),
        (("receive", "-", "--listen", "tcp://127.0.0.1:0"), "ipc://PATH, not at tcp"),
        (("send", "demo:", "fd:x"), "is no stream"),
        (("relay", "tcp://127.0.0.1:1"), "to an ipc:// endpoint"),
    ],
)
def test_usage(arguments, says):
    ends = socket.socketpair()
    done = subprocess.run(
        command(*arguments), stdin=ends[0], stdout=ends[0], stderr=subprocess.PIPE, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    for end in ends:
        end.close()
    assert done.returncode == 2 and says in done.stderr
