"""Memfds that come back from a kexec, and the simulated guest_memfd, which is one of them.

The stand-in is a memfd of sealed size and mode 0600, whose name contains its creation flags. The name makes it
self-describing: after a restart, or in another process, the fd alone shows what it stands for. It has the data
semantics of a guest_memfd; as a descriptor it is laxer (docs/kernel.md).

A live update (LUO) keeps size, bytes and seals, and loses name, mode and inode (seen with Linux 7.3). The new file has
mode 0777, and on an executable file F_SEAL_EXEC implies sealing against writing: a memfd with that seal comes back
read-only. Every memfd has it with MFD_NOEXEC_SEAL, or without any flag under vm.memfd_noexec >= 1.
"""

from __future__ import annotations

import errno
import fcntl
import os

from gmemd.kernel import uapi

MODE = 0o600  # as for a guest_memfd; keeps other users from reopening it through /proc/PID/fd/N
CARRIED = "/ (deleted)"  # the link of a memfd that a live update has brought back

_EXECUTABLE = uapi.MFD_CLOEXEC | uapi.MFD_EXEC
_SEALS = uapi.F_SEAL_SEAL | uapi.SEALS_OF_SIZE  # a guest_memfd takes no others
_NAME = "gmemd-guest-memfd:"
_LINK = f"/memfd:{_NAME}"
_DELETED = " (deleted)"

_carried: dict[tuple[int, int], int] = {}  # the creation flags of stand-ins that have lost their names, by file


def memfd_create(name: str, flags: int) -> int:
    """memfd_create(2), close-on-exec, without F_SEAL_EXEC wherever the kernel permits that; the caller owns the fd.

    EINVAL: unknown flags. ENODEV: no such huge page size.
    """
    try:
        return os.memfd_create(name, flags | _EXECUTABLE)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EACCES):  # before Linux 6.3; vm.memfd_noexec=2
            raise
    return os.memfd_create(name, flags | uapi.MFD_CLOEXEC)


def create(size: int, flags: int) -> int:
    """The fd of a new stand-in, which the caller owns."""
    fd = memfd_create(f"{_NAME}{flags}", uapi.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, MODE)
        fcntl.fcntl(fd, uapi.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def recall(fd: int, flags: int) -> None:
    """Say that a memfd is a stand-in with these creation flags, if it has lost its name and mode in a live update."""
    status = os.fstat(fd)
    if status.st_mode & 0o777 != MODE:
        _carried[status.st_dev, status.st_ino] = flags


def flags_of(fd: int) -> int | None:
    """The creation flags of a stand-in; None for any other file."""
    status = os.fstat(fd)
    if status.st_mode & 0o777 != MODE:
        return _carried.get((status.st_dev, status.st_ino))
    link = os.readlink(f"/proc/self/fd/{fd}")
    flags = link.removeprefix(_LINK).removesuffix(_DELETED)
    if not link.startswith(_LINK) or not flags.isdecimal():
        return None
    return int(flags) if fcntl.fcntl(fd, uapi.F_GET_SEALS) & _SEALS == _SEALS else None
