"""`-v`, `-vv`: what pageferry's modules log, on stderr, one line an event.

Every command has the option, and so has `pageferry` itself. Without it nothing is set up: warnings
come as bare lines, and a program that uses pageferry as a library has the say over its logging.
"""

from __future__ import annotations

import logging
import sys
from datetime import datetime

import click

# What would make two lines of one, or steer a terminal: some of what is said comes from the peer.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


class _Formatter(logging.Formatter):
    """15:04:05.123 info    source: round 1: …"""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        name = record.name.removeprefix("pageferry.")
        head = f"{when}.{int(record.msecs):03d} {record.levelname.lower():<7} {name}: "
        text = head + record.getMessage().translate(_CONTROL)
        if record.exc_info:
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


def _set_up(context: click.Context, parameter: click.Parameter, count: int) -> int:
    """`-v` here or there: the most counts."""
    logger = logging.getLogger("pageferry")
    if not count:
        return count
    level = logging.INFO if count == 1 else logging.DEBUG
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(level)
    logger.setLevel(min(logger.level, level))
    return count


def verbose_option() -> click.Option:
    """-v, --verbose."""
    return click.Option(
        ["-v", "--verbose"], count=True, expose_value=False, is_eager=True, callback=_set_up,
        help="Say on stderr what happens, an event a line; -vv: all of it.",
    )  # fmt: skip


def talkative(command: click.Command) -> click.Command:
    """`command` and its subcommands, with the option. Idempotent."""
    if not any(parameter.name == "verbose" for parameter in command.params):
        command.params.append(verbose_option())
        if isinstance(command, click.Group):
            for below in command.commands.values():
                talkative(below)
    return command
