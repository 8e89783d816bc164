"""The option `-v`, `-vv` of every command, and of `pageferry` itself.

Without it nothing is set up: warnings come as bare lines. Imports no logging (5 ms) before somebody
asks: every command imports this before the fork server is started.
"""

from __future__ import annotations

import click


def _set_up(context: click.Context, parameter: click.Parameter, count: int) -> int:
    if count:
        from .log_lines import say

        say(debug=count > 1)
    return count


def verbose_option() -> click.Option:
    """-v, --verbose."""
    return click.Option(
        ["-v", "--verbose"], count=True, expose_value=False, is_eager=True, callback=_set_up,
        help="Say on stderr what happens, an event a line; -vv: all of it.",
    )  # fmt: skip


def talkative(command: click.Command) -> click.Command:
    """`command` and its subcommands, with the option. Idempotent."""
    if not any(parameter.name == "verbose" for parameter in command.params):
        command.params.append(verbose_option())
        if isinstance(command, click.Group):
            for below in command.commands.values():
                talkative(below)
    return command
