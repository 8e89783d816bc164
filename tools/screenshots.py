"""Takes the README's pictures of the live view: of a real migration and a real batch, by a headless
Chromium.

For whoever changes the page: `make picture`. Needs Chromium with its driver, selenium and Pillow.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# A migration in its fourth round, and a batch half-way: where a page has much to say.
MIGRATION = [
    "copy", "demo:?size=512M&content=text&rate=5500", "demo:", "--max-bandwidth", "45MB",
    "--downtime-limit", "100ms", "--codec", "none", "--web", "0",
]  # fmt: skip
BATCH = [
    "batch", "guests/*.mem", "image:there/", "--parallel", "3", "--max-bandwidth", "30MB",
    "--codec", "none", "--web", "0",
]  # fmt: skip
_GUESTS = 12
_ROUND = "return document.getElementById('dirty-sync-count')?.value >= 4"
_HALF = "return document.getElementById('completed')?.value >= 5"
# name of the picture, what it shows, width, height, dark, when it is taken
PICTURES = (
    ("web-light.png", MIGRATION, 980, 1180, False, _ROUND),
    ("web-dark.png", BATCH, 390, 1180, True, _HALF),
)
_COLORS = 128


@contextmanager
def shown(command: list[str]) -> Iterator[str]:
    """One that runs, until the context is left; where it can be seen."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("guests", "there"):
            Path(folder, name).mkdir()
        for i in range(_GUESTS if command is BATCH else 0):
            content = os.urandom(1 << 20) * (16 + i * 7 % 24)
            Path(folder, "guests", f"vm-{i + 1:02}.mem").write_bytes(content)
        process = subprocess.Popen(
            [sys.executable, "-m", "pageferry", *command], cwd=folder, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield _address(process)
        finally:
            process.terminate()
            process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.match(r"web: (\S+)", line):
            return match[1]
    raise RuntimeError("it has ended, and said no address")


@contextmanager
def browser(width: int, height: int, *, dark: bool) -> Iterator[Any]:
    """A headless Chromium with such a screen."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    for argument in ("--headless=new", "--hide-scrollbars", "--disable-gpu", "--no-first-run",
                     "--disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500,
        })  # fmt: skip
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        })  # fmt: skip
        yield driver
    finally:
        driver.quit()


def save(png: bytes, path: Path) -> None:
    """With few colours: a page has no more, and the picture is a third."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(folder: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    for name, command, width, height, dark, when in PICTURES:
        with browser(width, height, dark=dark) as driver, shown(command) as url:
            driver.get(url)
            WebDriverWait(driver, 120).until(partial(_is_so, when))
            save(driver.get_screenshot_as_png(), folder / name)


def _is_so(script: str, driver: Any) -> bool:
    return bool(driver.execute_script(script))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
