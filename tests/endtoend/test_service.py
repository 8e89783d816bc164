"""pageferry as a service of systemd: what it is handed and says, and the units that are shipped."""

import configparser
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import as_service
import pytest
from for_anybody import within
from helpers import GIVE_UP, Running, command, pattern, same_file
from helpers import pageferry as run

import pageferry
from pageferry.transport.keys import KeyDirectory
from pageferry.transport.links import parse_endpoint

UNITS = Path(pageferry.__path__[0]) / "tools" / "systemd"
SERVICE = UNITS / "pageferry-receive.service"
ROOT = os.geteuid() == 0


@pytest.fixture
def folder():
    """Whoever the service runs as may write there."""
    path = tempfile.mkdtemp(dir="/tmp")
    if ROOT:
        os.chown(path, 65534, 65534)
    yield Path(path)
    shutil.rmtree(path)


@contextlib.contextmanager
def service(folder, where, *arguments):
    """As its unit starts it; yields it when it has said that it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(folder / "notify"))
        os.chmod(folder / "notify", 0o666)
        notify.settimeout(GIVE_UP)
        starter = (*(within(folder) if ROOT else ()), *command()[:1], as_service.__file__)
        with Running(
            *arguments, "--json", within=(*starter, where, str(folder / "notify"))
        ) as running:
            running.endpoint = json.loads(running.line())["endpoint"]
            assert notify.recv(100) == b"READY=1"
            yield running
            running.process.terminate()
            running.finish()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_an_image_arrives(folder, tmp_path, scheme):
    """At the socket that was handed over, under the restrictions of the unit; its keys and images
    are the service's. The socket stays systemd's: its path is not removed."""
    image = tmp_path / "vm"
    image.write_bytes(pattern(300))
    here = KeyDirectory.create(str(tmp_path / "keys"))
    there = KeyDirectory.create(str(folder / "keys"))
    here.allow(there.public)
    there.allow(here.public)
    (folder / "images").mkdir()
    if ROOT:
        subprocess.run(["chown", "-R", "65534:65534", str(folder)], check=True)
    where = "tcp" if scheme == "tcp" else str(folder / "s")
    with service(
        folder, where, "receive", "--listen", "systemd", "--keys", there.path, "--into",
        f"image:{folder}/images/",
    ) as receiving:  # fmt: skip
        assert parse_endpoint(receiving.endpoint).scheme == scheme
        done = run("send", f"image:{image}", receiving.endpoint, "--keys", here.path)
        assert done.returncode == 0, done.stderr
    assert same_file(image, folder / "images" / "vm")
    assert scheme == "tcp" or (folder / "s").exists()
    assert not [name for name in os.listdir(folder) if name.startswith("pageferry-")]


def test_a_snapshot_is_served(folder):
    snapshot = folder / "vm"
    snapshot.write_bytes(pattern(10))
    snapshot.chmod(0o644)
    with service(folder, "tcp", "serve", f"image:{snapshot}", "--listen", "systemd") as serving:
        assert parse_endpoint(serving.endpoint).port > 0


def test_without_systemd():
    done = run("receive", "--listen", "systemd")
    assert done.returncode == 2 and "tcp://HOST:PORT" in done.stderr, done.stderr


# ---- the units -----------------------------------------------------------------------------------


def _lines(path):
    units = configparser.RawConfigParser(strict=False, delimiters=["="], allow_no_value=False)
    units.optionxform = str
    units.read_string(path.read_text())
    return units


def test_the_command_of_the_unit_is_one():
    """Its options are there, whatever becomes of the addresses."""
    _, *arguments = _lines(SERVICE)["Service"]["ExecStart"].split()
    from pageferry.tools.cli.receive import receive_command

    assert arguments[0] == "receive"
    receive_command.make_context("receive", arguments[1:])
    assert _lines(SERVICE)["Service"]["User"] in (UNITS / "pageferry.sysusers.conf").read_text()


def test_limits_of_the_unit():
    unit = _lines(SERVICE)["Service"]
    assert unit["CapabilityBoundingSet"] == "" and unit["NoNewPrivileges"] == "yes"
    assert unit["ProtectSystem"] == "strict" and unit["MemoryDenyWriteExecute"] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (systemd)")
def test_systemd_takes_the_units(tmp_path):
    """It knows all that is in them, and has little to say against the service."""
    for path in UNITS.glob("*.s*"):
        text = path.read_text().replace("/usr/bin/pageferry", "/usr/bin/env")
        (tmp_path / path.name).write_text(text)
    units = [str(tmp_path / f"pageferry-receive.{kind}") for kind in ("service", "socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", units[0]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:]
