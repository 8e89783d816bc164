"""Profiles: written at once or not at all, read strictly, below what is said explicitly."""

import os
from pathlib import Path

import pytest

from pageferry.pipeline.parameters import Parameters
from pageferry.pipeline.profiles import (
    parameters_of,
    path_of_profile,
    read_profile,
    render,
    with_profile,
    write_profile,
)
from pageferry.transport.errors import UsageError

SETTINGS = {"workers": 3, "codec": "zstd", "level": -1, "batch-pages": 512}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_what_is_written_is_read(tmp_path):
    """By name in the user's configuration, by path where it says."""
    for name in ("rack2", str(tmp_path / "p.toml")):
        path = write_profile(name, SETTINGS | {"verify": None}, ["1.2 GB/s", "", "and more"])
        assert path == path_of_profile(name)
        assert read_profile(name) == SETTINGS
        text = Path(path).read_text()
        assert text.startswith("# 1.2 GB/s\n#\n# and more\nworkers = 3\n")
    assert path_of_profile("rack2") == f"{tmp_path}/config/pageferry/profiles/rack2.toml"
    assert os.listdir(tmp_path / "config/pageferry/profiles") == ["rack2.toml"]


def test_one_that_is_there_is_replaced_as_a_whole(tmp_path):
    path = str(tmp_path / "p.toml")
    write_profile(path, SETTINGS, [])
    write_profile(path, {"codec": "none"}, [])
    assert read_profile(path) == {"codec": "none"}
    assert os.listdir(tmp_path) == ["p.toml"]


def test_where_it_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="cannot write the profile"):
        write_profile(str(tmp_path / "no/p.toml"), SETTINGS, [])
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(UsageError, match="cannot write the profile"):
        write_profile(str(tmp_path / "d.toml"), SETTINGS, [])
    assert os.listdir(tmp_path) == ["d.toml"]


def test_what_is_given_explicitly_comes_before():
    """A level belongs to its codec."""
    write_profile("p", SETTINGS, [])
    assert with_profile("p", {}) == SETTINGS
    assert with_profile("p", {"workers": 8}) == SETTINGS | {"workers": 8}
    assert with_profile("p", {"codec": "lz4"}) == {"workers": 3, "codec": "lz4", "batch-pages": 512}
    assert with_profile("p", {"codec": "zstd", "level": 3})["level"] == 3


def test_as_parameters():
    """Durations become seconds, and a given one of them stays what it is."""
    write_profile("p", SETTINGS | {"downtime-limit": "50ms"}, [])
    made = Parameters(**parameters_of("p", {})).checked()
    assert (made.workers, made.codec, made.level, made.batch_pages) == (3, "zstd", -1, 512)
    assert made.downtime_limit == 0.05
    made = Parameters(**parameters_of("p", {"downtime_limit": 0.2, "codec": "none"})).checked()
    assert (made.downtime_limit, made.codec, made.level, made.workers) == (0.2, "none", None, 3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("workers = 0.5", "workers"),
        ('workers = "3"', "workers"),
        ("workers = 65", "workers"),
        ("wokers = 3", "wokers"),
        ('codec = "brotli"', "brotli"),
        ('codec = "zstd"\nlevel = 99', "level"),
        ("level = 3", "level needs a codec"),
        ('downtime-limit = "soon"', "duration"),
        ("max-bandwidth = 5", "max-bandwidth"),
        ("workers = ", "no TOML"),
        ("a = " + "[" * 5000, "no TOML"),
        ("\udcff", "no TOML"),
        ("#" * (2 << 20), "more than a MiB"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(tmp_path, text, named):
    """The error names the file and the field."""
    path = tmp_path / "p.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=named) as caught:
        read_profile(str(path))
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "..", "x" * 65, "a\n"])
def test_names(name):
    with pytest.raises(UsageError, match="no name for a profile"):
        path_of_profile(name)


def test_one_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="there is no profile"):
        read_profile("never")
    with pytest.raises(UsageError, match="cannot read"):
        read_profile(f"{tmp_path}/")


def test_without_xdg_it_is_below_home(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert path_of_profile("a") == "/home/someone/.config/pageferry/profiles/a.toml"


def test_values_are_written_as_toml_reads_them():
    assert (
        render({"a": 'say "x\\y"', "b": True, "c": 3}, [])
        == 'a = "say \\"x\\\\y\\""\nb = true\nc = 3\n'
    )
    with pytest.raises(UsageError, match="no name for a setting"):
        render({"a b": 1}, [])
