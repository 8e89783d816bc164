"""Two test processes at the same time, out of each other's sight.

Tests look into /dev/shm and the folder for temporary files for what pageferry left behind. A
worker of pytest-xdist that is root gets both for itself; one that may not make a mount namespace
is refused, for it would be blamed for what others do.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from multiprocessing import util

_CLONE_NEWNS = 0x00020000  # <linux/sched.h>


def set_apart():
    """Call it before anything is opened or started."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, f"-n needs root (a mount namespace): {os.strerror(number)}")
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    folder = tempfile.mkdtemp(prefix="pf-test-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    # after multiprocessing has removed its own in it, whose priority is -100
    util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)


def _mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
