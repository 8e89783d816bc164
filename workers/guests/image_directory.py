"""image:DIR/, a directory that takes many images, each under the name that its source says.

What has arrived of an image stays in a hidden file beside its name until it is whole, across
failures and crashes at either end: the next attempt sends only what differs (by digests of 1 MiB).
An image of that name that is there already serves as well. And pages that another image here has
are copied from there (content.py): a clone costs what is different in it.
"""

from __future__ import annotations

import os
import re

import numpy as np

from ...transport.errors import DestinationError, PeerRefused
from ...transport.messages import Hello
from ...transport.pages import PAGE_SIZE, Bytes8, Pages
from ..content import (
    MOST_PAGES,
    ContentIndex,
    equal_digests,
    page_digests,
    sure_digests,
    take_digests,
)
from ..digest import chunk_digests
from ..ram import RamBlock, RamFile
from .base import layout_size
from .files import PartialFile
from .image import ImageDestination
from .uri import GuestUri

# Bytes of an image that are compared by digests of 1 MiB, of which these make 64 MiB. What a source
# announces may be larger, and cost it nothing; all of that is sent.
MOST_COMPARED = 4 << 40
# As the peer chooses it: no path, nothing hidden, nothing that a terminal or a shell acts on.
IMAGE_NAME = re.compile(r"[\w][\w.+@=,-]{0,149}")


class DirectoryDestination(ImageDestination):
    """One image that is to arrive in a directory."""

    compares = True

    def __init__(self, uri: GuestUri, index: ContentIndex | None = None) -> None:
        """`index`: what others that came here hold."""
        super().__init__(uri)
        self._directory = uri.rest
        self._index = index if index is not None else ContentIndex()
        self._contents: dict[int, list[tuple[Pages, bytes]]] = {}
        self._given_up = False

    def lay_out(self, hello: Hello) -> None:
        if not IMAGE_NAME.fullmatch(hello.name):
            raise PeerRefused(
                f"{hello.name[:64]!r} is no name for an image (letters, digits, . _ + @ = , - and "
                f"no path): send it with --name",
                field="name",
            )
        if not os.path.isdir(self._directory):
            raise DestinationError(f"{self._directory} is no directory: make it")
        self._path = os.path.join(self._directory, hello.name)
        self._size = layout_size(hello.blocks, hello.image_size)
        partial = PartialFile(self._path, self._size, lambda: self._given_up)
        self._new = partial
        self._file = RamFile(os.dup(partial.fd), self._path)
        self.blocks = [RamBlock(spec, self._file, spec.offset) for spec in hello.blocks]
        self.fresh = [not partial.begun] * len(hello.blocks)
        if partial.begun and sum(block.size for block in self.blocks) <= MOST_COMPARED:
            self.have = [chunk_digests(block) for block in self.blocks]

    def may_hold(self, block: int, pages: Pages, digests: bytes) -> Bytes8:
        """Where they are already (a chunk that came in part differs as a whole), or elsewhere."""
        self._contents.setdefault(block, []).append((pages, digests))
        found = self._index.knows(digests)
        if not self.fresh[block]:
            found |= equal_digests(digests, page_digests(self.blocks[block], pages))
        return found

    def held(self, block: int, pages: Pages, digests: bytes, sure: bytes) -> Bytes8:
        have = np.zeros(len(pages), np.uint8)
        if not self.fresh[block]:
            have = equal_digests(sure, sure_digests(self.blocks[block], pages))
        left = np.flatnonzero(have == 0)
        have[left] = self._index.fetch(
            self.blocks[block], pages[left], take_digests(digests, left), take_digests(sure, left)
        )
        return have

    def hurry(self) -> None:
        """Nothing is copied or read any more."""
        self._given_up = True
        for block in getattr(self, "blocks", ()):
            block.file.given_up = True

    def load_state(self, kind: str, state: bytes, running: bool) -> None:
        super().load_state(kind, state, running)
        if kind == "image":  # a live guest stands still just now, and waits for this
            for block in range(len(self.blocks)):
                self._know_the_rest(block)

    def _know_the_rest(self, index: int) -> None:
        """What nobody asked for (it had arrived before, or the source did not ask) is of use to
        others as well."""
        block = self.blocks[index]
        parts = self._contents.setdefault(index, [])
        starts, counts = block.data_runs()
        unknown = np.zeros(block.size // PAGE_SIZE, np.uint8)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            unknown[start : start + count] = 1
        for pages, _ in parts:
            unknown[pages] = 0
        rest = np.flatnonzero(unknown)[:MOST_PAGES]
        parts.append((rest, page_digests(block, rest)))

    def run(self) -> str:
        where = super().run()
        for index, parts in self._contents.items():
            pages = np.concatenate([pages for pages, _ in parts])
            digests = b"".join(digests for _, digests in parts)
            self._index.add(self._path, self.blocks[index].start, pages, digests)
        return where
