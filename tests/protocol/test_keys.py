"""Keys: their text and files, who is allowed, which belongs to an address; and ZAP's answers."""

import os
import resource
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from pageferry.pipeline.agreement import check_key
from pageferry.pipeline.manifest import manifest
from pageferry.pipeline.parameters import Parameters
from pageferry.transport import keys as keys_module
from pageferry.transport.curve import (
    CHANNEL_USER,
    Z85,
    Binds,
    Dials,
    Invites,
    Pair,
    as_text,
    is_key,
    password,
    zap_answer,
)
from pageferry.transport.errors import PeerRefused, UsageError
from pageferry.transport.keys import KeyDirectory, new_pair, parse_key, public_key
from pageferry.transport.links import parse_endpoint
from pageferry.transport.messages import DIRECT, POSTCOPY, PROTOCOL, Hello, Resume

keys = st.binary(min_size=32, max_size=32).map(as_text)
KEY = as_text(bytes(range(32)))
comments = st.from_regex(rb"#[ -~]{0,30}", fullmatch=True)


@given(st.binary(min_size=32, max_size=32))
def test_text_is_z85(raw):
    assert as_text(raw) == z85.encode(raw)
    assert is_key(as_text(raw))


@given(st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(list(Z85)), min_size=38, max_size=42).map(bytes),
))  # fmt: skip
def test_what_is_no_key(text):
    """Exactly what stands for 32 bytes is one: libzmq takes the others for something else."""
    try:
        raw = z85.decode(text)
    except Exception:
        raw = b""
    wanted = len(text) == 40 and len(raw) == 32 and z85.encode(raw) == text
    assert is_key(text) == wanted


@given(keys, st.lists(comments, max_size=3), st.lists(comments, max_size=3), st.booleans())
def test_files_that_have_a_key(key, before, after, spaces):
    lines = [*before, b"  " + key + b"\r" if spaces else key, b"", *after]
    assert parse_key(b"\n".join(lines)) == key


@given(st.binary(max_size=200))
def test_files_of_anything(text):
    """A key, or a ValueError that does not show what may be a secret."""
    try:
        found, said = parse_key(text), ""
    except ValueError as e:
        found, said = b"0" * 40, str(e)
    assert is_key(found)
    assert said in (
        "", "a line is no key (of 40 characters) and no # comment", "no key is in it",
        "it has more than one key",
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 2])
def test_files_with_none_or_two(count):
    with pytest.raises(ValueError, match="key"):
        parse_key(b"# what\n" + b"\n".join(new_pair().public for _ in range(count)))


def test_secrets_are_not_shown():
    """Not even in a log of everything."""
    pair = new_pair()
    for shown in (pair, Binds(pair.secret, b"x", "u"), Dials(b"x", b"y", pair.secret)):
        assert pair.secret.decode() not in f"{shown!r} {shown}"
    assert isinstance(pair, Pair)


# ---- directories -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return KeyDirectory.create(str(tmp_path / "keys"))


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_new_directory(folder):
    """Nobody else's, and a public key that a shell takes as it is."""
    assert mode(folder.path) == mode(f"{folder.path}/allowed") == 0o700
    assert mode(f"{folder.path}/secret.key") == 0o600
    assert sorted(os.listdir(folder.path)) == ["allowed", "public.key", "secret.key"]
    with open(f"{folder.path}/public.key", "rb") as file:
        assert parse_key(file.read()) == folder.public
    assert folder.public[:1].isalnum() and not set(folder.public) & set(b"!*?&<>()[]{}$#^")
    assert KeyDirectory(folder.path).public == folder.public


def test_a_key_is_never_replaced(folder):
    with pytest.raises(UsageError, match="has a key already"):
        KeyDirectory.create(folder.path)
    assert KeyDirectory(folder.path).public == folder.public


@pytest.mark.parametrize(
    ("name", "bits", "text"),
    [("secret.key", 0o640, "chmod 600"), ("secret.key", 0o604, "chmod 600"),
     ("", 0o770, "chmod 700"), ("allowed", 0o702, "chmod 700")],
)  # fmt: skip
def test_what_others_may_use_is_refused(folder, name, bits, text):
    os.chmod(os.path.join(folder.path, name), bits)
    with pytest.raises(UsageError, match=text):
        KeyDirectory(folder.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
@pytest.mark.parametrize("name", ["secret.key", "", "allowed"])
def test_what_belongs_to_others_is_refused(folder, name, monkeypatch):
    """Root's own files may be used by others that run as a user, so it is a user here."""
    os.chown(os.path.join(folder.path, name), 4711, -1)
    with pytest.raises(UsageError, match="belongs to somebody else"):
        KeyDirectory(folder.path)


@pytest.mark.parametrize(
    "damage",
    [os.unlink, lambda path: open(path, "w").close(),
     lambda path: (os.unlink(path), os.symlink("public.key", path)),
     lambda path: (os.unlink(path), os.mkfifo(path, 0o600))],
)  # fmt: skip
def test_no_key_to_be_read(folder, damage):
    damage(f"{folder.path}/secret.key")
    with pytest.raises(UsageError, match=r"has no key|cannot read the key"):
        KeyDirectory(folder.path)


def test_allow_and_revoke(folder):
    """It counts at once, in a directory that is open."""
    other, key = KeyDirectory(folder.path), new_pair().public
    assert not other.admits(key)
    name = folder.allow(key)
    assert other.admits(key) and other.listed() == {name: key}
    assert folder.allow(key) == name
    assert folder.revoke(key.decode()) == [name]
    assert not other.admits(key) and not other.listed()
    with pytest.raises(UsageError, match="no peer is listed"):
        folder.revoke(name)


def test_names(folder):
    key, another = new_pair().public, new_pair().public
    assert folder.allow(key, "192.0.2.7") == "192.0.2.7"
    with pytest.raises(UsageError, match="another key"):
        folder.allow(another, "192.0.2.7")
    with pytest.raises(UsageError, match=r"listed as 192\.0\.2\.7 already"):
        folder.allow(key, "kvm7")
    for name in ("../x", ".x", "a/b", "a b", "-x", "x" * 101):
        with pytest.raises(UsageError, match="no name"):
            folder.allow(another, name)
    with pytest.raises(UsageError, match="own key"):
        folder.allow(folder.public)


def test_damaged_or_open_files_allow_nobody(folder):
    """And can be revoked."""
    key = new_pair().public
    path = f"{folder.path}/allowed/{folder.allow(key, 'kvm7')}.key"
    os.chmod(path, 0o620)
    assert not folder.admits(key)
    os.chmod(path, 0o600)
    assert folder.admits(key)
    with open(path, "ab") as file:
        file.write(b"something else\n")
    assert not folder.admits(key)
    assert folder.revoke("kvm7") == ["kvm7"]


def test_who_was_allowed_is_so_while_no_file_can_be_opened(folder):
    """It says nothing of a revocation; one that happens meanwhile counts."""
    key, gone = new_pair().public, new_pair().public
    folder.allow(key)
    name = folder.allow(gone)
    assert folder.admits(key) and folder.admits(gone)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert folder.admits(key) and folder.admits(gone)
        os.unlink(f"{folder.path}/allowed/{name}.key")
        assert folder.admits(key) and not folder.admits(gone)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_only_what_has_changed_is_read(folder, monkeypatch):
    for _ in range(5):
        folder.allow(new_pair().public)
    folder.listed()
    read, real = [], keys_module._read
    monkeypatch.setattr(
        keys_module, "_read", lambda path, bits: read.append(path) or real(path, bits)
    )
    assert len(folder.listed()) == 5 and not read
    another = folder.allow(new_pair().public, "another")
    assert len(folder.listed()) == 6
    assert {os.path.basename(path) for path in read} == {f"{another}.key"}


def test_which_key_belongs_to_an_address(folder):
    """The one that is named, or listed as the host, or the only one."""
    one, two = new_pair().public, new_pair().public
    with pytest.raises(UsageError, match=r"no peer is listed .* keys allow"):
        folder.server("192.0.2.7", "")
    folder.allow(one, "kvm1")
    assert folder.server("192.0.2.7", "") == folder.server("", "kvm1") == one
    folder.allow(two, "192.0.2.8")
    assert folder.server("192.0.2.8", "") == two
    assert folder.server("192.0.2.8", "kvm1") == one
    with pytest.raises(UsageError, match=r"2 peers are listed .* --name 192.0.2.7"):
        folder.server("192.0.2.7", "")
    with pytest.raises(UsageError, match="'kvm9'"):
        folder.server("192.0.2.8", "kvm9")


@pytest.mark.parametrize("text", ["", "x" * 40 + "y", "ä" * 40, "~" * 40, "#" * 40])
def test_no_public_key(text):
    with pytest.raises(UsageError, match="no public key"):
        public_key(text)


# ---- ZAP ---------------------------------------------------------------------------------------


def request(client, **other):
    said = {
        "version": b"1.0", "number": b"7", "domain": b"d", "address": b"127.0.0.1", "id": b"",
        "mechanism": b"CURVE", "key": z85.decode(client),
    } | other  # fmt: skip
    return list(said.values())


@pytest.fixture
def gatekeeper():
    return Binds(b"", new_pair().public, "d")


def test_the_one_that_is_listed_is_let_in(gatekeeper):
    answer = zap_answer(request(gatekeeper.client), gatekeeper)
    assert answer == [b"1.0", b"7", b"200", b"", gatekeeper.client, b""]


@pytest.mark.parametrize(
    "other",
    [{"domain": b"e"}, {"domain": b""}, {"mechanism": b"NULL"}, {"mechanism": b"PLAIN"},
     {"version": b"2.0"}, {"key": b""}, {"key": bytes(31)}, {"key": bytes(32)}, {"more": b"x"}],
)  # fmt: skip
def test_all_others_are_turned_away(gatekeeper, other):
    assert zap_answer(request(gatekeeper.client, **other), gatekeeper)[1:3] == [b"7", b"400"]


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_nonsense_is_turned_away(parts):
    assert zap_answer(parts, Binds(b"", b"0" * 40, "d"))[2] == b"400"


TOKEN = bytes(range(16))


def by_token(**other):
    said = {
        "version": b"1.0", "number": b"7", "domain": b"pageferry", "address": b"", "id": b"",
        "mechanism": b"PLAIN", "name": CHANNEL_USER, "password": password(TOKEN),
    } | other  # fmt: skip
    return zap_answer(list(said.values()), Invites(TOKEN))[2]


def test_a_token_lets_in():
    assert by_token() == b"200"
    assert TOKEN.hex() not in repr(Invites(TOKEN))


@pytest.mark.parametrize(
    "other",
    [{"password": b""}, {"password": password(TOKEN[::-1])}, {"password": password(TOKEN)[:-1]},
     {"name": b""}, {"domain": b"d"}, {"mechanism": b"CURVE"}, {"more": b""}],
)  # fmt: skip
def test_another_token_does_not(other):
    assert by_token(**other) == b"400"


# ---- what is said of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "local"),
    [("ipc:///x", True), ("ipc://@x", True), ("tcp://127.0.0.1:1", True),
     ("tcp://127.9.8.7:1", True), ("tcp://[::1]:1", True), ("tcp://localhost:1", True),
     ("tcp://192.0.2.7:1", False), ("tcp://*:1", False), ("tcp://0.0.0.0:1", False),
     ("tcp://[::]:1", False),
     ("tcp://localhost.example:1", False), ("tcp://[fe80::1]:1", False)],
)  # fmt: skip
def test_what_is_on_this_host(where, local):
    assert parse_endpoint(where).local == local


@pytest.mark.parametrize(
    ("said", "text"),
    [({"keys": "/k", "insecure": True}, "leave one"), ({"peer": "x"}, "say keys"),
     ({"keys": "/k", "postcopy_link": "direct"}, "not encrypted")],
)  # fmt: skip
def test_parameters_that_make_no_sense(said, text):
    with pytest.raises(UsageError, match=text):
        Parameters(**said).checked()


def hello(**said):
    return Hello(PROTOCOL, "x", "u", "image", [], 1, 64, **said)


@pytest.mark.parametrize(
    ("message", "secured", "field"),
    [(hello(), True, "key"), (hello(key=b"x" * 39), True, "key"), (hello(key=KEY), False, "key"),
     (hello(key=KEY, capabilities=[POSTCOPY, DIRECT]), True, DIRECT),
     (Resume(PROTOCOL, "u", 1), True, "key"), (Resume(PROTOCOL, "u", 1, KEY), False, "key")],
)  # fmt: skip
def test_hellos_that_are_refused(message, secured, field):
    with pytest.raises(PeerRefused) as refused:
        check_key(message, secured=secured)
    assert refused.value.data["field"] == field


def test_hellos_that_are_taken():
    check_key(hello(key=KEY, capabilities=[POSTCOPY]), secured=True)
    check_key(hello(capabilities=[POSTCOPY, DIRECT]), secured=False)


def test_keys_in_a_manifest():
    """Paths begin at the manifest; at another host they are absolute."""
    item = {"source": "image:vm", "destination": "tcp://192.0.2.7:1", "keys": "k", "peer": "kvm7"}
    (found,) = manifest({"items": [item]}, "/m").items
    p = found.parameters().checked()
    assert (p.keys, p.peer, p.insecure) == ("/m/k", "kvm7", False)
    away = item | {"host": "kvm1", "source": "image:/vm"}
    with pytest.raises(UsageError, match="keys: at another host"):
        manifest({"items": [away]}, "/m")
