"""The source of every page, route and metric: the daemon's parts, and snapshots of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.commands.holders import HolderFinder
from gmemd.commands.measure import Measurer
from gmemd.web.host import HostReader, Lag


class State:
    """The daemon as HTTP sees it."""

    def __init__(self, dispatcher: Dispatcher, connections: Callable[[], int]) -> None:
        self.gmemd: Gmemd = dispatcher.gmemd
        self.dispatcher = dispatcher
        self.connections = connections  # how many QMP clients there are
        self.serving = False  # the daemon has restored and created its objects, and listens
        self.measurer = Measurer(self.gmemd)
        self.holders = HolderFinder()
        self.host = HostReader(self.gmemd.kernel)
        self.lag = Lag(asyncio.get_running_loop())
        self._sorted: tuple[Any, list[HostMemoryBackend]] = (None, [])

    def why_not_ready(self) -> str:
        """Why the daemon is not fully working; "" when it is."""
        custody = self.gmemd.custody
        if self.gmemd.stopping:
            return "stopping"
        if not self.serving:
            return "starting: objects are being restored or created"
        if custody.read_only:
            return f"the registry cannot be written: {custody.read_only}"
        if self.gmemd.settler.not_kept:
            return f"the latest change could not be recorded: {self.gmemd.settler.not_kept}"
        return custody.trouble

    async def objects(self, wanted: str = "", order: str = "created") -> Sequence[HostMemoryBackend]:
        """The objects whose id contains `wanted`, by "created", "id" or "size" (the largest first)."""
        key = ([room.objects.version for room in self.gmemd.seen_rooms()], wanted, order)
        if self._sorted[0] != key:
            found = self.gmemd.by_age()
            if wanted or order != "created":
                found = await in_thread(_select, self.gmemd, found, wanted, order)
            self._sorted = (key, found)
        return self._sorted[1]

    def close(self) -> None:
        self.lag.close()
        self.measurer.close()
        self.holders.close()


def _select(gmemd: Gmemd, found: list[HostMemoryBackend], wanted: str, order: str) -> list[HostMemoryBackend]:
    found = [backend for backend in found if wanted in gmemd.called(backend)]
    if order != "created":
        found.sort(key=lambda backend: (-backend.memory_size if order == "size" else 0, gmemd.called(backend)))
    return found
