"""The map of an object's pages: its address space cut into cells, and what each cell consists of.

No asyncio here; measuring takes long and is for a worker thread.
"""

from __future__ import annotations

from typing import Final

from gmemd.kernel.kernel import Kernel
from gmemd.memory.ranges import PRIVATE, SHARED, RangeMap
from gmemd.memory.usage import Item, occupied

CELLS: Final = 64
EXACT: Final = 8  # up to that many ranges in a cell each is measured; with more, shares are estimated
KINDS: Final = ("private", "shared", "private-absent", "shared-absent")

Cell = tuple[int, int, int, int]  # bytes of each of KINDS


def cells_of(size: int, page: int) -> list[tuple[int, int]]:
    """Offset and size of each cell of so many bytes: whole pages, at most CELLS of them."""
    cell = max(page, -(-size // CELLS // page) * page)
    return [(offset, min(cell, size - offset)) for offset in range(0, size, cell)]


def measure_cells(kernel: Kernel, item: Item) -> list[Cell]:
    """What each cell of an object consists of; what is unknown is drawn as absent."""
    resident = occupied(kernel, item) or 0
    visibility = RangeMap(item.size, SHARED) if item.visibility is None else item.visibility.copy()
    return [_cell(kernel, item, resident, visibility, *cell) for cell in cells_of(item.size, _page_size(kernel, item))]


def _page_size(kernel: Kernel, item: Item) -> int:
    try:
        return kernel.file_page_size(item.fd) if item.measurable else kernel.page_size
    except OSError:
        return kernel.page_size


def _cell(kernel: Kernel, item: Item, resident: int, visibility: RangeMap, offset: int, size: int) -> Cell:
    """One cell of an object of which `resident` bytes are in memory."""
    ranges = list(visibility.ranges(offset, size))
    private = sum([length for _, length, state in ranges if state is PRIVATE])
    shared = size - private
    if resident == 0 or resident >= item.size:
        return (private, shared, 0, 0) if resident else (0, 0, private, shared)

    def count(fd: int, start: int, length: int) -> int:
        try:
            return kernel.resident(fd, start, length)
        except OSError:  # huge pages are counted only as a whole
            return length * resident // item.size

    found = [0, 0]  # bytes in memory of each state
    for start, length, state in ranges if len(ranges) <= EXACT else [(offset, size, SHARED)]:
        found[state] += count(item.fd, item.offset + start, length)
    if item.aside_fd >= 0:
        found[PRIVATE] += count(item.aside_fd, offset, size)
    # What exceeds the shared bytes must be private.
    in_private, in_shared = min(private, found[PRIVATE] + max(0, found[SHARED] - shared)), min(found[SHARED], shared)
    return in_private, in_shared, private - in_private, shared - in_shared
