"""demo:, the bundled guest, from the outside: start it, stop it, ask it.

`demo:?size=512M&rate=20000&content=text`: `rate` in pages a second (0: as fast as it can),
content zero, text or random. `access=random&vcpus=4`: pages in a pseudo-random order, by four
processors at once. `changes=64`: so many bytes of a page are written, not one; 4096: all of it.
`hugepages=2M`: its memory, here and there, is on pages of 2 MiB. `paused=yes`: it stands still, and
arrives so. The guest's process is demo_process.py.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from ...transport.errors import (
    GuestGone,
    HostLacks,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    UsageError,
)
from ...transport.messages import POSTCOPY, Block, Hello
from ...transport.pages import PAGE_SIZE, Runs
from ...transport.quantities import parse_size
from ..forking import start_process
from ..kernel.pagemap import PagemapScanner
from ..ram import RamBlock, RamFile
from ..segments import Segment
from .base import (
    TRACKING_HASH,
    TRACKING_PAGEMAP,
    ArmedMemory,
    DestinationGuest,
    Patience,
    Region,
    SourceGuest,
)
from .demo_process import (
    ACCESSES,
    CONTENTS,
    MAX_REGISTER,
    MAX_VCPUS,
    RANDOM,
    SEQUENTIAL,
    Answer,
    Command,
    Registers,
    Verdict,
)
from .demo_process import main as guest_main
from .handover import HandoverSocket
from .protecting import no_huge_pages
from .slowing import ASKED, Meter
from .states import DEMO, state_into, state_of
from .uri import GuestUri

_DEFAULT_SIZE = "256M"
_DEFAULT_RATE = 20_000
# After a migration the guest runs on for this long before it is checked.
RUN_ON_SECONDS = 1.0
_ANSWER_SECONDS = 60.0


HUGE_PAGE = 2 << 20
_HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def _huge_file(size: int) -> RamFile:
    """Memory on 2 MiB pages, reserved and not there yet (memfd_create(2) MFD_HUGETLB). Nobody
    has to unlink it."""
    try:
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB
        file = RamFile(os.memfd_create("pageferry-demo", flags), "demo memory on huge pages")
    except OSError as e:
        raise HostLacks(f"this host has no huge pages of 2 MiB: {e.strerror}") from e
    try:
        os.ftruncate(file.fd, size)
        file.mapping()  # reserves: a guest that finds none left later would die of SIGBUS
    except OSError as e:
        file.close()
        if e.errno != errno.ENOMEM:
            raise HostLacks(f"cannot map huge pages: {e.strerror}") from e
        raise HostLacks(_too_few(size // HUGE_PAGE)) from e
    return file


def _too_few(pages: int) -> str:
    total, free, reserved = (
        int((_HUGE_POOL / f"{name}_hugepages").read_text()) for name in ("nr", "free", "resv")
    )
    return (
        f"the guest needs {pages} huge pages of 2 MiB and {free - reserved} are free: "
        f"sysctl vm.nr_hugepages={total + pages - (free - reserved)}"
    )


class GuestProcess:
    """A demo guest and the memory it owns. The coordinator only keeps a descriptor of it."""

    def __init__(
        self,
        size: int,
        page_size: int,
        registers: Registers,
        handover: str = "",
        *,
        arriving: bool = False,
    ) -> None:
        self._segment: Segment | None = None
        self.patience = Patience()
        self.page_size = page_size
        self.file = self._make_memory(size)
        self._ours, theirs = multiprocessing.Pipe()
        try:
            self.process = start_process(
                guest_main,
                (theirs, self.file, page_size, registers, handover, arriving),
                "pageferry-demo",
            )
        except BaseException:
            self._ours.close()
            self._drop_memory()
            raise
        finally:
            theirs.close()

    def _make_memory(self, size: int) -> RamFile:
        if self.page_size == HUGE_PAGE:
            return _huge_file(size)
        self._segment = Segment(size, "demo", reserve=False)
        path = f"/dev/shm/{self._segment.name}"
        return RamFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)

    def _drop_memory(self) -> None:
        self.file.close()
        if self._segment is not None:
            self._segment.close()

    def ask(
        self, what: str, registers: Registers | None = None, path: str = "", percentage: int = 0
    ) -> Answer:
        """One command, one answer; SourceError if the guest is gone."""
        try:
            command = Command(what, registers, path, percentage)
            self._ours.send_bytes(msgspec.msgpack.encode(command))
            began = time.monotonic()
            while not self._ours.poll(Patience.LOOK_SECONDS):
                if self.patience.over(began, _ANSWER_SECONDS):
                    raise SourceError("the demo guest does not answer")
            return msgspec.msgpack.decode(self._ours.recv_bytes(), type=Answer)
        except (EOFError, OSError) as e:
            raise SourceError("the demo guest is gone") from e

    def has_ended(self) -> bool:
        return bool(multiprocessing.connection.wait([self.process.sentinel], 0))

    def close(self) -> None:
        """End the guest and its memory. Idempotent."""
        if self._ours.closed:
            return
        with contextlib.suppress(OSError):
            self._ours.send_bytes(msgspec.msgpack.encode(Command("quit")))
        self._ours.close()
        self.process.join(Patience.LEAST_SECONDS if self.patience.hurried else 1.0)
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGKILL)
            self.process.join()
        self.process.close()
        self._drop_memory()


def _registers(uri: GuestUri) -> Registers:
    """What a guest begins with."""
    content = uri.options.get("content", "random")
    access = uri.options.get("access", SEQUENTIAL)
    for name, value, known in (("content", content, CONTENTS), ("access", access, ACCESSES)):
        if value not in known:
            raise UsageError(f"demo: {name} is one of {', '.join(known)}, not {value!r}")
    rate, seed = uri.integer("rate", _DEFAULT_RATE), uri.integer("seed", 1)
    if max(rate, seed) > MAX_REGISTER:
        raise UsageError(f"demo: rate and seed are {MAX_REGISTER} at the most")
    vcpus = uri.integer("vcpus", 1)
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"demo: vcpus is 1 to {MAX_VCPUS}, not {vcpus}")
    if vcpus > 1 and access != RANDOM:
        raise UsageError(f"demo: several vcpus need random access: write access={RANDOM}")
    changes = uri.integer("changes", 1)
    if not _may_change(changes, access):
        raise UsageError(
            f"demo: changes is a power of two up to {PAGE_SIZE}, with sequential access, "
            f"not {changes}"
        )
    return Registers(0, 0, rate, content, seed, access, vcpus, changes)


def _may_change(count: int, access: str) -> bool:
    """Bytes of a page. In random access it is one store a page, which needs no look at it."""
    power = 1 <= count <= PAGE_SIZE and not count & (count - 1)
    return power and (count == 1 or access == SEQUENTIAL)


def _memory_size(uri: GuestUri) -> tuple[int, int]:
    """Size and page size."""
    size = parse_size(uri.options.get("size", _DEFAULT_SIZE))
    page_size = PAGE_SIZE
    if "hugepages" in uri.options:
        page_size = HUGE_PAGE
        if uri.options["hugepages"] != "2M":
            raise UsageError(f"demo: hugepages is 2M, not {uri.options['hugepages']!r}")
    if size < page_size or size % page_size:
        raise UsageError(f"demo: size must be a multiple of {page_size} bytes")
    return size, page_size


class DemoSource(SourceGuest):
    """A demo guest, started for the occasion and running."""

    kind = "demo"
    live = True
    running = True
    can_stop = True
    can_throttle = True
    can_release = True

    def __init__(self, uri: GuestUri) -> None:
        registers = _registers(uri)
        size, page_size = _memory_size(uri)
        self.running = uri.choice("paused", ("yes", "no")) != "yes"
        with contextlib.closing(HandoverSocket()) as handover:
            self._own(GuestProcess(size, page_size, registers, handover.path), handover, size)

    def _own(self, guest: GuestProcess, handover: HandoverSocket, size: int) -> None:
        """Let `guest` run, and see what it writes. It is ours from here on."""
        self._guest = guest
        self.image_size = size
        self._scanner: PagemapScanner | None = None
        self._uffd = -1
        try:
            mappings, descriptors = handover.accept(guest.has_ended)
            self._attach(mappings[0].base_host_virt_addr, descriptors)
        except BaseException:
            guest.close()
            raise
        self.blocks = [RamBlock(Block("demo.ram", size, guest.page_size), guest.file, 0)]
        self._stopped = False
        self._meter = Meter(ASKED, "pages-per-second")
        self._let_run()

    def _attach(self, base: int, descriptors: list[int]) -> None:
        self._base = base
        if not descriptors:
            self.tracking = TRACKING_HASH
            return
        self.tracking = TRACKING_PAGEMAP
        self._uffd = descriptors[0]
        self._scanner = PagemapScanner(self._guest.process.pid or 0)

    def start_tracking(self) -> None:
        self._measure(0)
        if self._scanner is not None:
            self._scanner.collect(self._base, self.image_size)

    def dirty_pages(self, block: int) -> Runs:
        assert self._scanner is not None
        return self._scanner.collect(self._base, self.image_size)

    def written_so_far(self) -> int | None:
        if self._scanner is None:
            return None
        return self._scanner.count(self._base, self.image_size)

    def _measure(self, percentage: int) -> None:
        """Have it lose so much of its time, and note how far it is."""
        registers = self._guest.ask("throttle", percentage=percentage).registers
        pages = self.image_size // PAGE_SIZE
        self._meter.change(percentage, registers.passes * pages + registers.position)

    def throttle(self, percentage: int) -> None:
        if not self._stopped:
            self._measure(percentage)

    def slowed(self) -> dict[str, Any]:
        return self._meter.report()

    def _let_run(self) -> None:
        if self.running:
            self._guest.ask("run")

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True  # first: if the answer is lost, resume must not be a no-op
            self._registers = self._guest.ask("stop").registers
            if self._meter.report():  # in whatever way it goes on, it is as fast as it was
                self._measure(0)

    def resume(self) -> None:
        if self._stopped:
            self._let_run()
            self._stopped = False

    def protect(self) -> ArmedMemory:
        if self._guest.page_size > PAGE_SIZE:
            raise no_huge_pages(self._guest.file.name)
        self._track_no_more()
        with contextlib.closing(HandoverSocket()) as handover:
            answer = self._guest.ask("protect", path=handover.path)
            mappings, descriptors = handover.accept(self._guest.has_ended)
        self._let_run()
        if not descriptors:
            raise HostLacks(answer.unarmed)
        pages, base = self.image_size // PAGE_SIZE, mappings[0].base_host_virt_addr
        return ArmedMemory(descriptors[0], [Region(0, 0, pages, base, self._guest.page_size)])

    def _track_no_more(self) -> None:
        if self._scanner is not None:
            self._scanner.close()
            self._scanner = None
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1

    def save_state(self) -> bytes:
        return state_of(DEMO, self._registers)

    def check(self) -> None:
        if self._guest.has_ended():
            raise SourceError("the demo guest is gone")

    def yank(self) -> None:
        self._guest.patience.hurry()

    def verdict(self) -> Verdict:
        """Stop and ask the oracle: for tests that leave the guest here."""
        self.stop()
        verdict = self._guest.ask("check").verdict
        assert verdict is not None
        return verdict

    def close(self) -> None:
        self._guest.close()
        self._track_no_more()


class MovingOn(DemoSource):
    """A demo guest that has arrived here, on its way again."""

    def __init__(self, guest: GuestProcess, size: int, *, running: bool = True) -> None:
        self.running = running
        with contextlib.closing(HandoverSocket()) as handover:
            try:
                guest.ask("hand-over", path=handover.path)
            except BaseException:
                guest.close()
                raise
            self._own(guest, handover, size)


# Until the registers come.
_BLANK = Registers(0, 0, 0, "zero", 0)


class DemoDestination(DestinationGuest):
    """A demo guest that waits for its memory and registers."""

    kind = "demo"
    gives_back = False

    def __init__(self, uri: GuestUri) -> None:
        self._guest: GuestProcess | None = None
        self._hurried = False
        self._running = True

    def lay_out(self, hello: Hello) -> None:
        if hello.kind != "demo" or len(hello.blocks) != 1:
            raise PeerRefused(f"a {hello.kind}: guest cannot go on as a demo: guest", field="kind")
        spec = hello.blocks[0]
        if spec.page_size not in (PAGE_SIZE, HUGE_PAGE):
            raise PeerRefused(
                f"a demo: guest is on pages of {PAGE_SIZE} or {HUGE_PAGE} bytes, "
                f"not {spec.page_size}",
                field="page-size",
            )
        if spec.size < spec.page_size or spec.size % spec.page_size:
            raise PeerRefused("a demo: guest has whole pages only", field="size")
        if POSTCOPY in hello.capabilities:
            self._start_armed(spec)
        else:
            self._guest = GuestProcess(spec.size, spec.page_size, _BLANK)
        assert self._guest is not None
        self.blocks = [RamBlock(spec, self._guest.file, 0)]
        self.fresh = [True]

    def _start_armed(self, spec: Block) -> None:
        """Start the guest, which arms its memory before it touches any."""
        with contextlib.closing(HandoverSocket()) as handover:
            self._guest = GuestProcess(
                spec.size, spec.page_size, _BLANK, handover.path, arriving=True
            )
            mappings, descriptors = handover.accept(self._is_over)
        if not descriptors:
            raise PeerRefused(self._guest.ask("arming").unarmed, field=POSTCOPY)
        base = mappings[0].base_host_virt_addr
        region = Region(0, 0, spec.size // PAGE_SIZE, base, spec.page_size)
        self.memory = ArmedMemory(descriptors[0], [region])

    def _is_over(self) -> bool:
        assert self._guest is not None
        return self._hurried or self._guest.has_ended()

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        assert self._guest is not None
        self._running = running
        self._guest.ask("load", registers_of(state, self.blocks[0].pages))

    def run(self) -> str:
        assert self._guest is not None
        if self._running:
            self._guest.ask("run")
        paused = "" if self._running else ", paused"
        return f"demo: (process {self._guest.process.pid}{paused})"

    def check(self) -> None:
        if self._guest is not None and self._guest.has_ended():
            raise GuestGone("the demo guest is gone")

    def depart(self) -> DemoSource:
        """It has arrived, and is to move on: the source that it is from now on. Here is nothing of
        it left but what `close` lets go of."""
        assert self._guest is not None
        guest, self._guest = self._guest, None
        if self.memory is not None:  # all of it is there: nothing more is caught
            self.memory.close()
        return MovingOn(guest, self.blocks[0].size, running=self._running)

    def conclude(self) -> dict[str, Any]:
        """How long it waited for its memory; let it run on, stop it, ask the oracle."""
        assert self._guest is not None
        latency = self._guest.ask("latency").latency
        if self._running:
            time.sleep(RUN_ON_SECONDS)
        self._guest.ask("stop")
        found = {"oracle": msgspec.to_builtins(self._guest.ask("check").verdict)}
        if latency is not None:
            found["guest-latency"] = msgspec.to_builtins(latency)
        return found

    def started(self) -> None:
        if self._guest is not None:
            self._guest.patience.hurried = False  # it has run after all

    def yank(self) -> None:
        self._hurried = True
        if self._guest is not None:
            self._guest.patience.hurry()

    def discard(self) -> None:
        self.close()

    def close(self) -> None:
        # The guest first: armed to its end, it never sees zeros where a page is missing. One
        # that waits for a page can be killed.
        if self._guest is not None:
            self._guest.close()
        if self.memory is not None:
            self.memory.close()


def registers_of(state: bytes, pages: int) -> Registers:
    """A device state as registers; RemoteProtocolError for what no demo guest of `pages` pages
    has."""
    state_into(DEMO, state, found := SimpleNamespace())
    try:
        registers = msgspec.convert(vars(found), Registers)
    except msgspec.ValidationError as e:
        raise RemoteProtocolError(f"demo registers that make no sense: {e}") from e
    if registers.content not in CONTENTS:
        raise RemoteProtocolError(f"demo registers with content {registers.content!r}")
    if registers.access not in ACCESSES:
        raise RemoteProtocolError(f"demo registers with access {registers.access!r}")
    if registers.vcpus > 1 and registers.access != RANDOM:
        raise RemoteProtocolError("demo registers with several vcpus and sequential access")
    if not _may_change(registers.changes, registers.access):
        raise RemoteProtocolError(f"demo registers that change {registers.changes} bytes of a page")
    if registers.position >= pages:
        raise RemoteProtocolError(f"demo registers at page {registers.position} of {pages}")
    return registers
