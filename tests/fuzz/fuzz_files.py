"""Fuzz targets: files, and what comes from others on this host (monitors of virtual machines, QMP).

As in fuzz_channels.py, a target raises nothing but what it asserts. Files are memfds: nothing has a
name, and nothing is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from types import SimpleNamespace
from typing import Any

import msgspec
from fuzz_draw import Draw
from fuzz_states import sealed

from pageferry.pipeline import manifest, profiles
from pageferry.pipeline.inspecting import inspect_saved
from pageferry.pipeline.monitor import Conversation, Splitter, _line
from pageferry.pipeline.restoring import regions_of
from pageferry.transport import snapshot_format as form
from pageferry.transport.errors import (
    HostLacks,
    PageferryError,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    UsageError,
    VerificationFailed,
)
from pageferry.transport.messages import MAX_BLOCKS, MAX_STATE, UNDECODABLE, Block, Hello
from pageferry.transport.pages import PAGE_SIZE
from pageferry.workers.guests.demo import registers_of
from pageferry.workers.guests.handover import decode_mappings
from pageferry.workers.guests.image import (
    ImageDestination,
    _core_blocks,
    _skeleton,
)
from pageferry.workers.guests.image import image_state as state_of_image
from pageferry.workers.guests.snapshot import SnapshotSource
from pageferry.workers.guests.states import DEMO, IMAGE, state_into
from pageferry.workers.guests.uri import GuestUri


@contextlib.contextmanager
def _file(data: bytes):
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def core(data: bytes) -> None:
    """An ELF core: blocks in the file, apart from each other, and all that lies around them."""
    with _file(data) as fd:
        try:
            blocks = _core_blocks(fd, len(data), "a core")
            pieces = _skeleton(fd, len(data), blocks, "a core")
        except SourceError:
            return
    assert len(blocks) <= MAX_BLOCKS
    out, at = bytearray(len(data)), 0
    for block in blocks:
        assert at <= block.offset < block.offset + block.size <= len(data)
        at = block.offset + block.size
        out[block.offset : at] = data[block.offset : at]
    for offset, piece in pieces:
        out[offset : offset + len(piece)] = piece
    assert out == data


# ---- snapshots -----------------------------------------------------------------------------

_MOST_TABLES = 1 << 18  # of a block, bytes: what is behind it is the same again


def snapshot(data: bytes) -> None:
    """A snapshot: as it is; under a header that is right; and, if it is an index that can be laid
    out, with digests that are right too. What is read of it stays within its blocks."""
    _look_at(data)
    draw = Draw(data)
    at, length, size = draw.number(64, form.ALIGNMENT), draw.number(64), draw.number(64)
    with contextlib.suppress(SourceError):
        found = form.decode_header(_header(at, b"", length), size)
        assert form.ALIGNMENT <= found.at <= found.at + found.length <= size
    _look_at(_header(form.ALIGNMENT, data), (form.ALIGNMENT, data))
    try:
        index = msgspec.msgpack.decode(data, type=form.Index)
    except UNDECODABLE:
        return
    if len(index.blocks) <= 16 and all(0 < b.table_bytes <= _MOST_TABLES for b in index.blocks):
        _with_right_sums(index, data)


def _header(at: int, body: bytes, length: int | None = None) -> bytes:
    """One that is right."""
    length = len(body) if length is None else length
    head = struct.pack("<8sIIQQ16s", form.MAGIC, form.VERSION, 0, at, length, form.digest(body))
    return (head + form.digest(head)).ljust(form.HEADER_BYTES, b"\0")


def _with_right_sums(index: form.Index, data: bytes) -> None:
    ends = [(b.at, b.spec.size) for b in index.blocks]
    ends += [(b.tables_at, b.table_bytes) for b in index.blocks]
    at = max([form.ALIGNMENT, *(begin + length for begin, length in ends)])
    if at > 1 << 50 or any(begin < 0 for begin, _ in ends):
        return
    tables = [(b, (data * (b.table_bytes // len(data) + 1))[: b.table_bytes]) for b in index.blocks]
    blocks = [msgspec.structs.replace(b, sum=form.digest(table)) for b, table in tables]
    header, body = form.encode(msgspec.structs.replace(index, blocks=blocks), at)
    _look_at(header, (at, body), *((b.tables_at, table) for b, table in tables))


def _look_at(header: bytes, *pieces: tuple[int, bytes]) -> None:
    """The file of these pieces is refused, or each part of it is read."""
    with _file(header) as fd:
        for at, piece in pieces:
            os.pwrite(fd, piece, at)
        path = f"/proc/self/fd/{fd}"
        with contextlib.suppress(PageferryError):
            json.dumps(inspect_saved(path))
        try:
            guest = SnapshotSource(GuestUri("file", path))
        except SourceError:
            return
        with contextlib.closing(guest):
            assert guest.kind.isprintable() and len(guest.save_state()) <= MAX_STATE
            for block in guest.blocks:
                starts, counts = block.data_runs()
                assert all(starts >= 0) and all(starts + counts <= block.pages)
                with contextlib.suppress(VerificationFailed):
                    block.check([0, block.pages - 1])
                with contextlib.suppress(VerificationFailed):
                    block.check(starts[:8])


# ---- an image's state, and the demo guest's ------------------------------------------------

_SIZE = 16 * PAGE_SIZE
_HELLO = Hello(1, "0", "id", "image", [Block("ram", _SIZE)], 1, 256, image_size=_SIZE)


def image_state(data: bytes) -> None:
    """What of an image is no memory, as it is and with the right sum: never outside of the file."""
    states = [data, sealed(IMAGE, data)]
    with contextlib.suppress(RemoteProtocolError, PeerRefused):
        state_into(IMAGE, states[1], found := SimpleNamespace())
        states.append(state_of_image([(piece.offset, piece.data) for piece in found.pieces]))
    for state in states:
        guest = ImageDestination(GuestUri("image", os.path.join(tempfile.gettempdir(), "fuzz")))
        try:
            guest.lay_out(_HELLO)
            with contextlib.suppress(RemoteProtocolError, PeerRefused, VerificationFailed):
                guest.load_state("image", state, False)
            assert guest.blocks[0].file.mapping().size() == _SIZE
        finally:
            guest.discard()


def demo_state(data: bytes) -> None:
    """The demo guest's registers: of a guest of that many pages, or refused."""
    with contextlib.suppress(RemoteProtocolError, PeerRefused):
        registers = registers_of(sealed(DEMO, data), 100)
        assert 0 <= registers.position < 100 and registers.vcpus >= 1


# ---- a monitor that hands its guest's memory over ------------------------------------------


def handover(data: bytes) -> None:
    """Firecracker's handover: regions of the snapshot, apart from each other, or refused with its
    descriptors closed."""
    block = Block("ram", 64 << 20)
    with _file(b"") as fd:
        given = os.dup(fd)
        try:
            mappings = decode_mappings(data, [given])
        except SourceError:
            with contextlib.suppress(OSError):
                os.fstat(given)
                raise AssertionError("a descriptor was left open") from None
            return
        os.close(given)
    try:
        regions, page_size = regions_of(mappings, block)
    except SourceError:
        return
    end = 0
    for region in sorted(regions, key=lambda r: r.first):
        assert end <= region.first and region.pages > 0 and region.page_size == page_size
        end = region.first + region.pages
        assert 0 <= region.address < 1 << 63
    assert end * PAGE_SIZE <= block.size


# ---- QMP -----------------------------------------------------------------------------------


class _Idle:
    """What a monitor looks at when nothing happens."""

    def query(self) -> dict[str, Any]:
        return {"status": "none"}

    query_parameters = query

    def can_be_yanked(self) -> bool:
        return False

    def set_parameters(self, arguments: dict[str, Any]) -> None:
        raise UsageError("no")

    def recover(self, where: str | None) -> None:
        assert where is None or isinstance(where, str)

    def cancel(self) -> None:
        pass

    yank = start_postcopy = pause = go_on = cancel


def _pieces(*parts: bytes) -> list[bytes] | None:
    splitter, found = Splitter(), []
    try:
        for part in parts:
            found += splitter.feed(part)
    except ValueError:
        return None
    return found


def qmp(data: bytes) -> None:
    """A client of the monitor: cut in the same places however it comes, and each piece answered."""
    whole = _pieces(data)
    at = len(data) // 2
    assert _pieces(data[:at], data[at:]) == whole
    talk = Conversation(_Idle())
    talk.negotiated = bool(data) and data[0] % 2 == 0
    for piece in whole or ():
        answer = msgspec.json.decode(_line(talk.answer(piece)))
        assert ("return" in answer) != ("error" in answer)


# ---- what people write ---------------------------------------------------------------------


def batch(data: bytes) -> None:
    """A manifest: the first byte says in which form."""
    draw = Draw(data)
    form = draw.one_of(("TOML", "JSON", "YAML"))
    with contextlib.suppress(UsageError, HostLacks):
        found = manifest.parse(draw.rest(), form, "/images", "tcp://192.0.2.7:4444")
        assert found.items and found.policy.parallel >= 1
        for item in found.items:
            item.parameters()


def profile(data: bytes) -> None:
    """A profile; what it says can be written and says the same."""
    with _file(data) as fd:
        try:
            found = profiles.read_profile(f"/proc/self/fd/{fd}")
        except UsageError:
            return
    with _file(profiles.render(found, ["again"]).encode()) as fd:
        assert profiles.read_profile(f"/proc/self/fd/{fd}") == found


TARGETS = {
    f.__name__.replace("_", "-"): f
    for f in (core, snapshot, image_state, demo_state, handover, qmp, batch, profile)
}
