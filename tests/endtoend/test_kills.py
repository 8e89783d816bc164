"""kill -9 of a batch three times at random moments, by the benchmark that does it twenty times."""

import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(150)
def test_three_kills(tmp_path):
    """Every image is equal in the end, and hardly anything is sent twice."""
    path = tmp_path / "rows.json"
    ran = subprocess.run(
        [sys.executable, "-m", "pageferry.tools.bench", "kills", "--images", "6", "--size", "8M",
         "--clones", "2", "--changed", "40", "--kills", "3", "--rate", "20MB",
         "--directory", str(tmp_path), "--json", str(path)],
        capture_output=True, text=True, timeout=140, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(path.read_text())
    calm, killed = told["rows"]
    assert calm["equal"] and killed["equal"]
    assert (calm["kills"], calm["attempts"]) == (0, 6)
    assert killed["kills"] >= 1 and killed["attempts"] > 6
    if told["host"]["traffic"] == "own loopback interface":  # nobody else's bytes
        # three kills in 17 MB: up to a frame of 1 MiB each, and digests
        assert killed["sent-twice"] < 15
