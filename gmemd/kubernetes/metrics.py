"""What a cluster's Prometheus reads of a node: gmemd's own metrics, passed on, and the claims by namespace.

gmemd answers HTTP on this machine only; this answers GET /metrics, and nothing else, on the pod's network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from gmemd.errors import QmpError

Rooms = Callable[[], Awaitable[list[tuple[str, dict[str, Any]]]]]  # uid and note of each claim

_TIMEOUT = aiohttp.ClientTimeout(total=8)  # Prometheus waits for ten
_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The server. `http`: the path of gmemd's HTTP socket; `rooms` returns the claims that are prepared."""

    def __init__(self, port: int, http: str, rooms: Rooms) -> None:
        self._port = port
        self._http = http
        self._rooms = rooms

    async def start(self) -> None:
        """Listen on all addresses; QmpError if the port is taken."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, port=self._port, reuse_port=True).start()  # two pods during an update
        except OSError as exc:
            raise QmpError(f"cannot listen at port {self._port} for --metrics: {exc.strerror}") from exc

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, _: web.Request) -> web.Response:
        try:
            found = await self._of_gmemd() + "".join(_of_claims(await self._rooms()))
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            return web.Response(status=502, text=f"gmemd does not answer at '{self._http}': {exc}\n")
        except QmpError as exc:
            return web.Response(status=502, text=f"{exc.desc}\n")
        return web.Response(text=found, headers={"Content-Type": _TYPE})

    async def _of_gmemd(self) -> str:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._http), timeout=_TIMEOUT) as session, \
                session.get("http://localhost/metrics") as answer:
            answer.raise_for_status()
            return await answer.text()


def _of_claims(rooms: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines with the number of prepared claims and their bytes, by namespace."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, note in rooms:
        counts[note["namespace"]] += 1
        sizes[note["namespace"]] += sum(one["size"] for one in note["portions"])
    lines = []
    for name, told, found in (("gmemd_claims", "Claims that are prepared on this node.", counts),
                              ("gmemd_claims_bytes", "The memory that they were given.", sizes)):
        lines += [f"# HELP {name} {told}\n", f"# TYPE {name} gauge\n"]
        lines += [f'{name}{{namespace="{namespace}"}} {value}\n' for namespace, value in sorted(found.items())]
    return lines
