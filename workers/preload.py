"""What the fork server imports once for all workers. Must create no thread, socket or file."""

import multiprocessing.shared_memory

import lz4.block
import msgspec
import numpy
import xxhash
import zmq
import zstandard

from . import receiver, sender

__all__ = ["lz4", "msgspec", "multiprocessing", "numpy", "receiver", "sender", "xxhash", "zmq",
           "zstandard"]  # fmt: skip
