"""Hosts that only a bridge joins, each a network namespace with a directory of its own at a path
that all of them have; a dask scheduler at one, workers at others."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import GIVE_UP, Running, until

CARD = "eth0"
NET = "10.213.77"
PORT = 8786
SCHEDULER = f"tcp://{NET}.1:{PORT}"


def ip(*arguments):
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return ran.stdout


class Host:
    """`name`: as manifests call it; `own`: its directory as everybody here sees it; `images`: the
    same, as it sees it itself."""

    def __init__(self, number, name, folder):
        self.name, self.address = name, f"{NET}.{number}"
        self.namespace = f"pageferry-{os.getpid()}-{name}"
        self.own = folder / name
        self.own.mkdir()
        self.images = folder / "images"
        # ip netns exec gives it a mount namespace of its own too
        script = f'mount --bind {self.own} {self.images} && exec "$@"'
        self.within = ("ip", "netns", "exec", self.namespace, "sh", "-ec", script, "sh")

    def carried(self):
        """Bytes that have left or reached it."""
        (card,) = json.loads(ip("-n", self.namespace, "-j", "-s", "link", "show", "dev", CARD))
        return sum(card["stats64"][way]["bytes"] for way in ("tx", "rx"))

    def run(self, *arguments):
        """pageferry at this host, to its end."""
        with Running(*arguments, within=self.within) as running:
            code, out, err = running.finish()
        return subprocess.CompletedProcess(arguments, code, out, err)


class Process:
    """Something of dask's at a host; what it says goes to a file."""

    def __init__(self, host, command, log):
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen([*host.within, *command], stdout=out, stderr=out)

    @property
    def pid(self):
        return self.process.pid

    def said(self, text):
        until(lambda: text in self.log.read_text(), f"{self.log.name}: {text}")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def terminate(self):
        """A nanny ends its worker first."""
        self.process.terminate()
        self.process.wait(GIVE_UP)


class Cluster:
    """Hosts by their names, a scheduler at the first of them, and workers as they are started."""

    def __init__(self, stack, folder, names):
        (folder / "images").mkdir()
        self._stack, self._folder, self._count = stack, folder, 0
        self.hosts = {name: Host(n, name, folder) for n, name in enumerate(names, 1)}
        self._join()
        self.first = next(iter(self.hosts.values()))
        self.scheduler = self.start_scheduler()

    def __getitem__(self, name):
        return self.hosts[name]

    def _join(self):
        switch = f"pageferry-{os.getpid()}-switch"
        for name in (switch, *(host.namespace for host in self.hosts.values())):
            ip("netns", "add", name)
            self._stack.callback(ip, "netns", "delete", name)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for name, host in self.hosts.items():
            ip("link", "add", CARD, "netns", host.namespace, "type", "veth",
               "peer", "name", name, "netns", switch)  # fmt: skip
            ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", host.namespace, "link", "set", card, "up")

    def _start(self, host, name, *command):
        self._count += 1
        log = self._folder / f"{self._count}-{name}.log"
        process = Process(host, command, log)
        self._stack.callback(process.kill)
        return process

    def start_scheduler(self, port=PORT):
        return self._start(
            self.first, "scheduler", sys.executable, "-m", "dask", "scheduler", "--host",
            self.first.address, "--port", str(port), "--no-dashboard", "--no-jupyter",
            "--no-show",
        )  # fmt: skip

    def start_worker(self, name, *more, at="", scheduler=SCHEDULER):
        """Of a host that manifests call `name`; at that host, unless it is `at` another. Not there
        yet: see `there`."""
        host = self.hosts[at or name]
        return self._start(
            host, f"worker-{name}", sys.executable, "-m", "pageferry", "fleet-worker", name,
            scheduler, "--local-directory", str(self._folder / "dask"), *more,
        )  # fmt: skip

    def start_plain_worker(self, name):
        """As dask itself starts one, with a nanny."""
        worker = self._start(
            self.hosts[name], f"worker-{name}", sys.executable, "-m", "dask", "worker", SCHEDULER,
            "--resources", f"pageferry-{name}=8", "--nthreads", "4", "--no-dashboard",
            "--local-directory", str(self._folder / "dask"),
        )  # fmt: skip
        self._stack.callback(worker.terminate)
        return worker

    @staticmethod
    def there(*workers):
        for worker in workers:
            worker.said("Registered to:")


@contextlib.contextmanager
def cluster(folder, names):
    """Skips, with the reason, where there can be none."""
    if not shutil.which("ip"):
        pytest.skip("ip (iproute2) is not installed")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    with contextlib.ExitStack() as stack:
        try:
            found = Cluster(stack, folder, names)
        except subprocess.CalledProcessError as e:
            pytest.skip(f"no network namespaces here: {e.stderr.strip()}")
        yield found
