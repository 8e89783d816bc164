"""Codecs: what a batch of pages looks like on the wire. A registry by name and by wire id.

A codec compresses one batch as a whole and gives back exactly the bytes it was given. Each
bounds its output: a small input that claims to be huge is an error before it is memory.
The counterparts of QEMU's multifd-zlib.c and multifd-zstd.c; unlike those, batches are
independent of each other, so a lost one harms no other.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import RemoteProtocolError, UsageError
from ..wire import Buffer

NONE_ID = 0
DELTAS = "xbzrle"  # a layer before a codec, and no codec itself (xbzrle.py)
# No codec: the pages are in a file that the receiver was given as well (workers/here.py). The
# payload says which file. From anybody else it is an unknown codec.
HERE_ID = 255


class Codec(Protocol):
    """One way to shrink a batch."""

    name: str
    wire_id: int

    def compress(self, data: Buffer) -> Buffer: ...

    def decompress(self, data: Buffer, size: int) -> Buffer:
        """Exactly `size` bytes, or RemoteProtocolError."""


@dataclass(frozen=True)
class Levels:
    """The levels a codec takes, and the one it uses if nobody asks."""

    lowest: int
    highest: int
    default: int


def _exactly(out: Buffer, size: int, name: str) -> Buffer:
    if len(out) != size:
        raise RemoteProtocolError(f"{name}: a batch of {size} bytes came out as {len(out)}")
    return out


class NoCodec:
    """Pages as they are."""

    name = "none"
    wire_id = NONE_ID
    levels = Levels(0, 0, 0)

    def __init__(self, level: int = 0) -> None:
        self.level = level

    def compress(self, data: Buffer) -> Buffer:
        return data

    def decompress(self, data: Buffer, size: int) -> Buffer:
        return _exactly(data, size, self.name)


class Lz4Codec:
    """LZ4 block format; level 0 is the fast compressor, 1..12 the high-compression one."""

    name = "lz4"
    wire_id = 1
    levels = Levels(0, 12, 0)

    def __init__(self, level: int = 0) -> None:
        import lz4.block

        self.level = level
        self._lib: Any = lz4.block
        self._how = {"mode": "high_compression", "compression": level} if level else {}

    def compress(self, data: Buffer) -> Buffer:
        out: bytes = self._lib.compress(data, store_size=False, **self._how)
        return out

    def decompress(self, data: Buffer, size: int) -> Buffer:
        try:
            out: bytes = self._lib.decompress(data, uncompressed_size=size)
        except self._lib.LZ4BlockError as e:
            raise RemoteProtocolError(f"lz4: {e}") from e
        return _exactly(out, size, self.name)


class ZstdCodec:
    """Zstandard frames with their content size inside."""

    name = "zstd"
    wire_id = 2
    levels = Levels(-7, 19, 1)

    def __init__(self, level: int = 1) -> None:
        import zstandard

        self.level = level
        self._lib = zstandard
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, data: Buffer) -> Buffer:
        return self._compressor.compress(data)

    def decompress(self, data: Buffer, size: int) -> Buffer:
        # The library allocates what the frame claims: ask before it does.
        try:
            claimed = self._lib.get_frame_parameters(data).content_size
            if claimed != size:
                raise RemoteProtocolError(f"zstd: a batch of {size} bytes claims {claimed}")
            out = self._decompressor.decompress(data)
        except self._lib.ZstdError as e:
            raise RemoteProtocolError(f"zstd: {e}") from e
        return _exactly(out, size, self.name)


class ZlibCodec:
    """zlib streams (RFC 1950)."""

    name = "zlib"
    wire_id = 3
    levels = Levels(1, 9, 1)

    def __init__(self, level: int = 1) -> None:
        self.level = level

    def compress(self, data: Buffer) -> Buffer:
        return zlib.compress(data, self.level)

    def decompress(self, data: Buffer, size: int) -> Buffer:
        stream = zlib.decompressobj()
        try:
            out = stream.decompress(data, size + 1)
        except zlib.error as e:
            raise RemoteProtocolError(f"zlib: {e}") from e
        if not stream.eof:
            raise RemoteProtocolError("zlib: a batch that does not end")
        return _exactly(out, size, self.name)


CODECS: dict[str, type[NoCodec] | type[Lz4Codec] | type[ZstdCodec] | type[ZlibCodec]] = {
    cls.name: cls for cls in (NoCodec, Lz4Codec, ZstdCodec, ZlibCodec)
}
BY_WIRE_ID = {cls.wire_id: cls for cls in CODECS.values()}


def codec_names() -> str:
    """What may be asked for, for people."""
    return f"auto, {', '.join(CODECS)}, {DELTAS} or {DELTAS}+NAME"


def before(deltas: bool, codec: str) -> str:
    """The name of `codec` where deltas are made first."""
    return (DELTAS if codec == "none" else f"{DELTAS}+{codec}") if deltas else codec


def make_codec(name: str, level: int | None = None) -> Codec:
    """The codec called `name`; UsageError if there is none or it has no such level."""
    if name not in CODECS:
        raise UsageError(f"there is no codec {name!r}; choose from {', '.join(CODECS)}")
    levels = CODECS[name].levels
    if level is None:
        level = levels.default
    if not levels.lowest <= level <= levels.highest:
        raise UsageError(f"{name} has levels {levels.lowest} to {levels.highest}, not {level}")
    return CODECS[name](level)


class Decoders:
    """Codecs by wire id, each made when the first frame names it."""

    def __init__(self) -> None:
        self._made: dict[int, Codec] = {}

    def get(self, wire_id: int) -> Codec:
        if wire_id not in self._made:
            if wire_id not in BY_WIRE_ID:
                raise RemoteProtocolError(f"frame with the unknown codec {wire_id}")
            self._made[wire_id] = BY_WIRE_ID[wire_id]()
        return self._made[wire_id]
