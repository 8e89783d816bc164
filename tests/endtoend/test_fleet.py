"""A batch over several hosts: a real dask scheduler and workers, each host a network namespace with
files of its own. One cluster for all tests here; workers that are killed are started for it."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from fleet_hosts import NET, SCHEDULER, cluster
from helpers import PAGE, Running, command, receiver, same_file, until

from pageferry.pipeline.batch_state import look
from pageferry.transport.keys import KeyDirectory

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="dask is not installed: pip install 'pageferry[fleet]'",
)
PAGES = 256
SLOWLY = {"max-bandwidth": "500kB", "batch-pages": 16, "codec": "none", "workers": 1}
TO = f"tcp://{NET}.4:4444"
OTHER_PORT = 8790
OTHER = f"tcp://{NET}.1:{OTHER_PORT}"
# Workers at kvm1 that something happens to, each of a host that is called so.
SPARES = ("killed", "silent", "doubtful", "doubted")


_SHORT = """
import sys
import pageferry.pipeline.fleet as fleet
from pageferry.tools.cli.main import main
# of bounds, to be quick
fleet.NO_WORKER_SECONDS, fleet.CONNECT_SECONDS, fleet.SILENT_SECONDS = 0.1, 0.5, 0.5
main()
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The first has the scheduler and is where batches are started; kvm3 receives."""
    with cluster(tmp_path_factory.mktemp("fleet"), ("boss", "kvm1", "kvm2", "kvm3")) as found:
        found.workers = {name: found.start_worker(name, at="kvm1") for name in ("kvm1", *SPARES)}
        found.workers["kvm2"] = found.start_plain_worker("kvm2")
        found.other = found.start_scheduler(OTHER_PORT)
        found.workers["other"] = found.start_worker("kvm1", scheduler=OTHER)
        found.there(*found.workers.values())
        yield found


@pytest.fixture
def files(hosts):
    """A 1 MiB image at both sources, of another content at each, and places for what arrives."""
    for number, name in enumerate(("boss", "kvm1", "kvm2")):
        content = random.Random(number).randbytes(PAGES * PAGE)
        (hosts[name].own / "vm.mem").write_bytes(content)
    yield hosts.first.images
    for host in hosts.hosts.values():
        for path in host.own.iterdir():
            path.unlink()


def item(files, name, **more):
    return {"name": name, "source": f"image:{files}/vm.mem", "destination": TO} | more


@pytest.fixture
def batch(hosts, tmp_path):
    """Writes a manifest; the command line that runs it."""

    def write(*items, **top):
        path = tmp_path / "m.json"
        top = {"defaults": {"workers": 1, "insecure": True}, "backoff": "10ms"} | top
        path.write_text(json.dumps(top | {"items": items}))
        return ("batch", str(path), "--fleet", SCHEDULER, "--state", str(tmp_path / "state"))

    return write


def arriving(hosts):
    """kvm3 takes images."""
    there = hosts["kvm3"]
    return receiver(
        "--into", f"image:{there.images}/", "--insecure", listen=TO, within=there.within
    )


def resume(hosts, tmp_path, *more):
    return hosts.first.run("batch", "resume", "--state", str(tmp_path / "state"), "--json", *more)


def rows(tmp_path):
    return {row.item.name: row for row in look(str(tmp_path / "state")).rows}


def test_with_keys(hosts, files, batch, tmp_path):
    """Each source has the keys of its own host, at the path that the manifest names; one that the
    receiver does not list moves nothing."""
    folders = {name: hosts[name].own / "keys" for name in ("kvm1", "kvm2", "kvm3")}
    keys = {name: KeyDirectory.create(str(folder)) for name, folder in folders.items()}
    try:
        for name in ("kvm1", "kvm2"):
            keys[name].allow(keys["kvm3"].public, f"{NET}.4")
        keys["kvm3"].allow(keys["kvm1"].public)
        there = receiver(
            "--into", f"image:{files}/", "--keys", f"{files}/keys", listen=TO,
            within=hosts["kvm3"].within,
        )  # fmt: skip
        with there:
            done = hosts.first.run(*batch(
                *(item(files, name, host=name) for name in ("kvm1", "kvm2")),
                defaults={"workers": 1, "keys": f"{files}/keys"}, retries=0,
            ))  # fmt: skip
        assert done.returncode == 15, done.stderr
        assert "does not know our key" in done.stderr
        assert same_file(hosts["kvm1"].own / "vm.mem", hosts["kvm3"].own / "kvm1")
        assert not (hosts["kvm3"].own / "kvm2").exists()
    finally:
        for folder in folders.values():
            shutil.rmtree(folder)


def test_each_from_its_host(hosts, files, batch, tmp_path):
    """Host to host, within a host, from here, and a guest; the scheduler's host carries nothing but
    what it has itself. To go on with what is complete needs no fleet."""
    guest = {"name": "guest", "host": "kvm1", "source": "demo:?size=4M&rate=500",
             "destination": f"tcp://{NET}.4:4445"}  # fmt: skip
    away = receiver(
        "--once", "--insecure", listen=f"tcp://{NET}.4:4445", within=hosts["kvm3"].within
    )
    with arriving(hosts) as there, away as guests:
        before = hosts["boss"].carried()
        done = hosts.first.run(*batch(
            *(item(files, f"{name}-{n}", host=name) for name in ("kvm1", "kvm2") for n in (1, 2)),
            item(files, "within", host="kvm2", destination=f"image:{files}/copy.mem"),
            item(files, "here"),
            guest, parallel=7, hosts={"kvm1": {"max-bandwidth": "20MB"}},
        ), "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert hosts["boss"].carried() - before < 1.5 * PAGES * PAGE  # of four images
        code, out, _ = guests.finish()
        there.process.send_signal(signal.SIGTERM)
        assert there.finish()[0] == 130
    report = json.loads(done.stdout)
    found = {told["name"]: told for told in report["items"]}
    assert all(told["attempts"] == 1 for told in found.values())
    for name in ("kvm1", "kvm2"):
        for n in (1, 2):
            assert same_file(hosts[name].own / "vm.mem", hosts["kvm3"].own / f"{name}-{n}")
            assert found[f"{name}-{n}"]["report"]["source-host"] == name
    assert same_file(hosts["kvm2"].own / "vm.mem", hosts["kvm2"].own / "copy.mem")
    assert same_file(hosts["boss"].own / "vm.mem", hosts["kvm3"].own / "here")
    assert "source-host" not in found["here"]["report"]
    assert resume(hosts, tmp_path).returncode == 0
    # it arrived once, whole, and writes there
    (arrived,) = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and arrived["status"] == "completed" and arrived["oracle"]["ok"]


def test_a_killed_worker(hosts, files, batch):
    """Its item is retried at the other host that has the image. Its source ends with it."""
    spare = hosts.workers["killed"]
    with arriving(hosts), Running(
        *batch(item(files, "vm", host=["killed", "kvm2"], retries=1, **SLOWLY)), "--json",
        within=hosts.first.within,
    ) as running:  # fmt: skip
        running.error_line("vm: started")
        part = hosts["kvm3"].own / ".vm.pageferry-part"
        until(lambda: part.exists() and part.stat().st_blocks, "some of it is there")
        (source,) = psutil.Process(spare.pid).children()
        spare.kill()
        assert "lost" in running.error_line("vm: failed")
        until(lambda: not source.is_running(), "its source ends")
        running.error_line("vm: started again")
        code, out, err = running.finish()
    assert code == 0, err
    (told,) = json.loads(out)["items"]
    assert (told["attempts"], told["report"]["source-host"]) == (2, "kvm2")
    assert same_file(hosts["kvm2"].own / "vm.mem", hosts["kvm3"].own / "vm")


def test_a_silent_worker(hosts, files, batch):
    """It is there and says nothing: the other host is tried, and sends what is missing when the
    first source, that nobody can cancel, is through."""
    spare = hosts.workers["silent"]
    line = batch(item(files, "vm", host=["silent", "kvm2"], retries=100, **SLOWLY))
    with arriving(hosts), subprocess.Popen(
        [*hosts.first.within, sys.executable, "-c", _SHORT, *line, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        part = hosts["kvm3"].own / ".vm.pageferry-part"
        until(lambda: part.exists() and part.stat().st_blocks, "some of it is there")
        spare.process.send_signal(signal.SIGSTOP)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 0, err
    assert "vm: failed: the worker of silent" in err and "nothing was heard of it for" in err
    (told,) = json.loads(out)["items"]
    assert told["attempts"] > 1 and told["report"]["source-host"] == "kvm2"
    spare.kill()


def test_dask_runs_nothing_again(hosts, files, batch):
    """A worker that comes back at its old address is given the task anew by dask. The batch, which
    could not look meanwhile, does not let that begin; it decides itself, and has no retries."""
    port = ("--worker-port", "41000")
    spare = hosts.start_worker("spare", *port, at="kvm1")
    hosts.there(spare)
    with arriving(hosts) as there, Running(
        *batch(item(files, "vm", host="spare", retries=0, **SLOWLY)), "--json",
        within=hosts.first.within,
    ) as running:  # fmt: skip
        part = hosts["kvm3"].own / ".vm.pageferry-part"
        until(lambda: part.exists() and part.stat().st_blocks, "some of it is there")
        running.process.send_signal(signal.SIGSTOP)
        spare.kill()
        assert json.loads(there.line())["error"]["class"] in ("Cancelled", "PeerLost")
        spare = hosts.start_worker("spare", *port, at="kvm1")
        hosts.there(spare)
        running.process.send_signal(signal.SIGCONT)
        code, out, _ = running.finish()
        assert code == 16
        assert not psutil.Process(spare.pid).children()
        there.process.send_signal(signal.SIGTERM)
        assert "vm" not in there.finish()[1]  # nothing came a second time
    (told,) = json.loads(out)["items"]
    assert told["attempts"] == 1 and "was started anew" in told["error"]["message"]
    spare.kill()


_AT_THE_HANDOVER = """
import os, signal, sys
import pageferry.tools.cli.batch
from pageferry.pipeline.batch_state import BatchState
from pageferry.tools.cli.main import main

class Disturbed(BatchState):
    def switching(self, number):
        super().switching(number)
        os.kill(int(os.environ["WORKER"]), int(os.environ["SIGNAL"]))
        for _ in range(int(os.environ["INTERRUPTS"])):
            os.kill(os.getpid(), signal.SIGINT)

pageferry.tools.cli.batch.BatchState = Disturbed
main()
"""


@pytest.mark.parametrize(
    ("name", "number", "interrupts", "code"),
    [("doubtful", signal.SIGKILL, 0, 16), ("doubted", signal.SIGSTOP, 2, 130)],
)
def test_a_guest_that_had_leave_to_go(hosts, batch, tmp_path, name, number, interrupts, code):
    """Its worker is killed just then; or says nothing, and nobody waits. Whether it went is not
    known: it is not sent again by itself."""
    spare = hosts.workers[name]
    guest = {"name": "guest", "host": name, "source": "demo:?size=4M",
             "destination": f"tcp://{NET}.4:4445"}  # fmt: skip
    with receiver("--insecure", listen=f"tcp://{NET}.4:4445", within=hosts["kvm3"].within):
        done = subprocess.run(
            [*hosts.first.within, sys.executable, "-c", _AT_THE_HANDOVER, *batch(guest)],
            env=os.environ | {"WORKER": str(spare.pid), "SIGNAL": str(int(number)),
                              "INTERRUPTS": str(interrupts)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        family = psutil.Process(spare.pid).children(recursive=True)
        spare.kill()
        psutil.wait_procs(family, 30)
        assert done.returncode == code, done.stderr
        assert "it may run at its destination" in done.stdout
        done = resume(hosts, tmp_path, "--retry-failed")
        assert done.returncode == 16 and "started" not in done.stderr
    assert rows(tmp_path)["guest"].attempts == 1


def test_interrupted(hosts, files, batch, tmp_path):
    """What runs elsewhere is cancelled there, and goes on later."""
    items = [item(files, name, host=name, **SLOWLY) for name in ("kvm1", "kvm2")]
    with arriving(hosts):
        with Running(*batch(*items), within=hosts.first.within) as running:
            for name in ("kvm1", "kvm2"):
                part = hosts["kvm3"].own / f".{name}.pageferry-part"
                until(part.exists, "it has begun")
            (source,) = psutil.Process(hosts.workers["kvm1"].pid).children()
            source.terminate()  # by somebody else: it is tried again
            assert "cancelled it" in running.error_line("kvm1: failed")
            running.error_line("kvm1: started again")
            running.process.send_signal(signal.SIGINT)
            code, _, err = running.finish()
        assert code == 130 and "goes on" in err
        assert {row.state.value for row in rows(tmp_path).values()} == {"pending"}
        done = resume(hosts, tmp_path)
        assert done.returncode == 2 and "say --fleet" in done.stderr
        done = resume(hosts, tmp_path, "--fleet", SCHEDULER)
        assert done.returncode == 0, done.stderr
    for name in ("kvm1", "kvm2"):
        assert same_file(hosts[name].own / "vm.mem", hosts["kvm3"].own / name)


def test_the_scheduler_goes_away(hosts, files, batch, tmp_path):
    """The batch ends, with a clear error, and goes on with another one."""
    line = batch(item(files, "vm", host="kvm1", **SLOWLY))
    with arriving(hosts):
        with Running(*(OTHER if word == SCHEDULER else word for word in line),
                     within=hosts.first.within) as running:  # fmt: skip
            part = hosts["kvm3"].own / ".vm.pageferry-part"
            until(part.exists, "it has begun")
            hosts.other.kill()
            code, _, err = running.finish()
        assert code == 7
        assert f"the dask scheduler at {OTHER} has gone" in err.splitlines()[-1]
        assert "batch resume --state" in err.splitlines()[-1]
        assert "Traceback" not in err
        assert rows(tmp_path)["vm"].state.value == "pending"
        done = resume(hosts, tmp_path, "--fleet", SCHEDULER)
        assert done.returncode == 0, done.stderr
    assert same_file(hosts["kvm1"].own / "vm.mem", hosts["kvm3"].own / "vm")


@pytest.mark.parametrize(
    ("scheduler", "code", "text"),
    [
        (SCHEDULER, 16, "no dask worker of kvm9 is there: start `pageferry fleet-worker kvm9 tcp:"),
        ("nonsense://x", 5, "no dask scheduler answers at nonsense://x"),
    ],
)  # fmt: skip
def test_nobody_is_there(hosts, files, batch, scheduler, code, text):
    line = batch(item(files, "vm", host="kvm9", retries=0))
    done = subprocess.run(
        [*hosts.first.within, sys.executable, "-c", _SHORT,
         *(scheduler if word == SCHEDULER else word for word in line)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_fleet_for_nobody(tmp_path):
    (tmp_path / "a.mem").write_bytes(b"x")
    done = subprocess.run(
        command("batch", str(tmp_path / "a.mem"), "ipc://@x", "--fleet", SCHEDULER),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "none does" in done.stderr
