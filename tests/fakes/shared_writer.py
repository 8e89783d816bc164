"""A process with shared memory that knows nothing of pageferry, and its handle in tests.

As a program (shared_writer.py obey|write PATH|memfd:NAME PAGES) it needs no more than Python:

* `obey` maps, unmaps and writes as it is told, line by line.
* `write` increments one byte a page (at OFFSET), page after page, for ever: through its mapping, by
  pwrite(2), and through mappings that it makes for this and drops again. It says "ready" after each
  of the first passes. So wherever it is stopped the bytes have one step in them: `one_step`.
"""

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import subprocess
import sys

PAGE = 4096
OFFSET = 17
ARENA = 64 << 30
READ, READ_WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_FIXED = 0x10
_MAY_MOVE_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED


# ---- the handle --------------------------------------------------------------------------------


class SharedWriter:
    """The process; ended with `with`."""

    def __init__(self, mode, where, pages, *more):
        self.process = subprocess.Popen(
            [sys.executable, __file__, mode, str(where), str(pages), *map(str, more)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def __enter__(self):
        assert self.line() == "ready\n"
        return self

    def __exit__(self, *rest):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        with contextlib.suppress(ValueError):
            self.process.communicate()

    def line(self):
        """The next that it says."""
        ready, _, _ = select.select([self.process.stdout], [], [], 30)
        assert ready, "it says nothing"
        return self.process.stdout.readline()

    def tell(self, what, *arguments):
        """Have it do something (a method of `_Obeying`); what that returns."""
        self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def state(self):
        with open(f"/proc/{self.pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0]


def one_step(data):
    """What `write` leaves, wherever it is stopped: n + 1 in the first pages, n in the others."""
    counts = data[OFFSET::PAGE]
    step = next((i for i, n in enumerate(counts) if n != counts[0]), len(counts))
    after = (counts[0] - 1) % 256
    return counts == bytes([counts[0]]) * step + bytes([after]) * (len(counts) - step)


# ---- the program -------------------------------------------------------------------------------


def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = libc.mremap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [pointer, size, size, number, pointer]
    libc.munmap.argtypes = [pointer, size]
    libc.mprotect.argtypes = libc.madvise.argtypes = [pointer, size, number]
    return libc


class _Obeying:
    """Addresses are pages from ARENA, where the kernel puts nothing by itself: so that a test can
    say what is mapped where."""

    def __init__(self, fd):
        self.fd = fd
        self.libc = _libc()

    def _at(self, page):
        return ARENA + page * PAGE

    def _checked(self, result):
        if result in (-1, (1 << 64) - 1):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def map(self, at, first, pages, access=READ_WRITE):
        """Pages of the file from `first`, at page `at` of the arena, in place of what is there."""
        self._checked(
            self.libc.mmap(
                self._at(at), pages * PAGE, access, mmap.MAP_SHARED | _FIXED, self.fd, first * PAGE
            )
        )

    def cover(self, at, pages):
        """Private memory in place of what is there."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        self._checked(self.libc.mmap(self._at(at), pages * PAGE, READ_WRITE, flags, -1, 0))

    def unmap(self, at, pages):
        self._checked(self.libc.munmap(self._at(at), pages * PAGE))

    def move(self, at, pages, to):
        size = pages * PAGE
        self._checked(self.libc.mremap(self._at(at), size, size, _MAY_MOVE_TO, self._at(to)))

    def protect(self, at, pages, access):
        self._checked(self.libc.mprotect(self._at(at), pages * PAGE, access))

    def advise(self, at, pages, advice):
        self._checked(self.libc.madvise(self._at(at), pages * PAGE, advice))

    def write(self, *pages):
        for page in pages:
            ctypes.memset(self._at(page) + OFFSET, 7, 1)

    def read(self, *pages):
        for page in pages:
            ctypes.string_at(self._at(page) + OFFSET, 1)

    def pwrite(self, *pages):
        """Pages of the file."""
        for page in pages:
            os.pwrite(self.fd, b"\7", page * PAGE + OFFSET)

    def truncate(self, pages):
        os.ftruncate(self.fd, pages * PAGE)

    def fork_and_write(self, *pages):
        """A child writes, and ends."""
        if (pid := os.fork()) == 0:
            self.write(*pages)
            os._exit(0)
        os.waitpid(pid, 0)

    def execute(self):
        """Become the same program anew, with the file and nothing mapped."""
        os.set_inheritable(self.fd, True)
        os.execv(sys.executable, [sys.executable, __file__, "obey", f"fd:{self.fd}", "0"])


def _obey(fd):
    obeying = _Obeying(fd)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(getattr(obeying, what)(*arguments)), flush=True)


def _write(fd, pages):
    memory = mmap.mmap(fd, pages * PAGE)
    ways = (
        memory.__setitem__,
        lambda at, value: os.pwrite(fd, bytes([value]), at),
        lambda at, value: _write_for_once(fd, at, value),
    )
    turn = 0
    while True:
        value = (memory[OFFSET] + 1) % 256
        for page in range(pages):
            ways[page // 7 % 3](page * PAGE + OFFSET, value)
        turn += 1
        if turn < 3:
            print("ready", flush=True)


def _write_for_once(fd, at, value):
    with mmap.mmap(fd, PAGE, offset=at // PAGE * PAGE) as memory:
        memory[at % PAGE] = value


def _open(where, pages):
    if where.startswith("fd:"):
        return int(where[3:])
    if where.startswith("memfd:"):
        fd = os.memfd_create(where[6:])
    else:
        fd = os.open(where, os.O_RDWR | os.O_CREAT, 0o600)
    if os.fstat(fd).st_size < pages * PAGE:
        os.ftruncate(fd, pages * PAGE)
    return fd


def _main(mode, where, pages):
    fd = _open(where, int(pages))
    if mode == "obey":
        _obey(fd)
    else:
        _write(fd, int(pages))


if __name__ == "__main__":
    _main(*sys.argv[1:])
