"""Measuring objects beside the event loop's work: the one way for commands, the bill and the web.

A worker thread measures a batch at a time, on duplicates of the objects' descriptors.  Whatever goes wrong with one
object is that object's alone, which is then unknown; one that is deleted before its batch has been measured is left
out, whoever asks.  Where no descriptor is left for a duplicate, or no thread to be had, objects are measured on the
event loop, others having their turn after each, and what would take long there is unknown.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from time import monotonic, sleep
from typing import Final, TypeVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import close_beside, in_thread
from gmemd.commands.context import Gmemd
from gmemd.errors import QmpError, close_fd
from gmemd.memory.usage import Item

AT_ONCE: Final = 256 << 20  # bytes of objects that may be measured on the event loop: some ms if they are in memory
_RANGES_AT_ONCE: Final = 500  # of differing visibility, each of which takes a system call
BATCH: Final = 100  # objects that one thread measures
TURN: Final = 200e-6  # seconds that a gentle thread works: while it computes, the event loop waits for the interpreter
PAUSE: Final = 500e-6  # seconds that it then sleeps

T = TypeVar("T")


async def measured(gmemd: Gmemd, backends: Iterable[HostMemoryBackend], measure: Callable[[Item], T], *,
                   batch: int = BATCH, gently: bool = False) -> AsyncIterator[list[tuple[HostMemoryBackend, T]]]:
    """Measure objects in their order; gives those of each batch with what `measure` has found, which runs in a thread.

    gently: with pauses, for work that nobody is waiting for.
    """
    left = deque(backends)
    while left:
        found, items = _duplicated(gmemd, left, batch)
        if not items and left:  # no descriptor is left
            found = [left.popleft()]
        results = await _in_thread(measure, items, gently=gently) if items else None
        if results is None:
            results = await _here(found, measure)
        yield [pair for pair in zip(found, results, strict=True) if _is_there(gmemd, pair[0])]


def is_quick(backend: HostMemoryBackend) -> bool:
    """Whether an object may be measured on the event loop: not a file, whose server may be asked and not answer."""
    return backend.memory_size <= AT_ONCE and backend.kind != "file" and (
        backend.visibility is None or len(backend.visibility) <= _RANGES_AT_ONCE)


def item_of(backend: HostMemoryBackend) -> Item:
    """What is to be measured of an object; the fds stay its own."""
    return Item(kind_of(backend), backend.fd, backend.offset, backend.memory_size, backend.visibility,
                backend.private_fd)


def kind_of(backend: HostMemoryBackend) -> str:
    """The MemdevFileKind of an object."""
    return "hugetlb-memfd" if backend.properties.get("hugetlb") else backend.kind


def _is_there(gmemd: Gmemd, backend: HostMemoryBackend) -> bool:
    return gmemd.objects.get(backend.id) is backend and backend.fd >= 0


def _duplicated(gmemd: Gmemd, left: deque[HostMemoryBackend],
                most: int) -> tuple[list[HostMemoryBackend], list[Item]]:
    """Take the next of the objects off, and duplicate their fds: of fewer where descriptors run short."""
    found: list[HostMemoryBackend] = []
    items: list[Item] = []
    while left and len(items) < most:
        backend = left[0]
        if _is_there(gmemd, backend):
            try:
                items.append(duplicate(backend))
            except OSError:
                break
            found.append(backend)
        left.popleft()
    return found, items


def duplicate(backend: HostMemoryBackend) -> Item:
    """The same with fds that belong to the caller; OSError when there are none left."""
    fd, aside_fd = os.dup(backend.fd), -1
    if backend.private_fd >= 0:
        try:
            aside_fd = os.dup(backend.private_fd)
        except OSError:
            close_fd(fd)
            raise
    return Item(kind_of(backend), fd, backend.offset, backend.memory_size, backend.visibility, aside_fd)


async def _in_thread(measure: Callable[[Item], T], items: list[Item], *, gently: bool) -> list[T] | None:
    """Measure and close; None where there is no thread to be had."""
    try:
        results: list[T] = await in_thread(_work, measure, items, gently)
    except QmpError:
        close_beside([fd for item in items for fd in fds_of(item)])
        return None
    return results


def _work(measure: Callable[[Item], T], items: list[Item], gently: bool) -> list[T]:
    try:
        return [*_gently(measure, items)] if gently else [measure(item) for item in items]
    finally:
        for item in items:  # the last descriptor of memory may be among them: closing it takes long
            for fd in fds_of(item):
                close_fd(fd)


def _gently(measure: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    began = monotonic()
    for item in items:
        if monotonic() - began >= TURN:
            sleep(PAUSE)
            began = monotonic()
        yield measure(item)


def fds_of(item: Item) -> list[int]:
    """Its descriptors."""
    return [item.fd] if item.aside_fd < 0 else [item.fd, item.aside_fd]


async def _here(backends: Iterable[HostMemoryBackend], measure: Callable[[Item], T]) -> list[T]:
    """Measure on the event loop."""
    results = []
    for backend in backends:
        results.append(measure(item_of(backend)._replace(measurable=is_quick(backend))))
        await asyncio.sleep(0)
    return results
