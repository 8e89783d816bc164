"""What the destination checks in a Hello: every field that does not fit is named."""

import uuid

import msgspec
import pytest

from pageferry.pipeline.agreement import CAPABILITIES, DIRECT, check_hello
from pageferry.transport.errors import PeerRefused
from pageferry.transport.messages import (
    MAX_BLOCK_SIZE,
    MAX_BLOCKS,
    MAX_WORKERS,
    PAGE_SUMS,
    POSTCOPY,
    PROTOCOL,
    Block,
    Hello,
    SharedBlock,
)
from pageferry.transport.wire import MAX_BATCH_PAGES
from pageferry.workers.guests.qemu_memory import check_shared

GOOD = Hello(
    PROTOCOL, "0.1.0", str(uuid.UUID(int=5)), "demo",
    [Block("low", 8192), Block("high", 5000, 4096, 8192)], 2, 128,
)  # fmt: skip


def refusal(hello, expected_kind=None):
    """The field that `check_hello` names and the text it says."""
    with pytest.raises(PeerRefused) as caught:
        check_hello(hello, expected_kind)
    field = caught.value.data["field"]
    assert field in caught.value.message
    return field


def with_blocks(*blocks):
    return msgspec.structs.replace(GOOD, blocks=list(blocks))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"workers": 1},
        {"workers": MAX_WORKERS},
        {"batch_pages": 1},
        {"batch_pages": MAX_BATCH_PAGES},
        {"version": "99.0"},
        {"name": "n" * 255},
        {"image_size": MAX_BLOCK_SIZE},
        {"guest_uuid": str(uuid.UUID(int=7))},
        {"kind": "qemu", "shared": [SharedBlock("pmem", MAX_BLOCK_SIZE, "boot", 1, 2)]},
        {"blocks": [Block("one", 1)]},
        {"blocks": [Block("one", MAX_BLOCK_SIZE)]},
        {"blocks": [Block("far", 4096, 4096, MAX_BLOCK_SIZE)]},
        {"blocks": [Block("huge pages", 1 << 30, 1 << 30)]},
        {"blocks": [Block(str(i), 1, 4096, i) for i in range(MAX_BLOCKS)]},
    ],
    ids=lambda change: ",".join(change) or "nothing",
)
def test_what_fits_is_accepted(change):
    """The bounds themselves as well; another version speaks the same protocol."""
    check_hello(msgspec.structs.replace(GOOD, **change), None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"protocol": PROTOCOL + 1}, "protocol"),
        ({"protocol": 0}, "protocol"),
        ({"uuid": "not-a-uuid"}, "uuid"),
        ({"uuid": ""}, "uuid"),
        ({"uuid": "../../etc/passwd"}, "uuid"),
        ({"uuid": "\n" + "0" * 31}, "uuid"),
        ({"uuid": "0_" * 15 + "00"}, "uuid"),
        ({"uuid": "-" * 300 + "0" * 32}, "uuid"),
        ({"uuid": "{" + str(uuid.UUID(int=5)) + "}"}, "uuid"),
        ({"guest_uuid": "7"}, "guest-uuid"),
        ({"guest_uuid": str(uuid.UUID(int=7)) + "\n"}, "guest-uuid"),
        ({"shared": [SharedBlock("pmem", 4096, "boot", 1, 2)]}, "shared"),
        ({"kind": "qemu", "shared": [SharedBlock("low", 4096, "b", 1, 2)]}, "shared block 'low'"),
        ({"kind": "qemu", "shared": [SharedBlock("x\n", 4096, "b", 1, 2)]}, "shared block 'x\\n'"),
        ({"kind": "qemu", "shared": [SharedBlock("x", 0, "b", 1, 2)]}, "shared block 'x' size"),
        ({"name": "n" * 256}, "name"),
        ({"version": "9" * 256}, "version"),
        ({"kind": "k" * 256}, "kind"),
        ({"workers": 0}, "workers"),
        ({"workers": -1}, "workers"),
        ({"workers": MAX_WORKERS + 1}, "workers"),
        ({"batch_pages": 0}, "batch-pages"),
        ({"batch_pages": MAX_BATCH_PAGES + 1}, "batch-pages"),
        ({"capabilities": ["postcopy"]}, "capabilities"),
        ({"capabilities": [POSTCOPY, DIRECT, "colo"]}, "capabilities"),
        ({"blocks": []}, "blocks"),
        ({"blocks": [Block(str(i), 1, 4096, i) for i in range(MAX_BLOCKS + 1)]}, "blocks"),
        ({"image_size": -1}, "image-size"),
        ({"image_size": MAX_BLOCK_SIZE + 1}, "image-size"),
    ],
)
def test_each_field_that_does_not_fit_is_named(change, field):
    """In the error's data for the peer, and in its text for the operator."""
    assert refusal(msgspec.structs.replace(GOOD, **change)) == field


@pytest.mark.parametrize(
    ("block", "field"),
    [
        (Block("low", 4096, 4096, 8192), "block 'low'"),
        (Block("b", 0, 4096, 8192), "block 'b' size"),
        (Block("b", -4096, 4096, 8192), "block 'b' size"),
        (Block("b", MAX_BLOCK_SIZE + 1, 4096, 8192), "block 'b' size"),
        (Block("b", 4096, 0, 8192), "block 'b' page-size"),
        (Block("b", 4096, -4096, 8192), "block 'b' page-size"),
        (Block("b", 4096, 2048, 8192), "block 'b' page-size"),
        (Block("b", 4096, 3 * 4096, 8192), "block 'b' page-size"),
        (Block("b", 4096, 1 << 31, 8192), "block 'b' page-size"),
        (Block("b", 4096, 4096, 8191), "block 'b' offset"),
        (Block("b", 4096, 4096, 0), "block 'b' offset"),
        (Block("b", 4096, 4096, -1), "block 'b' offset"),
        (Block("b", 4096, 4096, MAX_BLOCK_SIZE + 1), "block 'b' offset"),
    ],
)
def test_each_part_of_a_block_that_does_not_fit_is_named(block, field):
    """By the block's name; overlapping blocks are refused by the second one's offset."""
    assert refusal(with_blocks(Block("low", 8192), block)) == field


# Memory that is installed host page by host page.
WHOLE = [Block("low", 8192), Block("huge", 4 << 20, 2 << 20, 8192)]


@pytest.mark.parametrize("capabilities", [[], [POSTCOPY], [POSTCOPY, DIRECT], [DIRECT, POSTCOPY]])
def test_capabilities_that_are_known(capabilities):
    """In any order, or none."""
    check_hello(msgspec.structs.replace(GOOD, blocks=WHOLE, capabilities=capabilities), None)


def test_a_refusal_names_the_capabilities_on_both_sides():
    """What was asked for and is not known, and what is; the known ones are not complained of."""
    with pytest.raises(PeerRefused) as caught:
        check_hello(msgspec.structs.replace(GOOD, capabilities=["colo", POSTCOPY]), None)
    message = caught.value.message
    assert "capabilities is colo," in message
    assert all(name in message for name in CAPABILITIES)


@pytest.mark.parametrize(
    ("block", "field"),
    [
        (Block("b", 5000), "block 'b' size"),
        (Block("b", (2 << 20) + 4096, 2 << 20), "block 'b' size"),
        (Block("b", 4 << 20, 4 << 20), "block 'b' page-size"),
        (Block("b", 1 << 30, 1 << 30), "block 'b' page-size"),
    ],
)
def test_postcopy_needs_whole_host_pages_that_fit_a_message(block, field):
    """Without postcopy the same block is welcome."""
    hello = with_blocks(block)
    check_hello(hello, None)
    assert refusal(msgspec.structs.replace(hello, capabilities=[POSTCOPY])) == field


def test_a_long_name_does_not_fill_the_screen():
    """64 characters of it are enough to find it."""
    field = refusal(with_blocks(Block("x" * 10_000, 0)))
    assert field == f"block {'x' * 64!r} size"


def test_the_kind_matters_only_if_one_is_expected():
    """A receiver may be there for one kind of guest."""
    check_hello(GOOD, "demo")
    assert refusal(GOOD, "image") == "kind"


@pytest.mark.parametrize("name", ["x" * 256, "ram\x1b[2J", "ram\n", "\u202eram"])
def test_a_name_of_a_block_can_be_shown(name):
    """It is in errors and logs."""
    assert refusal(with_blocks(Block(name, 4096))).startswith("block ")


def test_what_is_refused_can_be_shown():
    with pytest.raises(PeerRefused) as caught:
        check_hello(msgspec.structs.replace(GOOD, capabilities=["\x1b[2J"]), None)
    assert caught.value.message.isprintable()


def test_page_sums_and_postcopy_exclude_each_other():
    hello = msgspec.structs.replace(GOOD, blocks=[Block("ram", 8192)])
    both = msgspec.structs.replace(hello, capabilities=[POSTCOPY, PAGE_SUMS])
    assert refusal(both) == "capabilities"


def test_memory_that_is_left_out_is_the_same_at_both_ends():
    """By its names, however these are written; and on one host by its file."""
    ours = [SharedBlock("a", 4096, "boot", 1, 2), SharedBlock("b", 4096, "boot", 1, 3)]
    check_shared(ours, ours[::-1])
    check_shared(ours, [msgspec.structs.replace(b, host="another", inode=9) for b in ours])
    for theirs in (
        ours[:1],
        [*ours, SharedBlock("c", 4096, "boot", 1, 4)],
        [SharedBlock("a, b", 4096, "boot", 1, 2)],
        [ours[0], msgspec.structs.replace(ours[1], inode=9)],
        [ours[0], msgspec.structs.replace(ours[1], host="another", size=8192)],
    ):
        with pytest.raises(PeerRefused):
            check_shared(ours, theirs)
