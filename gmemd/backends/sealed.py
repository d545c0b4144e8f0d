"""Sealed memfds: what ordinary memory is made of."""

from __future__ import annotations

from gmemd.errors import close_fd
from gmemd.kernel.base import Kernel

# memfd_create(2) and fcntl(2), include/uapi/linux/{memfd,fcntl}.h
MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_HUGETLB = 0x4
MFD_HUGE_SHIFT = 26
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 0x1, 0x2, 0x4
SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


def new_memfd(kernel: Kernel, name: str, size: int) -> int:
    """A memfd of `size` bytes that nobody can resize any more; the caller owns it."""
    fd = kernel.memfd_create(name[:200], MFD_CLOEXEC | MFD_ALLOW_SEALING)
    try:
        kernel.truncate(fd, size)
        kernel.seal(fd, SEALS)
    except BaseException:
        close_fd(fd)
        raise
    return fd
