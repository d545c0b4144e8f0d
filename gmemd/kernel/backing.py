"""What stands behind a file: which pages, whether memory is their only place, and what is there already."""

from __future__ import annotations

import errno
import os

from gmemd.kernel import residency, syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE

_GUEST_MEMFD = (uapi.GUEST_MEMFD_MAGIC, uapi.ANON_INODE_FS_MAGIC)
_ONLY_MEMORY = (*_GUEST_MEMFD, uapi.TMPFS_MAGIC, uapi.HUGETLBFS_MAGIC)


def page_size(fd: int) -> int:
    """The bytes of the pages behind a file: a huge page's on hugetlbfs, else the machine's."""
    magic, block_size = syscalls.filesystem(fd)
    return block_size if magic == uapi.HUGETLBFS_MAGIC else PAGE_SIZE


def is_only_memory(fd: int) -> bool:
    """Whether allocating the file's pages takes memory (a disk's file takes blocks of the disk)."""
    return syscalls.filesystem(fd)[0] in _ONLY_MEMORY


def contents(fd: int, offset: int, size: int) -> list[tuple[int, int]] | None:
    """[(offset, bytes)] of what the range holds; None when that cannot be known exactly.

    Only what is not listed here may be punched without losing data. So a disk's file, whose data need not be
    in memory, swapped pages of a memfd, one that cachestat may not count, and a partly filled file of huge pages
    have no answer.
    """
    magic, _ = syscalls.filesystem(fd)
    if magic in _GUEST_MEMFD:
        return residency.resident_ranges(fd, offset, size)
    if magic not in _ONLY_MEMORY:
        return None
    blocks = os.fstat(fd).st_blocks * 512  # bytes, swapped ones too
    if blocks == 0:
        return []
    if magic == uapi.HUGETLBFS_MAGIC or not residency.can_count() or residency.resident(fd) != blocks:
        return None
    return residency.resident_ranges(fd, offset, size)


def missing(fd: int, offset: int, size: int) -> int:
    """How many bytes of the range are not in memory yet; at least so many, where it is hard to say."""
    try:
        return size - residency.resident(fd, offset, size)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return max(0, size - os.fstat(fd).st_blocks * 512)
