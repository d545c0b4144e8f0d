"""Which bytes of a file are in memory, without touching any (reference, section 6).

cachestat(2) counts the pages of a range. mincore(2) on a fresh mapping maps them, except pages that were allocated and
never touched; where it misses some, the exact map is found by bisecting with cachestat. Reading through a mapping
instead would allocate every hole. Where cachestat is not available (Linux before 6.5, a container's seccomp filter), a
guest_memfd is examined with mincore alone.
"""

from __future__ import annotations

import errno
import os
from functools import cache
from itertools import compress
from operator import sub

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE, check_range, refuse


def resident(fd: int, offset: int = 0, size: int = 0) -> int:
    """The resident bytes of an aligned range; size 0 is to the end.

    Where cachestat does not work, st_blocks counts the whole of an ordinary file; a part of one that is neither empty
    nor full is then unknown: EOPNOTSUPP.
    """
    if size or offset:
        check_range(offset, size or PAGE_SIZE)
    if can_count():
        try:
            return syscalls.cachestat(fd, offset, size) * PAGE_SIZE
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:  # huge pages
                raise
    elif _is_guest_memfd(fd):
        return sum(length for _, length in touched_ranges(fd, offset, size))
    return by_blocks(fd, offset, size)


@cache
def can_count() -> bool:
    """Whether this process may use cachestat."""
    try:
        syscalls.cachestat(-1, 0, 0)
    except OSError as exc:
        return exc.errno not in (errno.ENOSYS, errno.EPERM)
    return True


def by_blocks(fd: int, offset: int, size: int) -> int:
    """The same from st_blocks, as far as possible."""
    stat = os.fstat(fd)
    blocks = stat.st_blocks * 512
    if blocks == 0 and _is_guest_memfd(fd):
        raise refuse(errno.EOPNOTSUPP)  # it has no blocks, however many pages it has
    inside = max(0, min(stat.st_size, offset + size if size else stat.st_size) - offset)
    if blocks == 0 or inside == 0 or inside == stat.st_size:
        return blocks if inside else 0
    if blocks >= stat.st_size:
        return inside
    raise refuse(errno.EOPNOTSUPP)


def touched_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """[(offset, bytes)] of a guest_memfd's pages in a range that were touched; size 0: to the end."""
    length = os.fstat(fd).st_size
    end = min(length, offset + size) if size else length
    ranges: list[tuple[int, int]] = []
    for start in range(offset, end, _WINDOW):
        if not can_count() or resident(fd, start, min(_WINDOW, end - start)):
            _append_present(ranges, start, syscalls.mincore(fd, start, min(_WINDOW, end - start)))
    return ranges


def data_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """[(offset, bytes)] of what may hold anything but zeros in a range, including swapped pages, ascending."""
    if _is_guest_memfd(fd):  # it cannot seek; a page that was never touched holds zeros
        return touched_ranges(fd, offset, size)
    found: list[tuple[int, int]] = []
    at, end = offset, offset + size
    while (begin := next_data(fd, at, end)) < end:
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, min(at, end) - begin))
    return found


def next_data(fd: int, at: int, end: int) -> int:
    """Where a file has data again at or after an offset; `end`, or more, if it has none before that."""
    if at >= end:
        return end
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        return end


def resident_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """[(offset, bytes)] of the resident ranges in an aligned range, ascending, neighbours joined.

    While others allocate or punch, the map shows each page as it was at some time during the call.
    """
    check_range(offset, size)
    if not can_count() and _is_guest_memfd(fd):
        return touched_ranges(fd, offset, size)
    ranges: list[tuple[int, int]] = []
    parts = [(start, min(_WINDOW, offset + size - start)) for start in range(offset, offset + size, _WINDOW)]
    todo = [(start, length, resident(fd, start, length)) for start, length in reversed(parts)]
    while todo:
        start, length, count = todo.pop()
        if count <= 0:
            continue
        if count >= length:
            _append(ranges, start, length)
            continue
        if can_count() and length >= _WORTH_A_MAP:
            present = syscalls.mincore(fd, start, length)
            if present.count(1) * PAGE_SIZE == count:
                _append_present(ranges, start, present)
                continue
        half = length // PAGE_SIZE // 2 * PAGE_SIZE
        left = resident(fd, start, half)
        todo.append((start + half, length - half, count - left))
        todo.append((start, half, left))
    return ranges


_WINDOW = 1 << 30  # bytes that one mincore examines: a byte for each page
_WORTH_A_MAP = 64 * PAGE_SIZE  # bytes; below, counting halves costs less than mapping


def _append_present(ranges: list[tuple[int, int]], start: int, present: bytes) -> None:
    """Append what mincore says, a byte of 0 or 1 for each page, of a range from `start` on."""
    bits = int.from_bytes(present, "little")
    edges = (bits ^ bits << 8).to_bytes(len(present) + 1, "little")  # 1 where a run begins, and behind its last page
    places = list(compress(range(start, start + len(edges) * PAGE_SIZE, PAGE_SIZE), edges))
    begins = places[::2]
    runs = list(zip(begins, map(sub, places[1::2], begins), strict=True))
    if runs:
        _append(ranges, *runs[0])
        ranges += runs[1:]


def _is_guest_memfd(fd: int) -> bool:
    """Is it a real one? The file system says so since about Linux 6.18, the link always does."""
    return (syscalls.filesystem(fd)[0] in (uapi.GUEST_MEMFD_MAGIC, uapi.ANON_INODE_FS_MAGIC)
            and "[kvm-gmem]" in os.readlink(f"/proc/self/fd/{fd}"))


def _append(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    if ranges and sum(ranges[-1]) == start:
        start, before = ranges.pop()
        length += before
    ranges.append((start, length))
