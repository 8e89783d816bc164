"""The pure parts of --web, and what it collects: whatever names and numbers come, they are text."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pageferry.tools.report import batch_page
from pageferry.tools.report.arrivals import Arrivals
from pageferry.tools.report.batch_recorder import LIVE_ATTEMPTS, LIVE_ROWS, MOST_ROWS, BatchRecorder
from pageferry.tools.report.record import Attempt, BatchRecord, ItemRow, Phase, Record, Sample, Use
from pageferry.tools.report.recorder import LIVE_POINTS, Recorder
from pageferry.tools.report.style import LIVE_STYLE, STYLE
from pageferry.tools.report.writing import name_in
from pageferry.tools.web import metrics, views
from pageferry.tools.web.address import Address, may_ask, parse_address
from pageferry.tools.web.board import Board, event
from pageferry.transport.errors import Cancelled, PeerLost, UsageError

HOSTILE = "</style></p><script>alert(1)</script>\"'&<!--]]>\x00\x1b\ud800\uffff\n\ndata: x"
LIVE = {
    "status": "active",
    "total-time": 4200,
    "setup-time": 200,
    "downtime-limit": 300,
    "expected-downtime": 250,
    "ram": {"total": 1 << 30, "remaining": 1 << 28, "normal": 200_000, "duplicate": 62_144,
            "dirty-sync-count": 2, "page-size": 4096},
    "wire-bytes": 5 << 27,
    "lost-frames": 0,
    "codec-pages": {"none": 100_000, "lz4": 100_000},
    "progress": {"rate": 10**8, "wire-rate": 10**7, "dirty-rate": 3 * 10**6, "eta": 2.5,
                 "round-bytes": 1 << 29},
    "postcopy-requests": 12,
    "postcopy-latency": 170_000,
    "postcopy-latency-dist": [0, 0, 1, 3],
    "postcopy-latency-percentiles": {"p50": 9.0, "p90": 12.0, "p99": 15.0, "max": 15.1},
}  # fmt: skip
RECORD = Record(
    "demo:", "tcp://192.0.2.7:4444", LIVE, {"max-bandwidth": 0}, {"Python": "3.11"},
    (Sample(0.5, 1e8, 5e7, 0.0), Sample(0.75, 2e8, 6e7, 3e6)), (Phase("active", 0.0, 4.1),), (), 0,
    (Use("source coordinator", 0.1, None, None, 1.5, 9), Use("sender-0", 0.9, 0.0, 0.2, 3.0, 7)),
)  # fmt: skip
BATCH = BatchRecord(
    "drain.toml", 9.0,
    {"total": 9, "completed": 4, "failed": 1, "running": 2, "waiting": 1, "pending": 1,
     "bytes": 900, "bytes-done": 300, "rate": 100, "eta": 6.0},
    {}, (ItemRow("a", "image:a", "image:b", "running", 2, 50, 100, 10.0, 3.0, "precopy"),), 8,
    (Attempt("a", 0, 0.0, 9.0, "running"), Attempt("b", 1, 1.0, 2.0, "failed")), 0,
    (Sample(1.0, 100.0, 90.0, 0.0), Sample(2.0, 100.0, 90.0, 0.0)),
)  # fmt: skip


# ---- where it listens, and who may ask -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("8080", Address("127.0.0.1", 8080), "127.0.0.1:8080"),
        ("0", Address("127.0.0.1", 0), "127.0.0.1:0"),
        ("localhost:1", Address("127.0.0.1", 1), "127.0.0.1:1"),
        ("192.0.2.7:8080", Address("192.0.2.7", 8080), "192.0.2.7:8080"),
        ("[::1]:65535", Address("::1", 65535), "[::1]:65535"),
        ("node-7.example:80", Address("node-7.example", 80), "node-7.example:80"),
    ],
)
def test_addresses(text, address, shown):
    assert parse_address(text) == address
    assert str(address) == shown


@pytest.mark.parametrize(
    "text", ["", ":", "host", "host:", "1:2:3", "65536", "-1", "a b:1", "::1:80"]
)
def test_no_addresses(text):
    with pytest.raises(UsageError, match="HOST:"):
        parse_address(text)


@pytest.mark.parametrize(
    ("host", "header", "may"),
    [
        ("127.0.0.1", "127.0.0.1:8080", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "LOCALHOST:9000", True),
        ("127.0.0.1", "[::1]:8080", True),
        ("::1", "[::1]", True),
        ("127.0.0.1", "evil.example:8080", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "127.0.0.1@evil.example", False),
        ("127.0.0.1", "192.0.2.7:8080", False),
        ("127.0.0.1", "", False),
        ("192.0.2.7", "node7:8080", True),  # whoever reaches it may read: that was said
    ],
)
def test_who_may_ask(host, header, may):
    assert may_ask(header, Address(host, 8080)) is may


# ---- what is sent ----------------------------------------------------------------------------


def test_a_board_has_the_newest_only():
    board = Board()
    assert board.since(0) == {} and board.version == 0
    assert board.put({"a": "1", "b": "1"})
    assert not board.put({"a": "1"})
    assert board.put({"a": "2"})
    assert board.put({"a": "3"})
    assert board.since(1) == {"a": "3"}  # whoever missed 2 never hears of it
    assert board.since(0) == {"a": "3", "b": "1"}
    assert board.since(board.version) == {}


def test_an_event_is_one_line_of_data():
    sent = event("parts", {"a": HOSTILE}).decode()
    assert sent.endswith("\n\n") and sent.count("\n") == 3
    name, data, _, _ = sent.split("\n")
    assert name == "event: parts"
    assert json.loads(data.removeprefix("data: ")) == {"a": HOSTILE}


def everything(parts):
    """The parts in their document, as a strict parser sees it."""
    assert set(parts) <= {*views.ORDER, views.TITLE}
    text = views.document(parts)
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert len(list(page.iter("script"))) == 1  # live.js
    for element in page.iter():
        assert "style" not in element.attrib
        assert not [name for name in element.attrib if name.startswith("on")]
        for name in ("src", "href"):
            assert element.get(name, "live.js") in ("live.js", "style.css")
    return page


VIEWS = {
    "migration": lambda r, b, over: views.migration(r, over=over),
    "batch": lambda r, b, over: views.batch(b, over=over),
    "one receiver": lambda r, b, over: views.receiver(b, r, last_over=over, over=over),
    "receiver": lambda r, b, over: views.receiver(b, None, last_over=over, over=over),
}


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("view", list(VIEWS))
def test_what_comes_from_elsewhere_is_text(view, over):
    item = ItemRow(HOSTILE, HOSTILE, HOSTILE, HOSTILE, 3, 1, 2, 3.0, 4.0, HOSTILE, HOSTILE)
    attempt = Attempt(HOSTILE, 0, 0.0, 9.0, HOSTILE)
    report = LIVE | {"status": HOSTILE, "error": {"class": HOSTILE, "message": HOSTILE}}
    record = Record(
        HOSTILE, HOSTILE, report, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE},
        phases=(Phase(HOSTILE, 0.0, 1.0),), uses=(Use(HOSTILE, 0.5, 0.5, 0.5, 1.0, 1),),
    )  # fmt: skip
    batch = BatchRecord(
        HOSTILE, 9.0, {"total": HOSTILE, "error": {"message": HOSTILE}}, {HOSTILE: HOSTILE},
        (item,), 1, (attempt,),
    )  # fmt: skip
    page = everything(VIEWS[view](record, batch, over))
    assert "<script>alert(1)</script>" in "".join(page.find(".//h1").itertext())


ANY_NUMBER = st.one_of(st.integers(), st.floats(), st.integers(min_value=1 << 1100), st.text())
REPORTS = st.dictionaries(
    st.sampled_from([*LIVE, "eta", "total", "completed", "bytes", "bytes-done", "error"]),
    st.one_of(ANY_NUMBER, st.dictionaries(st.sampled_from(["remaining", "total", "eta", "rate"
              "round-bytes", "dirty-sync-count", "dirty-rate", "message"]), ANY_NUMBER)),
)  # fmt: skip
ROWS = st.builds(
    ItemRow, st.text(), st.text(), st.text(), st.text(), st.integers(), ANY_NUMBER, ANY_NUMBER,
    ANY_NUMBER, ANY_NUMBER,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(REPORTS, st.lists(ROWS, max_size=3), ANY_NUMBER, st.booleans())
def test_any_numbers_are_a_page(report, rows, number, over):
    use = Use("x", number, number, number, number, number)
    record = Record(
        "a", "b", report, samples=(Sample(number, number, number, number),), uses=(use,)
    )
    batch = BatchRecord("a", 1.0, report, items=tuple(rows))
    for view in VIEWS.values():
        everything(view(record, batch, over))


def test_what_the_page_says():
    page = everything(views.migration(RECORD, over=False))
    said = "".join(page.find(".//*[@id='verdict']").itertext())
    assert said == "Precopy, round 2: 256.0 MiB left of 1.0 GiB, 100 MB/s, 2.5 s to go."
    assert page.find(".//title").text == "50% demo: to tcp://192.0.2.7:4444"
    assert page.find(".//progress").get("value") == "0.5000"
    figures = {e.get("id"): e.get("value") for e in page.iter("data")}
    assert figures["remaining"] == str(1 << 28) and figures["fault-p90"] == "12.0"
    assert "90 %" in "".join(page.find(".//div[@id='part-processes']").itertext())
    page = everything(views.batch(BATCH, over=False))
    said = "".join(page.find(".//*[@id='verdict']").itertext())
    assert said == "4 of 9 completed, 1 failed, 2 running, 1 waiting, 1 pending; 6.0 s to go."
    assert "and 8 more" in "".join(page.find(".//div[@id='part-items']").itertext())


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({}, "None."),
        ({"status": "setup"}, "Setup."),
        ({"status": "postcopy-paused", "paused-because": "gone"},
         "Paused: gone. `pageferry recover` goes on."),
        ({"status": "active", "ram": {"remaining": 1 << 20, "total": 1 << 21},
          "progress": {"rate": 5, "dirty-rate": 10**6}},
         "Precopy: 1.0 MiB left of 2.0 MiB, 5 B/s, the guest writes faster than its memory moves."),
    ],
)  # fmt: skip
def test_what_is_going_on(report, said):
    assert views.s.now(report) == said


def test_the_style_loads_nothing():
    assert "url(" not in STYLE + LIVE_STYLE and "@import" not in STYLE + LIVE_STYLE


# ---- what is collected -----------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Migration:
    """What a recorder asks."""

    def __init__(self):
        self.on_event = lambda name, data: None
        self.cpu = 0
        self.wire = 0

    def query(self):
        return LIVE | {"wire-bytes": self.wire}

    def query_parameters(self):
        return {"max-rounds": 7}

    def query_processes(self):
        row = {"name": "sender-0", "cpu-time": self.cpu, "peak-memory": 2, "wait-time": 0}
        return [row, {"name": "source coordinator", "cpu-time": 5, "peak-memory": 1}]


def test_a_look_in_between_changes_nothing():
    clock, migration = Clock(), Migration()
    recorder, other = (Recorder("a", "b", {}, clock) for _ in range(2))
    for made in (recorder, other):
        made.on_started(migration)
    for status in ("setup", "active"):
        migration.on_event("MIGRATION", {"status": status})
        clock.now += 1.0
    migration.on_event("MIGRATION_PASS", {"pass": 1})
    clock.now += 1.0
    migration.wire = 500
    looked = recorder.so_far()
    assert looked.phases == (Phase("setup", 0.0, 1.0), Phase("active", 1.0, 3.0))
    assert [(r.number, r.begin, r.end, r.wire_bytes) for r in looked.rounds] == [(1, 2.0, 3.0, 500)]
    assert looked.settings == {"max-rounds": 7} and recorder.status == "active"
    assert recorder.so_far() == recorder.so_far()
    assert recorder.record({"status": "completed"}) == other.record({"status": "completed"})


def test_what_processes_do_is_of_the_last_two_seconds():
    clock, migration = Clock(), Migration()
    recorder = Recorder("a", "b", {}, clock)
    recorder.on_started(migration)
    assert recorder.so_far().uses[0] == Use("sender-0", None, None, None, 0.0, 2)
    for spent in (1000, 1000, 1000, 0, 0, 0):  # milliseconds in one second each
        clock.now += 1.0
        migration.cpu += spent
        use = recorder.so_far().uses[0]
        if migration.cpu == 1000:
            assert use.cpu == pytest.approx(1.0)
    assert use.cpu == 0.0 and use.wait == 0.0 and use.codec is None
    assert recorder.so_far().uses[1].wait is None  # a coordinator does not wait for the link


def test_a_live_line_has_as_many_points_as_a_screen():
    clock, migration = Clock(), Migration()
    recorder = Recorder("a", "b", {}, clock)
    recorder.on_started(migration)
    for _ in range(1200):
        clock.now += 0.25
        recorder.on_progress(migration.query())
    points = recorder.so_far().samples
    assert LIVE_POINTS // 2 < len(points) <= LIVE_POINTS
    assert points[-1].at == pytest.approx(300.0)


def told(name, state, **more):
    return {
        "name": name, "source": f"image:{name}", "destination": "image:x", "state": state,
        "attempts": 1,
    } | more  # fmt: skip


def test_a_batch_is_told_what_matters_first():
    clock = Clock()
    recorder = BatchRecorder("b", clock)
    recorder.begin([told(n, "pending") for n in "abcdef"])
    recorder.on_item(told("a", "running", event="started"))
    recorder.on_item(told("b", "running", event="started"))
    clock.now += 2.0
    recorder.on_item(told("a", "completed", event="completed", size=77))
    recorder.on_item(told("c", "running", event="started"))
    recorder.on_item(told("b", "failed", event="failed", error={"message": "no"}))
    recorder.on_item(told("d", "running", event="started"))
    recorder.on_item(told("d", "waiting", event="failed", error={"message": "busy"}))
    recorder.on_progress({
        "rate": 9, "items": [told("c", "running", migration=LIVE)], "total": 6
    })  # fmt: skip
    clock.now += 1.0
    looked = recorder.so_far()
    assert [item.name for item in looked.items] == ["c", "b", "d", "e", "f", "a"]
    moving = looked.items[0]
    assert (moving.phase, moving.done, moving.took) == ("round 2", 3 << 28, 1.0)
    assert looked.items[1].error == "no" and looked.items[-1].size == 77
    lanes = {(one.name, one.lane, one.begin, one.end, one.outcome) for one in looked.attempts}
    assert lanes == {
        ("a", 0, 0.0, 2.0, "completed"), ("b", 1, 0.0, 2.0, "failed"),
        ("c", 0, 2.0, 3.0, "running"), ("d", 1, 2.0, 2.0, "failed"),
    }  # fmt: skip
    assert looked.samples == (Sample(2.0, 9, 10**7, 0.0),)


def test_a_page_of_very_many_is_bounded():
    recorder = BatchRecorder("b", Clock())
    recorder.begin([told(str(i), "pending") for i in range(MOST_ROWS + 500)])
    for i in range(MOST_ROWS + 200):
        recorder.on_item(told(str(i), "running", event="started"))
        recorder.on_item(told(str(i), "completed", event="completed"))
    looked = recorder.so_far()
    assert len(looked.items) == LIVE_ROWS and looked.items_left_out == MOST_ROWS + 500 - LIVE_ROWS
    assert len(looked.attempts) == LIVE_ATTEMPTS
    assert looked.attempts_left_out == MOST_ROWS + 200 - LIVE_ATTEMPTS
    record = recorder.record({})
    assert len(record.items) == MOST_ROWS
    assert len(record.attempts) + record.attempts_left_out == MOST_ROWS + 200
    ElementTree.fromstring(batch_page.render(record).removeprefix("<!DOCTYPE html>\n"))


class Arrival(Migration):
    def __init__(self, name):
        super().__init__()
        self.hello = SimpleNamespace(name=name, kind="image", uuid="0123456789")
        self.on_progress = self.on_end = None


def test_arrivals():
    clock, ended = Clock(), []
    arrivals = Arrivals(
        "here", "there", lambda e: {"error": {"message": e.message}},
        lambda recorder, report, name, uuid: ended.append((report, name, uuid)), clock,
    )  # fmt: skip
    first, second, third = Arrival("vm"), Arrival("vm"), Arrival("")
    for arrival in (first, second, third):
        arrivals.arrived(arrival)
        arrival.on_event("MIGRATION", {"status": "setup"})
    clock.now += 1.0
    first.on_progress(LIVE)
    assert arrivals.query()["running"] == 3 and arrivals.query()["rate"] == 10**8
    first.on_end({"status": "completed"}, None)
    second.on_end(None, PeerLost("gone"))
    third.on_end(None, None)  # the receiver was stopped
    assert [(report.get("status"), name) for report, name, _ in ended] == [
        ("completed", "vm"), (None, "vm"), (None, "image")
    ]  # fmt: skip
    assert ended[1][0] == {"error": {"message": "gone"}}
    query = arrivals.query()
    assert [query[n] for n in ("completed", "failed", "cancelled", "running")] == [1, 1, 1, 0]
    assert query["bytes-done"] == 1 << 30 and arrivals.bytes == 1 << 30
    assert arrivals.ended == {"error": {"message": Cancelled("the receiver was stopped").message}}


def test_a_receiver_of_years_is_bounded():
    arrivals = Arrivals("here", "there", lambda e: {}, clock=Clock())
    for i in range(1000):
        arrival = Arrival(f"vm{i}")
        arrivals.arrived(arrival)
        arrival.on_end({}, None)
    assert arrivals.outcomes["completed"] == 1000
    assert len(arrivals.all.record({}).items) == 200


@pytest.mark.parametrize(
    "name", ["vm.mem", "../../etc/passwd", ".hidden", "a\nb\x00", "ü" * 300, ""]
)
def test_a_stranger_chooses_no_path(tmp_path, name):
    path = Path(name_in(f"{tmp_path}/", name, "../" + name))
    assert path.parent == tmp_path and path.name.endswith(".html")
    path.write_text("")  # a name that can be
    assert name_in("page.html", name, "") == "page.html"
    assert os.listdir(tmp_path) == [path.name]


# ---- metrics ---------------------------------------------------------------------------------


def all_families():
    yield from metrics.about("copy")
    cache = {
        "cache-size": 1 << 26, "bytes": 9, "pages": 5, "cache-miss": 2, "overflow": 1,
        "cache-miss-rate": 0.25, "encoding-rate": 8.0,
    }  # fmt: skip
    report = LIVE | {"downtime": 70, "recoveries": 1, "cpu-throttle-percentage": 40}
    report |= {"xbzrle-cache": cache}
    yield from metrics.migration(Record("a", "b", report, uses=RECORD.uses))


def batch_families():
    yield from metrics.batch(BATCH.report | {"items": [{"migration": LIVE}]})


def receiver_families():
    yield from metrics.receiver({"completed": 1, "running": 1, "bytes-done": 5, "rate": 7}, [LIVE])


def parsed(families, accept=""):
    encode, _ = metrics.encoder(accept)
    found = {}
    for family in text_string_to_metric_families(encode(families).decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_metrics_have_units():
    found = parsed(all_families())
    assert found["pageferry_ram_bytes", ()] == 1 << 30
    assert found["pageferry_elapsed_seconds", ()] == 4.2
    assert found["pageferry_downtime_seconds", ()] == 0.07
    assert found["pageferry_migration_state", (("state", "active"),)] == 1
    assert found["pageferry_migration_state", (("state", "setup"),)] == 0
    assert found["pageferry_process_cpu_seconds_total", (("process", "sender-0"),)] == 3.0
    for name, _ in found:
        assert re.fullmatch(
            "pageferry_[a-z_]+(_bytes|_seconds|_ratio|_bytes_per_second|_total|_info|_state"
            "|_seconds_(bucket|sum|count))",
            name,
        ), name
    found = parsed(batch_families())
    assert found["pageferry_batch_items", (("state", "failed"),)] == 1
    assert found["pageferry_total_wire_rate_bytes_per_second", ()] == 10**7
    found = parsed(receiver_families())
    assert found["pageferry_arrivals_total", (("outcome", "completed"),)] == 1


def test_fault_latency_is_a_histogram():
    found = parsed(all_families())
    buckets = {dict(labels)["le"]: value for (name, labels), value in found.items()
               if name == "pageferry_fault_latency_seconds_bucket"}  # fmt: skip
    # [0, 0, 1, 3]: one of 4 to 8 us, three of 8 to 16
    assert buckets == {"2e-06": 0, "4e-06": 0, "8e-06": 1, "1.6e-05": 4, "+Inf": 4}
    assert found["pageferry_fault_latency_seconds_count", ()] == 4
    assert found["pageferry_fault_latency_seconds_sum", ()] == pytest.approx(4 * 170e-6)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_hostile_labels_are_labels(accept):
    record = Record(HOSTILE, HOSTILE, LIVE | {"codec-pages": {HOSTILE: 3}}, uses=(
        Use(HOSTILE, 0.5, 0.5, 0.5, 1.0, 1),
    ))  # fmt: skip
    found = parsed(metrics.migration(record), accept)
    text = HOSTILE.replace("\ud800", "?")
    assert ("pageferry_codec_pages_total", (("codec", text),)) in found


@settings(max_examples=50, deadline=None)
@given(REPORTS)
def test_any_report_has_metrics(report):
    parsed(metrics.migration(Record("a", "b", report)))
    parsed(metrics.batch(report))


def test_the_table_of_metrics_is_complete():
    text = (Path(__file__).resolve().parents[2] / "docs/view.md").read_text()
    listed = set(re.findall(r"^\| `(pageferry_[a-z_]+)", text, re.MULTILINE))
    made = set()
    for families in (all_families(), batch_families(), receiver_families()):
        for family in text_string_to_metric_families(metrics.encoder("")[0](families).decode()):
            made.add(f"{family.name}_total" if family.type == "counter" else family.name)
    assert listed == made
