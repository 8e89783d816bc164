"""demo:, the bundled guest, from the outside: start it, stop it, ask it.

`demo:?size=512M&rate=20000&content=text`: `rate` in pages a second (0: as fast as it can),
content zero, text or random. The guest's process is demo_process.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from typing import Any

import msgspec

from ...transport.errors import PeerRefused, RemoteProtocolError, SourceError, UsageError
from ...transport.messages import Block, Hello
from ...transport.pages import PAGE_SIZE, Runs
from ...transport.quantities import parse_size
from ..forking import start_process
from ..kernel.pagemap import PagemapScanner
from ..ram import RamBlock, RamFile
from ..segments import Segment
from .base import TRACKING_HASH, TRACKING_PAGEMAP, DestinationGuest, SourceGuest
from .demo_process import CONTENTS, Answer, Command, Registers, Verdict
from .demo_process import main as guest_main
from .handover import HandoverSocket
from .uri import GuestUri

_DEFAULT_SIZE = "256M"
_DEFAULT_RATE = 20_000
# After a migration the guest runs on for this long before it is checked.
RUN_ON_SECONDS = 1.0
_ANSWER_SECONDS = 60.0


class GuestProcess:
    """A demo guest and the memory it owns. The coordinator only keeps the name of it."""

    def __init__(self, size: int, registers: Registers, handover: str = "") -> None:
        self.segment = Segment(size, "demo", reserve=False)
        self._ours, theirs = multiprocessing.Pipe()
        try:
            self.process = start_process(
                guest_main, (theirs, self.segment, registers, handover), "pageferry-demo"
            )
        except BaseException:
            self._ours.close()
            self.segment.close()
            raise
        finally:
            theirs.close()
        path = f"/dev/shm/{self.segment.name}"
        self.file = RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)

    def ask(self, what: str, registers: Registers | None = None) -> Answer:
        """One command, one answer; SourceError if the guest is gone."""
        try:
            self._ours.send_bytes(msgspec.msgpack.encode(Command(what, registers)))
            if not self._ours.poll(_ANSWER_SECONDS):
                raise SourceError("the demo guest does not answer")
            return msgspec.msgpack.decode(self._ours.recv_bytes(), type=Answer)
        except (EOFError, OSError) as e:
            raise SourceError("the demo guest is gone") from e

    def close(self) -> None:
        """End the guest and its memory. Idempotent."""
        if self._ours.closed:
            return
        with contextlib.suppress(OSError):
            self._ours.send_bytes(msgspec.msgpack.encode(Command("quit")))
        self._ours.close()
        self.process.join(1.0)
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGKILL)
            self.process.join()
        self.process.close()
        self.file.close()
        self.segment.close()


class DemoSource(SourceGuest):
    """A demo guest, started for the occasion and running."""

    kind = "demo"
    live = True
    running = True
    can_stop = True

    def __init__(self, uri: GuestUri) -> None:
        size = parse_size(uri.options.get("size", _DEFAULT_SIZE))
        content = uri.options.get("content", "random")
        if content not in CONTENTS:
            raise UsageError(f"demo: content is one of {', '.join(CONTENTS)}, not {content!r}")
        if size < PAGE_SIZE or size % PAGE_SIZE:
            raise UsageError(f"demo: size must be a multiple of {PAGE_SIZE} bytes")
        registers = Registers(
            0, 0, uri.integer("rate", _DEFAULT_RATE), content, uri.integer("seed", 1)
        )
        self.image_size = size
        self._scanner: PagemapScanner | None = None
        self._uffd = -1
        handover = HandoverSocket()
        try:
            self._guest = GuestProcess(size, registers, handover.path)
            try:
                mappings, descriptors = handover.accept()
                self._attach(mappings[0].base_host_virt_addr, descriptors)
            except BaseException:
                self._guest.close()
                raise
        finally:
            handover.close()
        self.blocks = [RamBlock(Block("demo.ram", size), self._guest.file, 0)]
        self._stopped = False
        self._guest.ask("run")

    def _attach(self, base: int, descriptors: list[int]) -> None:
        self._base = base
        if not descriptors:
            self.tracking = TRACKING_HASH
            return
        self.tracking = TRACKING_PAGEMAP
        self._uffd = descriptors[0]
        self._scanner = PagemapScanner(self._guest.process.pid or 0)

    def start_tracking(self) -> None:
        if self._scanner is not None:
            self._scanner.collect(self._base, self.image_size)

    def dirty_pages(self, block: int) -> Runs:
        assert self._scanner is not None
        return self._scanner.collect(self._base, self.image_size)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True  # first: if the answer is lost, resume must not be a no-op
            self._registers = self._guest.ask("stop").registers

    def resume(self) -> None:
        if self._stopped:
            self._guest.ask("run")
            self._stopped = False

    def save_state(self) -> bytes:
        return msgspec.msgpack.encode(self._registers)

    def check(self) -> Verdict:
        """Stop and ask the oracle: for tests that leave the guest here."""
        self.stop()
        verdict = self._guest.ask("check").verdict
        assert verdict is not None
        return verdict

    def close(self) -> None:
        self._guest.close()
        if self._scanner is not None:
            self._scanner.close()
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1


class DemoDestination(DestinationGuest):
    """A demo guest that waits for its memory and registers."""

    kind = "demo"

    def __init__(self, uri: GuestUri) -> None:
        self._guest: GuestProcess | None = None

    def lay_out(self, hello: Hello) -> None:
        if hello.kind != "demo" or len(hello.blocks) != 1:
            raise PeerRefused(f"a {hello.kind}: guest cannot go on as a demo: guest", field="kind")
        spec = hello.blocks[0]
        self._guest = GuestProcess(spec.size, Registers(0, 0, 0, "zero", 0))
        self.blocks = [RamBlock(spec, self._guest.file, 0)]
        self.fresh = [True]

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        assert self._guest is not None
        try:
            registers = msgspec.msgpack.decode(state, type=Registers)
        except msgspec.DecodeError as e:
            raise RemoteProtocolError(f"demo registers that make no sense: {e}") from e
        if registers.content not in CONTENTS:
            raise RemoteProtocolError(f"demo registers with content {registers.content!r}")
        self._guest.ask("load", registers)

    def run(self) -> str:
        assert self._guest is not None
        self._guest.ask("run")
        return f"demo: (process {self._guest.process.pid})"

    def conclude(self) -> dict[str, Any]:
        """Let it run on, stop it, ask the oracle."""
        assert self._guest is not None
        time.sleep(RUN_ON_SECONDS)
        self._guest.ask("stop")
        verdict = self._guest.ask("check").verdict
        return {"oracle": msgspec.to_builtins(verdict)}

    def discard(self) -> None:
        self.close()

    def close(self) -> None:
        if self._guest is not None:
            self._guest.close()
