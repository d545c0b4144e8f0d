"""How much of the objects is in memory, measured beside the event loop's work.

Measuring costs a system call for each part of an object that is of one visibility, and time in the kernel in
proportion to what is resident.  So it is done in a worker thread; a sweep over all objects is shared by all who ask,
and takes at most a twentieth of one CPU's time.  Every now and then the thread sleeps: while it computes, the event
loop has to wait for the interpreter.  An object may be deleted meanwhile, and its descriptor's number be another
file's: what was measured counts only if the descriptor is the object's still (`HostMemoryBackend.close`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Final, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.ranges import PRIVATE, SHARED

TURN: Final = 200e-6  # seconds that the worker works
PAUSE: Final = 500e-6  # seconds that it then sleeps
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
    if backend.visibility is None:
        yield backend.fd, backend.offset, backend.memory_size if backend.offset else 0, SHARED
        return
    visibility = backend.visibility.copy()  # the event loop may go on with the other one
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
        self._closed = False
        self.totals: Totals | None = None  # of the last sweep

    def last(self, backend: HostMemoryBackend) -> Resident | None:
        """What was measured last, however long ago."""
        known = self._known.get(backend.id)
        return known[1] if known is not None and known[0] is backend else None

    async def measure(self, backends: Iterable[HostMemoryBackend], max_age: float) -> None:
        """Measure those (few) of which nothing is known that is younger than `max_age` seconds."""
        oldest = monotonic() - max_age
        stale = [backend for backend in backends if (last := self.last(backend)) is None or last.when < oldest]
        if stale:
            self._known.update(await in_thread(self._measure, stale))

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
        try:
            self._known, self.totals = await in_thread(self._measure_sum, self._gmemd.objects.in_creation_order())
        finally:
            self._sweep = None

    async def look(self, backend: HostMemoryBackend, wanted: Sequence[Part]) -> list[int | None]:
        """The resident bytes of each of an object's parts; None where the kernel does not tell."""
        found: list[int | None] = await in_thread(lambda: [self._count(backend, part) for part in wanted])
        return found

    # -- in the worker thread ----------------------------------------------------------------------

    def _measure_sum(self, backends: Iterable[HostMemoryBackend]) -> tuple[Known, Totals]:
        began = monotonic()
        known = self._measure(backends)
        residents = [resident for _, resident in known.values()]
        return known, Totals(sum([one.private for one in residents]), sum([one.shared for one in residents]),
                             sum([not one.known for one in residents]), monotonic(), monotonic() - began)

    def _measure(self, backends: Iterable[HostMemoryBackend]) -> Known:
        known: Known = {}
        began = monotonic()
        for backend in backends:
            if self._closed:
                break
            if monotonic() - began >= TURN:
                sleep(PAUSE)
                began = monotonic()
            counts = [(part[3], self._count(backend, part)) for part in parts(backend)]
            if backend.fd >= 0:  # else it was deleted meanwhile
                private = sum([count or 0 for state, count in counts if state is PRIVATE])
                shared = sum([count or 0 for state, count in counts if state is SHARED])
                complete = all([count is not None for _, count in counts])
                known[backend.id] = (backend, Resident(private, shared, monotonic(), complete))
        return known

    def _count(self, backend: HostMemoryBackend, part: Part) -> int | None:
        fd, offset, size, _ = part
        try:
            count = self._gmemd.kernel.resident(fd, offset, size)
        except OSError:
            return None
        return count if fd in (backend.fd, backend.private_fd) else None

    # ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End a sweep that is under way."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
