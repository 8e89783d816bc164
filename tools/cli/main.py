"""`pageferry`: finds the command, turns errors into one line and an exit code. Only this prints
errors. Imports little: a command's own file is imported when it is called, and commands that
move memory start the fork server first.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..._version import __version__
from ...transport.errors import PageferryError
from ...workers.forking import warm_up
from ...workers.privileges import prepare
from .logs import talkative, verbose_option

# command -> the module that has it, whether it starts workers, what it is
COMMANDS: dict[str, tuple[str, bool, str]] = {
    "copy": ("copy", True, "Move a guest on this host, both ends at once."),
    "send": ("send", True, "Move a guest to a receiver elsewhere."),
    "receive": ("receive", True, "Wait for guests and receive them."),
    "batch": ("batch", False, "Move many guests, some at a time; resume, status."),
    "fleet-worker": ("fleet", False, "Let batches elsewhere move what is on this host."),
    "tune": ("tune", True, "Find the settings with which a guest moves best."),
    "dirtyrate": ("dirtyrate", False, "Measure how fast a guest writes."),
    "plan": ("plan", True, "Say how a guest would best be moved, and what that would be like."),
    "status": ("control", False, "Show a running migration."),
    "set": ("control", False, "Change a running migration's parameters."),
    "cancel": ("control", False, "Cancel a running migration."),
    "yank": ("control", False, "Cut a running migration that hangs."),
    "start-postcopy": ("control", False, "Start the guest at its destination now."),
    "continue": ("control", False, "Let a migration switch over that waits for it."),
    "pause": ("control", False, "Drop the connection of a postcopy, to recover it later."),
    "recover": ("control", False, "Connect a paused postcopy again."),
    "relay": ("relay", True, "Connect a stream to a receiver that is here."),
    "serve": ("serve", True, "Serve a snapshot's memory to those who restore it."),
    "inspect": ("inspect", False, "Show what is in a saved migration."),
    "restore": ("restore", True, "Restore a snapshot, or serve a monitor's page faults from one."),
    "snapshot": ("snapshot", True, "Save a guest to a file; it goes on."),
    "clean": ("clean", False, "Remove what killed runs have left."),
    "keys": ("keys", False, "Make, show, allow and revoke keys."),
    "check": ("check", False, "Show what this host can do."),
}


def _is_given(word: str) -> bool:
    """A stream that we were started with."""
    return word.rpartition("=")[2] == "-" or word.rpartition("=")[2].startswith("fd:")


class _Group(click.Group):
    """Commands by name, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, starts_workers, _ = COMMANDS[cmd_name]
        if starts_workers and any(word.split("=")[0] == "--user" for word in sys.argv):
            prepare()  # processes are started when we are that user
        elif starts_workers and any(_is_given(word) for word in sys.argv):
            pass  # they are started when stdin and stdout are no stream any more
        elif starts_workers and "--help" not in sys.argv:
            warm_up()
        found: click.Command = getattr(
            importlib.import_module(f".{module}", __package__),
            f"{cmd_name.replace('-', '_')}_command",
        )
        return talkative(found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row[2]) for name, row in COMMANDS.items()])


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, params=[verbose_option()]
)
@click.version_option(__version__, prog_name="pageferry")
def cli() -> None:
    """Move the memory of running guests between hosts.

    SOURCE and DESTINATION are image:PATH (a memory image), ram:PATH or shm:NAME (live shared
    memory), qemu:QMP_SOCKET (a VM), pid:PID (a process's shared memory; a source only) or demo: (a
    bundled guest).
    """


def error_object(error: PageferryError) -> dict[str, Any]:
    """An error for programs: what --json prints when a command fails."""
    report = dict(error.data.get("report") or {"status": "failed"})
    data = {key: value for key, value in error.data.items() if key != "report"}
    report["error"] = {
        "class": type(error).__name__,
        "message": error.message,
        "exit-code": error.exit_code,
        **data,
    }
    return report


def fail(error: PageferryError, as_json: bool) -> int:
    """Say what went wrong; the exit code."""
    if as_json:
        print(json.dumps(error_object(error), default=str), flush=True)
    print(f"pageferry: {error.message}", file=sys.stderr, flush=True)
    return error.exit_code


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(args=given, prog_name="pageferry", standalone_mode=False)
    except PageferryError as e:
        code = fail(e, "--json" in given)
    except click.ClickException as e:
        e.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        print("pageferry: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    sys.exit(code if isinstance(code, int) else 0)
