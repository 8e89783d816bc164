"""`pageferry inspect` on what a QEMU has saved, and on what pageferry carries of one."""

import io
import json
import subprocess

import pytest
from helpers import pageferry as run
from qemu_vm import MIB, Vm, require_qemu

from pageferry.pipeline.inspecting import inspect_saved
from pageferry.pipeline.qemu_stream import read_stream
from pageferry.tools.bench.boot_guest import rom_image
from pageferry.transport.errors import SourceError
from pageferry.workers.guests.qemu import QemuSource
from pageferry.workers.guests.uri import GuestUri


@pytest.fixture
def machine(tmp_path):
    require_qemu()
    with Vm("saved", memory=64 * MIB, bios=rom_image(tmp_path / "rom", delay=2000)) as vm:
        yield vm


def test_what_qemu_saved(machine, tmp_path):
    """Every block, every device, no byte unaccounted for; and wherever it is cut off, an error."""
    path = tmp_path / "vm.stream"
    machine.qmp("stop")
    machine.qmp("migrate", uri=f"exec:cat>{path}")
    machine.wait_for_migration()
    shown = run("inspect", path)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["configuration"]["machine"].startswith("pc-q35")
    blocks = {block["name"]: block for block in found["blocks"]}
    assert blocks["ram0"]["size"] == 64 * MIB
    for block in found["blocks"]:  # it stood still: each page once
        pages = dict(block["pages"])
        assert pages.pop("total") == sum(pages.values()) == block["size"] // 4096
    said = {line.split()[0] for line in machine.hmp("info ramblock").splitlines()[1:]}
    assert set(blocks) == said
    devices = found["sections"]
    cpu = next(d["fields"] for name, d in devices.items() if name.startswith("cpu ("))
    assert cpu["env.eip"] > 0
    assert any(name.startswith("globalstate (") for name in devices)
    with path.open("rb") as file:
        piped = subprocess.run(
            ["cat"], stdin=file, stdout=subprocess.PIPE, check=True, timeout=60
        ).stdout
    again = inspect_saved("-", io.BytesIO(piped))
    assert again | {"file": str(path)} == found
    _cut_off(piped)


def _cut_off(whole):
    """Hostile: with the description put behind whatever is left, too."""
    begin = whole.rindex(b"\0\6")
    description = whole[begin:]
    step = len(whole) // 12
    for end in [*range(0, len(whole), step), begin - 1, begin - 5, begin - 6, len(whole) - 1]:
        for data in (whole[:end], whole[: min(end, begin - 1)] + description):
            with pytest.raises(SourceError, match="QEMU stream: "):
                read_stream(io.BytesIO(data))


def test_what_pageferry_carries_of_a_vm(machine, tmp_path):
    """Its devices, in a section, without the memory that travels beside them."""
    source = QemuSource(GuestUri("qemu", machine.qmp_path))
    try:
        source.stop()
        state = source.save_state()
        source.resume()
    finally:
        source.close()
    (tmp_path / "state").write_bytes(state)
    found = inspect_saved(str(tmp_path / "state"))["sections"]["qemu (0)"]["fields"]["stream"]
    assert found["configuration"]["capabilities"] == ["x-ignore-shared"]
    pages = {block["name"]: block["pages"] for block in found["blocks"]}
    assert pages["ram0"] == {"total": 64 * MIB // 4096}
    screen = pages["0000:00:01.0/vga.vram"]
    assert screen == {"total": 4096, "duplicate": 4096}
    assert len(found["sections"]) > 20
