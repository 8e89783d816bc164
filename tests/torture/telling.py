"""What all ends of the matrix have in common: they say what happens and can be told what to do, in
JSON lines over a socket, each event with its time (CLOCK_MONOTONIC, which all processes share).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

from pageferry.transport.errors import DestinationError, PageferryError

HELD_SECONDS = 60.0


class Wire:
    """To whoever runs the matrix."""

    def __init__(self, sock):
        self.sock = sock
        self._lock = threading.Lock()

    def say(self, event, **data):
        data = {"event": event, "t": time.monotonic()} | data
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(data, default=str).encode() + b"\n")


class Gate:
    """Holds a guest's call until it is told to go on, or nobody waits for that call any more."""

    def __init__(self, wire, held):
        self._wire, self._held = wire, held
        self.open, self.given_up = threading.Event(), False

    def pass_by(self, name):
        if name != self._held:
            return
        self._wire.say("held")
        if not self.open.wait(HELD_SECONDS) or self.given_up:
            raise DestinationError("held for too long")

    def give_up(self):
        self.given_up = True
        self.open.set()


class End:
    """What both have in common: commands, and the end."""

    def __init__(self, wire, spec):
        self.wire, self.spec = wire, spec
        self.gate = Gate(wire, spec.get("hold"))
        self.quit = asyncio.Event()

    async def obey(self):
        reader, _ = await asyncio.open_connection(sock=self.wire.sock.dup())
        try:
            while line := await reader.readline():
                command = json.loads(line)
                try:
                    self.do(**command)
                except PageferryError as e:
                    self.wire.say("refused", message=e.message)
        finally:
            self.quit.set()

    def do(self, what, **data):
        match what:
            case "release":
                self.gate.open.set()
            case "quit":
                self.quit.set()
            case _:
                self.act(what, **data)

    def event(self, name, data):
        self.wire.say("status" if name == "MIGRATION" else name, **data)

    async def until_over(self, migration):
        """The migration to its end; how it ended."""
        obeying = asyncio.ensure_future(self.obey())
        try:
            report, error = await migration(), None
        except PageferryError as e:
            report, error = e.data.get("report") or {}, e
        found = {
            "error": type(error).__name__ if error else None,
            "exit-code": error.exit_code if error else 0,
            "message": error.message if error else "",
            "recoveries": report.get("recoveries", 0),
            "oracle": report.get("oracle", {}).get("ok"),
        }
        self.wire.say("ended", **found)
        return obeying

    async def stay(self, obeying):
        await self.quit.wait()
        obeying.cancel()
        await asyncio.gather(obeying, return_exceptions=True)
