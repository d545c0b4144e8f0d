"""Another process's userfaultfd: its features, and registering that process's memory with it.

The ioctls work on the address space of the process that created the descriptor, whoever calls them. With
UFFD_FEATURE_SIGBUS nobody has to handle faults: an access to a missing page is SIGBUS, in a system call EFAULT
(userfaultfd(2); linux/userfaultfd.h).
"""

from __future__ import annotations

import fcntl
import os
from struct import Struct

from gmemd.kernel import syscalls, uapi

UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFD_FEATURE_SIGBUS = 1 << 7

_pack_register = Struct("<QQQQ").pack  # start, bytes, mode, ioctls (out)


def features(fd: int) -> int | None:
    """The features that a userfaultfd was opened with; None for any other descriptor."""
    if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
        return None
    with open(f"/proc/self/fdinfo/{fd}") as info:
        for line in info:
            if line.startswith("API:"):
                return int(line.split(":")[2], 16)
    return None


def can_miss(fd: int) -> bool:
    """Whether missing pages of a file can be made to fault: those of a memfd, not of a guest_memfd (6.18)."""
    return syscalls.filesystem(fd)[0] in (uapi.TMPFS_MAGIC, uapi.HUGETLBFS_MAGIC)


def register(fd: int, address: int, size: int) -> None:
    """Make missing pages of a mapping fault. EINVAL: nothing suitable is mapped there. ESRCH: the process is gone."""
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(_pack_register(address, size, UFFDIO_REGISTER_MODE_MISSING, 0)), True)
