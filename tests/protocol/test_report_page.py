"""The page of --report: whatever a record has, it is well-formed, and says no more than text."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.tools.report.page import render
from pageferry.tools.report.record import Phase, Record, Round, Sample
from pageferry.tools.report.recorder import KEPT_AT_AN_END, MOST_SAMPLES, Recorder
from pageferry.tools.report.sections import verdict

REPORT = {
    "status": "completed",
    "total-time": 4200,
    "setup-time": 200,
    "downtime": 73,
    "downtime-limit": 300,
    "ram": {"total": 1 << 30, "normal": 200_000, "duplicate": 62_144, "dirty-sync-count": 2},
    "wire-bytes": 5 << 27,
    "codec-pages": {"none": 100_000, "lz4": 100_000, "zstd": 0},
    "processes": [
        {"name": "source coordinator", "cpu-time": 300, "peak-memory": 1 << 25},
        {"name": "sender-0", "cpu-time": 3000, "peak-memory": 1, "wait-time": 9, "codec-time": 5},
    ],
    "postcopy-latency": 170_000,
    "postcopy-latency-dist": [0, 0, 0, 0, 0, 3, 20, 90, 5],
    "postcopy-latency-percentiles": {"p50": 150.0, "p90": 230.5, "p99": 400.0, "max": 480.1},
}
RECORD = Record(
    "demo:?size=1G", "tcp://192.0.2.7:4444", REPORT,
    {"max-bandwidth": 0, "downtime-limit": 300, "postcopy-preempt": True},
    {"Python": "3.11"},
    (Sample(0.5, 1e8, 5e7, 0.0), Sample(0.75, 2e8, 6e7, 3e6)),
    (Phase("setup", 0.0, 0.2), Phase("active", 0.2, 4.1), Phase("device", 4.1, 4.2)),
    (Round(1, 0.2, 4.0, 262_144, 1 << 29, 0.0, False), Round(2, 4.1, 4.2, 900, 1 << 20, 3e6, True)),
)  # fmt: skip


def parsed(record):
    """The page as a strict parser sees it."""
    text = render(record)
    text.encode()  # no lone surrogate
    return ElementTree.fromstring(text)


def drawing_numbers(page):
    """All numbers that something is drawn from."""
    for element in page.iter():
        if element.tag in ("svg", "rect", "line", "circle", "text", "polyline"):
            for name, value in element.items():
                if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                    yield float(value.removesuffix("%"))
                elif name == "points":
                    yield from (float(n) for n in re.split("[ ,]", value))


def text_of(page, where):
    return " ".join(page.find(where).itertext())


def test_a_whole_page():
    page = parsed(RECORD)
    assert text_of(page, ".//h1").split() == ["demo:?size=1G", "to", "tcp://192.0.2.7:4444"]
    said = text_of(page, ".//*[@id='verdict']")
    assert said == "Completed in 4.2 s, downtime 73 ms of 300 ms allowed."
    assert [h.text for h in page.iter("h2")] == [
        "Key figures", "Time line", "Throughput", "What the guest writes", "Rounds",
        "Fault latency", "Processes", "Pages", "Settings", "Host",
    ]  # fmt: skip
    assert len(page.findall(".//svg[@class='chart']")) == 4
    assert len(page.findall(".//polyline")) == 4
    assert json.loads(text_of(page, ".//pre[@id='raw']")) == REPORT
    assert page.find(".//data[@id='fault-p90']").get("value") == "230.5"
    assert "no limit" in "".join(page.itertext())
    assert page.find(".//*[@id='stall']") is None


def test_what_only_some_have():
    """A stall is told with what can be done about it; deltas have their figures."""
    stall = {"text": "stalled: <b> Options: `pageferry set`", "over": False, "round": 7, "count": 1}
    cache = {"cache-size": 1 << 26, "bytes": 9, "pages": 5, "cache-miss": 2, "overflow": 0}
    for more, said in (
        ({}, "Round 7: stalled: <b> Options: `pageferry set`"),
        ({"over": True, "count": 3}, "Round 7, 3 times so far: stalled: <b> Options: `pageferry "
                                     "set` It got on again later."),
    ):  # fmt: skip
        page = parsed(
            replace(RECORD, report=REPORT | {"stall": stall | more, "xbzrle-cache": cache})
        )
        assert text_of(page, ".//*[@id='stall']") == said
    assert page.find(".//data[@id='xbzrle-pages']").get("value") == "5"
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_it_loads_nothing():
    """No script, no link, no picture, nothing from elsewhere."""
    page = parsed(RECORD)
    tags = {element.tag for element in page.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use", "a"}
    for element in page.iter():
        assert not {"href", "src", "onload", "onclick", "style"} & set(element.attrib)
    style = page.find(".//style").text
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme:dark" in style


HOSTILE = "</style></pre><script>alert(1)</script>\"'&<!--]]>\x00\x1b\ud800\uffff"


def test_what_comes_from_elsewhere_is_text():
    report = REPORT | {
        "status": HOSTILE,
        "error": {"class": HOSTILE, "message": HOSTILE},
        "codec-pages": {HOSTILE: 3},
        "processes": [{"name": HOSTILE, "cpu-time": 1}],
        HOSTILE: HOSTILE,
    }
    page = parsed(Record(
        HOSTILE, HOSTILE, report, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE},
        phases=(Phase(HOSTILE, 0.0, 1.0),),
    ))  # fmt: skip
    assert not list(page.iter("script"))
    assert "<script>alert(1)</script>" in text_of(page, ".//*[@id='verdict']")
    assert "<script>alert(1)</script>" in text_of(page, ".//h1")


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({}, "Ended as unknown."),
        ({"status": "completed", "total-time": 900}, "Completed in 900 ms."),
        (
            {"status": "completed", "total-time": 900, "downtime": 400, "downtime-limit": 300},
            "Completed in 900 ms, downtime 400 ms, which is more than the 300 ms allowed.",
        ),
        (
            {"status": "failed", "error": {"class": "PeerLost", "message": "gone"}},
            "Failed before anything moved: gone",
        ),
        (
            {"total-time": 2000, "error": {"class": "Cancelled", "message": "cancelled"}},
            "Cancelled after 2.0 s: cancelled",
        ),
        (
            {"status": "completed", "total-time": 10, "verified": []},
            "Completed in 10 ms; verified: the destination holds what was read at the source.",
        ),
        (
            {"status": "completed", "total-time": 10, "oracle": {"ok": True}},
            "Completed in 10 ms; every byte of the demo guest is right.",
        ),
    ],
)  # fmt: skip
def test_verdicts(report, said):
    assert verdict(report) == said


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_samples(count):
    page = parsed(replace(RECORD, samples=RECORD.samples[:count]))
    assert len(page.findall(".//polyline")) == (4 if count == 2 else 0)
    assert len(page.findall(".//circle")) == (2 if count == 1 else 0)


def test_nothing_at_all():
    page = parsed(Record("a", "b"))
    assert [h.text for h in page.iter("h2")] == ["Throughput"]


ANY_NUMBER = st.one_of(st.integers(), st.floats(), st.integers(min_value=1 << 1100))
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), ANY_NUMBER, st.text(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from([*REPORT, "error", "verified", "oracle", "recoveries", "max-bandwidth"])
REPORTS = st.dictionaries(NAMES, st.one_of(ANY, st.sampled_from(list(REPORT.values()))))
SAMPLES = st.builds(Sample, *[ANY_NUMBER] * 4)
PHASES = st.builds(Phase, st.text(), ANY_NUMBER, ANY_NUMBER)
ROUNDS = st.builds(Round, st.integers(0, 1 << 40), *[ANY_NUMBER] * 5, st.booleans())
RECORDS = st.builds(
    Record, st.text(), st.text(), REPORTS, REPORTS, st.dictionaries(st.text(), st.text()),
    st.lists(SAMPLES, max_size=5), st.lists(PHASES, max_size=5), st.lists(ROUNDS, max_size=5),
    st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=75, deadline=None)
@given(RECORDS)
def test_any_record_is_a_page(record):
    page = parsed(record)
    for value in drawing_numbers(page):
        assert -1e4 < value < 1e4  # neither NaN nor infinite, and on the page or close to it
    raw = text_of(page, ".//pre[@id='raw']")
    json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert render(record) == render(record)


# ---- the recorder ----------------------------------------------------------------------------


class Migration:
    """What a recorder asks."""

    def __init__(self):
        self.heard = []
        self.on_event = lambda name, data: self.heard.append(name)
        self.wire = 0
        self.cpu = 0

    def query(self):
        return {
            "status": "active",
            "wire-bytes": self.wire,
            "ram": {"page-size": 4096},
            "progress": {"rate": 1, "wire-rate": 2, "dirty-rate": 3, "round-bytes": 8192},
        }

    def query_parameters(self):
        return {"max-rounds": 7}

    def query_processes(self):
        return [
            {"name": "source coordinator", "cpu-time": 100, "peak-memory": 1},
            {"name": "sender-0", "cpu-time": self.cpu, "peak-memory": 2, "wait-time": 0,
             "codec-time": 0},
        ]  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def recorder():
    clock, migration = Clock(), Migration()
    made = Recorder("a", "b", {"max-rounds": 30}, clock)
    made.on_started(migration)
    return made, clock, migration


def status(migration, name):
    migration.on_event("MIGRATION", {"status": name})


def test_phases_and_rounds():
    made, clock, migration = recorder()
    for name, number in (("setup", 0), ("active", 1), ("", 2), ("device", 3), ("completed", 0)):
        if name:
            status(migration, name)
        if number:
            migration.on_event("MIGRATION_PASS", {"pass": number})
        clock.now += 1.0
        migration.wire += 1000
    record = made.record({"status": "completed", "wire-bytes": 5000})
    assert record.phases == (
        Phase("setup", 0.0, 1.0), Phase("active", 1.0, 3.0), Phase("device", 3.0, 4.0)
    )  # fmt: skip
    assert record.rounds == (
        Round(1, 1.0, 2.0, 2, 1000, 3, False),
        Round(2, 2.0, 3.0, 2, 1000, 3, False),
        Round(3, 3.0, 4.0, 2, 1000, 3, True),
    )
    assert record.settings == {"max-rounds": 7}
    assert migration.heard.count("MIGRATION") == 4  # whoever listened before goes on to


def test_one_that_breaks_off_has_an_end():
    made, clock, migration = recorder()
    status(migration, "active")
    migration.on_event("MIGRATION_PASS", {"pass": 1})
    clock.now += 2.0
    record = made.record(None)
    assert record.phases == (Phase("active", 0.0, 2.0),)
    assert record.rounds[0].end == 2.0
    assert parsed(record) is not None


def test_memory_is_bounded():
    made, clock, migration = recorder()
    for number in range(10 * MOST_SAMPLES):
        clock.now += 0.25
        made.on_progress(migration.query())
        if number % 10 == 0:
            status(migration, "postcopy-paused" if number % 20 else "postcopy-recover")
            migration.on_event("MIGRATION_PASS", {"pass": number})
    record = made.record(None)
    assert MOST_SAMPLES // 2 <= len(record.samples) < MOST_SAMPLES
    gaps = [b.at - a.at for a, b in zip(record.samples, record.samples[1:], strict=False)]
    assert max(gaps) <= 2 * min(gaps)  # thinned out evenly
    assert len(record.rounds) == len(record.phases) == 2 * KEPT_AT_AN_END
    assert record.rounds_left_out == 2 * MOST_SAMPLES // 2 - 2 * KEPT_AT_AN_END
    assert parsed(record) is not None


def test_the_first_look_has_no_rate():
    made, _, migration = recorder()
    made.on_progress(migration.query())
    assert made.record({}).samples == ()
    made.on_progress(migration.query())
    assert made.record({}).samples == (Sample(0.0, 1, 2, 3),)


def test_a_look_after_the_end_is_no_sample():
    made, _, migration = recorder()
    migration.on_event("MIGRATION_PASS", {"pass": 1})
    made.on_progress(migration.query() | {"status": "completed"})
    assert made.record({"status": "completed"}).samples == ()
    assert made.record({"status": "completed"}).report["wire-bytes"] == 0
