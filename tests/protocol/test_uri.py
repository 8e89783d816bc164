"""Guests and endpoints as users write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import ConnectError, UsageError
from pageferry.transport.links import Endpoint, parse_endpoint
from pageferry.workers.guests.uri import GuestUri, parse_guest

examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("text", "kind", "rest", "options"),
    [
        ("image:vm.mem", "image", "vm.mem", {}),
        ("image:/a b/vm?.mem", "image", "/a b/vm?.mem", {}),
        ("image:what?is?this", "image", "what?is?this", {}),
        ("image:C:odd", "image", "C:odd", {}),
        ("file:/a b/vm.snap?direct=on", "file", "/a b/vm.snap", {"direct": "on"}),
        ("ram:/dev/shm/x", "ram", "/dev/shm/x", {}),
        ("ram:/dev/shm/x?pid=12", "ram", "/dev/shm/x", {"pid": "12"}),
        ("ram:/odd?name?pid=12", "ram", "/odd?name", {"pid": "12"}),
        ("shm:name", "shm", "name", {}),
        ("shm:/name", "shm", "/name", {}),
        ("shm:name?pid=1", "shm", "name", {"pid": "1"}),
        ("pid:12", "pid", "12", {}),
        ("pid:12?mapping=/memfd:a b (deleted)", "pid", "12", {"mapping": "/memfd:a b (deleted)"}),
        ("pid:1?mapping=/x&tracking=y", "pid", "1", {"mapping": "/x", "tracking": "y"}),
        ("demo:", "demo", "", {}),
        ("demo:?size=64M&rate=5", "demo", "", {"size": "64M", "rate": "5"}),
        ("demo:?content=text&seed=3", "demo", "", {"content": "text", "seed": "3"}),
        ("demo:?size=", "demo", "", {"size": ""}),
    ],
)
def test_guests_that_there_are(text, kind, rest, options):
    """Parsed, and written back as they came."""
    uri = parse_guest(text)
    assert (uri.kind, uri.rest, uri.options) == (kind, rest, options)
    assert str(uri) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names no guest"),
        ("vm.mem", "names no guest"),
        ("floppy:x", "write one of image:, file:, ram:, shm:, pid:, qemu:, demo:"),
        ("IMAGE:x", "names no guest"),
        ("image:", "needs a path"),
        ("ram:", "needs a path"),
        ("ram:?pid=1", "needs a path"),
        ("shm:", "needs the name"),
        ("shm:/", "needs the name"),
        ("shm:a/b", "needs the name"),
        ("shm:../x", "needs the name"),
        ("pid:", "needs the number of a process"),
        ("pid:x", "needs the number of a process"),
        ("pid:-1", "needs the number of a process"),
        ("pid:0", "needs the number of a process"),
        ("pid:²", "needs the number of a process"),
        ("pid:" + "9" * 5000, "needs the number of a process"),
        ("pid:1?pid=2", r"no option 'pid' \(it has: mapping, throttle, tracking\)"),
        ("demo:x", "takes options only"),
        ("demo:size=64M", r"write demo:\?size=64M"),
        ("demo:?colour=red", "no option 'colour'"),
        ("image:x?pid=1", r"image: has no option 'pid' \(it has: none\)"),
        ("ram:x?size=1", r"no option 'size' \(it has: pid, throttle\)"),
        ("image:a\udcffb", "UTF-8"),
    ],
)
def test_guests_that_there_are_not(text, why):
    """The message says what is wrong or what was expected."""
    with pytest.raises(UsageError, match=why):
        parse_guest(text)


def test_a_file_that_is_there_is_offered_as_an_image(tmp_path):
    """The most common mistake."""
    path = tmp_path / "vm.mem"
    path.write_bytes(b"x")
    with pytest.raises(UsageError, match=f"did you mean image:{path}"):
        parse_guest(str(path))


def test_options_that_must_be_whole_numbers():
    """The default if it is not there, an error that quotes it if it is none."""
    assert parse_guest("ram:x?pid=12").integer("pid", 0) == 12
    assert parse_guest("ram:x").integer("pid", 7) == 7
    for text in ("", "x", "-1", "1.5", "²", "1 ", "9" * 5000):
        with pytest.raises(UsageError, match="pid must be a whole number"):
            GuestUri("ram", "x", {"pid": text}).integer("pid", 0)


def test_options_that_must_be_one_of_a_few():
    """Empty if it is not there."""
    assert GuestUri("pid", "1").choice("tracking", ("a", "b")) == ""
    assert GuestUri("pid", "1", {"tracking": "b"}).choice("tracking", ("a", "b")) == "b"
    with pytest.raises(UsageError, match=r"pid:1\?tracking=c: tracking is a or b, not 'c'"):
        GuestUri("pid", "1", {"tracking": "c"}).choice("tracking", ("a", "b"))


PREFIXES = ["", "image:", "ram:", "shm:", "pid:", "demo:", "demo:?"]


@given(st.text(max_size=30), st.sampled_from(PREFIXES))
@examples
def test_any_text_is_a_guest_or_refused(text, prefix):
    """What is parsed can be written and parsed again."""
    try:
        uri = parse_guest(prefix + text)
    except UsageError:
        return
    assert parse_guest(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://host:4444", Endpoint("tcp", "host", 4444)),
        ("tcp://10.0.0.1:0", Endpoint("tcp", "10.0.0.1", 0)),
        ("tcp://[fe80::1]:65535", Endpoint("tcp", "fe80::1", 65535)),
        ("tcp://*:1", Endpoint("tcp", "*", 1)),
        ("ipc:///run/x", Endpoint("ipc", path="/run/x")),
    ],
)
def test_addresses_that_there_are(text, endpoint):
    """Parsed, and written back as they came."""
    assert parse_endpoint(text) == endpoint
    assert str(endpoint) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "host:1", "tcp://", "tcp://host", "tcp://host:", "tcp://host:65536", "tcp://host:123456",
        "tcp://host:-1", "tcp://fe80::1:1", "tcp://[host]:1", "tcp://a/b:1", "ipc://", "udp://h:1",
        "tcp://host:1 ", "tcp://host:1\n", "tcp://host:²", "ipc:///" + "x" * 200,
        "ipc:///" + "ä" * 60, "ipc://a\udcffb", "tcp://a\udcffb:1",
    ],
)  # fmt: skip
def test_addresses_that_there_are_not(text):
    """UsageError, before anything is opened."""
    with pytest.raises(UsageError):
        parse_endpoint(text)


def test_channels_are_beside_the_control_endpoint():
    """The peer says only the port or the path; the host is the one that was dialled."""
    tcp, ipc = Endpoint("tcp", "host", 1), Endpoint("ipc", path="/run/x")
    assert tcp.sibling("tcp:5000") == Endpoint("tcp", "host", 5000)
    assert ipc.sibling("ipc:/run/x.0") == Endpoint("ipc", path="/run/x.0")
    for endpoint, where in (
        (tcp, "ipc:/run/x"), (ipc, "tcp:5000"), (tcp, "tcp:65536"), (tcp, "tcp:"), (tcp, ""),
        (tcp, "tcp:0"), (ipc, "ipc:/run/y.0"), (ipc, "ipc:/run/x"), (ipc, "ipc:/run/x/../y.0"),
        (ipc, "ipc:/run/x." + "9" * 101), (ipc, "ipc:/run/x.\0"), (tcp, "tcp:-1"),
        (tcp, "tcp:²"), (tcp, "tcp:" + "9" * 5000), (tcp, "tcp:1 "),
    ):  # fmt: skip
        with pytest.raises(ConnectError, match="not beside"):
            endpoint.sibling(where)
