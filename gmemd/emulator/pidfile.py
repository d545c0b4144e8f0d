"""The emulator's pid file: locked while the process runs, like QEMU's, and never another's."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from gmemd.errors import QmpError, os_errors


@contextlib.contextmanager
def pid_file(path: str) -> Iterator[None]:
    """Write the process id to a file that is removed at the end; nothing without `path`. QmpError if that fails.

    Enter it in the process that stays: a lock of fcntl(2) does not survive a fork, and ends when the process closes any
    descriptor of the file.
    """
    if not path:
        yield
        return
    fd = _locked(path)
    place = os.path.realpath(path)
    try:
        with os_errors("cannot create PID file: Failed to write pid file"):
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(place)):
                os.unlink(place)
        os.close(fd)


def _locked(path: str) -> int:
    """The file, created if needed, and locked: the one at the path, because its last owner may just have removed it."""
    while True:
        with os_errors(f"cannot create PID file: Could not create '{path}'"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with os_errors("cannot create PID file: Cannot lock pid file"):
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except QmpError:
            os.close(fd)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)
