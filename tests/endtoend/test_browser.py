"""The pages in a real browser, headless: what stands there while a migration runs is what its
monitor says, in light and dark, on a desk and on a telephone, to the verdict."""

import contextlib
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from helpers import Running, ask, pattern, until
from helpers import pageferry as run

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs Chromium and its driver (Debian: chromium chromium-driver)",
)
PHONE = 390


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}/profile",
    ):  # fmt: skip
        options.add_argument(argument)
    if os.geteuid() == 0:  # it refuses to run without
        options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
        driver.service.stop()


def screen(browser, width, *, dark=False):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500,
    })  # fmt: skip
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    })  # fmt: skip


def number(browser, name):
    """What stands on the page, exactly."""
    found = browser.execute_script(
        "const e = document.getElementById(arguments[0]); return e && e.getAttribute('value')", name
    )
    return None if found is None else float(found)


def text(browser, name):
    return browser.execute_script(
        "const e = document.getElementById(arguments[0]); return e ? e.textContent : ''", name
    )


def brightness(browser):
    """Of the background, 0 to 255."""
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in color.strip("rgb()").split(",")) / 3


def too_wide(browser):
    """By how much the page is wider than the screen."""
    return browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


def complaints(browser):
    """What the console says: an error in the script, something that the headers forbid."""
    return [entry["message"] for entry in browser.get_log("browser")]


@contextlib.contextmanager
def held(tmp_path, *arguments):
    """A running demo guest under way, at 1 MB/s; its address and its monitor."""
    monitor = f"unix:{tmp_path}/monitor"
    with Running(
        "copy", *(arguments or ("demo:?size=64M&rate=0&content=text", "demo:")), "--web", "0",
        "--monitor", monitor, "--max-bandwidth", "1MB", "--json", "--codec", "none",
    ) as running:  # fmt: skip
        url = running.error_line("web: ").split()[1]
        running.error_line("round 1")
        until(lambda: ask(monitor, "query-migrate")["ram"]["remaining"], "it is in round 1")
        yield SimpleNamespace(
            url=url, running=running, query=lambda: ask(monitor, "query-migrate"),
            let_go=lambda: ask(monitor, "migrate-set-parameters", **{"max-bandwidth": 0}),
        )  # fmt: skip


def test_the_live_page_of_a_running_migration(browser, tmp_path):
    screen(browser, 1000)
    with held(tmp_path) as migration:
        browser.get(migration.url)
        before = migration.query()["ram"]
        # it moves by itself, and between two looks at the monitor it stands between them
        until(lambda: 0 < number(browser, "remaining") <= before["remaining"], "it goes on")
        shown, after = number(browser, "remaining"), migration.query()["ram"]
        assert after["remaining"] <= shown <= before["remaining"]
        assert number(browser, "total") == after["total"] == 64 << 20
        assert number(browser, "dirty-sync-count") == after["dirty-sync-count"] == 1
        assert number(browser, "downtime-limit") == 300
        assert 0 < number(browser, "progress") < 1
        until(lambda: browser.title.endswith("demo:") and "%" in browser.title, "a title")
        assert "Precopy, round 1" in text(browser, "verdict")
        assert "sender-0" in text(browser, "part-processes")
        until(
            lambda: browser.execute_script(
                "return document.querySelectorAll('#part-throughput polyline').length == 2"
            ),
            "two lines",
        )
        assert text(browser, "link") == ""
        assert brightness(browser) > 200 and too_wide(browser) <= 0
        screen(browser, 1000, dark=True)
        assert brightness(browser) < 60
        screen(browser, PHONE, dark=True)
        assert too_wide(browser) <= 0
        assert browser.execute_script("return document.documentElement.clientWidth") == PHONE
        # a change from elsewhere is on the page
        migration.let_go()
        until(lambda: browser.execute_script("return document.body.dataset.over"), "it is over")
        code, out, err = migration.running.finish()
    assert code == 0, err
    report = json.loads(out)
    assert text(browser, "verdict").startswith("Completed in ")
    assert "every byte of the demo guest is right" in text(browser, "verdict")
    assert "pageferry with it" in text(browser, "link")
    for name in ("total-time", "downtime", "wire-bytes"):
        assert number(browser, name) == report[name]
    assert number(browser, "dirty-sync-count") == report["ram"]["dirty-sync-count"]
    assert number(browser, "progress") is None and too_wide(browser) <= 0
    assert json.loads(text(browser, "raw")) == report
    assert complaints(browser) == []


def receiving(where):
    return Running("receive", "--listen", "tcp://127.0.0.1:0", "--web", where)


def test_a_page_that_has_lost_its_pageferry_says_so_and_finds_it_again(browser):
    with receiving("0") as first:
        url = first.error_line("web: ").split()[1]
        first.error_line("listening at")
        browser.get(url)
        until(lambda: "nothing arriving now" in text(browser, "verdict"), "the page")
        first.kill()
        until(lambda: "No connection to pageferry since" in text(browser, "link"), "it is said")
        assert "nothing arriving now" in text(browser, "verdict")  # what was known stays
    with receiving(url.removeprefix("http://").rstrip("/")) as second:
        second.error_line("listening at")
        until(lambda: text(browser, "link") == "", "it has found it again")
        second.process.send_signal(signal.SIGINT)
        until(lambda: browser.execute_script("return document.body.dataset.over"), "it is over")
        assert second.finish()[0] == 130


@pytest.mark.parametrize(
    "name", ["<script>document.title='owned'<script>", "<img src=x onerror=alert(1)>"]
)
def test_a_name_is_text(browser, tmp_path, name):
    image = tmp_path / name
    image.write_bytes(pattern(2000))
    with held(tmp_path, f"image:{image}", f"image:{tmp_path}/there") as migration:
        browser.get(migration.url)
        until(lambda: name in text(browser, "part-head"), "its name")
        until(lambda: number(browser, "rate"), "it is kept up to date")
        migration.let_go()
        until(lambda: browser.execute_script("return document.body.dataset.over"), "it is over")
        assert migration.running.finish()[0] == 0
    assert name in text(browser, "part-head") and "owned" not in browser.title.split("<")[0]
    assert (
        browser.execute_script("return document.querySelectorAll('main script, img').length") == 0
    )
    assert complaints(browser) == []


def test_the_report_of_a_copy(browser, tmp_path):
    page = tmp_path / "page.html"
    done = run(
        "copy", "demo:?size=32M&rate=5000&content=text", "demo:", "--downtime-limit", "2s",
        "--report", str(page), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    browser.get(f"file://{page}")
    assert text(browser, "verdict").startswith("Completed in ")
    assert number(browser, "total-time") == report["total-time"]
    assert json.loads(text(browser, "raw")) == report
    for dark in (False, True):
        for width in (1000, PHONE):
            screen(browser, width, dark=dark)
            assert too_wide(browser) <= 0
            assert (brightness(browser) < 60) is dark
    assert complaints(browser) == []


def test_a_batch_fits_a_telephone(browser, tmp_path):
    """Long names, long errors, many columns."""
    names = [f"{'a-very-long-name-of-a-guest-' * 3}{i}.mem" for i in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(pattern(10))
    (tmp_path / "m.json").write_text(json.dumps({"retries": 0, "items": [
        {"source": f"image:{tmp_path}/{names[0]}", "destination": f"image:{tmp_path}/there.mem"},
        {"source": f"image:{tmp_path}/{names[1]}", "destination": "tcp://127.0.0.1:1"},
    ]}))  # fmt: skip
    page = tmp_path / "page.html"
    done = run("batch", str(tmp_path / "m.json"), "--report", str(page), "--json")
    assert done.returncode == 15, done.stderr
    browser.get(f"file://{page}")
    assert number(browser, "failed") == number(browser, "completed") == 1
    assert "cannot connect" in browser.find_element("css selector", ".items").text
    for width in (1000, PHONE):
        screen(browser, width)
        assert too_wide(browser) <= 0
    assert complaints(browser) == []
