"""Where `--web` listens, and who may ask there. Pure.

A page of somebody else's that a browser has open can reach loopback too: a name of his that he
makes resolve to 127.0.0.1 would be his own origin (DNS rebinding), and then he reads along. So on
loopback the Host header must name loopback.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ...transport.errors import UsageError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """`host`: an address or a name; `port`: 0 is any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def parse_address(text: str) -> Address:
    """[HOST:]PORT, loopback without HOST. UsageError if it is none."""
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+):)?([0-9]{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise UsageError(
            f"--web {text}: write [HOST:]PORT, such as 8080 or 192.0.2.7:8080; port 0 is any"
        )
    host = (match[1] or LOOPBACK).strip("[]")
    return Address(LOOPBACK if host.lower() == "localhost" else host, int(match[2]))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def may_ask(host_header: str, address: Address) -> bool:
    """Whether a request with this Host is answered. The port does not count: tunnels change it."""
    if not address.loopback:
        return True
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::[0-9]{1,5})?", host_header.strip())
    return match is not None and is_loopback(match[1].strip("[]"))
