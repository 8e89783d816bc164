"""The workers, with a trace of what they do: the same objects, with a clock around their steps.

Each class adds records to a ring (tracing.py) around what its base does, and changes nothing in it:
no order of claims, stores or acknowledgements is in here, so none can be changed. Workers that
are not traced never import this.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..transport.channel import Acked, Data, Lost, ReceivingChannel
from ..transport.codecs import Decoders
from ..transport.pages import PAGE_SIZE, Pages, Runs
from ..transport.snapshot_format import CHUNK_PAGES
from ..transport.urgent import Page, Request
from ..transport.wire import Buffer, Frame
from . import jobs
from .batches import Batch, BatchMaker, BlockReader
from .counters import Row
from .fault import FaultJob, FaultProcess
from .guard import Guard
from .guests.base import Region
from .kernel.userfaultfd import Removed
from .postcopy import PostcopyJob, PostcopyProcess
from .process import Desk
from .ram import RamBlock
from .receiver import Receiver, ReceiverJob
from .saver import Keeper, Saver, SaverJob
from .sender import Sender, SenderJob
from .trace_records import Kind
from .tracing import Writer

_now = time.monotonic_ns


def _trace(desk: Desk) -> Writer:
    assert desk.trace is not None
    return desk.trace


def _range(pages: Pages) -> dict[str, int]:
    return {"page": int(pages[0]), "pages": len(pages)}


# ---- sender -----------------------------------------------------------------------------


class _Reader(BlockReader):
    def __init__(self, block: RamBlock, index: int, trace: Writer) -> None:
        super().__init__(block)
        self._index, self._trace = index, trace

    def read(self, pages: Pages, copy: bool) -> npt.NDArray[np.uint64]:
        begin = _now()
        content = super().read(pages, copy)
        self._trace.add(Kind.READ, begin, block=self._index, **_range(pages))
        return content

    def zero(self, pages: Pages) -> npt.NDArray[np.bool_]:
        begin = _now()
        found = super().zero(pages)
        self._trace.add(Kind.FIND_ZEROS, begin, block=self._index, **_range(pages))
        return found


class _Maker(BatchMaker):
    trace: Writer

    def make(self, pages: Pages, content: npt.NDArray[np.uint64]) -> Batch:
        begin = _now()
        batch = super().make(pages, content)
        self.trace.add(Kind.ENCODE, begin, pages=len(pages), size=batch.size)
        return batch


class TracedSender(Sender):
    def __init__(self, desk: Desk, job: SenderJob) -> None:
        super().__init__(desk, job)
        self.trace = _trace(desk)
        maker = _Maker(job.codec, job.level, self.row)
        maker.trace = self.trace
        self.maker = maker
        self.frame_size = 0

    def _reader(self, block: int) -> BlockReader:
        if block not in self.readers:
            self.readers[block] = _Reader(self.job.blocks[block], block, self.trace)
        return self.readers[block]

    def _do(self, job: jobs.AnyJob) -> None:
        begin = _now()
        super()._do(job)
        add = self.trace.add
        match job:
            case jobs.Extent(block, first, count):
                add(Kind.EXTENT, begin, block=block, page=first, pages=count)
            case jobs.Scan(block, first, count):
                add(Kind.SCAN, begin, block=block, page=first, pages=count)
            case jobs.Barrier():
                add(Kind.BARRIER, begin, number=self.channel.round - 1)
            case jobs.Digest(block, part):
                add(Kind.DIGEST, begin, block=block, number=part)

    def _send_batch(self, extent: Any, block: int, pages: Pages, live: bool) -> int:
        begin = _now()
        zeros = super()._send_batch(extent, block, pages, live)
        self.trace.add(Kind.BATCH, begin, block=block, **_range(pages))
        return zeros

    def _send(self, extent: Any, block: int, pages: Pages, hashes: Any, batch: Batch) -> None:
        begin = _now()
        super()._send(extent, block, pages, hashes, batch)
        self.trace.add(
            Kind.FRAME, begin, block=block, **_range(pages), size=self.frame_size,
            number=self.channel.next_seq() - 1, extra=self.channel.round,
        )  # fmt: skip

    def _record(self, sent: Any, batch: Batch, meta: int) -> None:
        self.frame_size = batch.size + meta
        super()._record(sent, batch, meta)

    def _wait_for_credit(self, size: int) -> None:
        if self.channel.may_send(size):
            super()._wait_for_credit(size)
            return
        begin = _now()
        super()._wait_for_credit(size)
        self.trace.add(Kind.WAIT_FOR_CREDIT, begin, size=size)

    def _pause(self, delay: int) -> None:
        begin = _now()
        super()._pause(delay)
        self.trace.add(Kind.WAIT_FOR_BANDWIDTH, begin)

    def _stand_aside(self, preemption: Any) -> None:
        begin = _now()
        super()._stand_aside(preemption)
        self.trace.add(Kind.STAND_ASIDE, begin)

    def _settle(self, event: Acked[Any] | Lost[Any], sent: Any) -> None:
        super()._settle(event, sent)
        if isinstance(event, Acked):
            at = round(sent.at * 1e9)
            self.trace.add(Kind.IN_FLIGHT, min(at, _now()), block=sent.block, **_range(sent.pages))
        else:
            self.trace.add(Kind.LOST, _now(), block=sent.block, **_range(sent.pages))


# ---- receiver ---------------------------------------------------------------------------


class _Channel(ReceivingChannel):
    trace: Writer

    def receive(self, meta: Buffer, payload: Buffer = b"") -> Data | None:
        begin = _now()
        data = super().receive(meta, payload)
        if data is not None:
            self.trace.add(Kind.CHECK, begin, size=len(meta) + len(payload))
        return data


class _Codec:
    """A codec, and how long it took."""

    def __init__(self, codec: Any, trace: Writer) -> None:
        self._codec, self._trace = codec, trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def decompress(self, data: Buffer, size: int) -> Any:
        begin = _now()
        plain = self._codec.decompress(data, size)
        self._trace.add(Kind.DECODE, begin, size=size)
        return plain


class _Decoders(Decoders):
    def __init__(self, trace: Writer) -> None:
        super().__init__()
        self._trace = trace

    def get(self, wire_id: int) -> Any:
        return _Codec(super().get(wire_id), self._trace)


class _Lock:
    """The lock that receivers take turns by: how long it was waited for, and held."""

    def __init__(self, lock: Any, trace: Writer) -> None:
        self._lock, self._trace = lock, trace
        self._held = 0

    def acquire(self, *arguments: Any, **named: Any) -> bool:
        begin = _now()
        taken: bool = self._lock.acquire(*arguments, **named)
        self._held = _now()
        self._trace.add(Kind.WAIT_FOR_TURN, begin)
        return taken

    def release(self) -> None:
        self._lock.release()
        self._trace.add(Kind.WRITE, self._held)


class TracedReceiver(Receiver):
    def __init__(self, desk: Desk, job: ReceiverJob) -> None:
        super().__init__(desk, job)
        self.trace = _trace(desk)
        channel = _Channel()
        channel.trace = self.trace
        self.channel = channel
        self.decoders = _Decoders(self.trace)
        job.writing = _Lock(job.writing, self.trace)
        self.placed: Frame | None = None

    def _message(self) -> bool:
        begin = _now()
        more = super()._message()
        frame, self.placed = self.placed, None
        if frame is not None:
            tables = frame.tables
            self.trace.add(
                Kind.PLACE, begin, block=frame.block, page=_first(tables), pages=frame.page_total,
                size=frame.payload_size, number=frame.seq, extra=frame.round,
            )  # fmt: skip
        return more

    def _place(self, frame: Frame, payload: Buffer) -> bool:
        placed = super()._place(frame, payload)
        self.placed = frame if placed else None
        return placed


def _first(tables: tuple[Runs, ...]) -> int:
    return min((int(runs[0][0]) for runs in tables if len(runs[0])), default=0)


# ---- postcopy process -------------------------------------------------------------------


class TracedPostcopyProcess(PostcopyProcess):
    def __init__(self, desk: Desk, job: PostcopyJob) -> None:
        super().__init__(desk, job)
        self.trace = _trace(desk)
        self.came = self.size = self.count = 0

    def _answer(self, request: Request, came: int) -> None:
        # what waits in one look has come at the same time: bars one after the other, not over it
        begin = self.came = _now()
        self.count = 0
        super()._answer(request, came)
        where = {"block": request.block, "page": request.page, "number": request.number}
        if self.count:
            self.trace.add(Kind.ANSWER, begin, **where, pages=self.count, size=self.size)
        else:
            self.trace.add(Kind.ELSEWHERE, begin, **where)

    def _content(self, block: int, first: int, count: int) -> bytes:
        self.trace.add(Kind.CLAIM, self.came, block=block, page=first, pages=count)
        begin = _now()
        content = super()._content(block, first, count)
        self.trace.add(Kind.READ, begin, block=block, page=first, pages=count)
        self.count = count
        return content

    def _send(self, data: bytes) -> None:
        begin = _now()
        super()._send(data)
        self.size = len(data)
        self.trace.add(Kind.SEND, begin, size=self.size)


# ---- fault process ----------------------------------------------------------------------


class TracedFaultProcess(FaultProcess):
    def __init__(self, desk: Desk, job: FaultJob) -> None:
        super().__init__(desk, job)
        self.trace = _trace(desk)

    def _fault(self, region: Region, page: int, came: int) -> None:
        begin = _now()
        key = region.block, page - (page - region.first) % (region.page_size // PAGE_SIZE)
        waited = key in self.wanted
        super()._fault(region, page, came)
        if waited:
            self.trace.add(Kind.FAULT_AGAIN, begin, block=key[0], page=key[1])
        elif key not in self.wanted:
            self.trace.add(Kind.KNOWN_PAGE, begin, block=key[0], page=key[1])

    def _ask(self, wanted: Any) -> None:
        begin, before = _now(), wanted.asked
        super()._ask(wanted)
        if wanted.asked != before:
            kind = Kind.ASK_AGAIN if before else Kind.REQUEST
            self.trace.add(kind, begin, block=wanted.block, page=wanted.page, number=wanted.number)

    def _removed(self, event: Removed) -> None:
        begin = _now()
        super()._removed(event)
        self.trace.add(Kind.REMOVED, begin, page=event.start, size=event.end - event.start)

    def _install(self, answer: Page[Any], came: int) -> None:
        begin = _now()
        super()._install(answer, came)
        host = self.placer.map.region(answer.block, answer.page).page_size // PAGE_SIZE
        self.trace.add(
            Kind.INSTALL, begin, block=answer.block, page=answer.page, pages=host,
            size=len(answer.content), number=answer.number,
        )  # fmt: skip

    def _close(self, block: int, page: int, now: int) -> None:
        wanted = self.wanted.get((block, page))
        super()._close(block, page, now)
        if wanted is not None:
            self.trace.add(Kind.FAULT, wanted.since, block=block, page=page)


# ---- a snapshot's saver and guard -------------------------------------------------------


class _Keeper(Keeper):
    """Looks for zeros, takes digests, writes."""

    def __init__(self, job: SaverJob, row: Row, trace: Writer) -> None:
        super().__init__(job, row)
        self._trace = trace

    def keep(self, block: int, first: int, content: memoryview) -> None:
        begin = _now()
        super().keep(block, first, content)
        self._trace.add(
            Kind.KEEP, begin, block=block, page=first * CHUNK_PAGES, pages=len(content) // PAGE_SIZE
        )


class TracedSaver(Saver):
    def __init__(self, desk: Desk, job: SaverJob) -> None:
        super().__init__(desk, job)
        self.trace = _trace(desk)
        self.keeper = _Keeper(job, desk.row, self.trace)

    def _save(self, extent: jobs.Extent) -> None:
        begin = _now()
        super()._save(extent)
        self.trace.add(
            Kind.EXTENT, begin, block=extent.block, page=extent.first, pages=extent.count
        )


class TracedGuard(Guard):
    """Its thread that writes is in no trace: a ring has one writer."""

    def __init__(self, desk: Desk, job: SaverJob) -> None:
        super().__init__(desk, job)
        self.trace = _trace(desk)

    def _save(self, block: int, chunk: int) -> None:
        begin = _now()
        super()._save(block, chunk)
        self.trace.add(
            Kind.HELD_BACK, begin, block=block, page=chunk * CHUNK_PAGES, pages=CHUNK_PAGES
        )


TRACED: dict[type[Any], type[Any]] = {
    Sender: TracedSender,
    Receiver: TracedReceiver,
    PostcopyProcess: TracedPostcopyProcess,
    FaultProcess: TracedFaultProcess,
    Saver: TracedSaver,
    Guard: TracedGuard,
}
