"""Device state: random descriptions and values, and streams that were damaged or made up."""

from types import SimpleNamespace as Thing

import msgspec
import pytest
from fuzz_states import again, record, stream
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pageferry.transport.errors import PeerRefused, RemoteProtocolError
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
    Description,
    Field,
    List,
    Map,
    Nullable,
    Section,
    Struct,
    Text,
    join,
    load,
    parse,
    save,
    values_of,
)
from pageferry.transport.vmstate.layout import MAX_DEPTH, MAX_VALUES

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
names = st.text("abcdefgh_-", min_size=1, max_size=6)


def _numbers():
    for i, kind in enumerate((U8, U16, U32, U64)):
        yield kind, st.integers(0, (1 << (8 << i)) - 1)
    for i, kind in enumerate((I8, I16, I32, I64)):
        half = 1 << ((8 << i) - 1)
        yield kind, st.integers(-half, half - 1)


LEAVES = [
    *_numbers(), (BOOL, st.booleans()), (FLOAT64, st.floats(allow_nan=False)),
    (Blob(20), st.binary(max_size=20)), (Text(80), st.text(max_size=20)),
    *((Buffer(n), st.binary(min_size=n, max_size=n)) for n in (0, 1, 6)),
]  # fmt: skip


def _structures(inner):
    """Objects of some fields, with a subsection for some of them."""

    def make(fields, below):
        chosen = [(f"{i}{name}", *kind) for i, (name, kind) in enumerate(fields)]
        sub = [(f"s{i}{name}", *kind) for i, (name, kind) in enumerate(below)]

        def described(name, of, **more):
            return Description(name, 1, 1, tuple(Field(n, kind) for n, kind, _ in of), **more)

        subsections = (described("struct/sub", sub, needed=lambda o: o.sub),) if sub else ()
        whole = described("struct", chosen, subsections=subsections)
        values = {name: value for name, _, value in [*chosen, *sub]} | {"sub": st.booleans()}
        return Struct(whole, lambda: Thing(sub=None)), st.fixed_dictionaries(values).map(
            lambda found: Thing(**found)
        )

    fields = st.lists(st.tuples(names, inner), max_size=4)
    return st.builds(make, fields, st.lists(st.tuples(names, inner), max_size=2))


def _composed(inner):
    def array(of, n):
        return Array(of[0], n), st.lists(of[1], min_size=n, max_size=n)

    def mapping(of):
        return Map(U8, of[0], 5), st.dictionaries(st.integers(0, 255), of[1], max_size=5)

    return (
        st.builds(array, inner, st.integers(0, 4))
        | inner.map(lambda of: (List(of[0], 5), st.lists(of[1], max_size=5)))
        | inner.filter(lambda of: not isinstance(of[0], Nullable))
        .map(lambda of: (Nullable(of[0]), st.none() | of[1]))
        | inner.map(mapping)
        | _structures(inner)
    )  # fmt: skip


kinds = st.recursive(st.sampled_from(LEAVES), _composed, max_leaves=6)


@st.composite
def sections(draw):
    """A few sections of one description each, and the same without values."""
    found, blank = [], []
    for i in range(draw(st.integers(1, 3))):
        structure, values = draw(_structures(kinds))
        fields = (Field("all", structure), Field("more", U16))
        d = Description(f"section-{i}", draw(st.integers(0, 3)), 0, fields)
        found.append(Section(d, Thing(all=draw(values), more=i)))
        blank.append(Section(d, Thing()))
    return found, blank


def known(value):
    """A value without what did not travel: a subsection's fields, where it was not needed."""
    if isinstance(value, Thing):
        of = {k: known(v) for k, v in vars(value).items() if k != "sub"}
        return {k: v for k, v in of.items() if not k.startswith("s") or value.sub is not False}
    if isinstance(value, list):
        return [known(v) for v in value]
    return {k: known(v) for k, v in value.items()} if isinstance(value, dict) else value


def error_of(look):
    """What it raises, of what a peer can be blamed for; None if nothing."""
    try:
        look()
    except (RemoteProtocolError, PeerRefused) as e:
        return e
    return None


@FEW
@given(sections())
def test_what_was_saved_is_loaded(both):
    here, there = both
    data = save(here)
    load(data, there)
    assert [known(s.value) for s in there] == [known(s.value) for s in here]
    saved = parse(data)
    assert join(saved) == data == again(data)
    for section in saved:
        assert values_of(section)["more"] == int(section.name[-1])


@FEW
@given(sections(), st.data())
def test_whatever_is_cut_off_or_turned_over_is_seen(both, data):
    """At each place, by its section; and nothing is loaded."""
    here, there = both
    whole = save(here)
    cut = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    for damaged in (whole[:cut], bytes(flipped), whole + whole[cut:]):
        with pytest.raises(RemoteProtocolError, match="device state"):
            load(damaged, there)
    assert all(s.value == Thing() for s in there)
    at = 8
    for section in parse(whole):
        begin, at = at, at + len(section.record)
        named = begin + 2 + len(section.name) < bit // 8 < at
        with pytest.raises(RemoteProtocolError) as caught:
            parse(bytes(flipped))
        assert not named or caught.value.data["section"] == section.name


@FEW
@given(sections(), st.data())
def test_contents_that_were_made_up(both, data):
    """With right sums: loaded, or refused with the section's name; never anything else."""
    here, there = both
    whole = save(here)
    content = bytearray(parse(whole)[0].content)
    edit = data.draw(st.sampled_from(["flip", "cut", "more", "random"]))
    if edit == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif edit == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        extra = data.draw(st.binary(min_size=1, max_size=40))
        content = bytearray(extra) if edit == "random" else content + extra
    made_up = again(whole, content=bytes(content))
    for look in (lambda: load(made_up, there), lambda: values_of(parse(made_up)[0])):
        error = error_of(look)
        assert error is not None or edit not in ("cut", "more")
        assert error is None or error.data["section"] == "section-0"


shapes = st.recursive(
    st.fixed_dictionaries({
        "type": st.sampled_from([
            "uint8", "uint64", "bool", "buffer", "blob", "text", "unused", "list", "array", "map",
            "struct", "nullable", "float64", "else",
        ]),
        "size": st.sampled_from([0, 1, 2, -1, 1 << 40]),
    }),
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(["list", "array", "map", "nullable", "struct"]), "of": inner},
        optional={"key": inner, "size": st.sampled_from([0, 3, 1 << 33]), "struct": (
            st.fixed_dictionaries({
                "name": names, "version": st.integers(0, 2),
                "fields": st.lists(st.fixed_dictionaries({"name": names, "shape": inner})),
            })
        )},
    ),
    max_leaves=8,
)  # fmt: skip


@FEW
@given(st.lists(shapes, max_size=4), st.binary(max_size=200))
def test_layouts_that_were_made_up(made_up, content):
    """A loader is not misled, and who shows it comes to an end."""
    d = Description("made-up", fields=(Field("a", U8), Field("b", Array(I8, 3))))
    there = Section(d, Thing())
    fields = [{"name": "ab"[i % 2], "shape": shape} for i, shape in enumerate(made_up)]
    said = msgspec.json.encode({"name": "made-up", "version": 1, "fields": fields})
    data = stream(record("made-up", content, said))
    for look in (lambda: load(data, [there]), lambda: values_of(parse(data)[0])):
        error = error_of(look)
        assert error is None or error.message.isprintable()


def _nested(depth):
    shape = {"type": "uint8"}
    for _ in range(depth):
        shape = {"type": "list", "of": shape}
    return shape


@pytest.mark.parametrize(
    ("shape", "content", "why"),
    [
        (_nested(MAX_DEPTH + 1), b"\0\0\0\1" * (MAX_DEPTH + 1) + b"x", "nested deeper than"),
        (_nested(40_000), b"", "makes no sense"),
        ({"type": "array", "size": 1 << 50, "of": {"type": "array", "of": {"type": "uint8"}}},
         b"", f"more than {MAX_VALUES} values"),
        ({"type": "list", "of": {"type": "unused"}}, b"\xff" * 4, f"more than {MAX_VALUES}"),
        ({"type": "buffer", "size": 1 << 60}, b"x", "ends too early"),
        ({"type": "blob"}, b"\xff" * 4, "ends too early"),
        ({"type": "list", "of": {"type": "uint64"}}, b"\0\0\1\0", "ends too early"),
        ({"type": "bool"}, b"\2", "2 is neither 0 nor 1"),
        ({"type": "\x1b[31mred"}, b"", "\ufffd.31mred"),
        ({"type": "uint8"}, b"xy", "is 1 bytes longer"),
    ],
)  # fmt: skip
def test_bombs(shape, content, why):
    said = msgspec.json.encode({"name": "bomb", "version": 1, "fields": []})
    said = said[:-2] + b'{"name":"a","shape":' + _json(shape) + b"}]}"
    with pytest.raises(RemoteProtocolError, match=why) as caught:
        values_of(parse(stream(record("bomb", content, said)))[0])
    assert caught.value.data["section"] == "bomb"


def _json(shape):
    depth = 0
    while shape.get("of", {}).get("of") and set(shape) == {"type", "of"}:
        shape, depth = shape["of"], depth + 1
    return b'{"type":"list","of":' * depth + msgspec.json.encode(shape) + b"}" * depth


@FEW
@given(st.binary(max_size=300))
def test_anything_at_all(data):
    for head in (b"", b"PFDS\0\0\0\1", b"PFDS\0\0\0\1\4"):
        assume(not (head and not data))
        with pytest.raises(RemoteProtocolError):
            parse(head + data)
