"""How much of the objects is in memory, measured beside the event loop's work.

Measuring costs a system call for each part of an object that is of one visibility, and time in the kernel in
proportion to what is resident.  So it is done in batches, each in a worker thread on duplicates of the descriptors
(the object may be deleted meanwhile), with the loop free between two batches; a sweep over all objects is
shared by all who ask, and takes at most a twentieth of one CPU's time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd, in_thread
from gmemd.ranges import PRIVATE, SHARED

BATCH: Final = 64  # parts in one turn of the worker
REST: Final = 20  # a sweep is not repeated before this many times its own duration
FRESH: Final = 1.0  # seconds that a sweep is good for at least

# What is to be measured: the fd, offset and size in bytes (0, 0: all of it), and which visibility it counts for.
Part = tuple[int, int, int, bool]


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of an object that are in memory; what is no guest_memfd counts as shared."""

    private: int
    shared: int
    when: float  # monotonic seconds
    known: bool = True  # False: the kernel did not tell


@dataclass(frozen=True)
class Totals:
    """The sum over all objects, at the end of a sweep."""

    private: int  # bytes
    shared: int  # bytes
    unknown: int  # objects that could not be measured
    when: float  # monotonic seconds
    seconds: float  # that the sweep took


def parts(backend: HostMemoryBackend) -> Iterator[Part]:
    """What must be measured to know the private and shared resident bytes of an object."""
    visibility = backend.visibility
    if visibility is None:
        yield backend.fd, backend.offset, backend.memory_size if backend.offset else 0, SHARED
        return
    if len(visibility) == 1:
        yield backend.fd, 0, 0, visibility.at(0)
    else:
        for offset, size, state in visibility.ranges():
            yield backend.fd, offset, size, state
    if backend.private_fd >= 0:
        yield backend.private_fd, 0, 0, PRIVATE


class Measurer:
    """Keeps the last measurement of each object."""

    def __init__(self, gmemd: Gmemd) -> None:
        self._gmemd = gmemd
        self._known: dict[str, tuple[HostMemoryBackend, Resident]] = {}
        self._sweep: asyncio.Task[None] | None = None
        self.totals: Totals | None = None  # of the last sweep

    def last(self, backend: HostMemoryBackend) -> Resident | None:
        """What was measured last, however long ago."""
        known = self._known.get(backend.id)
        return known[1] if known is not None and known[0] is backend else None

    async def measure(self, backends: Iterable[HostMemoryBackend], max_age: float) -> None:
        """Measure those (few) of which nothing is known that is younger than `max_age` seconds."""
        oldest = monotonic() - max_age
        await self._measure([backend for backend in backends
                             if (last := self.last(backend)) is None or last.when < oldest])

    async def sweep(self, wait: float) -> Totals | None:
        """The totals; older ones when a new sweep takes longer than `wait` seconds, None when there are none yet."""
        if self._sweep is None and self._is_due():
            self._sweep = asyncio.create_task(self._measure_all())
        if self._sweep is not None:
            await asyncio.wait([self._sweep], timeout=wait)
        return self.totals

    def _is_due(self) -> bool:
        totals = self.totals
        return totals is None or monotonic() - totals.when > max(FRESH, REST * totals.seconds)

    async def _measure_all(self) -> None:
        began = monotonic()
        try:
            backends = list(self._gmemd.objects)
            await self._measure(backends)
            present = {backend.id: known for backend in backends
                       if (known := self._known.get(backend.id)) is not None and known[0] is backend}
            self._known = present
            found = [resident for _, resident in present.values()]
            self.totals = Totals(sum([one.private for one in found]), sum([one.shared for one in found]),
                                 sum([not one.known for one in found]), monotonic(), monotonic() - began)
        finally:
            self._sweep = None

    async def _measure(self, backends: list[HostMemoryBackend]) -> None:
        batch: list[tuple[HostMemoryBackend, Part]] = []
        sums: dict[str, tuple[HostMemoryBackend, list[int]]] = {}
        for backend in backends:
            if backend.fd < 0:  # it was deleted meanwhile
                continue
            sums[backend.id] = (backend, [0, 0, 1])
            for part in list(parts(backend)):
                batch.append((backend, part))
                if len(batch) == BATCH:
                    await self._run(batch, sums)
                    batch = []
        if batch:
            await self._run(batch, sums)
        now = monotonic()
        for backend, (shared, private, known) in sums.values():
            self._known[backend.id] = (backend, Resident(private, shared, now, bool(known)))

    async def _run(self, batch: list[tuple[HostMemoryBackend, Part]],
                   sums: dict[str, tuple[HostMemoryBackend, list[int]]]) -> None:
        found = await self.look([part for _, part in batch])
        for (backend, part), count in zip(batch, found, strict=True):
            total = sums[backend.id][1]
            if count is None:
                total[2] = 0
            else:
                total[part[3]] += count

    async def look(self, batch: list[Part]) -> list[int | None]:
        """The resident bytes of each (few) part; None where the kernel does not tell or the object is gone."""
        copies: dict[int, int] = {}  # fd: its duplicate, which the worker closes
        for fd, _, _, _ in batch:
            if fd not in copies:
                try:
                    copies[fd] = os.dup(fd)
                except OSError:
                    copies[fd] = -1
        found: list[int | None] = await in_thread(self._look, copies, batch)
        return found

    def _look(self, copies: dict[int, int], batch: list[Part]) -> list[int | None]:
        found: list[int | None] = []
        try:
            for fd, offset, size, _ in batch:
                try:
                    found.append(self._gmemd.kernel.resident(copies[fd], offset, size))
                except OSError:
                    found.append(None)
        finally:
            for copy in copies.values():
                if copy >= 0:
                    os.close(copy)
        return found

    def close(self) -> None:
        """End a sweep that is under way."""
        if self._sweep is not None:
            self._sweep.cancel()
