"""What has become of a batch, in one SQLite file that survives a kill -9 at any moment.

Each change is one transaction: it is there or it is not. Outcomes are on disk before anybody is
told; what says only that something runs need not be, for losing it costs a start that is made
again. The file has the items as they were given, so it is all that a resume needs. WAL
(sqlite.org/wal.html): whoever asks how it goes never waits for who writes, nor the other way round.

Knows nothing of migrations, plans and displays. The only module that imports sqlite3.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..transport.errors import DestinationError, PageferryError, UsageError
from ..workers.kernel.libc import lock_file
from .manifest import Item, Manifest, Policy
from .planner import State

# "pfry"; file(1) and we tell it from other databases by this.
_APPLICATION = 0x70667279
_VERSION = 1
_SCHEMA = """
CREATE TABLE batch (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    created REAL NOT NULL,
    policy TEXT NOT NULL,
    owner TEXT NOT NULL
) STRICT;
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    item TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    switching INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    report TEXT,
    ended REAL
) STRICT;
"""
# Others hold the file's lock for one transaction at most.
_PATIENCE_SECONDS = 30.0
LOST_TRACK = (
    "pageferry ended while this guest was being handed over: look where it runs. If that is here, "
    "`batch resume --retry NAME` moves it again"
)
# After these a guest may run at its destination: only somebody who has looked may try again.
_IN_DOUBT = ("ConfirmationLost", "PostcopyFailed")


@dataclass(frozen=True)
class Row:
    """An item and what has become of it. `attempts`: how often it was started; `failures`: how
    often it failed since it was last tried anew; `error`, `report`: of its last end; `ended`:
    seconds since the epoch."""

    number: int
    item: Item
    state: State
    attempts: int
    failures: int
    error: dict[str, Any] | None
    report: dict[str, Any] | None
    ended: float | None


class BatchState:
    """The state of one batch, and this process its only owner. Methods may be called from any
    thread, one at a time; they block for as long as the disk takes. PageferryError if it fails."""

    def __init__(self, path: str, manifest: Manifest | None) -> None:
        """Make the file at `path` for a new batch, or with None take up the one that is there.
        UsageError if it is no such file, or somebody else works on it."""
        self.path = path
        self._mutex = threading.Lock()
        self._db: sqlite3.Connection | None = None
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if manifest is not None else 0)
            self._fd = os.open(path, flags, 0o600)
        except OSError as e:
            raise UsageError(f"cannot open the state {path}: {e.strerror}") from e
        try:
            # flock(2): it ends with this process, however that ends. SQLite's own locks are of
            # another kind, and are lost when *any* descriptor of the file is closed (fcntl(2)): so
            # this one is open for longer than the database.
            if not lock_file(self._fd):
                raise UsageError(
                    f"somebody works on the batch in {path} already: "
                    f"`pageferry batch status --state {path}` shows it"
                )
            with _clear_errors(path):
                self._db = _connect(path)
                if manifest is not None:
                    self._make(manifest)
                else:
                    _check(self._db, path)
                    self._take_up()
        except BaseException:
            self.close()
            raise

    def _make(self, manifest: Manifest) -> None:
        assert self._db is not None
        # of ours, and without a version: somebody was killed before it was one
        if os.fstat(self._fd).st_size and _identity(self._db) != (_APPLICATION, 0):
            raise UsageError(
                f"{self.path} is there already: `pageferry batch resume --state {self.path}` goes "
                f"on with a batch; else remove it, or name another with --state"
            )
        self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._db.execute("PRAGMA journal_mode = WAL")
        with self._change() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(
                "INSERT INTO batch VALUES (1, ?, ?, ?)",
                (time.time(), _text(manifest.policy), json.dumps(_me())),
            )
            db.executemany(
                "INSERT INTO items (number, item, state) VALUES (?, ?, ?)",
                (
                    (number, _text(item), State.PENDING.value)
                    for number, item in enumerate(manifest.items)
                ),
            )
            # last, so that a file without it was never a batch
            db.execute(f"PRAGMA user_version = {_VERSION}")

    def _take_up(self) -> None:
        """What ran when the last owner ended is to run again. But a live guest that was being
        handed over may run at its destination, and no guest may run twice."""
        error = json.dumps({"class": "ConfirmationLost", "message": LOST_TRACK})
        with self._change() as db:
            db.execute("UPDATE batch SET owner = ?", (json.dumps(_me()),))
            db.execute(
                "UPDATE items SET state = ?, switching = 0, error = ?, ended = ? "
                "WHERE state = ? AND switching",
                (State.FAILED.value, error, time.time(), State.RUNNING.value),
            )
            db.execute(
                "UPDATE items SET state = ? WHERE state IN (?, ?)",
                (State.PENDING.value, State.RUNNING.value, State.WAITING.value),
            )

    # ---- what has become of it -----------------------------------------------------------

    @property
    def policy(self) -> Policy:
        with self._mutex, _clear_errors(self.path):
            return _policy(self._open)

    @policy.setter
    def policy(self, policy: Policy) -> None:
        with self._change() as db:
            db.execute("UPDATE batch SET policy = ?", (_text(policy),))

    def rows(self) -> list[Row]:
        """All items, in their order."""
        with self._mutex, _clear_errors(self.path):
            return _rows(self._open)

    # ---- changes -------------------------------------------------------------------------

    def started(self, number: int) -> None:
        """It runs, for one time more."""
        with self._change(durable=False) as db:
            db.execute(
                "UPDATE items SET state = ?, attempts = attempts + 1, switching = 0 "
                "WHERE number = ?",
                (State.RUNNING.value, number),
            )

    def switching(self, number: int) -> None:
        """It is a live guest that is being handed over: from here on it may run elsewhere."""
        with self._change(durable=False) as db:
            db.execute("UPDATE items SET switching = 1 WHERE number = ?", (number,))

    def ended(
        self,
        number: int,
        state: State,
        failures: int,
        error: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """It does not run any more; on disk when this returns."""
        with self._change() as db:
            db.execute(
                "UPDATE items SET state = ?, failures = ?, error = ?, report = ?, ended = ?, "
                "switching = 0 WHERE number = ?",
                (
                    state.value, failures, None if error is None else json.dumps(error),
                    None if report is None else json.dumps(report), time.time(), number,
                ),
            )  # fmt: skip

    def forgive(self, names: Collection[str] | None = None) -> None:
        """What has failed for good is pending again, as if it had never been tried: items called
        one of `names`, or all that cannot run at their destination. UsageError if a name is of no
        item that failed."""
        failed = [row for row in self.rows() if row.state is State.FAILED]
        if names is None:
            chosen = [r for r in failed if r.error is None or r.error["class"] not in _IN_DOUBT]
        else:
            chosen = [row for row in failed if row.item.name in names]
            for name in set(names) - {row.item.name for row in chosen}:
                raise UsageError(f"no item that failed is called {name!r}")
        with self._change() as db:
            db.executemany(
                "UPDATE items SET state = ?, failures = 0 WHERE number = ?",
                [(State.PENDING.value, row.number) for row in chosen],
            )

    @property
    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise PageferryError("the state of the batch is closed")
        return self._db

    @contextlib.contextmanager
    def _change(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction. `durable`: it survives a power cut too, not only a kill."""
        with self._mutex, _clear_errors(self.path):
            db = self._open
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Idempotent."""
        with self._mutex:
            if self._db is not None:
                self._db.close()
                self._db = None
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


@dataclass(frozen=True)
class Snapshot:
    """A batch as somebody sees it who does not own it. `created`: seconds since the epoch;
    `owner`: the process that works on it; None if none does."""

    created: float
    policy: Policy
    owner: int | None
    rows: Sequence[Row]


def look(path: str) -> Snapshot:
    """The batch in the file at `path`, whoever works on it. UsageError if there is none."""
    if not os.path.isfile(path):
        raise UsageError(f"there is no state of a batch at {path}")
    with _clear_errors(path), contextlib.closing(_connect(path)) as db:
        _check(db, path)
        db.execute("BEGIN")  # all of one moment
        created, owner = db.execute("SELECT created, owner FROM batch").fetchone()
        pid, started = json.loads(owner)
        alive = started != 0 and _start_of(pid) == started
        return Snapshot(created, _policy(db), pid if alive else None, _rows(db))


# ---- details -------------------------------------------------------------------------------


def _connect(path: str) -> sqlite3.Connection:
    """Never makes a file. Transactions are said in words."""
    uri = f"{Path(os.path.abspath(path)).as_uri()}?mode=rw"
    return sqlite3.connect(
        uri, timeout=_PATIENCE_SECONDS, isolation_level=None, check_same_thread=False, uri=True
    )


@contextlib.contextmanager
def _clear_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, msgspec.DecodeError, ValueError) as e:
        if isinstance(e, sqlite3.OperationalError):  # a full disk, a permission
            raise DestinationError(f"cannot keep the state of the batch in {path}: {e}") from e
        raise UsageError(f"{path} is no state of a batch, or is damaged: {e}") from e


def _identity(db: sqlite3.Connection) -> tuple[int, int]:
    """Whose file it is, and its version."""
    names = ("application_id", "user_version")
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return application, version


def _check(db: sqlite3.Connection, path: str) -> None:
    application, version = _identity(db)
    if application != _APPLICATION or not version:
        raise UsageError(f"{path} is no state of a batch")
    if version != _VERSION:
        raise UsageError(
            f"the state in {path} has version {version}, and this pageferry knows {_VERSION}: go "
            f"on with the one that began it"
        )


def _text(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _policy(db: sqlite3.Connection) -> Policy:
    (text,) = db.execute("SELECT policy FROM batch").fetchone()
    return msgspec.json.decode(text, type=Policy)


def _rows(db: sqlite3.Connection) -> list[Row]:
    found = db.execute(
        "SELECT number, item, state, attempts, failures, error, report, ended FROM items "
        "ORDER BY number"
    )
    decoder = msgspec.json.Decoder(Item)
    return [
        Row(
            number, decoder.decode(item), State(state), attempts, failures,
            None if error is None else json.loads(error),
            None if report is None else json.loads(report), ended,
        )
        for number, item, state, attempts, failures, error, report, ended in found
    ]  # fmt: skip


def _me() -> tuple[int, int]:
    return os.getpid(), _start_of(os.getpid())


def _start_of(pid: int) -> int:
    """When a process began, in clock ticks since boot (proc_pid_stat(5)): a number is used again.
    0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # the name in parentheses may hold anything
    return int(text.rpartition(")")[2].split()[19])
