"""Pictures and tables in the documents are those of the code."""

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
