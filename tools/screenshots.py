"""Takes the README's pictures of the live view: a real migration, seen by a headless Chromium.

For whoever changes the page: `make picture`. Needs Chromium with its driver, selenium and Pillow.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

COMMAND = [
    "copy", "demo:?size=512M&content=text&rate=5500", "demo:", "--max-bandwidth", "45MB",
    "--downtime-limit", "100ms", "--codec", "none", "--web", "0",
]  # fmt: skip
_ROUNDS = "return document.querySelectorAll('#part-rounds tbody tr').length"
_ENOUGH = 4
# name of the picture, width, height, dark
PICTURES = (
    ("web-light.png", 980, 1180, False),
    ("web-dark.png", 390, 844, True),
)
_COLORS = 128


@contextmanager
def migration(*command: str) -> Iterator[str]:
    """One that runs, until the context is left; where it can be seen."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pageferry", *command], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.match(r"web: (\S+)", line):
                yield match[1]
                return
        raise RuntimeError("it has ended, and said no address")
    finally:
        process.terminate()
        process.communicate()


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

    with migration(*COMMAND) as url, ExitStack() as stack:
        drivers = {}
        for name, width, height, dark in PICTURES:
            drivers[name] = stack.enter_context(browser(width, height, dark=dark))
            drivers[name].get(url)
        for name, driver in drivers.items():
            WebDriverWait(driver, 120).until(lambda d: d.execute_script(_ROUNDS) >= _ENOUGH)
            save(driver.get_screenshot_as_png(), folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
