"""Device state by description: what travels, across versions, and what is refused by its name."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Thing

import pytest

from pageferry.transport.errors import (
    DestinationError,
    PeerRefused,
    RemoteProtocolError,
    SourceError,
    UsageError,
)
from pageferry.transport.vmstate import (
    BOOL,
    FLOAT64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Blob,
    Buffer,
    Check,
    Description,
    Equal,
    Field,
    List,
    Map,
    Nullable,
    Section,
    Struct,
    Temporary,
    Text,
    Unused,
    join,
    load,
    parse,
    save,
    values_of,
)


def content(description, value):
    """The bytes of the fields, without what says what they are."""
    (section,) = parse(save([Section(description, value)]))
    return bytes(section.content)


def move(description, value, into, **how):
    load(save([Section(description, value, **how)]), [Section(description, into)])
    return into


# ---- as QEMU's tests/unit/test-vmstate.c ---------------------------------------------------

PRIMITIVE = {
    "b_1": (BOOL, True, "01"), "b_2": (BOOL, False, "00"), "u8_1": (U8, 130, "82"),
    "u16_1": (U16, 512, "0200"), "u32_1": (U32, 70000, "00011170"),
    "u64_1": (U64, 12121212, "0000000000b8f47c"), "i8_1": (I8, 65, "41"), "i8_2": (I8, -65, "bf"),
    "i16_1": (I16, 512, "0200"), "i16_2": (I16, -512, "fe00"), "i32_1": (I32, 70000, "00011170"),
    "i32_2": (I32, -70000, "fffeee90"), "i64_1": (I64, 12121212, "0000000000b8f47c"),
    "i64_2": (I64, -12121212, "ffffffffff470b84"),
}  # fmt: skip


def test_simple_primitive():
    """The same bytes as QEMU's, and the same values from them."""
    d = Description("simple/primitive", fields=tuple(Field(n, k[0]) for n, k in PRIMITIVE.items()))
    here = Thing(**{name: value for name, (_, value, _) in PRIMITIVE.items()})
    assert content(d, here).hex() == "".join(wire for _, _, wire in PRIMITIVE.values())
    assert move(d, here, Thing()) == here


def test_simple_array():
    d = Description("simple/array", fields=(Field("u16_1", Array(U16, 3)),))
    here = Thing(u16_1=[0x42, 0x43, 0x44])
    assert content(d, here).hex() == "004200430044"
    assert move(d, here, Thing(u16_1=[0] * 3)) == here


def versioned(version=2):
    fields = {"a": (U32, 0), "b": (U32, 2), "c": (U32, 0), "d": (U64, 0), "e": (U32, 2),
              "f": (U64, 2)}  # fmt: skip
    return Description(
        "test/versioned", version, 1,
        tuple(Field(name, kind, since) for name, (kind, since) in fields.items()
              if since <= version),
    )  # fmt: skip


def test_versioned_load_v1():
    """What version 1 did not have stays as it is."""
    data = save([Section(versioned(1), Thing(a=10, c=30, d=40))])
    there = Thing(b=200, e=500, f=600)
    load(data, [Section(versioned(), there)])
    assert there == Thing(a=10, b=200, c=30, d=40, e=500, f=600)


def test_versioned_load_v2():
    here = Thing(a=10, b=20, c=30, d=40, e=50, f=60)
    assert move(versioned(), here, Thing()) == here
    assert content(versioned(), here).hex() == (
        "0000000a" "00000014" "0000001e" "0000000000000028" "00000032" "000000000000003c"
    )  # fmt: skip


def test_versions_the_other_way():
    """A newer end that saves as the older one would; and not, if it cannot be loaded."""
    here = Thing(a=10, b=20, c=30, d=40, e=50, f=60)
    there = Thing()
    load(save([Section(versioned(), here).older(1)]), [Section(versioned(1), there)])
    assert there == Thing(a=10, c=30, d=40)
    with pytest.raises(
        PeerRefused, match="'test/versioned': is of version 2, here 1 is the newest"
    ):
        load(save([Section(versioned(), here)]), [Section(versioned(1), Thing())])
    newest = Description("test/versioned", 3, 2, versioned().fields)
    data = save([Section(versioned(), here).older(1)])
    with pytest.raises(PeerRefused, match="is of version 1, here 2 is the oldest"):
        load(data, [Section(newest, Thing())])
    with pytest.raises(ValueError, match="has no version 1"):
        Section(newest, here).older(1)


def skips(thing, version):
    assert version == 2
    return not thing.skip


SKIPPING = Description(
    "test/skip", 2, 1,
    (Field("a", U32), Field("b", U32), Field("c", U32, exists=skips), Field("d", U64),
     Field("e", U32, exists=skips), Field("f", U64, since=2)),
)  # fmt: skip


def skipping(**changes):
    return Thing(**({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "skip": False} | changes))


def test_field_exists_noskip():
    """A byte says that it is there."""
    here = skipping()
    assert content(SKIPPING, here).hex() == (
        "00000001" "00000002" "01" "00000003" "0000000000000004" "01" "00000005" "0000000000000006"
    )  # fmt: skip
    assert move(SKIPPING, here, Thing(skip=False)) == here


def test_field_exists_skip():
    here = skipping(skip=True)
    assert content(SKIPPING, here).hex() == (
        "00000001" "00000002" "00" "0000000000000004" "00" "0000000000000006"
    )  # fmt: skip
    there = move(SKIPPING, here, Thing(skip=True, c=300, e=500))
    assert there == skipping(skip=True, c=300, e=500)


@pytest.mark.parametrize("skip", [True, False])
def test_ends_that_do_not_agree_whether_a_field_is_there(skip):
    """Where QEMU would take one field for another."""
    with pytest.raises(PeerRefused) as caught:
        move(SKIPPING, skipping(skip=skip), Thing(skip=not skip))
    assert caught.value.data == {"section": "test/skip", "instance": 0, "field": "c"}
    assert ("is not in what came" if skip else "not wanted here") in caught.value.message


@dataclass
class Trivial:
    i: int = 0


TRIVIAL = Description("test/tst", fields=(Field("i", I32),))
POINTERS = Description("test/arps", fields=(Field("ar", Array(Nullable(Struct(TRIVIAL)), 4)),))
INTS = Description("test/arps", fields=(Field("ar", Array(Nullable(I32), 4)),))


def test_array_of_pointers_to_structures():
    here = Thing(ar=[Trivial(i) for i in range(4)])
    there = Thing(ar=[Trivial() for _ in range(4)])
    before = list(there.ar)
    assert move(POINTERS, here, there) == here
    assert all(a is b for a, b in zip(before, there.ar, strict=True))  # loaded into, not replaced
    assert content(POINTERS, here).hex() == "".join(f"01{i:08x}" for i in range(4))


def test_array_of_pointers_to_structures_one_null():
    here = Thing(ar=[Trivial(0), None, Trivial(2), Trivial(3)])
    there = Thing(ar=[Trivial(), None, Trivial(), Trivial()])
    assert move(POINTERS, here, there) == here
    assert content(POINTERS, here).hex() == "01000000000001000000020100000003"
    with pytest.raises(PeerRefused, match=r"field 'ar\[1\]': there is no object to load it into"):
        move(POINTERS, Thing(ar=[Trivial(i) for i in range(4)]), there)


def test_array_of_pointers_to_numbers_one_null():
    here = Thing(ar=[0, None, 2, 3])
    assert move(INTS, here, Thing(ar=[3, 42, 1, 0])) == here
    assert content(INTS, here) == content(POINTERS, Thing(ar=[
        None if i is None else Trivial(i) for i in here.ar
    ]))  # fmt: skip


@dataclass
class Element:
    b: bool = False
    u8: int = 0


QUEUE = Description("test/queue", fields=(
    Field("i16", I16),
    Field("q", List(Struct(Description(
        "test/queue-element", fields=(Field("b", BOOL), Field("u8", U8))), Element), most=16)),
    Field("i32", I32),
))  # fmt: skip


def test_queue():
    """Elements are made as they come; a count is in front of them, no byte in front of each."""
    here = Thing(i16=-512, q=[Element(True, 130), Element(False, 65)], i32=70000)
    assert content(QUEUE, here).hex() == "fe00000000020182004100011170"
    assert move(QUEUE, here, Thing(q=[])) == here
    assert move(QUEUE, here, Thing()) == here
    assert move(QUEUE, Thing(i16=0, q=[], i32=0), Thing(q=[Element()])).q == []


@dataclass
class Mapping:
    phys_addr: int = 0
    flags: int = 0


@dataclass
class Domain:
    id: int = 0
    mappings: dict = field(default_factory=dict)


MAPPING = Struct(Description("mapping", fields=(Field("phys_addr", U64), Field("flags", U32))),
                 Mapping)  # fmt: skip
DOMAIN = Description("domain", fields=(
    Field("id", I32), Field("mappings", Map(U64, MAPPING, most=100)),
))  # fmt: skip
IOMMU = Description("iommu", fields=(
    Field("id", I32), Field("domains", Map(U64, Struct(DOMAIN, Domain), most=100)),
))  # fmt: skip
FIRST = Domain(6, {0x1000: Mapping(0xA000, 1), 0x4000: Mapping(0xE0000, 2)})
SECOND = Domain(5, {0x1000000: Mapping(0xF000000, 3)})


def test_tree_of_structures():
    assert content(DOMAIN, FIRST).hex() == (
        "00000006" "00000002" "0000000000001000" "000000000000a000" "00000001"
        "0000000000004000" "00000000000e0000" "00000002"
    )  # fmt: skip
    assert move(DOMAIN, FIRST, Domain()) == FIRST


def test_tree_of_trees():
    here = Thing(id=7, domains={5: SECOND, 6: FIRST})
    there = move(IOMMU, here, Thing(domains={6: (known := Domain(1))}))
    assert there == here
    assert there.domains[6] is known  # one that was there is loaded into


CONTAINER = Description("test/container/qlist", fields=(
    Field("id", U32),
    Field("list", List(
        Struct(Description("test/queue list", fields=(Field("i", U32),)), Trivial), most=16)),
))  # fmt: skip


def test_list():
    here = Thing(id=1, list=[Trivial(i) for i in (0xA, 0xB00, 0xC0000, 0xD000000)])
    assert content(CONTAINER, here).hex() == (
        "00000001" "00000004" "0000000a" "00000b00" "000c0000" "0d000000"
    )  # fmt: skip
    there = move(CONTAINER, here, Thing())
    assert there == here
    for container in (here, there):  # they are lists as any other
        container.list.insert(1, Trivial(0x12))
        del container.list[-1]
    assert there == here


class Difference:
    """b travels as its distance from a."""

    def __init__(self, parent):
        self.parent, self.diff = parent, 0

    def compute(self):
        self.diff = self.parent.b - self.parent.a

    def give_back(self, version):
        self.parent.b = self.parent.a + self.diff


def test_tmp_struct():
    back = Description("test/tmp_child_parent", fields=(Field("f", U64),))
    child = Description(
        "test/tmp_child", fields=(Field("diff", I64), Field("parent", Struct(back))),
        pre_save=Difference.compute, post_load=Difference.give_back,
    )  # fmt: skip
    d = Description("test/with_tmp", fields=(
        Field("a", U32), Field("d", U64), Field("tmp", Temporary(child, Difference)),
    ))  # fmt: skip
    here = Thing(a=2, b=4, d=1, f=8)
    wire = "00000002000000000000000100000000000000020000000000000008"
    assert content(d, here).hex() == wire
    assert move(d, here, Thing()) == here


# ---- subsections, hooks, checks ------------------------------------------------------------


def needed(thing):
    return thing.vlan != 0


VLAN = Description("nic/vlan", 2, 1, (Field("vlan", U16),), needed=needed)
OFFLOAD = Description("nic/offload", fields=(Field("bits", U8),), needed=lambda nic: nic.bits != 0)
OLD = Description("nic", fields=(Field("mac", Buffer(6)),))
NEW = Description("nic", fields=OLD.fields, subsections=(VLAN, OFFLOAD))
MAC = b"\x52\x54\0\0\0\1"


def test_subsections():
    """One that is not needed does not travel; so an older end loads what does not use it."""
    here = Thing(mac=MAC, vlan=7, bits=0)
    assert move(NEW, here, Thing(vlan=0, bits=0)) == here
    there = Thing()
    load(save([Section(NEW, Thing(mac=MAC, vlan=0, bits=0))]), [Section(OLD, there)])
    assert there == Thing(mac=MAC)
    load(save([Section(OLD, Thing(mac=MAC))]), [Section(NEW, there)])  # and what an older one saved
    with pytest.raises(
        PeerRefused, match="'nic/vlan': is a subsection that is not known"
    ) as caught:
        load(save([Section(NEW, here)]), [Section(OLD, there)])
    assert caught.value.data["field"] == "nic/vlan"
    newer = Description("nic/vlan", 3, 3, VLAN.fields, needed=needed)
    with pytest.raises(PeerRefused, match="'nic/vlan': is of version 3, here 2"):
        load(save([Section(Description("nic", fields=OLD.fields, subsections=(newer,)), here)]),
             [Section(NEW, there)])  # fmt: skip


def test_hooks_in_their_order():
    said = []

    def note(what):
        return lambda *arguments: said.append((what, *arguments[1:]))

    def described(name, **more):
        return Description(
            name, 3, 1, pre_save=note(f"{name} pre_save"), post_save=note(f"{name} post_save"),
            pre_load=note(f"{name} pre_load"), post_load=note(f"{name} post_load"), **more,
        )  # fmt: skip

    inner = described("in", fields=(Field("x", U8),))
    outer = described("out", fields=(Field("inner", Struct(inner)),),
                      subsections=(described("out/sub"),))  # fmt: skip
    here = Thing(inner=Thing(x=1))
    data = save([Section(outer, here, version=2)])
    order = ["out pre", "in pre", "in post", "out/sub pre", "out/sub post", "out post"]
    assert said == [(f"{what}_save",) for what in order]
    said.clear()
    load(data, [Section(outer, here)])
    versions = {"in post": 3, "out/sub post": 3, "out post": 2}
    assert said == [
        (f"{what}_load", *([versions[what]] if what in versions else [])) for what in order
    ]


def broken(*arguments):
    raise OSError("no such bridge")


@pytest.mark.parametrize("hook", ["pre_save", "post_save", "pre_load", "post_load"])
def test_a_hook_that_fails_names_its_section(hook):
    d = Description("nic", fields=OLD.fields, **{hook: broken})
    error = SourceError if hook.endswith("save") else DestinationError
    with pytest.raises(error, match=f"'nic' .2.: {hook} failed: OSError: no such bridge") as caught:
        load(save([Section(d, Thing(mac=MAC), 2)]), [Section(d, Thing(), 2)])
    assert caught.value.data == {"section": "nic", "instance": 2}


def test_post_save_is_called_when_saving_fails():
    done = []
    d = Description("nic", fields=(Field("x", U8),), post_save=done.append)
    with pytest.raises(SourceError, match="field 'x': 256 is no uint8"):
        save([Section(d, Thing(x=256))])
    assert len(done) == 1


def test_checks():
    d = Description("ring", fields=(
        Field("size", U32), Field("head", U32), Check("head-in-ring", lambda r, _: r.head < r.size),
        Field("kind", Equal(Text(20))),
    ))  # fmt: skip
    here = Thing(size=4, head=3, kind="virtio")
    assert move(d, here, Thing(kind="virtio")) == here
    with pytest.raises(PeerRefused, match="field 'head-in-ring': does not hold"):
        move(d, Thing(size=4, head=4, kind="virtio"), Thing(kind="virtio"))
    with pytest.raises(PeerRefused, match="field 'kind': is 'virtio' there and 'e1000' here"):
        move(d, here, Thing(kind="e1000"))


def test_fields_that_went():
    """Their bytes are passed over; or they are in old versions only."""
    old = Description("x", 1, 1, (Field("a", U8), Field("gone", U32), Field("b", U8)))
    new = Description("x", 2, 1, (Field("a", U8), Field("pad", Unused(4), until=2), Field("b", U8),
                                  Field("gone", U32, until=1)))  # fmt: skip
    with pytest.raises(PeerRefused, match="'pad': was to come, and 'gone' is not known here"):
        load(save([Section(old, Thing(a=1, gone=2, b=3))]),
             [Section(Description("x", 2, 1, new.fields[:3]), Thing())])  # fmt: skip
    named = Description("x", 2, 1, (Field("a", U8), Field("gone", Unused(4), until=2),
                                    Field("b", U8)))  # fmt: skip
    there = Thing()
    load(save([Section(old, Thing(a=1, gone=2, b=3))]), [Section(named, there)])
    assert there == Thing(a=1, b=3)
    assert content(named, there).hex() == "0103"
    assert bytes(parse(save([Section(named, there, version=1)]))[0].content).hex() == "010000000003"


# ---- what does not fit, by name ------------------------------------------------------------

ALL = Description("all", fields=(
    Field("f", FLOAT64), Field("n", U16), Field("rules", List(U8, most=3, count="n")),
    Field("blob", Blob(4)), Field("text", Text(8)), Field("mac", Buffer(6)),
    Field("three", Array(Array(I8, 2), 3)),
))  # fmt: skip


def everything(**changes):
    return Thing(**({
        "f": 0.5, "n": 2, "rules": [7, 8], "blob": b"abcd", "text": "\u00e4", "mac": MAC,
        "three": [[1, 2], [3, 4], [-5, -6]],
    } | changes))  # fmt: skip


def test_everything_there_is():
    assert move(ALL, everything(), Thing()) == everything()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 3}, "'rules': has 2 elements, and 'n' says 3"),
        ({"rules": [1, 2, 3, 4]}, "'rules': has 4 elements, 3 at the most"),
        ({"rules": [1, 256]}, "'rules': .* is no uint8"), ({"rules": "a"}, "'rules': 'a' is no"),
        ({"blob": b"abcde"}, "'blob': has 5 elements, 4"), ({"blob": "x"}, "'blob': .* no bytes"),
        ({"text": "\udc80"}, "'text': .* is not UTF-8"), ({"text": 7}, "'text': 7 is no text"),
        ({"mac": b"abc"}, "'mac': has 3 bytes, not 6"), ({"f": "x"}, "'f': .* is no float64"),
        ({"three": [[1, 2], [3]] * 2}, "'three': has 4 elements, not 3"),
        ({"three": [[1, 2], [3], [4, 5]]}, r"'three\[1\]': has 1 elements, not 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved(change, why):
    with pytest.raises(SourceError, match=f"section 'all' field {why}"):
        save([Section(ALL, everything(**change))])


def test_an_object_without_the_field():
    with pytest.raises(SourceError, match="field 'f': the object has no 'f'"):
        save([Section(ALL, Thing())])


def fields_of(**changes):
    """ALL with other fields."""
    fields = tuple(changes.get(f.name, f) for f in ALL.fields)
    return Description("all", fields=tuple(f for f in fields if f is not None))


@pytest.mark.parametrize(
    ("changes", "error", "field", "why"),
    [
        ({"n": Field("n", U32)}, PeerRefused, "n", "is uint16 there and uint32 here"),
        ({"n": Field("n", I16)}, PeerRefused, "n", "is uint16 there and int16 here"),
        ({"mac": Field("mac", Buffer(8))}, PeerRefused, "mac", r"is buffer\[6\] there"),
        ({"text": Field("text", Blob(8))}, PeerRefused, "text", "is text there and blob here"),
        ({"rules": Field("rules", List(U16, 3))}, PeerRefused, "rules", "is uint8 there and"),
        ({"rules": Field("rules", List(U8, 1))}, PeerRefused, "rules", "has 2 elements, here 1 at"),
        ({"blob": Field("blob", Blob(3))}, PeerRefused, "blob", "has 4 elements, here 3 at the"),
        ({"blob": None}, PeerRefused, "text", "was to come, and 'blob' is not known here"),
        ({"three": None}, PeerRefused, "three", "is not known here"),
        ({"f": Field("g", FLOAT64)}, PeerRefused, "g", "was to come, and 'f' is not known here"),
        ({"three": Field("three", Array(Array(I8, 3), 3))}, PeerRefused, "three", r"is array\[2\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(changes, error, field, why):
    with pytest.raises(error, match=why) as caught:
        load(save([Section(ALL, everything())]), [Section(fields_of(**changes), Thing())])
    assert caught.value.data == {"section": "all", "instance": 0, "field": field}


def test_a_field_that_is_missing():
    data = save([Section(fields_of(blob=None), everything())])
    with pytest.raises(PeerRefused, match="'all' field 'blob': is not in what came"):
        load(data, [Section(ALL, Thing())])
    data = save([Section(fields_of(three=None), everything())])
    with pytest.raises(PeerRefused, match="'all' field 'three': is not in what came"):
        load(data, [Section(ALL, Thing())])


def test_a_field_that_cannot_be_set():
    with pytest.raises(DestinationError, match="'nic' field 'mac': setting it failed"):
        load(save([Section(OLD, Thing(mac=MAC))]), [Section(OLD, (1, 2))])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Description(""), lambda: Description("x" * 256), lambda: Description("a\nb"),
        lambda: Description("x", 1, 2), lambda: Description("x", -1),
        lambda: Description("x", fields=(Field("a", U8), Field("a", U8))),
        lambda: Description("x", subsections=(Description("y"),)),
        lambda: Description("x", subsections=(Description("x/y"), Description("x/y"))),
        lambda: Section(Description("x"), Thing(), instance=-1),
        lambda: [d := Description("x")] + [
            d := Description("x", fields=(Field("a", Struct(d)),)) for _ in range(9)
        ],
    ],
)  # fmt: skip
def test_descriptions_that_could_not_be_loaded(make):
    with pytest.raises(ValueError, match=r"x|name"):
        make()


# ---- sections ------------------------------------------------------------------------------


def two():
    return [Section(OLD, Thing(mac=MAC), 0), Section(OLD, Thing(mac=MAC[::-1]), 1),
            Section(ALL, everything())]  # fmt: skip


def test_sections_have_a_name_and_an_instance():
    there = [Section(ALL, Thing()), Section(OLD, Thing(), 1), Section(OLD, Thing(), 0)]
    load(save(two()), there)
    assert [s.value for s in reversed(there)] == [
        Thing(mac=MAC),
        Thing(mac=MAC[::-1]),
        everything(),
    ]
    with pytest.raises(UsageError, match="two sections are called 'nic'"):
        save([*two(), Section(NEW, Thing(), 1)])


def test_a_section_that_is_not_known_and_one_that_is_missing():
    """Before any hook is called, and before anything is loaded."""
    first = Thing()
    with pytest.raises(PeerRefused, match=r"section 'nic' \(1\) came, and is not known here"):
        load(save(two()), [Section(OLD, first), Section(ALL, Thing())])
    with pytest.raises(PeerRefused, match="section 'iommu' is missing in what came") as caught:
        load(save([Section(OLD, Thing(mac=MAC))]), [Section(OLD, first), Section(IOMMU, Thing())])
    assert caught.value.data == {"section": "iommu", "instance": 0}
    assert first == Thing()
    load(save([]), [Section(OLD, first, optional=True), Section(VLAN, first)])


def test_a_section_that_is_not_needed():
    assert parse(save([Section(VLAN, Thing(vlan=0))])) == []
    assert [s.name for s in parse(save([Section(VLAN, Thing(vlan=1))]))] == ["nic/vlan"]


def test_sections_of_several_streams_in_one():
    first, second = parse(save(two()[:2])), parse(save(two()[2:]))
    assert join([*first, *second]) == save(two())
    assert join([]) == save([])


def test_what_a_section_says_of_itself():
    """For tools that know none of it."""
    one, other, last = parse(save(two()))
    assert (one.key, other.key, last.key) == (("nic", 0), ("nic", 1), ("all", 0))
    assert values_of(one) == {"mac": MAC}
    assert values_of(last) == vars(everything())
    (nic,) = parse(save([Section(NEW, Thing(mac=MAC, vlan=7, bits=0))]))
    assert values_of(nic) == {"mac": MAC, "nic/vlan": {"vlan": 7}}
    (skip,) = parse(save([Section(SKIPPING, skipping(skip=True))]))
    assert values_of(skip) == {"a": 1, "b": 2, "d": 4, "f": 6}
    (iommu,) = parse(save([Section(IOMMU, Thing(id=7, domains={5: SECOND}))]))
    assert values_of(iommu) == {
        "id": 7,
        "domains": [
            [5, {"id": 5, "mappings": [[0x1000000, {"phys_addr": 0xF000000, "flags": 3}]]}]
        ],
    }
    (pointers,) = parse(save([Section(INTS, Thing(ar=[1, None, 2, 3]))]))
    assert values_of(pointers) == {"ar": [1, None, 2, 3]}


def test_a_stream_of_another_kind_or_version():
    data = save(two())
    for other in (b"", b"PFD", b"QEVM" + data[4:], data[:7]):
        with pytest.raises(RemoteProtocolError, match="no device state, or only the beginning"):
            parse(other)
    with pytest.raises(RemoteProtocolError, match="of version 2: 1 is known"):
        parse(data[:4] + b"\0\0\0\2" + data[8:])
    with pytest.raises(RemoteProtocolError, match="'all' and its end 4 more bytes follow"):
        parse(data + b"more")


def test_the_example_of_the_manual():
    """It is Python, and its description is one."""
    text = (Path(__file__).resolve().parents[2] / "docs/device-state.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(example, "example", "exec")
    found = {"__name__": "example"}
    exec(example.partition("# at the source")[0], found)
    here = found["Filter"]([found["Rule"](22), found["Rule"](80)], 7)
    assert move(found["FILTER"], here, found["Filter"]()) == here
