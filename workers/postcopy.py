"""The postcopy process: answers the destination's page faults, ahead of the background stream.

One process at the source, with a channel of its own, at real-time priority where that is
permitted. For each request it claims the host page in the page table and sends it at once,
uncompressed; a page that a sender has claimed already stays on that sender's channel. While
a request is open, senders stand aside between two frames (preemption.py). The counterpart of
postcopy_preempt_thread and the urgent page queue in QEMU's migration/ (ram.c, postcopy-ram.c).
Decides nothing about when a postcopy begins or ends.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..transport.errors import LocalProtocolError, PeerLost, RemoteProtocolError, SourceError
from ..transport.links import parse_endpoint, short
from ..transport.pages import PAGE_SIZE
from ..transport.urgent import MAX_HOST_PAGES, Answering, Placed, Request
from ..transport.urgent_links import urgent_link
from . import jobs
from .counters import Counters
from .page_table import CLEAN, PageTable
from .preemption import Preemption, Writer, page_key
from .priority import FIFO, FIFO_PRIORITY, become_urgent, collect_seldom
from .process import HEARTBEAT_SECONDS, Desk, run_worker, traced
from .ram import RamBlock

# Without preemption, what senders are told to send next: block, page.
ROUTED = struct.Struct("<QQ")
_RETRY_SECONDS = 0.002
_CLEAN = bytes([CLEAN]) * MAX_HOST_PAGES
_ZEROS = bytes(MAX_HOST_PAGES * PAGE_SIZE)


@dataclass
class PostcopyJob:
    """Everything it needs, pickled into it once. `route`: without preemption, the pipe on which
    requests go to the senders, to be answered in line with the background; `direct`: the channel
    is a connection of its own, not ZeroMQ's."""

    blocks: list[RamBlock]
    table: PageTable
    counters: Counters
    preemption: Preemption
    route: Any = None
    direct: bool = False


@dataclass(slots=True)
class _Sent:
    """A host page under way."""

    block: int
    page: int
    count: int
    number: int


def main(pipe: Connection, index: int, job: PostcopyJob) -> None:
    run_worker(
        "pf-postcopy",
        pipe,
        job.counters,
        index,
        lambda desk: traced(desk, PostcopyProcess)(desk, job).run(),
    )


class PostcopyProcess:
    """The process's one object."""

    def __init__(self, desk: Desk, job: PostcopyJob) -> None:
        self.desk, self.job, self.row = desk, job, desk.row
        self.session: Answering[_Sent] = Answering()
        self.flag = Writer(job.preemption)
        self.tables = [memoryview(job.table.view(i).data) for i in range(len(job.blocks))]
        self.under_way: dict[int, _Sent] = {}  # by page_key
        self.unsent: deque[bytes] = deque()
        self.finishing = False
        self.shortest = 0
        self.huge = any(block.spec.page_size > PAGE_SIZE for block in job.blocks)
        self.waiting = False  # for a huge page to be placed

    def run(self) -> None:
        rank = become_urgent() if self.job.route is None else 0
        collect_seldom()
        self.row.set("priority", rank)
        self.link = urgent_link(self.job.direct, FIFO_PRIORITY if rank == FIFO else 0)
        self.poll = select.poll()
        self.poll.register(self.desk.pipe.fileno(), select.POLLIN)
        self.desk.say(jobs.Ready())
        try:
            pipe, ready = self.desk.pipe.fileno(), [(self.desk.pipe.fileno(), 0)]
            while True:
                if (not ready or ready[0][0] == pipe or self.finishing) and not self._commands():
                    return
                self._serve()
                wait = _RETRY_SECONDS if self.unsent else HEARTBEAT_SECONDS
                ready = self.poll.poll(wait * 1000)
        finally:
            self.flag.open(0)
            self.link.close()

    def _commands(self) -> bool:
        """Jobs of the coordinator; False when told to stop."""
        while self.desk.waiting():
            match self.desk.take():
                case jobs.Stop():
                    return False
                case jobs.Open() as job:
                    self.link.dial(parse_endpoint(job.endpoint), job.token, job.curve)
                    self.poll.register(self.link.fd, select.POLLIN)
                case jobs.Listen() as job:
                    where = self.link.listen(parse_endpoint(job.endpoint), job.token, job.curve)
                    self.poll.register(self.link.fd, select.POLLIN)
                    self.desk.say(jobs.Ready(short(where)))
                case jobs.Finish():
                    self.finishing = True
                case job:
                    raise LocalProtocolError(f"the postcopy process was told {job!r}")
        if self.finishing and self.session.idle:
            self.finishing = False
            self.desk.say(jobs.Ready())
        return True

    def _serve(self) -> None:
        """Take every message that waits. Senders stand aside from the first request on."""
        if self.link.broken:
            raise PeerLost("the urgent channel broke")
        if not self.link.connected:
            return
        self.link.flush()
        while self.unsent and self.link.send(self.unsent[0]):
            self.unsent.popleft()
        opened = False
        # who does not take answers asks in vain
        while not self.unsent and (data := self.link.receive()) is not None:
            came = time.monotonic_ns()
            event = self.session.receive(data)
            if isinstance(event, Request):
                if not opened and self.job.route is None:
                    opened = True
                    self.flag.open(1)
                self._answer(event, came)
                self.row.add("requests", 1)
                if event.took:
                    self._took(event.took)
            elif isinstance(event, Placed):
                for sent in event.tokens:
                    self._placed(sent)
        # a huge page is on its way for long: until it is there, the link is its own
        waiting = self.huge and self.job.route is None and bool(self.under_way)
        if opened or waiting != self.waiting:
            self.waiting = waiting
            self.flag.open(int(waiting))

    def _answer(self, request: Request, came: int) -> None:
        block, first, count = self._host_page(request)
        key = page_key(block, first)
        if self.job.route is not None:
            os.write(self.job.route.fileno(), ROUTED.pack(block, first))
            self._send(self.session.elsewhere(request))
            return
        again = self.under_way.get(key)
        if again is not None:
            self.row.add("resent", count)  # the first answer was lost with its connection
            self.session.forget(again.number)
        elif not self.job.table.claim_one(self.tables[block], first, count):
            self.row.add("elsewhere", 1)
            self.flag.to_front(key)
            self._send(self.session.elsewhere(request))
            return
        sent = self.under_way[key] = _Sent(block, first, count, request.number)
        content = self._content(block, first, count)
        zero = content == _ZEROS[: len(content)]
        held = time.monotonic_ns() - came
        answer = self.session.page(request, sent, b"" if zero else content, held)
        self._send(answer)
        if again is None:
            self._count(len(answer), count, zero)

    def _took(self, took: int) -> None:
        """What the last request waited on the wire: the pacer goes by it."""
        self.row.add("on_wire_ns", took)
        self.row.add("on_wire", 1)
        if not self.shortest or took < self.shortest:
            self.shortest = took
            self.row.set("shortest_ns", took)

    def _host_page(self, request: Request) -> tuple[int, int, int]:
        """Block, first page and pages of the host page that is asked for."""
        if request.block >= len(self.job.blocks):
            raise RemoteProtocolError(f"request for block {request.block}")
        block = self.job.blocks[request.block]
        host = block.spec.page_size // PAGE_SIZE
        if request.page >= block.pages or request.page % host:
            raise RemoteProtocolError(f"request for page {request.page} of block {block.name}")
        return request.block, request.page, min(host, block.pages - request.page)

    def _content(self, block: int, first: int, count: int) -> bytes:
        """Read, not mapped: a page that was never touched through a mapping is a fault first."""
        ram = self.job.blocks[block]
        if (verified := ram.verified(np.arange(first, first + count))) is not None:
            return verified.tobytes()
        content = os.pread(ram.file.fd, count * PAGE_SIZE, ram.start + first * PAGE_SIZE)
        if len(content) != count * PAGE_SIZE:
            raise SourceError(f"{ram.file.name} has become shorter")
        return content

    def _send(self, data: bytes) -> None:
        if self.unsent or not self.link.send(data):
            self.unsent.append(data)

    def _placed(self, sent: _Sent) -> None:
        """Ours from the claim on; now the destination has it."""
        if self.under_way.get(page_key(sent.block, sent.page)) is not None:
            del self.under_way[page_key(sent.block, sent.page)]
            self.tables[sent.block][sent.page : sent.page + sent.count] = _CLEAN[: sent.count]

    def _count(self, size: int, count: int, zero: bool) -> None:
        self.row.add("duplicate" if zero else "normal", count)
        self.row.add("wire_bytes", size)
        self.row.add("frames", 1)
