"""System calls made inside other processes: what they do there, that nothing else changes, and
that the target goes on whenever whoever makes them is killed."""

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import GIVE_UP, until
from hypothesis import given
from hypothesis import strategies as st

from pageferry.transport.errors import AttachError, HostLacks
from pageferry.workers.kernel import arch, inject, userfaultfd
from pageferry.workers.kernel.inject import NUMBERS, Injection
from pageferry.workers.kernel.task_facts import why_forbidden

FAKES = Path(__file__).resolve().parents[1] / "fakes"
# How long a program in inject_target.c sleeps, and by how much it may be late on a busy host.
NAP_MS, LATE_MS = 400, 390

needs_x86 = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="attaching is for x86-64 only"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The target, built from inject_target.c."""
    if os.uname().machine != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86-64")
    path = tmp_path_factory.mktemp("inject") / "inject_target"
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Wextra", "-pthread", "-o", path, FAKES / "inject_target.c"],
        check=True,
        timeout=GIVE_UP,
    )
    return path


class Target:
    """A process that does one thing until it is told to finish."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def __enter__(self):
        assert self.line() == "ready\n"
        return self

    def __exit__(self, *rest):
        self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate()

    def line(self):
        """The next that it says."""
        ready, _, _ = select.select([self.process.stdout], [], [], 10)
        assert ready, "it says nothing"
        return self.process.stdout.readline()

    def state(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def status(self, key):
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)[key]

    def sleeping(self):
        until(lambda: self.state() == "S", "the target sleeps")
        return self

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: self.state() == "T", "it is stopped")

    def finish(self):
        """A byte; what the target says about itself then."""
        out, _ = self.process.communicate("x", timeout=GIVE_UP)
        assert self.process.returncode == 0, out or self.process.returncode
        return json.loads(out)

    def end(self, status=0):
        """Wait for the end of one that needs no byte, or was killed."""
        out, _ = self.process.communicate(timeout=GIVE_UP)
        assert self.process.returncode == status, out or self.process.returncode
        return json.loads(out) if out else None


BLOCKING = ["read", "futex", "epoll", "ppoll"]
NAPS = ["nanosleep", "poll", "select", "futex-timeout"]


def a_target(program, mode, *arguments):
    """Started, and asleep unless it is one that computes."""
    return Target(program, mode, *arguments)


def inject_all(pid, on_step=None):
    """What an attaching migration does, and one call that fails."""
    with Injection(pid, on_step=on_step) as target:
        assert target.syscall(NUMBERS["getpid"]) == pid
        fd = target.syscall(NUMBERS["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(target.take(fd))
        target.close_fd(fd)
    return target


class Before:
    """An `on_step` that acts once, before operation `number`. Which comes when is not always the
    same: a thread that computes has none to restart, and one of more has to be asked."""

    def __init__(self, number, action):
        self.left, self.action = number, action

    def __call__(self, name):
        self.left -= 1
        if self.left == -1:
            self.action()

    @property
    def acted(self):
        return self.left < 0


def each_step(attempt):
    """`attempt(number)` for each operation of an injection; False says that there are no more."""
    number = 0
    while attempt(number):
        number += 1
    assert 30 < number < 60


# ---- what it does ------------------------------------------------------------------------------


def test_a_call_is_made_by_the_target(program):
    with a_target(program, "read") as target:
        with Injection(target.pid) as there:
            assert there.syscall(NUMBERS["getpid"]) == target.pid != os.getpid()
        assert target.finish()["interrupted"] == 0


def test_a_userfaultfd_of_the_target_comes_here(program):
    """It works on the memory of the target, whoever holds it."""
    with a_target(program, "read") as target:
        with Injection(target.pid) as there:
            address = there.syscall(NUMBERS["mmap"], 0, 8192, 3, 0x22, -1, 0)
            fd = there.syscall(NUMBERS["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK)
            here = there.take(fd)
            there.close_fd(fd)
        try:
            assert not os.path.exists(f"/proc/{target.pid}/fd/{fd}")
            assert not os.get_inheritable(here)
            assert userfaultfd.features(here, 0)
            userfaultfd.register_missing(here, address, 8192)
        finally:
            os.close(here)
        target.finish()


def test_what_fails_there_is_an_error_here(program):
    with a_target(program, "read") as target:
        with Injection(target.pid) as there:
            for call in (there.close_fd, there.take):
                with pytest.raises(OSError, match="Bad file descriptor") as caught:
                    call(999)
                assert caught.value.errno == errno.EBADF
            assert there.syscall(NUMBERS["getpid"]) == target.pid
        target.finish()


def test_six_arguments_arrive(program, tmp_path):
    """mmap has six: the last is the offset in the file."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * 4096 + b"b" * 4096)
    with open(path, "rb") as file, a_target(program, "read") as target:
        name = f"/proc/{os.getpid()}/fd/{file.fileno()}\0".encode()
        with Injection(target.pid) as there:
            address = there.syscall(NUMBERS["mmap"], 0, 4096, 3, 0x22, -1, 0)
            with open(f"/proc/{target.pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(address)
                memory.write(name)
                fd = there.syscall(2, address, os.O_RDONLY)
                mapped = there.syscall(NUMBERS["mmap"], 0, 4096, 1, 2, fd, 4096)
                there.close_fd(fd)
                memory.seek(mapped)
                assert memory.read(4) == b"bbbb"
        target.finish()


def test_the_pause_is_short_and_known(program):
    """The best of ten: others may be busy here."""
    with a_target(program, "read") as target:
        pauses = [inject_all(target.pid).paused_seconds for _ in range(10)]
        assert 0 < min(pauses) < 0.010
        target.finish()


def test_without_a_call_nothing_is_touched(program):
    with a_target(program, "epoll") as target:
        target.sleeping()
        for _ in range(10):
            with Injection(target.pid):
                pass
            target.sleeping()
        assert target.finish()["interrupted"] == 0


def test_an_error_in_the_body_lets_the_target_go(program):
    with a_target(program, "read") as target:
        there = Injection(target.pid)
        with contextlib.suppress(ZeroDivisionError), there:
            there.syscall(NUMBERS["getpid"])
            _ = 1 / 0
        assert target.status("TracerPid") == "0"
        with pytest.raises(AttachError, match="not attached to any more"):
            there.take(0)
        target.finish()


# ---- that nothing changes ----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2])
def test_registers_are_what_they_were(program, threads):
    """General and vector registers, flags, the red zone, floating-point modes; signal mask and
    alternate stack. The target looks by itself."""
    with a_target(program, "spin", threads) as target:
        for _ in range(300 if threads == 0 else 100):
            with Injection(target.pid) as there:
                assert there.syscall(NUMBERS["getpid"]) == target.pid
        assert target.finish() == {"signals": 0, "interrupted": 0, "elapsed": 0}


@pytest.mark.parametrize("mode", BLOCKING)
def test_who_sleeps_sleeps_on(program, mode):
    """No EINTR, no early end."""
    with a_target(program, mode) as target:
        for _ in range(30):
            inject_all(target.sleeping().pid)
        assert target.finish()["interrupted"] == 0


@pytest.mark.parametrize("mode", NAPS)
def test_a_nap_is_as_long_as_it_should_be(program, mode):
    with a_target(program, mode) as target:
        target.sleeping()
        for _ in range(10):
            inject_all(target.pid)
        found = target.end()
    assert found["interrupted"] == 0
    assert NAP_MS <= found["elapsed"] < NAP_MS + LATE_MS


def test_a_restartable_sequence_is_aborted(program):
    """The target is in one for ever, until it is aborted: a section that the kernel forgot would
    never end."""
    with a_target(program, "rseq") as target:
        for _ in range(50):
            with Injection(target.pid) as there:
                there.syscall(NUMBERS["getpid"])
        target.process.stdin.write("x")
        target.process.stdin.flush()

        def aborted():
            with contextlib.suppress(ProcessLookupError):
                os.kill(target.pid, signal.SIGUSR1)  # aborts, if the kernel knows of it
            return target.process.poll() is not None

        until(aborted, "the sequence is aborted", 10)
        target.end()


def test_a_thread_that_has_no_room_is_passed_over(program):
    """The main thread runs on memory of the program: another makes the calls."""
    with a_target(program, "coroutine", 1) as target:
        inject_all(target.sleeping().pid)
        target.finish()


def test_a_process_whose_main_thread_has_ended(program):
    with a_target(program, "leaderless") as target:
        until(lambda: target.state() == "Z", "the main thread has ended")
        inject_all(target.pid)
        assert target.finish() == {"late": True}


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pause", "spin"])
def test_a_signal_meanwhile_arrives_once(program, mode):
    """Whenever it comes. pause() has to end by it, as it does when nobody interferes."""

    def attempt(number):
        with a_target(program, mode) as target:
            if mode == "pause":
                target.sleeping()
            before = Before(number, lambda: os.kill(target.pid, signal.SIGUSR1))
            inject_all(target.pid, before)
            if not before.acted:
                return False
            if mode == "pause":
                assert target.line() == "paused\n", number
            assert target.finish()["signals"] == 1, number
        return True

    each_step(attempt)


def test_who_was_stopped_is_stopped_after(program):
    with a_target(program, "read") as target:
        target.stop()
        for _ in range(20):
            inject_all(target.pid)
            until(lambda: target.state() == "T", "it is stopped again")
        os.kill(target.pid, signal.SIGCONT)
        assert target.finish()["interrupted"] == 0


@pytest.mark.parametrize("mode", ["read", "spin"])
def test_who_is_stopped_meanwhile_is_stopped_after(program, mode):
    def attempt(number):
        with a_target(program, mode) as target:
            before = Before(number, lambda: os.kill(target.pid, signal.SIGSTOP))
            inject_all(target.pid, before)
            if before.acted:
                until(lambda: target.state() == "T", f"it is stopped, at step {number}")
                os.kill(target.pid, signal.SIGCONT)
            target.finish()
        return before.acted

    each_step(attempt)


def test_who_is_continued_meanwhile_goes_on(program):
    def attempt(number):
        with a_target(program, "read") as target:
            target.stop()
            before = Before(number, lambda: os.kill(target.pid, signal.SIGCONT))
            inject_all(target.pid, before)
            if before.acted:
                target.sleeping()
                target.finish()
        return before.acted

    each_step(attempt)


def test_who_is_killed_meanwhile_is_gone(program):
    """An error at once, and the parent, which is us here, hears of it as usual."""

    def attempt(number):
        with a_target(program, "read") as target:
            start = time.monotonic()
            before = Before(number, lambda: os.kill(target.pid, signal.SIGKILL))
            reason = None
            try:
                inject_all(target.pid, before)
            except AttachError as e:
                reason = e.data["reason"]
            if before.acted:
                assert reason in ("gone", "zombie"), number
                assert time.monotonic() - start < 1
                target.end(-signal.SIGKILL)
        return before.acted

    each_step(attempt)


# ---- whoever injects is killed -----------------------------------------------------------------


def dies(pid, on_step):
    """Another process injects, and kills itself in `on_step`; False if it did not."""
    child = os.fork()
    if child == 0:
        try:
            inject_all(pid, on_step)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def dies_before(pid, number):
    """In the same way, before operation `number`."""
    return dies(pid, Before(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))


@pytest.mark.parametrize("mode", ["spin", *BLOCKING])
def test_killed_at_any_step_the_target_goes_on(program, mode):
    def attempt(number):
        with a_target(program, mode) as target:
            if mode != "spin":
                target.sleeping()
            died = dies_before(target.pid, number)
            until(lambda: target.status("TracerPid") == "0", "nobody traces it")
            found = target.finish()
            # of all calls here, only epoll_wait tells its program of a stop
            assert found["interrupted"] <= (mode == "epoll"), number
        return died

    each_step(attempt)


@pytest.mark.parametrize("mode", NAPS)
def test_killed_at_any_step_a_nap_goes_on(program, mode):
    """They overlap, or it would take long."""
    with contextlib.ExitStack() as stack:
        targets = []

        def attempt(number):
            targets.append(stack.enter_context(a_target(program, mode)).sleeping())
            return dies_before(targets[-1].pid, number)

        each_step(attempt)
        for number, target in enumerate(targets):
            found = target.end()
            assert NAP_MS <= found["elapsed"] < NAP_MS + LATE_MS, number
            assert found["interrupted"] <= 1, number


def test_killed_at_any_step_who_was_stopped_is_stopped(program):
    def attempt(number):
        with a_target(program, "read") as target:
            target.sleeping().stop()
            died = dies_before(target.pid, number)
            until(lambda: target.state() == "T", f"it is stopped again, at step {number}")
            os.kill(target.pid, signal.SIGCONT)
            assert target.finish()["interrupted"] == 0, number
        return died

    each_step(attempt)


@pytest.mark.parametrize("step", ["interrupt", "wait", "resume", "getregs"])
def test_killed_with_a_signal_in_hand(program, step):
    """The kernel reports the signal to us before the target has it; it must not be lost with us."""
    with a_target(program, "spin") as target:

        def on_step(name):
            if name == "interrupt":
                os.kill(target.pid, signal.SIGUSR1)
                until(lambda: target.state() == "t", "it stops, with the signal")
            if name == step:
                os.kill(os.getpid(), signal.SIGKILL)

        assert dies(target.pid, on_step)
        assert target.finish()["signals"] == 1


# ---- refusals ----------------------------------------------------------------------------------


def refusal(pid, *calls):
    """The reason and the message."""

    def attempt():
        with Injection(pid) as there:
            for call in calls:
                there.syscall(*call)

    with pytest.raises(AttachError) as caught:
        attempt()
    assert str(pid) in caught.value.message
    return caught.value.data["reason"], caught.value.message


@needs_x86
def test_nobody_attaches_to_himself():
    reason, message = refusal(os.getpid())
    assert reason == "self" and "itself" in message


@needs_x86
def test_who_is_not_there():
    process = subprocess.Popen(["true"])
    process.wait()
    assert refusal(process.pid)[0] == "gone"


@needs_x86
def test_a_zombie():
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        reason, message = refusal(process.pid)
        assert reason == "zombie" and "parent" in message


@needs_x86
def test_a_kernel_thread():
    if not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("a process namespace of its own: no kernel threads here")
    assert refusal(2)[0] == "kernel"


def test_a_thread_is_no_process(program):
    with a_target(program, "read", 1) as target:
        (thread,) = set(map(int, os.listdir(f"/proc/{target.pid}/task"))) - {target.pid}
        with pytest.raises(AttachError, match=f"thread of process {target.pid}") as caught:
            inject_all(thread)
        assert caught.value.data["reason"] == "thread"
        target.finish()


def test_somebody_else_traces_it(program):
    with a_target(program, "read") as target:
        with Injection(target.pid) as there:
            reason, message = refusal(target.pid)
            assert reason == "traced"
            comm = Path("/proc/self/comm").read_text().strip()
            assert f"traced by process {os.getpid()} ({comm})" in message
            assert there.syscall(NUMBERS["getpid"]) == target.pid
        target.finish()


def elf(bits, code):
    """A static program of one page that is nothing but `code`."""
    base = 0x400000
    if bits == 32:
        header, entry = 52 + 32, base + 84
        ident = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
        head = struct.pack("<16sHHIIIIIHHHHHH", ident, 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        segment = struct.pack("<8I", 1, 0, base, base, header + len(code), 4096, 5, 4096)
    else:
        header, entry = 64 + 56, base + 120
        ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        head = struct.pack(
            "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
        )
        segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, header + len(code), 4096, 4096)
    return head + segment + code


# pause() for ever: number 29 by int 0x80 for i386, number 34 by syscall
PAUSES = {32: bytes.fromhex("b81d000000cd80ebf7"), 64: bytes.fromhex("b8220000000f05ebf7")}


@needs_x86
@pytest.mark.parametrize(("bits", "reason"), [(32, "32-bit"), (64, "gadget")])
def test_programs_by_hand(tmp_path, bits, reason):
    """One of 32 bits, and one without a C library."""
    path = tmp_path / "pauses"
    path.write_bytes(elf(bits, PAUSES[bits]))
    path.chmod(0o755)
    try:
        process = subprocess.Popen([path])
    except OSError as e:
        pytest.skip(f"no {bits}-bit programs here: {e.strerror}")
    with process:
        try:
            assert refusal(process.pid)[0] == reason
            assert process.poll() is None
        finally:
            process.kill()


def test_no_stack_to_write_to(program):
    with a_target(program, "coroutine") as target:
        reason, message = refusal(target.sleeping().pid)
        assert reason == "stack" and "try again" in message
        assert target.finish()["interrupted"] == 0


def test_strict_confinement(program):
    with a_target(program, "strict") as target:
        until(lambda: target.status("Seccomp") == "1", "it is confined")
        reason, message = refusal(target.pid)
        assert reason == "seccomp" and "strict" in message
        target.process.communicate("x", timeout=GIVE_UP)
        assert target.process.returncode == 0


KILL, KILL_THREAD, TRAP, TRACE = 0x80000000, 0, 0x30000, 0x7FF00000
EPERM = 0x50000 | errno.EPERM


@needs_root
@pytest.mark.parametrize(
    ("action", "says"),
    [
        (KILL, "death of the process"), (KILL_THREAD, "death of the thread"), (TRAP, "SIGSYS"),
        (TRACE, "its tracer"), (EPERM, "EPERM"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("forbidden", ["userfaultfd", "rt_sigreturn"])
def test_a_filter_that_forbids_it(program, action, says, forbidden):
    """The call, or the way back if we should be killed: found out without making it."""
    number = NUMBERS[forbidden]
    with a_target(program, "confined", number, action) as target:
        reason, message = refusal(target.sleeping().pid, (NUMBERS["userfaultfd"], 0))
        assert reason == "seccomp" and says in message and str(number) in message
        assert "sandbox" in message
        # the target still lives, and may do the rest
        if forbidden == "userfaultfd":
            with Injection(target.pid) as there:
                assert there.syscall(NUMBERS["getpid"]) == target.pid
        target.finish()


@needs_root
def test_a_filter_that_allows_it(program):
    with a_target(program, "confined", 9999, KILL) as target:
        inject_all(target.sleeping().pid)
        assert target.finish()["interrupted"] == 0


def _unprivileged(body):
    """Run Python code as nobody; what it printed."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests ran without it")
    # imported before root is given up: nobody may not be able to read the package
    code = f"""
import ctypes, os, subprocess, sys, concurrent.futures.thread
from pageferry.transport.errors import PageferryError
from pageferry.workers.kernel.inject import Injection, NUMBERS
root = os.getppid()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def dumpable(value):
    assert ctypes.CDLL(None).prctl(4, value, 0, 0, 0) == 0
def attempt(pid):
    try:
        with Injection(pid) as there:
            print(there.syscall(NUMBERS["getpid"]) == pid)
    except PageferryError as e:
        print(type(e).__name__, e.data["reason"], e)
dumpable(1)
{body}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=GIVE_UP, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


CHILD = """
reading, writing = os.pipe()
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.close(writing)
    dumpable({dumpable})
    os.write(tell, b"x")
    os.read(reading, 1)
    os._exit(0)
os.read(ready, 1)
attempt(child)
os.close(writing)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@needs_x86
def test_another_user_may_not():
    said = _unprivileged("attempt(root)")
    assert said.startswith("HostLacks permission") and "runs as user 0" in said


@needs_x86
def test_a_process_that_is_not_dumpable():
    said = _unprivileged(CHILD.format(dumpable=0))
    assert said.startswith("HostLacks permission") and "not dumpable" in said


@needs_x86
def test_ones_own_child_needs_no_privilege():
    assert _unprivileged(CHILD.format(dumpable=1)) == "True\n"


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"scope": 3, "capable": True}, "until the host restarts"),
        ({"scope": 2}, "ptrace_scope=2 demands CAP_SYS_PTRACE"),
        ({"scope": 1}, "kernel.yama.ptrace_scope=0"),
        ({"scope": 1, "owner": os.getuid() + 1}, f"runs as user {os.getuid() + 1}"),
        ({"scope": 2, "dumpable": False}, "not dumpable"),
        ({"capable": True, "owner": os.getuid() + 1}, "security module"),
        ({}, "a group or a capability"),
    ],
)
def test_what_forbids_it(facts, says):
    given_facts = {"scope": 0, "capable": False, "owner": os.getuid(), "dumpable": True}
    message = why_forbidden(7, **{**given_facts, **facts})
    assert message.startswith("may not attach to process 7: ") and says in message


def test_other_machines_are_not_wired_up(monkeypatch):
    monkeypatch.setattr(inject.platform, "machine", lambda: "aarch64")
    with pytest.raises(HostLacks, match="aarch64"), Injection(1):
        pass


def test_who_does_not_stop_is_let_go(program, monkeypatch):
    """A thread that sleeps in the kernel: here one whose stop nobody reports."""
    monkeypatch.setattr(inject, "LIMIT", 0.05)
    monkeypatch.setattr(inject._Tracee, "_poll", lambda tracee: None)
    with a_target(program, "read") as target:
        assert refusal(target.pid)[0] == "stuck"
        until(lambda: target.status("TracerPid") == "0", "it is let go")
        target.finish()


def test_a_call_that_blocks_is_left_behind(program, monkeypatch):
    """The thread makes it to its end, and then restores itself."""
    monkeypatch.setattr(inject, "LIMIT", 0.05)
    with a_target(program, "spin") as target:
        with Injection(target.pid) as there:
            buffer = there.syscall(NUMBERS["mmap"], 0, 4096, 3, 0x22, -1, 0)
        assert refusal(target.pid, (0, 0, buffer, 1))[0] == "stuck"  # read(2) of a byte
        until(lambda: target.status("TracerPid") == "0", "it is let go")
        target.sleeping()
        target.process.stdin.write("x")
        target.process.stdin.flush()
        until(lambda: target.state() == "R", "it goes on")
        target.finish()


# ---- the pure parts ----------------------------------------------------------------------------

words = st.integers(0, (1 << 64) - 1)
registers = st.builds(arch.Registers, *[words] * len(arch.Registers._fields))
# What ptrace gives here: its part for software says which features there are.
FRAME_WORDS = {
    "r8": 5, "r9": 6, "r10": 7, "r11": 8, "r12": 9, "r13": 10, "r14": 11, "r15": 12, "rdi": 13,
    "rsi": 14, "rbp": 15, "rbx": 16, "rdx": 17, "rax": 18, "rcx": 19, "rsp": 20, "rip": 21,
    "eflags": 22,
}  # fmt: skip


def an_xstate(size, enabled, used):
    area = bytearray(os.urandom(size))
    struct.pack_into("<Q", area, 464, enabled)
    struct.pack_into("<Q", area, 512, used)
    return bytes(area)


@given(registers)
def test_registers_are_packed_in_order(found):
    assert arch.unpack_registers(arch.pack_registers(found)) == found
    assert len(arch.pack_registers(found)) == arch.REGISTERS_SIZE == 27 * 8


@given(
    registers.map(lambda r: r._replace(rsp=r.rsp | 1 << 40, cs=0x33, ss=0x2B)),
    st.integers(72, 1400).map(lambda n: n * 8),
    words,
    words,
)
def test_a_signal_frame_is_laid_out_as_the_kernel_does(found, size, mask, back):
    """Offsets of struct rt_sigframe, struct sigcontext_64 and struct _fpstate_64."""
    xstate = an_xstate(size, 0xE7, 0x4)
    address, frame = arch.signal_frame(found, xstate, mask, back)
    assert address % 16 == 8
    assert address + len(frame) <= found.rsp - 128
    content = struct.unpack_from("<55Q", frame)
    assert content[:3] == (back, 7, 0)
    for name, at in FRAME_WORDS.items():
        assert content[at + 1] == getattr(found, name), name
    assert struct.unpack_from("<4H", frame, 24 * 8) == (0x33, 0, 0, 0x2B)
    assert content[27] == content[38] == mask
    floating_at = content[29]
    assert floating_at % 64 == 0
    floating = frame[floating_at - address :]
    assert struct.unpack_from("<IIQI", floating, 464) == (0x46505853, size + 4, 0xE7, size)
    assert struct.unpack_from("<Q", floating, 512) == (0x7,)
    assert floating[size:] == struct.pack("<I", 0x46505845)
    assert floating[:464] == xstate[:464] and floating[520:size] == xstate[520:]


@pytest.mark.parametrize(("used", "size"), [(0x602E7, 11008), (0x202E7, 11008 - 8192)])
def test_room_for_tiles_only_if_they_are_used(used, size):
    """The kernel gives no more to a thread that never used AMX, and PKRU is marked anyhow."""
    found = arch.Registers(*[0] * 27)._replace(rsp=1 << 40)
    xstate = an_xstate(11008, 0x602E7, used)
    address, frame = arch.signal_frame(found, xstate, 0, 0)
    floating = frame[struct.unpack_from("<Q", frame, 29 * 8)[0] - address :]
    assert len(floating) == size + 4
    assert struct.unpack_from("<I", floating, 480) == (size,)
    features = 0x602E7 if size == 11008 else 0x202E7
    assert struct.unpack_from("<Q", floating, 472) == (features,)
    assert struct.unpack_from("<Q", floating, 512) == (used | 0x203,)


def test_no_xsave_area():
    with pytest.raises(ValueError, match="no XSAVE area"):
        arch.signal_frame(arch.Registers(*[0] * 27), bytes(512), 0, 0)


def in_call(number, result, **more):
    """Registers of a thread whose call `number` was interrupted with `result`."""
    found = arch.Registers(*[0] * 27)
    return found._replace(rax=result & (1 << 64) - 1, orig_rax=number, rip=1000, **more)


@given(registers.map(lambda r: r._replace(orig_rax=r.orig_rax | 1 << 63)))
def test_outside_of_calls_nothing_restarts(found):
    assert arch.as_interrupted(found, can_continue=True) == found
    assert arch.as_restarted(found)._replace(orig_rax=found.orig_rax) == found


@given(st.integers(0, 500), st.integers(-600, 1 << 40))
def test_how_calls_restart(number, result):
    """By hand: two bytes back, with the number; one with a rest of time says EINTR."""
    found = in_call(number, result)
    by_hand = arch.as_restarted(found)
    assert arch.signed(by_hand.orig_rax) == -1
    if result in (-512, -513, -514):
        assert (by_hand.rip, by_hand.rax) == (998, number)
    elif result == -516:
        assert (by_hand.rip, arch.signed(by_hand.rax)) == (1000, -errno.EINTR)
    else:
        assert (by_hand.rip, by_hand.rax) == (1000, found.rax)
    assert arch.was_interrupted(result) == (result in (-512, -513, -514, -516))
    # by the kernel: as it left them
    if result != -errno.EINTR:
        assert arch.as_interrupted(found, can_continue=True) == found


@pytest.mark.parametrize(
    ("number", "timeout", "restarts"),
    [
        (232, {"r10": (1 << 64) - 1}, True), (232, {"r10": (1 << 32) - 1}, True),
        (232, {"r10": 1000}, False), (281, {"r10": (1 << 32) - 1}, True), (441, {}, True),
        (441, {"r10": 4096}, False), (128, {}, True), (128, {"rdx": 4096}, False), (65, {}, True),
        (220, {}, True), (220, {"r10": 4096}, False), (208, {}, True), (208, {"r8": 1}, False),
        (16, {}, False),
    ],
)  # fmt: skip
def test_calls_that_know_only_eintr(number, timeout, restarts):
    """Started again when they would wait for ever anyhow."""
    found = arch.as_interrupted(in_call(number, -errno.EINTR, **timeout), can_continue=True)
    assert arch.signed(found.rax) == (-514 if restarts else -errno.EINTR)
    assert (found.orig_rax, found.rip) == (number, 1000)


def test_a_filter_without_restart_syscall():
    found = arch.as_interrupted(in_call(35, -516), can_continue=False)
    assert (arch.signed(found.rax), arch.signed(found.orig_rax)) == (-errno.EINTR, -1)


@given(words, st.lists(words, max_size=6).map(tuple))
def test_arguments_go_into_their_registers(flags, args):
    before = in_call(7, -512)._replace(eflags=flags)
    found = arch.calling(before, 39, args, code=1, stack=2)
    six = (found.rdi, found.rsi, found.rdx, found.r10, found.r8, found.r9)
    assert six == (*args, *[0] * (6 - len(args)))
    assert (found.rax, found.rip, found.rsp, arch.signed(found.orig_rax)) == (39, 1, 2, -1)
    assert found.eflags == flags & ~0x500


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 20), st.integers(0, 1 << 21))
def test_a_sequence_is_aborted_only_inside(start, length, address):
    descriptor = struct.pack("<IIQQQ", 0, 0, start, length, 77)
    inside = start <= address < start + length
    assert arch.rseq_abort(descriptor, address) == (77 if inside else None)


def bpf(*instructions):
    return b"".join(struct.pack("<HBBI", *i) for i in instructions)


LD, LDX, ST, STX, RET_K, RET_A = 0x20, 0x61, 0x02, 0x03, 0x06, 0x16
JEQ, JGT, JGE, JSET, TAX, TXA = 0x15, 0x25, 0x35, 0x45, 0x07, 0x87
u32 = st.integers(0, (1 << 32) - 1)


@given(st.dictionaries(st.integers(0, 500), u32, max_size=20), st.integers(0, 500), u32)
def test_a_filter_that_is_a_table(table, number, default):
    """As those of QEMU and systemd are: a number, what it is answered."""
    rows = [row for n, action in table.items() for row in ((JEQ, 0, 1, n), (RET_K, 0, 0, action))]
    program = bpf((LD, 0, 0, 0), *rows, (RET_K, 0, 0, default))
    data = arch.seccomp_data(number, (), 0)
    assert arch.run_filter(program, data) == table.get(number, default)


@given(u32, u32)
@pytest.mark.parametrize(
    ("code", "what"),
    [
        (0x00, lambda a, b: a + b), (0x10, lambda a, b: a - b), (0x20, lambda a, b: a * b),
        (0x30, lambda a, b: a // b if b else 0), (0x40, lambda a, b: a | b),
        (0x50, lambda a, b: a & b), (0x60, lambda a, b: a << b % 32),
        (0x70, lambda a, b: a >> b % 32), (0x80, lambda a, b: -a), (0xA0, lambda a, b: a ^ b),
    ],
)  # fmt: skip
def test_arithmetic(code, what, a, b):
    """With a constant, and with the index register by way of memory."""
    by_constant = bpf((0x00, 0, 0, a), (code | 0x04, 0, 0, b), (RET_A, 0, 0, 0))
    by_index = bpf(
        (0x01, 0, 0, b), (STX, 0, 0, 3), (0x00, 0, 0, a), (ST, 0, 0, 15), (0x60, 0, 0, 3),
        (TAX, 0, 0, 0), (0x60, 0, 0, 15), (code | 0x0C, 0, 0, 0), (RET_A, 0, 0, 0),
    )  # fmt: skip
    expected = what(a, b) & (1 << 32) - 1
    assert arch.run_filter(by_constant, b"") == arch.run_filter(by_index, b"") == expected


@given(u32, u32)
@pytest.mark.parametrize(
    ("code", "what"),
    [
        (JEQ, lambda a, b: a == b), (JGT, lambda a, b: a > b), (JGE, lambda a, b: a >= b),
        (JSET, lambda a, b: a & b != 0),
    ],
)  # fmt: skip
def test_jumps(code, what, a, b):
    rest = ((RET_K, 0, 0, 0), (0x05, 0, 0, 1), (RET_K, 0, 0, 0), (RET_K, 0, 0, 1))
    program = bpf((0x00, 0, 0, a), (code, 1, 0, b), *rest)
    assert arch.run_filter(program, b"") == what(a, b)


@given(words, st.lists(words, min_size=6, max_size=6).map(tuple))
def test_filters_see_the_call(address, args):
    """Every word of struct seccomp_data, and its length."""
    data = arch.seccomp_data(323, args, address)
    halves = [half for word in (address, *args) for half in (word & 0xFFFFFFFF, word >> 32)]
    found = [arch.run_filter(bpf((LD, 0, 0, at), (RET_A, 0, 0, 0)), data) for at in range(0, 64, 4)]
    assert found == [323, 0xC000003E, *halves]
    length = bpf((0x81, 0, 0, 0), (TXA, 0, 0, 0), (RET_A, 0, 0, 0))
    assert arch.run_filter(length, data) == 64


@given(st.binary(max_size=400).map(lambda raw: raw[: len(raw) // 8 * 8]))
def test_nonsense_is_no_program(program):
    """It ends, with a word or with the one error that is announced."""
    with contextlib.suppress(ValueError):
        assert 0 <= arch.run_filter(program, bytes(64)) < 1 << 32


ACTIONS = [KILL, KILL_THREAD, TRAP, EPERM, 0x7FC00000, TRACE, 0x7FFC0000, 0x7FFF0000]


@given(st.lists(st.sampled_from(ACTIONS)))
def test_the_strictest_filter_decides(actions):
    """In the order of seccomp(2); without filters all is allowed."""
    filters = [bpf((RET_K, 0, 0, action)) for action in actions]
    strictest = min([*actions, ACTIONS[-1]], key=ACTIONS.index)
    assert arch.seccomp_verdict(filters, bytes(64)) == (strictest & 0xFFFF0000, strictest & 0xFFFF)


@pytest.mark.parametrize("at", [0, 5000, (1 << 20) - 5, (1 << 20) - 1, 1 << 20, (2 << 20) - 9])
def test_gadgets_are_found_wherever_they_lie(at):
    """On both sides of where two reads meet, too."""
    pattern = arch.RETURN_GADGETS[0]
    memory = os.memfd_create("code")
    try:
        os.pwrite(memory, pattern, at)
        mapping = inject.Mapping(0, 2 << 20, "r-xp", 0, (1, 1), "/lib/libc.so.6")
        assert inject._search(memory, [mapping], (b"not here", pattern)) == (at, pattern)
        assert inject._search(memory, [mapping], (b"not here",)) is None
    finally:
        os.close(memory)


# ---- QEMU --------------------------------------------------------------------------------------


def qmp(process, command):
    process.stdin.write(json.dumps({"execute": command}) + "\n")
    process.stdin.flush()
    while "return" not in (answer := json.loads(process.stdout.readline())):
        assert "error" not in answer
    return answer["return"]


@needs_root
@pytest.mark.qemu
@pytest.mark.parametrize(
    ("accelerator", "more"), [("tcg", []), ("kvm", []), ("tcg", ["-sandbox", "on"])]
)
def test_a_live_qemu(accelerator, more):
    """Twenty userfaultfds of its memory; it answers all the while."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64")
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    command = [
        "qemu-system-x86_64", "-accel", accelerator, "-display", "none", "-nodefaults", "-m", "64",
        "-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-qmp", "stdio",
        "-machine", "q35,memory-backend=ram", *more,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert "QMP" in json.loads(process.stdout.readline())
            qmp(process, "qmp_capabilities")
            for _ in range(20):
                with Injection(process.pid) as there:
                    fd = there.syscall(NUMBERS["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK)
                    here = there.take(fd)
                    there.close_fd(fd)
                assert userfaultfd.features(here, 0)
                os.close(here)
                assert qmp(process, "query-status")["running"]
                assert there.paused_seconds < 0.1
            qmp(process, "quit")
            assert process.wait(GIVE_UP) == 0
        finally:
            process.kill()
