"""Where measurements are made: files, processes, processor time, memory and traffic.

A Lab owns every file and every process a benchmark makes and removes them however it ends.
Each process leads a session of its own, so a whole side of a migration is found by session
id; the benchmark adopts orphans (PR_SET_CHILD_SUBREAPER), so the kernel accounts to it
everything the side has used. Knows no method and no table.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, TypeVar

import psutil

from ..._version import __version__

T = TypeVar("T")

PREFIX = "pageferry-bench-"
SHARED_MEMORY = "/dev/shm"
_HUGE_PAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_HZ = os.sysconf("SC_CLK_TCK")

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_libc = ctypes.CDLL(None, use_errno=True)

_SAMPLE_SECONDS = 0.05
_LOOK_AROUND = 8  # samples between two searches for new processes


class BenchError(Exception):
    """A measurement that could not be made, in words."""


def isolate() -> bool:
    """Enter a network namespace with nothing but a loopback interface; False if not allowed.

    Its counters count our bytes only, and nothing can leave the host. Before any thread starts.
    """
    if _libc.unshare(_CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    return True


def loopback_bytes() -> int:
    """Bytes that went over the loopback interface so far, TCP/IP headers included."""
    with open("/proc/net/dev") as f:
        for line in f:
            name, _, numbers = line.partition(":")
            if name.strip() == "lo":
                return int(numbers.split()[0])
    raise BenchError("there is no loopback interface")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def listens(port: int) -> bool:
    """Does somebody listen at TCP `port`? Asked without connecting: some accept just once."""
    with open("/proc/net/tcp") as f:
        next(f)
        rows = [line.split() for line in f]
    return any(row[3] == "0A" and row[1].endswith(f":{port:04X}") for row in rows)


def wait_for(
    what: str, condition: Callable[[], T | None], seconds: float = 20.0, every: float = 0.005
) -> T:
    """What `condition` returns, as soon as it is true."""
    until = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > until:
            raise BenchError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)
    return result


def processor_seconds(child: Child) -> float:
    """Processor time that a running process and its descendants have used so far."""
    ticks = 0
    for pid in _session_members({child.pid}):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
            ticks += sum(map(int, f.read().rpartition(")")[2].split()[11:15]))
    return ticks / _HZ


class Others:
    """What others than this process and the children that it has reaped take of all processors,
    the hypervisor's other machines included. From its making on."""

    def __init__(self) -> None:
        self._begin = time.monotonic(), _taken() - _own_seconds()

    def share(self) -> float:
        """0 to 1. Interrupts are nobody's."""
        began, before = self._begin
        seconds = (time.monotonic() - began) * (os.cpu_count() or 1)
        return max(0.0, _taken() - _own_seconds() - before) / seconds


def _taken() -> float:
    """Processor seconds that this host has used, or wanted and not got (proc_stat(5))."""
    with open("/proc/stat") as f:
        user, nice, system, _, _, _, _, steal = map(int, f.readline().split()[1:9])
    return (user + nice + system + steal) / _HZ


def _own_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


class Child:
    """A process, the leader of its session. Its stdout and stderr go to files of the lab."""

    def __init__(
        self, argv: list[str], directory: str, number: int,
        stdin: int | IO[bytes] | None = None, stdout: int | IO[bytes] | None = None,
    ) -> None:  # fmt: skip
        self.name = os.path.basename(argv[0])
        self._out = os.path.join(directory, f"{number}.out")
        self._err = os.path.join(directory, f"{number}.err")
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self._popen = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=out if stdout is None else stdout, stderr=err, start_new_session=True,
            )  # fmt: skip
        self.pid = self._popen.pid
        self.code: int | None = None
        self.cpu = 0.0  # seconds, of it and all its descendants, once it has ended

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.pid} code={self.code}>"

    def output(self) -> str:
        with open(self._out, errors="replace") as f:
            return f.read()

    def errors(self) -> str:
        with open(self._err, errors="replace") as f:
            return f.read().strip()

    def running(self) -> bool:
        return self.code is None and not _ended(self.pid, 0)

    def join(self, seconds: float = 120.0, check: bool = True) -> float:
        """Wait for its end and that of all its descendants. Returns their processor time."""
        if self.code is None:
            if not _ended(self.pid, seconds):
                self.kill()
                raise BenchError(f"{self.name} has not ended after {seconds:.0f} s")
            self._reap(self.pid)
            self._adopt(2.0)
        if check and self.code:
            last = (self.errors() or self.output()).splitlines()[-1:]
            raise BenchError(f"{self.name} failed ({self.code}): {' '.join(last)}")
        return self.cpu

    def _reap(self, pid: int) -> None:
        _, status, usage = os.wait4(pid, 0)
        self.cpu += usage.ru_utime + usage.ru_stime
        if pid == self.pid:
            self.code = self._popen.returncode = os.waitstatus_to_exitcode(status)

    def _adopt(self, patience: float) -> None:
        """Reap the descendants that outlive it; kill those that do not end soon."""
        while orphans := _children_in(self.pid):
            for pid in orphans:
                if not _ended(pid, patience):
                    os.kill(pid, signal.SIGKILL)
                self._reap(pid)

    def kill(self) -> None:
        """End it and its descendants, politely at first. Idempotent."""
        if self.code is not None:
            return
        os.kill(self.pid, signal.SIGCONT)
        os.kill(self.pid, signal.SIGTERM)
        if not _ended(self.pid, 5.0):
            os.kill(self.pid, signal.SIGKILL)
        self._reap(self.pid)
        self._adopt(1.0)


def _ended(pid: int, seconds: float) -> bool:
    """Wait for a child of ours to become a zombie."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def _children_in(session: int) -> list[int]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(child.pid) == session:
                found.append(child.pid)
    return found


def _session_members(sessions: set[int]) -> dict[int, int]:
    """pid -> session, of all processes in `sessions`."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                session = os.getsid(int(entry))
                if session in sessions:
                    found[int(entry)] = session
    return found


def members(child: Child) -> list[int]:
    """Processes of its session that still run."""
    found = []
    for pid in _session_members({child.pid}):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _own_memory(pid: int) -> int:
    """Anonymous memory of a process, bytes: guest memory in shared files is not its own."""
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


class PeakMemory:
    """Watches sides of a migration: most anonymous memory that all processes of one had at once.

    Samples twenty times a second, so a shorter peak is missed.
    """

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self._sides: dict[int, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def watch(self, side: str, child: Child) -> None:
        self._sides[child.pid] = side

    def _watch(self) -> None:
        turn, known, members = 0, 0, dict[int, int]()
        while not self._end.wait(_SAMPLE_SECONDS):
            sides = self._sides.copy()
            if turn % _LOOK_AROUND == 0 or known != len(sides):
                members = _session_members(set(sides))
                known = len(sides)
            turn += 1
            sums: dict[str, int] = {}
            for pid, session in members.items():
                side = sides[session]
                sums[side] = sums.get(side, 0) + _own_memory(pid)
            for side, total in sums.items():
                self.peak[side] = max(self.peak.get(side, 0), total)


class Lab:
    """The files and processes of one benchmark. A context manager: leaves nothing behind."""

    def __init__(self, pageferry: list[str], isolated: bool) -> None:
        self.pageferry = pageferry
        self.isolated = isolated
        self.directory = ""
        self._children: list[Child] = []
        self._files: list[str] = []
        self._started = 0
        self._notes: dict[str, str] = {}
        if sys.dont_write_bytecode:
            self.note("modules", "compiled anew by each process: PYTHONDONTWRITEBYTECODE is set")

    def __enter__(self) -> Lab:
        if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise BenchError("the kernel does not let this process adopt orphans")
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupted)
        self.directory = tempfile.mkdtemp(prefix=PREFIX)
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            for child in self._children:
                # gone already if the interruption came between its end and our noting it
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    child.kill()
            for process in psutil.Process().children():
                # started, or adopted, and not yet noted
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait(5)
            for path in self._files:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            shutil.rmtree(self.directory, ignore_errors=True)

    def path(self, name: str, directory: str = SHARED_MEMORY) -> str:
        """A path for a file called `name`, removed at the end if it is there."""
        path = os.path.join(directory, f"{PREFIX}{os.getpid()}-{name}")
        if path not in self._files:
            self._files.append(path)
        return path

    def start(
        self, argv: list[str],
        stdin: int | IO[bytes] | None = None, stdout: int | IO[bytes] | None = None,
    ) -> Child:  # fmt: skip
        """Start a process; it ends with the lab if it does not before."""
        self._started += 1
        try:
            child = Child(argv, self.directory, self._started, stdin, stdout)
        except OSError as e:
            raise BenchError(f"cannot run {argv[0]}: {e.strerror}") from e
        self._children = [c for c in self._children if c.code is None]
        self._children.append(child)
        return child

    def note(self, key: str, value: str) -> None:
        """Something about this host that the reader of the numbers should know."""
        self._notes[key] = value

    def describe(self) -> dict[str, Any]:
        """The host and the versions."""
        traffic = "own loopback interface" if self.isolated else "loopback, shared with others"
        return {
            "pageferry": f"{__version__} ({' '.join(self.pageferry)})",
            "host": f"Linux {platform.release()}, {len(os.sched_getaffinity(0))} CPUs, "
            f"{psutil.virtual_memory().total >> 20} MiB, Python {platform.python_version()}",
            "traffic": traffic,
            **self._notes,
        }


def say(text: str) -> None:
    """Progress, for a person who waits."""
    os.write(2, f"{text}\n".encode())


def remove(path: str) -> None:
    """Delete a file, if it is there, so that the next one begins with fresh memory."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def huge_pages(needed: int) -> Iterator[None]:
    """At least `needed` free huge pages of 2 MiB; afterwards as many as before. BenchError if
    they cannot be had."""
    before = int(_huge("nr"))
    missing = needed - (int(_huge("free")) - int(_huge("resv")))
    try:
        if missing > 0:
            _set_huge_pages(before + missing)
            if (got := int(_huge("nr"))) < before + missing:
                raise BenchError(f"no huge pages of 2 MiB: {got - before} of {missing} to be had")
        yield
    finally:
        if missing > 0:
            with undisturbed(), contextlib.suppress(BenchError):
                _set_huge_pages(before)


def _huge(name: str) -> str:
    try:
        with open(f"{_HUGE_PAGES}/{name}_hugepages") as f:
            return f.read()
    except OSError as e:
        raise BenchError(f"no huge pages of 2 MiB: {e.strerror}") from e


def _set_huge_pages(count: int) -> None:
    try:
        with open(f"{_HUGE_PAGES}/nr_hugepages", "w") as f:
            f.write(str(count))
    except OSError as e:
        raise BenchError(f"no huge pages of 2 MiB: cannot set their number: {e.strerror}") from e


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not keep the first one from cleaning up."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
