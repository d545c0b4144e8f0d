"""Changes of the status page as server-sent events, for a limited number of viewers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Final

from aiohttp import web

from gmemd.web.picture import Painter, Picture

VIEWERS_MAX: Final = 16
PERIOD: Final = 0.4  # seconds between two looks
_PATIENCE: Final = 0.05  # seconds
_KEEP_ALIVE: Final = 15.0  # seconds after which an unchanged page says so, to detect dead connections


class Live:
    """The open streams."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self._viewers: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def is_full(self) -> bool:
        return self._closing or len(self._viewers) >= VIEWERS_MAX

    async def stream(self, request: web.Request, response: web.StreamResponse, given: dict[str, Any]) -> None:
        """Send one viewer all changes until it disconnects or `close` is called."""
        await response.prepare(request)
        task = asyncio.ensure_future(self._tell(response, given))
        self._viewers.add(task)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            self._viewers.discard(task)
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await task

    async def _tell(self, response: web.StreamResponse, given: dict[str, Any]) -> None:
        told = Picture({}, {})
        silent = 0.0
        while True:
            picture = await self._painter.paint(given, _PATIENCE)
            message = changes(told, picture)
            if message:
                await response.write(b"event: update\ndata: %b\n\n" % json.dumps(message).encode())
                silent = 0.0
            elif silent >= _KEEP_ALIVE:
                await response.write(b": nothing new\n\n")
                silent = 0.0
            told = picture
            silent += PERIOD
            await asyncio.sleep(PERIOD)

    async def close(self) -> None:
        self._closing = True
        for task in list(self._viewers):
            task.cancel()


def changes(told: Picture, picture: Picture) -> dict[str, Any]:
    """What a viewer who has one picture needs to get the next; {} for nothing."""
    sections = {name: text for name, text in picture.sections.items() if told.sections.get(name) != text}
    rows = {name: text for name, text in picture.rows.items() if told.rows.get(name) != text}
    order = list(picture.rows)
    changed = sections or rows or order != list(told.rows)
    return {"sections": sections, "rows": rows, "order": order} if changed else {}
