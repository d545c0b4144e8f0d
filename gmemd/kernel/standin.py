"""The simulated guest_memfd: a memfd of sealed size and mode 0600, whose name contains its creation flags.

The name makes it self-describing: after a restart, or in another process, the fd alone shows what it stands for. It has
the data semantics of a guest_memfd; as a descriptor it is laxer (docs/kernel.md).
"""

from __future__ import annotations

import fcntl
import os

from gmemd.kernel import uapi

MODE = 0o600  # as for a guest_memfd; keeps other users from reopening it through /proc/PID/fd/N

_SEALS = uapi.F_SEAL_SEAL | uapi.SEALS_OF_SIZE  # a guest_memfd takes no others
_NAME = "gmemd-guest-memfd:"
_LINK = f"/memfd:{_NAME}"
_DELETED = " (deleted)"


def create(size: int, flags: int, memfd_flags: int) -> int:
    """The fd of a new stand-in, which the caller owns."""
    fd = os.memfd_create(f"{_NAME}{flags}", memfd_flags)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, MODE)
        fcntl.fcntl(fd, uapi.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def flags_of(fd: int) -> int | None:
    """The creation flags of a stand-in; None for any other file."""
    if os.fstat(fd).st_mode & 0o777 != MODE:
        return None
    link = os.readlink(f"/proc/self/fd/{fd}")
    flags = link.removeprefix(_LINK).removesuffix(_DELETED)
    if not link.startswith(_LINK) or not flags.isdecimal():
        return None
    return int(flags) if fcntl.fcntl(fd, uapi.F_GET_SEALS) & _SEALS == _SEALS else None
