"""What pageferry's modules log, as lines on stderr: time, level, who, what; one line an event."""

from __future__ import annotations

import logging
import sys
from datetime import datetime

# What would make two lines of one, or steer a terminal: some of what is said comes from the peer.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def escaped(text: str) -> str:
    """What a peer says, so that it is one line and steers no terminal."""
    return text.translate(_CONTROL)


class Lines(logging.Formatter):
    """15:04:05.123 info    source: round 1: …"""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        name = record.name.removeprefix("pageferry.")
        head = f"{when}.{int(record.msecs):03d} {record.levelname.lower():<7} {name}: "
        text = head + escaped(record.getMessage())
        if record.exc_info:  # a mistake of ours, or of a caller
            text += f"\n{self.formatException(record.exc_info)}"
        return text


class _Stderr(logging.Handler):
    """Whatever sys.stderr is just then: a live display on a terminal puts itself there, and prints
    what comes above its line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def say(*, debug: bool) -> None:
    """From now on, INFO and above; or everything. Said twice, the more counts."""
    logger = logging.getLogger("pageferry")
    level = logging.DEBUG if debug else logging.INFO
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(Lines())
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(level)
    logger.setLevel(min(logger.level, level))
