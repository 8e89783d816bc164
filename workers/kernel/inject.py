"""Run system calls inside another process, unmodified and unasked, and bring descriptors from it.

ptrace(2) stops one thread for some milliseconds; the others run on. It makes the calls that it is
told to make, and goes on with the registers, signal mask and interrupted call that it had.

**Whatever happens to us, the target goes on.** Before a register is changed, a signal frame with
all that the thread had is on its stack, and the call returns into rt_sigreturn(2). So if we are
killed at any step, the thread finishes the call and restores itself; the kernel detaches it. That
is why nothing is single-stepped here (the trap flag would outlive us and kill the target), why
stops are looked at and not taken from the kernel (WNOWAIT: a signal that was taken and not yet
passed on would be lost), and why PTRACE_SEIZE is used: it stops nothing and sends no signal.

What differs from a thread that nobody stopped:

* Calls that know only EINTR (epoll_wait) return it if they have a timeout, as after any SIGCONT.
* If we are killed, they may return it without one too, and so do those that would have gone on
  with the rest of their time (nanosleep, poll). Other calls are started again, even if a signal
  that came in these milliseconds should have ended them.
* A call that blocks longer than the limit is left behind in the target, which then restores itself.

x86-64 only. ptrace obeys nobody but the OS thread that attached, so each Injection has one of its
own; when that ends, the kernel lets go of what is still attached, in whatever state it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ...transport.errors import AttachError, HostLacks, PageferryError
from . import arch
from .arch import Registers
from .libc import syscall
from .mappings import Mapping, mappings
from .task_facts import (
    check_process,
    check_thread,
    forbidden,
    gone,
    memory_of,
    parent_of,
    stat_of,
    status_of,
)

# Numbers of system calls here, by name; for what is not wired up too, where attaching says so.
NUMBERS = arch.SYSCALLS.get(platform.machine(), arch.SYSCALLS["x86_64"])

# <linux/ptrace.h>, <asm/ptrace-abi.h>
_CONT, _GETREGS, _SETREGS, _DETACH, _SYSCALL = 7, 12, 13, 17, 24
_GETREGSET, _SEIZE, _INTERRUPT = 0x4204, 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK, _GET_FILTER = 0x420A, 0x420B, 0x420C
_GET_RSEQ, _GET_DISPATCH = 0x420F, 0x4211
_TRACESYSGOOD, _NT_X86_XSTATE = 1, 0x202
# What waitid(2) says of a stop: a signal; one with bit 7 for a system call; or an event above it.
_CALL_STOP, _EVENT_STOP = signal.SIGTRAP | 0x80, 128
_WALL = 0x40000000
_WAIT = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | _WALL

_ALL_SIGNALS = (1 << 64) - 1
_XSTATE_MOST = 1 << 16
_INSTRUCTIONS_MOST = 4096  # BPF_MAXINSNS
# Seconds for the thread to stop, and for each call. What takes longer sleeps in the kernel.
LIMIT = 2.0
# Below the stack pointer there must be so much of the stack: for the frame, and for a signal
# handler on top of it if we are killed.
STACK_ROOM = 32 << 10
_ATTEMPTS, _BETWEEN_ATTEMPTS = 10, 0.005  # seconds
_CHUNK = 1 << 20  # bytes of code that are read at a time
_PIDFD_THREAD = os.O_EXCL  # Linux 6.9

_T = TypeVar("_T")
Step = Callable[[str], None]


class Injection:
    """Process `pid`, one thread of it stopped between `with` and its end: keep that short.

    `on_step` is told of each operation on the target before it happens, in the thread that does
    it. May be used from any thread, one at a time; not from the event loop's, which it would hold
    up. Raises AttachError (with `reason`) if this process cannot be attached to, HostLacks if none
    can or we may not. If the target is our own child, nobody may wait for it meanwhile.
    """

    def __init__(self, pid: int, *, on_step: Step | None = None) -> None:
        self.pid = pid
        self.paused_seconds = 0.0  # how long the thread stood still; known at the end
        self._on_step = on_step or (lambda step: None)
        self._stopped: _Stopped | None = None

    def __repr__(self) -> str:
        return f"<Injection pid={self.pid}>"

    def __enter__(self) -> Injection:
        self._tracer = ThreadPoolExecutor(1, thread_name_prefix="tracer", initializer=_hurry)
        try:
            self._run(self._attach)
        except BaseException:  # Ctrl-C too: the tracer works on, and has to let go
            with contextlib.suppress(PageferryError, OSError):
                self.__exit__()
            raise
        return self

    def __exit__(self, *rest: object) -> None:
        try:
            self._run(self._leave)
        finally:
            self._tracer.shutdown()

    def syscall(self, number: int, *args: int) -> int:
        """Make a system call in the target; OSError if it fails there, AttachError if it would
        not survive it. Up to six arguments; addresses are the target's. No call that forks, ends
        or executes, and none that sleeps for long."""
        return self._run(lambda: self._call(number, args))

    def take(self, fd: int) -> int:
        """A duplicate here of the target's descriptor, closed on exec (pidfd_getfd(2)); OSError if
        it has none of that number, or if we are out of them."""
        tid = self._thread().tracee.tid
        try:
            pidfd = os.pidfd_open(tid, 0 if tid == self.pid else _PIDFD_THREAD)
            try:
                return syscall(NUMBERS["pidfd_getfd"], pidfd, fd, 0)
            finally:
                os.close(pidfd)
        except ProcessLookupError:
            raise gone(self.pid) from None

    def close_fd(self, fd: int) -> None:
        """Close a descriptor in the target; OSError if it has none of that number."""
        self.syscall(NUMBERS["close"], fd)

    def _run(self, job: Callable[[], _T]) -> _T:
        return self._tracer.submit(job).result()

    def _thread(self) -> _Stopped:
        if self._stopped is None:
            raise AttachError(f"process {self.pid} is not attached to any more", reason="detached")
        return self._stopped

    def _attach(self) -> None:
        """Stop the first thread, of those that could be, that has room on its stack: now, or when
        it comes back from a signal handler or coroutine."""
        threads = check_process(self.pid)
        gadgets = _find_gadgets(self.pid, threads[0])
        last = _ATTEMPTS * len(threads) - 1
        for attempt, tid in enumerate(threads * _ATTEMPTS):
            try:
                return self._stop(tid, gadgets)
            except AttachError as e:
                if e.data["reason"] != "stack" or attempt == last:
                    raise
            if tid == threads[-1]:
                time.sleep(_BETWEEN_ATTEMPTS)

    def _stop(self, tid: int, gadgets: _Gadgets) -> None:
        check_thread(self.pid, tid)
        tracee = _Tracee(self.pid, tid, self._on_step)
        tracee.seize()
        tracee.interrupt()
        tracee.wait_for(_EVENT_STOP, _CONT)
        self._stopped = stopped = _Stopped(tracee, gadgets)
        try:
            stopped.look()
        except BaseException:
            self._leave()
            raise

    def _call(self, number: int, args: tuple[int, ...]) -> int:
        stopped = self._thread()
        stopped.check_filters(number, args)
        try:
            result = stopped.call(number, args)
        except AttachError as e:
            if e.data["reason"] in ("gone", "stuck"):  # nothing can be done to it any more
                self._stopped = None
            raise
        if arch.was_interrupted(result):
            result = -errno.EINTR
        if -4096 < result < 0:
            raise OSError(-result, f"in process {self.pid}: {os.strerror(-result)}")
        return result

    def _leave(self) -> None:
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            try:
                stopped.let_go()
            finally:
                self.paused_seconds += time.perf_counter() - stopped.tracee.stopped_at


def _hurry() -> None:
    """While somebody stands still because of this thread, it goes before others."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@dataclass(frozen=True, slots=True)
class _Gadgets:
    """Code of the target that we use, by address: `call` is "syscall; ret", `back` rt_sigreturn."""

    call: int
    call_code: bytes
    back: int
    back_code: bytes


_UNCONFINE = "start it without (QEMU: -sandbox off; systemd: no SystemCallFilter=)"
_HARMLESS = (arch.SECCOMP_ALLOW, arch.SECCOMP_LOG)
_ACTIONS = {
    0x80000000: "the death of the process",
    0x00000000: "the death of the thread",
    0x00030000: "SIGSYS",
    0x7FC00000: "a question to its supervisor",
    0x7FF00000: "a question to its tracer",
}


class _Stopped:
    """A thread that stands still: what it was doing, and how it makes a call for us.

    It is in one of two states: where it was found, at an event stop, or (`_moved`) behind a call
    of ours, at that call's exit stop, with the frame on its stack.
    """

    def __init__(self, tracee: _Tracee, gadgets: _Gadgets) -> None:
        self.tracee = tracee
        self._gadgets = gadgets
        self._found = self._goes_on = tracee.registers()
        self._mask = tracee.mask()
        self._filters: list[bytes] = []
        self._frame_at = 0
        self._moved = False

    def look(self) -> None:
        """See what only a stopped thread shows; AttachError if it cannot make calls for us."""
        pid = self.tracee.pid
        if self._found.cs != arch.CODE_64:
            raise AttachError(
                f"process {pid} runs 32-bit code: only 64-bit guests", reason="32-bit"
            )
        if self.tracee.dispatches_calls():
            raise AttachError(
                f"process {pid} has its system calls dispatched to itself (as Wine does): "
                "none can be made for it", reason="dispatch",
            )  # fmt: skip
        self._check_stack()
        self._goes_on = self._after_stop()

    def _check_stack(self) -> None:
        """Room below the stack pointer that belongs to this stack and to nothing else.

        The main thread's is marked as such, others end at a page that may not be touched. What
        lies elsewhere (Go's goroutines) may be a few KiB of a heap.
        """
        pid, at, below = self.tracee.pid, self._found.rsp, Mapping(0, 0, "---p", 0, (0, 0), "")
        for mapping in mappings(self.tracee.folder):
            if mapping.start <= at < mapping.end:
                guarded = below.end == mapping.start and below.access.startswith("---")
                if not guarded and mapping.name != "[stack]":
                    break
                if at - mapping.start >= STACK_ROOM:
                    return
                raise AttachError(
                    f"thread {self.tracee.tid} of process {pid} has less than "
                    f"{STACK_ROOM >> 10} KiB of its stack left: try again", reason="stack",
                )  # fmt: skip
            below = mapping
        raise AttachError(
            f"thread {self.tracee.tid} of process {pid} runs on a stack of its own making, where "
            "nothing may be written: try again", reason="stack",
        )  # fmt: skip

    def _after_stop(self) -> Registers:
        """What the thread goes on with, where it was in a call or a sequence that must know."""
        self._filters = self.tracee.filters()
        found = self._found
        abort = self.tracee.rseq_abort(found.rip) if arch.signed(found.orig_rax) < 0 else None
        if abort is not None:
            return found._replace(rip=abort)
        can_continue = self._allows(NUMBERS["restart_syscall"])
        return arch.as_interrupted(found, can_continue=can_continue)

    def _verdict(self, number: int, args: tuple[int, ...] = ()) -> tuple[int, int]:
        data = arch.seccomp_data(number, args, self._gadgets.call + 2)
        try:
            return arch.seccomp_verdict(self._filters, data)
        except ValueError as e:
            raise AttachError(
                f"a seccomp filter of process {self.tracee.pid} is not understood ({e}): "
                f"{_UNCONFINE}", reason="seccomp",
            ) from e  # fmt: skip

    def _allows(self, number: int) -> bool:
        return self._verdict(number)[0] in _HARMLESS

    def check_filters(self, number: int, args: tuple[int, ...]) -> None:
        """AttachError if a seccomp filter forbids the call, or the way back: some would kill."""
        for nr, values in ((number, args), (NUMBERS["rt_sigreturn"], ())):
            action, value = self._verdict(nr, values)
            if action in _HARMLESS:
                continue
            answer = _ACTIONS.get(action, f"action {action:#x}")
            if action == arch.SECCOMP_ERRNO:
                answer = f"{errno.errorcode.get(value, value)} ({os.strerror(value)})"
            raise AttachError(
                f"the seccomp filter of process {self.tracee.pid} answers system call {nr} with "
                f"{answer}: {_UNCONFINE}", reason="seccomp", errno=value,
            )  # fmt: skip

    def call(self, number: int, args: tuple[int, ...]) -> int:
        """One system call; what the kernel left in rax. AttachError if the thread is lost."""
        tracee, first = self.tracee, not self._moved
        if first:
            self._write_frame()
        self._moved = True
        tracee.set_registers(
            arch.calling(self._found, number, args, code=self._gadgets.call, stack=self._frame_at)
        )
        if first:
            # Not before the registers: from here on the frame gives the mask back.
            tracee.set_mask(_ALL_SIGNALS)
        for _ in ("entry", "exit"):
            tracee.resume(_SYSCALL)
            tracee.wait_for(_CALL_STOP, _SYSCALL)
        return arch.signed(tracee.registers().rax)

    def _write_frame(self) -> None:
        """What was found goes to the stack; and the gadgets are where they were seen: between
        then and the stop, the process may have become another program (execve)."""
        gadgets = self._gadgets
        self._frame_at, frame = arch.signal_frame(
            arch.as_restarted(self._goes_on), self.tracee.xstate(), self._mask, gadgets.back
        )
        tracee = self.tracee
        if not (
            tracee.has(gadgets.call, gadgets.call_code)
            and tracee.has(gadgets.back, gadgets.back_code)
        ):
            tracee.mask()  # says so if it is gone: then it has no memory either
            raise _no_gadgets(tracee.pid)
        if not tracee.write(self._frame_at, frame):
            tracee.mask()
            raise AttachError(f"the stack of process {tracee.pid} is not writable", reason="stack")

    def let_go(self) -> None:
        """Give everything back and detach.

        Registers are set back at an event stop: from there the kernel looks at signals and then
        finishes interrupted calls by its own rules. From a call's exit stop it need not.
        """
        tracee = self.tracee
        if self._moved:
            tracee.interrupt()
            tracee.resume(_CONT)
            tracee.wait_for(_EVENT_STOP, _CONT)
            tracee.set_mask(self._mask)
        if self._moved or self._goes_on != self._found:
            tracee.set_registers(self._goes_on)
        tracee.detach()


class _Tracee:
    """One thread that is traced: each method one operation on it, told to `on_step` before."""

    def __init__(self, pid: int, tid: int, on_step: Step) -> None:
        self.pid, self.tid = pid, tid
        self.folder = f"/proc/{pid}/task/{tid}"  # not /proc/PID: the main thread may have ended
        self.stopped_at = 0.0
        self._on_step = on_step

    def _ptrace(self, step: str, request: int, address: int = 0, data: int = 0) -> int:
        self._on_step(step)
        try:
            return syscall(NUMBERS["ptrace"], request, self.tid, address, data)
        except ProcessLookupError:
            # not stopped any more: it was killed, which is reported next
            raise gone(self.pid) if self._has_ended() else self._stuck() from None

    def seize(self) -> None:
        self._on_step("seize")
        try:
            syscall(NUMBERS["ptrace"], _SEIZE, self.tid, 0, _TRACESYSGOOD)
        except ProcessLookupError:
            raise gone(self.pid) from None
        except PermissionError:
            # What ends cannot be traced either, and somebody may have been quicker.
            if self.tid not in check_process(self.pid):
                raise gone(self.pid) from None
            check_thread(self.pid, self.tid)
            raise forbidden(self.pid) from None

    def interrupt(self) -> None:
        # asked for, not there yet: so what is said of the pause is an upper bound
        self.stopped_at = self.stopped_at or time.perf_counter()
        self._ptrace("interrupt", _INTERRUPT)

    def resume(self, request: int, signal_number: int = 0) -> None:
        self._ptrace("resume", request, 0, signal_number)

    def detach(self) -> None:
        self._ptrace("detach", _DETACH)

    def wait_for(self, wanted: int, request: int) -> None:
        """Until it stops for that: signals and group stops between happen as if untraced."""
        while True:
            stop = self._wait()
            event = stop >> 8
            if wanted in (stop, event):
                return
            self.resume(request, 0 if event or stop == _CALL_STOP else stop)

    def _wait(self) -> int:
        """The next stop. AttachError if it ends or does not stop within the limit."""
        self._on_step("wait")
        end = time.monotonic() + LIMIT
        pause = 0.0
        while (stop := self._poll()) is None:
            if time.monotonic() > end:
                raise self._stuck()
            time.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)
        return stop

    def _poll(self) -> int | None:
        try:
            found = os.waitid(os.P_PID, self.tid, _WAIT)
        except ChildProcessError:
            raise gone(self.pid) from None
        if found is None:
            return None
        if found.si_code == os.CLD_TRAPPED:
            return found.si_status
        self._reap()
        raise gone(self.pid)

    def _has_ended(self) -> bool:
        """Whether it is ending, soon."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            try:
                self._poll()
            except AttachError:
                return True
            time.sleep(1e-3)
        return False

    def _reap(self) -> None:
        """Its parent hears of the end only now. If we are that ourselves, whoever started it will
        want to wait for it."""
        if self.tid != self.pid or parent_of(self.pid) != os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.tid, os.WEXITED | os.WNOHANG | _WALL)

    def _stuck(self) -> AttachError:
        """It is let go of when our thread ends; a stop that was asked for is then forgotten."""
        state = stat_of(self.folder)[0]
        where = (
            "in the kernel, where nothing interrupts it" if state == "D" else f"in state {state}"
        )
        return AttachError(
            f"thread {self.tid} of process {self.pid} did not stop within {LIMIT:g} s: it is "
            f"{where}. Try again when its disk or device answers", reason="stuck",
        )  # fmt: skip

    def registers(self) -> Registers:
        raw = ctypes.create_string_buffer(arch.REGISTERS_SIZE)
        self._ptrace("getregs", _GETREGS, 0, ctypes.addressof(raw))
        return arch.unpack_registers(raw.raw)

    def set_registers(self, registers: Registers) -> None:
        raw = ctypes.create_string_buffer(arch.pack_registers(registers), arch.REGISTERS_SIZE)
        self._ptrace("setregs", _SETREGS, 0, ctypes.addressof(raw))

    def xstate(self) -> bytes:
        """Floating-point and vector registers, as XSAVE lays them out."""
        raw = ctypes.create_string_buffer(_XSTATE_MOST)
        # struct iovec: the kernel sets the length to what there is
        vector = (ctypes.c_uint64 * 2)(ctypes.addressof(raw), _XSTATE_MOST)
        try:
            self._ptrace("getregset", _GETREGSET, _NT_X86_XSTATE, ctypes.addressof(vector))
        except OSError as e:
            raise HostLacks(f"this processor's vector registers cannot be read: {e}") from e
        return raw.raw[: vector[1]]

    def mask(self) -> int:
        """Signals that are blocked, signal 1 in bit 0; not those that are for one call only."""
        raw = ctypes.c_uint64()
        self._ptrace("getsigmask", _GETSIGMASK, 8, ctypes.addressof(raw))
        return raw.value

    def set_mask(self, mask: int) -> None:
        raw = ctypes.c_uint64(mask)
        self._ptrace("setsigmask", _SETSIGMASK, 8, ctypes.addressof(raw))

    def dispatches_calls(self) -> bool:
        """Whether prctl(PR_SET_SYSCALL_USER_DISPATCH) is on; before Linux 6.4 nobody can know."""
        config = (ctypes.c_uint64 * 4)()  # mode, selector, offset, length
        try:
            self._ptrace("dispatch", _GET_DISPATCH, ctypes.sizeof(config), ctypes.addressof(config))
        except OSError:
            return False
        return config[0] != 0

    def rseq_abort(self, address: int) -> int | None:
        """Where the restartable sequence that `address` lies in is aborted to; None for most."""
        config = (ctypes.c_uint64 * 3)()  # the thread's struct rseq; its size and signature
        try:
            self._ptrace("rseq", _GET_RSEQ, ctypes.sizeof(config), ctypes.addressof(config))
            (section,) = struct.unpack("<Q", self.read(config[0] + 8, 8) if config[0] else bytes(8))
            return arch.rseq_abort(self.read(section, 32), address) if section else None
        except OSError:  # before Linux 5.13, or a pointer to nothing, which the kernel will judge
            return None

    def filters(self) -> list[bytes]:
        """The seccomp filters, as programs; AttachError if there are some that we cannot see."""
        found: list[bytes] = []
        if status_of(self.pid, self.folder).get("Seccomp", "0") == "0":
            return found
        raw = ctypes.create_string_buffer(8 * _INSTRUCTIONS_MOST)
        while True:
            try:
                count = self._ptrace("filter", _GET_FILTER, len(found), ctypes.addressof(raw))
            except FileNotFoundError:
                return found
            except OSError as e:
                raise AttachError(
                    f"process {self.pid} is confined by seccomp, and its filters cannot be read "
                    f"({e.strerror}): be root, unconfined, or {_UNCONFINE}", reason="seccomp",
                ) from e  # fmt: skip
            found.append(raw.raw[: 8 * count])

    def read(self, address: int, length: int) -> bytes:
        """Memory of the target; OSError if nothing is there."""
        self._on_step("read")
        with memory_of(self.folder, os.O_RDONLY) as fd:
            data = os.pread(fd, length, address)
        if len(data) < length:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return data

    def has(self, address: int, code: bytes) -> bool:
        """Whether that lies at `address`."""
        try:
            return self.read(address, len(code)) == code
        except OSError:
            return False

    def write(self, address: int, data: bytes) -> bool:
        """False if it cannot be written, or not all."""
        self._on_step("write")
        try:
            with memory_of(self.folder, os.O_WRONLY) as fd:
                return os.pwrite(fd, data, address) == len(data)
        except OSError:
            return False


def _find_gadgets(pid: int, tid: int) -> _Gadgets:
    """Code in the target to make a call and to come back with."""
    folder = f"/proc/{pid}/task/{tid}"
    try:
        with open(f"{folder}/exe", "rb") as exe:
            if exe.read(5) == b"\x7fELF\x01":
                raise AttachError(
                    f"process {pid} is a 32-bit program: only 64-bit guests", reason="32-bit"
                )
        code = [m for m in mappings(folder) if "x" in m.access and m.has_code]
        with memory_of(folder, os.O_RDONLY) as fd:
            code.sort(key=Mapping.order)
            call, back = (
                _search(fd, code, arch.CALL_GADGETS),
                _search(fd, code, arch.RETURN_GADGETS),
            )
    except PermissionError:
        raise forbidden(pid) from None
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None
    if call is None or back is None:
        raise _no_gadgets(pid)
    return _Gadgets(*call, *back)


def _search(
    fd: int, places: list[Mapping], patterns: tuple[bytes, ...]
) -> tuple[int, bytes] | None:
    """Where the first of `patterns` that there is lies, and which that is."""
    for pattern in patterns:
        for mapping in places:
            for at in range(mapping.start, mapping.end, _CHUNK):
                length = min(_CHUNK + len(pattern) - 1, mapping.end - at)
                try:
                    found = os.pread(fd, length, at).find(pattern)
                except OSError:  # behind the end of the file
                    break
                if found >= 0:
                    return at + found, pattern
    return None


def _no_gadgets(pid: int) -> AttachError:
    return AttachError(
        f"process {pid} has no code that makes a system call and returns, or none to return from "
        "a signal: it was built without a C library", reason="gadget",
    )  # fmt: skip
