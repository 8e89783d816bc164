"""`--web`: one page, its events and its metrics over HTTP, in the event loop of what it shows.

Whoever looks must not be felt by what runs:

- what is shown is drawn at most twice a second, once for all, only while somebody looks, never in
  more than a twentieth of the time, and not while a guest stands still;
- each browser is sent the newest state when it has taken the last one (board.py): no queue; one
  that takes nothing for ten seconds is dropped;
- connections, those that listen, and new ones a second are limited. A connection is for one
  request, and over after ten seconds unless it listens. Metrics are made four times a second at
  most.

Nothing can be changed from here. Knows HTTP; what is shown is a Subject's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib import resources
from typing import Any

from aiohttp import web

from ...transport.errors import UsageError
from ..report.style import LIVE_STYLE, STYLE
from . import metrics, views
from .address import Address, may_ask
from .board import Board, event
from .subjects import Subject

TICK_SECONDS = 0.5
# Of the time, what drawing may take.
_DRAW_SHARE = 0.05
MOST_CONNECTIONS, MOST_LISTENERS = 64, 32
# New connections: a page with its style, script and events is four.
_MOST_A_SECOND = 64
# For a request, and for a browser to take what it was sent.
PATIENCE_SECONDS = 10.0
_ALIVE_SECONDS = 5.0
_METRICS_SECONDS = 0.25
_MOST_FORMATS = 8
# The last state is given to those who look, and not waited for longer.
FAREWELL_SECONDS = 1.0
_MOST_LINE = 4096
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "pageferry",
}
_log = logging.getLogger("pageferry")


class _Closed(asyncio.Protocol):
    """What somebody meets for whom there is no room."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.abort()


class Server:
    """Shows `subject` at `address`, from `open` to `close`."""

    def __init__(self, subject: Subject, address: Address) -> None:
        self.subject = subject
        self.address = address
        self._board = Board()
        self._listeners: set[asyncio.Event] = set()
        self._streams: set[Any] = set()  # connections that listen
        self._somebody = asyncio.Event()
        self._gone = asyncio.Event()  # nobody listens any more
        self._drawn = 0.0
        self._took = 0.0
        self._second, self._accepted = 0.0, 0
        self._metrics: dict[str, tuple[float, bytes]] = {}  # by content type
        self._complained = False
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None
        app = web.Application(middlewares=[self._guarded], client_max_size=_MOST_LINE)
        app.router.add_get("/", self._page)
        app.router.add_get("/events", self._events, allow_head=False)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/style.css", _text(STYLE + LIVE_STYLE, "text/css"))
        app.router.add_get("/live.js", _text(_script(), "text/javascript"))
        # what strangers send is no news: aiohttp would log each request that is none
        silent = logging.Logger("pageferry.web", logging.CRITICAL + 1)
        self._runner = web.AppRunner(
            app, access_log=None, logger=silent, shutdown_timeout=0.1, lingering_time=0,
            max_line_size=_MOST_LINE, max_field_size=_MOST_LINE, keepalive_timeout=0,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<web.Server {self.url} {len(self._listeners)} listen>"

    @property
    def url(self) -> str:
        return f"http://{self.address}/"

    # ---- from open to close --------------------------------------------------------------

    async def open(self) -> None:
        """Listen. UsageError if that cannot be."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                self._door, self.address.host, self.address.port, backlog=32
            )
        except OSError as e:
            await self._runner.cleanup()
            reason = e.strerror or str(e)
            raise UsageError(
                f"--web {self.address}: cannot listen there ({reason}): name another port, or 0 "
                f"for any"
            ) from e
        port = self._server.sockets[0].getsockname()[1]
        self.address = Address(self.address.host, port)
        self._task = loop.create_task(self._draw())

    async def close(self, report: dict[str, Any] | None) -> None:
        """It has ended with `report`: show that to those who look, for a second at most."""
        if self._task is None or self._server is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._server.close()
        self.subject.finish(report)  # and drawn before anybody who listens goes on
        if self._listeners:
            self._look()
            for news in self._listeners:
                news.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._gone.wait()
        left = [h.transport for h in self._runner.server.connections] if self._runner.server else []
        await self._runner.cleanup()
        for transport in left:  # whoever does not read would keep its connection for ever
            if transport is not None and transport.get_write_buffer_size():
                transport.abort()
        await self._server.wait_closed()

    # ---- who may come in -----------------------------------------------------------------

    def _door(self) -> asyncio.Protocol:
        """For each connection: a request handler, or nothing."""
        now = time.monotonic()
        if now - self._second >= 1.0:
            self._second, self._accepted = now, 0
        self._accepted += 1
        server = self._runner.server
        if (
            server is None
            or self._accepted > _MOST_A_SECOND
            or len(server.connections) >= MOST_CONNECTIONS
        ):
            return _Closed()
        handler = server()
        asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._hurry, handler)
        return handler

    def _hurry(self, handler: Any) -> None:
        if handler not in self._streams and handler.transport is not None:
            handler.transport.abort()

    @web.middleware
    async def _guarded(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """No names that somebody else made resolve to here, no pages of somebody else's."""
        # a link from elsewhere may lead here; a frame, a script or a picture may not
        visits = request.headers.get("Sec-Fetch-Dest") == "document" and request.path != "/events"
        site = request.headers.get("Sec-Fetch-Site", "none")
        if not may_ask(request.headers.get("Host", ""), self.address):
            response: web.StreamResponse = _refusal(403, "ask for it by its address")
        elif site not in ("none", "same-origin") and not visits:
            response = _refusal(403, "not from another page")
        else:
            try:
                response = await handler(request)
            except web.HTTPException as e:
                response = _refusal(e.status, e.reason)
            except Exception:
                if not self._complained:
                    self._complained = True
                    _log.exception("the page of --web could not be drawn")
                response = _refusal(500, "it could not be drawn: see what pageferry said")
        if not response.prepared:
            response.headers.update(_HEADERS)
            response.force_close()
        return response

    # ---- what there is -------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.Response:
        self._look_again()
        return web.Response(text=views.document(self._board.since(0)), content_type="text/html")

    async def _scrape(self, request: web.Request) -> web.Response:
        encode, kind = metrics.encoder(request.headers.get("Accept", ""))
        now = time.monotonic()
        at, body = self._metrics.get(kind, (0.0, b""))
        if not body or (now - at >= _METRICS_SECONDS and not self.subject.still):
            body = encode(self.subject.metrics())
            if len(self._metrics) >= _MOST_FORMATS:  # part of it is the client's choice
                self._metrics.clear()
            self._metrics[kind] = now, body
        return web.Response(body=body, headers={"Content-Type": kind})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if len(self._listeners) >= MOST_LISTENERS:
            return _refusal(503, "too many look already")
        response = web.StreamResponse(
            headers={
                **_HEADERS,
                "Content-Type": "text/event-stream; charset=utf-8",
                "X-Accel-Buffering": "no",  # nginx would keep it back
            }
        )
        response.force_close()
        news, connection = asyncio.Event(), request.protocol
        self._listeners.add(news)
        self._streams.add(connection)
        self._somebody.set()
        self._gone.clear()
        try:
            await response.prepare(request)
            async with contextlib.aclosing(self._news(news)) as pieces:
                async for piece in pieces:
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        await response.write(piece)
        except (TimeoutError, OSError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._streams.discard(connection)
            self._listeners.discard(news)
            if not self._listeners:
                self._somebody.clear()
                self._gone.set()
        return response

    async def _news(self, news: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """What one browser is sent: the newest each time that it is ready for more."""
        self._look_again()
        seen = 0
        yield b"retry: 1000\n\n"
        while True:
            news.clear()
            parts = self._board.since(seen)
            seen = self._board.version
            if parts:
                yield event("parts", parts)
            if self.subject.over:
                if self._board.version == seen:
                    yield event("over")
                    return
                continue
            try:
                async with asyncio.timeout(_ALIVE_SECONDS):
                    await news.wait()
            except TimeoutError:
                yield event("tick")

    # ---- drawing -------------------------------------------------------------------------

    async def _draw(self) -> None:
        """While somebody looks."""
        while True:
            await self._somebody.wait()
            self._look_again()
            await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        return max(TICK_SECONDS, self._took / _DRAW_SHARE)

    def _look_again(self) -> None:
        """Draw, if it is time to, or nothing was drawn yet."""
        due = time.monotonic() - self._drawn >= 0.9 * self._pause()
        if not self._board.version or (due and not self.subject.still):
            self._look()

    def _look(self) -> None:
        begin = self._drawn = time.monotonic()
        try:
            if self._board.put(self.subject.parts()):
                for news in self._listeners:
                    news.set()
        except Exception:
            if not self._complained:
                self._complained = True
                _log.exception("the page of --web could not be drawn")
        self._took = time.monotonic() - begin


def _refusal(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"pageferry: {text}\n")


def _text(text: str, kind: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind)

    return answer


def _script() -> str:
    return resources.files(__package__).joinpath("live.js").read_text("utf-8")
