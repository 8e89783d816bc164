"""A directory of keys: one's own, and those of peers that may be talked to.

    DIR/secret.key       ours; 0600, and nobody else's
    DIR/public.key       what to give to peers
    DIR/allowed/NAME.key a peer's public key: it may send here, and be sent to

A file is a line with the key, in Z85, and lines that begin with `#`. Files are written whole or not
at all, and looked at each time somebody asks, so that what is allowed or revoked counts at once;
read are those that have changed.
Knows no socket and no migration.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator

import zmq

from .curve import KEY_CHARACTERS, Dials, Pair, is_key
from .errors import HostLacks, UsageError

_SECRET, _PUBLIC, _ALLOWED, _SUFFIX = "secret.key", "public.key", "allowed", ".key"
# A host's name or address, so that who is dialled can be found by it.
_NAME = re.compile(r"[A-Za-z0-9:][A-Za-z0-9._:-]{0,99}")
# What needs no quotes in a shell, and is no option: one key in some thousands consists of it. That
# takes 12 bits of how a key was chosen; the best attacks on Curve25519 do not gain by it.
_PLAIN = re.compile(rb"[0-9A-Za-z][0-9A-Za-z.:+=/@%-]*")
_MOST_BYTES = 4096
# What says that this host has no room just now, and nothing of who is allowed.
_MOMENTARY = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EIO, errno.ESTALE}
_Stamp = tuple[int, int, int, int]


def new_pair() -> Pair:
    """A new pair of keys. HostLacks if libzmq was built without CURVE."""
    if not zmq.has("curve"):
        raise HostLacks("keys need a libzmq with CURVE (libsodium): pip install --upgrade pyzmq")
    return Pair(*zmq.curve_keypair())


def parse_key(text: bytes) -> bytes:
    """The key in a file's text; ValueError if that is not one key and comments."""
    found = []
    for line in (line.strip() for line in text.splitlines()):
        if is_key(line):
            found.append(line)
        elif line and not line.startswith(b"#"):
            raise ValueError(f"a line is no key (of {KEY_CHARACTERS} characters) and no # comment")
    if len(found) != 1:
        raise ValueError("it has more than one key" if found else "no key is in it")
    return found[0]


def public_key(text: str) -> bytes:
    """`text` as a public key; UsageError if it is none."""
    key = text.strip().encode(errors="replace")
    if not is_key(key):
        raise UsageError(
            f"{text[:80]!r} is no public key: give the {KEY_CHARACTERS} characters that "
            f"`pageferry keys show` prints at the peer"
        )
    return key


class KeyDirectory:
    """The keys in `path`, which must have one of its own: UsageError if not, or if others could
    have changed or read what is there."""

    domain = "pageferry"
    mechanism = "CURVE"

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._check_folder(self.path)
        self._check_folder(os.path.join(self.path, _ALLOWED))
        self.secret = self._own_secret()
        self.public: bytes = zmq.curve_public(self.secret)
        self._read_before: dict[str, tuple[_Stamp, bytes]] = {}  # by name: how it was, its key

    def __repr__(self) -> str:
        return f"<KeyDirectory {self.path}>"

    @staticmethod
    def create(path: str) -> KeyDirectory:
        """Make `path` and a key in it; UsageError if it has one already."""
        path = os.path.abspath(path)
        try:
            for folder in (path, os.path.join(path, _ALLOWED)):
                with contextlib.suppress(FileExistsError):
                    os.makedirs(folder, 0o700)
            if os.path.lexists(os.path.join(path, _SECRET)):
                raise UsageError(
                    f"{path} has a key already; `pageferry keys show --keys {path}` shows it"
                )
            pair = new_pair()
            while not _PLAIN.fullmatch(pair.public):
                pair = new_pair()
            _write(os.path.join(path, _PUBLIC), b"# public key: give it to peers", pair.public)
            _write(
                os.path.join(path, _SECRET), b"# secret key: it stays here", pair.secret, new=True
            )
        except OSError as e:
            raise UsageError(f"cannot make keys in {path}: {e.strerror}") from e
        return KeyDirectory(path)

    def _check_folder(self, folder: str) -> None:
        try:
            found = os.stat(folder)
        except PermissionError as e:
            raise self._closed() from e
        except OSError as e:
            raise UsageError(
                f"cannot read the keys in {self.path} ({e.strerror}): `pageferry keys new --keys "
                f"{self.path}` makes some"
            ) from e
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{folder} is no directory of keys")
        _check_owner(folder, found, 0o022)

    def _own_secret(self) -> bytes:
        path = os.path.join(self.path, _SECRET)
        try:
            return _read(path, 0o077)
        except FileNotFoundError as e:
            raise UsageError(
                f"{self.path} has no key: `pageferry keys new --keys {self.path}` makes one"
            ) from e
        except PermissionError as e:
            raise self._closed() from e
        except (OSError, ValueError) as e:
            raise UsageError(f"cannot read the key {path}: {_why(e)}") from e

    def _closed(self) -> UsageError:
        uid = os.geteuid()
        return UsageError(
            f"user {uid} may not read the keys in {self.path}: give them to it (chown -R {uid} "
            f"{self.path}), or use keys of its own"
        )

    # ---- peers -----------------------------------------------------------------------------

    def _listed(self) -> Iterator[tuple[str, tuple[_Stamp, bytes]]]:
        """Files and keys; one that is damaged or that others may write allows nobody."""
        folder = os.path.join(self.path, _ALLOWED)
        for name in self._names(folder):
            if name.endswith(_SUFFIX) and not name.startswith("."):
                with contextlib.suppress(ValueError, UsageError):
                    found = self._look_at(folder, name)
                    if found is not None:
                        yield name, found

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except OSError as e:
            return list(self._read_before) if e.errno in _MOMENTARY else []

    def _look_at(self, folder: str, name: str) -> tuple[_Stamp, bytes] | None:
        """What is in a file; what was, if it is as it was, or cannot be looked at just now."""
        before, path = self._read_before.get(name), os.path.join(folder, name)
        try:
            stamp = _stamp(os.lstat(path))
            if before is not None and before[0] == stamp:
                return before
            return stamp, _read(path, 0o022)
        except OSError as e:
            return before if e.errno in _MOMENTARY else None

    def listed(self) -> dict[str, bytes]:
        """The keys of peers by name, as they are now; empty if they cannot be read. Where this host
        has no descriptor left, say, as they were."""
        self._read_before = dict(self._listed())
        return {name.removesuffix(_SUFFIX): key for name, (_, key) in self._read_before.items()}

    def admits(self, key: bytes) -> bool:
        """Whether the peer with this key is listed now."""
        return key in self.listed().values()

    def allow(self, key: bytes, name: str = "") -> str:
        """List a peer's key; its name, which is made of the key if none is given. Listing it again
        changes nothing."""
        if key == self.public:
            raise UsageError("that is this directory's own key: allow it at the peer")
        listed = self.listed()
        known = next((known for known, other in listed.items() if other == key), None)
        if known is not None and name in ("", known):
            return known
        if known is not None:
            raise UsageError(f"this key is listed as {known} already: revoke that first")
        name = name or f"peer-{hashlib.sha256(key).hexdigest()[:8]}"
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name[:80]!r} is no name for a peer: letters, digits and . _ - :")
        path = os.path.join(self.path, _ALLOWED, name + _SUFFIX)
        if os.path.lexists(path):
            raise UsageError(f"another key is listed as {name}: revoke that first")
        try:
            _write(path, b"# public key of a peer", key, new=True)
        except OSError as e:
            raise UsageError(f"cannot write {path}: {e.strerror}") from e
        return name

    def revoke(self, what: str) -> list[str]:
        """List a peer, by name or key, no more; its names. UsageError if it had none."""
        folder = os.path.join(self.path, _ALLOWED)
        listed = self.listed()
        key = listed.get(what, what.encode(errors="replace"))
        names = [name for name, other in listed.items() if other == key]
        if not names and _NAME.fullmatch(what) and os.path.lexists(f"{folder}/{what}{_SUFFIX}"):
            names = [what]  # damaged
        if not names:
            raise UsageError(
                f"no peer is listed as {what[:80]!r} in {self.path}: `pageferry keys list --keys "
                f"{self.path}` shows who is"
            )
        for name in names:
            os.unlink(os.path.join(folder, name + _SUFFIX))
        _sync(folder)
        return names

    def server(self, host: str, peer: str) -> bytes:
        """The key that must be at `host`: that of `peer`, if one is named, else that listed as
        `host`, else the only one that is listed."""
        listed = self.listed()
        if peer:
            if peer not in listed:
                raise UsageError(f"no peer is listed as {peer[:80]!r} in {self.path}")
            return listed[peer]
        if host in listed:
            return listed[host]
        if len(listed) == 1:
            return next(iter(listed.values()))
        if not listed:
            raise UsageError(
                f"no peer is listed in {self.path}: `pageferry keys allow KEY --keys {self.path}`, "
                f"with the key that `pageferry keys show` prints at {host or 'the peer'}"
            )
        raise UsageError(
            f"{len(listed)} peers are listed in {self.path}, none as {host or 'this address'}: "
            f"list its key with --name {host or 'NAME'}, or say which one it is with --peer NAME"
        )

    def dials(self, server: bytes) -> Dials:
        """To connect to whoever has the key `server`."""
        return Dials(server, self.public, self.secret)


# ---- files -----------------------------------------------------------------------------------


def _check_owner(path: str, found: os.stat_result, forbidden: int) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise UsageError(f"{path} belongs to somebody else (uid {found.st_uid}): chown it to you")
    if found.st_mode & forbidden:
        mode = "700" if stat.S_ISDIR(found.st_mode) else "600"
        raise UsageError(f"others may use {path}: chmod {mode} it; if they did, make a new key")


def _read(path: str, forbidden: int) -> bytes:
    """The key in a file of ours. `forbidden`: bits that its mode must not have."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no file")
        _check_owner(path, found, forbidden)
        return parse_key(os.read(fd, _MOST_BYTES))
    finally:
        os.close(fd)


def _stamp(found: os.stat_result) -> _Stamp:
    """Is another one when a file has been written, replaced, given away or opened to others."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _write(path: str, comment: bytes, key: bytes, *, new: bool = False) -> None:
    """Whole or not at all, 0600. `new`: FileExistsError if something is there."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(comment + b"\n" + key + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync(folder)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _why(error: Exception) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else str(error)
