"""Measuring objects off the event loop, for commands, sums and the web alike.

A worker thread measures a batch at a time, on duplicates of the objects' descriptors. Starting one takes as long as
measuring a hundred objects with nothing in them, so those are measured on the event loop, with turns for others in
between. A failure concerns only its object, which is then unknown; an object that is deleted before its batch has been
measured is left out. Without a descriptor for a duplicate, or without a thread, all objects are measured on the event
loop, and what would take long there is unknown.

Measuring costs a system call for each part of an object with the same visibility, and time in the kernel in proportion
to what is resident. So frequent users share a Measurer.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.changes.threads import close_beside, in_thread
from gmemd.commands.context import Gmemd
from gmemd.errors import QmpError, close_fd
from gmemd.kernel.kernel import Kernel
from gmemd.memory.usage import Entry, Item, Ledger, Usage, measure, occupied, total

AT_ONCE: Final = 256 << 20  # bytes of objects that may be measured on the event loop: a few ms if they are in memory
_RANGES_AT_ONCE: Final = 500  # ranges, each of which takes a system call
LITTLE: Final = 1 << 20  # allocated bytes of an object that is measured on the event loop in any case
_A_FEW: Final = 8  # of these, which take less than a turn of the loop
BATCH: Final = 100  # objects that one thread measures
TURN: Final = 200e-6  # seconds that a gentle thread works: while it computes, the event loop waits for the interpreter
PAUSE: Final = 500e-6  # seconds that it then sleeps
REST: Final = 20  # a sweep is not repeated before this many times its own duration
FRESH: Final = 1.0  # seconds that a sweep is valid, at least

if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")


async def measured(gmemd: Gmemd, backends: Iterable[HostMemoryBackend], measure: Callable[[Item], T], *,
                   batch: int = BATCH, gently: bool = False,
                   empty: tuple[T, ...] = ()) -> AsyncIterator[list[tuple[HostMemoryBackend, T]]]:
    """Measure objects in their order; yields those of each batch with the results of `measure`, which runs in a thread
    where it may take long.

    gently: with pauses, for work that nobody waits for. empty: (the result) for an object without memory, if known.
    """
    left, pace = deque(backends), Pace()
    while left:
        pairs = await _little(left, batch, measure, empty, pace)
        if not pairs:
            found, items = _duplicated(left, batch)
            if not items and left:  # no descriptor is left
                found = [left.popleft()]
            results = await _in_thread(measure, items, gently=gently) if items else None
            if results is None:
                results = await _here(found, measure)
            pairs = list(zip(found, results, strict=True))
        yield [pair for pair in pairs if is_there(pair[0])]


async def _little(left: deque[HostMemoryBackend], most: int, measure: Callable[[Item], T], empty: tuple[T, ...],
                  pace: Pace) -> list[tuple[HostMemoryBackend, T]]:
    """Take the next objects off as long as there is so little in them that measuring takes less than starting a thread,
    and measure them here, in turns."""
    found: list[tuple[HostMemoryBackend, T]] = []
    while left and len(found) < most:
        backend = left[0]
        allocated = _allocated(backend.fd) if backend.kind == "memfd" else None
        if allocated is None or allocated > LITTLE:
            break
        found.append((left.popleft(), measure(item_of(backend)) if allocated or not empty else empty[0]))
        if not len(found) % _A_FEW:
            await pace.keep()
    return found


def _allocated(fd: int) -> int | None:
    """The bytes that a memfd has, in memory or swapped, as the kernel has counted them; None if it cannot tell."""
    try:
        return os.fstat(fd).st_blocks * 512
    except OSError:
        return None


class Sweep(NamedTuple):
    """What all objects together occupy; memory that several of them share counts once."""

    usage: Usage
    when: float  # monotonic seconds at its end
    seconds: float  # that it took


class Measurer:
    """Keeps the last measurement of each object, and of all together, for all users."""

    def __init__(self, gmemd: Gmemd) -> None:
        self._gmemd = gmemd
        self._sweep: asyncio.Task[None] | None = None
        self._swept: Sweep | None = None

    def last(self, backend: HostMemoryBackend) -> Usage | None:
        """The last measurement, however old; None if there is none, or the result was unknown."""
        usage = (backend.measured or _NEVER)[1]
        return None if usage.unknown else usage

    async def measure(self, backends: Iterable[HostMemoryBackend], max_age: float) -> None:
        """Measure those (few) whose last measurement is older than `max_age` seconds."""
        oldest = monotonic() - max_age
        stale = [backend for backend in backends if (backend.measured or _NEVER)[0] < oldest]
        async for found in measured(self._gmemd, stale, partial(measure, self._gmemd.kernel), gently=True):
            self._keep(found)

    async def sweep(self, wait: float) -> Sweep | None:
        """A sweep over all objects, which takes at most a twentieth of one CPU's time.

        An older one if that takes longer than `wait` seconds, None if there has been none.
        """
        last = self._swept
        if self._sweep is None and (last is None or monotonic() - last.when > max(FRESH, REST * last.seconds)):
            self._sweep = asyncio.create_task(self._measure_all())
        if self._sweep is not None:
            await asyncio.wait([self._sweep], timeout=wait)
        return self._swept

    async def _measure_all(self) -> None:
        began, usage, enter = monotonic(), Usage(), Ledger(self._gmemd.kernel).enter
        try:
            async for found in measured(self._gmemd, self._gmemd.by_age(), enter, gently=True, empty=_NOTHING):
                self._keep([(backend, entry.usage) for backend, entry in found])
                usage = total([usage, *(entry.share for _, entry in found)])
            now = monotonic()
            self._swept = Sweep(usage, now, now - began)
        finally:
            self._sweep = None

    def _keep(self, found: Iterable[tuple[HostMemoryBackend, Usage]]) -> None:
        now = monotonic()
        for backend, usage in found:
            backend.measured = now, usage

    def close(self) -> None:
        """End a running sweep."""
        if self._sweep is not None:
            self._sweep.cancel()


_NEVER: Final = (float("-inf"), Usage(unknown=1))
_NOTHING: Final = (Entry(Usage(), Usage(), 0),)


def are_quick(backends: Collection[HostMemoryBackend]) -> bool:
    """Whether objects may be measured on the event loop: little memory, and not a file, whose server may not answer."""
    return sum([backend.memory_size for backend in backends]) <= AT_ONCE and all([
        backend.kind != "file" and (backend.visibility is None or len(backend.visibility) <= _RANGES_AT_ONCE)
        for backend in backends])


def item_of(backend: HostMemoryBackend, fds: tuple[int, int] | None = None) -> Item:
    """What to measure of an object; with `fds` instead of its own."""
    fd, aside_fd = fds or (backend.fd, -1 if backend.aside is None else backend.aside.fd)
    return Item(kind_of(backend), fd, backend.offset, backend.memory_size, backend.visibility, aside_fd)


def kind_of(backend: HostMemoryBackend) -> str:
    """The MemdevFileKind of an object."""
    return "hugetlb-memfd" if backend.properties.get("hugetlb") else backend.kind


def is_there(backend: HostMemoryBackend) -> bool:
    """Whether an object still exists."""
    return backend.lives and backend.fd >= 0


def _duplicated(left: deque[HostMemoryBackend], most: int) -> tuple[list[HostMemoryBackend], list[Item]]:
    """Take the next objects off, and duplicate their fds; fewer objects when descriptors run short."""
    found: list[HostMemoryBackend] = []
    items: list[Item] = []
    while left and len(items) < most:
        backend = left[0]
        if is_there(backend):
            try:
                items.append(_duplicate(backend))
            except OSError:
                break
            found.append(backend)
        left.popleft()
    return found, items


def _duplicate(backend: HostMemoryBackend) -> Item:
    """The same with fds that belong to the caller; OSError when there are none left."""
    fd, aside_fd = os.dup(backend.fd), -1
    if backend.aside is not None:
        try:
            aside_fd = os.dup(backend.aside.fd)
        except OSError:
            close_fd(fd)
            raise
    return item_of(backend, (fd, aside_fd))


async def occupied_by(kernel: Kernel, backends: Iterable[HostMemoryBackend]) -> int:
    """The bytes of objects that are in memory, as far as known, whichever room they are in; in a thread."""
    in_memory, left = 0, deque(backends)
    while left:
        items: list[Item] = []
        with suppress(OSError):
            while left and len(items) < BATCH:
                if left[0].fd >= 0:
                    items.append(_duplicate(left[0]))
                left.popleft()
        if not items and left:
            raise QmpError("what is in memory cannot be measured: no descriptors are left")
        found = await _in_thread(partial(occupied, kernel), items, gently=False) if items else []
        if found is None:
            raise QmpError("what is in memory cannot be measured: no thread could be started")
        in_memory += sum([one or 0 for one in found])
    return in_memory


async def _in_thread(measure: Callable[[Item], T], items: list[Item], *, gently: bool) -> list[T] | None:
    """Measure and close; None if no thread could be started."""
    try:
        results: list[T] = await in_thread(_work, measure, items, gently)
    except QmpError:
        close_beside([fd for item in items for fd in _fds_of(item)])
        return None
    return results


def _work(measure: Callable[[Item], T], items: list[Item], gently: bool) -> list[T]:
    try:
        return [*_gently(measure, items)] if gently else [measure(item) for item in items]
    finally:
        for item in items:  # one may be the last descriptor of memory: closing it takes long
            for fd in _fds_of(item):
                close_fd(fd)


def _gently(measure: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    began = monotonic()
    for item in items:
        if monotonic() - began >= TURN:
            sleep(PAUSE)
            began = monotonic()
        yield measure(item)


def _fds_of(item: Item) -> list[int]:
    """Its descriptors."""
    return [item.fd] if item.aside_fd < 0 else [item.fd, item.aside_fd]


async def _here(backends: Iterable[HostMemoryBackend], measure: Callable[[Item], T]) -> list[T]:
    """Measure on the event loop."""
    results = []
    for backend in backends:
        results.append(measure(item_of(backend)._replace(measurable=are_quick([backend]))))
        await asyncio.sleep(0)
    return results


async def with_resident(gmemd: Gmemd, backend: HostMemoryBackend, offset: int, size: int,
                        sentence: str) -> str:
    """A sentence from a str.format template, with the number of bytes of a part of an object that are in memory."""
    if backend.fd < 0:  # of a trial
        return sentence.format(0)

    def resident(item: Item) -> int | None:
        return occupied(gmemd.kernel, item._replace(offset=item.offset + offset, size=size, aside_fd=-1))

    async for found in measured(gmemd, [backend], resident):
        for _, count in found:
            return sentence.format("an unknown number of" if count is None else count)
    raise QmpError(f"object '{backend.id}' not found")
