"""`--web`: what is served while a real migration runs, as a program sees it."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from xml.etree import ElementTree

import pytest
from helpers import Running, ask, pattern, receiver, until, until_async
from helpers import pageferry as run
from prometheus_client.parser import text_string_to_metric_families

from pageferry.tools.web import server, subjects
from pageferry.tools.web.address import Address
from pageferry.tools.web.subjects import Subject


def get(url, **headers):
    """Status, headers and text of an answer."""
    request = urllib.request.Request(
        url, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.headers, e.read().decode()


def page_of(url):
    return ElementTree.fromstring(get(url)[2].removeprefix("<!DOCTYPE html>\n"))


def metrics_of(url):
    families = text_string_to_metric_families(get(f"{url}metrics")[2])
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def figures(html):
    """The numbers in a part of the page."""
    return {
        name: float(value) for name, value in re.findall('<data id="([^"]+)" value="([^"]+)"', html)
    }


class Events:
    """A browser, as far as server-sent events are concerned."""

    def __init__(self, url):
        self._answer = urllib.request.urlopen(f"{url}events", timeout=60)
        self.headers = self._answer.headers
        self.parts = {}

    def next(self):
        """The name of the next event; `parts` is up to date then. None at the end."""
        name = None
        for line in self._answer:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                self.parts |= json.loads(value)
            elif not line.strip() and name:
                return name
        return None

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self._answer.close()


@contextlib.contextmanager
def held(*arguments, source="demo:?size=64M&rate=0", command="copy", to="demo:"):
    """A migration that takes for ever, until `.let_go` is called."""
    with Running(command, source, to, "--max-bandwidth", "1MB", *arguments) as running:
        running.url = running.error_line("web: ").split()[1]
        yield running


@pytest.fixture
def slow(tmp_path):
    where = f"unix:{tmp_path}/monitor"
    with held("--monitor", where, "--web", "0", "--json") as running:
        running.error_line("round 1")
        running.query = lambda: ask(where, "query-migrate")
        until(lambda: running.query()["ram"]["remaining"], "it is in round 1")
        running.let_go = lambda: ask(where, "migrate-set-parameters", **{"max-bandwidth": 0})
        yield running


def test_page_events_and_metrics_are_the_migration_s(slow):
    assert slow.url.startswith("http://127.0.0.1:")
    before = slow.query()
    with Events(slow.url) as events:
        assert events.headers["Content-Type"].startswith("text/event-stream")
        assert events.next() == "parts"
        assert set(events.parts) > {"head", "figures", "processes", "settings", "title"}
        left = before["ram"]["remaining"]
        while not 0 < figures(events.parts["figures"])["remaining"] <= left:
            assert events.next() in ("parts", "tick")
        shown, scraped, after = figures(events.parts["figures"]), metrics_of(slow.url), slow.query()
        for found in (shown["remaining"], scraped["pageferry_remaining_bytes",]):
            assert after["ram"]["remaining"] <= found <= before["ram"]["remaining"]
        assert shown["total"] == scraped["pageferry_ram_bytes",] == after["ram"]["total"]
        assert shown["dirty-sync-count"] == scraped["pageferry_rounds_total",] == 1
        assert scraped["pageferry_migration_state", "active"] == 1
        assert "sender-0" in events.parts["processes"] and "1 MB/s" in events.parts["settings"]
        assert ("pageferry_process_cpu_seconds_total", "sender-0") in scraped
        page = page_of(slow.url)
        assert "Precopy, round 1" in "".join(page.find(".//*[@id='verdict']").itertext())
        slow.let_go()
        while (name := events.next()) != "over":
            assert name in ("parts", "tick")
        assert events.next() is None  # and nobody is kept waiting
    code, out, err = slow.finish()
    assert code == 0, err
    report = json.loads(out)
    assert "Completed in " in events.parts["head"]
    shown = figures(events.parts["figures"])
    assert shown["total-time"] == report["total-time"]
    assert shown["wire-bytes"] == report["wire-bytes"]
    assert "eta" not in shown and "every byte of the demo guest is right" in events.parts["head"]
    with pytest.raises(urllib.error.URLError):
        get(slow.url)


def test_a_failure_is_the_last_thing_that_is_shown(slow):
    with Events(slow.url) as events:
        events.next()
        slow.process.send_signal(signal.SIGINT)
        while events.next() != "over":
            pass
    assert slow.finish()[0] == 130
    assert "Cancelled after " in events.parts["head"]


def test_nobody_else_gets_anything(slow):
    status, headers, _ = get(slow.url)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    assert get(slow.url, Host="evil.example")[0] == 403
    assert get(f"{slow.url}metrics", Host="evil.example:80")[0] == 403
    assert (
        get(f"{slow.url}events", Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="document")[0] == 403
    )
    assert get(slow.url, Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="iframe")[0] == 403
    assert get(slow.url, Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="document")[0] == 200
    assert get(f"{slow.url}../../etc/passwd")[0] == 404
    for name in ("style.css", "live.js"):
        assert get(slow.url + name)[0] == 200
    request = urllib.request.Request(slow.url, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405") as refused:
        urllib.request.urlopen(request, timeout=60)
    refused.value.close()
    slow.let_go()
    assert slow.finish()[0] == 0


def connection(url):
    host, port = re.match(r"http://([^:]+):(\d+)/", url).groups()
    return socket.create_connection((host, int(port)), timeout=60)


def test_whoever_behaves_badly_is_not_felt(slow):
    """Too many, garbage, endless headers, and readers who do not read: the migration goes on."""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * server.MOST_CONNECTIONS):
            mute = stack.enter_context(connection(slow.url))
            with contextlib.suppress(OSError):
                mute.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and never reads
        garbage = stack.enter_context(connection(slow.url))
        with contextlib.suppress(OSError):
            garbage.sendall(b"\x00\xff" * 1000)
        endless = stack.enter_context(connection(slow.url))
        with contextlib.suppress(OSError):
            endless.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000)
        before = slow.query()["ram"]["remaining"]
        until(lambda: slow.query()["ram"]["remaining"] < before, "it goes on")
        slow.let_go()
        code, out, err = slow.finish()
    assert code == 0, err
    assert json.loads(out)["oracle"]["ok"] and "Traceback" not in err


def test_a_port_that_is_taken_is_found_before_anything_moves(tmp_path):
    image = tmp_path / "vm.mem"
    image.write_bytes(pattern(10))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("copy", f"image:{image}", f"image:{tmp_path}/there", "--web", where)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and where in done.stderr and "another port" in done.stderr
    assert os.listdir(tmp_path) == ["vm.mem"]


@pytest.mark.parametrize("where", ["nonsense", "99999", "192.0.2.1:0"])
def test_an_address_that_cannot_be(where):
    done = run("copy", "demo:?size=1M", "demo:", "--web", where)
    assert done.returncode == 2 and done.stderr.startswith("pageferry: --web")


def test_another_address_is_named_and_said():
    done = run("copy", "demo:?size=1M", "demo:", "--web", "0.0.0.0:0", "--quiet")
    assert done.returncode == 0
    assert re.search(r"web: http://0\.0\.0\.0:[0-9]+/\n", done.stderr)
    assert "anybody who reaches" in done.stderr
    done = run("copy", "demo:?size=1M", "demo:", "--web", "0", "--quiet")
    assert done.returncode == 0 and "anybody" not in done.stderr


def test_on_ipv6():
    with held("--web", "[::1]:0") as running:
        assert running.url.startswith("http://[::1]:")
        assert get(running.url)[0] == get(running.url, Host="localhost:1")[0] == 200
        assert get(running.url, Host="[2001:db8::1]")[0] == 403
        running.process.send_signal(signal.SIGINT)
        assert running.finish()[0] == 130


@pytest.mark.parametrize("library", ["aiohttp", "prometheus_client"])
def test_without_its_libraries_it_says_what_to_install(tmp_path, library, monkeypatch):
    (tmp_path / f"{library}.py").write_text(f"raise ImportError('no', name='{library}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("copy", "demo:?size=1M", "demo:", "--web", "0")
    assert done.returncode == 12 and library in done.stderr
    assert "pip install 'pageferry[web]'" in done.stderr
    assert run("copy", "demo:?size=1M", "demo:").returncode == 0  # and nobody else needs them


# ---- receivers and batches -------------------------------------------------------------------


def test_a_receiver_shows_what_arrives(tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    (tmp_path / "there").mkdir()
    image = tmp_path / "vm.mem"
    image.write_bytes(pattern(3000))
    monitor = f"unix:{tmp_path}/monitor"
    with receiver(
        "--into", f"image:{tmp_path}/there/", "--web", "0", "--report", f"{pages}/"
    ) as there:
        url = there.error_line("web: ").split()[1]
        assert "nothing arriving now" in get(url)[2]
        with held(
            "--monitor", monitor, "--web", "0", "--name", "a-guest", "--codec", "none",
            command="send", source=f"image:{image}", to=there.endpoint,
        ) as sending:  # fmt: skip
            until(lambda: "1: a-guest" in get(url)[2], "it is shown")
            assert metrics_of(url)["pageferry_arriving",] == 1
            ask(monitor, "migrate-set-parameters", **{"max-bandwidth": 0})
            assert sending.finish()[0] == 0
        until(lambda: "1 received, nothing arriving now" in get(url)[2], "it has arrived")
        until(lambda: len(os.listdir(pages)) == 1, "there is a page of it")
        assert metrics_of(url)["pageferry_arrivals_total", "completed"] == 1
        there.process.send_signal(signal.SIGINT)
        assert there.finish()[0] == 130
    (name,) = os.listdir(pages)
    assert re.fullmatch(r"[0-9]{8}T[0-9]{6}Z-a-guest-[0-9a-f]{8}-[0-9a-f]{4}\.html", name)
    page = ElementTree.parse(pages / name).getroot()
    assert "a-guest" in "".join(page.find(".//h1").itertext())
    assert "Completed in" in "".join(page.find(".//*[@id='verdict']").itertext())


def test_a_postcopy_seen_from_its_destination(tmp_path):
    """Faults and what is missing are known there; and the summary of a receiver is said once."""
    page = tmp_path / "page.html"
    with Running(
        "receive", "--listen", "tcp://127.0.0.1:0", "--web", "0", "--report", str(page)
    ) as there:
        url = there.error_line("web: ").split()[1]
        endpoint = there.error_line("listening at ").split()[-1]
        with Events(url) as events:
            done = run(
                "send", "demo:?size=32M&rate=0&access=random", endpoint, "--postcopy", "now",
                "--max-postcopy-bandwidth", "20MB",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            seen = []
            while "Completed in " not in events.parts.get("head", ""):
                events.next()
                seen.append(figures(events.parts["figures"]))
        left = [f["remaining"] for f in seen if "postcopy-requests" in f and "remaining" in f]
        assert left and left == sorted(left, reverse=True) and 0 < left[0] <= 32 << 20
        until(page.exists, "the page of the last")
        there.process.send_signal(signal.SIGINT)
        code, out, err = there.finish()
    assert code == 130 and out.count("result ") == 1 and "Traceback" not in err
    assert "Fault latency" in page.read_text()


def test_a_batch(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mem").write_bytes(pattern(2000))
    (tmp_path / "m.json").write_text(json.dumps({"retries": 0, "items": [
        {"name": "a", "source": f"image:{tmp_path}/a.mem", "destination": f"image:{tmp_path}/1"},
        {"name": "b", "source": f"image:{tmp_path}/b.mem", "destination": f"image:{tmp_path}/2"},
        {"name": "c", "source": f"image:{tmp_path}/a.mem", "destination": "tcp://127.0.0.1:1"},
    ]}))  # fmt: skip
    page = tmp_path / "page.html"
    with Running(
        "batch", str(tmp_path / "m.json"), "--web", "0", "--report", str(page), "--json",
        "--max-bandwidth", "2MB", "--codec", "none",
    ) as running:  # fmt: skip
        url = running.error_line("web: ").split()[1]
        with Events(url) as events:
            while "failed" not in events.parts.get("items", ""):
                assert events.next()
            scraped = metrics_of(url)
            assert scraped["pageferry_batch_items", "failed"] == 1
            assert "cannot connect" in events.parts["items"]
            # failures come right after those that run
            assert events.parts["items"].index("cannot connect") > events.parts["items"].index("a<")
            while (name := events.next()) != "over":
                assert name
        code, out, _ = running.finish()
    assert code == 15
    report = json.loads(out)
    assert "2 of 3 items completed" in events.parts["head"]
    assert figures(events.parts["figures"])["completed"] == report["completed"] == 2
    root = ElementTree.parse(page).getroot()
    assert json.loads("".join(root.find(".//pre[@id='raw']").itertext()))["failed"] == 1
    bars = root.findall(".//svg[@aria-label='items over time']/g/title")
    assert sorted(bar.text.split(",")[0] for bar in bars) == [
        "a: completed", "b: completed", "c: failed"
    ]  # fmt: skip


def test_a_page_must_not_write_over_what_a_batch_moves(tmp_path):
    image = tmp_path / "a.mem"
    image.write_bytes(pattern(10))
    (tmp_path / "there").mkdir()
    done = run("batch", str(image), f"image:{tmp_path}/there/", "--report", str(image))
    assert done.returncode == 2 and "the memory that moves" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.mem", "there"]


# ---- the server alone ------------------------------------------------------------------------


class Big(Subject):
    """Half a megabyte that is another each time."""

    drawn = 0

    def parts(self):
        self.drawn += 1
        return {"head": f"{self.drawn} " + "x" * 500_000, "title": "t" if self.over else "running"}

    def metrics(self):
        yield from ()


class Standing(Big):
    """A guest that stands still."""

    now = "active"

    def status(self):
        return self.now


async def listener(served):
    reader, writer = await asyncio.open_connection(served.address.host, served.address.port)
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return reader, writer


def test_a_browser_that_does_not_read_holds_up_nobody(monkeypatch):
    """It is dropped, others see everything meanwhile, and the end comes all the same."""
    monkeypatch.setattr(server, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(server, "_DRAW_SHARE", 0.5)
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.5)

    async def go():
        subject = Big()
        served = server.Server(subject, Address("127.0.0.1", 0))
        await served.open()
        _, visitor = await listener(served)
        await until_async(lambda: len(served._listeners) == 1, "somebody looks")
        visitor.transport.abort()
        await until_async(lambda: not served._listeners, "and goes")
        _, mute = await listener(served)
        reader, writer = await listener(served)
        await until_async(lambda: len(served._listeners) == 2, "both listen")
        reading = asyncio.create_task(drain(reader))
        at = subject.drawn
        await until_async(lambda: len(served._listeners) == 1, "the mute one is dropped")
        await until_async(lambda: subject.drawn > at + 5, "drawing goes on")
        _, second = await listener(served)
        await until_async(lambda: len(served._listeners) == 2, "another mute one")
        await served.close({"status": "completed"})
        seen = await reading
        for end in (visitor, mute, writer, second):
            end.transport.abort()
            with contextlib.suppress(OSError):
                await end.wait_closed()
        return seen

    seen = asyncio.run(go())
    assert seen.count(b"event: parts\n") > 5
    assert seen.rstrip().endswith(b"data: {}\n\n\r\n0") and b"event: over\n" in seen
    assert b'"title": "t"' in seen  # the last state was the last thing


async def drain(reader):
    seen = bytearray()
    while data := await reader.read(1 << 20):
        seen += data.replace(b"x", b"")
    return bytes(seen)


def test_nothing_is_drawn_while_a_guest_stands_still(monkeypatch):
    monkeypatch.setattr(server, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(server, "_DRAW_SHARE", 0.9)

    async def go():
        subject = Standing()
        served = server.Server(subject, Address("127.0.0.1", 0))
        await served.open()
        reader, writer = await listener(served)
        reading = asyncio.create_task(drain(reader))
        await until_async(lambda: subject.drawn > 2, "it is drawn")
        monkeypatch.setattr(subjects, "_STILL_SECONDS", 1e9)
        subject.now, at = "device", subject.drawn
        looks = 0

        def looked():
            nonlocal looks
            served._look_again()
            looks += 1
            return looks > 50

        await until_async(looked, "fifty looks")
        assert subject.drawn == at
        monkeypatch.setattr(subjects, "_STILL_SECONDS", 0.0)  # it takes too long
        await until_async(lambda: subject.drawn > at + 2, "it is drawn again")
        await served.close(None)
        await reading
        writer.close()
        await writer.wait_closed()

    asyncio.run(go())


def test_nobody_looks_nothing_is_drawn():
    async def go():
        subject = Big()
        served = server.Server(subject, Address("127.0.0.1", 0))
        await served.open()
        await served.close(None)
        return subject.drawn

    assert asyncio.run(go()) == 0
