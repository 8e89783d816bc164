"""Background lets others go first: with every thread, and for a slice that anybody's is shorter
than."""

import json
import os
import subprocess
import sys

import pytest

from pageferry.workers.priority import BACKGROUND_NICE

# struct sched_attr of sched_getattr(2): nice at 16, runtime (the slice) at 24.
PROGRAM = """
import ctypes, json, os, platform, struct, threading
from pageferry.workers.priority import become_background
end = threading.Event()
other = threading.Thread(target=end.wait)
other.start()
become_background()
libc, found = ctypes.CDLL(None), []
number = 275 if platform.machine() == "aarch64" else 315
for thread in os.listdir("/proc/self/task"):
    attributes = ctypes.create_string_buffer(48)
    assert libc.syscall(number, int(thread), attributes, 48, 0) == 0
    found.append([struct.unpack_from("i", attributes, 16)[0],
                  struct.unpack_from("Q", attributes, 24)[0]])
end.set()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def threads():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_every_thread_is_nice(threads):
    """libzmq's, which were there before, too."""
    assert len(threads) >= 2
    assert {nice for nice, _ in threads} == {BACKGROUND_NICE}


def test_every_thread_has_a_long_slice(threads):
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (6, 12):
        pytest.skip("slices of one's own take Linux 6.12")
    assert {length for _, length in threads} == {10_000_000}
