"""The links that a measurement goes over: loopback, and one of our own whose rate is known.

A link says how to run a command on each of its sides. Knows no method.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from .lab import BenchError, Lab, undisturbed

# tbf of iproute2 (tc-tbf(8)): a burst of 256 KiB is 2 ms at this rate, and nothing that waits
# less than 50 ms is dropped.
_RATE, _BURST, _LATENCY = "1gbit", "256kb", "50ms"
# 198.18.0.0/15 is for benchmarks (RFC 2544).
_SOURCE_HOST, _DESTINATION_HOST = "198.18.0.1", "198.18.0.2"
_INTERFACE = "veth0"


@dataclass(frozen=True)
class Link:
    """`host`: where the destination listens; `source`, `destination`: what to put before a
    command that is to run on this side; `options`: what pageferry needs at both ends."""

    name: str
    host: str = "127.0.0.1"
    source: tuple[str, ...] = ()
    destination: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


LOOPBACK = Link("loopback")
SHAPED = "1Gbit"
LINKS = (LOOPBACK.name, SHAPED)


@contextlib.contextmanager
def shaped(lab: Lab) -> Iterator[Link]:
    """Two network namespaces and a link of 1 Gbit/s each way between them, while it lasts.

    BenchError if that cannot be had.
    """
    here, there = (f"pageferry-bench-{os.getpid()}-{side}" for side in ("source", "destination"))
    try:
        for namespace in (here, there):
            _do(lab, "ip", "netns", "add", namespace)
        _do(
            lab, "ip", "link", "add", _INTERFACE, "netns", here, "type", "veth",
            "peer", "name", _INTERFACE, "netns", there,
        )  # fmt: skip
        for namespace, host in ((here, _SOURCE_HOST), (there, _DESTINATION_HOST)):
            _set_up(lab, namespace, host)
        yield Link(
            SHAPED, _DESTINATION_HOST,
            ("ip", "netns", "exec", here), ("ip", "netns", "exec", there), ("--insecure",),
        )  # fmt: skip
    finally:
        with undisturbed(), contextlib.suppress(BenchError):
            for namespace in (here, there):
                lab.start(["ip", "netns", "delete", namespace]).join(10, check=False)


def _set_up(lab: Lab, namespace: str, host: str) -> None:
    """One side: its address, and the rate at which it sends."""
    _do(lab, "ip", "-n", namespace, "link", "set", "lo", "up")
    _do(lab, "ip", "-n", namespace, "address", "add", f"{host}/24", "dev", _INTERFACE)
    _do(lab, "ip", "-n", namespace, "link", "set", _INTERFACE, "up")
    _do(
        lab, "tc", "-n", namespace, "qdisc", "add", "dev", _INTERFACE, "root",
        "tbf", "rate", _RATE, "burst", _BURST, "latency", _LATENCY,
    )  # fmt: skip


def _do(lab: Lab, *argv: str) -> None:
    lab.start(list(argv)).join(10)
