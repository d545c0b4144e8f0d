"""How /proc/PID/maps shows a file, which is not always what fstat(2) reports.

On overlayfs, btrfs and others a line of maps has the device of a file system below or of the whole, while st_dev is
the mount's or the subvolume's.  A mapping of our own shows what the lines of other processes must have.  In a snapshot
of a btrfs subvolume files look the same there as in the original; /proc/PID/map_files distinguishes them, if it may be
read.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence

from gmemd.kernel import backing, syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE
from gmemd.processes.holders import Shown, shown_as, target


def shown(fds: Sequence[int]) -> list[Shown]:
    """How each file is shown, found by mapping a page of it, untouched; by fstat(2) if it cannot be mapped."""
    found = [shown_as((status.st_dev, status.st_ino)) for status in map(os.fstat, fds)]
    places: dict[int, int] = {}  # address: index
    try:
        for index, fd in enumerate(fds):
            if not backing.is_only_memory(fd):
                address = _mapped(fd)
                if address:
                    places[address] = index
        for address, line in _own_lines(sorted(places)):
            index = places[address]
            seen = Shown(line[3], line[4])
            if seen != found[index]:
                found[index] = seen._replace(target=target("/proc/self", line[0]))
    finally:
        for address in places:
            syscalls.munmap(address, PAGE_SIZE)
    return found


def _mapped(fd: int) -> int:
    """Map a page; 0 if it cannot be mapped: a FIFO, or a file opened for writing only."""
    try:
        return syscalls.mmap(PAGE_SIZE, uapi.PROT_NONE, uapi.MAP_SHARED | uapi.MAP_NORESERVE, fd, 0)
    except OSError:
        return 0


def _own_lines(addresses: Sequence[int]) -> list[tuple[int, list[str]]]:
    """The line of this process's maps for each (ascending) address, split into fields."""
    found: list[tuple[int, list[str]]] = []
    if addresses:
        with open("/proc/self/maps", errors="replace") as lines:
            for line in lines:
                fields = line.split(None, 5)
                start, end = (int(part, 16) for part in fields[0].split("-"))
                inside = addresses[bisect_left(addresses, start):bisect_left(addresses, end)]
                found += [(address, fields) for address in inside]
    return found
