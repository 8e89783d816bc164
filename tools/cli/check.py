"""`pageferry check`: what this host can do, and what each lack costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from ...workers.host import Finding, description, findings


def table(found: Sequence[Finding]) -> str:
    """A line a finding, for people."""
    width = max(len(finding.name) for finding in found)
    return "\n".join(_line(finding, width) for finding in found)


def _line(finding: Finding, width: int) -> str:
    mark = "ok" if finding.ok else "--"
    cost = f": {finding.cost}" if finding.cost else ""
    return f"{mark}  {finding.name:<{width}}  {finding.detail}{cost}"


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def check_command(as_json: bool) -> None:
    """Show what this host can do, and what each lack costs.

    The exit code is 0 whatever it lacks: this is information, not a verdict.
    """
    found = findings()
    if as_json:
        print(json.dumps({"host": description(), "findings": [asdict(f) for f in found]}))
    else:
        print(table(found))
