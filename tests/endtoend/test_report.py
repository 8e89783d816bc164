"""`--report`: the page of a real migration says what --json says, however it ended."""

import asyncio
import json
import logging
import os
import signal
from xml.etree import ElementTree

import pytest
from helpers import Running, pattern, receiver
from helpers import pageferry as run

from pageferry.pipeline.parameters import Parameters
from pageferry.tools.cli.reporting import recorded
from pageferry.tools.cli.view import View
from pageferry.workers.guests import parse_guest


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "vm.mem"
    path.write_bytes(pattern(500))
    return path


def page_at(path):
    """The page, as a strict parser sees it; nothing else is left beside it."""
    assert not [name for name in os.listdir(path.parent) if name.startswith(".pageferry")]
    return ElementTree.parse(path).getroot()


def text_of(page, where):
    return " ".join(page.find(where).itertext())


def raw(page):
    return json.loads(text_of(page, ".//pre[@id='raw']"))


def exact(page):
    """The key figures, by their names."""
    return {e.get("id"): float(e.get("value")) for e in page.iter("data")}


def phases(page):
    return [e.text.partition(":")[0] for e in page.findall(".//svg[@aria-label='phases']/g/title")]


@pytest.mark.parametrize("postcopy", ["never", "now"])
def test_numbers_are_those_of_json(tmp_path, postcopy):
    path = tmp_path / "page.html"
    done = run(
        "copy", "demo:?size=32M&rate=5000&content=text", "demo:", "--downtime-limit", "2s",
        "--postcopy", postcopy, "--report", str(path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    page = page_at(path)
    assert raw(page) == report
    figures = exact(page)
    for name in ("total-time", "setup-time", "downtime", "downtime-limit", "wire-bytes"):
        assert figures[name] == report[name]
    for name in ("total", "normal", "duplicate", "dirty-sync-count"):
        assert figures[name] == report["ram"][name]
    assert text_of(page, ".//*[@id='verdict']").startswith("Completed in ")
    assert f"report: {path}" in done.stderr
    if postcopy == "now":
        assert phases(page) == ["setup", "precopy", "switchover", "postcopy"]
        assert figures["postcopy-requests"] == report["postcopy-requests"]
        for name, value in report.get("postcopy-latency-percentiles", {}).items():
            assert figures[f"fault-{name}"] == value
    else:
        rounds = [f"round {n}" for n in range(1, report["ram"]["dirty-sync-count"] + 1)]
        assert phases(page) == ["setup", "precopy", "switchover", *rounds]
        assert [row[0].text for row in rows(page, "Rounds")][-1].endswith("(guest stopped)")
    names = [process["name"] for process in report["processes"]]
    assert [row[0].text for row in rows(page, "Processes")] == names


def rows(page, title):
    """Of the table in the section with this title."""
    for section in page.iter("section"):
        if section.find("h2").text == title:
            return section.findall(".//tbody/tr")
    raise AssertionError(f"no section {title}")


def test_send(image, tmp_path):
    with receiver("--into", f"image:{tmp_path}/there.mem", "--once") as there:
        path = tmp_path / "page.html"
        monitor = f"unix:{tmp_path}/monitor"
        sent = run(
            "send", f"image:{image}", there.endpoint, "--report", str(path), "--json",
            "--monitor", monitor,
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        code, _, err = there.finish()
    assert code == 0, err
    page = page_at(path)
    assert raw(page) == json.loads(sent.stdout)
    assert there.endpoint in text_of(page, ".//h1")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["send", "image:{image}", "tcp://127.0.0.1:1"], 5, "pageferry receive"),
        (["copy", "image:{image}.<i>&not there</i>", "image:{image}.2"], 3, "No such file"),
        (["copy", "image:{image}", "demo:"], 6, "cannot go on as a demo: guest"),
    ],
)
def test_a_failure_is_named(image, tmp_path, arguments, code, said):
    path = tmp_path / "page.html"
    path.write_text("an older page")
    done = run(
        *(a.replace("{image}", str(image)) for a in arguments), "--report", str(path), "--json"
    )
    assert done.returncode == code
    error = json.loads(done.stdout)["error"]
    page = page_at(path)
    verdict = text_of(page, ".//*[@id='verdict']")
    assert verdict.startswith("Failed ") and error["message"] in verdict and said in verdict
    assert raw(page)["error"] == error
    assert page.find(".//i[.='&not there']") is None


def test_a_cancel_is_told(tmp_path):
    path = tmp_path / "page.html"
    with Running(
        "copy", "demo:?size=64M&rate=0", "demo:", "--max-bandwidth", "20MB", "--report", str(path)
    ) as running:
        running.error_line("round 1")
        running.process.send_signal(signal.SIGINT)
        code, _, _ = running.finish()
    assert code == 130
    page = page_at(path)
    assert text_of(page, ".//*[@id='verdict']").startswith("Cancelled after ")
    assert raw(page)["status"] == "cancelled"
    assert phases(page)[:2] == ["setup", "precopy"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("{folder}/no/such/folder/page.html", "No such file"),
        ("{folder}", "that is no file"),
        ("/dev/null", "that is no file"),
        ("{folder}/vm.mem", "the memory that moves"),
        ("{folder}/there.mem", "the memory that moves"),
    ],
)
def test_a_path_that_cannot_be_is_found_first(image, tmp_path, where, said):
    before = image.read_bytes()
    path = where.replace("{folder}", str(tmp_path))
    done = run("copy", f"image:{image}", f"image:{tmp_path}/there.mem", "--report", path)
    assert done.returncode == 2
    assert "--report" in done.stderr and said in done.stderr
    assert os.listdir(tmp_path) == ["vm.mem"]
    assert image.read_bytes() == before


def test_a_page_that_cannot_be_written_afterwards_is_a_warning(tmp_path, caplog):
    folder = tmp_path / "gone"
    folder.mkdir()
    guest = parse_guest("demo:")
    caplog.set_level(logging.WARNING, "pageferry")

    async def migrate():
        async with recorded(
            {"report": f"{folder}/page.html"}, "copy", "demo:", "demo:", Parameters().checked(),
            View(), lambda m: None, guest,
        ) as recording:  # fmt: skip
            recording.report = {"status": "completed"}
            folder.rmdir()

    asyncio.run(migrate())
    assert f"the report {folder}/page.html was not written" in caplog.text
