"""What the fork server imports once for all workers. Must create no thread, socket or file.

It ends when its coordinator does, and then removes its folder: one that is killed alone leaves
none.
"""

import atexit
import multiprocessing.shared_memory
import os
import shutil

import lz4.block
import msgspec
import numpy
import xxhash
import zmq
import zstandard

from . import guard, receiver, saver, sender
from .names import FOLDER_VARIABLE

__all__ = ["guard", "lz4", "msgspec", "multiprocessing", "numpy", "receiver", "saver", "sender",
           "xxhash", "zmq", "zstandard"]  # fmt: skip

# not in its children: they end without it (os._exit)
if _folder := os.environ.pop(FOLDER_VARIABLE, ""):
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
