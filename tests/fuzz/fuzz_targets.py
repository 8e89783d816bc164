"""All fuzz targets by name: functions of bytes that know nothing of who calls them.

Each raises nothing, whatever it is given; AssertionError, or whatever else gets out, is a defect.
tests/fuzz/corpus/NAME/ has inputs of each, which test_fuzz.py plays again; fuzz_run.py looks for
more (`make fuzz`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fuzz_channels
import fuzz_files
import fuzz_messages
import fuzz_placing
import fuzz_streams

TARGETS: dict[str, Callable[[bytes], None]] = {
    **fuzz_channels.TARGETS,
    **fuzz_messages.TARGETS,
    **fuzz_files.TARGETS,
    **fuzz_placing.TARGETS,
    **fuzz_streams.TARGETS,
}
CORPUS = Path(__file__).resolve().parent / "corpus"


def corpus(name: str) -> list[bytes]:
    """The inputs that are kept of a target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def close() -> None:
    """Give back what targets keep between two inputs."""
    fuzz_placing.close()
