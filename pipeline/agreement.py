"""What the destination checks in a Hello before anything happens. Pure.

Every field that does not fit is named: the operator at the other end reads it.
"""

from __future__ import annotations

import uuid

from .._version import __version__
from ..transport.curve import is_key
from ..transport.errors import PeerRefused
from ..transport.messages import (
    DIRECT,
    MAX_BLOCK_SIZE,
    MAX_BLOCKS,
    MAX_SAMPLE,
    MAX_WORKERS,
    PAGE_SUMS,
    POSTCOPY,
    PROTOCOL,
    READ_BACK,
    SAMPLE,
    XBZRLE,
    Block,
    Hello,
    Resume,
    printable,
)
from ..transport.pages import PAGE_SIZE
from ..transport.urgent import MAX_HOST_PAGES
from ..transport.wire import MAX_BATCH_PAGES

CAPABILITIES = {POSTCOPY, DIRECT, SAMPLE, PAGE_SUMS, READ_BACK, XBZRLE}
# Characters of what a source says of itself and its blocks: it is logged, shown and kept.
MAX_NAME = 255
# Host pages that can exist: 4 KiB to 1 GiB.
_LARGEST_HOST_PAGE = 1 << 30


def check_hello(hello: Hello, expected_kind: str | None) -> None:
    """PeerRefused with the field that does not match, if one does not."""
    if hello.protocol != PROTOCOL:
        raise _refusal("protocol", hello.protocol, f"{PROTOCOL} (pageferry {__version__})")
    _check_uuids(hello)
    for field, text in (("name", hello.name), ("version", hello.version), ("kind", hello.kind)):
        if len(text) > MAX_NAME:
            raise _refusal(field, f"{len(text)} characters long", f"up to {MAX_NAME}")
    trial = hello.kind == SAMPLE
    if expected_kind is not None and hello.kind != expected_kind and not trial:
        raise _refusal("kind", hello.kind, expected_kind)
    if not 1 <= hello.workers <= MAX_WORKERS:
        raise _refusal("workers", hello.workers, f"1 to {MAX_WORKERS}")
    if not 1 <= hello.batch_pages <= MAX_BATCH_PAGES:
        raise _refusal("batch-pages", hello.batch_pages, f"1 to {MAX_BATCH_PAGES}")
    if unknown := sorted(set(hello.capabilities) - CAPABILITIES):
        raise _refusal("capabilities", ", ".join(unknown)[:200], ", ".join(sorted(CAPABILITIES)))
    _check_blocks(hello.blocks)
    _check_shared(hello)
    if trial or SAMPLE in hello.capabilities:
        _check_trial(hello)
    if POSTCOPY in hello.capabilities:
        if PAGE_SUMS in hello.capabilities:
            raise _refusal("capabilities", f"{POSTCOPY} with {PAGE_SUMS}", "one of them")
        _check_postcopy(hello.blocks)
    if not 0 <= hello.image_size <= MAX_BLOCK_SIZE:
        raise _refusal("image-size", hello.image_size, f"up to {MAX_BLOCK_SIZE}")


def _check_uuids(hello: Hello) -> None:
    """That of the migration; and the guest's own, if it has one: whether that is the right one the
    guest here knows."""
    for field, text in (("uuid", hello.uuid), ("guest-uuid", hello.guest_uuid)):
        if not _is_uuid(text) and (text or field == "uuid"):
            raise _refusal(field, repr(text[:64]), "a uuid")


def check_key(message: Hello | Resume, *, secured: bool) -> None:
    """PeerRefused if its key of the channels is none, or if it wants a channel that has no keys."""
    if not is_key(message.key) if secured else message.key:
        raise _refusal("key", repr(message.key[:64]), "a key" if secured else "none")
    if secured and isinstance(message, Hello) and DIRECT in message.capabilities:
        raise PeerRefused(
            "postcopy-link direct is not encrypted, and keys are wanted here: leave it out",
            field=DIRECT,
        )


def _check_trial(hello: Hello) -> None:
    """A trial run is one altogether, and of no great size: it is memory of this host."""
    if hello.kind != SAMPLE or hello.capabilities != [SAMPLE]:
        raise _refusal("kind", hello.kind, f"{SAMPLE} with the capability {SAMPLE} alone")
    end = max([hello.image_size, *(block.offset + block.size for block in hello.blocks)])
    if end > MAX_SAMPLE:
        raise _refusal("image-size", end, f"up to {MAX_SAMPLE} in a trial run")


def _check_postcopy(blocks: list[Block]) -> None:
    """Memory that is installed host page by host page consists of whole ones."""
    for block in blocks:
        where = f"block {block.name[:64]!r}"
        if block.size % block.page_size:
            raise _refusal(f"{where} size", block.size, f"a multiple of {block.page_size}")
        if block.page_size > MAX_HOST_PAGES * PAGE_SIZE:
            raise _refusal(f"{where} page-size", block.page_size, "up to 2 MiB in postcopy")


def _is_uuid(text: str) -> bool:
    """Only as we write them: UUID() takes line ends and underscores, and names are made of it."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _check_blocks(blocks: list[Block]) -> None:
    if not 1 <= len(blocks) <= MAX_BLOCKS:
        raise _refusal("blocks", len(blocks), f"1 to {MAX_BLOCKS} blocks")
    end = 0
    names = set()
    for block in blocks:
        where = f"block {block.name[:64]!r}"
        if block.name in names:
            raise _refusal(where, "announced twice", "one of a name")
        names.add(block.name)
        if not 1 <= block.size <= MAX_BLOCK_SIZE:
            raise _refusal(f"{where} size", block.size, f"1 to {MAX_BLOCK_SIZE}")
        page = block.page_size
        if page % PAGE_SIZE or page & (page - 1) or not PAGE_SIZE <= page <= _LARGEST_HOST_PAGE:
            raise _refusal(f"{where} page-size", page, "a power of two from 4096")
        if not end <= block.offset <= MAX_BLOCK_SIZE:
            raise _refusal(f"{where} offset", block.offset, f"at least {end} (no overlap)")
        end = block.offset + block.size
        if len(block.name) > MAX_NAME or not block.name.isprintable():
            raise _refusal(where, "of no name that can be shown", f"up to {MAX_NAME} characters")


def _check_shared(hello: Hello) -> None:
    """Blocks that do not travel: a VM's, of other names than those that do."""
    if hello.shared and hello.kind != "qemu":
        raise _refusal("shared", f"there with a {hello.kind}: guest", "none but of a VM (qemu:)")
    if len(hello.shared) > MAX_BLOCKS:
        raise _refusal("shared", len(hello.shared), f"up to {MAX_BLOCKS} blocks")
    names = {block.name for block in hello.blocks}
    for block in hello.shared:
        where = f"shared block {block.name[:64]!r}"
        if block.name in names or len(block.name) > MAX_NAME or not block.name.isprintable():
            raise _refusal(where, "announced twice, or of no name", "one of a name")
        names.add(block.name)
        if not 1 <= block.size <= MAX_BLOCK_SIZE:
            raise _refusal(f"{where} size", block.size, f"1 to {MAX_BLOCK_SIZE}")


def _refusal(field: str, got: object, expected: str) -> PeerRefused:
    return PeerRefused(
        f"the destination refuses: {field} is {printable(str(got))}, it takes {expected}",
        field=field,
    )
