"""QEMU's postcopy as a peer, with and without postcopy-preempt: how long its guest waits.

The guest is a boot sector that writes to pages at random and takes the time of each write. It is
steered from outside, through a control block in its RAM, which at the source is a shared file; at
the destination RAM is private, as postcopy has it, and read with pmemsave. QEMU 7.2 does not set
TCP_NODELAY, so that the last part of a page may wait 40 ms for an acknowledgement: with `nodelay`
a preloaded library sets it. Knows no other method. Source: QEMU's docs/devel/migration.rst and
tests/migration/x86-a-b-bootblock.S.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .content import make
from .lab import BenchError, Lab, free_port, remove, wait_for
from .links import Link
from .qemu import Emulator, Qemu

# 32 bits each but the last: mode (0 waits, 1 writes), first page, pages, shortest time to log
# (ticks), touches, times in the log, random state, -, ticks now (64).
_CONTROL, _LOG, _LOG_LENGTH = 0x8000, 0x10000, 131_072
_FIRST_PAGE = 512  # firmware and the guest itself live below
# The guest's page tables cover 4 GiB, of which RAM takes the lower part.
LARGEST = 2 << 30
_DISK = 4 << 20  # firmware boots nothing smaller
# A touch that took longer waited for its page. What KVM does at the first touch of a page that is
# there took 15 to 25 us, the fastest answer of a source more than 100.
_WAITED_SECONDS = 50e-6
# Precopy moves nearly nothing, so that all memory is left to postcopy.
_PRECOPY_RATE = 1 << 20
_PRECOPY_SECONDS = 0.3

_NODELAY = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static void at_once(int fd) {
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

int connect(int fd, const struct sockaddr *to, socklen_t length) {
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    if (to->sa_family == AF_INET) at_once(fd);
    return next(fd, to, length);
}

int accept4(int fd, struct sockaddr *from, socklen_t *length, int flags) {
    int (*next)(int, struct sockaddr *, socklen_t *, int) = dlsym(RTLD_NEXT, "accept4");
    int got = next(fd, from, length, flags);
    if (got >= 0) at_once(got);
    return got;
}
"""

_GUEST = """\
.intel_syntax noprefix
.code16
.globl _start
_start:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    in al, 0x92            # address line 20
    or al, 2
    out 0x92, al
    lgdt [gdtr]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    ljmp 0x08, offset protected
.code32
protected:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x7c00
    mov edi, 0x1000        # 4 GiB as they are, in pages of 2 MiB, for ring 3
    mov cr3, edi
    xor eax, eax
    mov ecx, 0x1800
    rep stosd
    mov dword ptr [0x1000], 0x2007
    mov edi, 0x2000
    mov eax, 0x3007
1:  mov [edi], eax
    add edi, 8
    add eax, 0x1000
    cmp edi, 0x2020
    jb 1b
    mov edi, 0x3000
    mov eax, 0x87
2:  mov [edi], eax
    add edi, 8
    add eax, 0x200000
    cmp edi, 0x7000
    jb 2b
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov ecx, 0xc0000080    # EFER: long mode
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    ljmp 0x18, offset long_mode
.code64
long_mode:
    mov esp, 0x7c00
    push 0x23              # to ring 3: some KVMs interpret ring 0
    push 0x7c00
    push 2
    push 0x2b
    push offset user
    iretq
user:
    mov ebp, 0x8000
    mov edi, ebp
    xor eax, eax
    mov ecx, 16
    rep stosd
    mov dword ptr [rbp+24], 0x12345678
idle:
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [rbp+32], rax
    pause
    cmp dword ptr [rbp], 0
    je idle
touch:
    mov eax, [rbp+24]      # xorshift32 (Marsaglia, 2003)
    mov ebx, eax
    shl ebx, 13
    xor eax, ebx
    mov ebx, eax
    shr ebx, 17
    xor eax, ebx
    mov ebx, eax
    shl ebx, 5
    xor eax, ebx
    mov [rbp+24], eax
    mov ecx, [rbp+8]
    imul rax, rcx
    shr rax, 32
    add eax, [rbp+4]
    shl rax, 12
    mov rdi, rax
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rsi, rax
    inc byte ptr [rdi]     # this is timed
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, rsi
    inc dword ptr [rbp+16]
    mov rcx, rax
    shr rcx, 32
    jz 1f
    or eax, -1
1:  cmp eax, [rbp+12]
    jb 2f
    mov ecx, [rbp+20]
    cmp ecx, 131072
    jae 2f
    mov [rcx*4+0x10000], eax
    inc dword ptr [rbp+20]
2:  cmp dword ptr [rbp], 0
    jne touch
    jmp idle
.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff
    .quad 0x00aff2000000ffff, 0x00affa000000ffff
gdtr: .word 47
    .long gdt
.org 510
.word 0xaa55
"""


class _Control:
    """The guest's control block, through its RAM file."""

    def __init__(self, ram: str) -> None:
        with open(ram, "r+b") as f:
            self._memory = mmap.mmap(f.fileno(), _LOG)

    def ticks(self) -> int:
        """Of the guest's clock, while it waits."""
        return int(struct.unpack_from("<Q", self._memory, _CONTROL + 32)[0])

    def logged(self) -> int:
        return int(struct.unpack_from("<I", self._memory, _CONTROL + 20)[0])

    def set_up(self, pages: int, ticks: int) -> None:
        struct.pack_into("<III", self._memory, _CONTROL + 4, _FIRST_PAGE, pages, ticks)

    def go(self) -> None:
        struct.pack_into("<I", self._memory, _CONTROL, 1)

    def close(self) -> None:
        self._memory.close()


def ticks_a_second(control: _Control) -> float:
    """Of the guest's clock by ours."""
    begin, first = time.monotonic(), control.ticks()
    time.sleep(0.3)
    return (control.ticks() - first) / (time.monotonic() - begin)


@dataclass
class Waited:
    """One postcopy. `waits`: microseconds, of touches that took long; `seconds`: from its start to
    its end; `background`: bytes that nobody had asked for."""

    waits: npt.NDArray[np.float64]
    seconds: float
    total: float
    background: int
    report: dict[str, Any] = field(default_factory=dict)


def nodelay_library(lab: Lab) -> str:
    """What a QEMU is to preload so that its TCP connections have TCP_NODELAY. BenchError without
    a C compiler."""
    return _compiled(lab, "nodelay.c", _NODELAY, "-shared", "-fPIC", "-ldl")


def _compiled(lab: Lab, source: str, text: str, *flags: str) -> str:
    path = os.path.join(lab.directory, source)
    with open(path, "w") as f:
        f.write(text)
    lab.start(["cc", *flags, "-o", f"{path}.out", path]).join()
    return f"{path}.out"


class Postcopy:
    """How QEMU's postcopy is run here."""

    def __init__(self, lab: Lab, host: Qemu) -> None:
        self._lab, self._host = lab, host
        self._disk = self._shim = ""

    def missing(self) -> str:
        """Why it cannot be run, or nothing."""
        if problem := self._host.missing():
            return problem
        if shutil.which("cc") is None:
            return "no C compiler (cc) to build QEMU's guest with"
        if not self._shim:
            try:
                self._build()
            except BenchError as e:
                return str(e)
        return ""

    def _build(self) -> None:
        self._disk = _compiled(
            self._lab, "guest.S", _GUEST, "-nostdlib", "-static",
            "-Wl,--build-id=none,--oformat=binary,-Ttext=0x7c00",
        )  # fmt: skip
        os.truncate(self._disk, _DISK)
        self._shim = nodelay_library(self._lab)

    def migrate(self, link: Link, size: int, preempt: bool, nodelay: bool) -> Waited:
        """A guest of `size` bytes of random content."""
        ram = self._lab.path("qemu-source")
        before = ["env", f"LD_PRELOAD={self._shim}"] if nodelay else []
        remove(ram)
        try:
            make(ram, "random", size)
            with (
                Emulator(
                    self._lab, "source", self._arguments(size, ram), [*link.source, *before]
                ) as here,
                Emulator(
                    self._lab, "destination", [*self._arguments(size, ""), "-incoming", "defer"],
                    [*link.destination, *before],
                ) as there,
                contextlib.closing(_Control(ram)) as control,
            ):  # fmt: skip
                return self._migrate(link, size, preempt, here, there, control)
        finally:
            remove(ram)

    def _arguments(self, size: int, ram: str) -> list[str]:
        """`ram`: its RAM file; without, RAM is private memory."""
        mib = f"{size >> 20}M"
        kind = f"memory-backend-file,mem-path={ram},share=on" if ram else "memory-backend-ram"
        return [
            "-accel", self._host.accel, "-cpu", self._host.cpu,
            "-object", f"{kind},id=ram,size={mib}", "-machine", "q35,memory-backend=ram",
            "-m", mib, "-drive", f"file={self._disk},format=raw,file.locking=off",
        ]  # fmt: skip

    def _migrate(
        self, link: Link, size: int, preempt: bool, here: Emulator, there: Emulator,
        control: _Control,
    ) -> Waited:  # fmt: skip
        wait_for("QEMU's guest to start", lambda: _ticking(control))
        speed = ticks_a_second(control)
        control.set_up(size // 4096 - _FIRST_PAGE, int(_WAITED_SECONDS * speed))
        for machine in (here, there):
            machine.qmp.ask("migrate-set-capabilities", capabilities=[
                {"capability": "postcopy-ram", "state": True},
                {"capability": "postcopy-preempt", "state": preempt},
            ])  # fmt: skip
        here.qmp.ask("migrate-set-parameters", **{
            "max-bandwidth": _PRECOPY_RATE, "max-postcopy-bandwidth": 0, "downtime-limit": 1,
        })  # fmt: skip
        uri = f"tcp:{link.host}:{free_port()}"
        there.qmp.ask("migrate-incoming", uri=uri)
        here.qmp.ask("migrate", uri=uri)
        wait_for("QEMU's precopy", lambda: here.qmp.ask("query-migrate")["status"] == "active")
        time.sleep(_PRECOPY_SECONDS)
        control.go()
        begin = time.monotonic()
        here.qmp.ask("migrate-start-postcopy")
        report = wait_for("QEMU's postcopy", here.ended, 60 + size / 4e6, every=0.05)
        seconds = time.monotonic() - begin
        there.qmp.ask("stop")
        waits = self._waits(there, control.logged()) / speed * 1e6
        memory = report["ram"]
        background = memory["postcopy-bytes"] - memory["postcopy-requests"] * memory["page-size"]
        return Waited(waits, seconds, report["total-time"] / 1000, background, report)

    def _waits(self, there: Emulator, before: int) -> npt.NDArray[np.float64]:
        """Ticks, of the log; not those `before` the guest left the source."""
        path = os.path.join(self._lab.directory, "memory")
        there.qmp.ask("pmemsave", val=_LOG, size=_LOG_LENGTH * 4, filename=path)
        log = np.fromfile(path, np.uint32)
        there.qmp.ask("pmemsave", val=_CONTROL, size=64, filename=path)
        logged = int(np.fromfile(path, np.uint32)[5])
        return log[before:logged].astype(np.float64)


def _ticking(control: _Control) -> bool:
    first = control.ticks()
    time.sleep(0.01)
    return 0 < first < control.ticks()
