"""Parameters: defaults, bounds with the parameter's name in the error, changes while it runs."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.pipeline.parameters import Parameters, changed, default_workers
from pageferry.transport.errors import UsageError
from pageferry.transport.messages import MAX_WORKERS
from pageferry.transport.wire import MAX_BATCH_PAGES

examples = settings(max_examples=75, deadline=None, derandomize=True, database=None)


def test_defaults_are_legal_and_workers_follow_the_cpus():
    """At most 8, as many as this process may use."""
    default = Parameters()
    assert (default.codec, default.level, default.verify) == ("auto", None, None)
    assert (default.max_bandwidth, default.downtime_limit) == (0, 0.3)
    checked = Parameters().checked()
    assert checked.workers == default_workers()
    assert 1 <= checked.workers <= min(8, len(os.sched_getaffinity(0)))
    assert checked.checked() == checked


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("workers", [1, MAX_WORKERS], [-1, MAX_WORKERS + 1, 10**9]),
        ("batch-pages", [16, MAX_BATCH_PAGES], [0, 15, MAX_BATCH_PAGES + 1, -1]),
        ("max-rounds", [1, 100_000], [0, -1, 100_001]),
        ("xbzrle-cache-size", [4096, 1 << 40], [0, 4095, 1 << 51, -1]),
        ("downtime-limit", [0.001, 2000.0], [0.0, 0.0009, 2000.1, -1.0, float("nan")]),
        ("max-bandwidth", [0, 100_000, 10**12], [1, 99_999, -1]),
        ("max-postcopy-bandwidth", [0, 100_000, 10**12], [1, 99_999, -1]),
        ("postcopy-latency-target", [20e-6, 1.0], [0.0, 19e-6, 1.1, -1.0, float("nan")]),
    ],
)
def test_bounds(name, good, bad):
    """The bounds themselves are legal; beyond them the error names the parameter."""
    field = name.replace("-", "_")
    for value in good:
        assert getattr(Parameters(**{field: value}).checked(), field) == value
    for value in bad:
        with pytest.raises(UsageError, match=name):
            Parameters(**{field: value}).checked()


def test_codecs_and_levels():
    """A level belongs to a codec; auto has none."""
    for codec, level in (("none", None), ("lz4", 12), ("zstd", -7), ("zlib", 9), ("auto", None),
                         ("xbzrle", None), ("xbzrle+lz4", 12), ("xbzrle+auto", None)):  # fmt: skip
        assert Parameters(codec=codec, level=level).checked().level == level
    for codec, level, why in (
        ("brotli", None, "brotli"),
        ("zstd", 20, "zstd has levels -7 to 19, not 20"),
        ("auto", 1, "level needs a codec"),
        ("none", 1, "none has levels"),
        ("xbzrle", 1, "none has levels"),
        ("xbzrle+auto", 1, "level needs a codec"),
        (
            "xbzrle+brotli",
            None,
            r"'xbzrle\+brotli'; choose from auto, none, .*, xbzrle or xbzrle\+N",
        ),
        ("xbzrle+xbzrle", None, "xbzrle"),
        ("xbzrle4", None, "xbzrle4"),
    ):
        with pytest.raises(UsageError, match=why):
            Parameters(codec=codec, level=level).checked()


def test_what_the_monitor_says():
    """QEMU's names and units: milliseconds, bytes a second."""
    said = (
        Parameters(2, "zstd", 3, 10**6, 0.25, 7, False, 64, "after=2", False, 10**7, 0.002)
        .checked()
        .qmp()
    )
    assert said == {
        "multifd-channels": 2,
        "multifd-compression": "zstd",
        "max-bandwidth": 10**6,
        "downtime-limit": 250,
        "max-rounds": 7,
        "batch-pages": 64,
        "xbzrle-cache-size": 64 << 20,
        "postcopy": "after=2",
        "postcopy-preempt": False,
        "max-postcopy-bandwidth": 10**7,
        "postcopy-latency-target": 2000,
    }
    default = Parameters(workers=1).qmp()
    assert (default["postcopy"], default["postcopy-preempt"]) == ("never", True)


@pytest.mark.parametrize(
    ("mode", "rounds"),
    [
        ("never", None), ("manual", None), ("now", None), ("auto", None),
        ("after=1", 1), ("after=30", 30), ("after=999999", 999_999),
    ],
)  # fmt: skip
def test_modes_of_postcopy(mode, rounds):
    """After how many rounds, if the mode says that."""
    assert Parameters(postcopy=mode).checked().postcopy_rounds == rounds


@pytest.mark.parametrize(
    "mode",
    [
        "", "always", "Now", " now", "rounds=3", "after", "after=", "after=0", "after=-1",
        "after=1.5", "after=²", "after=1000000", "after=1 ", "after=1\n",
    ],
)  # fmt: skip
def test_modes_of_postcopy_that_there_are_not(mode):
    """All that there are is said."""
    with pytest.raises(UsageError, match="after=ROUNDS"):
        Parameters(postcopy=mode).checked()


def test_what_does_not_go_with_postcopy():
    """Digests are compared before the guest runs; a link is of one of two kinds."""
    assert Parameters(verify=True, postcopy="never").checked().verify
    for mode in ("manual", "now", "auto", "after=3"):
        with pytest.raises(UsageError, match="verify"):
            Parameters(verify=True, postcopy=mode).checked()
    for link in ("zmq", "direct"):
        assert Parameters(postcopy_link=link).checked().postcopy_link == link
    for link in ("", "tcp", "Direct"):
        with pytest.raises(UsageError, match="postcopy-link"):
            Parameters(postcopy_link=link).checked()


def test_changes_while_it_runs():
    """As text or as JSON numbers; what is not named stays; the old ones do not change."""
    before = Parameters(workers=2).checked()
    after = changed(before, {"max-bandwidth": "1Gbit", "downtime-limit": 500, "max-rounds": "9"})
    assert (after.max_bandwidth, after.downtime_limit, after.max_rounds) == (125_000_000, 0.5, 9)
    assert (after.workers, after.codec) == (2, "auto")
    assert before == Parameters(workers=2).checked()
    assert changed(before, {}) == before
    assert changed(before, {"max-bandwidth": 0}).max_bandwidth == 0
    after = changed(before, {"max-postcopy-bandwidth": "2Gbit"})
    assert (after.max_bandwidth, after.max_postcopy_bandwidth) == (0, 250_000_000)
    assert changed(before, {"downtime-limit": 33.333333333333336}).downtime_limit < 0.04


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"multifd-channels": 3}, "multifd-channels"),
        ({"codec": "zstd"}, "codec"),
        ({"max-rounds": "many"}, "max-rounds"),
        ({"max-rounds": 1.5}, "max-rounds"),
        ({"max-rounds": -1}, "max-rounds"),
        ({"max-rounds": 0}, "max-rounds"),
        ({"max-rounds": "²"}, "max-rounds"),
        ({"max-rounds": "9" * 5000}, "max-rounds"),
        ({"max-rounds": None}, "max-rounds"),
        ({"max-bandwidth": "fast"}, "rate"),
        ({"max-bandwidth": 5}, "max-bandwidth"),
        ({"max-postcopy-bandwidth": 5}, "max-postcopy-bandwidth"),
        ({"max-postcopy-bandwidth": "fast"}, "rate"),
        ({"postcopy": "now"}, "postcopy"),
        ({"postcopy-latency-target": 500}, "postcopy-latency-target"),
        ({"max-bandwidth": "9" * 400}, "rate"),
        ({"downtime-limit": "soon"}, "duration"),
        ({"downtime-limit": [1]}, "duration"),
        ({"downtime-limit": 0}, "downtime-limit"),
        ({"max-rounds": 5, "colour": "red"}, "colour"),
    ],
)
def test_changes_that_make_no_sense(arguments, named):
    """The error names what is wrong."""
    with pytest.raises(UsageError, match=named):
        changed(Parameters(workers=1), arguments)


json_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([1])
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "max-bandwidth",
                "max-postcopy-bandwidth",
                "downtime-limit",
                "max-rounds",
                "verify",
                "xbzrle-cache-size",
            ]
        ),
        json_values,
    )
)
@examples
def test_any_change_is_legal_or_refused(arguments):
    """A monitor's client may send any JSON."""
    try:
        after = changed(Parameters(workers=1), arguments)
    except UsageError:
        return
    assert after.checked() == after
