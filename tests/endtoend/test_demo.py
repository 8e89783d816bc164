"""The demo guest writes while it moves; the oracle of QEMU's migration tests finds every lost
or torn page."""

import asyncio
import json
import os

import pytest
from helpers import Running, receiver
from helpers import pageferry as run

import pageferry
from pageferry.pipeline import api
from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.source import Source
from pageferry.transport.errors import Cancelled, NotConverging
from pageferry.transport.links import Endpoint
from pageferry.workers.guests import open_source, parse_guest


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "auto"])
@pytest.mark.parametrize("content", ["zero", "text", "random"])
def test_goes_on_at_the_destination(content, codec):
    report = pageferry.migrate(
        f"demo:?size=64M&rate=20000&content={content}", "demo:", codec=codec, verify=True
    )
    assert report["oracle"]["ok"]
    assert report["oracle"]["wrong-pages"] == 0
    assert report["oracle"]["ran-on"] > 0
    assert report["ram"]["dirty-sync-count"] >= 2
    assert report["dirty-tracking"] in ("pagemap-scan", "content-hash")


@pytest.mark.parametrize("workers", [1, 4])
def test_workers(workers):
    report = pageferry.migrate(
        "demo:?size=64M&rate=0&content=text", "demo:", workers=workers, downtime_limit=2.0
    )
    assert report["oracle"]["ok"]


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "ipc"])
def test_two_hosts(listen, tmp_path):
    where = f"ipc://{tmp_path}/c" if listen == "ipc" else listen
    with receiver("--into", "demo:", "--once", listen=where) as there:
        sent = run("send", "demo:?size=64M", there.endpoint, "--json")
        assert sent.returncode == 0, sent.stderr
        code, out, err = there.finish()
    assert code == 0, err
    assert json.loads(sent.stdout)["status"] == "completed"
    assert json.loads(out)["oracle"]["ok"]


def test_too_fast_a_guest_is_reported_and_goes_on():
    """Above the link's rate: an error with the figures after max-rounds, the source runs."""
    guest = open_source(parse_guest("demo:?size=64M&rate=0"))
    try:
        with pytest.raises(NotConverging, match="raise --downtime-limit") as caught:
            asyncio.run(
                _into_nowhere(guest, max_bandwidth=50_000_000, max_rounds=2, downtime_limit=0.05)
            )
        data = caught.value.data
        assert data["rounds"] == 2
        assert data["dirty_rate"] > 0
        assert data["remaining"] > 0
        before = guest.verdict().ran_on
        guest.resume()
        verdict = guest.verdict()
        assert verdict.ok
        assert verdict.ran_on >= before
    finally:
        guest.close()


async def _into_nowhere(guest, cancel_in=None, **parameters):
    """Migrate to a receiver of our own, cancelling when the state `cancel_in` is reached."""
    import os
    import tempfile

    from pageferry.pipeline.destination import Destination

    directory = tempfile.mkdtemp()
    endpoint = Endpoint("ipc", path=os.path.join(directory, "c"))
    listening = Destination(endpoint, api.opener(parse_guest("demo:")))
    arriving = asyncio.ensure_future(api.receive_one(listening))
    source = Source(guest, endpoint, Parameters(**parameters).checked())

    def on_event(name, data):
        if name == "MIGRATION" and data["status"] == cancel_in:
            source.cancel()

    source.on_event = on_event
    try:
        return await source.run()
    finally:
        if listening.arrival is None:
            arriving.cancel()
        await asyncio.gather(arriving, return_exceptions=True)
        listening.close()
        os.rmdir(directory)


@pytest.mark.parametrize("state", ["setup", "active", "device"])
def test_cancel_in_each_state_leaves_the_source_running(state):
    guest = open_source(parse_guest("demo:?size=64M&content=text"))
    try:
        with pytest.raises(Cancelled):
            asyncio.run(_into_nowhere(guest, cancel_in=state))
        first = guest.verdict()
        guest.resume()
        assert first.ok
        # it can be migrated all the same afterwards
        report = asyncio.run(_into_nowhere(guest))
        assert report["status"] == "completed"
    finally:
        guest.close()


def test_there_and_back(tmp_path):
    """The guest that arrived is the one that left: its registers say so."""
    seed = 77
    report = pageferry.migrate(f"demo:?size=16M&seed={seed}&rate=100000", "demo:")
    oracle = report["oracle"]
    assert oracle["ok"]
    assert oracle["position"] + oracle["passes"] * oracle["pages"] >= oracle["ran-on"]


def test_interrupt_cancels_cleanly():
    """Ctrl-C, which a terminal sends to all processes: exit code 130, no process says anything of
    its own, nothing left (the leak check looks)."""
    import signal

    arguments = ("copy", "demo:?size=256M&rate=0", "demo:", "--max-bandwidth", "20MB")
    with Running(*arguments, within=("setsid",)) as running:
        running.error_line("round 1")
        os.killpg(running.process.pid, signal.SIGINT)
        code, _, err = running.finish()
    assert code == 130
    assert "cancelled; the source is as it was" in err
    assert "Traceback" not in err
