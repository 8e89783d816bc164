"""What a user may ask for, checked once. Pure.

Names follow QEMU's migration parameters (qapi/migration.json): multifd-channels is `workers`,
multifd-compression is `codec`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from ..transport.codecs import CODECS, codec_names, make_codec
from ..transport.errors import UsageError
from ..transport.messages import MAX_WORKERS, XBZRLE
from ..transport.pages import PAGE_SIZE
from ..transport.quantities import parse_duration, parse_rate, parse_size
from ..transport.wire import MAX_BATCH_PAGES
from .goals import GOALS
from .throttling import FIELDS as THROTTLE_FIELDS
from .throttling import Rules, field_of

# More senders than this have not paid anywhere; each costs a process at both ends.
_MOST_DEFAULT_WORKERS = 8


def default_workers() -> int:
    """One sender a CPU this process may use, at most 8."""
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_DEFAULT_WORKERS))


# When the guest is started at the destination before its memory is there.
NEVER, MANUAL, NOW, AUTO = "never", "manual", "now", "auto"


@dataclass(frozen=True)
class Parameters:
    """A migration's parameters. `max_bandwidth`, `max_postcopy_bandwidth`: bytes a second, 0
    without limit; `downtime_limit`, `postcopy_latency_target`: seconds; `level`: None for the
    codec's own default; `postcopy`: never, manual, now, auto or after=ROUNDS; `preempt`:
    requested pages on a channel of their own (QEMU: postcopy-preempt); `postcopy_link`: what that
    channel is, zmq or direct (a connection of its own); `quit_source`: a VM that has moved is
    ended here; `pause_before_switchover`: it waits there for migrate-continue; `release_ram`: in a
    postcopy, memory here is given back as it arrives there; `verify`: None for yes if nobody writes
    the memory; `goal`: workers and
    codec are chosen while it runs (goals.py), up to so many workers and only this codec, unless
    that is auto; "" for none; `keys`: a directory of keys (keys.py), "" for none; `peer`: the name
    that the other end has in it, "" for the one that fits the address; `insecure`: without keys to
    another host; `codec`: a codec's name, auto, or xbzrle, by itself or as xbzrle+NAME; for that
    `xbzrle_cache_size`: bytes of pages sent before that are kept; from `auto_converge` on: how a
    guest is slowed down (throttling.py), percentages, bytes a second, seconds."""

    workers: int = 0
    codec: str = "auto"
    level: int | None = None
    max_bandwidth: int = 0
    downtime_limit: float = 0.3
    max_rounds: int = 30
    verify: bool | None = None
    batch_pages: int = 256
    postcopy: str = NEVER
    preempt: bool = True
    max_postcopy_bandwidth: int = 0
    postcopy_latency_target: float = 0.0001
    postcopy_link: str = "zmq"
    quit_source: bool = False
    pause_before_switchover: bool = False
    release_ram: bool = False
    goal: str = ""
    keys: str = ""
    peer: str = ""
    insecure: bool = False
    xbzrle_cache_size: int = 64 << 20
    auto_converge: bool = False
    dirty_limit: bool = False
    cpu_throttle_initial: int = 20
    cpu_throttle_increment: int = 10
    cpu_throttle_tailslow: bool = False
    max_cpu_throttle: int = 99
    throttle_trigger_threshold: int = 50
    vcpu_dirty_limit: int = 0
    vcpu_dirty_limit_period: float = 1.0

    def checked(self) -> Parameters:
        """With defaults filled in, or UsageError that names the parameter."""
        p = self if self.workers else replace(self, workers=default_workers())
        _within("workers", p.workers, 1, MAX_WORKERS)
        _within("batch-pages", p.batch_pages, 16, MAX_BATCH_PAGES)
        _within("max-rounds", p.max_rounds, 1, 100_000)
        _within("downtime-limit (ms)", p.downtime_limit * 1000, 1, 2_000_000)
        for name in ("max_bandwidth", "max_postcopy_bandwidth"):
            shown = name.replace("_", "-")
            _within(f"{shown} (bytes a second)", getattr(p, name), 0, 1 << 50)
            if 0 < getattr(p, name) < 100_000:
                raise UsageError(f"{shown} below 100 kB/s would never end; 0 means no limit")
        _within("postcopy-latency-target (us)", p.postcopy_latency_target * 1e6, 20, 1e6)
        p.postcopy_rounds  # noqa: B018  raises if `postcopy` makes no sense
        if p.postcopy_link not in ("zmq", "direct"):
            raise UsageError(f"postcopy-link is zmq or direct, not {p.postcopy_link!r}")
        p._check_keys()
        p.throttle.checked()
        if p.postcopy != NEVER and p.verify:
            raise UsageError(
                "verify compares memory before the guest runs, and postcopy moves it afterwards: "
                "leave one of them out"
            )
        if p.release_ram and p.postcopy == NEVER:
            raise UsageError(
                "release-ram gives memory back once the guest runs elsewhere and its memory is "
                "still arriving: it needs --postcopy"
            )
        if p.goal not in ("", *GOALS):
            raise UsageError(f"goal is {', '.join(GOALS)}, not {p.goal!r}")
        _within("xbzrle-cache-size (bytes)", p.xbzrle_cache_size, PAGE_SIZE, 1 << 50)
        if p.page_codec not in ("auto", *CODECS):
            raise UsageError(f"there is no codec {p.codec!r}; choose from {codec_names()}")
        if p.page_codec != "auto":
            make_codec(p.page_codec, p.level)
        elif p.level is not None:
            raise UsageError(f"level needs a codec: one of {', '.join(CODECS)}")
        return p

    def _check_keys(self) -> None:
        if self.keys and self.insecure:
            raise UsageError("keys and insecure: leave one of them out")
        if self.peer and not self.keys:
            raise UsageError("peer names one of the keys in a directory: say keys as well")
        if self.keys and self.postcopy_link == "direct":
            raise UsageError(
                "postcopy-link direct is not encrypted: leave it out where there are keys"
            )

    @property
    def throttle(self) -> Rules:
        """How a guest that writes too fast is slowed down."""
        return Rules(
            self.auto_converge, self.dirty_limit, self.cpu_throttle_initial,
            self.cpu_throttle_increment, self.cpu_throttle_tailslow, self.max_cpu_throttle,
            self.throttle_trigger_threshold, self.vcpu_dirty_limit, self.vcpu_dirty_limit_period,
        )  # fmt: skip

    def on_this_host(self) -> Parameters:
        """For a migration that has both its ends here: no keys."""
        return replace(self, keys="", peer="", insecure=False)

    @property
    def deltas(self) -> bool:
        """Pages travel as what differs from what was sent before, where that is known."""
        return self.codec.partition("+")[0] == XBZRLE

    @property
    def page_codec(self) -> str:
        """The codec of pages that travel whole, and of deltas."""
        return (self.codec.partition("+")[2] or "none") if self.deltas else self.codec

    @property
    def postcopy_rounds(self) -> int | None:
        """N of `after=N`; None in the other modes."""
        if self.postcopy in (NEVER, MANUAL, NOW, AUTO):
            return None
        match = re.fullmatch(r"after=([0-9]{1,6})", self.postcopy)
        if not match or int(match[1]) < 1:
            raise UsageError(
                f"postcopy is now, auto, after=ROUNDS, manual or never, not {self.postcopy!r}"
            )
        return int(match[1])

    def qmp(self) -> dict[str, Any]:
        """As query-migrate-parameters says them."""
        return {
            "multifd-channels": self.workers,
            "multifd-compression": self.codec,
            "max-bandwidth": self.max_bandwidth,
            "downtime-limit": round(self.downtime_limit * 1000),
            "max-rounds": self.max_rounds,
            "batch-pages": self.batch_pages,
            "xbzrle-cache-size": self.xbzrle_cache_size,
            "postcopy": self.postcopy,
            "postcopy-preempt": self.preempt,
            "max-postcopy-bandwidth": self.max_postcopy_bandwidth,
            "postcopy-latency-target": round(self.postcopy_latency_target * 1e6),
            **({"goal": self.goal} if self.goal else {}),
            **(self.throttle.qmp() if self.throttle.on else {}),
            **({"pause-before-switchover": True} if self.pause_before_switchover else {}),
            **({"release-ram": True} if self.release_ram else {}),
        }


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low} to {high}, not {value:g}")


def changed(parameters: Parameters, arguments: dict[str, Any]) -> Parameters:
    """`parameters` with what migrate-set-parameters may change while it runs."""
    fields: dict[str, Any] = {}
    for name, value in arguments.items():
        match name:
            case "max-bandwidth":
                fields["max_bandwidth"] = parse_rate(str(value))
            case "max-postcopy-bandwidth":
                fields["max_postcopy_bandwidth"] = parse_rate(str(value))
            case "downtime-limit":
                fields["downtime_limit"] = parse_duration(str(value))
            case "max-rounds":
                # isdigit() takes "²" too, and int() does not
                if not (str(value).isdecimal() and len(str(value)) < 10):
                    raise UsageError(f"max-rounds must be a whole number, not {value!r}")
                fields["max_rounds"] = int(value)
            case "xbzrle-cache-size":
                fields["xbzrle_cache_size"] = parse_size(str(value))
            case _ if name in THROTTLE_FIELDS:
                field, fields[field] = field_of(name, value)
            case _:
                raise UsageError(
                    f"{name!r} cannot be set while a migration runs; max-bandwidth, "
                    f"max-postcopy-bandwidth, downtime-limit, max-rounds, xbzrle-cache-size and "
                    f"{', '.join(list(THROTTLE_FIELDS)[:-1])} can"
                )
    return replace(parameters, **fields).checked()
