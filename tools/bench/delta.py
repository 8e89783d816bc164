"""Pages sent before as what differs (`--codec xbzrle`): what it saves on the wire, what it costs.

First the encodings alone, on one batch of pages of which some bytes have changed: bytes and
processor time a page, beside a rival that pageferry has not, zstd with the pages' former content
as its prefix. Then whole migrations of guests that write, over a link of a given rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...transport.codecs import make_codec, xbzrle
from ...transport.pages import PAGE_SIZE, WORDS
from ...transport.quantities import format_bytes, format_rate
from . import pageferry
from .lab import Lab, say
from .table import median, megabytes, number, render

_BATCH = 256
_LOOKS = 5
Pages = npt.NDArray[np.uint8]
# name: bytes of a page that are written, or what becomes of it
_CHANGES: dict[str, int | str] = {
    "1": 1,
    "8": 8,
    "64": 64,
    "512": 512,
    "moved by 24": "moved",
    "all": "all",
}
CODECS = ("none", "lz4", "zstd", "xbzrle", "xbzrle+lz4", "xbzrle+zstd")


@dataclass(frozen=True)
class _Guest:
    """A demo guest: `rate` pages a second, `changes` bytes of each."""

    name: str
    rate: int
    changes: int


GUESTS = (
    _Guest("slow, 8 bytes a page", 10_000, 8),
    _Guest("fast, 64 bytes a page", 60_000, 64),
    _Guest("whole pages", 10_000, PAGE_SIZE),
)


@dataclass
class Plan:
    """What to measure. Sizes in bytes, rates in bytes a second."""

    size: int
    rate: int
    content: str
    cache: int
    codecs: list[str]
    reps: int


@dataclass
class Row:
    """One migration."""

    guest: str
    codec: str
    rep: int
    outcome: pageferry.Outcome = field(repr=False)


def measure(lab: Lab, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """Encodings, then guests by codecs in turn."""
    alone = [_alone(content) for content in ("text", "random")]
    rows = []
    for rep in range(plan.reps):
        for guest in GUESTS:
            for codec in plan.codecs:
                rows.append(Row(guest.name, codec, rep, _move(lab, plan, guest, codec)))
                say(f"{guest.name}, {codec}, {rep + 1}: exit code {rows[-1].outcome.code}")
    title = (
        f"demo guests of {format_bytes(plan.size)} of {plan.content}, both ends on this host, "
        f"{format_rate(plan.rate)}, xbzrle-cache-size {format_bytes(plan.cache)}"
    )
    return "\n\n".join([*alone, f"{title}\n{_table(rows)}"]), [asdict(row) for row in rows]


def _move(lab: Lab, plan: Plan, guest: _Guest, codec: str) -> pageferry.Outcome:
    return pageferry.copy(
        lab,
        f"demo:?size={plan.size}&rate={guest.rate}&changes={guest.changes}&content={plan.content}",
        "demo:",
        ["--codec", codec, "--max-bandwidth", str(plan.rate), "--max-rounds", "8",
         "--xbzrle-cache-size", str(plan.cache)],
    )  # fmt: skip


def _table(rows: list[Row]) -> str:
    header = (
        "guest", "codec", "rounds", "s", "wire MB", "after round 1", "downtime ms", "senders CPU s",
        "receivers", "us a page", "hits", "encoding rate", "oracle",
    )  # fmt: skip
    lines = []
    for key in dict.fromkeys((row.guest, row.codec) for row in rows):
        mine = [row.outcome for row in rows if (row.guest, row.codec) == key]
        lines.append([*key, *_cells([outcome.report for outcome in mine])])
    return render(header, lines)


def _cells(reports: list[dict[str, Any]]) -> list[str]:
    """Medians; of migrations that gave up too."""

    def of(look: Callable[[dict[str, Any]], float]) -> float:
        return median([look(report) for report in reports])

    done = all(report.get("status") == "completed" for report in reports)
    cache = [report.get("xbzrle-cache") for report in reports]
    found = [c for c in cache if c]
    hits = [c["pages"] / max(1, c["pages"] + c["cache-miss"]) for c in found]
    saved = [c["pages"] * PAGE_SIZE / max(1, c["bytes"]) for c in found]
    senders, receivers = of(lambda r: _cpu(r, "sender")), of(lambda r: _cpu(r, "receiver"))
    pages = of(lambda r: r["ram"]["normal"])
    first = reports[0]["ram"]["total"]
    right = all(r.get("oracle", {}).get("ok") for r in reports)
    return [
        number(of(lambda r: r["ram"]["dirty-sync-count"]), 0),
        number(of(lambda r: r["total-time"]) / 1000),
        megabytes(of(lambda r: r["wire-bytes"])),
        f"{of(lambda r: r['ram']['normal-bytes']) / first - 1:.2f} x size",
        number(of(lambda r: r["downtime"]), 0) if done else "gives up",
        number(senders),
        # the source does not hear what they have used if it gives up
        number(receivers) if done else "-",
        number((senders + receivers) / pages * 1e6, 1) if done else "-",
        f"{median(hits):.0%}" if hits else "-",
        number(median(saved), 1) if saved else "-",
        ("right" if right else "WRONG") if done else "-",
    ]


def _cpu(report: dict[str, Any], role: str) -> float:
    """Processor seconds of all processes of one role."""
    rows = report.get("processes", [])
    return sum(int(row["cpu-time"]) for row in rows if row["name"].startswith(role)) / 1000


# ---- encodings alone -------------------------------------------------------------------------


def _alone(content: str) -> str:
    """A table: what each makes of a batch, and for how much."""
    base = _content(content)
    header = ("bytes written", *(f"{name}{unit}" for name in _WAYS for unit in (" B", " us")))
    lines = []
    for name, change in _CHANGES.items():
        new = _changed(base, change)
        cells = [name]
        for way in _WAYS.values():
            size, seconds = _cost(way, base, new)
            cells += [number(size / _BATCH, 0), number(seconds / _BATCH * 1e6, 1)]
        lines.append(cells)
    title = f"a batch of {_BATCH} pages of {content}: bytes and microseconds a page"
    return f"{title}\n{render(header, lines)}"


def _content(kind: str, seed: int = 7) -> Pages:
    draw = np.random.default_rng(seed)
    if kind == "random":
        return np.frombuffer(draw.bytes(_BATCH * PAGE_SIZE), np.uint8).reshape(_BATCH, PAGE_SIZE)
    words = [draw.bytes(int(n)).hex()[: int(n)] for n in draw.integers(2, 9, 4000)]
    picks = np.minimum(draw.zipf(1.3, _BATCH * PAGE_SIZE // 3), len(words)) - 1
    text = " ".join(words[i] for i in picks.tolist()).encode()
    return np.frombuffer(text[: _BATCH * PAGE_SIZE], np.uint8).reshape(_BATCH, PAGE_SIZE)


def _changed(base: Pages, change: int | str) -> Pages:
    if change == "moved":
        return np.ascontiguousarray(np.roll(base, 24, axis=1))
    if change == "all":  # by as much of the same kind
        return _content("random" if base.max() > 0x80 else "text", 8)
    new = base.copy()
    new[:, :: PAGE_SIZE // int(change)] += 1
    return new


def _cost(way: Callable[[Pages, Pages], int], base: Pages, new: Pages) -> tuple[int, float]:
    """Bytes, and the shortest of some looks, seconds."""
    took = []
    for _ in range(_LOOKS):
        begin = time.thread_time()
        size = way(base, new)
        took.append(time.thread_time() - begin)
    return size, min(took)


def _plain(name: str) -> Callable[[Pages, Pages], int]:
    codec = make_codec(name)
    return lambda base, new: len(codec.compress(new.tobytes()))


def _delta(layer: str) -> Callable[[Pages, Pages], int]:
    codec = make_codec(layer)

    def way(base: Pages, new: Pages) -> int:
        words = new.view(np.uint64).reshape(-1, WORDS)
        lengths, data = xbzrle.encode(base.view(np.uint64).reshape(-1, WORDS), words)
        whole = words[lengths == xbzrle.OVERFLOW].tobytes()
        size = len(codec.compress(data.tobytes())) + 2 * len(lengths)
        return size + len(codec.compress(whole)) if whole else size

    return way


def _with_prefix(base: Pages, new: Pages) -> int:
    """One zstd frame of the batch, the former pages before it: as far back as they are, and with
    room to find all of them (the level's own table has room for a sixteenth)."""
    import zstandard

    old = base.tobytes()
    how = zstandard.ZstdCompressionParameters.from_level(
        1, source_size=new.nbytes, dict_size=len(old), window_log=21, hash_log=19
    )
    prefix = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(compression_params=how, dict_data=prefix)
    return len(compressor.compress(new.tobytes()))


_WAYS = {
    "zstd": _plain("zstd"),
    "xbzrle": _delta("none"),
    "xbzrle+lz4": _delta("lz4"),
    "xbzrle+zstd": _delta("zstd"),
    "zstd-prefix": _with_prefix,
}
