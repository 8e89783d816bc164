"""A process that writes guest memory: stand still, go on, and has it ended?

By the cgroup v2 freezer where the process has a cgroup to itself, else by SIGSTOP. One that stands
still already is left as it is. Knows nothing of memory.

What has been handed to a device goes on when no thread does: see the limits in tracking.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from ...transport.errors import SourceError, UsageError
from ..kernel.freezer import Freezer, freezer_of, is_frozen
from ..kernel.tasks import turns_of
from ..leftovers import STOPPED, stopped_note, stopped_to_be_saved
from ..names import SHARED_MEMORY, shared_name
from ..throttled import stopped_now_and_then

_STOP_SECONDS = 2.0
_POLL_SECONDS = 0.0005


class WriterProcess:
    """Process `pid`. Held by its descriptor (pidfd_open(2)): the number may be given to another
    when it has ended. Raises SourceError if there is none, or if it is not ours to stop."""

    def __init__(self, pid: int) -> None:
        if pid == os.getpid():
            raise UsageError("pid must be that of the process that writes the memory")
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as e:
            raise SourceError(f"there is no process {pid}") from e
        self.pid = pid
        self._still = False  # from stop() to resume()
        self._freezer: Freezer | None = None
        self._signalled = False
        self._note = ""  # for whoever comes when we were killed
        self.stays = False  # it is saved and no more: whatever comes, it goes on here

    def __repr__(self) -> str:
        return f"<WriterProcess {self.pid}>"

    def has_ended(self) -> bool:
        """True for a zombie too."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def stop(self) -> None:
        """No thread runs when this returns. SourceError if that cannot be; then `resume`.
        Idempotent."""
        if self._still or self.has_ended():
            return
        if note := stopped_now_and_then(self.pid):
            raise SourceError(
                f"somebody else slows process {self.pid} down ({note}): end that migration first "
                f"(pageferry cancel); if there is none, `pageferry clean`"
            )
        if self._stands_still():
            self._refuse_another_s_moment()
        elif not self._freeze():
            self._send_stop()
        if self._note and self.stays:
            self._write_note(turns_of(self.pid))  # by which this stop is known from a later one
        self._still = True

    def _refuse_another_s_moment(self) -> None:
        """Whoever saves it lets it go on, and if he was killed the next start does."""
        if note := stopped_to_be_saved(self.pid):
            raise SourceError(
                f"somebody else has stopped process {self.pid} to save it ({note}): wait for that "
                f"snapshot; if there is none, `pageferry clean` (of its user) lets it go on"
            )

    def _freeze(self) -> bool:
        """False if it has no freezer to itself."""
        freezer = freezer_of(self.pid)
        if freezer is None:
            return False
        self._freezer = freezer  # first: whatever comes, resume thaws
        self._write_note()
        try:
            freezer.freeze(_STOP_SECONDS)
        except TimeoutError as e:
            raise SourceError(f"process {self.pid} does not freeze ({freezer.folder})") from e
        except OSError:  # we may not, after all
            with contextlib.suppress(OSError):
                freezer.thaw()
            self._freezer = None
            return False
        if freezer.is_its_own() or self.has_ended():
            return True
        freezer.thaw()  # it was moved to another cgroup just now, or has got company
        self._freezer = None
        return False

    def _send_stop(self) -> None:
        self._signalled = True
        self._write_note()
        self._signal(signal.SIGSTOP)
        until = time.monotonic() + _STOP_SECONDS
        while not self._all_stopped():
            if time.monotonic() > until:
                raise SourceError(f"process {self.pid} does not stop")
            time.sleep(_POLL_SECONDS)

    def _write_note(self, turns: int = 0) -> None:
        """Say that it is us who stop it: `pageferry clean` shows it, if we cannot any more. The one
        before is there until the new one is whole."""
        path = f"{SHARED_MEMORY}/{shared_name(STOPPED)}"
        folder = str(self._freezer.folder) if self._freezer is not None else ""
        try:
            with open(path, "x") as note:
                note.write(stopped_note(self.pid, folder, stays=self.stays, turns=turns))
        except OSError:  # no reason not to move it
            with contextlib.suppress(OSError):
                os.unlink(path)
            return
        self._drop_note()
        self._note = path

    def _drop_note(self) -> None:
        with contextlib.suppress(OSError):
            if self._note:
                os.unlink(self._note)
        self._note = ""

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass  # it ended: nobody writes any more
        except PermissionError as e:
            raise SourceError(f"not allowed to stop process {self.pid}") from e

    def _stands_still(self) -> bool:
        return self._all_stopped() or is_frozen(self.pid)

    def _all_stopped(self) -> bool:
        """By a signal or a tracer; True if it has ended. Threads may be made until one is seen to
        have stopped: so they are listed before and after."""
        tasks = self._tasks()
        return all(self._state(task) in "TtZX" for task in tasks) and self._tasks() == tasks

    def _tasks(self) -> list[str]:
        try:
            return sorted(os.listdir(f"/proc/{self.pid}/task"))
        except OSError:
            return []

    def _state(self, task: str) -> str:
        try:
            with open(f"/proc/{self.pid}/task/{task}/stat") as f:
                return f.read().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    def resume(self) -> None:
        """Undo what `stop` did: one that stood still before stays so. Idempotent."""
        self._still = False
        if self._freezer is not None:
            self._freezer.thaw()
            self._freezer = None
        if self._signalled:
            self._signalled = False
            self._signal(signal.SIGCONT)
        self._drop_note()

    def check(self) -> None:
        """SourceError if somebody let it go on after `stop`: it would run twice, and what it has
        written since would be lost."""
        if self._still and not self._stands_still():
            raise SourceError(
                f"somebody let process {self.pid} go on while it was being moved: start again"
            )

    @property
    def stands_still(self) -> bool:
        """Since `stop`, as far as we know."""
        return self._still

    @property
    def ran(self) -> bool:
        """Whether it was `stop` that made it stand still."""
        return self._freezer is not None or self._signalled

    def describe(self) -> str:
        """What was done to it, and what must not be done now."""
        if not self._still:
            return "runs"
        if self.has_ended():
            return "has ended"
        if self._freezer is not None:
            return (
                f"frozen ({self._freezer.folder}); 0 in its cgroup.freeze would let it run a "
                f"second time"
            )
        if self._signalled:
            return "stopped (SIGSTOP); SIGCONT would let it run a second time"
        return "stood still before; if it went on it would run a second time"

    def close(self) -> None:
        """Leave it as it is. Idempotent; of use no more."""
        self._drop_note()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
