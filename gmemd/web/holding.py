"""Who holds which object, found by looking through /proc once for all of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from time import monotonic, thread_time
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.holders import File, Holder, holders_of

FRESH: Final = 2.0  # seconds that a look is good for at least
REST: Final = 20  # looks are not repeated before this many times the CPU time that one takes


class HolderFinder:
    """Keeps the result of the last look, which all who ask share."""

    def __init__(self) -> None:
        self._found: dict[File, list[Holder]] = {}
        self._looked_for: frozenset[File] = frozenset()
        self._due = 0.0
        self._lock = asyncio.Lock()
        self._looking: asyncio.Task[dict[str, list[Holder]]] | None = None

    async def find(self, backends: Iterable[HostMemoryBackend]) -> dict[str, list[Holder]]:
        """The holders of each of these objects, by its id."""
        files = _files(backends)
        wanted = frozenset(files.values())
        async with self._lock:
            if monotonic() >= self._due or not wanted <= self._looked_for:
                self._found, seconds = await in_thread(_look, wanted)
                self._looked_for = wanted
                self._due = monotonic() + max(FRESH, REST * seconds)
        return {name: self._found.get(file, []) for name, file in files.items()}

    async def find_soon(self, backends: Sequence[HostMemoryBackend], wait: float) -> dict[str, list[Holder]]:
        """The same as far as it is known within `wait` seconds."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.find(backends))
        await asyncio.wait([self._looking], timeout=wait)
        return {name: self._found.get(file, []) for name, file in _files(backends).items()
                if file in self._looked_for}

    def close(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()


def _look(wanted: frozenset[File]) -> tuple[dict[File, list[Holder]], float]:
    """Who holds the files, and the CPU time in seconds that looking took."""
    began = thread_time()
    return holders_of(wanted), thread_time() - began


def _files(backends: Iterable[HostMemoryBackend]) -> dict[str, File]:
    return {backend.id: file_of(backend) for backend in backends if backend.fd >= 0}


def file_of(backend: HostMemoryBackend) -> File:
    """The device and inode of an object's memory."""
    status = os.fstat(backend.fd)
    return status.st_dev, status.st_ino


def describe(holder: Holder) -> dict[str, Any]:
    """The members of MemdevHolder."""
    return {"pid": holder.pid, "uid": holder.uid, "comm": holder.comm, "fds": holder.fds, "mapped": holder.mapped,
            "writable": holder.writable, "private-copy": holder.private_copy,
            **({} if holder.cgroup is None else {"cgroup": holder.cgroup})}
