"""SOURCE and DESTINATION as users write them: KIND:REST?option=value&…  Pure.

image:PATH                a memory image in a file: raw, or an ELF core
file:PATH[?direct=on]     a snapshot; direct: written past the page cache
ram:PATH[?pid=PID]        live memory in a shared-memory file
shm:NAME                  the same, by its POSIX shared-memory name
pid:PID[?mapping=PATH&tracking=HOW]
                          the shared memory of a process, unmodified: PATH as in /proc/PID/maps; HOW
                          its writes are found: pagemap-scan, content-hash
qemu:QMP_SOCKET[?tracking=HOW&ignore-shared=NAME,NAME]
                          a VM of a running QEMU, by its monitor's socket; HOW as above; NAMEs of
                          its memories that both ends have in the same file, and that do not travel
ram:, shm:, pid:, qemu: …throttle=HOW
                          how the process is slowed down: cgroup, signal; else by what can be
demo:[?size=&rate=&content=&access=&vcpus=&changes=&hugepages=&paused=]   the bundled guest
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ...transport.errors import UsageError

_OPTIONS: dict[str, set[str]] = {
    "image": set(),
    "file": {"direct"},
    "ram": {"pid", "throttle"},
    "shm": {"pid", "throttle"},
    "pid": {"mapping", "tracking", "throttle"},
    "qemu": {"tracking", "throttle", "ignore-shared"},
    "demo": {
        "size",
        "rate",
        "content",
        "seed",
        "access",
        "vcpus",
        "hugepages",
        "changes",
        "paused",
    },
}
_MAX_PID = 1 << 22  # PID_MAX_LIMIT of 64-bit Linux


@dataclass(frozen=True)
class GuestUri:
    """A parsed URI. `rest` is a path, a name or nothing."""

    kind: str
    rest: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        query = "&".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.kind}:{self.rest}" + (f"?{query}" if query else "")

    def integer(self, name: str, default: int) -> int:
        """An option that must be a whole number."""
        text = self.options.get(name)
        if text is None:
            return default
        # isdigit() takes "²" too, and int() does not
        if not (text.isdecimal() and len(text) < 20):
            raise UsageError(f"{self}: {name} must be a whole number, not {text!r}")
        return int(text)

    def names(self, name: str) -> frozenset[str]:
        """An option that is a list of names."""
        return frozenset(part for part in self.options.get(name, "").split(",") if part)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """An option that is one of `choices`, or "" if it is not there."""
        text = self.options.get(name, "")
        if text and text not in choices:
            raise UsageError(f"{self}: {name} is {' or '.join(choices)}, not {text!r}")
        return text


def parse_guest(text: str) -> GuestUri:
    """`text` as a guest, or UsageError that says what was expected."""
    try:
        text.encode()
    except UnicodeEncodeError as e:  # messages carry paths, and are UTF-8
        raise UsageError(f"{text!r} names no guest: a path must be UTF-8") from e
    kind, colon, rest = text.partition(":")
    if not colon or kind not in _OPTIONS:
        hint = f"; did you mean image:{text}?" if os.path.exists(text) else ""
        raise UsageError(
            f"{text!r} names no guest: write one of {', '.join(k + ':' for k in _OPTIONS)}{hint}"
        )
    options: dict[str, str] = {}
    # A path may hold a question mark: only what looks like options behind the last one counts.
    path, mark, query = rest.rpartition("?")
    if mark and all("=" in part for part in query.split("&")):
        rest = path
        options = dict(part.split("=", 1) for part in query.split("&"))
    unknown = sorted(set(options) - _OPTIONS[kind])
    if unknown:
        known = ", ".join(sorted(_OPTIONS[kind])) or "none"
        raise UsageError(f"{kind}: has no option {unknown[0]!r} (it has: {known})")
    if kind == "demo" and rest:
        raise UsageError(f"demo: takes options only: write demo:?{rest}")
    if kind in ("image", "file", "ram") and not rest:
        raise UsageError(f"{kind}: needs a path: {kind}:PATH")
    if kind == "qemu" and not rest:
        raise UsageError("qemu: needs the socket of QEMU's monitor: qemu:PATH")
    if kind == "pid" and not (rest.isdecimal() and len(rest) < 8 and 0 < int(rest) <= _MAX_PID):
        raise UsageError(f"pid: needs the number of a process: pid:PID, not {rest!r}")
    if kind == "shm" and (not rest.strip("/") or "/" in rest.strip("/")):
        raise UsageError("shm: needs the name of a shared-memory segment: shm:NAME")
    return GuestUri(kind, rest, options)
