"""Whether memory may be on transparent huge pages, and what this kernel says of those."""

import contextlib
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import PAGE
from huge_tmpfs import HUGE, tmpfs

from pageferry.transport.errors import HostLacks
from pageferry.transport.pages import pages_of
from pageferry.workers.kernel import userfaultfd
from pageferry.workers.kernel.huge import may_be_huge, reports_what_is_gone
from pageferry.workers.kernel.libc import punch_hole
from pageferry.workers.kernel.pagemap import PagemapScanner

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
SIZE = 2 * HUGE


def by_default():
    """Whether the kernel is set to use them where nobody asked for them."""
    files = [SETTINGS / "shmem_enabled", *SETTINGS.glob("hugepages-*/shmem_enabled")]
    chosen = [re.search(r"\[(\w+)\]", file.read_text())[1] for file in files if file.exists()]
    return not set(chosen) <= {"never", "deny", "inherit"}


@contextlib.contextmanager
def opened(path):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("huge", ["always", "within_size", "advise"])
def test_a_file_system_that_was_mounted_so(tmp_path, huge):
    with tmpfs(tmp_path / "m", huge) as folder, opened(folder / "ram") as fd:
        assert may_be_huge(fd)


def test_a_file_system_that_was_mounted_otherwise(tmp_path):
    with tmpfs(tmp_path / "m", "never") as folder, opened(folder / "ram") as fd:
        assert may_be_huge(fd) == by_default()


def test_shared_memory_of_this_host():
    """Nobody mounted it for huge pages, or it is not mounted at all: then the kernel is asked."""
    mounted_so = any(
        "huge=" in line and "huge=never" not in line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == "/dev/shm"
    )
    name = f"/dev/shm/pageferry-{os.getpid()}-huge"
    try:
        with opened(name) as fd:
            assert may_be_huge(fd) == (mounted_so or by_default())
    finally:
        os.unlink(name)
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        assert may_be_huge(fd) == by_default()
    finally:
        os.close(fd)


@pytest.fixture
def reports():
    try:
        return reports_what_is_gone()
    except HostLacks as e:
        pytest.skip(str(e))


def test_the_kernel_is_asked_and_left_as_it_was(reports):
    assert isinstance(reports, bool)
    assert reports_what_is_gone() == reports


def test_what_was_written_to_a_huge_page_that_is_split(tmp_path, reports):
    """It is found, if the kernel says that it reports what is gone."""
    with (
        tmpfs(tmp_path / "m") as folder,
        opened(folder / "ram") as fd,
        on_huge_pages(fd) as (memory, address),
        tracked(address) as written,
    ):
        assert len(written()) == SIZE // PAGE
        assert not len(written())
        for page in (3, 5, HUGE // PAGE + 7):
            memory[page * PAGE] = 2
        for begin in (0, HUGE):
            punch_hole(fd, begin + 100 * PAGE, PAGE)
        found = set(written().tolist())
        if not reports:
            pytest.skip("this kernel loses it: such memory is not tracked by it")
        assert {3, 5, HUGE // PAGE + 7} <= found


@contextlib.contextmanager
def on_huge_pages(fd):
    """All of a file of this size, written, and mapped by huge pages; and its address."""
    os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        flat = np.frombuffer(memory, np.uint8)
        flat[::PAGE] = 1
        address = flat.ctypes.data
        if f"{SIZE >> 10} kB" not in how_mapped(address):
            del flat
            pytest.skip("the kernel has no huge pages to give")
        del flat
        yield memory, address


def how_mapped(address):
    """Of the mapping at an address, how much is on huge pages."""
    smaps = Path("/proc/self/smaps").read_text()
    (mapping,) = re.findall(rf"^{address:x}-.*?^ShmemPmdMapped:(.*?)$", smaps, re.M | re.S)
    return mapping


@contextlib.contextmanager
def tracked(address):
    """A function that says which pages were written since it was asked last."""
    uffd = userfaultfd.create_tracking()
    scanner = PagemapScanner(os.getpid())
    try:
        userfaultfd.register_write_protect(uffd, address, SIZE)
        yield lambda: pages_of(scanner.collect(address, SIZE, complete=True))
    finally:
        scanner.close()
        os.close(uffd)
