"""The monitor: a unix socket that speaks QMP, as QEMU's does (docs/interop/qmp-spec.txt).

Greeting, qmp_capabilities, then commands, JSON object after JSON object; events in between. Any QMP
client works. Knows commands and errors, not how a migration is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from .._version import __version__
from ..transport.errors import DestinationError, PageferryError, UsageError
from ..transport.links import clear_dead_socket
from ..transport.messages import UNDECODABLE

# A command is short; one that does not end is none.
_MAX_COMMAND = 1 << 16
# Bytes of events that a client has not taken: beyond that it is dropped.
_MOST_UNREAD = 1 << 20
_COMMANDS = (
    "qmp_capabilities", "query-commands", "query-migrate", "query-migrate-parameters",
    "migrate-set-parameters", "migrate_cancel", "query-version", "migrate-start-postcopy",
    "migrate-pause", "migrate-recover", "yank", "query-yank", "migrate-set-capabilities",
    "query-migrate-capabilities",
)  # fmt: skip


# Of QEMU's capabilities, those that can be set while it runs.
_CAPABILITIES = ("auto-converge", "dirty-limit")
# QEMU's YankInstanceType; there are no block devices or character devices here.
_YANK_TYPES = ("block-node", "chardev", "migration")


class Splitter:
    """Cuts a byte stream into JSON objects. QMP has no line ends: clients may leave them out."""

    def __init__(self) -> None:
        self._part = bytearray()
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, data: bytes) -> list[bytes]:
        """The objects that `data` completes. What begins with anything but a brace is one
        piece up to the end of its line. ValueError above the bound."""
        pieces = []
        for byte in data:
            if self._take(byte):
                pieces.append(bytes(self._part))
                self._part.clear()
        if len(self._part) > _MAX_COMMAND:
            raise ValueError("a command that does not end")
        return pieces

    def _take(self, byte: int) -> bool:
        """Add one byte; True if it ends a piece."""
        if not self._part and byte in b" \t\r\n":
            return False
        self._part.append(byte)
        if self._part[0] != ord("{"):
            return byte == ord("\n")
        if self._in_string:
            self._in_string = self._escaped or byte != ord('"')
            self._escaped = byte == ord("\\") and not self._escaped
        elif byte == ord('"'):
            self._in_string = True
        else:
            self._depth += (byte == ord("{")) - (byte == ord("}"))
        return self._depth == 0


class Migrating(Protocol):
    """What a monitor looks at: a Source or a Destination."""

    def query(self) -> dict[str, Any]: ...
    def query_parameters(self) -> dict[str, Any]: ...
    def set_parameters(self, arguments: dict[str, Any]) -> None: ...
    def cancel(self) -> None: ...
    def can_be_yanked(self) -> bool: ...
    def yank(self) -> None: ...
    def start_postcopy(self) -> None: ...
    def pause(self) -> None: ...
    def recover(self, where: str | None) -> None: ...


def _version() -> dict[str, Any]:
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "pageferry"}


class QmpError(Exception):
    """An error answer: its class and text."""

    def __init__(self, qmp_class: str, text: str) -> None:
        super().__init__(text)
        self.qmp_class = qmp_class


class Conversation:
    """One client, sans-IO: a line in, an answer out."""

    def __init__(self, migration: Migrating) -> None:
        self._migration = migration
        self.negotiated = False

    @staticmethod
    def greeting() -> dict[str, Any]:
        return {"QMP": {"version": _version(), "capabilities": []}}

    def answer(self, line: bytes) -> dict[str, Any]:
        """What to say to one line; never raises."""
        identity: dict[str, Any] = {}
        try:
            try:
                command = msgspec.json.decode(line)
            except UNDECODABLE as e:
                raise QmpError("GenericError", f"invalid JSON: {e}") from e
            if not isinstance(command, dict) or not isinstance(command.get("execute"), str):
                raise QmpError("GenericError", "a command is an object with 'execute'")
            if "id" in command:
                identity = {"id": command["id"]}
            arguments = command.get("arguments") or {}
            if not isinstance(arguments, dict):
                raise QmpError("GenericError", "'arguments' must be an object")
            return {"return": self._execute(command["execute"], arguments)} | identity
        except QmpError as e:
            return {"error": {"class": e.qmp_class, "desc": str(e)}} | identity
        except PageferryError as e:
            return {"error": {"class": e.qmp_class, "desc": e.message}} | identity
        except Exception as e:
            desc = f"{type(e).__name__}: {e}"
            return {"error": {"class": "GenericError", "desc": desc}} | identity

    def _execute(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "qmp_capabilities":
            self.negotiated = True
            return {}
        if not self.negotiated:
            raise QmpError("CommandNotFound", "expecting capabilities negotiation first")
        match name:
            case "query-version":
                return _version()
            case "query-yank":
                return self._instances()
            case "query-commands":
                return [{"name": command} for command in _COMMANDS]
            case "query-migrate":
                return self._migration.query()
            case "query-migrate-parameters":
                return self._migration.query_parameters()
            case "migrate-set-parameters":
                self._migration.set_parameters(arguments)
            case "query-migrate-capabilities":
                known = self._migration.query_parameters()
                return [{"capability": n, "state": known.get(n, False)} for n in _CAPABILITIES]
            case "migrate-set-capabilities":
                self._migration.set_parameters(_capabilities(arguments))
            case "migrate_cancel":
                self._migration.cancel()
            case _:
                self._execute_postcopy(name, arguments)
        return {}

    def _execute_postcopy(self, name: str, arguments: dict[str, Any]) -> None:
        match name:
            case "migrate-start-postcopy":
                self._migration.start_postcopy()
            case "migrate-pause":
                self._migration.pause()
            case "migrate-recover":
                where = arguments.get("uri")
                if where is not None and not isinstance(where, str):
                    raise QmpError("GenericError", "'uri' must be a string")
                self._migration.recover(where)
            case "yank":
                self._yank(arguments)
            case _:
                raise QmpError("CommandNotFound", f"there is no command {name}")

    def _instances(self) -> list[dict[str, str]]:
        """What can be yanked: QEMU's YankInstance (qapi/yank.json)."""
        return [{"type": "migration"}] if self._migration.can_be_yanked() else []

    def _yank(self, arguments: dict[str, Any]) -> None:
        """All of `instances`, or none if one does not exist (util/yank.c, qmp_yank)."""
        asked = arguments.get("instances")
        if set(arguments) != {"instances"} or not isinstance(asked, list):
            raise QmpError("GenericError", "yank takes 'instances', an array")
        for instance in asked:
            kind = instance.get("type") if isinstance(instance, dict) else None
            if kind not in _YANK_TYPES:
                raise QmpError("GenericError", f"an instance is an object with 'type', one of "
                               f"{', '.join(_YANK_TYPES)}")  # fmt: skip
            if kind != "migration" or not self._instances():
                raise QmpError("DeviceNotFound", "Instance not found")
        if asked:
            self._migration.yank()


def _capabilities(arguments: dict[str, Any]) -> dict[str, Any]:
    """migrate-set-capabilities' arguments as parameters."""
    asked = arguments.get("capabilities")
    if set(arguments) != {"capabilities"} or not isinstance(asked, list):
        raise QmpError("GenericError", "it takes 'capabilities', an array")
    found = {}
    for row in asked:
        name = row.get("capability") if isinstance(row, dict) else None
        if name not in _CAPABILITIES or not isinstance(row.get("state"), bool):
            known = ", ".join(_CAPABILITIES)
            raise QmpError(
                "GenericError", f"a capability has a 'state', true or false, and is one of {known}"
            )
        found[name] = row["state"]
    return found


class Monitor:
    """The listening side: all clients of one migration."""

    def __init__(self, migration: Migrating) -> None:
        self._migration = migration
        self._clients: dict[asyncio.StreamWriter, Conversation] = {}

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to every client that has negotiated."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        event = {
            "event": name,
            "data": data,
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
        }
        for writer, conversation in self._clients.items():
            if writer.transport.get_write_buffer_size() > _MOST_UNREAD:
                writer.transport.abort()
            elif conversation.negotiated:
                writer.write(_line(event))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = self._clients[writer] = Conversation(self._migration)
        try:
            writer.write(_line(conversation.greeting()))
            splitter = Splitter()
            while data := await reader.read(_MAX_COMMAND):
                for command in splitter.feed(data):
                    writer.write(_line(conversation.answer(command)))
                await writer.drain()
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # gone, a command above the bound, or the end
        finally:
            del self._clients[writer]
            writer.close()

    async def close(self) -> None:
        """Let clients have what was said, then close them."""
        for writer in list(self._clients):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.drain(), 0.5)
            writer.close()


def _line(message: dict[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\r\n"


def monitor_path(where: str) -> str:
    """The path in unix:PATH."""
    scheme, _, path = where.partition(":")
    if scheme != "unix" or not path or len(path) > 100:
        raise UsageError(f"{where!r} is no monitor: write unix:PATH (below 100 characters)")
    return os.path.abspath(path)


@contextlib.asynccontextmanager
async def serve_monitor(where: str, migration: Migrating) -> AsyncIterator[Monitor]:
    """A monitor at `where` (unix:PATH) while the context lasts."""
    path = monitor_path(where)
    clear_dead_socket(path, where)
    monitor = Monitor(migration)
    before = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(monitor.serve, path)
    except OSError as e:
        raise DestinationError(f"cannot open the monitor {where}: {e.strerror}") from e
    finally:
        os.umask(before)
    try:
        yield monitor
    finally:
        server.close()
        await monitor.close()
        # the handlers end with their connections
        await asyncio.sleep(0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
