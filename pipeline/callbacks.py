"""Calling what a caller gave us: its mistakes are logged, and end no migration.

Knows nothing of what is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("pageferry")


def tell(callback: Callable[..., None] | None, *arguments: Any) -> None:
    """Call `callback`, if there is one."""
    if callback is None:
        return
    try:
        callback(*arguments)
    except Exception:
        _log.exception("a callback failed")
