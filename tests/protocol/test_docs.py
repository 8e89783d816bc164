"""Pictures and tables in the documents are those of the code."""

import ast
import re
from pathlib import Path

from pageferry.pipeline import state
from pageferry.tools import exit_codes
from pageferry.transport import session

ROOT = Path(__file__).resolve().parents[2]


def test_exit_codes_of_the_readme():
    assert exit_codes.table() in (ROOT / "README.md").read_text()


def test_state_diagrams_of_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert state.diagram() in text
    assert session.diagram() in text


def test_every_option_of_the_command_line_is_in_the_readme():
    from pageferry.tools.cli.copy import copy_command

    text = (ROOT / "README.md").read_text()
    for option in copy_command.params:
        for name in option.opts:
            if name.startswith("--") and name != "--batch-pages":
                assert name in text


def qemu_rows():
    """Name, tests and remark of each row in docs/qemu-tests.md."""
    lines = (ROOT / "docs/qemu-tests.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines
             if line.startswith("| `/")]  # fmt: skip
    return [(name.strip("`"), re.findall(r"`(tests/[^`]+)`", tests), why)
            for name, tests, why in cells]  # fmt: skip


def test_every_test_that_qemus_are_compared_with_exists():
    found = {}
    for _, tests, _ in qemu_rows():
        for where in tests:
            file, _, name = where.partition("::")
            if file not in found:
                tree = ast.parse((ROOT / file).read_text())
                found[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.startswith("test_") and name in found[file], where


def test_every_test_of_qemus_has_one_of_ours_or_a_reason():
    """Each once, and as many as the text says."""
    rows = qemu_rows()
    names = [name for name, _, _ in rows]
    assert len(set(names)) == len(names) > 100
    reasons = [why for _, tests, why in rows if not tests]
    apply = [why for why in reasons if why.startswith("does not apply: ")]
    later = [why for why in reasons if why.startswith("not yet: ")]
    assert len(reasons) == len(apply) + len(later)
    says = (
        f"{len(rows)} names: {len(rows) - len(reasons)} have a test here, {len(apply)} do not "
        f"apply, {len(later)} are not yet."
    )
    assert says in (ROOT / "docs/qemu-tests.md").read_text()
