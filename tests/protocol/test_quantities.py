"""Sizes, rates and durations: what people write, what it means, and what is refused."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import UsageError
from pageferry.transport.quantities import (
    format_bytes,
    format_rate,
    format_seconds,
    parse_duration,
    parse_rate,
    parse_size,
)

examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)

PARSERS = [parse_size, parse_rate, parse_duration]


@pytest.mark.parametrize(
    ("parse", "meanings"),
    [
        (
            parse_size,
            {
                "0": 0, "4096": 4096, "64K": 65536, "64k": 65536, "64KiB": 65536, "64kb": 65536,
                "512M": 512 << 20, "512MiB": 512 << 20, "2G": 2 << 30, "1.5G": 3 << 29,
                "1T": 1 << 40, " 2 G ": 2 << 30, "7B": 7,
            },
        ),
        (
            parse_rate,
            {
                "0": 0, "1000": 1000, "10Gbit": 1_250_000_000, "10gbit/s": 1_250_000_000,
                "8bit": 1, "500MB": 500_000_000, "500M": 500_000_000, "1.5GB/s": 1_500_000_000,
                "1MiB": 1 << 20, "1MiB/s": 1 << 20, "100Mbps": 100_000_000, "3 kB": 3000,
                "5bytes": 5, "16Kibit": 2048,
            },
        ),
        (
            parse_duration,
            {
                "300": 0.3, "300ms": 0.3, "2s": 2.0, "1min": 60.0, "1.5 h": 5400.0,
                "250us": 0.00025, "0.5s": 0.5, "0": 0.0, "33.333333333333336": 0.033333333333333336,
            },
        ),
    ],
)  # fmt: skip
def test_what_people_write(parse, meanings):
    """Memory in powers of two, networks in powers of ten, a bare duration in milliseconds."""
    for text, value in meanings.items():
        assert parse(text) == pytest.approx(value, rel=1e-12), text


@pytest.mark.parametrize("parse", PARSERS)
def test_what_makes_no_sense_is_refused_and_quoted(parse):
    """With an example of what would."""
    for text in (
        "", " ", "M", "-1", "-1M", "1e9", "0x10", "1,5G", "1..5", ".5G", "5.", "1M1", "1 2", "nan",
        "inf", "²", "1\n2", "five", "1P", "10Mfoo", "9" * 400,
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"is no (size|rate|duration): write \d") as caught:
            parse(text)
        assert repr(text) in str(caught.value)


def test_units_of_one_are_no_units_of_another():
    """A size has no bits, a rate no seconds, a duration no bytes."""
    for parse, text in ((parse_size, "10Gbit"), (parse_rate, "10ms"), (parse_duration, "10M")):
        with pytest.raises(UsageError):
            parse(text)


@given(st.text(max_size=12))
@examples
def test_any_text_is_a_number_or_refused(text):
    """Never another exception."""
    for parse in PARSERS:
        with contextlib.suppress(UsageError):
            assert 0 <= parse(text) < float("inf")


@given(st.integers(0, 2**50), st.sampled_from(["", "K", "M", "G", "T"]))
@examples
def test_whole_numbers_are_exact(number, unit):
    """No bit of a size is lost, none of a rate up to 2**53."""
    power = ["", "K", "M", "G", "T"].index(unit)
    assert parse_size(f"{number}{unit}") == number * 1024**power
    rate = number * 1000**power
    assert parse_rate(f"{number}{unit}B") == (rate if rate < 2**53 else pytest.approx(rate))


@pytest.mark.parametrize(
    ("show", "values"),
    [
        (
            format_bytes,
            {
                0: "0 B", 900: "900 B", 1023: "1023 B", 1024: "1.0 KiB", 12 << 20: "12.0 MiB",
                3 << 29: "1.5 GiB", 5 << 40: "5.0 TiB", 5 << 50: "5120.0 TiB",
            },
        ),
        (
            format_rate,
            {0: "0 B/s", 999: "999 B/s", 1000: "1 kB/s", 1.25e9: "1.25 GB/s", 5e8: "500 MB/s"},
        ),
        (
            format_seconds,
            {
                0: "0 ms", 0.42: "420 ms", 12.34: "12.3 s", 245: "4 min 05 s", 3599: "59 min 59 s",
                3600: "1 h 00 min", 10_799: "2 h 59 min",
            },
        ),
    ],
)  # fmt: skip
def test_what_people_read(show, values):
    """One unit, few digits."""
    for value, text in values.items():
        assert show(value) == text


@given(st.floats(0, 1e9), st.floats(0, 1e15))
@examples
def test_more_never_looks_like_less(a, b):
    """What is shown is short, and a larger number of bytes or a higher rate is no smaller one."""
    for show in (format_bytes, format_rate, format_seconds):
        assert 0 < len(show(a)) <= 16
    low, high = sorted((a, b))
    assert parse_size(format_bytes(low)) <= parse_size(format_bytes(high))
    assert parse_rate(format_rate(low)) <= parse_rate(format_rate(high))
