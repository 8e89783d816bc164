"""One multifd channel as two sans-IO halves: sequence numbers, credit, acknowledgement, barrier.

ZeroMQ loses what was in flight when a connection breaks, and says nothing. So every frame
has a number, every frame is acknowledged after its pages are placed, and what is not
acknowledged was not delivered: its pages are dirty again. Between two rounds a SYNC frame
tells the receiver how many frames and pages it must have placed; it answers with its own
counts, and only then may frames of the next round follow (QEMU: multifd_send_sync_main). A SYNC
may be said again until it is answered, and is answered each time.

No socket, clock, process or log in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import LocalProtocolError, PeerLost, RemoteProtocolError
from .wire import Buffer, Damaged, Frame, Kind, decode, encode_control, payload_matches

# Acknowledge at the latest after this many frames, or when nothing more is waiting: half of
# the usual credit, so that the sender never runs dry.
ACK_EVERY = 2
# More frames than this in flight would mean that credit does not work; and no more can be lost
# before one that comes.
MAX_IN_FLIGHT = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Acked(Generic[T]):
    """The receiver has placed this frame."""

    token: T


@dataclass(frozen=True, slots=True)
class Lost(Generic[T]):
    """The receiver never saw this frame whole: its pages must go again."""

    token: T


@dataclass(frozen=True, slots=True)
class Synced:
    """Both ends agree on what was placed in `round`."""

    round: int


@dataclass
class _InFlight(Generic[T]):
    token: T
    size: int
    pages: int


class SendingChannel(Generic[T]):
    """The source's half. `token` is whatever the caller wants back with the acknowledgement."""

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.in_flight = 0
        self.round = 1
        self._next = 0
        self._waiting: dict[int, _InFlight[T]] = {}
        self._frames = 0
        self._pages = 0
        self._syncing = False
        self._sync = b""  # the last barrier's frame
        self._repeats = 0
        self._synced = b""  # the last answer to one, that may come
        self._extra = 0  # so many times more

    def __repr__(self) -> str:
        return f"<SendingChannel round={self.round} next={self._next} in_flight={self.in_flight}>"

    @property
    def idle(self) -> bool:
        """True if every frame sent so far was acknowledged or lost."""
        return not self._waiting

    def may_send(self, size: int) -> bool:
        """True if credit allows `size` more bytes in flight; one frame is always allowed."""
        if not self._waiting:
            return True
        # zero pages cost no payload: their frames meet this bound long before the credit
        return len(self._waiting) < MAX_IN_FLIGHT and self.in_flight + size <= self.credit

    def may_probe(self) -> bool:
        """True if an empty frame may be sent, whatever credit says."""
        return not self._syncing and len(self._waiting) < MAX_IN_FLIGHT

    def next_seq(self) -> int:
        return self._next

    def sent(self, token: T, size: int, pages: int) -> None:
        """Record the frame numbered `next_seq()` before its first byte is sent."""
        if self._syncing or len(self._waiting) >= MAX_IN_FLIGHT:
            raise LocalProtocolError(f"a frame was sent out of turn on {self!r}")
        self._waiting[self._next] = _InFlight(token, size, pages)
        self.in_flight += size
        self._next += 1

    def sync(self) -> bytes:
        """The barrier's frame. Legal once the channel is idle."""
        if self._waiting or self._syncing:
            raise LocalProtocolError(f"barrier while frames are in flight on {self!r}")
        self._syncing = True
        frame = Frame(Kind.SYNC, self._next, self.round, frames=self._frames, pages=self._pages)
        self._next += 1
        self._sync, self._repeats = encode_control(frame), 0
        return self._sync

    def sync_again(self) -> bytes:
        """The barrier's frame once more: it or its answer may have been lost."""
        if not self._syncing:
            raise LocalProtocolError(f"there is no barrier on {self!r}")
        self._repeats += 1
        return self._sync

    def receive(self, meta: Buffer) -> list[Acked[T] | Lost[T] | Synced]:
        """What the receiver's answer means. An illegal answer raises and changes nothing."""
        try:
            frame = decode(meta)
        except Damaged as e:  # what it settled will never be settled
            raise RemoteProtocolError(f"damaged answer on a channel: {e}") from e
        if frame.kind in (Kind.ACK, Kind.NACK):
            return self._settle(frame)
        if self._extra and bytes(meta) == self._synced:
            self._extra -= 1
            return []
        if frame.kind != Kind.SYNC_ACK or not self._syncing or frame.round != self.round:
            raise RemoteProtocolError(f"unexpected {frame.kind.name} in round {self.round}")
        if (frame.frames, frame.pages) != (self._frames, self._pages):
            raise RemoteProtocolError(
                f"round {self.round}: {self._pages} pages in {self._frames} frames were "
                f"acknowledged, the destination placed {frame.pages} in {frame.frames}"
            )
        self._syncing, self._synced, self._extra = False, bytes(meta), self._repeats
        self.round += 1
        self._frames = self._pages = 0
        return [Synced(frame.round)]

    def _settle(self, frame: Frame) -> list[Acked[T] | Lost[T] | Synced]:
        if frame.last < frame.seq or frame.last >= self._next:
            raise RemoteProtocolError(f"{frame.kind.name} of frame {frame.last}, never sent")
        oldest = next(iter(self._waiting), frame.last)
        if frame.kind == Kind.ACK and oldest < frame.seq:
            raise PeerLost(f"the answer to frame {oldest} of a channel was lost")
        # Only what is waiting counts: walk our own records, never the peer's range.
        seqs = [s for s in self._waiting if frame.seq <= s <= frame.last]
        events: list[Acked[T] | Lost[T] | Synced] = []
        for seq in seqs:
            record = self._waiting.pop(seq)
            self.in_flight -= record.size
            if frame.kind == Kind.ACK:
                self._frames += 1
                self._pages += record.pages
                events.append(Acked(record.token))
            else:
                events.append(Lost(record.token))
        return events


@dataclass(frozen=True, slots=True)
class Data:
    """Pages to place; then call `placed`, or `not_placed`."""

    frame: Frame


class ReceivingChannel:
    """The destination's half."""

    def __init__(self) -> None:
        self.round = 1
        self.lost = 0
        self._expected = 0
        self._frames = 0
        self._pages = 0
        self._acks: list[int] = []  # [first, last] of what is placed and not yet told
        self._answers: list[bytes] = []
        self._barrier = self._synced = b""  # the last barrier's frame and its answer

    def __repr__(self) -> str:
        return f"<ReceivingChannel round={self.round} expected={self._expected}>"

    def receive(self, meta: Buffer, payload: Buffer = b"") -> Data | None:
        """The pages to place, or None if the frame was for the channel itself or damaged."""
        try:
            frame = decode(meta)
        except Damaged:
            return None  # its number is unknown: the gap shows at the next frame
        if frame.kind not in (Kind.DATA, Kind.SYNC):
            raise RemoteProtocolError(f"unexpected {frame.kind.name}")
        again = frame.kind == Kind.SYNC and frame.seq + 1 == self._expected
        if again and bytes(meta) == self._barrier:
            self._answers.append(self._synced)
            return None
        if frame.seq < self._expected:
            raise RemoteProtocolError(f"frame {frame.seq} came again, {self._expected} is next")
        if frame.round != self.round:
            raise RemoteProtocolError(f"frame of round {frame.round} in round {self.round}")
        if frame.seq - self._expected > MAX_IN_FLIGHT:
            raise RemoteProtocolError(f"frame {frame.seq}, and {self._expected} is next")
        if frame.seq > self._expected:
            self._nack(self._expected, frame.seq - 1)
        self._expected = frame.seq + 1
        if frame.kind == Kind.SYNC:
            self._sync(frame)
            self._barrier = bytes(meta)
            return None
        if not payload_matches(meta, frame, payload):
            self._nack(frame.seq, frame.seq)
            return None
        return Data(frame)

    def _nack(self, first: int, last: int) -> None:
        self.lost += last - first + 1
        self._flush_acks()
        self._answers.append(encode_control(Frame(Kind.NACK, first, self.round, last=last)))

    def _sync(self, frame: Frame) -> None:
        self._flush_acks()
        answer = encode_control(
            Frame(Kind.SYNC_ACK, frame.seq, self.round, frames=self._frames, pages=self._pages)
        )
        self._answers.append(answer)
        self._synced = answer
        self.round += 1
        self._frames = self._pages = 0

    def placed(self, frame: Frame) -> None:
        """The pages of `frame` are in the guest's memory."""
        self._frames += 1
        self._pages += frame.page_total
        if self._acks and self._acks[1] + 1 == frame.seq:
            self._acks[1] = frame.seq
            return
        self._flush_acks()
        self._acks = [frame.seq, frame.seq]

    def not_placed(self, frame: Frame) -> None:
        """Nothing of `frame` is in the guest's memory: what its pages are made of is not here."""
        self._nack(frame.seq, frame.seq)

    def _flush_acks(self) -> None:
        if self._acks:
            first, last = self._acks
            self._answers.append(encode_control(Frame(Kind.ACK, first, self.round, last=last)))
            self._acks = []

    def answers(self, *, idle: bool) -> list[bytes]:
        """Frames to send back now; `idle` when nothing more is waiting to be read."""
        if self._acks and (idle or self._acks[1] - self._acks[0] + 1 >= ACK_EVERY):
            self._flush_acks()
        answers, self._answers = self._answers, []
        return answers
