"""`pageferry keys new | show | allow | list | revoke`: a directory of keys (docs/security.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ...transport.keys import KeyDirectory, public_key

F = TypeVar("F", bound=Callable[..., Any])
_keys = click.option("--keys", "path", metavar="DIR", required=True, help="The directory of keys.")


@click.group("keys")
def keys_command() -> None:
    """Make and exchange the keys that `--keys DIR` of other commands needs.

    \b
    pageferry keys new --keys /etc/pageferry/keys
    pageferry keys show --keys /etc/pageferry/keys
    pageferry keys allow KEY --keys /etc/pageferry/keys --name 192.0.2.7
    """


def _show(directory: KeyDirectory) -> None:
    print(f"public key: {directory.public.decode()}")


@keys_command.command("new")
@_keys
def new_command(path: str) -> None:
    """Make DIR and a key in it, and show its public half."""
    _show(KeyDirectory.create(path))


@keys_command.command("show")
@_keys
def show_command(path: str) -> None:
    """Show the public key: what peers are to allow."""
    _show(KeyDirectory(path))


@keys_command.command("allow", context_settings={"ignore_unknown_options": True})
@click.argument("key")
@_keys
@click.option("--name", default="", help="What to call the peer: as the host in its address, so "
              "that it is found by it. Default: made of the key.")  # fmt: skip
def allow_command(key: str, path: str, name: str) -> None:
    """List KEY, a peer's public key: it may send here, and be sent to, from now on."""
    listed = KeyDirectory(path).allow(public_key(key), name)
    print(f"allowed: {listed}")


@keys_command.command("revoke", context_settings={"ignore_unknown_options": True})
@click.argument("what", metavar="NAME|KEY")
@_keys
def revoke_command(what: str, path: str) -> None:
    """List a peer no more. What it has under way is cut off within seconds."""
    for name in KeyDirectory(path).revoke(what):
        print(f"revoked: {name}")


@keys_command.command("list")
@_keys
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def list_command(path: str, as_json: bool) -> None:
    """Show the peers that are allowed, a name and a key a line."""
    listed = {name: key.decode() for name, key in KeyDirectory(path).listed().items()}
    if as_json:
        print(json.dumps(listed))
        return
    width = max(map(len, listed), default=0)
    for name, key in listed.items():
        print(f"{name:{width}}  {key}")
