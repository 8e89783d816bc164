"""file:PATH, a snapshot, as a source: whatever the guest was when it was taken.

It is static memory, as an image is, with the kind and the device state of that guest: so
everything that moves a guest restores a snapshot (copy, send, serve, postcopy). Made by `pageferry
snapshot`.
"""

from __future__ import annotations

from ..ram import RamBlock
from ..snapshot_file import CheckedBlock, open_snapshot
from .base import SourceGuest
from .uri import GuestUri


class SnapshotSource(SourceGuest):
    """A guest that was saved. It stands still by nature."""

    can_stop = True

    def __init__(self, uri: GuestUri) -> None:
        self._file, self._index = open_snapshot(uri.rest)
        self.kind = self._index.kind
        self.running = self._index.running
        self.image_size = self._index.image_size
        self._checked = [CheckedBlock(stored, self._file) for stored in self._index.blocks]
        self.blocks = list[RamBlock](self._checked)

    def read_by_its_receiver(self) -> list[CheckedBlock]:
        """From now on pages are only named to who receives them: it is on this host, and reads
        these blocks itself."""
        for block in self._checked:
            block.here = True
        return self._checked

    def save_state(self) -> bytes:
        return self._index.state

    def close(self) -> None:
        self._file.close()
