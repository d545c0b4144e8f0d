"""How much of the objects is in memory, for those who look again and again: the last measurements, shared by all.

Measuring costs a system call for each part of an object that is of one visibility, and time in the kernel in
proportion to what is resident.  So a sweep over all objects is shared by all who ask, and takes at most a twentieth
of one CPU's time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd
from gmemd.commands.measure import measured
from gmemd.memory.usage import Item, Ledger, Usage, measure, total

REST: Final = 20  # a sweep is not repeated before this many times its own duration
FRESH: Final = 1.0  # seconds that a sweep is good for at least

# A part of an object: its offset in the object, its bytes, which visibility it counts for, and whether it is of the
# private bytes that are kept aside.
Part = tuple[int, int, bool, bool]


class Resident(NamedTuple):
    """Bytes of an object that are in memory; what is no guest_memfd counts as shared."""

    private: int  # those that are kept aside included
    shared: int
    when: float  # monotonic seconds
    known: bool = True  # False: the kernel did not tell


@dataclass(frozen=True)
class Totals:
    """The sum over all objects, at the end of a sweep. Memory that several objects have counts once."""

    private: int  # bytes
    shared: int  # bytes
    unknown: int  # objects that could not be measured
    when: float  # monotonic seconds
    seconds: float  # that the sweep took


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
        stale = [backend for backend in backends if (last := self.last(backend)) is None or last.when < oldest]
        async for found in measured(self._gmemd, stale, self._resident, gently=True):
            self._known.update({backend.id: (backend, resident) for backend, resident in found})

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
        began, known, sums = monotonic(), {}, Usage()
        ledger = Ledger(self._gmemd.kernel)

        def enter(item: Item) -> tuple[Resident, Usage]:
            entry = ledger.enter(item)
            return _resident(entry.usage), entry.share

        try:
            async for found in measured(self._gmemd, self._gmemd.objects.in_creation_order(), enter, gently=True):
                known.update({backend.id: (backend, resident) for backend, (resident, _) in found})
                sums = total([sums, *(share for _, (_, share) in found)])
            self._known = known
            self.totals = Totals(sums.private + sums.aside, sums.shared, sums.unknown, monotonic(),
                                 monotonic() - began)
        finally:
            self._sweep = None

    def _resident(self, item: Item) -> Resident:
        return _resident(measure(self._gmemd.kernel, item))

    async def look(self, backend: HostMemoryBackend, wanted: Sequence[Part]) -> list[int | None]:
        """The resident bytes of each of an object's parts; None where the kernel does not tell."""
        async for found in measured(self._gmemd, [backend], lambda item: [self._count(item, part) for part in wanted]):
            for _, counts in found:
                return counts
        return [None] * len(wanted)

    async def page_size(self, backend: HostMemoryBackend) -> int:
        """Bytes of the pages behind an object."""
        kernel = self._gmemd.kernel
        if backend.kind != "file":
            return kernel.file_page_size(backend.fd)
        async for found in measured(self._gmemd, [backend], self._page_size):  # a file's server may be asked
            for _, size in found:
                return size
        return kernel.page_size

    def _page_size(self, item: Item) -> int:
        try:
            return self._gmemd.kernel.file_page_size(item.fd) if item.measurable else self._gmemd.kernel.page_size
        except OSError:
            return self._gmemd.kernel.page_size

    def _count(self, item: Item, part: Part) -> int | None:
        offset, size, _, aside = part
        if not item.measurable:
            return None
        try:
            if aside:
                return self._gmemd.kernel.resident(item.aside_fd, offset, size)
            return self._gmemd.kernel.resident(item.fd, item.offset + offset, size)
        except OSError:
            return None

    def close(self) -> None:
        """End a sweep that is under way."""
        if self._sweep is not None:
            self._sweep.cancel()


def _resident(usage: Usage) -> Resident:
    return Resident(usage.private + usage.aside, usage.shared, monotonic(), not usage.unknown)
