"""What is in a saved migration: each kind of file, whole, cut off and made up."""

import io
import json
import os

import pytest
from fuzz_states import (
    _DEVICE,
    PAGE,
    TOOL,
    TOOL_STATE,
    qemu_stream,
    qemu_streams,
    record,
    stream,
)

from pageferry.pipeline.device_state import compose
from pageferry.pipeline.inspecting import inspect_saved
from pageferry.pipeline.qemu_stream import read_stream
from pageferry.transport.errors import SourceError
from pageferry.transport.vmstate import FLOAT64, Description, Field, Section, save
from pageferry.workers.guests.states import QEMU, state_of


class Given:
    """An object of these attributes."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


# ---- QEMU's ---------------------------------------------------------------------------------


def test_a_stream_of_qemus():
    found = read_stream(io.BytesIO(qemu_stream()))
    assert found["configuration"] == {"machine": "q35"}
    assert found["blocks"] == [
        {"name": "pc.ram", "size": 16 * PAGE, "pages": {"total": 16, "normal": 2, "duplicate": 1}},
        {"name": "vga.vram", "size": 4 * PAGE, "pages": {"total": 4, "duplicate": 1}},
    ]
    assert found["commands"] == [{"command": "open-return-path", "size": 0}]
    assert found["sections"] == {
        "ram (2)": {"instance-id": 0, "version": 4},
        "0000:00:02.0/dev (9)": {"instance-id": 0, "version": 2, "fields": {
            "on": True, "irq": -2, "regs": [1, 2, 0xFFFF], "mixed": [7, 8],
            "bus": {"timer": 1 << 40, "bus/extra": {"le": 0x7FFFFFFF}}, "tmp": b"tmp",
        }},
    }  # fmt: skip


def test_memory_that_is_left_out_and_pages_that_are_packed():
    _, shared, packed = qemu_streams()
    found = read_stream(io.BytesIO(shared))
    assert found["configuration"] == {"machine": "q35", "capabilities": ["x-ignore-shared"]}
    assert [block["address"] for block in found["blocks"]] == [0xC0000] * 2
    found = read_stream(io.BytesIO(packed))
    assert found["blocks"][0]["pages"] == {
        "total": 16, "normal": 2, "duplicate": 1, "xbzrle": 1, "compressed": 1,
    }  # fmt: skip


def test_cut_off_anywhere():
    """Without its end nobody knows what its devices are."""
    for whole in qemu_streams():
        for end in [*range(0, 300), *range(300, len(whole), 97), len(whole) - 1]:
            with pytest.raises(SourceError, match="QEMU stream: "):
                read_stream(io.BytesIO(whole[:end]))
        with pytest.raises(SourceError):
            read_stream(io.BytesIO(whole + b"more"))


def device(**changes):
    return qemu_stream(device=_DEVICE | changes)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (device(fields=[{"name": "x", "type": "buffer", "size": 1 << 60}]),
         "is truncated: .* in section '0000:00:02.0/dev'"),
        (device(fields=[{"name": "x", "type": "buffer", "size": -1}]), "is truncated"),
        (device(fields=[{"name": "x", "size": 0, "array_len": 1 << 60}]), "more than .* values"),
        (device(fields=[{"name": "x", "size": 3}]), "its end is missing in section"),
        (device(name="other"), "section '0000:00:02.0/dev' .9.*is not described|not described"),
        (device(subsections=[{"vmsd_name": "dev/s"}]), "another one is there.*subsection 'dev/s'"),
        (device(fields="x"), "makes no sense"),
        (qemu_stream(more=(0x400).to_bytes(8, "big")), "RAM flags 0x400"),
        (qemu_stream(more=(20 * PAGE | 0x22).to_bytes(8, "big") + b"\0"), "of no RAM block"),
        (qemu_stream(more=(0x02).to_bytes(8, "big") + b"\4nope\0"), "'nope', which there is not"),
        (qemu_stream(more=(0x2A).to_bytes(8, "big")), "two ways"),
        (qemu_stream().replace(b'"page_size": 4096', b'"page_size": 4095'), "pages of 4095 bytes"),
        (qemu_stream().replace(b"\x7e\0\0\0\x09", b"\x7e\0\0\0\x08"), "it ends as section 8"),
        (qemu_stream().replace(b"QEVM\0\0\0\3", b"QEVM\0\0\0\2"), "none of version 3"),
    ],
)  # fmt: skip
def test_streams_that_mislead(data, why):
    with pytest.raises(SourceError, match=why):
        read_stream(io.BytesIO(data))


def test_nesting_without_end():
    inner = {"name": "x", "struct": {"fields": []}}
    for _ in range(40):
        inner = {"name": "x", "struct": {"fields": [inner]}}
    with pytest.raises(SourceError, match="nested too deep"):
        read_stream(io.BytesIO(device(fields=[inner])))
    said = b'{"page_size":4096,"devices":' + b"[" * 50_000
    data = b"QEVM\0\0\0\3\0\6" + len(said).to_bytes(4, "big") + said
    with pytest.raises(SourceError, match="makes no sense"):
        read_stream(io.BytesIO(data))


# ---- files -----------------------------------------------------------------------------------


def shown(path, data, **how):
    path.write_bytes(data)
    found = inspect_saved(str(path), **how)
    json.dumps(found, allow_nan=False)
    return found


def test_a_device_state(tmp_path):
    state = Section(TOOL, TOOL_STATE, 2)
    found = shown(tmp_path / "state", compose(b"", "paused", [state]))
    assert found["format"] == "device-state"
    assert found["sections"]["globalstate (0)"]["fields"] == {"runstate": "paused"}
    assert found["sections"]["tool (2)"] == {"version": 3, "size": 50, "fields": {
        "flags": [True, False], "parts": [{"a": 1, "b": "x"}, {"a": 2, "b": ""}],
        "by": [[1, 2], [3, None]], "raw": b"raw".hex(), "more": 9, "tool/sub": {"c": 700},
    }}  # fmt: skip
    odd = Section(Description("odd", fields=(Field("x", FLOAT64),)), Given(x=float("nan")))
    assert shown(tmp_path / "odd", save([odd]))["sections"]["odd (0)"]["fields"] == {"x": "nan"}


def test_qemus_devices_in_a_device_state(tmp_path):
    """Seen through."""
    state = state_of(QEMU, Given(stream=qemu_stream(shared=True)))
    found = shown(tmp_path / "state", state)["sections"]["qemu (0)"]["fields"]["stream"]
    assert found["format"] == "qemu-stream"
    assert found["sections"]["0000:00:02.0/dev (9)"]["fields"]["irq"] == -2


def test_what_is_long_is_shortened(tmp_path):
    fields = [{"name": "rom", "type": "buffer", "size": 100},
              {"name": "regs", "type": "uint8", "size": 1, "array_len": 100}]  # fmt: skip
    whole = qemu_stream(device=_DEVICE | {"fields": fields})
    begin = whole.index(b"\1\xff\xff\xff\xfe")
    end = whole.index(b"\x7e\0\0\0\x09")
    whole = whole[:begin] + bytes(range(200)) + whole[end:]
    short = shown(tmp_path / "x", whole)["sections"]["0000:00:02.0/dev (9)"]["fields"]
    assert short["rom"] == {"bytes": 100, "xxh3": short["rom"]["xxh3"]}
    assert short["regs"] == {"elements": 100, "first": list(range(100, 108))}
    full = inspect_saved(str(tmp_path / "x"), full=True)["sections"]["0000:00:02.0/dev (9)"]
    assert full["fields"] == {"rom": bytes(range(100)).hex(), "regs": list(range(100, 200))}


def test_an_image(tmp_path):
    path = tmp_path / "vm.mem"
    with path.open("wb") as file:
        file.truncate(10 * PAGE + 100)
        os.pwrite(file.fileno(), b"x" * PAGE, 3 * PAGE)
    assert inspect_saved(f"image:{path}") == {
        "file": str(path), "format": "image", "size": 10 * PAGE + 100,
        "blocks": [{"name": "ram", "size": 10 * PAGE + 100, "offset": 0,
                    "pages": {"total": 11, "data": 1, "holes": 10}}],
    }  # fmt: skip


def test_standard_input():
    """Of a pipe nothing can be looked at twice."""
    read, write = os.pipe()
    os.write(write, qemu_stream())
    os.close(write)
    with os.fdopen(read, "rb") as stdin:
        found = inspect_saved("-", stdin)
    assert (found["file"], found["format"]) == ("-", "qemu-stream")


def test_a_directory(tmp_path):
    """Images that are whole, what has arrived of others, and what cannot be read."""
    (tmp_path / "a.mem").write_bytes(b"x" * PAGE)
    (tmp_path / "b.state").write_bytes(compose(b"", "none", []))
    (tmp_path / "c.state").write_bytes(compose(b"", "none", [])[:-1])
    (tmp_path / ".d.mem.pageferry-part").write_bytes(b"x" * PAGE)
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "below").mkdir()
    found = inspect_saved(str(tmp_path))
    assert [file["file"] for file in found["files"]] == ["a.mem", "b.state", "c.state"]
    assert found["files"][0]["format"] == "image"
    assert found["files"][1]["sections"] == ["globalstate (0)"]
    assert "c.state: device state: " in found["files"][2]["error"]
    assert [(p["name"], p["size"]) for p in found["incomplete"]] == [("d.mem", PAGE)]


def test_what_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for name, why in (("nothing", "No such file"), ("fifo", "no regular file"), ("empty", "empty")):
        with pytest.raises(SourceError, match=why):
            inspect_saved(str(tmp_path / name))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (compose(b"", "none", [])[:-5], "behind section 'globalstate' it ends"),
        (stream(record("tool", b"", b"{}")), "section 'tool': describes itself"),
        (stream(record("tool", b"\1", TOOL.layout(), version=3)), "'tool' field 'flags.1.': ends"),
        (state_of(QEMU, Given(stream=qemu_stream()[:-1])), "QEMU stream: does not end"),
        (b"\x7fELF" + bytes(12) + b"\4\0", "damaged"),
    ],
)  # fmt: skip
def test_what_is_damaged(tmp_path, data, why):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"{path}: .*{why}|{path} .*{why}"):
        inspect_saved(str(path))
