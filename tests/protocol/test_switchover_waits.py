"""What is waited for before a switchover: how long, and what a peer may say of it."""

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import until, until_async

from pageferry.pipeline import hooks
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.state import Status
from pageferry.pipeline.switchover import ACK, CONTINUE, Acknowledgement, Waits
from pageferry.tools.cli.view import phase_line, phase_of, summary
from pageferry.tools.report import sections
from pageferry.transport.errors import DestinationError, RemoteProtocolError, UsageError
from pageferry.transport.messages import Hello

HELLO = Hello(4, "0", "an-id", "demo", [], 1, 128, name="a name; $(touch x)")


def test_what_was_waited_for_is_told_while_it_lasts_and_afterwards():
    """Nothing of it where nobody waited."""
    waits = Waits()
    waits.became(Status.ACTIVE)
    assert waits.report() == {}
    with waits.acknowledgement():
        assert waits.report() == {"waiting-for": ACK, "switchover-ack-time": 0}
    assert waits.report() == {"switchover-ack-time": 0}
    waits.became(Status.PRE_SWITCHOVER)
    assert waits.report()["waiting-for"] == CONTINUE
    waits.became(Status.DEVICE)
    assert waits.report() == {"switchover-ack-time": 0, "pre-switchover-time": 0}


def test_an_acknowledgement_comes_once_and_was_promised():
    """It may be heard before the promise is read."""
    ack = Acknowledgement()
    ack.hear()
    ack.promise(True)
    asyncio.run(ack.wait())
    assert ack.report(None) == {}
    assert ack.report(time.monotonic() + 9.0)["switchover-ack-to-stop-time"] > 8000
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        ack.hear()
    early = Acknowledgement()
    early.hear()
    with pytest.raises(RemoteProtocolError, match="nobody had said"):
        early.promise(False)
    none = Acknowledgement()
    none.promise(False)
    asyncio.run(none.wait())
    assert not none.heard and not none.awaited and none.report(1.0) == {}
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        none.hear()


def test_a_person_sees_that_it_waits_and_what_for():
    """In the live line, on the page, and in the end."""
    report = {"status": "pre-switchover", "total-time": 9000, "pre-switchover-time": 4000,
              "ram": {"remaining": 4096, "total": 8192, "dirty-sync-count": 2},
              "waiting-for": CONTINUE}  # fmt: skip
    assert phase_of(report) == "waiting"
    assert "pageferry continue" in phase_line(report) and "4.0 s" in phase_line(report)
    assert "pageferry continue" in sections.now(report)
    waiting = report | {"status": "active", "waiting-for": ACK}
    assert "not ready yet" in phase_line(waiting)
    done = report | {"status": "completed", "downtime": 4100, "downtime-limit": 300,
                     "wire-bytes": 1, "codec-pages": {}}  # fmt: skip
    done["ram"] = done["ram"] | {"normal": 1, "duplicate": 1}
    assert "downtime 4.1 s (limit 300 ms), 4.0 s of it waiting" in summary(done)


def test_release_ram_needs_postcopy():
    with pytest.raises(UsageError, match="--postcopy"):
        Parameters(release_ram=True).checked()
    assert Parameters(release_ram=True, postcopy="auto").checked().qmp()["release-ram"]


# ---- the destination's command ---------------------------------------------------------------


def test_a_command_is_run_without_a_shell_and_told_who_comes(tmp_path):
    """What a peer says is in the environment, where nothing reads it as a command."""
    out = tmp_path / "out"
    hook = hooks.command(f"sh -c 'env > {out}; echo told to nobody'")
    asyncio.run(hook(HELLO))
    found = out.read_text().splitlines()
    assert "PAGEFERRY_UUID=an-id" in found and "PAGEFERRY_KIND=demo" in found
    assert f"PAGEFERRY_NAME={HELLO.name}" in found


@pytest.mark.parametrize(("text", "says"), [
    ("sh -c 'for i in 1 2 3 4 5 6 7; do echo line $i >&2; done; exit 3'",
     "sh ended with 3: line 3; line 4; line 5; line 6; line 7"),
    ("false", "false ended with 1: it said nothing"),
    ("sh -c 'kill -9 $$'", "was ended by signal 9"),
    ("sh -c 'printf \"\\033[2J bad\" >&2; exit 1'", "\ufffd[2J bad"),
])  # fmt: skip
def test_one_that_fails_is_an_error_with_its_last_words(text, says):
    with pytest.raises(DestinationError) as caught:
        asyncio.run(hooks.command(text)(HELLO))
    assert says in caught.value.message


@pytest.mark.parametrize("text", ["", "sh -c 'x", "no-such-command-here --x"])
def test_one_that_cannot_be(text):
    """Known before anybody comes."""
    with pytest.raises(UsageError, match="--before-switchover"):
        hooks.command(text)


def alive_in(session):
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, theirs = path.read_text().rpartition(")")[2].split()[:4]
            if int(theirs) == session and state != "Z":
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize("within", ["", "timeout 60 "])
@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_one_that_nobody_waits_for_any_more_is_ended(tmp_path, trap, within, monkeypatch):
    """It and what it has started, also if they do not want to, or have a process group of their
    own, as what `timeout` runs has."""
    monkeypatch.setattr(hooks, "_END_SECONDS", 0.2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hook = hooks.command(f"{within}sh -c '{trap}echo $$ > {fifo}; while true; do sleep 60; done'")

    async def main():
        running = asyncio.ensure_future(hook(HELLO))
        pid = os.getsid(int(await asyncio.to_thread(fifo.read_text)))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        # who is killed and is nobody's child here ends in its own time
        await until_async(lambda: not alive_in(pid), "all of it has ended")

    asyncio.run(main())


@pytest.mark.parametrize("within", ["", "timeout 60 "])
def test_one_whose_pageferry_is_killed_ends_with_it(tmp_path, within):
    """It and what it has started: nobody is left who would wait for it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loop = f"sleep 60 & echo $$ > {fifo}; while true; do sleep 60; done"
    text = f"""{within}sh -c 'trap "" TERM; {loop}'"""
    code = f"""
import asyncio
from types import SimpleNamespace
from pageferry.pipeline import hooks
hello = SimpleNamespace(uuid="", kind="", name="")
asyncio.run(hooks.command({text!r})(hello))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as owner:
        session = os.getsid(int(fifo.read_text()))
        assert len(alive_in(session)) > 2
        owner.kill()
        until(lambda: not alive_in(session), "all of it has ended")


def test_one_that_ends_by_a_signal_that_is_blocked_here_has_not_succeeded():
    """What is blocked in whoever starts pageferry is so in all that this starts, and a command may
    open itself to it."""
    code = (
        "import os, signal as s; s.pthread_sigmask(s.SIG_UNBLOCK, [10]); os.kill(os.getpid(), 10)"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with pytest.raises(DestinationError, match="was ended by signal 10"):
            asyncio.run(hooks.command(shlex.join([sys.executable, "-c", code]))(HELLO))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
