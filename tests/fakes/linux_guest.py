"""A Linux guest: Debian's cloud kernel and one static program (linux_guest.c) as its init.

It prints a tick each 100 ms with its clocks, writes memory of which it verifies every page over and
over, and answers on TCP port 7 if it has a virtio network card. Where KVM runs kernels slowly (some
nested hosts interpret ring 0), use TCG: `Vm(..., accelerator=linux_guest.accelerator(), ...)`.
"""

import functools
import gzip
import hashlib
import itertools
import lzma
import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import qemu_vm

SOURCE = Path(__file__).with_suffix(".c")
MODULES = ("virtio_pci", "virtio_net", "virtio_blk")
ADDRESS = "10.0.2.15"
# the card, with a port of this host that leads to the guest's port 7
NETWORK = (
    "-netdev",
    f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-{ADDRESS}:7",
    "-device",
    "virtio-net-pci,netdev=net0,romfile=",
)
QUIET = "console=ttyS0 quiet loglevel=3 tsc=reliable no_timer_check nokaslr mitigations=off"
TICK = re.compile(rb"^tick (\d+) (\d+) (\d+) (\d+)\r?$", re.MULTILINE)
WRONG = re.compile(
    rb"^.*(?:BAD |panic|Oops|BUG:|Call Trace|lockup|stall|WARNING:|unstable).*$", re.MULTILINE
)
UNPACK = {".xz": lzma.decompress, ".gz": gzip.decompress, "": bytes}


def available():
    """Why this guest cannot run here; "" if it can."""
    if reason := qemu_vm.why_not():
        return reason
    if not _kernel():
        return "no /boot/vmlinuz-*-cloud-amd64 with its modules (linux-image-cloud-amd64)"
    return _why_not_compile()


@functools.cache
def accelerator():
    """kvm where it runs kernels at full speed, else tcg."""
    return "kvm" if qemu_vm.runs_kernels_fast() else "tcg"


def build(folder, writer_mib=64, rate=0):
    """(kernel, initrd, append) for `Vm`; the initrd is made once in `folder`.

    rate: pages written per second, 0 for as many as it can.
    """
    kernel = _kernel()
    stamp = hashlib.sha256(SOURCE.read_bytes() + kernel.name.encode()).hexdigest()[:12]
    initrd = Path(folder, f"linux-guest-{stamp}.cpio")
    if not initrd.exists():
        # complete, or not there: another test process may look at the same time
        fresh = initrd.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(_archive(kernel))
        fresh.replace(initrd)
    return kernel, initrd, f"{QUIET} writer_mib={writer_mib} rate={rate} address={ADDRESS}"


def ticks(serial):
    """(number, monotonic ns, realtime ns, touches) of each whole tick.

    For a guest that moved, join what both serial lines have.
    """
    return [tuple(map(int, match.groups())) for match in TICK.finditer(_whole_lines(serial))]


def problems(serial):
    """What the guest, or its ticks, say went wrong; [] if nothing."""
    found = [match.group().decode(errors="replace") for match in WRONG.finditer(serial)]
    seen = ticks(serial)
    for before, here in itertools.pairwise(seen):
        if here[0] != before[0] + 1:
            found.append(f"tick {here[0]} follows tick {before[0]}")
        for index, name in ((1, "the monotonic clock"), (2, "the wall clock"), (3, "touches")):
            if here[index] < before[index]:
                found.append(f"{name} goes back from {before[index]} to {here[index]}")
    return found


def ask(vm, limit=20.0):
    """The number of the last tick, as the guest says over the network (needs NETWORK)."""
    port = int(re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", vm.hmp("info usernet"))[1])
    with socket.create_connection(("127.0.0.1", port), limit) as link:
        link.settimeout(limit)
        with link.makefile("rb") as lines:
            return int(lines.readline().split()[1])


def _whole_lines(serial):
    return serial[: serial.rfind(b"\n") + 1]


# --- what it is made of


def _kernel():
    """The newest cloud kernel that has its modules."""
    found = [
        path for path in Path("/boot").glob("vmlinuz-*-cloud-amd64") if _modules(path).is_dir()
    ]
    return max(
        found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], default=None
    )


def _modules(kernel):
    return Path("/lib/modules", kernel.name.removeprefix("vmlinuz-"))


@functools.cache
def _why_not_compile():
    if not shutil.which("gcc"):
        return "gcc is not installed"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.c")
        source.write_text("int main(void) { return 0; }\n")
        return "" if _gcc(source, Path(folder, "empty")) else "gcc cannot link statically"


def _gcc(source, program):
    command = ["gcc", "-O2", "-static", "-s", "-o", program, source]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _archive(kernel):
    """The initramfs: init, the console, the modules in the order to load them."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "init")
        if not _gcc(SOURCE, program):
            raise RuntimeError(f"gcc does not compile {SOURCE}")
        init = program.read_bytes()
    archive = _Cpio()
    for name in ("dev", "proc", "sys", "modules"):
        archive.add(name, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, init)
    order = _load_order(_modules(kernel))
    archive.add("modules/order", 0o100644, "".join(f"/modules/{p.stem}\n" for p in order).encode())
    for path in order:
        content = UNPACK["" if path.suffix == ".ko" else path.suffix](path.read_bytes())
        archive.add(f"modules/{path.stem}", 0o100644, content)
    return archive.end()


def _load_order(root):
    """MODULES and what they need, needed ones first; what is not listed is in the kernel."""
    needs = {}
    for line in (root / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needs[name] = others.split()
    wanted = {Path(name).name.split(".")[0]: name for name in needs}
    order = []
    for module in MODULES:
        name = wanted.get(module)
        # modules.dep lists what was needed last first
        for one in [*reversed(needs[name]), name] if name else []:
            if root / one not in order:
                order.append(root / one)
    return order


class _Cpio:
    """An archive in the kernel's format (early-userspace/buffer-format)."""

    def __init__(self):
        self._data = bytearray()
        self._inode = 0

    def add(self, name, mode, content=b"", device=(0, 0)):
        self._inode += 1
        fields = [self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0]
        self._data += b"070701" + b"".join(b"%08x" % field for field in fields)
        self._data += name.encode() + b"\0"
        self._pad()
        self._data += content
        self._pad()

    def _pad(self):
        self._data += bytes(-len(self._data) % 4)

    def end(self):
        self.add("TRAILER!!!", 0)
        return bytes(self._data)
