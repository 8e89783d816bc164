"""`pageferry clean`: what runs that were killed have left on this host."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from ...transport.errors import UsageError
from ...transport.quantities import format_bytes
from ...workers.leftovers import Leftover, as_dict, clean

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (0, "s"))


def table(found: Sequence[Leftover], dry_run: bool) -> str:
    """A line a leftover, for people."""
    if not found:
        return "nothing was left here"
    return "\n".join(_line(leftover, dry_run) for leftover in found)


def _line(found: Leftover, dry_run: bool) -> str:
    did = ("would remove" if dry_run else "removed") if found.removed else "kept"
    about = [" ".join(filter(None, (found.kind, found.what))), _age(found.age)]
    if found.size:
        about.insert(1, format_bytes(found.size))
    why = f": {found.why}" if found.why else ""
    return f"{did}  {found.path}  ({', '.join(about)}){why}"


def _age(seconds: float) -> str:
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    return f"{seconds / max(1, size):.0f} {unit} old"


@click.command("clean")
@click.argument("directories", nargs=-1, metavar="[DIR]...")
@click.option("--partial", is_flag=True,
              help="Also remove what arrived of images that broke off (in DIR): the next attempt "
                   "begins anew.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Remove nothing; say what would be.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def clean_command(
    directories: tuple[str, ...], partial: bool, dry_run: bool, as_json: bool
) -> None:
    """Remove what runs that were killed have left on this host, and in each DIR of images.

    What a live pageferry has, or another user, is never touched. Every start of pageferry does the
    same for this host, without DIR. Processes that a killed pageferry stopped are shown.
    """
    if partial and not directories:
        raise UsageError("--partial needs the directories of images: pageferry clean --partial DIR")
    try:
        found = clean(list(directories), partial=partial, dry_run=dry_run)
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from e
    if as_json:
        print(json.dumps({"dry-run": dry_run, "leftovers": [as_dict(f) for f in found]}))
    else:
        print(table(found, dry_run))
