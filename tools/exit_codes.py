"""Prints the README's table of exit codes from the tree of errors."""

from __future__ import annotations

from ..transport.errors import PageferryError, all_errors


def table() -> str:
    """A row a code, named after the first class that has it."""
    rows, seen = ["| code | error | when |", "|---|---|---|", "| 0 | | done |"], set()
    for cls in sorted(all_errors(), key=lambda c: (c.exit_code, c is not PageferryError)):
        if cls.exit_code not in seen:
            seen.add(cls.exit_code)
            rows.append(f"| {cls.exit_code} | {cls.__name__} | {(cls.__doc__ or '').strip()} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
