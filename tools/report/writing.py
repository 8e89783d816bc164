"""Puts a page on disk: whole, or not at all. Knows paths, not what is in them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import time

from ...transport.errors import UsageError


def check_writable(path: str, memory: tuple[str, ...] = (), *, many: bool = False) -> None:
    """UsageError if `path` cannot become a page, or is one of the files with `memory`. `many`: it
    may be a directory (PATH/) for pages."""
    real = os.path.realpath(path)
    if many and path.endswith("/"):
        _check_folder(path)
        return
    if os.path.lexists(real) and not os.path.isfile(real):
        raise UsageError(f"--report {path}: that is no file: name one that may be written")
    if any(_same(real, other) for other in memory if other):
        raise UsageError(f"--report {path}: that is the memory that moves: name another file")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(real)):
            pass
    except OSError as e:
        raise UsageError(f"--report {path} cannot be written: {e.strerror}") from e


def _check_folder(path: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise UsageError(f"--report {path}: no page can be made there: {e.strerror}") from e


def name_in(path: str, name: str, uuid: str) -> str:
    """The page of one migration at `path`: that itself, or in a directory (PATH/) one by when it
    ended and what its source calls it. `name` and `uuid` are a stranger's choice."""
    if not path.endswith("/"):
        return path
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    safe, short = (re.sub("[^A-Za-z0-9._-]", "_", text) for text in (name[:60], uuid[:8]))
    return os.path.join(path, f"{when}-{safe}-{short}-{secrets.token_hex(2)}.html")


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
