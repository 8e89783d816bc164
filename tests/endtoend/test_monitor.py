"""The monitor, with the qemu.qmp package as its client."""

import asyncio
import json

import pytest
from helpers import Running, until, until_async
from helpers import pageferry as run
from qemu.qmp import ExecuteError, QMPClient

from pageferry.pipeline.monitor import serve_monitor


@pytest.fixture
def slow(tmp_path):
    """A migration that takes its time, with a monitor."""
    where = f"unix:{tmp_path}/mon"
    with Running(
        "copy",
        "demo:?size=128M&rate=0",
        "demo:",
        "--max-bandwidth",
        "10MB",
        "--monitor",
        where,
        "--json",
    ) as running:
        running.error_line("round 1")
        running.where, running.path = where, str(tmp_path / "mon")
        yield running


def test_a_qmp_client_follows_and_steers(slow):
    async def talk():
        client = QMPClient("test")
        await client.connect(slow.path)
        version = await client.execute("query-version")
        assert version["package"] == "pageferry"
        report = await client.execute("query-migrate")
        assert report["status"] == "active"
        assert report["ram"]["total"] == 128 << 20
        assert report["ram"]["dirty-sync-count"] == 1
        assert report["progress"]["eta"] is None or report["progress"]["eta"] > 0
        parameters = await client.execute("query-migrate-parameters")
        assert parameters["max-bandwidth"] == 10_000_000
        with pytest.raises(ExecuteError, match="cannot be set"):
            await client.execute("migrate-set-parameters", {"multifd-channels": 9})
        with pytest.raises(ExecuteError):
            await client.execute("no-such-command")
        await client.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 2000})
        assert (await client.execute("query-migrate-parameters"))["downtime-limit"] == 2000
        seen = []
        with client.listener(("MIGRATION", "MIGRATION_PASS")) as listener:
            async for event in listener:
                seen.append((event["event"], event["data"]))
                if event["data"].get("status") == "completed":
                    break
        await client.disconnect()
        return seen

    seen = asyncio.run(talk())
    assert ("MIGRATION", {"status": "device"}) in seen
    assert any(name == "MIGRATION_PASS" for name, _ in seen)
    code, out, _ = slow.finish()
    assert code == 0
    assert json.loads(out)["oracle"]["ok"]


def test_status_and_cancel_from_the_command_line(slow):
    shown = run("status", slow.where)
    assert shown.returncode == 0
    assert "left of 128.0 MiB" in shown.stdout
    raw = run("status", slow.where, "--json")
    assert json.loads(raw.stdout)["status"] == "active"
    wrong = run("set", slow.where, "max-bandwidth=fast")
    assert wrong.returncode == 2
    assert "10Gbit" in wrong.stderr
    assert run("cancel", slow.where).returncode == 0
    code, out, err = slow.finish()
    assert code == 130
    assert json.loads(out)["error"]["class"] == "Cancelled"
    assert "the source is as it was" in err


def test_nobody_there(tmp_path):
    done = run("status", f"unix:{tmp_path}/none")
    assert done.returncode == 5
    assert "no migration answers" in done.stderr


def test_a_dead_monitor_s_socket_is_replaced_a_living_one_refused(slow, tmp_path):
    second = run("copy", "demo:?size=1M", "demo:", "--monitor", slow.where)
    assert second.returncode == 4
    assert "somebody else does" in second.stderr
    slow.kill()
    until(lambda: slow.process.poll() is not None, "it ends")
    third = run("copy", "demo:?size=1M", "demo:", "--monitor", slow.where)
    assert third.returncode == 0, third.stderr


def test_a_client_that_reads_nothing_is_dropped(tmp_path):
    """A peer decides how many events there are: they do not stay in memory for it; whoever reads
    gets them all."""

    class Quiet:
        def query(self):
            return {}

    async def client():
        reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/m")
        await reader.readline()
        writer.write(b'{"execute": "qmp_capabilities"}')
        await reader.readline()
        return reader, writer

    async def main():
        async with serve_monitor(f"unix:{tmp_path}/m", Quiet()) as monitor:
            (reader, ours), (_, theirs) = await client(), await client()
            sent = 0
            while len(monitor._clients) == 2:
                monitor.emit("MIGRATION_PASS", {"pass": sent, "text": "x" * 4096})
                assert json.loads(await reader.readline())["data"]["pass"] == sent
                sent += 1
                assert sent < 10_000
            for writer in (ours, theirs):
                writer.close()
            await until_async(lambda: not monitor._clients, "both are gone")

    asyncio.run(main())
