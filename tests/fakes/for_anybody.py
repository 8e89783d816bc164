"""A mount namespace in which an ordinary user reaches what this Python and pageferry are made of:
a checkout below /root is nobody's to read, and that is not what is tested."""

import os
import sys
from pathlib import Path

import pageferry

# $1: a folder; it is replaced by one that all may enter, which has of it what the other names say
_OPENED = """
set -e
while [ "$1" != -- ]; do
    folder=$1; shift
    hidden=$(mktemp -d -p /mnt)
    mount --bind "$folder" "$hidden"
    mount -t tmpfs -o mode=755 tmpfs "$folder"
    while [ "$1" != . ]; do
        mkdir -p "$folder/$1"; mount --bind "$hidden/$1" "$folder/$1"; shift
    done
    shift
    umount "$hidden"; rmdir "$hidden"
done
shift
exec "$@"
"""


def _needed():
    """Files and folders that are to be reached, wherever links lead."""
    found = {Path(sys.executable), Path(os.path.realpath(sys.executable)), Path(sys.base_prefix)}
    return found | {Path(path) for path in pageferry.__path__}


def within(folder):
    """What to put before a command (helpers.Running), whose TMPDIR is then `folder`."""
    closed = {}
    for path in _needed():
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 1:
                closed.setdefault(parent, set()).add(path.relative_to(parent).parts[0])
                break
    opened = []
    for parent, names in closed.items():
        opened += [str(parent), *sorted(names), "."]
    return (
        "unshare", "-m", "--propagation", "private", "sh", "-c", _OPENED, "sh", *opened, "--",
        "env", f"TMPDIR={folder}",
    )  # fmt: skip
