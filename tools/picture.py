"""Draws the README's picture: a real run of the demo in a terminal of its own, as SVG.

For whoever changes the display: `make picture`. Needs pyte, a terminal in a library.
"""

from __future__ import annotations

import itertools
import os
import pty
import sys
from typing import Any

COLUMNS, LINES = 112, 24
COMMAND = ["copy", "demo:?size=512M&content=text&rate=20000", "demo:"]


def record() -> bytes:
    """Everything the demo writes to its terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(COLUMNS), LINES=str(LINES), TERM="xterm-256color")
        os.execv(sys.executable, [sys.executable, "-m", "pageferry", *COMMAND])
    output = bytearray()
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # EIO: it has ended
            break
        if not data:
            break
        output += data
    os.close(terminal)
    os.waitpid(pid, 0)
    return bytes(output)


def draw(output: bytes, path: str) -> None:
    """The screen after `output`, as SVG."""
    import pyte
    from rich.console import Console
    from rich.text import Text

    screen: Any = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(screen).feed(output)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text("$ pageferry " + " ".join(f"'{w}'" if "?" in w else w for w in COMMAND)))
    for number, line in enumerate(screen.display):
        if not line.strip() and not any(rest.strip() for rest in screen.display[number:]):
            break
        cells = [screen.buffer[number][column] for column in range(len(line.rstrip()))]
        text = Text(no_wrap=True)
        for style, run in itertools.groupby(cells, _style):
            text.append("".join(cell.data for cell in run), style=style)
        console.print(text)
    console.save_svg(path, title="pageferry")


def _style(cell: Any) -> str:
    color = {"default": "", "brightblack": "bright_black"}.get(cell.fg, cell.fg)
    return f"{'bold ' if cell.bold else ''}{color}".strip()


if __name__ == "__main__":
    draw(record(), sys.argv[1])
