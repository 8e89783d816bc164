"""Snapshots on disk: what savers write is what is read, and nothing that was changed is."""

import mmap
import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from pageferry.transport.codecs import HERE_ID
from pageferry.transport.errors import (
    DestinationError,
    RemoteProtocolError,
    SourceError,
    VerificationFailed,
)
from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE, runs_of, total_pages
from pageferry.transport.snapshot_format import ALIGNMENT, CHUNK_BYTES
from pageferry.transport.wire import Frame, Kind
from pageferry.workers import snapshot_file
from pageferry.workers.batches import BlockReader
from pageferry.workers.claims import FREE, SAVED, TODO, Claims
from pageferry.workers.counters import FIELDS, Counters, Row
from pageferry.workers.digest import chunk_digests
from pageferry.workers.guests import open_source, parse_guest
from pageferry.workers.here import named
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.receiver import Receiver, ReceiverJob
from pageferry.workers.saver import Keeper, SaverJob, read_chunks, stretches
from pageferry.workers.snapshot_file import SnapshotWriter

PAGES = 100
SIZE = PAGES * PAGE_SIZE - 100  # the last page is no whole one


def memory_of(seed, size=SIZE):
    """Pages of noise, of zeros, and of zeros but for their last byte."""
    noise = np.random.default_rng(seed)
    pages = noise.integers(1, 255, (-(-size // PAGE_SIZE), PAGE_SIZE), np.uint8)
    pages[1::3] = 0
    pages[32:64] = 0
    pages[7] = 0
    pages[7, -1] = 1
    return pages.tobytes()[:size]


@pytest.fixture
def ram():
    """Blocks of memory, each in a memfd of its own."""
    made = []

    def make(data, name="ram"):
        fd = os.memfd_create("memory")
        made.append(RamFile(fd, name))
        os.ftruncate(fd, len(data))
        for at in range(0, len(data), PAGE_SIZE):
            if data[at : at + PAGE_SIZE].strip(b"\0"):
                os.pwrite(fd, data[at : at + PAGE_SIZE], at)
        return RamBlock(Block(name, len(data)), made[-1], 0)

    yield make
    for file in made:
        file.close()


def save(path, blocks, state=b"state", *, direct=False, stop_before_the_end=False):
    """As savers do, in this process."""
    writer = SnapshotWriter(str(path), [b.spec for b in blocks], direct=direct)
    counters, claims = Counters(1), Claims([b.chunks for b in writer.blocks])
    try:
        job = SaverJob(blocks, writer.targets, writer.tables, claims, counters)
        keeper = Keeper(job, counters.row(0))
        buffer = memoryview(mmap.mmap(-1, 4 * CHUNK_BYTES))
        for i, block in enumerate(blocks):
            chunks = writer.blocks[i].chunks
            for first in range(0, chunks, 4):
                content = read_chunks(block, first, min(4, chunks - first), buffer)
                keeper.keep(i, first, content)
        if not stop_before_the_end:
            writer.finish("ram", True, sum(b.size for b in blocks), "1", state)
            writer.publish()
        return counters.read(0)
    finally:
        writer.discard()
        claims.close()
        counters.close()


def content_of(block):
    """All of it, as senders read it."""
    reader, out = BlockReader(block), np.zeros((block.pages, PAGE_SIZE), np.uint8)
    starts, counts = block.data_runs()
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        pages = np.arange(start, start + count, dtype=np.int64)
        out[pages] = reader.read(pages, copy=False).view(np.uint8)
    return out.tobytes()[: block.size]


@pytest.fixture
def opened():
    """Snapshots that are closed at the end."""
    made = []

    def open_(path):
        made.append(open_source(parse_guest(f"file:{path}")))
        return made[-1]

    yield open_
    while made:
        made.pop().close()


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_saved_is_read_again(tmp_path, ram, opened, direct):
    """All blocks, at fixed places, a partial page too; zero pages are holes and not there."""
    data = [memory_of(1), memory_of(2, 3 << 20)]
    counts = save(tmp_path / "a", [ram(data[0], "a"), ram(data[1], "b")], direct=direct)
    guest = opened(tmp_path / "a")
    assert [content_of(block) for block in guest.blocks] == data
    assert (guest.kind, guest.running, guest.save_state()) == ("ram", True, b"state")
    there = sum(total_pages(block.data_runs()) for block in guest.blocks)
    assert there == counts["normal"] == counts["wire_bytes"] // PAGE_SIZE
    whole = (tmp_path / "a").read_bytes()
    assert whole[ALIGNMENT : ALIGNMENT + SIZE] == data[0]
    assert os.stat(tmp_path / "a").st_blocks * 512 < (there + 40) * PAGE_SIZE


def test_parts_of_a_block(tmp_path, ram, opened, monkeypatch):
    """Runs of any stretch are those of the whole; looked at in whatever steps."""
    monkeypatch.setattr(snapshot_file, "_STEP_PAGES", 7)
    save(tmp_path / "a", [ram(memory_of(1))])
    block = opened(tmp_path / "a").blocks[0]
    every = np.zeros(PAGES, bool)
    starts, counts = block.data_runs()
    for start, count in zip(starts, counts, strict=True):
        every[start : start + count] = True
    for first, count in ((0, 1), (5, 13), (33, 20), (90, 10), (96, 100)):
        starts, counts = block.data_runs(first, count)
        found = np.zeros(PAGES, bool)
        for start, n in zip(starts, counts, strict=True):
            found[start : start + n] = True
        assert (found[first : first + count] == every[first : first + count]).all()
        assert found.sum() == every[first : first + count].sum()


def test_holes_that_a_copy_has_filled_stay_zero(tmp_path, ram, opened):
    """Bits say what is there; what is not is not read."""
    save(tmp_path / "a", [ram(memory_of(1))])
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    assert content_of(opened(tmp_path / "b").blocks[0]) == memory_of(1)


def runs_that_hold(pages):
    return runs_of(np.array(sorted(pages), np.int64))


class Desk:
    """What a receiver needs of its own: a row of numbers."""

    row = Row(np.zeros(len(FIELDS), np.uint64))


@pytest.fixture
def receivers():
    """Receivers in this process, of blocks that they read themselves."""
    made, counters = [], Counters(1)

    def make(into, here):
        job = ReceiverJob([into], counters, "", b"", [True], threading.Lock(), here=here)
        made.append(Receiver(Desk, job))
        return made[-1]

    yield make
    for receiver in made:
        receiver.context.term()
    counters.close()


def test_who_places_pages_reads_them(tmp_path, ram, opened, receivers):
    """Any of them, however far apart, the last one that is no whole one too; only of the file that
    is meant; nothing that was changed."""
    data = memory_of(1, (8 << 20) - 100)
    save(tmp_path / "a", [ram(data)])
    guest = opened(tmp_path / "a")
    assert named(guest.blocks[0]) == b""
    here = guest.read_by_its_receiver()
    name, end = named(here[0]), here[0].pages
    into = ram(bytes(len(data)))
    receiver = receivers(into, here)
    expected = bytearray(len(data))
    for pages in ([0], range(5, 300), [15, 16], range(3, end, 7), [end - 40, end - 1]):
        runs = runs_that_hold(pages)
        for at in range(0, len(runs[0]), 500):
            part = runs[0][at : at + 500], runs[1][at : at + 500]
            frame = Frame(Kind.DATA, 0, packed=part, codec=HERE_ID, payload_size=len(name))
            assert receiver._place(frame, name)
        for page in pages:
            begin = page * PAGE_SIZE
            expected[begin : begin + PAGE_SIZE] = data[begin : begin + PAGE_SIZE]
    assert into.read(0, len(data)) == expected
    frame = Frame(Kind.DATA, 0, packed=runs_that_hold([0]), codec=HERE_ID, payload_size=16)
    for wrong, payload in ((receivers(into, ()), name), (receiver, name[::-1])):
        with pytest.raises(RemoteProtocolError, match="a file which is not here"):
            wrong._place(frame, payload)
    with open(tmp_path / "a", "r+b") as file:
        file.seek(ALIGNMENT + 20 * PAGE_SIZE)
        file.write(bytes(PAGE_SIZE))
    for pages in ([16], range(0, 64), [0, 31]):
        frame = replace(frame, packed=runs_that_hold(pages))
        with pytest.raises(VerificationFailed, match="a is damaged: bytes 65536 to 131072"):
            receiver._place(frame, name)
    os.truncate(tmp_path / "a", ALIGNMENT + 100)
    with pytest.raises(SourceError, match="became shorter"):
        receiver._place(frame, name)


@pytest.mark.parametrize("page", [0, 7, 34, 99])
def test_a_changed_page_is_never_presented(tmp_path, ram, opened, page):
    """Also one that was zero; whoever reads of the chunk next hears it too."""
    save(tmp_path / "a", [ram(memory_of(1))])
    with open(tmp_path / "a", "r+b") as file:
        file.seek(ALIGNMENT + page * PAGE_SIZE + 3000)
        file.write(b"\xff")
    block = opened(tmp_path / "a").blocks[0]
    for _ in range(2):
        with pytest.raises(VerificationFailed, match=f"a is damaged: bytes {page // 16 * 65536} "):
            BlockReader(block).read(np.array([page]), copy=False)
        with pytest.raises(VerificationFailed):
            block.check(range(page, page + 1))
    other = 50 if page < 48 else 10
    BlockReader(block).read(np.array([other]), copy=True)
    with pytest.raises(VerificationFailed):
        chunk_digests(block)


def test_what_was_compared_is_what_is_read(tmp_path, ram, opened):
    """Damage between two looks of a sender changes nothing of what it takes, or is found."""
    data = memory_of(1)
    save(tmp_path / "a", [ram(data)])
    reader = BlockReader(opened(tmp_path / "a").blocks[0])
    pages = np.arange(32)
    zero = reader.zero(pages)
    assert np.flatnonzero(zero).tolist() == list(range(1, 32, 3))[:2] + list(range(10, 32, 3))
    with open(tmp_path / "a", "r+b") as file:
        file.seek(ALIGNMENT + 20 * PAGE_SIZE)
        file.write(b"\xff" * PAGE_SIZE)
    kept = [reader.read(np.array(which), copy=copy).tobytes()
            for which, copy in ((range(18, 24), False), ([0, 20, 31], True))]  # fmt: skip
    pages_of = [data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] for at in range(32)]
    assert kept == [b"".join(pages_of[18:24]), pages_of[0] + pages_of[20] + pages_of[31]]
    reader.read(np.array([90]), copy=False)  # others are read meanwhile
    with pytest.raises(VerificationFailed, match="a is damaged: bytes 65536 to 131072"):
        reader.read(np.array([20]), copy=False)


def test_pages_that_lie_far_apart(tmp_path, ram, opened, monkeypatch):
    """More chunks than are kept: each in its turn."""
    monkeypatch.setattr(snapshot_file, "_HELD_CHUNKS", 2)
    data = memory_of(1)
    save(tmp_path / "a", [ram(data)])
    reader = BlockReader(opened(tmp_path / "a").blocks[0])
    pages = np.array([3, 5, 20, 40, 70, 71, 98, 99])
    found = reader.read(pages, copy=False).tobytes()
    assert found == b"".join(
        data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE].ljust(PAGE_SIZE, b"\0") for at in pages.tolist()
    )
    assert reader.zero(pages).tolist() == [False, False, False, True, True, False, False, False]


def test_a_changed_table_is_refused(tmp_path, ram):
    """Digests and bits have a digest themselves."""
    save(tmp_path / "a", [ram(memory_of(1))])
    with open(tmp_path / "a", "r+b") as file:
        file.seek(2 * ALIGNMENT + 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SourceError, match=r"cannot read the snapshot .*its digests were changed"):
        open_source(parse_guest(f"file:{tmp_path}/a"))


def test_files_that_are_none(tmp_path, ram):
    """Each says what it is, and what to do; no descriptor is left."""
    save(tmp_path / "a", [ram(memory_of(1))])
    whole = (tmp_path / "a").read_bytes()
    for content, why in ((whole[:-1], "truncated"), (whole[:5000], "truncated"), (b"", "empty"),
                         (bytes(9999), "no snapshot of pageferry")):  # fmt: skip
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(SourceError, match=why):
            open_source(parse_guest(f"file:{tmp_path}/b"))
    with pytest.raises(SourceError, match="No such file"):
        open_source(parse_guest(f"file:{tmp_path}/c"))


def test_one_that_was_not_finished_leaves_nothing(tmp_path, ram):
    """And one of that name stays as it was."""
    save(tmp_path / "a", [ram(memory_of(1))], stop_before_the_end=True)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").write_bytes(b"old")
    save(tmp_path / "a", [ram(memory_of(1))], stop_before_the_end=True)
    assert (tmp_path / "a").read_bytes() == b"old"
    with pytest.raises(DestinationError, match="it is a directory"):
        save(tmp_path, [ram(memory_of(1))])


def test_a_claim_takes_what_is_nobodys():
    """Once; what somebody has stays his."""
    claims = Claims([10, 4])
    view = claims.view(0)
    assert claims.claim(view, 2, 3) == [2, 3, 4]
    assert claims.claim(view, 0, 6) == [0, 1, 5]
    assert claims.claim(view, 0, 6) == []
    view[2:4] = FREE, SAVED
    assert claims.claim(view, 0, 10) == [6, 7, 8, 9]
    assert (claims.view(1) == TODO).all()
    assert not claims.all_saved()
    for block in (0, 1):
        claims.view(block)[:] = SAVED
    assert claims.all_saved()
    del view
    claims.close()


def test_stretches():
    assert stretches([]) == []
    assert stretches([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 1), (9, 2)]


def test_one_that_becomes_shorter_while_it_is_read_has_no_zeros_for_that(tmp_path, ram, opened):
    save(tmp_path / "a", [ram(memory_of(1))])
    block = opened(tmp_path / "a").blocks[0]
    os.truncate(tmp_path / "a", block.stored.tables_at)
    with pytest.raises(SourceError, match="became shorter"):
        block.data_runs()
