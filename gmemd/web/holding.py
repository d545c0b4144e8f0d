"""Who holds which object, found by looking through /proc once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.holders import Found, look, memory_of
from gmemd.errors import os_errors
from gmemd.holders import Holder, Memory

FRESH: Final = 2.0  # seconds that a look is good for at least
REST: Final = 20  # looks are not repeated before this many times the CPU time that one takes


class HolderFinder:
    """Keeps the result of the last look, which all who ask share."""

    def __init__(self) -> None:
        self._found: Found = {}
        self._looked_for: frozenset[Memory] = frozenset()
        self._due = 0.0
        self._lock = asyncio.Lock()
        self._looking: asyncio.Task[dict[str, list[Holder]]] | None = None

    async def find(self, backends: Iterable[HostMemoryBackend]) -> dict[str, list[Holder]]:
        """The holders of each of these objects, by its id; QmpError where looking is not possible now."""
        async with self._lock:
            backends = [backend for backend in backends if backend.fd >= 0]
            with os_errors("cannot look for holders"):
                memories = _memories(backends)
            wanted = frozenset(memories.values())
            if monotonic() >= self._due or not wanted <= self._looked_for:
                self._found, seconds = await look(backends)
                self._looked_for = wanted
                self._due = monotonic() + max(FRESH, REST * seconds)
        return {name: self._found.get(memory, []) for name, memory in memories.items()}

    async def find_soon(self, backends: Sequence[HostMemoryBackend], wait: float) -> dict[str, list[Holder]]:
        """The same as far as it is known within `wait` seconds."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.find(backends))
        await asyncio.wait([self._looking], timeout=wait)
        if self._looking.done() and not self._looking.cancelled() and self._looking.exception() is not None:
            return {}  # as long as looking is not possible
        return {name: self._found.get(memory, []) for name, memory in _memories(backends).items()
                if memory in self._looked_for}

    def close(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()


def _memories(backends: Iterable[HostMemoryBackend]) -> dict[str, Memory]:
    return {backend.id: memory_of(backend) for backend in backends if backend.fd >= 0}
