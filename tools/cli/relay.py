"""`pageferry relay ENDPOINT [STREAM]`: the far end of a stream, for a receiver that is there
already."""

from __future__ import annotations

import click

from ...pipeline import api
from ...transport.carrier import claim
from ...transport.errors import UsageError
from ...transport.links import parse_endpoint
from ...transport.stream_addresses import parse_stream
from .running import Interrupts, run
from .view import View


@click.command("relay")
@click.argument("endpoint")
@click.argument("stream", default="-")
def relay_command(endpoint: str, stream: str) -> None:
    """Connect the source at the other end of STREAM (default: stdin and stdout) to the receiver
    that listens at ENDPOINT (ipc://PATH) of this host.

    \b
    pageferry send demo: 'exec:ssh HOST pageferry relay ipc:///run/pageferry.sock'
    pageferry recover unix:/run/mig.sock 'exec:ssh HOST pageferry relay ipc://@pageferry-7-…'
    """
    where, there = claim(parse_stream(stream)), parse_endpoint(endpoint)
    if there.scheme != "ipc":
        raise UsageError(f"a stream is relayed to an ipc:// endpoint, not to {endpoint}")

    async def start(view: View, interrupts: Interrupts) -> None:
        await api.join(where, there)

    run(start, as_json=False, quiet=True, interrupted="the stream was ended")
