"""What is in a batch of pages: which are zero, which look compressible. Vectorised, pure.

Zero pages (QEMU: buffer_is_zero in ram.c) cost no payload. Pages that look random are not
worth a codec's time and travel raw beside the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..transport.pages import PAGE_SIZE

# One byte in 32 is looked at: 128 of a page. Of that many random bytes about 101 differ
# (256 * (1 - exp(-128 / 256))); English text has 20 to 30, machine code 50 to 70.
_STRIDE = 32
_SAMPLED = PAGE_SIZE // _STRIDE
_RANDOM_ABOVE = 88
# The sample walks through the page, so that no structure with a period of 32 hides from it.
_OFFSETS = (np.arange(_SAMPLED) * _STRIDE + np.arange(_SAMPLED) % _STRIDE).astype(np.intp)


def zero_pages(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """For each row of 512 words: True if all are zero.

    Three words of each page decide for nearly all pages with content (75 GB/s against 11).
    """
    candidates: npt.NDArray[np.bool_] = (words[:, 0] | words[:, 256] | words[:, 511]) == 0
    if candidates.all():
        return np.asarray(~words.any(axis=1))
    if candidates.any():
        candidates[candidates] = ~words[candidates].any(axis=1)
    return candidates


# Pages of a batch that are looked at first; where they agree, they speak for the others.
_SCOUTS = 8


def compressible_pages(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """For each row of 4096 bytes: False if it looks random, by counting distinct bytes.

    A few pages spread over the batch decide for all if they agree: looking at every page
    costs half a second of CPU a GiB.
    """
    n = len(pages)
    if n > 2 * _SCOUTS:
        scouts = _look_compressible(pages[:: n // _SCOUTS])
        if scouts.all() or not scouts.any():
            return np.full(n, scouts[0])
    return _look_compressible(pages)


def _look_compressible(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    n = len(pages)
    sample: Any = pages[:, _OFFSETS].astype(np.intp)
    sample += np.arange(n)[:, None] * 256
    seen = np.zeros(n * 256, np.bool_)
    seen[sample.ravel()] = True
    return np.asarray(np.count_nonzero(seen.reshape(n, 256), axis=1) <= _RANDOM_ABOVE)
