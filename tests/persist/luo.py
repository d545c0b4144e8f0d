"""What a live update makes of a memfd: a new file without name and holes, with mode 0777, the same bytes and seals.

As seen with Linux 7.3: F_SEAL_EXEC of an executable file implies that it is sealed against writing; huge pages,
guest_memfds and all other files are not carried. The link is "/memfd: (deleted)" here and "/ (deleted)" there, which no
system call gives a file.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from gmemd.kernel.uapi import F_SEAL_EXEC, F_SEAL_FUTURE_WRITE, MFD_EXEC

_SIZE_AND_WRITE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE


def carried(fd: int) -> int:
    """The fd as it is in the next boot; -1: it is refused. The caller owns both."""
    link = os.readlink(f"/proc/self/fd/{fd}")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return -1
    if not link.startswith(("/memfd:", "/ (deleted)")) or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        return -1
    new = os.memfd_create("", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_EXEC)
    size = os.fstat(fd).st_size
    os.posix_fallocate(new, 0, size)
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as before, mmap.mmap(new, size) as after:
        after[:] = before[:]
    fcntl.fcntl(new, fcntl.F_ADD_SEALS, seals | (_SIZE_AND_WRITE if seals & F_SEAL_EXEC else 0))
    return new

