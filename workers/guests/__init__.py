"""What can be migrated. One protocol (base.py); a new kind of guest is a file here and a row
in `open_source` / `open_destination`.
"""

from __future__ import annotations

from ...transport.errors import UsageError
from ..content import ContentIndex
from .base import DestinationGuest, SourceGuest
from .uri import GuestUri, parse_guest

__all__ = [
    "DestinationGuest",
    "GuestUri",
    "SourceGuest",
    "check_destination",
    "is_directory",
    "needs_process",
    "open_destination",
    "open_source",
    "parse_guest",
    "start_qemu",
]  # fmt: skip


def open_source(uri: GuestUri) -> SourceGuest:
    """The guest at `uri`, ready to be read. May start a process (demo) and take a while."""
    if uri.kind == "image":
        from .image import ImageSource

        return ImageSource(uri)
    if uri.kind == "file":
        from .snapshot import SnapshotSource

        return SnapshotSource(uri)
    if uri.kind == "demo":
        from .demo import DemoSource

        return DemoSource(uri)
    if uri.kind == "qemu":
        from .qemu import QemuSource

        return QemuSource(uri)
    if uri.kind == "pid":
        from .process import ProcessSource

        return ProcessSource(uri)
    from .shared_memory import RamSource

    return RamSource(uri)


def open_destination(uri: GuestUri, index: ContentIndex | None = None) -> DestinationGuest:
    """A guest at `uri` that nothing has been done for yet: `lay_out` does. `index`: for
    directories, what their images hold."""
    check_destination(uri)
    if is_directory(uri):
        from .image_directory import DirectoryDestination

        return DirectoryDestination(uri, index)
    if uri.kind == "image":
        from .image import ImageDestination

        return ImageDestination(uri)
    if uri.kind == "demo":
        from .demo import DemoDestination

        return DemoDestination(uri)
    if uri.kind == "qemu":
        from .qemu import QemuDestination

        return QemuDestination(uri)
    from .shared_memory import RamDestination

    return RamDestination(uri)


def check_destination(uri: GuestUri) -> None:
    """UsageError for what is a source only."""
    if uri.kind == "file":
        raise UsageError(
            f"{uri} is a source: a snapshot is made by `pageferry snapshot SOURCE {uri}`, at the "
            f"guest's host"
        )
    if uri.kind == "pid":
        raise UsageError("pid: is a source: memory arrives as ram:PATH, shm:NAME or image:PATH")


def is_directory(uri: GuestUri) -> bool:
    """image:DIR/ takes many images, each by its name."""
    return uri.kind == "image" and uri.rest.endswith("/")


def needs_process(uri: GuestUri) -> bool:
    """The source at `uri` is memory of a process that runs already."""
    return uri.kind in ("qemu", "pid") or "pid" in uri.options


def start_qemu(command: str) -> DestinationGuest:
    """A VM in a QEMU that `command` starts when a VM is announced."""
    from .qemu_process import StartedQemu

    return StartedQemu(command)
