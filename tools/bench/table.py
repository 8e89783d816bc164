"""Plain text tables and the few statistics in them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

__all__ = ["mebibytes", "median", "megabytes", "number", "ratio", "ratio_text", "render"]


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed, the first one flush left, the others flush right.

    A row shorter than the header is a remark: its last cell takes the rest of the line.
    """
    full = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in [header, *full]) for i in range(len(header))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows), 0) if rows else widths[0]

    def line(cells: Sequence[str]) -> str:
        out = [cells[0].ljust(widths[0])]
        if len(cells) < len(header):
            return "  ".join([*out, *cells[1:]])
        return "  ".join([*out, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float] | None:
    """How many times faster `ours` is: median of the ratios within a round, ratio of the
    shortest times. Both: round -> time."""
    rounds = ours.keys() & theirs.keys()
    if not rounds:
        return None
    return median([theirs[i] / ours[i] for i in rounds]), min(theirs.values()) / min(ours.values())


def ratio_text(pair: tuple[float, float] | None) -> str:
    """1.25 (1.31): by round, by shortest time."""
    return "-" if pair is None else f"{pair[0]:.2f} ({pair[1]:.2f})"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def mebibytes(count: float) -> str:
    return f"{count / (1 << 20):.0f}"
