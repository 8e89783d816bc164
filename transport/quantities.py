"""Sizes, rates and durations as people write them: 512M, 10Gbit, 500MB, 300ms. Pure.

Memory sizes are binary (512M = 512 MiB), as on QEMU's command line. Rates are decimal, as
networks are sold: 10Gbit = 1.25e9 bytes a second, 500MB = 5e8 bytes a second.
"""

from __future__ import annotations

import re

from .errors import UsageError

# 18 digits: no float of them is infinite
_NUMBER = r"(\d{1,18}(?:\.\d+)?)"
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Bytes: 4096, 64K, 512M, 2G, 512MiB."""
    match = re.fullmatch(_NUMBER + r"\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise UsageError(f"{text!r} is no size: write 512M or 2G")
    return int(float(match[1]) * _BINARY[match[2]])


def parse_rate(text: str) -> int:
    """Bytes a second: 10Gbit, 500MB, 1.5GB/s; 0 means no limit. A bare number is bytes."""
    match = re.fullmatch(
        _NUMBER + r"\s*([kmgt]?)(i?)(bit|b|byte|bytes|)(?:/s|ps)?", text.strip().lower()
    )
    if not match:
        raise UsageError(f"{text!r} is no rate: write 10Gbit or 500MB")
    scale = (_BINARY if match[3] else _DECIMAL)[match[2]]
    return int(float(match[1]) * scale / (8 if match[4] == "bit" else 1))


def parse_duration(text: str) -> float:
    """Seconds: 300ms, 2s, 1min. A bare number is milliseconds, as QEMU's downtime-limit."""
    match = re.fullmatch(_NUMBER + r"\s*(us|ms|s|min|h|)", text.strip().lower())
    if not match:
        raise UsageError(f"{text!r} is no duration: write 300ms or 2s")
    return float(match[1]) * _SECONDS[match[2] or "ms"]


def format_bytes(count: float) -> str:
    """1.5 GiB, 12 MiB, 900 B."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_rate(per_second: float) -> str:
    """Bytes a second, decimal: 1.25 GB/s."""
    for unit in ("B", "kB", "MB"):
        if per_second < 1000:
            return f"{per_second:.0f} {unit}/s"
        per_second /= 1000
    return f"{per_second:.2f} GB/s"


def format_seconds(seconds: float) -> str:
    """420 ms, 12.3 s, 4 min 05 s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
