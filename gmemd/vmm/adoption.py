"""Adopting: the memory of a process that is already running becomes gmemd's, and outlives that process."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from typing import Final

from gmemd.client.client import Client
from gmemd.errors import QmpError
from gmemd.vmm.capture import seal
from gmemd.vmm.memfds import Memfd, describe, path

_SYS_PIDFD_GETFD: Final = 438  # on every machine
_CAP_SYS_PTRACE: Final = 19  # linux/capability.h
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def adopt(client: Client, name: str, fd: int, pid: int) -> bool:
    """Make an object of memory (fd, borrowed) on which a process runs a guest; whether its size is fixed: other memory
    can be truncated by whoever has it. QmpError, OSError; nothing is left in gmemd then.
    """
    seal(fd)
    fixed = _is_fixed(fd)
    client.execute("getfd", {"fdname": "adopt"}, fds=(fd,))
    try:
        client.execute("memdev-adopt", {"id": name, "fdname": "adopt", "require-seals": fixed})
    except QmpError:
        client.execute("closefd", {"fdname": "adopt"})
        raise
    with contextlib.suppress(QmpError):  # it has just ended, and its memory is saved
        client.execute("memdev-set-runner", {"id": name, "pid": pid})
    return fixed


def _is_fixed(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # not a memfd: the size of a guest_memfd never changes
        return True


def take(pid: int, found: Memfd) -> int:
    """A duplicate of a process's descriptor, which the caller owns; QmpError says which right is missing."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as exc:
        raise QmpError(refusal(pid, exc)) from exc
    try:
        fd = _getfd(pidfd, found)
    except PermissionError as exc:
        fd = _opened(pid, found, exc)
    except OSError as exc:
        raise QmpError(refusal(pid, exc)) from exc
    finally:
        os.close(pidfd)
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != found.file:
        os.close(fd)
        raise QmpError(f"descriptor {found.fd} of {describe(pid)} is another file meanwhile")
    return fd


def _getfd(pidfd: int, found: Memfd) -> int:
    fd = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, found.fd, 0))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _opened(pid: int, found: Memfd, refused: OSError) -> int:
    """A memfd opened again: Yama forbids pidfd_getfd to all but parents, but not that. A guest_memfd has no path."""
    try:
        if not found.name:
            raise refused
        return os.open(path(pid, found.fd), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise QmpError(refusal(pid, refused)) from refused


def refusal(pid: int, refused: OSError) -> str:
    """Why a process's descriptors cannot be had, and which right would be needed, as a sentence."""
    if isinstance(refused, (ProcessLookupError, FileNotFoundError)):
        return f"no process has the id {pid}"
    if refused.errno == errno.ENOSYS:
        return "taking a descriptor from a process needs pidfd_getfd(2), Linux 5.6"
    if not isinstance(refused, PermissionError):
        return f"the memory of {describe(pid)} cannot be taken: {refused.strerror}"
    return f"the memory of {describe(pid)} cannot be taken: {_missing_right(pid)}"


def _missing_right(pid: int) -> str:
    real, effective, capabilities = _identity("self")
    theirs, their_effective, _ = _identity(str(pid))
    if capabilities >> _CAP_SYS_PTRACE & 1:
        return "we have CAP_SYS_PTRACE, but a seccomp filter, a security module or a user namespace forbids it"
    if {real, effective} != {theirs, their_effective}:
        return f"it belongs to user {theirs} and we are user {effective}; that takes CAP_SYS_PTRACE (run it as root)"
    if os.stat(f"/proc/{pid}/stat").st_uid != theirs:
        return ("it is not dumpable, because it has changed its user or has set that itself; "
                "that takes CAP_SYS_PTRACE (run it as root)")
    scope = _yama()
    if scope > 0:
        return (f"Yama allows it only to its parents (kernel.yama.ptrace_scope is {scope}); "
                "that takes CAP_SYS_PTRACE (run it as root)")
    return "it has rights that we lack, or is in another user namespace; that takes CAP_SYS_PTRACE (run it as root)"


def _identity(process: str) -> tuple[int, int, int]:
    """The real and the effective user of a process, and its effective capabilities, a mask."""
    with open(f"/proc/{process}/status", errors="replace") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    real, effective, *_ = fields["Uid"].split()
    return int(real), int(effective), int(fields["CapEff"], 16)


def _yama() -> int:
    try:
        with open(_YAMA) as file:
            return int(file.read())
    except OSError:
        return 0
