"""Which bytes of a file are in memory, asked from the kernel without touching any (reference, section 6).

cachestat(2) counts the pages of a range; the exact map is found by bisecting with it. Looking through a
mapping instead would allocate every hole it meets.
"""

from __future__ import annotations

import errno
import os

from . import syscalls
from .base import PAGE_SIZE, check_range, refuse


def resident(fd: int, offset: int = 0, size: int = 0) -> int:
    """Return the resident bytes of an aligned range; size 0 is to the end.

    Where cachestat does not do (huge pages, Linux before 6.5, a seccomp filter) st_blocks counts the whole
    file; for a part of a file that is neither empty nor full there is no answer then: EOPNOTSUPP.
    """
    if size or offset:
        check_range(offset, size or PAGE_SIZE)
    try:
        return syscalls.cachestat(fd, offset, size) * PAGE_SIZE
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
            raise
    return by_blocks(fd, offset, size)


def by_blocks(fd: int, offset: int, size: int) -> int:
    """Return the same from st_blocks, as far as that tells it."""
    stat = os.fstat(fd)
    blocks = stat.st_blocks * 512
    if blocks == 0 and "[kvm-gmem]" in os.readlink(f"/proc/self/fd/{fd}"):
        raise refuse(errno.EOPNOTSUPP)  # a guest_memfd has no blocks, however many pages it has
    inside = max(0, min(stat.st_size, offset + size if size else stat.st_size) - offset)
    if blocks == 0 or inside == 0 or inside == stat.st_size:
        return blocks if inside else 0
    if blocks >= stat.st_size:
        return inside
    raise refuse(errno.EOPNOTSUPP)


def resident_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """Return [(offset, bytes)] of the resident ranges in an aligned range, ascending, neighbours joined.

    While others allocate or punch, the map is one that was true for each page at some time during the call.
    """
    check_range(offset, size)
    ranges: list[tuple[int, int]] = []
    todo = [(offset, size, resident(fd, offset, size))]
    while todo:
        start, length, count = todo.pop()
        if count <= 0:
            continue
        if count >= length:
            _append(ranges, start, length)
            continue
        half = length // PAGE_SIZE // 2 * PAGE_SIZE
        left = resident(fd, start, half)
        todo.append((start + half, length - half, count - left))
        todo.append((start, half, left))
    return ranges


def _append(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    if ranges and sum(ranges[-1]) == start:
        start, before = ranges.pop()
        length += before
    ranges.append((start, length))
