"""pageferry moves the memory of running guests between hosts.

    import pageferry
    report = pageferry.migrate("image:vm.mem", "image:copy.mem", codec="zstd", verify=True)

Everything else is in the subpackages; see ARCHITECTURE.md. Names are loaded when first
used: the command line starts its workers before it imports the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .pipeline.api import (
        dirty_rate,
        dirty_rate_async,
        migrate,
        migrate_async,
        plan,
        plan_async,
    )
    from .pipeline.parameters import Parameters
    from .transport.errors import PageferryError

__all__ = [
    "PageferryError", "Parameters", "__version__", "dirty_rate", "dirty_rate_async", "migrate",
    "migrate_async", "plan", "plan_async",
]  # fmt: skip

_FUNCTIONS = ("dirty_rate", "dirty_rate_async", "migrate", "migrate_async", "plan", "plan_async")
_WHERE = {
    **dict.fromkeys(_FUNCTIONS, "pipeline.api"),
    "Parameters": "pipeline.parameters",
    "PageferryError": "transport.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
