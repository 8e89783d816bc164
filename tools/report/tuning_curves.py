"""`pageferry tune --curves FILE`: the curves as a picture, by matplotlib. Reads reports
(pipeline/tuning_report.py)."""

from __future__ import annotations

import os
from typing import Any

from ...transport.errors import HostLacks, UsageError

_FORMS = (".png", ".svg")
_BLUE, _GREY = "#1f6feb", "#6e7781"


def check_curves(path: str) -> None:
    """UsageError or HostLacks if there is no drawing there: before anything is measured."""
    if os.path.splitext(path)[1].lower() not in _FORMS:
        raise UsageError(f"--curves draws .png or .svg, not {path}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--curves: cannot write into {folder}")
    _figure()


def _figure() -> Any:
    """matplotlib's Figure: without pyplot there is no display, and no state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise HostLacks("--curves needs matplotlib: pip install 'pageferry[report]'") from e
    return Figure


def draw_curves(report: dict[str, Any], path: str) -> None:
    """One panel a factor: throughput with its spread, and processor time."""
    curves = report["curves"]
    figure = _figure()(figsize=(4.2 * len(curves), 3.6), layout="constrained")
    for place, (factor, points) in enumerate(curves.items(), 1):
        _panel(figure.add_subplot(1, len(curves), place), factor, points)
    figure.suptitle(f"{report['source']} to {report['destination']}", fontsize=10)
    temporary = f"{path}.part{os.path.splitext(path)[1]}"
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    except OSError as e:
        raise UsageError(f"--curves: cannot write {path}: {e.strerror}") from e
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _panel(axes: Any, factor: str, points: list[dict[str, Any]]) -> None:
    names = [point["value"] for point in points]
    rates = [point["rate"] / 1e9 for point in points]
    errors = [rate * (point["spread"] or 0) for rate, point in zip(rates, points, strict=True)]
    places = range(len(names))
    axes.errorbar(places, rates, yerr=errors, color=_BLUE, marker="o", capsize=3)
    axes.set_xticks(places, names, rotation=30 if factor == "codec" else 0)
    axes.set_xlabel(factor)
    axes.set_ylabel("GB/s", color=_BLUE)
    axes.set_ylim(bottom=0)
    beside = axes.twinx()
    beside.plot(places, [point["cpu"] for point in points], color=_GREY, marker="s", ls="--")
    beside.set_ylabel("CPU s/GB", color=_GREY)
    beside.set_ylim(bottom=0)
