"""The HTTP server: which requests are allowed, and what answers them.

Allowed are GET and HEAD of the routes in routes.py, with their parameters. The Host header must name this host, and
cross-site requests are refused (DNS rebinding), even on a unix socket, because that may be forwarded from TCP.
connections.py limits the number of connections.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from gmemd.authority.rights import Rights
from gmemd.commands.dispatch import Dispatcher
from gmemd.errors import DEVICE_NOT_FOUND, GENERIC_ERROR, QmpError
from gmemd.observe.log import log
from gmemd.posix.sockets import identity, remove_own
from gmemd.web import api
from gmemd.web.address import Address, listen, url_of
from gmemd.web.connections import Connections
from gmemd.web.live import Live
from gmemd.web.page import render_page, security_policy
from gmemd.web.picture import Painter
from gmemd.web.prometheus import CONTENT_TYPE, Scraper
from gmemd.web.routes import JSON, QUERY_MAX, Route, routes
from gmemd.web.state import State

_CLOSE_SECONDS: Final = 1.0
_SWITCH_SECONDS: Final = 100e-6  # seconds after which a worker thread yields to the event loop
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS: Final = {
    "Content-Security-Policy": security_policy(),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class HttpServer:
    """HTTP at one address, from `start` to `close`."""

    def __init__(self, address: Address, dispatcher: Dispatcher, connections: Callable[[], int], *,
                 admit: Callable[[socket.socket | None], Rights]) -> None:
        """`connections` returns the number of QMP clients.

        `admit` returns what a client may, by its unix socket, or None for TCP; QmpError if it is not let in.
        """
        self._admit = admit
        self._address = address
        self.state = State(dispatcher, connections)
        self._painter = Painter(self.state)
        self._streams = Live(self._painter)
        self._scraper = Scraper(self.state)
        self.url = ""

    async def start(self) -> None:
        """Listen; QmpError when that is not possible."""
        listener = listen(self._address)
        sys.setswitchinterval(_SWITCH_SECONDS)
        application = web.Application(middlewares=[self._guard])
        for route in routes(self.state.gmemd.schema.commands):
            application.router.add_get(route.path, self._handler(route), allow_head=route.answer != "live")
        quiet = logging.getLogger("gmemd.web")
        quiet.disabled = True  # aiohttp would log a traceback for everything that is not HTTP
        self._runner = web.AppRunner(application, access_log=None, logger=quiet, keepalive_timeout=30.0,
                                     handle_signals=False, shutdown_timeout=_CLOSE_SECONDS)
        await self._runner.setup()
        self.url = url_of(listener)
        loop = asyncio.get_running_loop()
        assert self._runner.server is not None
        self._connections = Connections(self._runner.server, loop.time)
        if self._address.path:
            self._own = identity(self._address.path)
            self._server = await loop.create_unix_server(self._connections.admit, sock=listener)
        else:
            self._server = await loop.create_server(self._connections.admit, sock=listener)

    async def close(self) -> None:
        """End every connection and stop listening."""
        self.state.close()
        await self._streams.close()
        if self._address.path:
            remove_own(self._address.path, self._own)
        self._server.close()
        await self._runner.cleanup()

    # -- requests --------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests that are not allowed, and answer errors in one form."""
        with self._connections.serving(request.protocol):
            try:
                _check_site(request)
                if len(request.query_string) > QUERY_MAX:
                    return _error(414, f"the query has more than {QUERY_MAX} bytes")
                return await handler(request)
            except QmpError as exc:
                return _error(404 if exc.error_class == DEVICE_NOT_FOUND else 400, exc.desc, exc.error_class)
            except web.HTTPException as exc:
                allow = {"Allow": exc.headers["Allow"]} if "Allow" in exc.headers else {}
                return _error(exc.status, exc.reason, headers=allow)
            except ConnectionError:
                raise
            except Exception as exc:
                log.error("internal error", http=request.path, exc_info=exc)
                return _error(500, "internal error")

    def _handler(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        answer = getattr(self, f"_{route.answer}", None)

        async def handle(request: web.Request) -> web.StreamResponse:
            if route.command and (why := self._refuse(request, route.command)):
                return _error(403, why)
            given = route.read(list(request.query.items()), request.match_info)
            if answer is not None:
                response: web.StreamResponse = await answer(request, given)
                return response
            return _json(200, await getattr(api, route.answer)(self.state, given))

        return handle

    def _refuse(self, request: web.Request, command: str) -> str:
        """Why who asks may not see what a command shows; "" if it may."""
        transport = request.transport
        if transport is None:
            raise ConnectionError
        try:
            rights = self._admit(transport.get_extra_info("socket") if self._address.path else None)
        except QmpError:
            return "this client is not let in"
        if not rights.sees_all:
            return "HTTP shows what everybody has: it is not for tenants"
        return "" if rights.may(command) else f"Command {command} disabled by policy"

    async def _healthz(self, request: web.Request, given: dict[str, Any]) -> web.StreamResponse:
        return _text(200, "ok\n")

    async def _readyz(self, request: web.Request, given: dict[str, Any]) -> web.StreamResponse:
        why = self.state.why_not_ready()
        return _text(503, f"{why}\n") if why else _text(200, "ready\n")

    async def _status_page(self, request: web.Request, given: dict[str, Any]) -> web.StreamResponse:
        page = await render_page(self.state, self._painter, given)
        await asyncio.sleep(0)  # others go first
        return web.Response(text=page, content_type="text/html", charset="utf-8", headers=_HEADERS)

    async def _live(self, request: web.Request, given: dict[str, Any]) -> web.StreamResponse:
        if self._streams.is_full:
            return _text(503, "too many live viewers\n")
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
        await self._streams.stream(request, response, given)
        return response

    async def _metrics(self, request: web.Request, given: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": CONTENT_TYPE})
        await response.prepare(request)
        async for portion in self._scraper.text(objects=given["objects"]):
            if request.method != "HEAD":
                await response.write(portion)
        await response.write_eof()
        return response


def _check_site(request: web.Request) -> None:
    """Raise unless the request comes from a program, or from a page of this very host and port."""
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1:
        raise web.HTTPBadRequest(reason="exactly one Host header is required")
    if _hostname(hosts[0]) not in _LOCAL:
        raise web.HTTPForbidden(reason="the Host header names another host")
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{hosts[0]}":
        raise web.HTTPForbidden(reason="cross-site request refused")
    if (request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
            and request.headers.get("Sec-Fetch-Mode") != "navigate"):
        raise web.HTTPForbidden(reason="cross-site request refused")


def _hostname(host: str) -> str:
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "") if parts.netloc == host and "@" not in host else ""
    except ValueError:
        return ""


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, headers=_HEADERS)


def _json(status: int, value: Any, headers: Mapping[str, str] = _HEADERS) -> web.Response:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return web.Response(status=status, body=body, content_type=JSON, headers=headers)


def _error(status: int, desc: str, error_class: str = GENERIC_ERROR, headers: Mapping[str, str] = {}) -> web.Response:
    return _json(status, {"error": {"class": error_class, "desc": desc}}, {**_HEADERS, **headers})
