"""What is predicted is what happens: downtime against its limit where the rounds differ."""

import os
import subprocess
import sys

import pytest

import pageferry

# Half a second of random pages in memory that is otherwise zero, again and again.
WRITER = """
import mmap, os, random, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, os.fstat(fd).st_size)
print("ready", flush=True)
draw = random.Random(5)
while True:
    for page in range(2000):
        memory[page * 4096 : page * 4096 + 4096] = draw.randbytes(4096)
"""


def test_zero_pages_say_nothing_about_the_rate():
    """The first round is nearly all zeros and fast; what the guest writes is neither."""
    path = f"/dev/shm/test-pf-{os.getpid()}-zeros"
    out = f"{path}-out"
    with open(path, "wb") as f:
        for _ in range(128):
            f.write(bytes(1 << 20))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"ready\n"
        # 8 MiB dirty at 4 MB/s can never fit into 500 ms
        with pytest.raises(pageferry.PageferryError) as caught:
            pageferry.migrate(
                f"ram:{path}?pid={writer.pid}", f"ram:{out}",
                max_bandwidth=4_000_000, downtime_limit=0.5, max_rounds=2, codec="none",
            )  # fmt: skip
        assert type(caught.value).__name__ == "NotConverging"
        assert caught.value.data["rate"] < 8_000_000
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
        os.unlink(path)
        if os.path.exists(out):
            os.unlink(out)
