"""Carries local connections over one byte stream: the sockets and descriptors around a Mux.

The end that dials listens at names beside `path`, as if it were the receiver, and each connection
that comes is one of the stream; the other end connects to the receiver's own names. Nothing is
read of a connection before there is room for it on the stream, and what cannot be handed to a
connection at once waits here, up to its window.

Runs in a process of its own, which calls `step` (workers/carrier.py); knows nothing of what is
carried, and of who made the stream no more than its descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable

from .errors import UsageError
from .stream_addresses import Stream
from .streams import HEADER, LARGE_CHUNK, Arrived, Closed, Event, Greeted, Left, Mux, Opened

_READ = 256 << 10
# Frames between two looks whether something more urgent has come.
_BURST = 2
_IN, _OUT, _EDGE = select.EPOLLIN, select.EPOLLOUT, select.EPOLLET
_GONE = select.EPOLLHUP | select.EPOLLERR
_HUNG_UP = _GONE | select.EPOLLRDHUP


class _Local:
    """A connection of this host."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.out: deque[memoryview] = deque()  # has arrived, and was not taken yet
        self.hung_up = False  # there is an end to be read
        self.closing = False  # when all of `out` was taken


class Carrier:
    """One end of a stream at work. `reads`, `writes`: its descriptors, which are closed with it.
    `path`: of the local endpoint."""

    def __init__(self, mux: Mux, reads: int, writes: int, path: str) -> None:
        self.mux = mux
        self.path = path
        self.name = ""  # the other end's
        self.eof = False  # nothing comes any more
        self.heard = time.monotonic()  # when something came last
        self.broken = ""  # why nothing can be sent any more
        self._reads, self._writes = reads, writes
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._locals: dict[int, _Local] = {}
        self._listening: dict[str, socket.socket] = {}
        self._buffer = memoryview(bytearray(_READ))
        self._frame = bytearray(HEADER.size + LARGE_CHUNK)
        self._pending = memoryview(b"")  # of the frame that is being sent
        self._readable = self._hung_up = False
        self._writable = True
        for fd in (reads, writes):
            os.set_blocking(fd, False)
        self._add(reads, _IN | select.EPOLLRDHUP | _EDGE, self._on_stream)
        self._add(writes, _OUT | _EDGE, self._on_room)

    def __repr__(self) -> str:
        return f"<Carrier {self.path} {self.mux!r}>"

    def _add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call `handler` in `step` while there is something to be read of `fd`."""
        self._add(fd, _IN, lambda events: handler())

    def unwatch(self, fd: int) -> None:
        """Idempotent. Before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    @property
    def idle(self) -> bool:
        """No connection is left, and nothing waits to be sent."""
        return not self._locals and not self._pending

    @property
    def delivered(self) -> bool:
        """All that arrived was taken."""
        return not any(local.out for local in self._locals.values())

    @property
    def flushed(self) -> bool:
        """All is sent that there was to say."""
        return not self._pending

    def listen(self, suffix: str) -> None:
        """Take connections to the name with this suffix, of this user and of root. OSError."""
        if suffix in self._listening:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(_address(self.path + suffix))
            sock.listen(64)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        self._listening[suffix] = sock
        self._add(sock.fileno(), _IN, lambda events: self._accept(suffix, sock))

    def stop_listening(self) -> None:
        """Idempotent."""
        for sock in self._listening.values():
            self.unwatch(sock.fileno())
            sock.close()
        self._listening.clear()

    def step(self, seconds: float) -> None:
        """Wait for something to do, and do it. RemoteProtocolError, PeerRefused."""
        more = self._readable or (self._writable and self._pump())
        for fd, events in self._epoll.poll(0 if more else seconds):
            handler = self._handlers.get(fd)
            if handler is not None:  # else an earlier one has closed it
                handler(events)
        if self._readable:
            self._read()

    # ---- the stream ------------------------------------------------------------------------

    def _on_stream(self, events: int) -> None:
        self._readable = True
        self._hung_up |= bool(events & _HUNG_UP)

    def _on_room(self, events: int) -> None:
        self._writable = True
        if events & _GONE and not self.broken:
            self._pump()  # says why

    def _read(self) -> None:
        try:
            size = os.readv(self._reads, [self._buffer])
        except BlockingIOError:
            self._readable = False
            return
        except OSError as e:
            self.broken = self.broken or (e.strerror or str(e))
            size = 0
        if not size:
            self._readable = False
            self.eof = True
            self.unwatch(self._reads)
            return
        self.heard = time.monotonic()
        # a short read took all there was; after it the end is only told if it was not yet
        self._readable = size == len(self._buffer) or self._hung_up
        for event in self.mux.receive(self._buffer[:size], self.heard):
            self._handle(event)

    def _pump(self) -> bool:
        """Send some frames; True if there may be more."""
        for _ in range(_BURST):
            if not self._send() or not (self._next_small() or self._next_data()):
                return False
        return self._send()

    def _send(self) -> bool:
        """What is left of a frame; False if the stream does not take it now."""
        while self._pending:
            try:
                sent = os.write(self._writes, self._pending)
            except BlockingIOError:
                self._writable = False
                return False
            except OSError as e:
                self._break(e)
                return False
            self._pending = self._pending[sent:]
        return not self.broken

    def _break(self, error: OSError) -> None:
        self.broken = self.broken or (error.strerror or str(error))
        self._pending = memoryview(b"")
        self._writable = False
        self.unwatch(self._writes)

    def _next_small(self) -> bool:
        out = self.mux.output(idle=not self._readable)
        self._pending = memoryview(out)
        return bool(out)

    def _next_data(self) -> bool:
        """Read a frame's worth of whose turn it is."""
        while (chosen := self.mux.choose()) is not None:
            number, most = chosen
            local = self._locals[number]
            view = memoryview(self._frame)
            try:
                size = local.sock.recv_into(view[HEADER.size :], most)
            except BlockingIOError:
                self.mux.drained(number)
                continue
            except OSError:
                size = 0
            if not size:
                self._drop(number)
                return True  # and that is to be said
            self._frame[: HEADER.size] = self.mux.data(number, size, time.monotonic())
            if size < most and not local.hung_up:
                self.mux.drained(number)
            self._pending = view[: HEADER.size + size]
            return True
        return False

    def end(self, reason: str = "") -> None:
        """Say that the stream ends. `step` until `flushed`, then `shut`."""
        self.mux.end(reason)
        if self._writable and not self.broken:
            self._pump()

    def shut(self) -> None:
        """Nothing more is sent: the other end sees an end. Idempotent."""
        if self._writes < 0:
            return
        self.unwatch(self._writes)
        self._writable = False
        if stat.S_ISSOCK(os.fstat(self._writes).st_mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._writes)) as sock:
                sock.shutdown(socket.SHUT_WR)
        os.close(self._writes)
        self._writes = -1

    # ---- connections -----------------------------------------------------------------------

    def _accept(self, suffix: str, listening: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = listening.accept()
            number = self.mux.open(suffix) if _may(sock) else 0
            if number:
                self._add_local(number, sock)
            else:
                sock.close()

    def _connect(self, number: int, suffix: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(_address(self.path + suffix))
        except OSError:  # nobody listens: who has dialled tries again, or gives up
            sock.close()
            self.mux.close(number)
            return
        self._add_local(number, sock)

    def _add_local(self, number: int, sock: socket.socket) -> None:
        sock.setblocking(False)
        local = self._locals[number] = _Local(sock)
        events = _IN | _OUT | select.EPOLLRDHUP | _EDGE
        self._add(sock.fileno(), events, lambda events: self._on_local(number, local, events))

    def _on_local(self, number: int, local: _Local, events: int) -> None:
        local.hung_up |= bool(events & _HUNG_UP)
        if events & (_IN | _HUNG_UP):
            self.mux.readable(number)
        if events & (_OUT | _GONE) and (local.out or local.closing):
            self._hand_over(number, local)

    def _handle(self, event: Event) -> None:
        match event:
            case Arrived(number, data):
                local = self._locals.get(number)
                if local is not None:
                    self._deliver(number, local, data)
            case Opened(number, suffix):
                self._connect(number, suffix)
            case Closed(number):
                local = self._locals.get(number)
                if local is not None:
                    local.closing = True
                    self._hand_over(number, local)
            case Greeted(name):
                self.name = name
            case Left():
                pass

    def _deliver(self, number: int, local: _Local, data: memoryview) -> None:
        if not local.out:
            try:
                sent = local.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._drop(number)
                return
            self.mux.taken(number, sent)
            data = data[sent:]
        if data:
            local.out.append(memoryview(bytes(data)))  # `data` is the stream's buffer

    def _hand_over(self, number: int, local: _Local) -> None:
        """What waits for a connection."""
        try:
            while local.out:
                sent = local.sock.send(local.out[0])
                self.mux.taken(number, sent)
                if sent < len(local.out[0]):
                    local.out[0] = local.out[0][sent:]
                else:
                    local.out.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._drop(number)
            return
        if local.closing:
            self._drop(number)

    def _drop(self, number: int) -> None:
        """A connection is over here."""
        local = self._locals.pop(number)
        self.unwatch(local.sock.fileno())
        local.sock.close()
        self.mux.close(number)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        self.stop_listening()
        for number in list(self._locals):
            self._drop(number)
        for fd in (self._reads, self._writes):
            if fd >= 0:
                self.unwatch(fd)
                os.close(fd)
        self._reads = self._writes = -1
        self._epoll.close()


def _address(path: str) -> str:
    return f"\0{path[1:]}" if path.startswith("@") else path


def _may(sock: socket.socket) -> bool:
    """An abstract name has no mode: whose process it is, is asked of the kernel."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[1] in (os.geteuid(), 0)


# ---- descriptors that were given ---------------------------------------------------------------


def claim(stream: Stream) -> Stream:
    """`stream` where nothing that is printed, and no process that is started, meets it: for what
    was stdin and stdout. To be called before either happens. UsageError as in `take`."""
    if not stream.stdio:
        return stream
    reads, writes = take(stream)
    return Stream(reads=reads, writes=writes, shown=str(stream))


def take(stream: Stream) -> tuple[int, int]:
    """New descriptors of a stream that is there, to read and to write; those that were named are
    closed. Of stdin and stdout nobody else is to use: they become /dev/null and stderr. UsageError
    if it cannot be a stream."""
    reads, writes = stream.reads, stream.writes
    reads_mode = _mode(reads)
    if writes < 0:
        if not stat.S_ISSOCK(reads_mode) and reads != 0:
            raise UsageError(
                f"descriptor {reads} is no socket, and what else there is goes one way only: name "
                "both, fd:READ,WRITE"
            )
        writes = reads if stat.S_ISSOCK(reads_mode) else 1
    for fd in {reads, writes}:
        _check(fd, _mode(fd))
    taken = os.dup(reads), os.dup(writes)  # each is closed in an exec
    for fd in {reads, writes}:
        if fd > 2:
            os.close(fd)
    if stream.stdio:
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nowhere, 0)
        os.dup2(2, 1)
        os.close(nowhere)
    return taken


def _mode(fd: int) -> int:
    try:
        return os.fstat(fd).st_mode
    except OSError as e:
        raise UsageError(f"descriptor {fd} is not open: who starts pageferry opens it") from e


def _check(fd: int, mode: int) -> None:
    if os.isatty(fd):
        raise UsageError(
            f"descriptor {fd} is a terminal: a stream is what a program is given, as in "
            "'exec:ssh HOST pageferry receive -'"
        )
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        raise UsageError(
            f"descriptor {fd} is a file: both ends talk to each other over a stream. For a file "
            "write image:PATH"
        )
    if stat.S_ISCHR(mode) and os.path.realpath(f"/proc/self/fd/{fd}") == os.devnull:
        raise UsageError(f"descriptor {fd} is /dev/null: nobody is at the other end")
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as sock:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if sock.type != socket.SOCK_STREAM or listens:
                raise UsageError(f"descriptor {fd} is a socket that is no connected stream")
            try:
                sock.getpeername()
            except OSError as e:
                if e.errno == errno.ENOTCONN:
                    raise UsageError(f"descriptor {fd} is a socket without a peer") from e
