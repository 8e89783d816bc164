"""VMs whose memory is on transparent huge pages, as a tmpfs may be mounted: holes that are punched
there may stay, as zeros, and what was written to a huge page that is split must be found."""

import contextlib
import os

import numpy as np
import pytest
from helpers import PAGE
from huge_tmpfs import HUGE, tmpfs
from qemu_vm import MIB, Vm, require_qemu

import pageferry
from pageferry.tools.bench.boot_guest import IN_ORDER, BootGuest, rom_image
from pageferry.transport.errors import PageferryError
from pageferry.transport.pages import pages_of, total_pages
from pageferry.workers.guests import qemu_memory
from pageferry.workers.guests.base import TRACKING_HASH, TRACKING_PAGEMAP
from pageferry.workers.guests.qemu import QemuSource
from pageferry.workers.guests.uri import GuestUri
from pageferry.workers.kernel.huge import reports_what_is_gone
from pageferry.workers.kernel.libc import punch_hole
from pageferry.workers.ram import RamBlock

# A guest that writes the first half of each of these huge pages.
LO, HI, SIZE = HUGE, HUGE + MIB, 64 * MIB


@pytest.fixture
def machine(tmp_path):
    """Starts VMs on huge pages whose guest writes [LO, HI); ends them."""
    require_qemu()
    rom = rom_image(tmp_path / "rom", mode=IN_ORDER, lo=LO, hi=HI)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tmpfs(tmp_path / "huge"))

        def start(name, incoming=None):
            vm = Vm(name, memory=SIZE, bios=rom, incoming=incoming, folder=folder)
            stack.enter_context(vm)
            if incoming is None:
                vm.wait_for_serial(b"B")
            return vm

        yield start


def runs_on(vm):
    assert vm.status() == "running"
    with BootGuest(*vm.ram_parts()) as guest:
        guest.advance("passes", 1)
        vm.qmp("stop")
        assert guest.oracle() == []


def memory_of(vm):
    return np.fromfile(vm.ram_files[0], np.uint8).reshape(-1, PAGE)


def expected_tracking():
    return TRACKING_PAGEMAP if reports_what_is_gone() else TRACKING_HASH


def test_it_moves_while_it_runs(machine):
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    report = pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")
    assert report["dirty-tracking"] == expected_tracking()
    runs_on(waiting)


def test_what_is_written_to_a_huge_page_that_is_split_then(machine):
    """A balloon, say, gives a page of it back."""
    vm = machine("vm")
    source = QemuSource(GuestUri("qemu", vm.qmp_path))
    try:
        if source.tracking != TRACKING_PAGEMAP:
            pytest.skip(source.facts()["dirty-tracking-because"])
        vm.qmp("stop")
        source.start_tracking()
        before = memory_of(vm)
        vm.qmp("cont")
        with BootGuest(*vm.ram_parts()) as guest:
            guest.advance("passes", 1)
        vm.qmp("stop")
        with open(vm.ram_files[0], "r+b") as file:
            for address in range(HUGE - PAGE, 3 * HUGE, HUGE):
                punch_hole(file.fileno(), address, PAGE)
        changed = np.flatnonzero((before != memory_of(vm)).any(axis=1))
        assert len(changed) >= (HI - LO) // PAGE
        assert set(changed.tolist()) <= set(pages_of(source.dirty_pages(0)).tolist())
    finally:
        source.close()


def test_a_kernel_that_loses_some_of_it(machine, monkeypatch):
    """Then all is compared, and the result says why."""
    monkeypatch.setattr(qemu_memory, "reports_what_is_gone", lambda: False)
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    report = pageferry.migrate(f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}")
    assert report["dirty-tracking"] == TRACKING_HASH
    assert "transparent huge pages" in report["dirty-tracking-because"]
    runs_on(waiting)


_as_root = pytest.mark.skipif(os.geteuid() != 0, reason="postcopy into qemu: needs root")


@_as_root
def test_by_postcopy(machine):
    """Right, or refused before it runs there, by name; then it runs on here."""
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    try:
        by_postcopy(vm, waiting)
    except PageferryError as e:
        refused(e, vm, waiting)
    else:
        runs_on(waiting)


def by_postcopy(vm, waiting):
    """After a round: most of the memory is there by then, and the guest goes on writing."""
    pageferry.migrate(
        f"qemu:{vm.qmp_path}", f"qemu:{waiting.qmp_path}", postcopy="after=1", downtime_limit=0.001
    )


def refused(error, vm, waiting):
    assert "transparent huge pages" in str(error)
    assert waiting.has_ended() or waiting.status() == "inmigrate"
    runs_on(vm)


@_as_root
def test_by_postcopy_where_pages_stay_when_they_are_given_back(machine, monkeypatch):
    """Somebody (a device, a pipe) has a page of the huge page in use, so it cannot be split: the
    missing pages would be there, as zeros, and what comes would not be taken."""
    vm, waiting = machine("src"), machine("dst", incoming="defer")
    clear, pipe = RamBlock.clear, os.pipe()
    in_use = 0

    def clear_what_is_in_use(block, runs):
        nonlocal in_use
        if not in_use:
            for page in (HUGE // PAGE - 1, 2 * HUGE // PAGE - 1):  # nothing was ever written there
                if total_pages(block.data_runs(page, 1)):
                    in_use += os.splice(
                        block.file.fd, pipe[1], PAGE, offset_src=block.start + page * PAGE
                    )
        clear(block, runs)

    monkeypatch.setattr(RamBlock, "clear", clear_what_is_in_use)
    try:
        by_postcopy(vm, waiting)
    except PageferryError as e:
        assert in_use
        refused(e, vm, waiting)
    else:
        assert not in_use, "it runs there with zeros"  # else the kernel had no huge pages to give
        runs_on(waiting)
    finally:
        for end in pipe:
            os.close(end)
