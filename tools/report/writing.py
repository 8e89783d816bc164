"""Puts a page on disk: whole, or not at all. Knows paths, not what is in them."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile

from ...transport.errors import UsageError


def check_writable(path: str, memory: tuple[str, ...] = ()) -> None:
    """UsageError if `path` cannot become a page, or is one of the files with `memory`."""
    real = os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isfile(real):
        raise UsageError(f"--report {path}: that is no file: name one that may be written")
    if any(_same(real, other) for other in memory if other):
        raise UsageError(f"--report {path}: that is the memory that moves: name another file")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(real)):
            pass
    except OSError as e:
        raise UsageError(f"--report {path} cannot be written: {e.strerror}") from e


def _same(real: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(real, other)
    return real == os.path.realpath(other)


def write(path: str, text: str) -> None:
    """The page, under its name when all of it is there. OSError if not."""
    real = os.path.realpath(path)
    part = os.path.join(os.path.dirname(real), f".pageferry-report-{secrets.token_hex(8)}")
    try:
        with open(part, "x", encoding="utf-8") as f:
            f.write(text)
        os.replace(part, real)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
