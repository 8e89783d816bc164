"""Profiles: settings with a name, in a file that people read and write. `pageferry tune --profile`
writes one, `--profile` of the other commands uses it.

    $XDG_CONFIG_HOME/pageferry/profiles/NAME.toml, or a path

    # 1.2 GB/s
    workers = 4
    codec = "zstd"
    level = 1

The names are those of an item of a batch (manifest.Settings). Knows files; nothing of how the
settings came about.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from ..transport.errors import UsageError
from .manifest import Settings, settings_of, told

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
# A profile is some lines.
_MAX_BYTES = 1 << 20


def path_of_profile(name: str) -> str:
    """Where the profile is: `name` itself if it is a path (with a slash, or *.toml), else its file
    in the user's configuration. UsageError if it can be neither."""
    if "/" in name or name.endswith(".toml"):
        return name
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a profile: letters, digits, _ . + - or a path")
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "pageferry", "profiles", f"{name}.toml")


def read_profile(name: str) -> dict[str, Any]:
    """What a profile says, by the names of a batch's items (workers, batch-pages, …), checked.
    UsageError that names the file and the field."""
    path = path_of_profile(name)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as e:
        raise UsageError(f"there is no profile {path}: `pageferry tune` writes one") from e
    except OSError as e:
        raise UsageError(f"cannot read the profile {path}: {e.strerror}") from e
    if len(text) > _MAX_BYTES:
        raise UsageError(f"the profile {path} is no profile: it has more than a MiB")
    try:
        data = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise UsageError(f"the profile {path} is no TOML: {' '.join(str(e).split())}") from e
    where = f"the profile {path}"
    told(settings_of(data, where), where)
    return data


def with_profile(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a profile says with what was `given` explicitly above it (both by those names). A level
    belongs to its codec: with another codec the profile's says nothing."""
    base = read_profile(name)
    if "codec" in given:
        base.pop("level", None)
    return base | dict(given)


def parameters_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Parameters: the profile's, with those `given` (by the fields' names)
    above them."""
    fields = {key.replace("_", "-"): value for key, value in given.items()}
    base = with_profile(name, fields)
    kept = {key: value for key, value in base.items() if key not in fields}
    settings = settings_of(kept, f"the profile {path_of_profile(name)}")
    from_profile = told(settings, name)
    chosen = {f: getattr(from_profile, f) for f in Settings.__struct_fields__
              if getattr(settings, f) is not None}  # fmt: skip
    return chosen | dict(given)


def write_profile(name: str, settings: Mapping[str, Any], comments: Sequence[str]) -> str:
    """Write it, in one step, in place of one that is there; where it is. `comments`: lines."""
    path = path_of_profile(name)
    folder = os.path.dirname(os.path.abspath(path))
    text = render(settings, comments)
    temporary = os.path.join(folder, f".{os.path.basename(path)[:50]}.{secrets.token_hex(4)}")
    try:
        if "/" not in name and not name.endswith(".toml"):
            os.makedirs(folder, exist_ok=True)
        with open(temporary, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise UsageError(f"cannot write the profile {path}: {e.strerror}") from e
    return path


def render(settings: Mapping[str, Any], comments: Sequence[str]) -> str:
    """A profile as a file has it."""
    lines = [f"# {line}".rstrip() for text in comments for line in text.splitlines() or [""]]
    for key, value in settings.items():
        if value is None:
            continue
        if not _BARE.fullmatch(key):
            raise UsageError(f"{key!r} is no name for a setting")
        lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    # names of codecs, rates, durations: nothing that needs more than this
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
