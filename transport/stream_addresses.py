"""Addresses of byte streams: exec:COMMAND, fd:N, fd:READ,WRITE and `-`. What they mean; nothing is
opened here.

`fd:0` alone is a socket, or else the pair that a program is given: 0 to read and 1 to write, which
is what ssh, socat and inetd leave; `-` is the same. Of any other descriptor that goes one way only
the partner must be named.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from .errors import UsageError

STDIO = "-"
_FD = re.compile(r"fd:(\d{1,6})(?:,(\d{1,6}))?")
_RECEIVE = re.compile(r"\bpageferry\s+receive\s")
# What may have to close behind a remote command: it may be in quotes, in others.
_ENDS = ("", "'", '"', "\"'", "'\"")
# What a receiver is called, where a person may copy it into a shell.
_PLAIN = re.compile(r"@?[\w./-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class Stream:
    """One byte stream. `command`: what runs at its other end; else descriptors of this process,
    `writes` -1 if one is to go both ways (0 that cannot has 1 beside it)."""

    command: str = ""
    reads: int = -1
    writes: int = -1
    shown: str = field(default="", compare=False)  # as it was given, if it has moved since

    def __str__(self) -> str:
        if self.shown:
            return self.shown
        if self.command:
            return f"exec:{self.command}"
        if (self.reads, self.writes) == (0, 1):
            return STDIO
        return f"fd:{self.reads}" + (f",{self.writes}" if self.writes >= 0 else "")

    @property
    def stdio(self) -> bool:
        """It uses what this process was given as stdin or stdout."""
        return bool({self.reads, self.writes} & {0, 1})


def is_stream(text: str) -> bool:
    """Whether `text` means to be one."""
    return text == STDIO or text.startswith(("exec:", "fd:"))


def parse_stream(text: str) -> Stream:
    """`text` as a stream, or UsageError that shows the form."""
    if text == STDIO:
        return Stream(reads=0, writes=1)
    if text.startswith("exec:"):
        command = text[5:].strip()
        if not command or "\0" in command:
            raise UsageError(
                f"{text!r} names no command: write exec:COMMAND, as in 'exec:ssh HOST pageferry "
                f"receive --into image:vm.mem -'"
            )
        return Stream(command)
    match = _FD.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no stream: write exec:COMMAND, fd:N, fd:READ,WRITE or -")
    reads, writes = int(match[1]), int(match[2]) if match[2] else -1
    if 2 in (reads, writes):
        raise UsageError(f"{text!r}: descriptor 2 is stderr, where messages go")
    return Stream(reads=reads, writes=writes)


def recover_words(stream: Stream, peer: str) -> str:
    """What to give `pageferry recover MONITOR`, as a shell takes it, to reach the receiver that was
    at the other end of `stream` and listens at the path `peer` of its host; "": nothing, the
    command is started again. What cannot be known is in capitals."""
    if not _PLAIN.fullmatch(peer):  # it is a peer's word
        raise UsageError("what the receiver is called is no name of pageferry's")
    if re.search(r"\bpageferry\s+relay\s", stream.command):
        return ""
    relay = f"pageferry relay ipc://{peer}"
    if (match := _RECEIVE.search(stream.command)) is not None:
        for end in _ENDS:
            command = f"{stream.command[: match.start()]}{relay}{end}"
            if _closes(command, relay):
                return shlex.quote(f"exec:{command}")
    return shlex.quote(f"exec:ssh HOST {relay}")


def _closes(command: str, relay: str) -> bool:
    """Whether all quotes of it match, and those of a command in it that has `relay`, which another
    shell will read."""
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return all(_closes(word, relay) for word in words if relay in word and word != command)
