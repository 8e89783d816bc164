"""XBZRLE: a page as what differs from the same page sent before. QEMU's encoding, bit for bit.

A page is a series of pairs: so many bytes are as they were, so many are others, and these follow.
Both numbers are unsigned LEB128, of one or two bytes (docs/devel/migration, xbzrle; the C is
migration/xbzrle.c). What is as it was at the end of a page is left out, a page that is as it was
has no bytes, and one that would have more than a page travels whole.

    page = { zero run: uleb128, others: uleb128, those bytes }*

A whole batch at a time with numpy: nothing is done page by page. The decoder looks at nothing
outside of a page's encoding and writes nothing outside of the page, whatever it is given. Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import RemoteProtocolError
from ..pages import PAGE_SIZE, WORDS, Bytes8
from ..wire import Buffer

Words = npt.NDArray[np.uint64]
Lengths = npt.NDArray[np.int64]

# The length of a page that has to travel whole.
OVERFLOW = -1
# A page with fewer other words than this is not looked at whether it is one.
_DENSE = WORDS * 7 // 8
_ONE_BYTE = 0x80  # what is below has one byte
_PAGE_BITS, _WORD_BITS = PAGE_SIZE.bit_length() - 1, WORDS.bit_length() - 1


def encode(old: Words, new: Words) -> tuple[Lengths, Bytes8]:
    """What makes `new` of `old`, both of shape (n, 512): the bytes of each page's encoding or
    OVERFLOW, and the encodings of all that are none, one behind the other."""
    differs = old != new
    over = _certain_overflow(old, new, differs)
    if over.any():
        differs[over] = False
    words = np.flatnonzero(differs)
    lengths = np.zeros(len(new), np.int64)
    data = np.empty(0, np.uint8)
    if len(words):
        others = new.reshape(-1)[words].view(np.uint8).reshape(-1, 8)
        changed = others != old.reshape(-1)[words].view(np.uint8).reshape(-1, 8)
        first, last = _runs(changed, words)
        lengths, data = _assemble(first, last, others, changed, words, len(new))
    lengths[over] = OVERFLOW
    return lengths, data


def _certain_overflow(
    old: Words, new: Words, differs: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Pages written all over, found before anything is done for each of their bytes: an encoding
    has all other bytes and at least two more a run."""
    over: npt.NDArray[np.bool_] = np.count_nonzero(differs, axis=1) >= _DENSE
    if over.any():
        rows = np.flatnonzero(over)
        changed = old[rows].view(np.uint8) != new[rows].view(np.uint8)
        runs = np.count_nonzero(changed[:, 1:] > changed[:, :-1], axis=1) + changed[:, 0]
        over[rows] = np.count_nonzero(changed, axis=1) + 2 * runs > PAGE_SIZE
    return over


def _runs(changed: npt.NDArray[np.bool_], words: Lengths) -> tuple[Lengths, Lengths]:
    """Where runs of other bytes begin and end, in bytes from the first page. `changed`: which bytes
    of `words` are others; all other words have none."""
    joined = (words[1:] == words[:-1] + 1) & (words[1:] & (WORDS - 1) != 0)
    before, after = np.zeros_like(changed), np.zeros_like(changed)
    before[:, 1:], after[:, :-1] = changed[:, :-1], changed[:, 1:]
    before[1:, 0], after[:-1, 7] = changed[:-1, 7] & joined, changed[1:, 0] & joined
    begins, ends = np.flatnonzero(changed & ~before), np.flatnonzero(changed & ~after)
    return words[begins >> 3] * 8 + (begins & 7), words[ends >> 3] * 8 + (ends & 7) + 1


def _assemble(
    first: Lengths, last: Lengths, others: Bytes8, changed: npt.NDArray[np.bool_],
    words: Lengths, pages: int,
) -> tuple[Lengths, Bytes8]:  # fmt: skip
    """Lengths and encodings of `pages` pages whose other bytes are in runs [first, last)."""
    page = first >> _PAGE_BITS
    same = first - np.concatenate(([0], last[:-1]))
    heads = np.concatenate(([True], page[1:] != page[:-1]))
    same[heads] = first[heads] & (PAGE_SIZE - 1)
    other = last - first
    size = 2 + (same >= _ONE_BYTE) + (other >= _ONE_BYTE) + other
    lengths = np.bincount(page, size, pages).astype(np.int64)
    # QEMU wants room for another pair before it looks whether the rest is as it was
    goes_on = np.zeros(pages, np.bool_)
    goes_on[page] = last & (PAGE_SIZE - 1) != 0  # of a page's runs the last one stays
    over = lengths > PAGE_SIZE - 2 * goes_on
    if over.any():
        lengths[over] = OVERFLOW
        keep = ~over[page]
        same, other, size = same[keep], other[keep], size[keep]
        changed = changed & ~over[words >> _WORD_BITS][:, None]
    out = np.empty(int(size.sum()), np.uint8)
    numbers = np.zeros(len(out), np.bool_)
    at = _put(out, numbers, np.cumsum(size) - size, same)
    _put(out, numbers, at, other)
    out[~numbers] = others[changed]
    return lengths, out


def _put(out: Bytes8, numbers: npt.NDArray[np.bool_], at: Lengths, value: Lengths) -> Lengths:
    """Write each value at its place, and mark it as a number; what comes behind them."""
    long = value >= _ONE_BYTE
    out[at] = value & 0x7F | long * 0x80
    numbers[at] = True
    behind = at[long] + 1
    out[behind] = value[long] >> 7
    numbers[behind] = True
    return at + 1 + long


def decode(pages: Bytes8, lengths: Lengths, data: Buffer) -> None:
    """Make of `pages`, shape (n, 4096), what `data` says, in place: encodings of `lengths` bytes
    one behind the other. RemoteProtocolError if they are none; then nothing was written."""
    if len(lengths) != len(pages) or (lengths < 0).any() or int(lengths.sum()) != len(data):
        raise RemoteProtocolError("xbzrle: the lengths do not match")
    encoded = np.frombuffer(data, np.uint8)
    source, target, count = _parse(np.append(encoded, np.zeros(2, np.uint8)), lengths)
    total = int(count.sum())
    begins = np.cumsum(count) - count
    step = np.arange(total)
    into = pages.reshape(-1)
    into[np.repeat(target - begins, count) + step] = encoded[
        np.repeat(source - begins, count) + step
    ]


def _parse(encoded: Bytes8, lengths: Lengths) -> tuple[Lengths, Lengths, Lengths]:
    """Where runs of other bytes are, where they go, and how long they are, each within its page.
    Pair after pair, of all pages at a time; `encoded` has two bytes more than they need."""
    end = np.cumsum(lengths)
    at, to = end - lengths, np.arange(len(lengths)) * PAGE_SIZE
    edge = to + PAGE_SIZE
    found: list[tuple[Lengths, Lengths, Lengths]] = []
    while (more := at < end).any():
        at, end, to, edge = at[more], end[more], to[more], edge[more]
        _check(end - at >= 2)
        same, at = _number(encoded, at)
        _check((same > 0) | (not found))  # only a page begins with a run of none
        to = to + same
        _check((to < edge) & (end - at >= 2))
        other, at = _number(encoded, at)
        _check((other > 0) & (to + other <= edge) & (at + other <= end))
        found.append((at, to, other))
        at, to = at + other, to + other
    if not found:
        nothing = np.empty(0, np.int64)
        return nothing, nothing, nothing
    source, target, count = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return source, target, count


def _number(encoded: Bytes8, at: Lengths) -> tuple[Lengths, Lengths]:
    """The number at each place, and where it ends."""
    low, high = encoded[at].astype(np.int64), encoded[at + 1].astype(np.int64)
    long = low >= _ONE_BYTE
    _check(~long | (high < _ONE_BYTE))
    return (low & 0x7F) + long * (high << 7), at + 1 + long


def _check(good: npt.NDArray[np.bool_]) -> None:
    if not good.all():
        raise RemoteProtocolError("xbzrle: an encoding that no page has")
