"""What the two ends of a cell run on: processes that can be talked to, two hosts on a switch, a
small disk, memory that is bounded. Everything is gone afterwards."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pageferry.workers.kernel.freezer import cgroup_of

HERE = Path(__file__).parent
_GROUPS = Path("/sys/fs/cgroup")


class Missing(Exception):
    """This host lacks what a cell needs."""


# ---- processes --------------------------------------------------------------------------


class Nursery:
    """The process that ends are forked off (ends.py)."""

    def __init__(self):
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        quiet = {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::UserWarning"}
        # numpy's linear algebra is not used, and its threads would be there at every fork; resource
        # trackers warn of what those who were killed have left
        self.process = subprocess.Popen(
            [sys.executable, HERE / "ends.py", str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env=os.environ | quiet, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._snapshots, self._saving = {}, asyncio.Lock()

    async def snapshot(self, guest):
        """One of such a guest: made once of each kind."""
        async with self._saving:
            kind = guest.partition(":")[0]
            if kind not in self._snapshots:
                self._snapshots[kind] = await self._save(guest)
            return self._snapshots[kind]

    async def _save(self, guest):
        with tempfile.TemporaryDirectory(prefix="pf-torture-") as folder:
            path = f"{folder}/a.snapshot"
            spec = {"end": "saving", "guest": guest, "into": f"file:{path}", "live": False,
                    "workers": 1}  # fmt: skip
            end = await End.start(self, spec)
            try:
                ended = await end.until(lambda: end.ended, "its end")
                assert not ended["error"], ended
                end.tell("quit")
                await end.heard("left")
            finally:
                await end.close()
            return Path(path).read_bytes()

    def fork(self, spec):
        """An end that does what `spec` says: its pid, and a socket to it."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self._orders, [json.dumps(spec).encode()], [theirs.fileno()])
        theirs.close()
        return int(self._orders.recv(64)), ours

    def close(self):
        self._orders.close()
        self.process.wait(20)


class Gone(Exception):
    """An end that is waited for has ended."""


class End:
    """One end: what it has said, and what it is told."""

    def __init__(self, name, pid):
        self.name, self.pid = name, pid
        self.said = []
        self.server = 0
        self.gone = False
        self.family = {}  # pid -> psutil.Process, of all that were seen
        self._more = asyncio.Event()

    @classmethod
    async def start(cls, nursery, spec):
        pid, sock = nursery.fork(spec)
        self = cls(spec["end"], pid)
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        self._reading = asyncio.ensure_future(self._read())
        up = await self.heard("up")
        self.server = up["server"]
        return self

    async def _read(self):
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self.said.append(json.loads(line))
                self._more.set()
        self.gone = True
        self._more.set()

    def tell(self, what, **data):
        if not self.gone:
            self._writer.write(json.dumps({"what": what} | data).encode() + b"\n")

    def first(self, event, since=0, **like):
        """The first such event since a time, or None."""
        for said in self.said:
            if said["event"] == event and said["t"] >= since and like.items() <= said.items():
                return said
        return None

    async def heard(self, event, since=0, seconds=30.0, **like):
        """Wait for such an event."""
        return await self.until(
            lambda: self.first(event, since, **like), f"{event} {like}", seconds
        )

    async def until(self, condition, what, seconds=30.0):
        end = time.monotonic() + seconds
        while not (found := condition()):
            if self.gone:
                raise Gone(f"the {self.name} ended before: {what}")
            self._more.clear()
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the {self.name} never said: {what}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), left)
        return found

    @property
    def ended(self):
        return self.first("ended")

    @property
    def status(self):
        found = [said["status"] for said in self.said if said["event"] == "status"]
        return found[-1] if found else "none"

    def look(self):
        """Take note of all its processes that are there now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for child in (process, *process.children(recursive=True)):
                self.family.setdefault(child.pid, child)

    def find(self, name):
        """The process of that name (comm) among its own; 0 if there is none."""
        self.look()
        for pid in self.family:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith(name):
                    return pid
        return 0

    def alive(self):
        """Of its processes, those that have not ended."""
        found = []
        for process in self.family.values():
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    async def close(self):
        self.look()  # a cell that was left out has looked at none
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
                process.kill()
        self._writer.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


# ---- two hosts on a switch --------------------------------------------------------------


def _ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"no network namespaces here: {done.stderr.strip()}")


class Network:
    """Two network namespaces and a bridge between them that can be switched off: what is said
    then goes nowhere, and nobody is told."""

    def __init__(self, number):
        self.address = {"source": "10.99.0.1", "destination": "10.99.0.2"}
        stem = f"pageferry-{os.getpid()}-{number}"
        self.names = {end: f"{stem}-{end}" for end in self.address}
        self._switch = f"{stem}-switch"

    def __enter__(self):
        try:
            self._lay()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _lay(self):
        for name in (self._switch, *self.names.values()):
            _ip("netns", "add", name)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        self.join()
        for end, name in self.names.items():
            _ip("link", "add", "eth0", "netns", name, "type", "veth",
                "peer", "name", end[:8], "netns", self._switch)  # fmt: skip
            _ip("-n", self._switch, "link", "set", end[:8], "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address[end]}/24", "dev", "eth0")
            for card in ("lo", "eth0"):
                _ip("-n", name, "link", "set", card, "up")

    def cut(self):
        _ip("-n", self._switch, "link", "set", "bridge", "down")

    def join(self):
        _ip("-n", self._switch, "link", "set", "bridge", "up")

    def __exit__(self, *rest):
        for name in (self._switch, *self.names.values()):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


# ---- a small disk, memory that is bounded -----------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of `size` bytes, mounted at `folder`."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Missing(f"mounting a small tmpfs needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class MemoryGroup:
    """A cgroup whose memory can be bounded: v2, or v1 where the controller is there."""

    def __init__(self, number):
        name = f"pageferry-{os.getpid()}-{number}"
        own = cgroup_of(os.getpid())
        self._v2 = own is not None and "memory" in (own / "cgroup.controllers").read_text().split()
        self.folder = own / name if self._v2 and own else _GROUPS / "memory" / name

    def __enter__(self):
        try:
            if self._v2:
                (self.folder.parent / "cgroup.subtree_control").write_text("+memory")
            self.folder.mkdir()
        except OSError as e:
            raise Missing(f"no cgroup with memory of its own: {e.strerror}") from e
        return self

    def leave(self, more):
        """What is used now and `more` bytes are all there is."""
        used = "memory.current" if self._v2 else "memory.usage_in_bytes"
        self._limit(str(int((self.folder / used).read_text()) + more))

    def lift(self):
        """There is enough again."""
        self._limit("max" if self._v2 else "-1")

    def _limit(self, most):
        name = "memory.max" if self._v2 else "memory.limit_in_bytes"
        (self.folder / name).write_text(most)

    def __exit__(self, *rest):
        for _ in range(200):
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.01)
