"""Where lines for a person go: nowhere, to stderr one by one, or below them some that rich draws
anew. What copy, batch and tune show is built on these; knows nothing of what the lines say.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self


class Display:
    """Shows nothing: --quiet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def say(self, text: str) -> None:
        """A line that stays."""


class PlainLines(Display):
    """For logs."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LiveLines(Display):
    """For a terminal. `draw` what is to stand below all that was said."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *rest: Any) -> None:
        self._live.stop()

    def draw(self, what: Any) -> None:
        self._live.update(what)

    def say(self, text: str) -> None:
        # without markup: a peer's name may be in it
        self._console.print(text, highlight=False, markup=False)


def bar(head: str, width: int, share: float, text: str) -> Any:
    """A line with `head`, a bar of which `share` (0 to 1) is done, and `text`."""
    from rich.text import Text

    done = round(width * min(1.0, max(0.0, share)))
    return Text.assemble(
        (head, "bold"),
        ("━" * done, "green"),
        ("━" * (width - done), "bright_black"),
        f"  {text}",
        overflow="ellipsis",
        no_wrap=True,
    )
