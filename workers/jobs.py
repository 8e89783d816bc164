"""What a coordinator and its workers say to each other over their pipe: msgpack, typed.

The pipe is a socket pair inside one process group; it never carries memory, only names of
pages. Every worker says Ready once, then answers each job once, or says Failed and ends.
"""

from __future__ import annotations

import msgspec

from ..transport.curve import Binds, Dials
from ..transport.errors import PageferryError, as_ours, by_name


class Job(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of everything on the pipe."""


class Open(Job, frozen=True, tag="open"):
    """Coordinator to sender: connect to your receiver. `curve`: only with keys, here and below."""

    endpoint: str
    token: bytes
    curve: Dials | None = None


class Listen(Job, frozen=True, tag="listen"):
    """Coordinator to sender or postcopy process: let your counterpart connect, who knows the token.
    Answered with Ready, which says where."""

    endpoint: str
    token: bytes
    curve: Binds | None = None


class Extent(Job, frozen=True, tag="extent"):
    """Coordinator to sender: send the dirty pages of [first, first + count) of a block.

    `live`: the guest may be writing; copy a batch before anything else looks at it. `codec`,
    `level`: for this extent; "" for what the sender was started with.
    """

    block: int
    first: int
    count: int
    live: bool
    codec: str = ""
    level: int | None = None


class Barrier(Job, frozen=True, tag="barrier"):
    """Coordinator to sender: agree with your receiver on what was placed in this round (0: in
    whatever round this channel is)."""

    round: int


class Scan(Job, frozen=True, tag="scan"):
    """Coordinator to sender: mark as dirty what is no longer what was sent."""

    block: int
    first: int
    count: int


class Digest(Job, frozen=True, tag="digest"):
    """Coordinator to sender or receiver: the digest of part `part` of a block."""

    block: int
    part: int


class Check(Job, frozen=True, tag="check"):
    """Coordinator to receiver: what of part `part` of a block did not come with a sum must be
    zero."""

    block: int
    part: int


class Postcopy(Job, frozen=True, tag="postcopy"):
    """Coordinator to sender: from now on claim pages, piece by piece, and stand aside for urgent
    requests; to receiver: from now on install pages in the guest. Answered with Ready."""


class Unlink(Job, frozen=True, tag="unlink"):
    """Coordinator to fault process: the source is gone. Go on with what can be done alone. From
    it: the urgent channel broke."""


class Relink(Job, frozen=True, tag="relink"):
    """Coordinator to fault process: listen again, under a new token. Answered with Ready."""

    token: bytes
    endpoint: str = ""  # dial here, instead of listening
    curve: Binds | Dials | None = None


class Hold(Job, frozen=True, tag="hold"):
    """Coordinator to fault process: leave who touches a missing page asleep; or, with `on` False,
    serve them again. Answered with Ready."""

    token: bytes
    on: bool


class Finish(Job, frozen=True, tag="finish"):
    """Coordinator to fault process: all pages are here, catch nothing any more. Answered with
    Ready; to the postcopy process: say Ready when all you sent is placed. To a carrier: end the
    stream when all is delivered. Answered with StreamEnded."""

    token: bytes = b""


class Stop(Job, frozen=True, tag="stop"):
    """Coordinator to any: end."""


class Ready(Job, frozen=True, tag="ready"):
    """Worker: up; a receiver says where it listens. `token`: of the job that this answers, where
    an older one may have been given up."""

    endpoint: str = ""
    token: bytes = b""


class Names(Job, frozen=True, tag="names"):
    """Coordinator to carrier: listen at these names beside yours as well. Answered with Ready."""

    suffixes: list[str]


class Said(Job, frozen=True, tag="said"):
    """Carrier: a line that the stream's command has written to stderr."""

    line: str


class StreamEnded(Job, frozen=True, tag="stream-ended"):
    """Carrier: it ended as it was told to. `status`: of the command, None if there is none or it
    did not end by itself."""

    status: int | None
    said: str


class ExtentDone(Job, frozen=True, tag="extent-done"):
    """Sender: every page of the extent is acknowledged or dirty again."""

    lost: int


class BarrierDone(Job, frozen=True, tag="barrier-done"):
    """Sender: the receiver placed what we sent."""

    round: int


class ScanDone(Job, frozen=True, tag="scan-done"):
    """Sender: scanned."""


class DigestDone(Job, frozen=True, tag="digest-done"):
    """Any: the digest."""

    block: int
    part: int
    digest: bytes


class CheckDone(Job, frozen=True, tag="check-done"):
    """Receiver: so many pages of the part hold something that nobody sent."""

    block: int
    part: int
    wrong: int


class Failed(Job, frozen=True, tag="failed"):
    """Any: it cannot go on, and why. The class travels by name, never as code."""

    error: str
    message: str


AnyJob = (
    Open | Listen | Extent | Barrier | Scan | Digest | Check | Stop | Postcopy | Unlink | Relink
    | Hold | Finish | Ready | ExtentDone | BarrierDone | ScanDone | DigestDone | CheckDone | Failed
    | Names | Said | StreamEnded
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyJob] = msgspec.msgpack.Decoder(AnyJob)


def encode(job: AnyJob) -> bytes:
    return _encoder.encode(job)


def decode(data: bytes) -> AnyJob:
    return _decoder.decode(data)


def failed(error: BaseException) -> Failed:
    """`error` for the pipe."""
    ours = as_ours(error)
    return Failed(type(ours).__name__, ours.message)


def error_of(job: Failed) -> PageferryError:
    return by_name(job.error, job.message)
