"""Another process's userfaultfd: its features, and registering that process's memory with it.

The ioctls work on the address space of the process that created the descriptor, whoever calls them. With
UFFD_FEATURE_SIGBUS nobody has to handle faults: an access to a missing page is SIGBUS, in a system call EFAULT; with
UFFD_FEATURE_WP_ASYNC a write to a protected page just ends its protection (userfaultfd(2); linux/userfaultfd.h).

Registering for other modes drops those in force (Linux 6.18, without a word) or is EBUSY where WP or RWP would be
dropped (7.3), so modes are added to them; registering for some of them changes nothing. WP and RWP exclude each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from struct import Struct
from typing import Final

from gmemd.kernel import syscalls, uapi
from gmemd.processes.identity import PROC, read

UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15

_LINK: Final = "anon_inode:[userfaultfd]"
MISSING, WP, MINOR, RWP = 1, 2, 4, 8  # UFFDIO_REGISTER_MODE_...; RWP: reads and writes fault (Linux 7.3)
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_UNREGISTER: Final = 0x8010AA01
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_LETTERS: Final = {"um": MISSING, "uw": WP, "ui": MINOR, "ur": RWP}  # of the modes in VmFlags of smaps

_pack_register = Struct("<QQQQ").pack  # start, bytes, mode, ioctls (out)
_pack_range = Struct("<QQ").pack
_pack_protect = Struct("<QQQ").pack  # start, bytes, mode


def features(fd: int) -> int | None:
    """The features that a userfaultfd was opened with; None for any other descriptor."""
    if os.readlink(f"/proc/self/fd/{fd}") != _LINK:
        return None
    with open(f"/proc/self/fdinfo/{fd}") as info:
        for line in info:
            if line.startswith("API:"):
                return int(line.split(":")[2], 16)
    return None


def is_kept(pid: int, fd: int) -> bool:
    """Whether a process has a copy of our userfaultfd; OSError: that is not visible from here."""
    folder = f"{PROC}/{pid}/fd"
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{folder}/{number}") == _LINK and syscalls.is_same_file(pid, int(number), fd):
                return True
    return False


def can_miss(fd: int) -> bool:
    """Whether missing pages of a file can be made to fault: those of a memfd, not of a guest_memfd (7.3)."""
    return syscalls.filesystem(fd)[0] in (uapi.TMPFS_MAGIC, uapi.HUGETLBFS_MAGIC)


def modes(pid: int, address: int, size: int) -> list[tuple[int, int, int]]:
    """[(address, bytes, modes)] of what a process has mapped in a range, and the modes it is registered with."""
    found: list[tuple[int, int, int]] = []
    begin, end = 0, 0
    for line in read(f"{PROC}/{pid}/smaps").splitlines():
        first, _, rest = line.partition(" ")
        if first == "VmFlags:":
            start, stop = max(begin, address), min(end, address + size)
            if start < stop:
                found.append((start, stop - start, sum(_LETTERS.get(word, 0) for word in rest.split())))
        elif not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
    return found


def register(fd: int, pid: int, address: int, size: int, mode: int) -> None:
    """Register a mapping of a process with its userfaultfd, besides what it is registered for already.

    EINVAL: nothing suitable is mapped there. EBUSY: it is registered with another userfaultfd. ESRCH: the process is
    gone.
    """
    for start, length, before in modes(pid, address, size) or [(address, size, 0)]:
        register_only(fd, start, length, before | mode)


def register_only(fd: int, address: int, size: int, mode: int) -> None:
    """The same, without what it is registered for already."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(_pack_register(address, size, mode, 0)), True)


def unregister(fd: int, pid: int, address: int, size: int, mode: int) -> None:
    """Take a mode back where it is the only one. Elsewhere it stays: there is no way that leaves the others in force
    all the time."""
    for start, length, before in modes(pid, address, size):
        if before == mode:
            unregister_only(fd, start, length)


def unregister_only(fd: int, address: int, size: int) -> None:
    """Take all modes back."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, _pack_range(address, size))


def write_protect(fd: int, address: int, size: int, *, on: bool) -> None:
    """Make the next write to each page of a registered range fault, absent ones included, or no longer."""
    fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, bytearray(_pack_protect(address, size, int(on))), True)


def written(pagemap: int, address: int, size: int, *, again: bool = True) -> list[tuple[int, int]]:
    """[(offset, bytes)] of what was written to a range since it was protected.

    pagemap: the file of that name of the process, whose mapping is registered with UFFD_FEATURE_WP_ASYNC; EPERM if it
    is not. If the process has ended, nothing is found. again: what was written is protected again, in one step.
    """
    flags = uapi.PM_SCAN_CHECK_WPASYNC | (uapi.PM_SCAN_WP_MATCHING if again else 0)
    found: list[tuple[int, int]] = []
    at, end = address, address + size
    while at < end:
        runs, at = syscalls.pagemap_scan(pagemap, at, end, flags, uapi.PAGE_IS_WRITTEN)
        found += [(start - address, stop - start) for start, stop in runs]
    return found
