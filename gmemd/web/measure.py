"""How much of the objects is in memory, measured beside the event loop's work.

Measuring costs a system call for each part of an object that is of one visibility, and time in the kernel in
proportion to what is resident.  So it is done in batches, each in a worker thread on duplicates of the descriptors
(the object may be deleted meanwhile), with the loop free between two batches; a sweep over all objects is
shared by all who ask, and takes at most a twentieth of one CPU's time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Final, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd, in_thread
from gmemd.ranges import PRIVATE, SHARED

BATCH: Final = 64  # parts in one turn of the worker
REST: Final = 20  # a sweep is not repeated before this many times its own duration
FRESH: Final = 1.0  # seconds that a sweep is good for at least

# What is to be measured: the fd, offset and size in bytes (0, 0: all of it), and which visibility it counts for.
Part = tuple[int, int, int, bool]


class Resident(NamedTuple):
    """Bytes of an object that are in memory; what is no guest_memfd counts as shared."""

    private: int
    shared: int
    when: float  # monotonic seconds
    known: bool = True  # False: the kernel did not tell


Known = dict[str, tuple[HostMemoryBackend, Resident]]


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
        self._known: Known = {}
        self._sweep: asyncio.Task[None] | None = None
        self.totals: Totals | None = None  # of the last sweep

    def last(self, backend: HostMemoryBackend) -> Resident | None:
        """What was measured last, however long ago."""
        known = self._known.get(backend.id)
        return known[1] if known is not None and known[0] is backend else None

    async def measure(self, backends: Iterable[HostMemoryBackend], max_age: float) -> None:
        """Measure those (few) of which nothing is known that is younger than `max_age` seconds."""
        oldest = monotonic() - max_age
        stale = [backend for backend in backends if (last := self.last(backend)) is None or last.when < oldest]
        async for _ in self._measure(stale, self._known):
            pass

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
        began, private, shared, unknown = monotonic(), 0, 0, 0
        known: Known = {}
        try:
            async for found in self._measure(self._gmemd.objects.in_creation_order(), known):
                private += sum([one.private for one in found])
                shared += sum([one.shared for one in found])
                unknown += sum([not one.known for one in found])
            self._known = known
            self.totals = Totals(private, shared, unknown, monotonic(), monotonic() - began)
        finally:
            self._sweep = None

    async def _measure(self, backends: Iterable[HostMemoryBackend], known: Known) -> AsyncIterator[list[Resident]]:
        """Measure objects, note it in `known`, and give it in portions."""
        batch: list[tuple[HostMemoryBackend, Part]] = []
        for backend in backends:
            if backend.fd >= 0:  # else it was deleted meanwhile
                batch += [(backend, part) for part in parts(backend)]
            if len(batch) >= BATCH:
                yield await self._measure_batch(batch, known)
                batch = []
        if batch:
            yield await self._measure_batch(batch, known)

    async def _measure_batch(self, batch: list[tuple[HostMemoryBackend, Part]], known: Known) -> list[Resident]:
        """The same for whole objects, of whose parts there may be many."""
        sums: dict[str, tuple[HostMemoryBackend, list[int]]] = {}
        for start in range(0, len(batch), BATCH):
            now = batch[start:start + BATCH]
            counts = await self.look([part for _, part in now])
            for (backend, (_, _, _, state)), count in zip(now, counts, strict=True):
                total = sums.setdefault(backend.id, (backend, [0, 0, 0]))[1]
                total[2 if count is None else state] += 1 if count is None else count
        when = monotonic()
        found = []
        for backend, (shared, private, unknown) in sums.values():
            found.append(Resident(private, shared, when, not unknown))
            known[backend.id] = (backend, found[-1])
        return found

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
