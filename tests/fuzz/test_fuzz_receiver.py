"""Some bouts of fuzz_receiver.py, always the same ones."""

import fuzz_receiver


def test_a_receiver_among_hostile_peers(tmp_path):
    """It lives, what is good arrives, what is not has one error, and nothing grows."""
    figures = fuzz_receiver.fuzz(tmp_path, bouts=6, seed=1)
    assert figures.bouts == 6 and figures.good == 1
    assert figures.ended["RemoteProtocolError"] >= 2
