"""The map of an object's pages: its address space cut into cells, and what each cell consists of.

A cell's parts are given in bytes; as a picture it is a column, from the bottom: private pages in memory, shared
ones in memory, then what is absent, private and shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.memory.ranges import PRIVATE, SHARED
from gmemd.web.measure import Measurer, Part

CELLS: Final = 64
HEIGHT: Final = 16  # units of a column
EXACT: Final = 8  # ranges in a cell up to which each is measured; of more, shares are estimated
KINDS: Final = ("private", "shared", "private-absent", "shared-absent")

Cell = tuple[int, int, int, int]  # bytes of each of KINDS


def cells_of(backend: HostMemoryBackend, page: int) -> list[tuple[int, int]]:
    """Offset and size of each cell: whole pages, at most CELLS of them."""
    size = max(page, -(-backend.memory_size // CELLS // page) * page)
    return [(offset, min(size, backend.memory_size - offset)) for offset in range(0, backend.memory_size, size)]


async def measure_strip(backend: HostMemoryBackend, measurer: Measurer, page: int) -> list[Cell]:
    """What each cell consists of; `measure` must have measured the object before."""
    cells = cells_of(backend, page)
    sizes = [_by_visibility(backend, *cell) for cell in cells]
    known = measurer.last(backend)
    resident = 0 if known is None else known.private + known.shared
    if resident == 0 or resident >= backend.memory_size:
        full = resident > 0
        return [_cell(private, shared, private * full, shared * full) for private, shared in sizes]
    todo = [(number, part) for number, cell in enumerate(cells) for part in _parts(backend, *cell)]
    found = [[0, 0] for _ in cells]
    counts = await measurer.look(backend, [part for _, part in todo])
    for (number, (_, size, state, _)), count in zip(todo, counts, strict=True):
        if count is None:  # huge pages are counted only as a whole
            count = size * resident // backend.memory_size
        found[number][state] += count
    return [_cell(private, shared, *_shares(backend, private, shared, *counts))
            for (private, shared), counts in zip(sizes, found, strict=True)]


def _by_visibility(backend: HostMemoryBackend, offset: int, size: int) -> tuple[int, int]:
    """Bytes of a cell that are private and shared."""
    if backend.visibility is None:
        return 0, size
    private = sum([length for _, length, state in backend.visibility.ranges(offset, size) if state is PRIVATE])
    return private, size - private


def _parts(backend: HostMemoryBackend, offset: int, size: int) -> Iterator[Part]:
    visibility = backend.visibility
    if visibility is None:
        yield offset, size, SHARED, False
        return
    ranges = list(visibility.ranges(offset, size))
    if len(ranges) <= EXACT:
        for start, length, state in ranges:
            yield start, length, state, False
    else:
        yield offset, size, SHARED, False  # to be shared out by _shares
    if backend.private_fd >= 0:
        yield offset, size, PRIVATE, True


def _shares(backend: HostMemoryBackend, private: int, shared: int, shared_found: int,
            private_found: int) -> tuple[int, int]:
    """Private and shared resident bytes; what cannot all be shared must be private."""
    return private_found + max(0, shared_found - shared), min(shared_found, shared)


def _cell(private: int, shared: int, private_resident: int, shared_resident: int) -> Cell:
    private_resident = min(private, private_resident)
    return (private_resident, min(shared, shared_resident), private - private_resident,
            max(0, shared - shared_resident))


def paths(cells: list[Cell]) -> dict[str, str]:
    """An SVG path for each of KINDS that occurs, in a picture of len(cells) by HEIGHT units."""
    columns = [_column(cell) for cell in cells]
    drawn: dict[str, list[str]] = {}
    at = 0
    for column, group in groupby(columns):
        width, top = len(list(group)), HEIGHT
        for kind, height in zip(KINDS, column, strict=True):
            top -= height
            if height:
                drawn.setdefault(kind, []).append(f"M{at} {top}h{width}v{height}h-{width}z")
        at += width
    return {kind: "".join(path) for kind, path in drawn.items()}


def _column(cell: Cell) -> tuple[int, ...]:
    """Heights that sum to HEIGHT; whatever is there at all gets one unit at least."""
    total = sum(cell)
    heights = [max(1, part * HEIGHT // total) if part else 0 for part in cell]
    heights[heights.index(max(heights))] += HEIGHT - sum(heights)
    return tuple(heights)
