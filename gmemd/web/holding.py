"""Who holds which object, found by looking through /proc once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.holders import Found, look
from gmemd.processes.holders import Holder

FRESH: Final = 2.0  # seconds that a look is good for at least
REST: Final = 20  # looks are not repeated before this many times the CPU time that one takes


class HolderFinder:
    """Keeps the result of the last look, which all who ask share."""

    def __init__(self) -> None:
        self._found: Found = {}
        self._due = 0.0
        self._lock = asyncio.Lock()
        self._looking: asyncio.Task[dict[str, list[Holder]]] | None = None

    async def find(self, backends: Iterable[HostMemoryBackend]) -> dict[str, list[Holder]]:
        """The holders of each of these objects, by its id; QmpError where looking is not possible now."""
        async with self._lock:
            wanted = [backend for backend in backends if backend.fd >= 0]
            if monotonic() >= self._due or not self._found.keys() >= set(wanted):
                self._found, seconds = await look(wanted)
                self._due = monotonic() + max(FRESH, REST * seconds)
            return {backend.id: self._found[backend] for backend in wanted}

    async def find_soon(self, backends: Sequence[HostMemoryBackend], wait: float) -> dict[str, list[Holder]]:
        """The same as far as it is known within `wait` seconds."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.find(backends))
        await asyncio.wait([self._looking], timeout=wait)
        if self._looking.done() and not self._looking.cancelled() and self._looking.exception() is not None:
            return {}  # as long as looking is not possible
        return {backend.id: self._found[backend] for backend in backends if backend in self._found}

    def close(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()
