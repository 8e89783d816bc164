"""Drawings for a page: SVG as text, one number or name at a time made safe. Pure; knows seconds,
bytes and shares, nothing of migrations.

Widths are percentages, so that letters keep their size on a narrow screen; lines are drawn in a
picture within the picture, which is stretched.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What XML 1.0 does not allow in a document, however it is written.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LONGEST_TEXT = 4000
_MOST_NUMBER = 1e18
_PLOT, _ABOVE, _BELOW = 150, 18, 22
_LANE = 30
# Narrower than this, nobody sees it, or no number fits in.
_NARROWEST, _NUMBER_WIDTH = 0.4, 4.0


def escape(text: object, longest: int = _LONGEST_TEXT) -> str:
    """`text` for an element or an attribute, whoever it comes from."""
    plain = str(text)
    if len(plain) > longest:
        plain = plain[:longest] + " …"
    return html.escape(_ILLEGAL.sub("\ufffd", plain), quote=True)


def number(value: object) -> float | None:
    """`value`, if it is a number that something can be drawn from."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # compared, not converted: an int may be larger than any float, and NaN is never smaller
    return float(value) if -_MOST_NUMBER <= value <= _MOST_NUMBER else None


def share(value: float, whole: float) -> float:
    """Percent, from 0 to 100."""
    return min(100.0, max(0.0, 100.0 * value / whole)) if whole > 0 else 0.0


def ticks(top: float, most: int = 4) -> list[float]:
    """0 and some round numbers up to `top`."""
    top = max(top, 1e-6)
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power * most >= top * 0.999)
    return [i * step for i in range(int(top / step + 1e-6) + 1)]


@dataclass(frozen=True)
class Bar:
    """A stretch of time. `kind`: its class in the style sheet."""

    begin: float
    end: float
    kind: str
    text: str
    title: str


def time_axis(seconds: float, y: float, say: Callable[[float], str]) -> str:
    parts = []
    for tick in ticks(seconds):
        x = share(tick, seconds)
        anchor = "start" if x < 3 else "end" if x > 94 else "middle"
        parts.append(
            f'<line class="tick" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y:.0f}" y2="{y + 4:.0f}"/>'
            f'<text x="{x:.2f}%" y="{y + 17:.0f}" text-anchor="{anchor}">{escape(say(tick))}</text>'
        )
    return "".join(parts)


def timeline(
    lanes: Sequence[Sequence[Bar]],
    seconds: float,
    say: Callable[[float], str],
    label: str,
    lane_height: int = _LANE,
) -> str:
    """Stretches of time under each other, and an axis. Low lanes have no letters in them."""
    height = lane_height * len(lanes)
    gap = min(2, lane_height // 6)
    parts = []
    for i, lane in enumerate(lanes):
        for bar in lane:
            x, width = share(bar.begin, seconds), share(bar.end - bar.begin, seconds)
            x, width = min(x, 100 - _NARROWEST), max(width, _NARROWEST)
            parts.append(
                f'<g><title>{escape(bar.title)}</title><rect class="{escape(bar.kind)}" '
                f'x="{x:.2f}%" width="{width:.2f}%" y="{i * lane_height + gap}" '
                f'height="{lane_height - 2 * gap}" rx="{min(3, lane_height // 4)}"/>'
            )
            if (
                lane_height == _LANE
                and bar.text
                and width >= _NUMBER_WIDTH * max(1.0, len(bar.text) / 3)
            ):
                # a picture within the picture: on a narrow screen it cuts the letters off
                parts.append(
                    f'<svg x="{x:.2f}%" width="{width:.2f}%" y="{i * lane_height}" '
                    f'height="{lane_height}"><text class="in" x="50%" y="20" '
                    f'text-anchor="middle">{escape(bar.text)}</text></svg>'
                )
            parts.append("</g>")
    parts.append(time_axis(seconds, height + 2, say))
    return _svg(height + _BELOW + 2, label, parts)


@dataclass(frozen=True)
class Line:
    """`kind`: its class in the style sheet; points are (seconds, value)."""

    kind: str
    points: Sequence[tuple[float, float]]


def lines(
    drawn: Sequence[Line],
    seconds: float,
    say: Callable[[float], str],
    say_value: Callable[[float], str],
    label: str,
) -> str:
    """Values over time, axes with units. One point alone is a dot."""
    top = max([value for line in drawn for _, value in line.points] + [1.0]) * 1.05
    base = _ABOVE + _PLOT
    parts, labels = [], []
    for tick in ticks(top):
        y = base - _PLOT * tick / top
        parts.append(f'<line class="grid" x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        labels.append(f'<text x="0%" y="{y - 4:.1f}">{escape(say_value(tick))}</text>')
    parts.append(time_axis(seconds, base, say))
    for line in drawn:
        if len(line.points) == 1:
            at, value = line.points[0]
            y = base - _PLOT * share(value, top) / 100
            parts.append(
                f'<circle class="{escape(line.kind)}" cx="{share(at, seconds):.2f}%" '
                f'cy="{y:.1f}" r="4"/>'
            )
    parts.append(
        f'<svg x="0" y="{_ABOVE}" width="100%" height="{_PLOT}" viewBox="0 0 1000 1000" '
        'preserveAspectRatio="none">'
    )
    for line in drawn:
        if len(line.points) > 1:
            points = " ".join(
                f"{10 * share(at, seconds):.1f},{1000 - 10 * share(value, top):.1f}"
                for at, value in line.points
            )
            parts.append(f'<polyline class="{escape(line.kind)}" points="{points}"/>')
    parts.append("</svg>")
    parts += labels  # over the lines, or nobody could read them
    return _svg(base + _BELOW, label, parts)


def histogram(
    counts: Sequence[float],
    names: Sequence[str],
    titles: Sequence[str],
    marks: Sequence[tuple[str, float]],
    label: str,
) -> str:
    """Columns with names below, and marks: (name, where, in columns)."""
    count, base = len(counts), _ABOVE * 2 + _PLOT
    most = max([*counts, 1.0])
    parts = [f'<line class="grid" x1="0%" x2="100%" y1="{base}" y2="{base}"/>']
    width = 100 / max(count, 1)
    every = max(1, -(-count // 6))  # six names fit beside each other on a narrow screen
    for i, (value, name, title) in enumerate(zip(counts, names, titles, strict=True)):
        height = _PLOT * share(value, most) / 100
        parts.append(
            f'<g><title>{escape(title)}</title><rect class="fault" x="{width * (i + 0.06):.2f}%" '
            f'width="{width * 0.88:.2f}%" y="{base - height:.1f}" height="{height:.1f}" '
            'rx="2"/></g>'
        )
        if i % every == 0:
            parts.append(
                f'<text x="{width * i:.2f}%" y="{base + 17}">{escape(name)}</text>'
                f'<line class="tick" x1="{width * i:.2f}%" x2="{width * i:.2f}%" y1="{base}" '
                f'y2="{base + 4}"/>'
            )
    for i, (name, at) in enumerate(marks):
        x = share(at, count)
        anchor = "end" if x > 80 else "start"
        parts.append(
            f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="{6 + 12 * i}" y2="{base}"/>'
            f'<text x="{x:.2f}%" dx="{-4 if anchor == "end" else 4}" y="{14 + 12 * i}" '
            f'text-anchor="{anchor}">{escape(name)}</text>'
        )
    return _svg(base + _BELOW, label, parts)


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" width="100%" '
        f'height="{height:.0f}">{"".join(parts)}</svg>'
    )
