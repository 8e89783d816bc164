"""What all who look are shown: parts of the page by name, and who has seen which. Pure.

There is one state, the newest: whoever is slow misses what was in between, and nobody queues it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping


class Board:
    """`version` grows with each change."""

    def __init__(self) -> None:
        self.version = 0
        self._parts: dict[str, tuple[int, str]] = {}

    def put(self, parts: Mapping[str, str]) -> bool:
        """Show these; True if anything is new. Parts that are not named stay as they are."""
        new = {
            name: html
            for name, html in parts.items()
            if name not in self._parts or self._parts[name][1] != html
        }
        if new:
            self.version += 1
            self._parts |= {name: (self.version, html) for name, html in new.items()}
        return bool(new)

    def since(self, version: int) -> dict[str, str]:
        """What changed after `version`; 0: everything."""
        return {name: html for name, (at, html) in self._parts.items() if at > version}


def event(name: str, parts: Mapping[str, str] | None = None) -> bytes:
    """A server-sent event (html.spec.whatwg.org, 9.2): JSON has no line ends of its own."""
    return f"event: {name}\ndata: {json.dumps(parts or {})}\n\n".encode()
