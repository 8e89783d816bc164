"""A Linux VM of an unmodified QEMU moves while it works: it notices nothing but the downtime.

Its serial line, source and destination put together, is what it would have been without a move;
its writer verifies every page; its network card answers before, meanwhile and after.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass

import linux_guest
import pytest
from helpers import PAGE, Running, receiver
from helpers import pageferry as run
from qemu_vm import MIB, Vm

_by_postcopy = pytest.mark.skipif(os.geteuid() != 0, reason="postcopy into qemu: needs root")
PRECOPY, NOW, AFTER = (
    pytest.param("never", id="precopy"),
    pytest.param("now", marks=_by_postcopy),
    pytest.param("after=2", marks=_by_postcopy),
)
# so slow that it is met in mid-round: it sends half a minute's worth
SLOW = "1MB"
WRITER = 16 * MIB
# Two clocks are read one after the other, and the guest may have to wait in between.
APART_NS = 50_000_000
# 198.18.0.0/15 is for benchmarks (RFC 2544).
HERE, THERE = "198.18.0.1", "198.18.0.2"
CARD = "veth0"


@pytest.fixture
def linux(tmp_path_factory):
    """Options of a Vm that boots Linux, with a network card."""
    if reason := linux_guest.available():
        pytest.skip(reason)
    kernel, initrd, append = linux_guest.build(
        tmp_path_factory.getbasetemp(), writer_mib=WRITER // MIB, rate=5000
    )
    return {
        "memory": 256 * MIB,
        "accelerator": linux_guest.accelerator(),
        "kernel": kernel,
        "initrd": initrd,
        "append": append,
        "extra": linux_guest.NETWORK,
    }


@dataclass
class Pair:
    """A VM at work and one that waits; `since` is before the first one's start."""

    here: Vm
    there: Vm
    since: float

    def serial(self):
        return self.here.serial() + self.there.serial()


@pytest.fixture
def pair(linux):
    since = time.monotonic()
    with Vm("here", **linux) as here, Vm("there", **linux, incoming="defer") as there:
        here.wait_for_serial(b"writer ready")
        _tick(here, 5)
        yield Pair(here, there, since)


def _tick(vm, more):
    """Wait for so many more ticks on this VM's serial line; the number of the last one."""
    goal = len(linux_guest.ticks(vm.serial())) + more
    said = vm.wait_for_serial(lambda said: len(linux_guest.ticks(said)) >= goal)
    return linux_guest.ticks(said)[-1][0]


def _verify_all(vm):
    """Wait until its writer has looked at each of its pages again."""
    goal = linux_guest.ticks(vm.serial())[-1][3] + WRITER // PAGE
    vm.wait_for_serial(lambda said: linux_guest.ticks(said)[-1][3] > goal)


def _move(pair, way, monitor, listen="tcp://127.0.0.1:0", within=((), ())):
    """By `send` and `receive`. The VM is watched at work in mid-round, then the rest goes at full
    speed. The sender's report."""
    limit = "9s" if way == "never" else "1ms"  # which no round meets: postcopy must end it
    slow = ("--max-bandwidth", SLOW, "--max-postcopy-bandwidth", SLOW)
    trusted = ("--insecure",) if within[0] else ()
    with (
        receiver(
            "--into", f"qemu:{pair.there.qmp_path}", "--once", *trusted, listen=listen,
            within=within[1],
        ) as receiving,
        Running(
            "send", f"qemu:{pair.here.qmp_path}", receiving.endpoint, "--json", "--codec", "lz4",
            "--postcopy", way, "--downtime-limit", limit, "--monitor", monitor, *slow, *trusted,
            within=within[0],
        ) as sending,
    ):  # fmt: skip
        # by postcopy it works there, and waits for pages
        sending.error_line("postcopy:" if way == "now" else "round 1:")
        at_work = pair.there if way == "now" else pair.here
        last = _tick(at_work, 3)
        assert linux_guest.ask(at_work) >= last
        free = run("set", monitor, "max-bandwidth=0", "max-postcopy-bandwidth=0")
        assert free.returncode == 0, free.stderr
        code, out, said = sending.finish()
        assert code == 0, said
        code, _, said = receiving.finish()
        assert code == 0, said
    return json.loads(out)


def _check(pair, way, report):
    """It goes on there, as if nothing had been."""
    assert report["status"] == "completed"
    assert ("postcopy-requests" in report) == (way != "never")
    assert pair.here.status() in ("postmigrate", "paused")
    assert pair.there.status() == "running"

    # It answers there, and the source says nothing more.
    said, until = pair.here.serial(), time.monotonic() - pair.since
    last = _tick(pair.there, 5)
    assert linux_guest.ask(pair.there) >= last
    _verify_all(pair.there)
    assert pair.here.serial() == said
    pair.there.qmp("stop")

    # No gap, no repeat, no clock that goes back, no wrong page, no word of complaint.
    assert linux_guest.problems(pair.serial()) == []
    ticks = linux_guest.ticks(pair.serial())
    assert len(ticks) == ticks[-1][0] + 1
    _check_clocks(ticks, len(linux_guest.ticks(said)), until, time.monotonic() - pair.since)


def _check_clocks(ticks, moved, until, seconds):
    """After `moved` ticks, at `until`, it went. Neither clock jumps: they stay together, and the
    guest has not seen more pass of the `seconds` that it has been there than it did before."""
    before, after = (
        min(wall - uptime for _, uptime, wall, _ in part) for part in (ticks[:moved], ticks[moved:])
    )
    assert abs(after - before) < APART_NS
    # its kernel measured its processor's clock, on a busy host badly
    pace = max(1.0, ticks[moved - 1][1] / 1e9 / until)
    assert ticks[-1][1] / 1e9 < 1.2 * pace * seconds


@pytest.mark.parametrize("way", [PRECOPY, NOW, AFTER])
def test_it_notices_nothing_but_the_downtime(pair, way, tmp_path):
    report = _move(pair, way, f"unix:{tmp_path}/m")
    _check(pair, way, report)


# --- between two hosts


@pytest.fixture
def hosts():
    """The names of two network namespaces that a link joins."""
    if not shutil.which("ip"):
        pytest.skip("ip (iproute2) is not installed")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    names = [f"pageferry-{os.getpid()}-{side}" for side in ("here", "there")]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)
            _ip("link", "add", CARD, "netns", names[0], "type", "veth",
                "peer", "name", CARD, "netns", names[1])  # fmt: skip
            for name, address in zip(names, (HERE, THERE), strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
                _ip("-n", name, "link", "set", CARD, "up")
        except subprocess.CalledProcessError as e:
            pytest.skip(f"no network namespaces here: {e.stderr.strip()}")
        yield names


def _ip(*arguments):
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return ran.stdout


def _sent(host):
    """Bytes that have left this host."""
    (card,) = json.loads(_ip("-n", host, "-j", "-s", "link", "show", "dev", CARD))
    return card["stats64"]["tx"]["bytes"]


@pytest.mark.parametrize("way", [PRECOPY, NOW])
def test_between_two_hosts(hosts, pair, way, tmp_path):
    """Each end of pageferry sees only its own host's network."""
    report = _move(
        pair, way, f"unix:{tmp_path}/m", f"tcp://{THERE}:0",
        tuple(("ip", "netns", "exec", host) for host in hosts),
    )  # fmt: skip
    assert _sent(hosts[0]) >= report["wire-bytes"] > 0
    _check(pair, way, report)
