"""pid:PID, the shared memory of a running process, unmodified and unasked.

On the wire it is what ram: is: memory and nothing else. Registers, descriptors and private memory
of the process are not moved: that is CRIU's trade.

The kernel notes what the process writes (tracking.py), as long as it does so through a mapping that
was there when we looked. What it writes by write(2), what other processes write, and mappings that
come and go between two looks are not in that: so senders keep hashes of what they sent, and when
the process stands still all memory is compared with them. What is in the file then is moved,
whoever wrote it.

Two limits. What the process has given to a device and does not wait for (io_uring or libaio that
read with O_DIRECT, RDMA) may still be written after it stands still: nobody can be asked when that
has ended, and what comes after the page was read is lost. And other processes are not stopped: one
that maps the memory writable is refused at the start; one that maps it later, or writes the file by
write(2) after the stop, is not seen.
"""

from __future__ import annotations

import os
from typing import Any

from ...transport.errors import AttachError, HostLacks, SourceError
from ...transport.messages import Block
from ...transport.pages import Runs
from ..kernel.freezer import is_frozen
from ..ram import RamBlock, RamFile
from .base import TRACKING_HASH, TRACKING_PAGEMAP, ArmedMemory, SourceGuest
from .process_memory import open_memory, refuse_other_writers
from .protecting import protect_process
from .slowing import MEANS, Slowing
from .stopping import WriterProcess
from .tracking import WriteTracker
from .uri import GuestUri

_NOT_MOVED = "registers, descriptors and private memory of the process (CRIU moves these)"


class ProcessSource(SourceGuest):
    """A process whose shared memory is to leave."""

    kind = "ram"
    live = True
    can_stop = True
    can_throttle = True
    running = True
    tracking = TRACKING_HASH

    def __init__(self, uri: GuestUri) -> None:
        how = uri.choice("tracking", (TRACKING_PAGEMAP, TRACKING_HASH))
        by = uri.choice("throttle", MEANS)
        self._process = WriterProcess(int(uri.rest))
        self._slowing = Slowing(self._process.pid, by)
        self.process = self._process.pid
        self._file: RamFile | None = None
        self._tracker: WriteTracker | None = None
        self._facts: dict[str, Any] = {}
        try:
            self._file = open_memory(self._process.pid, uri.options.get("mapping", ""))
            self.image_size = os.fstat(self._file.fd).st_size
            self.blocks = [RamBlock(Block("ram", self.image_size), self._file, 0)]
            refuse_other_writers(self._process.pid, self._file)
            self._track(how)
            self.check()  # its number was its own all the time
        except BaseException:
            self.close()
            raise

    def _track(self, how: str) -> None:
        """By the kernel if that can be, else by content: then the statistics say why."""
        assert self._file is not None
        if how == TRACKING_HASH:
            return
        try:
            if is_frozen(self._process.pid):
                raise AttachError(
                    f"process {self._process.pid} is frozen: it cannot be attached to",
                    reason="frozen",
                )
            tracker = WriteTracker(self._process.pid, [self._file], moving=True)
            self._tracker = tracker
            tracker.prepare()
        except (AttachError, HostLacks) as e:
            if how or e.data.get("reason") in ("gone", "zombie"):
                raise
            if self._tracker is not None:
                self._tracker.close()
                self._tracker = None
            self._facts = {"dirty-tracking-because": e.message}
            return
        self.tracking = TRACKING_PAGEMAP
        self.last_look_by_content = True
        self._facts = {"attach-pause-us": round(tracker.paused_seconds * 1e6)}

    def facts(self) -> dict[str, Any]:
        return self._facts

    def start_tracking(self) -> None:
        self._slowing.begin()
        if self._tracker is not None:
            self._tracker.start()

    def dirty_pages(self, block: int) -> Runs:
        assert self._tracker is not None
        try:
            return self._tracker.written(block)
        except SourceError:
            self.check()  # its end explains it better
            raise

    def written_so_far(self) -> int | None:
        return self._tracker.so_far() if self._tracker is not None else None

    def throttle(self, percentage: int) -> None:
        if not self._process.stands_still:
            self._slowing.set(percentage)

    def slowed(self) -> dict[str, Any]:
        return self._slowing.meter.report()

    def protect(self) -> ArmedMemory:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        return protect_process(self._process.pid, self.blocks)

    def stop(self) -> None:
        self._slowing.release()
        self._process.stays = self.stays
        self._process.stop()
        self._slowing.lift()
        self.running = self._process.ran
        self.check()

    def resume(self) -> None:
        self._process.resume()

    def check(self) -> None:
        assert self._file is not None
        # Once it stands still nothing is lost if it is killed: the memory is in our descriptor.
        if not self._process.stands_still and self._process.has_ended():
            raise SourceError(
                f"process {self._process.pid} has ended: nothing was moved. If its memory has a "
                f"name ({self._file.name}), what it wrote last is in there: move it as ram:PATH"
            )
        self._process.check()
        self._slowing.check()
        if (size := os.fstat(self._file.fd).st_size) != self.image_size:
            raise SourceError(
                f"the memory {self._file.name} had {self.image_size} bytes and has {size} now: "
                f"start again"
            )

    def describe(self) -> dict[str, Any]:
        if not self._process.stands_still:
            return {}
        return {"source-process": self._process.describe(), "not-moved": _NOT_MOVED}

    def close(self) -> None:
        self._slowing.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._file is not None:
            self._file.close()
        self._process.close()
