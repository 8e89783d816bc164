"""Descriptions: what a section or a structure consists of, and how it is saved and loaded.

A description is written once and shared by all objects of its kind. An old stream is loaded by a
newer description if that says since which version each field is there; a new stream by an older
description if all that it does not know is left out: a subsection that is not needed, a field whose
condition does not hold, or a section that is saved as an older version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .coding import Reader, Writer
from .kinds import Kind
from .layout import MAX_DEPTH, Column, Layout, Shape, is_name

Hook = Callable[[Any], None]


@dataclass(frozen=True)
class Field:
    """A field `name`, an attribute of the object (another one, if `attribute` says so).

    `since`: the first version of the description that has it, `until`: the first that has it no
    more. `exists(object, version)`: whether it is there; asked at both ends, which must agree. It
    may look at fields that come before.
    """

    name: str
    kind: Kind
    since: int = 0
    until: int | None = None
    exists: Callable[[Any, int], bool] | None = None
    attribute: str = ""

    def is_in(self, version: int) -> bool:
        return self.since <= version and (self.until is None or version < self.until)

    @property
    def place(self) -> str:
        return self.attribute or self.name


@dataclass(frozen=True)
class Check:
    """No field: a condition on what was loaded so far, refused by its `name` if it does not hold
    (QEMU: VMSTATE_VALIDATE). Saved is nothing."""

    name: str
    holds: Callable[[Any, int], bool]
    since: int = 0

    def is_in(self, version: int) -> bool:
        return self.since <= version


@dataclass(frozen=True)
class Description:
    """What a section, a subsection or a structure consists of.

    `version`: what is saved. `minimum_version`: the oldest that is loaded. `needed(object)`: if it
    is false the section or subsection is left out. Hooks: `pre_save`, `post_save` (also if saving
    failed), `pre_load`, `post_load(object, version)`; one that raises ends it all. `subsections`
    have this name, "/", and more.
    """

    name: str
    version: int = 1
    minimum_version: int = 0
    fields: tuple[Field | Check, ...] = ()
    subsections: tuple[Description, ...] = ()
    needed: Callable[[Any], bool] | None = None
    pre_save: Hook | None = None
    post_save: Hook | None = None
    pre_load: Hook | None = None
    post_load: Callable[[Any, int], None] | None = None

    def __post_init__(self) -> None:
        """ValueError for what could never be loaded: a tool hears it when it starts."""
        if not is_name(self.name):
            raise ValueError(f"{self.name!r} is no name of a section")
        if not 0 <= self.minimum_version <= self.version < 1 << 32:
            raise ValueError(f"{self.name}: versions {self.minimum_version} to {self.version}")
        names = [field.name for field in self.fields if isinstance(field, Field)]
        if len(set(names)) < len(names) or not all(map(is_name, names)):
            raise ValueError(f"{self.name}: each field needs a name of its own")
        below = [sub.name for sub in self.subsections]
        if len(set(below)) < len(below):
            raise ValueError(f"{self.name}: each subsection needs a name of its own")
        for name in below:
            if not name.startswith(f"{self.name}/"):
                raise ValueError(f"subsection {name!r} must be called {self.name}/…")
        if _depth(self.layout()) > MAX_DEPTH:
            raise ValueError(f"{self.name}: nested deeper than {MAX_DEPTH}")

    def layout(self, version: int | None = None) -> Layout:
        """What a stream of `version` (default: the present one) says of it."""
        version = self.version if version is None else version
        columns = [
            Column(field.name, field.kind.shape(), field.exists is not None)
            for field in self.fields
            if isinstance(field, Field) and field.is_in(version)
        ]
        return Layout(self.name, version, columns, [sub.layout() for sub in self.subsections])

    # ---- out -----------------------------------------------------------------------------

    def save(self, out: Writer, value: Any, version: int | None = None) -> None:
        version = self.version if version is None else version
        if self.pre_save is not None:
            out.hook("pre_save", self.pre_save, value)
        try:
            for field in self.fields:
                if isinstance(field, Field) and field.is_in(version):
                    with out.at(field.name):
                        _save_field(out, field, value, version)
            if self.subsections:
                self._save_subsections(out, value)
        finally:
            if self.post_save is not None:
                out.hook("post_save", self.post_save, value)

    def _save_subsections(self, out: Writer, value: Any) -> None:
        there = [sub.needed is None or bool(out.hook("needed", sub.needed, value))
                 for sub in self.subsections]  # fmt: skip
        out.count(sum(there))
        for i, sub in enumerate(self.subsections):
            if there[i]:
                out.count(i)
                begin = len(out.data)
                out.count(0)
                with out.at(sub.name):
                    sub.save(out, value)
                length = len(out.data) - begin - 4
                out.data[begin : begin + 4] = length.to_bytes(4, "big")

    # ---- in ------------------------------------------------------------------------------

    def load(self, source: Reader, there: Layout, value: Any) -> None:
        """Into `value`, what a peer saved that says of it what `there` says."""
        version = there.version
        if version > self.version:
            source.refuse(f"is of version {version}, here {self.version} is the newest known")
        if version < self.minimum_version:
            source.refuse(f"is of version {version}, here {self.minimum_version} is the oldest")
        if self.pre_load is not None:
            source.hook("pre_load", self.pre_load, value)
        self._load_fields(source, there, value)
        if there.subsections:
            self._load_subsections(source, there, value)
        if self.post_load is not None:
            source.hook("post_load", self.post_load, value, version)

    def _load_fields(self, source: Reader, there: Layout, value: Any) -> None:
        columns = list(reversed(there.fields))
        for field in self.fields:
            if not field.is_in(there.version):
                continue
            with source.at(field.name):
                if isinstance(field, Check):
                    if not source.hook("the check", field.holds, value, there.version):
                        source.refuse("does not hold")
                    continue
                if not columns or columns[-1].name != field.name:
                    self._explain(source, field, columns)
                _load_field(source, field, columns.pop(), value, there.version)
        if columns:
            with source.at(columns[-1].name):
                source.refuse(f"is not known here (version {there.version})")

    def _explain(self, source: Reader, field: Field, columns: list[Column]) -> None:
        """Another field than `field` comes: is that one missing, or the other one unknown?"""
        others = {known.name for known in self.fields}
        if not columns or columns[-1].name in others:
            source.refuse("is not in what came")
        source.refuse(f"was to come, and {columns[-1].name!r} is not known here")

    def _load_subsections(self, source: Reader, there: Layout, value: Any) -> None:
        known = {sub.name: sub for sub in self.subsections}
        seen: set[str] = set()
        for _ in range(source.count()):
            index, length = source.count(), source.count()
            if index >= len(there.subsections):
                source.damaged(f"has no subsection {index}")
            layout = there.subsections[index]
            with source.at(layout.name):
                if layout.name in seen:
                    source.damaged("is there twice")
                seen.add(layout.name)
                if layout.name not in known:
                    source.refuse("is a subsection that is not known here")
                with source.within(length):
                    known[layout.name].load(source, layout, value)


def _save_field(out: Writer, field: Field, owner: Any, version: int) -> None:
    if field.exists is not None:
        there = bool(out.hook("the condition", field.exists, owner, version))
        out.flag(there)
        if not there:
            return
    value = None
    if field.kind.has_value:
        try:
            value = getattr(owner, field.place)
        except AttributeError:
            out.fail(f"the object has no {field.place!r}")
    field.kind.save(out, value, owner)


def _load_field(source: Reader, field: Field, column: Column, owner: Any, version: int) -> None:
    there = source.flag() if column.conditional else True
    wanted = field.exists is None or bool(
        source.hook("the condition", field.exists, owner, version)
    )
    if there != wanted:
        source.refuse("is in what came, and not wanted here" if there else "is not in what came")
    if not there:
        return
    field.kind.fits(source, column.shape)
    before = getattr(owner, field.place, None) if field.kind.has_value else None
    value = field.kind.load(source, column.shape, before, owner)
    if field.kind.has_value and (value is not before or not hasattr(owner, field.place)):
        source.hook("setting it", setattr, owner, field.place, value)


def _depth(layout: Layout) -> int:
    """How deep a layout is nested."""
    return 1 + max(
        [0, *(_shape_depth(column.shape) for column in layout.fields),
         *map(_depth, layout.subsections)]
    )  # fmt: skip


def _shape_depth(shape: Shape) -> int:
    inner = [_shape_depth(part) for part in (shape.of, shape.key) if part is not None]
    if shape.struct is not None:
        inner.append(_depth(shape.struct))
    return 1 + max(inner, default=0)


# ---- structures ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Struct(Kind):
    """A structure: an object with a description of its own. It is loaded into the object that is
    there; where there is none, `make()` makes one."""

    description: Description
    make: Callable[[], Any] | None = None

    def shape(self) -> Shape:
        return Shape("struct", struct=self.description.layout())

    def save(self, out: Writer, value: Any, owner: object) -> None:
        self.description.save(out, value)

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        assert there.struct is not None  # `fits` has looked
        if before is None:
            if self.make is None:
                source.refuse("there is no object to load it into (give its Struct a `make`)")
            before = source.hook("make", self.make)
        self.description.load(source, there.struct, before)
        return before


@dataclass(frozen=True)
class Temporary(Kind):
    """Fields of an object that is made of the owner, by `make(owner)`, to be saved or loaded into,
    and then forgotten: its pre_save computes, its post_load gives back (QEMU: VMSTATE_WITH_TMP)."""

    description: Description
    make: Callable[[Any], Any]
    has_value = False

    def shape(self) -> Shape:
        return Shape("struct", struct=self.description.layout())

    def save(self, out: Writer, value: Any, owner: object) -> None:
        self.description.save(out, out.hook("make", self.make, owner))

    def load(self, source: Reader, there: Shape, before: Any, owner: object) -> Any:
        assert there.struct is not None  # `fits` has looked
        self.description.load(source, there.struct, source.hook("make", self.make, owner))
        return before


@dataclass(frozen=True)
class Section:
    """A description and the object that is saved by it, or loaded into.

    `instance`: which of several of that name. `version`: to be saved as, for a reader that is
    older. `optional`: what is loaded need not have it.
    """

    description: Description
    value: Any
    instance: int = 0
    version: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        d = self.description
        if self.version is not None and not d.minimum_version <= self.version <= d.version:
            raise ValueError(f"{d.name} has no version {self.version} to be saved as")
        if not 0 <= self.instance < 1 << 32:
            raise ValueError(f"{d.name}: instance {self.instance}")

    @property
    def key(self) -> tuple[str, int]:
        return self.description.name, self.instance

    @property
    def may_be_absent(self) -> bool:
        return self.optional or self.description.needed is not None

    def older(self, version: int) -> Section:
        """The same, saved as `version`."""
        return replace(self, version=version)


def twice(sections: Iterable[Section]) -> tuple[str, int] | None:
    """A name and instance that two sections have, or None."""
    seen: set[tuple[str, int]] = set()
    for section in sections:
        if section.key in seen:
            return section.key
        seen.add(section.key)
    return None
