"""A guest whose memory is armed: a mapping of this process. A touch sleeps without the
interpreter's lock, so that whoever serves it may be in this process as well."""

import mmap
import os
import threading

import numpy as np

from pageferry.transport.messages import Block
from pageferry.transport.pages import PAGE_SIZE
from pageferry.workers.guests.base import ArmedMemory, Region
from pageferry.workers.kernel import userfaultfd
from pageferry.workers.kernel.libc import store_byte
from pageferry.workers.placing import address_of
from pageferry.workers.ram import RamBlock, RamFile


class ArmedGuest:
    """`parts`: pages of each region. They are apart in the address space, in order in block 0, and
    all missing."""

    def __init__(self, parts, page_size=PAGE_SIZE, flags=0):
        self.uffd = userfaultfd.create_missing()  # first: it may be what this host lacks
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | flags)
        self.pages = sum(parts)
        os.ftruncate(fd, self.pages * PAGE_SIZE)
        self.file = RamFile(fd, "guest")
        self.block = RamBlock(Block("ram", self.pages * PAGE_SIZE, page_size), self.file, 0)
        self.maps, self.memory, self._threads = [], ArmedMemory(self.uffd, []), []
        first = 0
        for pages in parts:
            self.maps.append(mmap.mmap(fd, pages * PAGE_SIZE, offset=first * PAGE_SIZE))
            region = Region(0, first, pages, address_of(self.maps[-1]), page_size)
            userfaultfd.register_missing(self.uffd, region.address, pages * PAGE_SIZE)
            self.memory.regions.append(region)
            first += pages

    def touch(self, page):
        """A thread that writes 0xFF to the second byte of a page, and sleeps until it can."""
        (region,) = [r for r in self.memory.regions if r.first <= page < r.first + r.pages]
        address = region.address + (page - region.first) * PAGE_SIZE + 1
        thread = threading.Thread(target=store_byte, args=(address, 0xFF))
        self._threads.append(thread)
        thread.start()
        return thread

    def page(self, page):
        """What is in the file: never sleeps."""
        return os.pread(self.file.fd, PAGE_SIZE, page * PAGE_SIZE)

    def there(self):
        """Pages that are in memory, as the kernel says."""
        starts, counts = self.block.data_runs()
        return [p for s, n in zip(starts, counts, strict=True) for p in range(s, s + n)]

    def close(self):
        """Wake whoever still sleeps, and let go."""
        for region in self.memory.regions:
            userfaultfd.unregister(self.uffd, region.address, region.pages * PAGE_SIZE)
        for thread in self._threads:
            thread.join()
        self.memory.close()
        for part in (*self.maps, self.file):
            part.close()


def touched(content):
    """`content` after `touch`."""
    return content[:1] + b"\xff" + content[2:]


def all_pages(count):
    return np.array([0]), np.array([count])
