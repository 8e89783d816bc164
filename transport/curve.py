"""Who may join a link: the keys of both its ends (CurveZMQ, RFC 26), or the token of a channel
(PLAIN, RFC 24), and ZAP's answers (RFC 27).

Keys are Curve25519's, in Z85 (RFC 32): 40 characters. Who listens has a secret key, and says of
each client key whether it may connect; who connects knows the one public key that must be at the
other end. Without keys a channel is joined by whoever was told its token, in the clear: that keeps
strangers off it, not who listens on the way. Sans-IO: no file, no socket; nothing here makes a key.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import msgspec

KEY_CHARACTERS = 40
CHANNEL_USER = b"channel"  # PLAIN wants a name as well
Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_VALUES = {character: value for value, character in enumerate(Z85)}
_GROUP = 5  # characters, for 4 bytes


class Pair(NamedTuple):
    """A public key and its secret one, in Z85."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:  # a secret is nothing to print
        return f"<Pair {self.public.decode(errors='replace')}>"


class Dials(msgspec.Struct, frozen=True, tag="dials"):
    """What who connects has: the key that must be at the other end, and its own."""

    server: bytes
    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"<Dials {self.server.decode(errors='replace')}>"


class Binds(msgspec.Struct, frozen=True, tag="binds"):
    """What the channels of one connection listen with: a key that only its other end was told, and
    the one client that may join. `domain`: the uuid of what moves."""

    secret: bytes
    client: bytes
    domain: str
    mechanism: ClassVar[str] = "CURVE"

    def __repr__(self) -> str:
        return f"<Binds {self.domain}>"

    def admits(self, key: bytes) -> bool:
        return hmac.compare_digest(key, self.client)


class Invites(msgspec.Struct, frozen=True, tag="invites"):
    """What a channel without keys listens with: the token that its other end was told."""

    token: bytes
    domain: str = "pageferry"
    mechanism: ClassVar[str] = "PLAIN"
    secret: ClassVar[bytes] = b""

    def __repr__(self) -> str:
        return "<Invites>"

    def admits(self, key: bytes) -> bool:
        return hmac.compare_digest(key, password(self.token))


def password(token: bytes) -> bytes:
    """How a token is said on a channel without keys."""
    return token.hex().encode()


class Gatekeeper(Protocol):
    """Who listens: CURVE or PLAIN, its secret key, a name for the log of libzmq, and whom it lets
    in."""

    @property
    def mechanism(self) -> str: ...

    @property
    def secret(self) -> bytes: ...

    @property
    def domain(self) -> str: ...

    def admits(self, key: bytes) -> bool: ...


def is_key(text: bytes) -> bool:
    """True if `text` is a key: 40 characters of Z85 that stand for 32 bytes."""
    if len(text) != KEY_CHARACTERS or not all(character in _VALUES for character in text):
        return False
    groups = (text[at : at + _GROUP] for at in range(0, KEY_CHARACTERS, _GROUP))
    return all(_number(group) < 1 << 32 for group in groups)


def _number(group: bytes) -> int:
    number = 0
    for character in group:
        number = number * 85 + _VALUES[character]
    return number


def as_text(key: bytes) -> bytes:
    """A key of 32 bytes in Z85."""
    text = bytearray()
    for at in range(0, len(key), 4):
        number = int.from_bytes(key[at : at + 4], "big")
        text += bytes(Z85[number // 85**place % 85] for place in range(_GROUP - 1, -1, -1))
    return bytes(text)


def zap_answer(request: Sequence[bytes], gatekeeper: Gatekeeper) -> list[bytes]:
    """The answer to what libzmq asks of a connection: version, number, domain, address, identity,
    mechanism, and the key, or a name and a password. Whatever is not exactly that, and admitted, is
    turned away. The user id of messages that come on it is the key, in Z85."""
    number = request[1] if len(request) > 1 else b""
    said = b""
    if len(request) > 5 and request[0] == b"1.0":
        said = _said(gatekeeper.mechanism, request[5:])
    if said and request[2] == gatekeeper.domain.encode() and gatekeeper.admits(said):
        user = said if gatekeeper.mechanism == "CURVE" else CHANNEL_USER
        return [b"1.0", number, b"200", b"", user, b""]
    return [b"1.0", number, b"400", b"not listed", b"", b""]


def _said(mechanism: str, rest: Sequence[bytes]) -> bytes:
    """What a request says to be let in by; b"" if it is of another mechanism."""
    if mechanism == "CURVE" and len(rest) == 2 and rest[0] == b"CURVE" and len(rest[1]) == 32:
        return as_text(rest[1])
    if mechanism == "PLAIN" and len(rest) == 3 and rest[:2] == [b"PLAIN", CHANNEL_USER]:
        return rest[2]
    return b""
