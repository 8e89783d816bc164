"""A tmpfs of the test's own, on transparent huge pages if the kernel has them."""

import contextlib
import os
import subprocess

import pytest

HUGE = 2 << 20


@contextlib.contextmanager
def tmpfs(folder, huge="always"):
    """Mounted at `folder`, which is made; gone at the end."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    os.mkdir(folder)
    options = f"huge={huge},size=512M"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "pageferry-test", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no tmpfs with {options} can be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
