"""Pages with other content and the same xxh3-128: what somebody can put into an image who wants it
to be taken for another's page.

xxh3 adds, a lane of 8 bytes and 1 KiB block, words and products of the halves of words that were
xored with known keys (XXH3_accumulate_512_scalar). A word whose low half is its key's adds nothing
to the products, so that some words of a lane can pay for any change to the others.
"""

import struct

_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1
_STRIPES = 16  # of 64 bytes, in a block
# How XXH3_kSecret begins.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
)
_KEYS = struct.unpack("<16Q", _SECRET)


def twin(page, word):
    """`page` with `word` (8 bytes) at byte 192, paid for by words between 640 and 967."""
    words = [struct.unpack_from("<Q", page, 64 * s)[0] for s in range(_STRIPES)]
    total, products = sum(words), _products(words, range(_STRIPES))
    words[3] = int.from_bytes(word, "little")

    def put(stripe, low, high):
        words[stripe] = (high << 32 | low) ^ _KEYS[stripe]

    need = (products - _products(words, range(10))) & _ALL
    rest = need >> 31
    put(10, 1, need & ((1 << 31) - 1))
    put(11, 1 << 31, min(rest, _LOW))
    put(12, 1 << 31, rest - min(rest, _LOW))
    put(13, 0, 0)
    # one whose high half is the key's makes the sum's low half right, one with such a low half the
    # rest
    put(15, 0, 0)
    left = total - sum(words[:14]) - words[15]
    words[14] = _KEYS[14] >> 32 << 32 | left & _LOW
    words[15] = (words[15] + left - words[14]) & _ALL
    made = bytearray(page)
    for stripe, value in enumerate(words):
        struct.pack_into("<Q", made, 64 * stripe, value)
    return bytes(made)


def _products(words, stripes):
    keyed = [words[s] ^ _KEYS[s] for s in stripes]
    return sum((value & _LOW) * (value >> 32) for value in keyed)
