"""The tree of errors: exit codes as documented, pickling, names."""

import copy
import pickle
import re

import pytest

from pageferry.transport import errors
from pageferry.transport.errors import PageferryError, all_errors, by_name

OURS = [cls for cls in all_errors() if cls.__module__ == errors.__name__]


def documented():
    """The tree in the module's docstring: {name: exit code or None if it is not said}."""
    assert errors.__doc__ is not None
    rows = re.findall(r"^ {4}[│├└─ ]*(\w+)(?: +(\d+) {3}.*)?$", errors.__doc__, re.MULTILINE)
    return {name: int(code) if code else None for name, code in rows}


def test_the_documented_tree_is_the_tree():
    """The same classes, the same exit codes; a class without one has its parent's."""
    table = documented()
    assert next(iter(table)) == "PageferryError"
    assert set(table) == {cls.__name__ for cls in OURS}
    for cls in OURS:
        code = table[cls.__name__]
        assert cls.exit_code == (code if code is not None else cls.__mro__[1].exit_code), cls


def test_exit_codes_tell_direct_subclasses_apart():
    """Scripts look at nothing else. Our own bugs share 1; no code collides with the shell's."""
    direct = [cls for cls in OURS if PageferryError in cls.__bases__]
    codes = {cls.__name__: cls.exit_code for cls in direct}
    assert codes.pop("LocalProtocolError") == PageferryError.exit_code == 1
    assert len(set(codes.values())) == len(codes)
    assert 1 not in codes.values() and 0 not in codes.values()
    assert all(2 <= code <= 125 or code == 130 for code in codes.values())
    for cls in OURS:
        if cls not in direct and cls is not PageferryError:
            assert cls.exit_code == cls.__bases__[0].exit_code


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(protocol):
    """Message and data, across processes."""
    for cls in OURS:
        error = cls("it broke: é", field="kind", blocks=["a"], report={"ram": {"total": 1}})
        got = pickle.loads(pickle.dumps(error, protocol))
        assert type(got) is cls
        assert got.message == str(got) == "it broke: é"
        assert got.data == {"field": "kind", "blocks": ["a"], "report": {"ram": {"total": 1}}}


def test_every_error_survives_copying():
    """As tools do that keep an error for later."""
    for cls in OURS:
        got = copy.copy(cls("why", field="x"))
        assert (type(got), got.message, got.data) == (cls, "why", {"field": "x"})


def test_an_error_without_a_message_says_what_it_is():
    """Its docstring; an empty message stays empty."""
    for cls in OURS:
        assert str(cls()) == (cls.__doc__ or "").strip() != ""
        assert str(cls("")) == ""
        assert cls().args == (cls().message,)


def test_errors_by_name():
    """What a worker or the peer said; names that we do not know become the base class."""
    for cls in OURS:
        error = by_name(cls.__name__, "why", field="x")
        assert (type(error), error.message, error.data) == (cls, "why", {"field": "x"})
    for name in ("", "NoSuchError", "Exception", "OSError", "pageferryerror"):
        error = by_name(name, "why")
        assert type(error) is PageferryError and error.message == "why"


def test_names_are_unique():
    """Or by_name would pick one of them."""
    assert len({cls.__name__ for cls in OURS}) == len(OURS)
