"""`-v`: what happens, on stderr, one line an event; nothing else is other than without."""

import contextlib
import json
import logging
import os
import pty
import re
import subprocess

import pytest
from helpers import command, pattern, receiver
from helpers import pageferry as run

from pageferry.tools.cli.log_lines import Lines

LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (debug|info|warning|error)\s+([a-z]+): (.*)")
SHORT = ("copy", "demo:?size=8M&rate=2000", "demo:")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "vm.mem"
    path.write_bytes(pattern(1000))
    return path


def said(text):
    """The lines of a log in `text`: level, who, what."""
    return [match.groups() for match in map(LINE.fullmatch, text.splitlines()) if match]


def about(lines, who):
    return "\n".join(text for _, name, text in lines if name == who)


@pytest.mark.parametrize("before", [True, False])
def test_what_an_operator_wants_to_know(before):
    """With the command or before it; stdout is JSON and nothing else."""
    done = run(*(["-v", *SHORT] if before else [*SHORT, "-v"]), "--json", "--quiet")
    report = json.loads(done.stdout)
    lines = said(done.stderr)
    assert len(lines) == len(done.stderr.splitlines())
    assert {level for level, _, _ in lines} == {"info"}
    source, there = about(lines, "source"), about(lines, "destination")
    for text in (
        "settings: multifd-channels=", "connected to ", "demo, 8.0 MiB in 1 block",
        f"writes are tracked by {report['dirty-tracking']}", "2048 pages (8.0 MiB) to send",
        "round 1: 2048 pages", "written in", "switching over: a downtime of ",
        "the limit is 300 ms", "the guest stands still: ", "SendState ",
    ):  # fmt: skip
        assert text in source
    assert re.search(r"the guest stood still for \d+ ms: StopGuest .*SendRun", source)
    assert re.search("setup\n.*active\n.*device\n.*completed\n", source, re.DOTALL)
    assert f"completed after {report['total-time']} ms: {report['ram']['normal']} pages" in source
    assert "a source is here, pageferry" in there and "completed after" in there


def test_all_of_it():
    done = run(*SHORT, "-vv", "--json", "--quiet")
    json.loads(done.stdout)
    lines = said(done.stderr)
    assert len(lines) == len(done.stderr.splitlines())
    text = about(lines, "source")
    for message in ("said Hello, ", "heard Welcome, ", "said Run, ", "SendRound begins"):
        assert message in text
    workers = about(lines, "workers")
    for name in ("sender-0", "receiver-0"):
        assert re.search(
            rf"{name} started, process (\d+)\n(.*\n)*{name} ended, process \1", workers
        )


def test_without_it_nothing_is_said_but_what_was():
    assert said(run(*SHORT).stderr) == []
    assert run(*SHORT, "--quiet").stderr == ""


def test_tokens_and_identities_are_not_said(image, tmp_path):
    """Whoever has one may speak on a channel. They are in Welcome, whose size alone is said."""
    with receiver("--into", f"image:{tmp_path}/there.mem", "--once", "-vv") as there:
        sent = run("send", f"image:{image}", there.endpoint, "-vv")
        _, _, err = there.finish()
    assert sent.returncode == 0, sent.stderr
    for text in (sent.stderr, err):
        assert re.search(r"(said|heard) Welcome, \d+ bytes", text)
        assert not re.search(r"token|identity|\\x|b'", text)
        assert not re.search(r"[0-9a-f]{32}", text.replace("-", "x"))


def test_what_is_there_already_is_said(image, tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    for _ in range(2):
        done = run("copy", f"image:{image}", f"image:{folder}/", "-v")
        assert done.returncode == 0, done.stderr
    assert re.search(r"source: \d+ pages are there already, and left out", done.stderr)


def test_a_guest_that_does_not_converge():
    done = run(
        "copy", "demo:?size=16M&rate=0", "demo:", "--max-bandwidth", "30MB", "--max-rounds", "2",
        "--downtime-limit", "31ms", "-v",
    )  # fmt: skip
    assert done.returncode == 10
    text = about(said(done.stderr), "source")
    assert "failed: not converging after 2 rounds" in text
    assert "round 2: " in text and "failed after" in text


def test_postcopy_says_why():
    done = run("copy", "demo:?size=16M&rate=0", "demo:", "--postcopy", "now", "-v")
    assert done.returncode == 0, done.stderr
    text = about(said(done.stderr), "source")
    assert "the guest is started there before its memory: --postcopy now" in text
    assert "postcopy-active" in text and "TellMissing" in text


def test_a_batch_names_its_items(tmp_path):
    (tmp_path / "a.mem").write_bytes(pattern(100))
    there = tmp_path / "there"
    there.mkdir()
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"retries": 1, "backoff": "10ms", "items": [
        {"name": "good", "source": f"image:{tmp_path}/a.mem", "destination": f"image:{there}/a"},
        {"name": "bad", "source": "demo:", "destination": "tcp://127.0.0.1:1"},
    ]}))  # fmt: skip
    done = run("batch", str(manifest), "-v", "--json", "--quiet")
    assert done.returncode == 15, done.stderr
    lines = said(done.stderr)
    batch, source = about(lines, "batch"), about(lines, "source")
    assert "good: started, attempt 1" in batch and "good: completed" in batch
    assert re.search(r"bad: failed: .*; tried again in 0\.\d s", batch)
    assert "bad: started, attempt 2" in batch
    assert "good: round 1: 100 pages" in source
    assert json.loads(done.stdout)["completed"] == 1


def test_lines_stand_alone_beside_a_live_display():
    """On a terminal rich draws a line anew all the time; log lines come above it, whole."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(*SHORT, "-v"), stdout=subprocess.DEVNULL, stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "400", "NO_COLOR": "1"},
    ) as process:  # fmt: skip
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 1 << 16):
                drawn += data
        os.close(ours)
    assert process.returncode == 0
    text = drawn.decode()
    assert "\x1b[2K" in text  # it was a live display
    lines = said(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n"))
    source = about(lines, "source")
    for what in ("connected to ", "round 1: 2048 pages", "switching over", "completed after"):
        assert what in source


def test_before_a_command_of_a_batch(tmp_path):
    """`batch WHAT` is `batch run WHAT`, with the option as without."""
    for words in (["-v"], ["-vv"], []):
        done = run("batch", *words, "status", "--state", f"{tmp_path}/none")
        assert done.returncode == 2 and "status" not in done.stderr, done.stderr
        done = run("batch", *words, f"{tmp_path}/none.toml")
        assert "none.toml" in done.stderr


@pytest.mark.parametrize("name", ["pageferry.source", "pageferry.workers"])
def test_one_line_an_event_whatever_a_peer_says(name):
    record = logging.LogRecord(
        name, logging.INFO, "x.py", 1, "%s", ("two\nlines \x1b[2J\r\x9b and a tab\t",), None
    )
    line = Lines().format(record)
    assert said(line) == [
        ("info", name.removeprefix("pageferry."),
         r"two\x0alines \x1b[2J\x0d\x9b and a tab\x09"),
    ]  # fmt: skip
