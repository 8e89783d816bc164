"""What injection has to know of a processor and its kernel: numbers, registers, the signal frame,
the rules by which system calls restart, classic BPF. Pure: bytes and integers in, the same out.

x86-64 alone. aarch64 has its numbers here and no more: its kernel rewinds an interrupted call
before a tracer sees the thread, and hides whether that was one with a timeout to go on with
(do_signal in arch/arm64/kernel/signal.c). Nobody should guess that without such a machine.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

# System calls by machine; <asm/unistd_64.h>, <asm-generic/unistd.h>.
SYSCALLS = {
    "x86_64": {
        "mmap": 9, "munmap": 11, "close": 3, "ioctl": 16, "getpid": 39, "ptrace": 101,
        "rt_sigreturn": 15, "restart_syscall": 219, "userfaultfd": 323, "pidfd_getfd": 438,
    },
    "aarch64": {
        "mmap": 222, "munmap": 215, "close": 57, "ioctl": 29, "getpid": 172, "ptrace": 117,
        "rt_sigreturn": 139, "restart_syscall": 128, "userfaultfd": 282, "pidfd_getfd": 438,
    },
}  # fmt: skip

# "syscall; ret", wherever these bytes lie: it need not be where an instruction begins for the
# compiler. The others, of glibc, skip the ret if the call failed, and set errno before the next.
CALL_GADGETS = (
    bytes.fromhex("0f05c3"),
    bytes.fromhex("0f05483d01f0ffff7301c3"),
    bytes.fromhex("0f05483d00f0ffff7701c3"),
)
# "mov $15, %rax; syscall": rt_sigreturn. Every C library has it, for signal handlers to return to.
RETURN_GADGETS = (bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05"))

CODE_64 = 0x33  # the code segment of 64-bit programs

_WORD = (1 << 64) - 1
_EINTR = 4
# What an interrupted call leaves in rax for the kernel itself; include/linux/errno.h.
_RESTART_SYS, _RESTART_NO_INTR, _RESTART_NO_HANDLER, _RESTART_BLOCK = 512, 513, 514, 516
_FLAG_TRAP, _FLAG_DIRECTION = 1 << 8, 1 << 10


class Registers(NamedTuple):
    """struct user_regs_struct of <sys/user.h>, in its order: words without a sign."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int


_REGISTERS = struct.Struct("27Q")
REGISTERS_SIZE = _REGISTERS.size


def unpack_registers(raw: bytes) -> Registers:
    return Registers(*_REGISTERS.unpack(raw))


def pack_registers(registers: Registers) -> bytes:
    return _REGISTERS.pack(*registers)


def signed(word: int) -> int:
    """A register's 64 bits as a number with a sign."""
    return word - (1 << 64) if word >> 63 else word


def calling(
    registers: Registers, number: int, args: tuple[int, ...], *, code: int, stack: int
) -> Registers:
    """Registers that make system call `number`, with up to six arguments, by the instruction at
    `code`, which returns to the address at `stack`."""
    rdi, rsi, rdx, r10, r8, r9 = (value & _WORD for value in (*args, *[0] * (6 - len(args))))
    return registers._replace(
        rax=number, rdi=rdi, rsi=rsi, rdx=rdx, r10=r10, r8=r8, r9=r9, rip=code, rsp=stack,
        orig_rax=_WORD,  # no call is to be restarted
        eflags=registers.eflags & ~(_FLAG_TRAP | _FLAG_DIRECTION),
    )  # fmt: skip


# ---- interrupted system calls ----------------------------------------------------------------

# Calls that say EINTR whenever a tracer stops the thread, and when they have no timeout: then
# starting again makes no difference to anybody. With one they would wait too long.
_WITHOUT_TIMEOUT: dict[int, Callable[[Registers], bool]] = {
    232: lambda r: bool(r.r10 >> 31 & 1),  # epoll_wait: a negative int
    281: lambda r: bool(r.r10 >> 31 & 1),  # epoll_pwait
    441: lambda r: r.r10 == 0,  # epoll_pwait2: no timespec
    128: lambda r: r.rdx == 0,  # rt_sigtimedwait
    65: lambda r: True,  # semop
    220: lambda r: r.r10 == 0,  # semtimedop
    208: lambda r: r.r8 == 0,  # io_getevents
}


def as_interrupted(registers: Registers, *, can_continue: bool) -> Registers:
    """What to set back when the kernel still has to finish an interrupted call by its own rules:
    EINTR if a signal handler runs, else start it again, as if nobody had stopped the thread.

    That is what the kernel left, but for calls that know only EINTR. `can_continue`: whether
    restart_syscall is allowed; a seccomp filter that was written without it would kill.
    """
    if signed(registers.orig_rax) < 0:
        return registers
    result = -signed(registers.rax)
    forever = _WITHOUT_TIMEOUT.get(registers.orig_rax)
    if result == _EINTR and forever is not None and forever(registers):
        return registers._replace(rax=-_RESTART_NO_HANDLER & _WORD)
    if result == _RESTART_BLOCK and not can_continue:
        return registers._replace(rax=-_EINTR & _WORD, orig_rax=_WORD)
    return registers


def as_restarted(registers: Registers) -> Registers:
    """`as_interrupted`, finished by hand, for a signal frame: nobody restarts a call after
    rt_sigreturn. A call with a timeout to go on with says EINTR: rt_sigreturn forgets the rest.
    """
    result = -signed(registers.rax)
    if signed(registers.orig_rax) >= 0:
        if result in (_RESTART_SYS, _RESTART_NO_INTR, _RESTART_NO_HANDLER):
            # back to the two bytes of the instruction, with the number that it was called with
            registers = registers._replace(rip=registers.rip - 2 & _WORD, rax=registers.orig_rax)
        elif result == _RESTART_BLOCK:
            registers = registers._replace(rax=-_EINTR & _WORD)
    return registers._replace(orig_rax=_WORD)


def was_interrupted(result: int) -> bool:
    """Whether a call's signed result means that something stopped it before it did anything."""
    return -result in (_RESTART_SYS, _RESTART_NO_INTR, _RESTART_NO_HANDLER, _RESTART_BLOCK)


# ---- the signal frame ------------------------------------------------------------------------

# struct rt_sigframe of arch/x86/include/asm/sigframe.h: return address; uc_flags, uc_link;
# ss_sp, ss_flags, ss_size; sigcontext_64; uc_sigmask; siginfo.
_FRAME = struct.Struct("<Q QQ QixxxxQ 18Q 4H 4Q Q 64x Q 128x")
_UC_FLAGS = 1 | 2 | 4  # FP_XSTATE, SIGCONTEXT_SS, STRICT_RESTORE_SS
# rt_sigreturn sets the alternate signal stack too, and nobody outside can know which the thread
# has. A mode that does not exist is EINVAL, which it passes over: the stack stays what it was.
_KEEP_ALTERNATE_STACK = 0x40
_RED_ZONE = 128  # bytes below the stack pointer that belong to the function that runs

# The state of vector registers, as XSAVE writes it; struct _fpx_sw_bytes: magic1, extended_size,
# xfeatures, xstate_size.
_SOFTWARE = struct.Struct("<IIQI28x")
_SOFTWARE_AT, _HEADER_AT, _XSTATE_LEAST = 464, 512, 576
_MAGIC1, _MAGIC2 = 0x46505853, struct.pack("<I", 0x46505845)
_X87_SSE, _PKRU, _TILE_DATA = 3, 1 << 9, 1 << 18
_TILE_DATA_SIZE = 8192


def signal_frame(
    registers: Registers, xstate: bytes, mask: int, return_gadget: int
) -> tuple[int, bytes]:
    """The frame that gives a thread `registers`, vector registers and signal mask back.

    Its address, and what is to be written there: laid out as the kernel does when it delivers a
    signal (get_sigframe, x64_setup_rt_frame). Whoever returns with the stack pointer at the
    address runs `return_gadget`, and that is rt_sigreturn. `xstate`: NT_X86_XSTATE of ptrace(2).
    """
    floating = _floating_point(xstate)
    floating_at = (registers.rsp - _RED_ZONE - len(floating)) & -64
    address = ((floating_at - _FRAME.size) & -16) - 8
    r = registers
    frame = _FRAME.pack(
        return_gadget, _UC_FLAGS, 0, 0, _KEEP_ALTERNATE_STACK, 0,
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
        r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags,
        r.cs, 0, 0, r.ss, 0, 0, mask, 0, floating_at, mask,
    )  # fmt: skip
    return address, frame.ljust(floating_at - address, b"\0") + floating


def _floating_point(xstate: bytes) -> bytes:
    """The frame's part for vector registers, of what ptrace says (save_xstate_epilog in
    arch/x86/kernel/fpu/signal.c)."""
    if len(xstate) < _XSTATE_LEAST:
        raise ValueError(f"{len(xstate)} bytes are no XSAVE area")
    (enabled,) = struct.unpack_from("<Q", xstate, _SOFTWARE_AT)
    (used,) = struct.unpack_from("<Q", xstate, _HEADER_AT)
    size = len(xstate)
    if enabled & _TILE_DATA and not used & _TILE_DATA:
        # AMX tiles are last, and a thread that never used them has no room for them: the kernel
        # would take the frame for a broken one and restore SSE alone.
        size, enabled = size - _TILE_DATA_SIZE, enabled & ~_TILE_DATA
    out = bytearray(xstate[:size])
    _SOFTWARE.pack_into(out, _SOFTWARE_AT, _MAGIC1, size + len(_MAGIC2), enabled, size)
    # ptrace writes these out whether or not they are marked as used; PKRU not marked would be 0
    struct.pack_into("<Q", out, _HEADER_AT, used | _X87_SSE | enabled & _PKRU)
    return bytes(out) + _MAGIC2


# ---- restartable sequences -------------------------------------------------------------------


def rseq_abort(descriptor: bytes, address: int) -> int | None:
    """Where a thread at `address` has to go on if it was in the critical section of struct
    rseq_cs (<linux/rseq.h>); None if it was not. The kernel would forget the section when it sees
    the thread elsewhere, and the thread would finish what it may not finish."""
    _, _, start, length, abort = struct.unpack("<IIQQQ", descriptor)
    return abort if start <= address < start + length else None


# ---- seccomp ---------------------------------------------------------------------------------

# struct seccomp_data: number, AUDIT_ARCH_X86_64, instruction pointer, six arguments
_SECCOMP_DATA = struct.Struct("<iIQ6Q")
_AUDIT_ARCH = 0xC000003E
SECCOMP_ALLOW, SECCOMP_LOG, SECCOMP_ERRNO = 0x7FFF0000, 0x7FFC0000, 0x00050000
_SECCOMP_ACTION = 0xFFFF0000
_SECCOMP_KILL_THREAD = 0

_DIVISIONS = (0x30, 0x90)
_INSTRUCTION = struct.Struct("<HBBI")
_U32 = (1 << 32) - 1
_ARITHMETIC: dict[int, Callable[[int, int], int]] = {
    0x00: lambda a, b: a + b,
    0x10: lambda a, b: a - b,
    0x20: lambda a, b: a * b,
    0x30: lambda a, b: a // b,
    0x40: lambda a, b: a | b,
    0x50: lambda a, b: a & b,
    0x60: lambda a, b: a << (b & 31),
    0x70: lambda a, b: a >> (b & 31),
    0x80: lambda a, b: -a,
    0x90: lambda a, b: a % b,
    0xA0: lambda a, b: a ^ b,
}
_JUMPS: dict[int, Callable[[int, int], bool]] = {
    0x10: lambda a, b: a == b,
    0x20: lambda a, b: a > b,
    0x30: lambda a, b: a >= b,
    0x40: lambda a, b: bool(a & b),
}


def seccomp_data(number: int, args: tuple[int, ...], address: int) -> bytes:
    """What a filter sees of a call; `address`: that behind the instruction."""
    padded = (value & _WORD for value in (*args, *[0] * (6 - len(args))))
    return _SECCOMP_DATA.pack(number, _AUDIT_ARCH, address, *padded)


def seccomp_verdict(filters: Iterable[bytes], data: bytes) -> tuple[int, int]:
    """The action that the kernel takes, and its data (the errno): the strictest of all filters.
    ValueError if one is not understood."""
    verdicts = [SECCOMP_ALLOW, *(run_filter(program, data) for program in filters)]
    # as numbers with a sign: KILL_PROCESS is the smallest (seccomp_run_filters)
    strictest = min(verdicts, key=lambda v: (v & _SECCOMP_ACTION) - (v >> 31 << 32))
    return strictest & _SECCOMP_ACTION, strictest & 0xFFFF


def run_filter(program: bytes, data: bytes) -> int:
    """What a classic BPF program (struct sock_filter[]) returns; ValueError if it is not valid.

    Its jumps go forward only, so it ends.
    """
    try:
        return _Machine(data).run(list(_INSTRUCTION.iter_unpack(program)))
    except (IndexError, KeyError, struct.error) as e:
        raise ValueError(f"not a valid BPF program: {e!r}") from e


class _Machine:
    """Accumulator, index and sixteen words: net/core/filter.c, seccomp's part of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.a = self.x = 0
        self.memory = [0] * 16

    def run(self, program: list[tuple[int, int, int, int]]) -> int:
        at = 0
        while True:
            code, true, false, k = program[at]
            at += 1
            kind, operand = code & 0x07, self.x if code & 0x08 else k
            if kind == 0x06:  # RET, of A or a constant
                return self.a if code & 0x10 else k
            if kind == 0x05 and code & 0xF0 == 0:  # JA
                at += k
            elif kind == 0x05:  # JMP
                at += true if _JUMPS[code & 0xF0](self.a, operand) else false
            elif kind == 0x04:  # ALU
                if code & 0xF0 in _DIVISIONS and operand == 0:
                    return _SECCOMP_KILL_THREAD  # the program ends there, with 0
                self.a = _ARITHMETIC[code & 0xF0](self.a, operand) & _U32
            else:
                self._move(code, k)

    def _move(self, code: int, k: int) -> None:
        """Loads, stores, and the two that copy between A and X."""
        match code & 0x07:
            case 0x00:  # LD
                self.a = self._load(code & 0xE0, k)
            case 0x01:  # LDX
                self.x = self._load(code & 0xE0, k)
            case 0x02:  # ST
                self.memory[k] = self.a
            case 0x03:  # STX
                self.memory[k] = self.x
            case _ if code & 0x80:  # TXA
                self.a = self.x
            case _:  # TAX
                self.x = self.a

    def _load(self, mode: int, k: int) -> int:
        words = {
            0x00: lambda: k,  # IMM
            0x20: lambda: int(struct.unpack_from("<I", self.data, k)[0]),  # ABS
            0x60: lambda: self.memory[k],  # MEM
            0x80: lambda: len(self.data),  # LEN
        }
        return words[mode]()
