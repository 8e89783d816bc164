"""Why a link cannot be: the other end wants a key, has another one, or does not list ours.

libzmq tries again and again and says it on the side, as events of the socket (`connect` with
`watched`). Some of them do not say why; then the other end is asked what it wants.
"""

from __future__ import annotations

import asyncio
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from .curve import Dials
from .errors import ConnectError, PageferryError, PeerRefused
from .links import Endpoint, mechanism

# A connection attempt that fails says not always why; after so many it is asked.
_MOST_FAILURES = 2


async def refusal(watching: Any, endpoint: Endpoint, curve: Dials | None) -> PageferryError | None:
    """Why the socket that `watching` came with (`connect`, in a context of zmq.asyncio) will never
    be connected, as soon as that is known; None when it is. Waits for as long as neither is."""
    failures = 0
    while True:
        event = parse_monitor_message(await watching.recv_multipart())["event"]
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            return None
        if event == zmq.Event.HANDSHAKE_FAILED_AUTH and curve is not None:
            return PeerRefused(
                f"{endpoint} does not know our key: there, `pageferry keys allow "
                f"{curve.public.decode()} --keys DIR`",
                field="key",
            )
        failures += 1
        if event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL and failures < _MOST_FAILURES:
            continue  # after the others libzmq does not try again
        failures = 0
        wants = await asyncio.to_thread(mechanism, endpoint)
        if wants == "CURVE" and curve is None:
            return PeerRefused(
                f"{endpoint} wants a key: say --keys DIR (`pageferry keys new` makes one)",
                field="key",
            )
        if wants == "NULL" and curve is not None:
            return ConnectError(
                f"{endpoint} has no key, so that anybody could be there: start it with --keys DIR"
            )
        if wants == "CURVE" and curve is not None:
            return ConnectError(
                f"{endpoint} does not have the key that is listed for it "
                f"({curve.server.decode()}): it is somebody else, or has a new one; compare with "
                f"what `pageferry keys show` prints there"
            )
