"""Sealed memfds, which back ordinary memory."""

from __future__ import annotations

from gmemd.errors import close_fd
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.uapi import MFD_ALLOW_SEALING, MFD_CLOEXEC, SEALS_OF_SIZE


def new_memfd(kernel: Kernel, name: str, size: int) -> int:
    """A memfd of `size` bytes that nobody can resize; the caller owns it."""
    fd = kernel.memfd_create(name[:200], MFD_CLOEXEC | MFD_ALLOW_SEALING)
    try:
        kernel.truncate(fd, size)
        kernel.seal(fd, SEALS_OF_SIZE)
    except BaseException:
        close_fd(fd)
        raise
    return fd
