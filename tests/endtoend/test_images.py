"""Memory images, end to end with real worker processes: every byte, at every setting."""

import json
import os
import random
import struct

import pytest
from helpers import PAGE, blocks_on_disk, pattern, same_file
from helpers import pageferry as run

import pageferry
from pageferry.transport.errors import VerificationFailed

PAGES = 3000


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "source.mem"
    path.write_bytes(pattern(PAGES) + b"a tail that is no whole page")
    return path


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "zlib", "auto"])
def test_equal_bytes(image, tmp_path, workers, codec):
    out = tmp_path / "out.mem"
    report = pageferry.migrate(
        f"image:{image}", f"image:{out}", workers=workers, codec=codec, verify=True
    )
    assert report["status"] == "completed"
    assert same_file(image, out)
    ram = report["ram"]
    assert ram["normal"] + ram["duplicate"] == ram["total"] // PAGE == PAGES + 1
    assert ram["remaining"] == 0
    assert report["lost-frames"] == 0
    assert len(report["processes"]) == 1 + 2 * workers


@pytest.mark.parametrize(("codec", "level"), [("lz4", 6), ("zstd", -3), ("zstd", 5), ("zlib", 6)])
def test_levels(image, tmp_path, codec, level):
    out = tmp_path / "out.mem"
    pageferry.migrate(f"image:{image}", f"image:{out}", codec=codec, level=level)
    assert same_file(image, out)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 2 << 20, (2 << 20) + 1, 5_000_001])
def test_any_size(tmp_path, size):
    source, out = tmp_path / "s", tmp_path / "o"
    source.write_bytes(pattern(size // PAGE + 1)[:size])
    pageferry.migrate(f"image:{source}", f"image:{out}", verify=True)
    assert same_file(source, out)


@pytest.mark.parametrize("batch_pages", [16, 128, 2048])
def test_any_batch(image, tmp_path, batch_pages):
    out = tmp_path / "o"
    pageferry.migrate(f"image:{image}", f"image:{out}", batch_pages=batch_pages, codec="zstd")
    assert same_file(image, out)


def test_holes_stay_holes(tmp_path):
    source, out = tmp_path / "s", tmp_path / "o"
    with open(source, "wb") as f:
        for at in (0, 1 << 30, (2 << 30) + 12345, 3 << 30):
            f.seek(at)
            f.write(pattern(64, seed=at % 97))
        f.truncate(4 << 30)
    report = pageferry.migrate(f"image:{source}", f"image:{out}", verify=True)
    assert os.stat(out).st_size == 4 << 30
    assert blocks_on_disk(out) <= blocks_on_disk(source) + (1 << 20)
    assert report["ram"]["normal"] < 1000
    with open(source, "rb") as a, open(out, "rb") as b:
        for at in (0, 1 << 30, (2 << 30) + 12345, 3 << 30):
            a.seek(at)
            b.seek(at)
            assert a.read(1 << 20) == b.read(1 << 20)


def _core(tmp_path, segments, gap=b"gap!"):
    """An ELF core: a note segment, then PT_LOADs of given sizes at unaligned offsets."""
    note = struct.pack("<III", 5, 64, 1) + b"CORE\0\0\0\0" + bytes(range(64))
    headers = 64 + 56 * (1 + len(segments))
    offset = headers + len(note) + 12
    programs = [struct.pack("<IIQQQQQQ", 4, 0, headers, 0, 0, len(note), len(note), 0)]
    body = note + bytes(12)
    address = 0x100000
    for content in segments:
        n = len(content)
        programs.append(struct.pack("<IIQQQQQQ", 1, 7, offset, 0, address, n, n, 0))
        body += content + gap
        offset += n + len(gap)
        address += 1 << 24
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    head = ident + struct.pack(
        "<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(programs), 0, 0, 0
    )
    path = tmp_path / "vm.core"
    path.write_bytes(head + b"".join(programs) + body)
    return path


def test_elf_core_arrives_byte_for_byte(tmp_path):
    core = _core(tmp_path, [pattern(700, 1), pattern(300, 2)[:-77], pattern(1, 3)])
    out = tmp_path / "out.core"
    report = pageferry.migrate(f"image:{core}", f"image:{out}", workers=2, verify=True)
    assert same_file(core, out)
    assert len(report["verified"]) == 3


def test_what_is_no_memory_may_be_more_than_a_message(tmp_path):
    """As much of an ELF core as a stranger may not say at once: it travels in parts."""
    core = _core(
        tmp_path, [pattern(30, 1), pattern(20, 2)], gap=random.Random(5).randbytes(9 << 20)
    )
    out = tmp_path / "out.core"
    pageferry.migrate(f"image:{core}", f"image:{out}", workers=1)
    assert same_file(core, out)


def test_replaces_what_was_there_only_when_whole(image, tmp_path):
    out = tmp_path / "out.mem"
    out.write_bytes(b"before")
    pageferry.migrate(f"image:{image}", f"image:{out}")
    assert same_file(image, out)
    assert sorted(os.listdir(tmp_path)) == ["out.mem", "source.mem"]


def test_into_memory_that_held_something_else(image, tmp_path):
    """Zero pages and holes must clear what was there."""
    name = f"/dev/shm/test-pf-{os.getpid()}"
    source = tmp_path / "holes"
    with open(source, "wb") as f:
        f.write(image.read_bytes())
        f.seek(20 << 20)
        f.write(b"end")
    size = os.stat(source).st_size
    try:
        with open(name, "wb") as f:
            f.write(b"\xff" * (size + 100))
        report = pageferry.migrate(f"image:{source}", f"ram:{name}", verify=True)
        assert report["status"] == "completed"
        with open(name, "rb") as f:
            assert f.read(size) == source.read_bytes()
            assert f.read() == b"\xff" * 100
    finally:
        os.unlink(name)


def test_shm_segment(image):
    """shm:NAME is a segment that multiprocessing.shared_memory opens."""
    from multiprocessing import resource_tracker
    from multiprocessing.shared_memory import SharedMemory

    name = f"test-pf-{os.getpid()}"
    pageferry.migrate(f"image:{image}", f"shm:{name}")
    try:
        segment = SharedMemory(name)
        resource_tracker.unregister(segment._name, "shared_memory")
        assert bytes(segment.buf) == image.read_bytes()
        segment.close()
        back = image.parent / "back.mem"
        pageferry.migrate(f"shm:{name}", f"image:{back}")
        assert same_file(image, back)
    finally:
        os.unlink(f"/dev/shm/{name}")


def test_command_line_says_what_it_did(image, tmp_path):
    done = run("copy", f"image:{image}", f"image:{tmp_path / 'o'}", "--verify")
    assert done.returncode == 0
    assert "completed, verified" in done.stdout
    assert "round 1" in done.stderr or "completed" in done.stderr


def test_a_core_is_more_than_memory(tmp_path):
    """Into plain memory its headers and notes would be lost: refused, nothing made."""
    core = _core(tmp_path, [pattern(20, 1)])
    name = f"test-pf-{os.getpid()}-core"
    with pytest.raises(pageferry.PageferryError, match="move it to image"):
        pageferry.migrate(f"image:{core}", f"shm:{name}")
    assert not os.path.exists(f"/dev/shm/{name}")


def test_a_core_of_many_segments(tmp_path):
    """Nothing in it may cost the square of their number."""
    core = _core(tmp_path, [bytes([n % 255 + 1]) * 100 for n in range(3000)])
    out = tmp_path / "out.core"
    pageferry.migrate(f"image:{core}", f"image:{out}", verify=True)
    assert same_file(core, out)


def test_images_are_verified_unless_that_is_not_wanted(image, tmp_path):
    """By default; and a sum of each page costs no second reading of the source."""
    out = tmp_path / "out"
    report = pageferry.migrate(f"image:{image}", f"image:{out}")
    assert report["verified"] == ["page-sums"]
    assert "verified" not in pageferry.migrate(f"image:{image}", f"image:{out}", verify=False)
    assert "verified" not in json.loads(
        run("copy", f"image:{image}", f"image:{out}", "--no-verify", "--json").stdout
    )


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_what_nobody_sent_is_found(tmp_path, codec):
    """Somebody writes the destination meanwhile, where the source has a hole."""
    source, out = tmp_path / "source", tmp_path / "out"
    with open(source, "wb") as f:
        f.write(pattern(100))
        f.truncate(400 * PAGE)

    def spoil(name, data):
        if name == "MIGRATION_PASS":
            with open(out, "r+b") as f:
                f.seek(300 * PAGE)
                f.write(b"x")

    def on_started(migration):
        migration.on_event = spoil

    out.write_bytes(b"x" * (400 * PAGE))
    with pytest.raises(VerificationFailed, match="ram"):
        pageferry.migrate(f"image:{source}", f"ram:{out}", codec=codec, on_started=on_started)
