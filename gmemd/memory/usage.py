"""What an object occupies, as the kernel counts it for its file: resident pages and blocks (st_blocks).

No asyncio here, and nothing is touched or allocated; measuring takes long and is for a worker thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gmemd.kernel.kernel import Kernel
from gmemd.memory.ranges import PRIVATE, RangeMap

_END = 1 << 64  # bytes; no file is that long

Part = tuple[int, int]  # offset in the file, and bytes


class Item(NamedTuple):
    """What measuring an object needs to know of it; the fds are borrowed."""

    kind: str  # "guest-memfd", "memfd", "hugetlb-memfd" or "file"
    fd: int
    offset: int  # bytes
    size: int  # bytes
    visibility: RangeMap | None
    aside_fd: int  # for preserved private bytes; -1: there are none
    measurable: bool = True  # False: no time for that


class Usage(NamedTuple):
    """Bytes that occupy memory."""

    resident: int = 0
    private: int = 0  # of resident: in private ranges
    shared: int = 0  # of resident: in shared ranges, and all that is not a guest_memfd
    aside: int = 0  # in addition: preserved private bytes
    swapped: int = 0  # bytes of the file that are not in memory
    unknown: int = 0  # objects whose residency is unknown

    @property
    def occupied(self) -> int:
        """Everything that is in memory."""
        return self.resident + self.aside

    @property
    def by_visibility(self) -> dict[str, int]:
        """The same as private and shared; preserved private bytes are private."""
        return {"private": self.private + self.aside, "shared": self.shared}


def total(usages: Iterable[Usage]) -> Usage:
    """The sum of usages."""
    return Usage(*map(sum, zip(Usage(), *usages, strict=True)))


def occupied(kernel: Kernel, item: Item) -> int | None:
    """The bytes of an object that are in memory, including what is set aside; None if unknown."""
    if not item.measurable:
        return None
    try:
        return kernel.resident(item.fd, item.offset, item.size) + _aside(kernel, item)
    except OSError:
        return None


def measure(kernel: Kernel, item: Item) -> Usage:
    """Measure an object."""
    try:
        return _measure(kernel, item, os.fstat(item.fd)) if item.measurable else Usage(unknown=1)
    except OSError:
        return Usage(unknown=1)


def _measure(kernel: Kernel, item: Item, status: os.stat_result) -> Usage:
    resident = kernel.resident(item.fd, item.offset, item.size)
    swapped = _swapped(item, resident, status)
    if item.visibility is None:
        return Usage(resident, 0, resident, 0, swapped)
    private = _private(kernel, item, resident, [(item.offset, item.size)])
    return Usage(resident, private, resident - private, _aside(kernel, item), swapped)


def _measure_parts(kernel: Kernel, item: Item, parts: Sequence[Part]) -> Usage:
    """Measure parts of an object's file, and what is set aside for it."""
    resident = sum([kernel.resident(item.fd, *part) for part in parts])
    private = _private(kernel, item, resident, parts)
    return Usage(resident, private, resident - private, _aside(kernel, item))


def _aside(kernel: Kernel, item: Item) -> int:
    return kernel.resident(item.aside_fd) if item.aside_fd >= 0 else 0


def _private(kernel: Kernel, item: Item, resident: int, parts: Iterable[Part]) -> int:
    """How many of the resident bytes of the parts are in private ranges."""
    if item.visibility is None or not resident:
        return 0
    visibility = item.visibility.copy()  # the event loop may change the original meanwhile
    if len(visibility) == 1:
        return resident if visibility.at(0) is PRIVATE else 0
    return min(resident, sum([kernel.resident(item.fd, item.offset + start, length) for offset, size in parts
                              for start, length, state in visibility.ranges(offset - item.offset, size)
                              if state is PRIVATE]))


def _swapped(item: Item, resident: int, status: os.stat_result) -> int:
    """By how much a memfd's blocks exceed its resident pages: pages in swap. Blocks of other files mean something
    else."""
    if item.kind not in ("memfd", "guest-memfd"):
        return 0
    return max(0, status.st_blocks * 512 - resident)  # a real guest_memfd has no blocks


class Entry(NamedTuple):
    """What a ledger knows of an object."""

    usage: Usage  # of all of it
    share: Usage  # of what no earlier object has
    size: int  # bytes of that


class Ledger:
    """Measures objects and counts memory once: objects may be overlapping parts of a file, or the same memory.

    What several have counts for the first that is entered.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._counted: dict[tuple[int, int], RangeMap] = {}  # by device and inode: the bytes that objects have

    def enter(self, item: Item) -> Entry:
        """Measure an object."""
        if not item.measurable:
            return _unknown(item.size)
        try:
            status = os.fstat(item.fd)
        except OSError:
            return _unknown(item.size)
        new = self._count((status.st_dev, status.st_ino), item.offset, item.size)
        size = item.size if new is None else sum([length for _, length in new])
        try:
            usage = _measure(self._kernel, item, status)
            return Entry(usage, usage if new is None else _measure_parts(self._kernel, item, new), size)
        except OSError:
            return _unknown(size)

    def _count(self, file: tuple[int, int], offset: int, size: int) -> list[Part] | None:
        """The parts of an object that were not counted before, None for all of it; they count as counted from now
        on."""
        counted = self._counted.get(file)
        if counted is None:
            self._counted[file] = RangeMap(_END, False, [offset, offset + size])
            return None
        new = [(start, length) for start, length, known in counted.ranges(offset, size) if not known]
        counted.set(offset, size, True)
        return new


def _unknown(size: int) -> Entry:
    return Entry(Usage(unknown=1), Usage(unknown=1 if size else 0), size)
