"""Device state: what a tool carries beside memory, described field by field.

    RULE = Description("filter/rule", fields=(Field("port", U16), Field("allow", BOOL)))
    FILTER = Description(
        "filter", version=2, minimum_version=1,
        fields=(Field("rules", List(Struct(RULE, Rule), most=1024)), Field("hits", U64, since=2)),
    )
    data = save([Section(FILTER, here)])
    load(data, [Section(FILTER, there)])

The counterpart of QEMU's vmstate (migration/vmstate.c, include/migration/vmstate.h): versions,
conditions, subsections, hooks. Other than there, the stream says what its fields are, so that what
does not fit is refused by its name, and carries sums, so that what was damaged is never loaded.
docs/device-state.md is its manual. No socket, clock, process, file or log in this package.
"""

from __future__ import annotations

from .description import Check, Description, Field, Section, Struct, Temporary
from .kinds import (
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
    Equal,
    Kind,
    List,
    Map,
    Nullable,
    Text,
    Unused,
)
from .reading import values_of
from .stream import MAGIC, MAX_SECTIONS, Saved, join, load, parse, save

__all__ = [
    "BOOL",
    "FLOAT64",
    "I8",
    "I16",
    "I32",
    "I64",
    "MAGIC",
    "MAX_SECTIONS",
    "U8",
    "U16",
    "U32",
    "U64",
    "Array",
    "Blob",
    "Buffer",
    "Check",
    "Description",
    "Equal",
    "Field",
    "Kind",
    "List",
    "Map",
    "Nullable",
    "Saved",
    "Section",
    "Struct",
    "Temporary",
    "Text",
    "Unused",
    "join",
    "load",
    "parse",
    "save",
    "values_of",
]
