"""What backs a file: the size of its pages, whether they exist only in memory, and what is allocated already."""

from __future__ import annotations

import errno
import os

from gmemd.kernel import residency, syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE

_GUEST_MEMFD = (uapi.GUEST_MEMFD_MAGIC, uapi.ANON_INODE_FS_MAGIC)
_ONLY_MEMORY = (*_GUEST_MEMFD, uapi.TMPFS_MAGIC, uapi.HUGETLBFS_MAGIC)


def page_size(fd: int) -> int:
    """The page size of a file: a huge page's on hugetlbfs, else the machine's."""
    magic, block_size = syscalls.filesystem(fd)
    return block_size if magic == uapi.HUGETLBFS_MAGIC else PAGE_SIZE


def is_only_memory(fd: int) -> bool:
    """Whether allocating the file's pages takes memory (a file on a disk takes blocks of the disk)."""
    return syscalls.filesystem(fd)[0] in _ONLY_MEMORY


def contents(fd: int, offset: int, size: int) -> list[tuple[int, int]] | None:
    """[(offset, bytes)] of what the range holds; None when that cannot be known exactly.

    Only what is not listed here may be punched without losing data. So there is no answer for a file on a disk, whose
    data need not be in memory, for a memfd with swapped pages or without cachestat, and for a partly filled file of
    huge pages.
    """
    magic, _ = syscalls.filesystem(fd)
    if magic in _GUEST_MEMFD:
        return residency.resident_ranges(fd, offset, size)
    if magic not in _ONLY_MEMORY:
        return None
    blocks = os.fstat(fd).st_blocks * 512  # bytes, including swapped ones
    if blocks == 0:
        return []
    if magic == uapi.HUGETLBFS_MAGIC or not residency.can_count() or residency.resident(fd) != blocks:
        return None
    return residency.resident_ranges(fd, offset, size)


def missing(fd: int, offset: int, size: int) -> int:
    """How many bytes of the range are not in memory yet; a lower bound where that is not exactly known."""
    try:
        return size - residency.resident(fd, offset, size)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return max(0, size - os.fstat(fd).st_blocks * 512)
