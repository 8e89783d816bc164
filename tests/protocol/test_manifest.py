"""Manifests: every form, defaults, names, and one clear error for whatever is wrong."""

import json
import sys
from pathlib import Path

import pytest

from pageferry.pipeline.manifest import (
    Settings,
    check_name,
    images,
    load,
    manifest,
    parse,
    task,
)
from pageferry.pipeline.planner import HostLimit
from pageferry.transport.errors import HostLacks, UsageError

TO = "tcp://192.0.2.7:4444"
TOML = """
parallel = 8
parallel-per-destination = 2
max-bandwidth = "10Gbit"
retries = 5
backoff = "500ms"
max-backoff = "2min"

[defaults]
codec = "zstd"
level = 3
verify = true

[hosts."192.0.2.7"]
max-bandwidth = "1Gbit"
parallel = 4

[[items]]
source = "image:a.mem"
destination = "tcp://192.0.2.7:4444"
priority = 10
max-bandwidth = "50MB"

[[items]]
name = "second"
source = "image:/images/b.mem"
destination = "image:copies/"
codec = "lz4"
retries = 0
downtime-limit = "100ms"
"""
YAML = """
parallel: 8
parallel-per-destination: 2
max-bandwidth: 10Gbit
retries: 5
backoff: 500ms
max-backoff: 2min
defaults: {codec: zstd, level: 3, verify: true}
hosts:
  192.0.2.7: {max-bandwidth: 1Gbit, parallel: 4}
items:
  - source: image:a.mem
    destination: tcp://192.0.2.7:4444
    priority: 10
    max-bandwidth: 50MB
  - name: second
    source: image:/images/b.mem
    destination: image:copies/
    codec: lz4
    retries: 0
    downtime-limit: 100ms
"""
BOTH = {
    "parallel": 8, "parallel-per-destination": 2, "max-bandwidth": "10Gbit", "retries": 5,
    "backoff": "500ms", "max-backoff": "2min",
    "defaults": {"codec": "zstd", "level": 3, "verify": True},
    "hosts": {"192.0.2.7": {"max-bandwidth": "1Gbit", "parallel": 4}},
    "items": [
        {"source": "image:a.mem", "destination": TO, "priority": 10, "max-bandwidth": "50MB"},
        {"name": "second", "source": "image:/images/b.mem", "destination": "image:copies/",
         "codec": "lz4", "retries": 0, "downtime-limit": "100ms"},
    ],
}  # fmt: skip


def one(folder="/m", **item):
    """The only item of a manifest."""
    base = {"source": "image:a.mem", "destination": TO}
    return manifest({"items": [base | {k.replace("_", "-"): v for k, v in item.items()}]}, folder)


def refused(data, text, **more):
    with pytest.raises(UsageError) as caught:
        manifest(data, "/m", **more)
    assert text in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "form"), [(TOML, "TOML"), (YAML, "YAML"), (json.dumps(BOTH), "JSON")]
)
def test_all_forms_say_the_same(text, form):
    got = parse(text.encode(), form, "/m")
    first, second = got.items
    assert (first.name, first.source, first.destination) == ("a.mem", "image:/m/a.mem", TO)
    assert (first.priority, first.max_bandwidth, first.retries) == (10, 50_000_000, 5)
    assert first.settings == Settings(codec="zstd", level=3, verify=True)
    assert (first.host, first.to_receiver) == ("192.0.2.7", True)
    assert (second.source, second.destination) == ("image:/images/b.mem", "image:/m/copies/")
    assert (second.host, second.to_receiver, second.retries) == ("local", False, 0)
    # a level belongs to its codec
    assert second.settings == Settings(codec="lz4", verify=True, downtime_limit="100ms")
    assert second.parameters().downtime_limit == 0.1
    assert first.parameters().max_bandwidth == 50_000_000
    limits = got.policy.limits()
    assert (limits.parallel, limits.max_rate, limits.per_destination) == (8, 1_250_000_000, 2)
    assert (limits.backoff, limits.max_backoff) == (0.5, 120.0)
    assert limits.hosts == {"192.0.2.7": HostLimit(125_000_000, 4)}
    assert task(3, first, 1).destination_host == "192.0.2.7"


@pytest.mark.parametrize(
    ("item", "looked_at"),
    [
        ({"source": "image:a", "destination": TO}, True),
        ({"source": "image:a", "destination": "image:copies/"}, True),
        ({"source": "image:a", "destination": "image:copy"}, False),
        ({"source": "ram:a", "destination": TO}, False),
        ({"source": "image:/a", "destination": TO, "host": "kvm1"}, False),
        ({"source": "image:/a", "destination": "image:/copies/", "host": ["kvm1", "kvm2"]}, False),
    ],
)
def test_images_that_are_here_are_looked_at_for_relatives(item, looked_at):
    """What is at another host cannot be, whatever lies at its path here."""
    (got,) = parse(json.dumps({"items": [item]}).encode(), "JSON", "/m").items
    assert got.alike is looked_at
    assert task(0, got, 0).alike is looked_at


def test_the_example_of_the_documentation():
    """docs/batch.md has one full example, and it is one."""
    text = (Path(__file__).resolve().parents[2] / "docs/batch.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    got = parse(example.encode(), "TOML", "/m")
    assert len(got.items) >= 3
    assert {name for name in Settings.__struct_encode_fields__ if name not in text} == set()


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"name": "vm", "priority": "high"}, "item 'vm': priority: expected `int`, got `str`"),
        ({"priority": "high"}, "item 1: priority: expected `int`"),
        ({"name": "vm", "prioritty": 1}, "item 'vm': unknown field `prioritty`"),
        ({"name": "vm", "workers": True}, "item 'vm': workers: expected"),
        ({"name": "vm", "workers": 1000}, "item 'vm': workers must be from 1"),
        ({"name": "vm", "verify": "yes"}, "item 'vm': verify: expected `bool"),
        ({"name": "vm", "max-bandwidth": "fast"}, "item 'vm': max-bandwidth: 'fast' is no rate"),
        ({"name": "vm", "max-bandwidth": "1kB"}, "item 'vm': max-bandwidth below 100 kB/s"),
        ({"name": "vm", "downtime-limit": "soon"}, "item 'vm': downtime-limit: 'soon' is no"),
        ({"name": "vm", "downtime-limit": 0.3}, "item 'vm': downtime-limit: expected"),
        ({"name": "vm", "codec": "rar"}, "item 'vm':"),
        ({"name": "vm", "level": 3}, "item 'vm': level needs a codec"),
        ({"name": "vm", "retries": -1}, "item 'vm': retries must be from 0"),
        ({"name": "vm", "priority": 1 << 40}, "item 'vm': priority must be from"),
        ({"name": "vm", "source": "vm.mem"}, "item 'vm': source: 'vm.mem' names no guest"),
        ({"name": "vm", "destination": "tcp://x"}, "item 'vm': destination: 'tcp://x' is no"),
        ({"name": "vm", "destination": "pid:4"}, "item 'vm': destination: pid: is a source: "),
        ({"name": "vm", "destination": "file:a"},
         "item 'vm': destination: file:/m/a is a source: a snapshot is made by `pageferry snap"),
        ({"name": "vm", "postcopy": "now"}, "item 'vm': postcopy: nothing runs in an image"),
        ({"source": "demo:"}, "item 1: name: demo: has no file name"),
        ({"name": ""}, "name: '' is no name for an image"),
        ({"name": "../etc/passwd"}, "name: '../etc/passwd' is no name"),
        ({"name": ".hidden"}, "name: '.hidden' is no name"),
        ({"name": "a\nb"}, "is no name for an image"),
        ({"name": "x" * 151}, "is no name for an image"),
        ({"name": "\udcff"}, "is no name for an image"),
        ({"source": "image:vm 1.mem"}, "item 'vm 1.mem': name: 'vm 1.mem' is no name"),
        ({"name": 5}, "item 1: name: expected"),
    ],
)  # fmt: skip
def test_an_error_names_item_and_field(item, text):
    refused({"items": [{"source": "image:a.mem", "destination": TO} | item]}, text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "must be a table"),
        (None, "must be a table"),
        ({}, "the manifest: missing required field `items`"),
        ({"items": []}, "items: there is none"),
        ({"items": {}}, "items: expected `array`"),
        ({"items": ["image:a"]}, "items[0]: expected `object`"),
        ({"items": [{"destination": TO}]}, "item 1: missing required field `source`"),
        ({"items": [{"source": "image:a"}]}, "item 1: missing required field `destination`"),
        ({"items": [{}], "paralel": 1}, "the manifest: unknown field `paralel`"),
        ({"items": [{"source": "image:a", "destination": TO}], "parallel": 0}, "parallel must be"),
        ({"items": [{"source": "image:a", "destination": TO}], "parallel": 9999}, "parallel must"),
        ({"items": [{"source": "image:a", "destination": TO}], "backoff": 0}, "backoff must be"),
        ({"items": [{"source": "image:a", "destination": TO}], "max-bandwidth": "1kB"},
         "the manifest: max-bandwidth below"),
        ({"items": [{"source": "image:a", "destination": TO}], "defaults": {"name": "x"}},
         "the manifest: defaults: unknown field `name`"),
        ({"items": [{"source": "image:a", "destination": TO}], "hosts": {"h": {"speed": 1}}},
         "the manifest: hosts.h: unknown field `speed`"),
        ({"items": [{"source": "image:a", "destination": TO}], "hosts": {"h": {"parallel": -1}}},
         "hosts.h: parallel must be"),
    ],
)  # fmt: skip
def test_an_error_at_the_top(data, text):
    refused(data, text)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"source": "image:x/vm"}, {"source": "image:y/vm"}),
        ({"source": "image:x/vm"}, {"source": "image:y/other", "name": "vm"}),
        ({"source": "image:x/vm", "destination": "image:o/"},
         {"source": "image:y/b", "destination": "image:/m/o/vm"}),
        ({"source": "image:x/vm", "destination": "ram:/dev/shm/v"},
         {"source": "image:y/b", "destination": "ram:/dev/shm/v"}),
    ],
)  # fmt: skip
def test_names_are_unique_at_a_destination(first, second):
    base = {"destination": TO}
    refused({"items": [base | first, base | second]}, "items 1 and 2 would replace each other")


def test_the_same_name_at_two_destinations():
    items = [
        {"source": "image:vm", "destination": TO},
        {"source": "image:vm", "destination": "tcp://192.0.2.8:4444"},
        {"source": "image:vm", "destination": "image:copies/"},
    ]
    assert [item.name for item in manifest({"items": items}, "/m").items] == ["vm"] * 3


@pytest.mark.parametrize(
    ("text", "form"), [("a = ", "TOML"), ("{", "JSON"), ("a: [", "YAML"), ("[" * 100_000, "JSON")]
)
def test_broken_text(text, form):
    with pytest.raises(UsageError, match=f"the manifest is no {form}"):
        parse(text.encode(), form, "/m")


def test_bytes_that_are_no_text():
    with pytest.raises(UsageError, match="the manifest is no TOML"):
        parse(b"\xff\xfe", "TOML", "/m")


def test_yaml_without_its_library(monkeypatch):
    """None in sys.modules is how Python says that a module cannot be imported."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(HostLacks, match=r"pip install 'pageferry\[yaml\]'"):
        parse(YAML.encode(), "YAML", "/m")


def test_what_was_said_elsewhere():
    """Above the manifest's top level and defaults, below an item's own fields."""
    data = {
        "parallel": 2, "destination": "image:a/", "defaults": {"codec": "zstd", "workers": 1},
        "items": [{"source": "image:x"}, {"source": "image:y", "codec": "none", "retries": 9}],
    }  # fmt: skip
    said = {"parallel": 7, "codec": "lz4", "level": 2, "max-bandwidth": "1Gbit", "retries": 1}
    got = manifest(data, "/m", "image:b/", said)
    assert (got.policy.parallel, got.policy.max_bandwidth) == (7, 125_000_000)
    first, second = got.items
    assert first.destination == "image:/m/b/"
    assert first.settings == Settings(codec="lz4", level=2, workers=1)
    assert second.settings == Settings(codec="none", workers=1)
    assert (first.retries, second.retries) == (1, 9)


@pytest.mark.parametrize(
    ("source", "name"),
    [("shm:vm1", "vm1"), ("pid:4711", "pid-4711"), ("ram:/dev/shm/vm2?pid=1", "vm2"),
     ("qemu:run/vm.qmp", "vm.qmp")],
)  # fmt: skip
def test_names_by_default(source, name):
    assert one(source=source).items[0].name == name


@pytest.mark.parametrize("name", ["vm-1.mem", "a", "x" * 150, "vm@host=1,2+3", "Größe.mem"])
def test_names_that_a_receiver_takes(name):
    check_name(name)


@pytest.mark.parametrize("name", ["", "\n", "..", ".hid", "-x", "a/b", "a b", "x" * 151, "a\x1b"])
def test_names_that_it_does_not(name):
    """Found out before anything moves."""
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.parametrize(
    ("written", "kept"),
    [("ipc://sock", "ipc:///m/sock"), ("ipc://@name", "ipc://@name"), ("shm:x", "shm:x"),
     ("ram:x", "ram:/m/x"), ("image:/abs", "image:/abs"), ("tcp://[::1]:5", "tcp://[::1]:5")],
)  # fmt: skip
def test_paths_mean_the_same_wherever_it_goes_on(written, kept):
    assert one(destination=written).items[0].destination == kept


def test_images_of_a_directory_or_a_pattern(tmp_path, monkeypatch):
    for name in ("b.mem", "a.mem", ".hidden", "c.txt", "we[ird].mem"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.mem").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert images(".") == ["./a.mem", "./b.mem", "./c.txt", "./we[ird].mem"]
    assert images("*.mem") == ["a.mem", "b.mem", "we[ird].mem"]
    assert images("we[ird].mem") == ["we[ird].mem"]
    got = load("[ab].mem", "image:out/", {"parallel": 1})
    assert [item.source for item in got.items] == [
        f"image:{tmp_path}/a.mem", f"image:{tmp_path}/b.mem",
    ]  # fmt: skip
    assert got.items[0].destination == f"image:{tmp_path}/out/"
    with pytest.raises(UsageError, match="no image is there"):
        load("*.nothing", TO)
    with pytest.raises(UsageError, match="say where to"):
        load("*.mem", None)


def test_a_folder_that_is_there_needs_no_slash(tmp_path):
    (tmp_path / "out").mkdir()
    got = one(folder=str(tmp_path), destination="image:out")
    assert got.items[0].destination == f"image:{tmp_path}/out/"


def test_a_manifests_paths_begin_where_it_lies(tmp_path):
    path = tmp_path / "drain.toml"
    path.write_text(TOML)
    with pytest.raises(UsageError, match="item 'second': destination: there is no directory"):
        load(str(path), None)
    (tmp_path / "copies").mkdir()
    assert load(str(path), None).items[0].source == f"image:{tmp_path}/a.mem"
    with pytest.raises(UsageError, match=r"cannot read the manifest .*: No such file"):
        load(str(tmp_path / "no.toml"), None)
