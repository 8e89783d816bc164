"""A QEMU as a user would start it: unmodified, steered by QMP, serial line to a file.

It has two QMP sockets: `qmp_path` for whoever migrates it, and one that this class speaks to.
Needs only the standard library (and pytest for `require_qemu`).
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

QEMU = "qemu-system-x86_64"
GIVE_UP = 60.0
PATIENCE = 5.0  # with a QEMU that is to quit
MIB = 1 << 20
# `host` and `max` fail on some nested hosts; these need nothing
KVM_MODELS = ("EPYC", "qemu64")


class QmpError(Exception):
    """QEMU refused a command; `.data` is its answer."""

    def __init__(self, command, data):
        super().__init__(f"{command}: {data.get('desc', data)}")
        self.data = data


@functools.cache
def accelerator():
    """(accelerator, CPU model or None): KVM if a QEMU comes up with it."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        for model in KVM_MODELS:
            if _comes_up("-accel", "kvm", "-cpu", model):
                return "kvm", model
    return "tcg", None


def _comes_up(*arguments):
    """A QEMU without disk runs into its BIOS and answers `quit`."""
    talk = '{"execute":"qmp_capabilities"}{"execute":"query-status"}{"execute":"quit"}'
    base = [QEMU, "-M", "q35", "-m", "32", "-display", "none", "-nic", "none", "-nodefaults"]
    try:
        ran = subprocess.run(
            [*base, *arguments, "-qmp", "stdio"],
            input=talk,
            capture_output=True,
            text=True,
            timeout=GIVE_UP,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return ran.returncode == 0 and '"running": true' in ran.stdout


@functools.cache
def runs_kernels_fast(kind="kvm"):
    """Whether it runs ring 0 at speed: KVM on some nested hosts interprets it, and Linux there
    takes minutes to boot.
    """
    if kind not in ("tcg", accelerator()[0]):
        return False
    # mov ecx, 2000000; again: dec ecx; jnz again; mov dx, 0x3f8; mov al, 'R'; out dx, al; hlt
    code = bytes.fromhex("66b980841e00 6649 75fc baf803 b052 ee f4")
    with tempfile.TemporaryDirectory() as folder:
        rom = Path(folder, "rom")
        rom.write_bytes(code.ljust(0xFFF0, b"\0") + b"\xea\0\0\0\xf0".ljust(16, b"\0"))
        with Vm("probe", 64 * MIB, "private", accelerator=kind, bios=rom) as vm:
            try:
                vm.wait_for_serial(b"R", 1.0)
            except TimeoutError:
                return False
    return True


def why_not():
    """Why no QEMU can run here; "" if one can."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed"
    if accelerator()[0] == "tcg" and not _comes_up("-accel", "tcg"):
        return f"{QEMU} runs neither with KVM nor with TCG"
    return ""


def require_qemu():
    """Skip the test where QEMU cannot run, saying why."""
    import pytest

    if reason := why_not():
        pytest.skip(reason)


class Vm:
    """One QEMU process. Give source and destination the same options, but for name and incoming.

    backend: "file" (shared, a file in `folder`), "memfd" (shared), "private", or "numa2" (two
    shared files on two NUMA nodes). It boots from `disk` (a raw image), or `bios` (a ROM in place
    of SeaBIOS), or `kernel`, `initrd` and `append`. `accelerator` is what `accelerator()` found,
    or "tcg". `incoming` is QEMU's option, say "defer". `extra` are further arguments.
    """

    def __init__(
        self,
        name="vm",
        memory=256 * MIB,
        backend="file",
        folder="/dev/shm",
        accelerator=None,
        disk=None,
        bios=None,
        kernel=None,
        initrd=None,
        append="",
        incoming=None,
        extra=(),
        cpus=1,
    ):
        self.name, self.memory, self.backend = name, memory, backend
        self._home = Path(tempfile.mkdtemp(prefix=f"pageferry-{os.getpid()}-{name}-"))
        self.qmp_path = str(self._home / "qmp")
        self.serial_path, self.log_path = self._home / "serial", self._home / "log"
        self.ram_files = self._name_ram_files(folder)
        self.events = []
        self._said = b""
        self._process = self._talk = None
        self.command = [
            *self._machine(cpus, accelerator),
            *self._boot(disk, bios, kernel, initrd, append),
            *self._lines(),
            *(("-incoming", incoming) if incoming else ()),
            *extra,
        ]
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # --- the command line

    def _name_ram_files(self, folder):
        count = {"file": 1, "numa2": 2}.get(self.backend, 0)
        return [Path(folder, f"{self._home.name}-ram{index}") for index in range(count)]

    def _machine(self, cpus, wanted):
        kind, model = accelerator()
        if wanted and wanted != kind:
            kind, model = wanted, None
        arguments = [QEMU, "-name", f"{self.name},debug-threads=on", "-accel", kind]
        if model:
            arguments += ["-cpu", model]
        arguments += ["-nodefaults", "-display", "none", "-nic", "none", "-vga", "std"]
        arguments += ["-m", str(self.memory // MIB), "-smp", str(max(cpus, len(self.ram_files)))]
        return arguments + self._memory()

    def _memory(self):
        one = "q35,memory-backend=ram0"
        match self.backend:
            case "file":
                return ["-object", self._file(0, self.memory), "-machine", one]
            case "memfd":
                backend = f"memory-backend-memfd,id=ram0,size={self.memory},share=on"
            case "private":
                backend = f"memory-backend-ram,id=ram0,size={self.memory}"
            case "numa2":
                arguments = ["-machine", "q35"]
                for index in range(2):
                    arguments += ["-object", self._file(index, self.memory // 2)]
                    arguments += ["-numa", f"node,nodeid={index},cpus={index},memdev=ram{index}"]
                return arguments
            case other:
                raise ValueError(f"no such backend: {other}")
        return ["-object", backend, "-machine", one]

    def _file(self, index, size):
        path = self.ram_files[index]
        return f"memory-backend-file,id=ram{index},size={size},mem-path={path},share=on"

    def _boot(self, disk, bios, kernel, initrd, append):
        if bios:
            return ["-bios", str(bios)]
        if kernel:
            arguments = ["-kernel", str(kernel)]
            if initrd:
                arguments += ["-initrd", str(initrd)]
            return [*arguments, "-append", append] if append else arguments
        if disk:
            return ["-drive", f"file={disk},format=raw"]
        return []

    def _lines(self):
        own = self._home / "own"
        return [
            *("-serial", f"file:{self.serial_path}"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *("-qmp", f"unix:{own},server=on,wait=off"),
        ]

    # --- the process

    def _start(self):
        with self.log_path.open("wb") as log:
            # guests write all the time: those who move them come first
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._talk = _Talk(self._home / "own", self._alive, self.events)
        self.qmp("qmp_capabilities")

    def _alive(self):
        """Raise with what QEMU said, if it is gone."""
        if (code := self._process.poll()) is not None:
            said = self.log_path.read_text(errors="replace")[-2000:].strip()
            raise RuntimeError(f"{self.name}: QEMU ended with {code}: {said}")

    @property
    def pid(self):
        return self._process.pid

    def has_ended(self):
        return self._process.poll() is not None

    def kill(self):
        """As a host would fail: no `quit`."""
        self._process.kill()
        self._process.wait()

    def close(self):
        """Quit, or kill; nothing is left but what serial() has. Safe to call twice."""
        if self._process and self._process.poll() is None:
            try:
                os.kill(self.pid, signal.SIGCONT)
                self._talk.ask("quit", {}, limit=PATIENCE)
                self._process.wait(PATIENCE)
            except Exception:
                self.kill()
        if self._talk:
            self._talk.close()
        self._said = self.serial()
        for path in self.ram_files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.close()

    # --- talking to it

    def qmp(self, command, limit=GIVE_UP, **arguments):
        """Run a QMP command; `_` in the names of arguments stands for `-`."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self._talk.ask(command, arguments, limit)

    def hmp(self, text):
        return self.qmp("human-monitor-command", command_line=text)

    def status(self):
        """running, paused, inmigrate, postmigrate, ..."""
        return self.qmp("query-status")["status"]

    def wait_for_status(self, wanted, limit=GIVE_UP):
        self.wait_until(lambda: self.status() == wanted, f"status {wanted}", limit)

    def set_capabilities(self, **capabilities):
        self.qmp(
            "migrate-set-capabilities",
            capabilities=[
                {"capability": name.replace("_", "-"), "state": state}
                for name, state in capabilities.items()
            ],
        )

    def wait_for_migration(self, limit=GIVE_UP):
        """Wait until QEMU's own migration ended; returns query-migrate's answer."""
        ends = ("completed", "failed", "cancelled")
        self.wait_until(lambda: self.qmp("query-migrate").get("status") in ends, "an end", limit)
        return self.qmp("query-migrate")

    def serial(self):
        """What the guest has printed till now."""
        try:
            return self.serial_path.read_bytes()
        except FileNotFoundError:
            return self._said

    def wait_for_serial(self, predicate, limit=GIVE_UP):
        """Wait until `predicate` (a function of all that was printed, or bytes in it) holds."""
        holds = predicate if callable(predicate) else lambda said: predicate in said
        try:
            self.wait_until(lambda: holds(self.serial()), "the serial line", limit)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it ends with {self.serial()[-500:]!r}") from None
        return self.serial()

    def wait_until(self, condition, what, limit=GIVE_UP):
        """Poll `condition` as long as QEMU lives."""
        end = time.monotonic() + limit
        while not condition():
            self._alive()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name}: not within {limit:g} s: {what}")
            time.sleep(0.01)

    # --- its memory

    def ram_parts(self):
        """The guest's RAM as `boot_guest.Ram` takes it, whatever the backend."""
        match self.backend:
            case "memfd":
                return [self._memfd()]
            case "private":
                return [self._in_process()]
        return self.ram_files

    def _memfd(self):
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            if os.readlink(fd).startswith("/memfd:memory-backend-memfd"):
                return str(fd)
        raise RuntimeError(f"{self.name} has no memfd")

    def _in_process(self):
        """Where gpa 0 is in QEMU's memory: only /proc/PID/mem gets at private RAM."""
        answer = self.hmp("gpa2hva 0")
        address = int(re.search(r"is (0x[0-9a-f]+)", answer).group(1), 16)
        return f"/proc/{self.pid}/mem", address, self.memory


class _Talk:
    """A QMP client: one command, one answer; events are kept."""

    def __init__(self, path, alive, events):
        self._events = events
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._connect(str(path), alive)
            self._lines = self._socket.makefile("rb")
            self._next(GIVE_UP)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, path, alive):
        end = time.monotonic() + GIVE_UP
        while True:
            try:
                return self._socket.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                alive()
                if time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def ask(self, command, arguments, limit):
        message = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            answer = self._next(limit)
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise QmpError(command, answer["error"])
            else:
                return answer["return"]

    def _next(self, limit):
        self._socket.settimeout(limit)
        line = self._lines.readline()
        if not line:
            raise ConnectionError("QEMU closed its QMP socket")
        return json.loads(line)

    def close(self):
        with contextlib.suppress(AttributeError):
            self._lines.close()
        self._socket.close()
