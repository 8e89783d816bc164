"""`--trace FILE`: gathers what coordinators and workers did, and writes it while it goes on.

A Trace is one file with one thread, which looks into all rings ten times a second, makes events of
what it finds (trace_events.py) and appends them: memory is bounded, and what was written is there
whoever is killed. A Lane is one end of one migration in it. What cannot be written later, or finds
no room, is dropped and told; no migration fails of its trace.

Imported only where there is a trace (tracing.py). Decides nothing.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

from .._version import __version__
from ..transport.errors import UsageError
from ..workers.trace_records import RECORD
from ..workers.tracing import Reader
from . import trace_events as events

LOOK_SECONDS = 0.1
# Events of coordinators, and rings of workers that ended, that are not written yet: 64 MiB at most.
_MOST_WAITING = 50_000
_MOST_BYTES = 64 << 20
# Records made into events at once. That takes a millisecond; then everybody else has a turn with
# the interpreter, for no event loop is to wait for a trace (it would for 5 ms each time).
_PIECE = 512 * RECORD.size
_TURN_SECONDS = 0.0001
# The lines of a lane, from the top.
LINES = ("states", "rounds", "work", "control")
# Where processes are drawn: the way that pages go.
_ORDER = {
    "sender": 100, "postcopy": 200, "receiver": 300, "fault": 400, "saver": 500, "guard": 600,
}  # fmt: skip
_log = logging.getLogger("pageferry.trace")


def _open(path: str, memory: tuple[str, ...]) -> IO[bytes]:
    real = os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isfile(real):
        raise UsageError(f"--trace {path}: that is no file: name one that may be written")
    if any(_same(real, other) for other in memory if other):
        raise UsageError(f"--trace {path}: that is the memory that moves: name another file")
    try:
        return open(real, "wb")
    except OSError as e:
        raise UsageError(f"--trace {path} cannot be written: {e.strerror}") from e


def _same(real: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(real, other)
    return real == os.path.realpath(other)


@dataclass
class _Ring:
    """The ring of one process. `lost`: records of it that found no room, as far as is told."""

    reader: Reader
    name: str
    scope: str
    lost: int


class Trace:
    """One file. Its methods may be called from any thread."""

    def __init__(self, path: str, memory: tuple[str, ...] = ()) -> None:
        self.path = path
        self._file = _open(path, memory)
        # what was compressed at each look can be read, whatever comes later
        self._out: IO[bytes] = (
            gzip.GzipFile(fileobj=self._file, mode="wb", compresslevel=1)  # type: ignore[assignment]
            if path.endswith(".gz")
            else self._file
        )
        self._between = events.BEGIN_FILE
        self._lock = threading.Lock()
        self._rings: dict[int, _Ring] = {}
        self._waiting: deque[str | tuple[bytes, int, str]] = deque()
        self._bytes = 0  # in rings that wait
        self._lost = self._ids = 0
        self._broken = False
        self._lines = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pageferry-trace", daemon=True)
        self._introduce()
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Trace {self.path}>"

    def _introduce(self) -> None:
        pid, now = os.getpid(), time.monotonic_ns()
        wall = time.time_ns()
        name = f"coordinator on {os.uname().nodename}"
        self.note(*events.process_name(pid, name, 0))
        # how files of two hosts are laid over each other: docs/trace.md
        told = {
            "wall-clock": datetime.fromtimestamp(wall / 1e9, UTC).isoformat(),
            "wall-clock-us": wall // 1000,
            "monotonic-us": now // 1000,
            "pageferry": __version__,
        }
        self.note(events.mark("trace begins", "trace", now, pid, pid, told))

    def lines(self, name: str) -> int:
        """Numbers for the lines of one lane more: as many as LINES from this on, named."""
        with self._lock:
            first, self._lines = self._lines + 1, self._lines + len(LINES)
        for at, line in enumerate(LINES):
            self.note(*events.line_name(os.getpid(), first + at, f"{name}: {line}"))
        return first

    def lane(self, name: str, scope: str, prefix: str) -> Lane:
        """One more end of a migration."""
        return Lane(self, name, scope, prefix)

    def note(self, *told: str) -> None:
        """Events that are ready."""
        with self._lock:
            if len(self._waiting) + len(told) > _MOST_WAITING:
                self._lost += len(told)
                return
            self._waiting.extend(told)

    def began(self, name: str, pid: int, ring: Reader, scope: str, shown: str) -> None:
        """A worker has a ring; `shown`: what its process is called."""
        self.note(*events.process_name(pid, shown, _ORDER.get(name.partition("-")[0], 900)))
        with self._lock:
            self._rings[pid] = _Ring(ring, shown, scope, ring.dropped)

    def ended(self, pid: int) -> None:
        """The worker was waited for; afterwards nobody looks at its ring any more."""
        with self._lock:
            ring = self._rings.pop(pid, None)
            if ring is not None:
                self._take(pid, ring, ended=True)

    def _take(self, pid: int, ring: _Ring, *, ended: bool = False) -> None:
        """Queue what is in a ring. With the lock held."""
        records = ring.reader.take(ended=ended)
        if self._bytes + len(records) > _MOST_BYTES:
            self._lost += len(records) // RECORD.size
        elif records:
            self._waiting.append((records, pid, ring.scope))
            self._bytes += len(records)
        if (lost := ring.reader.dropped) != ring.lost:
            told = {"events": lost - ring.lost}
            ring.lost, self._lost = lost, self._lost + lost - ring.lost
            self._waiting.append(
                events.mark("events lost", "trace", time.monotonic_ns(), pid, pid, told)
            )

    # ---- the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._look()

    def _collect(self) -> deque[str | tuple[bytes, int, str]]:
        """All that is there, to be written."""
        with self._lock:
            for pid, ring in self._rings.items():
                self._take(pid, ring)
            waiting, self._waiting = self._waiting, deque()
            self._bytes = 0
        return waiting

    def _look(self) -> None:
        waiting = self._collect()
        if not waiting or self._broken:
            return
        try:
            self._write(waiting)
        except Exception as e:
            self._broken = True
            _log.warning("the trace %s ends here, it could not be written: %s", self.path, str(e))

    def _write(self, waiting: deque[str | tuple[bytes, int, str]]) -> None:
        ready: list[str] = []
        for what in waiting:
            if isinstance(what, str):
                ready.append(what)
                continue
            records, pid, scope = what
            for at in range(0, len(records), _PIECE):
                piece = records[at : at + _PIECE]
                self._append(events.worker_events(piece, pid, scope, self._ids))
                self._ids += _PIECE // RECORD.size
                time.sleep(_TURN_SECONDS)
        self._append(ready)
        self._out.flush()  # gzip's is a sync flush
        self._file.flush()

    def _append(self, told: list[str]) -> None:
        if told:
            self._out.write((self._between + events.BETWEEN.join(told)).encode())
            self._between = events.BETWEEN

    def close(self) -> None:
        """Write what there is, end the file. Blocks for as long as that takes."""
        self._over.set()
        self._thread.join()
        pid = os.getpid()
        told = {"events-lost": self._lost}
        self.note(events.mark("trace ends", "trace", time.monotonic_ns(), pid, pid, told))
        self._look()
        try:
            if not self._broken:
                self._out.write(events.END_FILE.encode())
            self._out.close()
            self._file.close()
        except OSError as e:
            if not self._broken:
                _log.warning("the trace %s was not written to its end: %s", self.path, e)
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._lost:
            _log.warning("the trace %s lacks %d events: no room for them", self.path, self._lost)


class Lane:
    """One end of one migration: lines of the coordinator, and the workers of its pools (it is their
    Recorder). `name`: what is before the names of lines; `scope`: what is the same at both ends."""

    def __init__(self, trace: Trace, name: str, scope: str, prefix: str) -> None:
        self._trace, self._scope, self._prefix = trace, scope, prefix
        self._pid = os.getpid()
        self._first = trace.lines(f"{prefix}{name}")

    def began(self, name: str, pid: int, ring: Reader) -> None:
        self._trace.began(name, pid, ring, self._scope, f"{self._prefix}{name}")

    def ended(self, pid: int) -> None:
        self._trace.ended(pid)

    def begins(self, line: str, name: str, **args: Any) -> None:
        """A bar on `line`, one of LINES."""
        self._note(events.begins, line, name, args)

    def ends(self, line: str, name: str, **args: Any) -> None:
        self._note(events.ends, line, name, args)

    def mark(self, line: str, name: str, **args: Any) -> None:
        self._note(events.mark, line, name, args)

    def _note(self, event: Any, line: str, name: str, args: dict[str, Any]) -> None:
        at = self._first + LINES.index(line)
        self._trace.note(event(name, line, time.monotonic_ns(), self._pid, at, args))
