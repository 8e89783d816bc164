"""What a person without a migration tool would do: pipes over socat, and rsync.

Each method moves one file to another over TCP on the loopback interface. Only standard
programs, no shell, so that each process is known by its id. Knows no other method.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass

from .lab import Child, Lab, PeakMemory, free_port, listens, loopback_bytes, wait_for

_BLOCK = "1048576"  # socat's own default of 8 KiB is three times slower


@dataclass
class Moved:
    """One transfer. Seconds and bytes; `cpu` and `peak` by side."""

    wall: float
    wire: int
    cpu: dict[str, float]
    peak: dict[str, int]


@dataclass(frozen=True)
class Pipe:
    """`pack` SOURCE | socat …, and socat … | `unpack` at the destination."""

    pack: tuple[str, ...]
    unpack: tuple[str, ...] = ()

    def missing(self) -> str:
        lacking = [p for p in ("socat", self.pack[0]) if shutil.which(p) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else ""

    def move(self, lab: Lab, source: str, destination: str) -> Moved:
        """Into `destination` as it is: it is not truncated."""
        port = free_port()
        listen = ["socat", "-u", "-b", _BLOCK, f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr", "-"]
        connect = ["socat", "-u", "-b", _BLOCK, "-", f"TCP:127.0.0.1:{port}"]
        out = os.open(destination, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with PeakMemory() as memory:
                receiving = self._receive(lab, listen, out)
                wait_for("socat to listen", lambda: listens(port) or _failed(receiving))
                before, begin = loopback_bytes(), time.monotonic()
                sending = _chain(lab, [[*self.pack, source], connect], None)
                for side, children in (("source", sending), ("destination", receiving)):
                    for child in children:
                        memory.watch(side, child)
                cpu = {"source": sum(child.join() for child in sending)}
                cpu["destination"] = sum(child.join() for child in receiving)
                wall = time.monotonic() - begin
                wire = loopback_bytes() - before
        finally:
            os.close(out)
        return Moved(wall, wire, cpu, memory.peak)

    def _receive(self, lab: Lab, listen: list[str], out: int) -> list[Child]:
        return _chain(lab, [listen, list(self.unpack)] if self.unpack else [listen], out)


def _chain(lab: Lab, commands: list[list[str]], out: int | None) -> list[Child]:
    """A pipeline; its last process writes to `out`."""
    children: list[Child] = []
    ends: tuple[int, int] | None = None
    for i, argv in enumerate(commands):
        stdin = ends[0] if ends is not None else None
        last = i == len(commands) - 1
        following = None if last else os.pipe2(os.O_CLOEXEC)
        try:
            children.append(lab.start(argv, stdin, out if following is None else following[1]))
        finally:
            if stdin is not None:
                os.close(stdin)
            if following is not None:
                os.close(following[1])
        ends = following
    return children


def _failed(children: list[Child]) -> bool:
    for child in children:
        if not child.running():
            child.join()
    return False


def rsync_daemon(lab: Lab, directory: str) -> tuple[Child, str]:
    """A daemon that listens and writes into `directory`, and the address of that."""
    port = free_port()
    configuration = os.path.join(lab.directory, "rsyncd.conf")
    with open(configuration, "w") as f:
        f.write(f"address = 127.0.0.1\nport = {port}\nuse chroot = no\nreverse lookup = no\n")
        if os.geteuid() == 0:
            f.write("uid = 0\ngid = 0\n")
        f.write(f"[there]\npath = {directory}\nread only = no\n")
    daemon = lab.start(["rsync", "--daemon", "--no-detach", f"--config={configuration}"])
    try:
        wait_for("rsync to listen", lambda: listens(port) or _failed([daemon]))
    except BaseException:
        daemon.kill()
        raise
    return daemon, f"rsync://127.0.0.1:{port}/there/"


@dataclass(frozen=True)
class Rsync:
    """rsync to an rsync daemon: the whole file, written in place."""

    def missing(self) -> str:
        return "" if shutil.which("rsync") is not None else "not installed: rsync"

    def move(self, lab: Lab, source: str, destination: str) -> Moved:
        directory, name = os.path.split(destination)
        daemon, where = rsync_daemon(lab, directory)
        try:
            with PeakMemory() as memory:
                before, begin = loopback_bytes(), time.monotonic()
                sending = lab.start(
                    ["rsync", "--whole-file", "--inplace", "--ignore-times",
                     source, f"{where}{name}"]
                )  # fmt: skip
                memory.watch("destination", daemon)
                memory.watch("source", sending)
                cpu = {"source": sending.join()}
                wall = time.monotonic() - begin
                wire = loopback_bytes() - before
        finally:
            daemon.kill()
        return Moved(wall, wire, cpu | {"destination": daemon.cpu}, memory.peak)


PIPES = {
    "cat | socat": Pipe(("cat",)),
    "zstd -T2 -1 | socat": Pipe(("zstd", "-q", "-T2", "-1", "-c"), ("zstd", "-q", "-d", "-c")),
    "lz4 -1 | socat": Pipe(("lz4", "-q", "-1", "-c"), ("lz4", "-q", "-d", "-c")),
}
