"""What both ends of a migration have keys for, and what becomes of one without.

A coordinator that connects has a Dialling, one that listens a KeyDirectory; None if there are no
keys. The channels of a connection have keys of their own, which are made for it, told over the
control link, and forgotten with it: so whoever can join them was told in this migration.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache

from ..transport.curve import Binds, Dials, Pair, is_key
from ..transport.errors import PeerRefused, RemoteProtocolError, UsageError
from ..transport.keys import KeyDirectory, new_pair
from ..transport.links import Endpoint
from .parameters import Parameters

# How often it is looked whether the peer's key is still listed.
LOOK_SECONDS = 1.0
_log = logging.getLogger("pageferry")


class Dialling:
    """Our keys, and the key of who must be at the other end."""

    def __init__(self, directory: KeyDirectory, server: bytes) -> None:
        self.directory, self.server = directory, server
        self.curve: Dials = directory.dials(server)

    def __repr__(self) -> str:
        return f"<Dialling {self.server.decode()}>"

    def check(self) -> None:
        """PeerRefused if the other end's key is not listed any more."""
        if not self.directory.admits(self.server):
            raise _revoked(self.server, self.directory)


class Peer:
    """Who is connected to a listening end: its key, proved by the handshake."""

    def __init__(self, directory: KeyDirectory, key: bytes) -> None:
        self.directory, self.key = directory, key

    def __repr__(self) -> str:
        return f"<Peer {self.key.decode()}>"

    def check(self) -> None:
        """PeerRefused if its key is not listed any more."""
        if not self.directory.admits(self.key):
            raise _revoked(self.key, self.directory)


def same_peer(one: Peer | None, other: Peer | None) -> bool:
    """A message is from who began: another one's key will not do, whatever identity it has."""
    return (one.key if one is not None else b"") == (other.key if other is not None else b"")


def _revoked(key: bytes, directory: KeyDirectory) -> PeerRefused:
    return PeerRefused(
        f"the key {key.decode()} is not allowed any more at the end that has it in "
        f"{directory.path}",
        field="key",
    )


class ChannelKeys:
    """The keys that one end has on the channels of one connection; none if `secured` is False."""

    def __init__(self, secured: bool) -> None:
        self._pair = new_pair() if secured else None

    @property
    def public(self) -> bytes:
        """To be told to the other end."""
        return self._pair.public if self._pair is not None else b""

    def binds(self, theirs: bytes, uuid: str) -> Binds | None:
        """To listen for the other end, which has said that its key is `theirs`."""
        pair = self._checked(theirs)
        return Binds(pair.secret, theirs, uuid) if pair is not None else None

    def dials(self, theirs: bytes) -> Dials | None:
        """To connect to the other end, which has said that its key is `theirs`."""
        pair = self._checked(theirs)
        return Dials(theirs, pair.public, pair.secret) if pair is not None else None

    def _checked(self, theirs: bytes) -> Pair | None:
        if not is_key(theirs) if self._pair is not None else theirs:
            raise RemoteProtocolError("the peer's key of the channels is none")
        return self._pair


def dialling(parameters: Parameters, endpoint: Endpoint) -> Dialling | None:
    """What to connect to `endpoint` with. UsageError if there is no key for it, or if there are no
    keys and it is at another host."""
    if parameters.keys:
        directory = KeyDirectory(parameters.keys)
        return Dialling(directory, directory.server(endpoint.host, parameters.peer))
    check_open(endpoint, insecure=parameters.insecure, listens=False)
    return None


def check_links(links: Iterable[tuple[Parameters, Endpoint, bool]]) -> None:
    """UsageError, before anything moves, if one of many will not do. Each: what it is moved with,
    where to, and whether its source, and so its keys, are at this host."""
    seen = set()
    for p, endpoint, here in links:
        what = (p.keys, p.peer, p.insecure, endpoint.host, endpoint.scheme, here)
        if what in seen:
            continue
        seen.add(what)
        if here:
            dialling(p, endpoint)
        elif not p.keys:
            check_open(endpoint, insecure=p.insecure, listens=False)


def listening(endpoint: Endpoint, keys: str, *, insecure: bool) -> KeyDirectory | None:
    """What to listen at `endpoint` with. UsageError as in `dialling`."""
    if keys:
        return KeyDirectory(keys)
    check_open(endpoint, insecure=insecure, listens=True)
    return None


def check_open(endpoint: Endpoint, *, insecure: bool, listens: bool) -> None:
    """UsageError if a link without keys would leave this host and nobody said that it may; else a
    warning."""
    if endpoint.local:
        return
    if insecure:
        _warn(str(endpoint), listens)
        return
    what = "anybody who reaches it could send" if listens else "memory would travel in the clear"
    raise UsageError(
        f"{endpoint} is not on this host, and without keys {what}: say --keys DIR (`pageferry keys "
        f"new --keys DIR`), or --insecure if the network is trusted"
    )


@lru_cache(maxsize=256)
def _warn(where: str, listens: bool) -> None:
    """Once an address."""
    if listens:
        _log.warning(
            "insecure: whoever reaches %s may send a guest to this host, and whoever is on the way "
            "reads and changes its memory", where,
        )  # fmt: skip
    else:
        _log.warning(
            "insecure: memory travels to %s in the clear; whoever is on the way reads and changes "
            "it, and nobody checks who is there", where,
        )  # fmt: skip
