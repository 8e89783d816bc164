"""What a migration, a batch, a receiver is, for Prometheus: names begin with pageferry_, units are
bytes and seconds, what only grows ends in _total (prometheus.io/docs/practices/naming). The list is
in docs/view.md. Reports in, metric families out; nothing is kept between two scrapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..._version import __version__
from ..report.charts import number
from ..report.record import Record
from ..report.sections import mapping

STATES = (
    "none", "setup", "active", "pre-switchover", "device", "postcopy-active", "postcopy-paused",
    "postcopy-recover", "cancelling", "completed", "failed", "cancelled",
)  # fmt: skip
ITEM_STATES = ("pending", "running", "waiting", "completed", "failed")
_MS = 1000.0
_MOST_COLUMNS = 64


class _Once(Collector):
    """Families that were made already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def encoder(accept: str) -> tuple[Callable[[Iterable[Metric]], bytes], str]:
    """What makes text of families in the format that the scraper takes, and its content type."""
    encode, content_type = choose_encoder(accept)

    def text(families: Iterable[Metric]) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Once(list(families)))
        return encode(registry)

    return text, content_type


def about(command: str) -> Iterator[Metric]:
    info = InfoMetricFamily("pageferry_build", "What runs here")
    info.add_metric([], {"version": __version__, "command": command})
    yield info


def _gauge(name: str, text: str, value: object, scale: float = 1.0) -> Iterator[Metric]:
    if (plain := number(value)) is not None:
        yield GaugeMetricFamily(name, text, plain / scale)


def _counter(name: str, text: str, value: object, scale: float = 1.0) -> Iterator[Metric]:
    if (plain := number(value)) is not None:
        yield CounterMetricFamily(name, text, plain / scale)


def _by(family: Any, values: Mapping[str, object], scale: float = 1.0) -> Iterator[Metric]:
    """`family` with one sample for each label value that has a number."""
    for label, value in values.items():
        if (plain := number(value)) is not None:
            family.add_metric([_text(label)], plain / scale)
    yield family


def _text(label: str) -> str:
    """A label that any format can hold."""
    return label.encode("utf-8", "replace").decode("utf-8")[:200]


def migration(record: Record) -> Iterator[Metric]:
    """One migration, as it is now."""
    report = record.report
    ram, progress = mapping(report.get("ram")), mapping(report.get("progress"))
    names = InfoMetricFamily("pageferry_migration", "What moves where")
    names.add_metric([], {
        "source": _text(record.source), "destination": _text(record.destination)
    })  # fmt: skip
    yield names
    status = report.get("status", "none")
    state = GaugeMetricFamily(
        "pageferry_migration_state", "1 for the state that it is in", labels=["state"]
    )
    yield from _by(state, {name: int(name == status) for name in STATES})
    yield from _sizes(report, ram, progress)
    yield from _times(report, progress)
    yield from _postcopy(report)
    yield from _processes(record)


def _sizes(
    report: Mapping[str, Any], ram: Mapping[str, Any], progress: Mapping[str, Any]
) -> Iterator[Metric]:
    yield from _gauge("pageferry_ram_bytes", "Guest memory", ram.get("total"))
    yield from _gauge("pageferry_round_bytes", "Size of this round", progress.get("round-bytes"))
    yield from _gauge("pageferry_remaining_bytes", "Left of this round", ram.get("remaining"))
    yield from _counter("pageferry_wire_bytes", "Sent or received", report.get("wire-bytes"))
    pages = CounterMetricFamily(
        "pageferry_pages", "Pages moved: with their content, or zero", labels=["kind"]
    )
    yield from _by(pages, {"normal": ram.get("normal"), "zero": ram.get("duplicate")})
    codecs = CounterMetricFamily(
        "pageferry_codec_pages", "Pages with content by how they travelled", labels=["codec"]
    )
    yield from _by(codecs, mapping(report.get("codec-pages")))
    yield from _deltas(mapping(report.get("xbzrle-cache")))
    yield from _counter("pageferry_rounds", "Rounds begun", ram.get("dirty-sync-count"))
    yield from _counter(
        "pageferry_lost_frames", "Frames lost and sent again", report.get("lost-frames")
    )
    for name, text in (
        ("rate", "Guest memory moved a second, over two seconds"),
        ("wire-rate", "Bytes on the wire a second, over two seconds"),
        ("dirty-rate", "What the guest wrote a second, at the last look"),
    ):
        metric = "guest_rate" if name == "rate" else name.replace("-", "_")
        yield from _gauge(f"pageferry_{metric}_bytes_per_second", text, progress.get(name))


def _deltas(cache: Mapping[str, Any]) -> Iterator[Metric]:
    """Pages sent before; names as in query-migrate."""
    yield from _gauge("pageferry_xbzrle_cache_size_bytes", "What pages sent before may take",
                      cache.get("cache-size"))  # fmt: skip
    for name, text in (
        ("bytes", "Of deltas, and of pages that overflowed"),
        ("pages", "Pages with content that were in the cache"),
        ("cache-miss", "Pages with content that were not"),
        ("overflow", "Pages whose delta was larger than they are"),
    ):
        metric = name.replace("-", "_")
        yield from _counter(f"pageferry_xbzrle_{metric}", text, cache.get(name))
    yield from _gauge("pageferry_xbzrle_cache_miss_ratio", "Of this round's pages, those that were "
                      "not in the cache", cache.get("cache-miss-rate"))  # fmt: skip
    yield from _gauge("pageferry_xbzrle_encoding_ratio", "Bytes of this round's pages in the cache "
                      "by those of their deltas", cache.get("encoding-rate"))  # fmt: skip


def _times(report: Mapping[str, Any], progress: Mapping[str, Any]) -> Iterator[Metric]:
    throttle = report.get("cpu-throttle-percentage")
    yield from _gauge("pageferry_throttle_ratio", "Of its time that the guest loses", throttle, 100)
    yield from _gauge("pageferry_eta_seconds", "Expected to take", progress.get("eta"))
    for name, metric, text in (
        ("total-time", "elapsed", "Since it began"),
        ("setup-time", "setup", "Until the first round"),
        ("downtime", "downtime", "How long the guest stood still"),
        ("expected-downtime", "expected_downtime", "If it were stopped now"),
        ("downtime-limit", "downtime_limit", "How long it may stand still"),
    ):
        yield from _gauge(f"pageferry_{metric}_seconds", text, report.get(name), _MS)


def _postcopy(report: Mapping[str, Any]) -> Iterator[Metric]:
    yield from _counter(
        "pageferry_postcopy_requests", "Pages asked for", report.get("postcopy-requests")
    )
    yield from _counter("pageferry_recoveries", "Of a connection", report.get("recoveries"))
    dist = report.get("postcopy-latency-dist")
    counts = [number(n) for n in dist[:_MOST_COLUMNS]] if isinstance(dist, list) else []
    if not counts or any(n is None for n in counts):
        return
    so_far, buckets = 0.0, []
    for i, count in enumerate(counts):  # column i: 2^i to 2^(i+1) microseconds
        so_far += count or 0.0
        buckets.append((repr(2.0 ** (i + 1) / 1e6), so_far))
    buckets.append(("+Inf", so_far))
    mean = number(report.get("postcopy-latency")) or 0.0
    family = HistogramMetricFamily(
        "pageferry_fault_latency_seconds", "How long the guest waited for a page"
    )
    family.add_metric([], buckets, sum_value=mean / 1e9 * so_far)
    yield family


def _processes(record: Record) -> Iterator[Metric]:
    cpu = CounterMetricFamily("pageferry_process_cpu_seconds", "Processor time", labels=["process"])
    yield from _by(cpu, {use.name: use.cpu_time for use in record.uses})
    for kind, text in (
        ("cpu", "Share of a processor"),
        ("wait", "Share of the time that it waited for the link"),
        ("codec", "Share of a processor in the codec"),
    ):
        family = GaugeMetricFamily(
            f"pageferry_process_{kind}_ratio", f"{text}, over two seconds", labels=["process"]
        )
        yield from _by(family, {use.name: getattr(use, kind) for use in record.uses})
    memory = GaugeMetricFamily(
        "pageferry_process_memory_bytes", "The most it had of its own", labels=["process"]
    )
    yield from _by(memory, {use.name: use.memory for use in record.uses})


def batch(query: Mapping[str, Any]) -> Iterator[Metric]:
    """A batch, as it is now."""
    items = GaugeMetricFamily("pageferry_batch_items", "Items by state", labels=["state"])
    yield from _by(items, {state: query.get(state, 0) for state in ITEM_STATES})
    yield from _gauge("pageferry_batch_bytes", "Memory of all items but failed ones",
                      query.get("bytes"))  # fmt: skip
    yield from _gauge("pageferry_batch_done_bytes", "Of it, what is there",
                      query.get("bytes-done"))  # fmt: skip
    yield from _rate(query)
    yield from _gauge("pageferry_eta_seconds", "Expected to take", query.get("eta"))


def receiver(query: Mapping[str, Any], running: list[dict[str, Any]]) -> Iterator[Metric]:
    """A receiver, as it is now."""
    ended = CounterMetricFamily(
        "pageferry_arrivals", "Migrations that have ended", labels=["outcome"]
    )
    yield from _by(ended, {n: query.get(n, 0) for n in ("completed", "failed", "cancelled")})
    yield from _gauge("pageferry_arriving", "Migrations under way", query.get("running"))
    yield from _gauge("pageferry_arrived_bytes", "Memory of those that arrived, and of those "
                      "under way what is there", query.get("bytes-done"))  # fmt: skip
    yield from _rate(query)


def _rate(query: Mapping[str, Any]) -> Iterator[Metric]:
    """Of all together."""
    yield from _gauge(
        "pageferry_total_rate_bytes_per_second",
        "Guest memory moved a second by all together, over two seconds",
        query.get("rate"),
    )
    wire = sum(
        number(mapping(mapping(item.get("migration")).get("progress")).get("wire-rate")) or 0.0
        for item in query.get("items") or ()
    )
    if math.isfinite(wire):
        yield from _gauge("pageferry_total_wire_rate_bytes_per_second",
                          "Bytes on the wire a second, all together", wire)  # fmt: skip
