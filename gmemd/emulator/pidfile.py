"""The emulator's pid file: locked while the process runs, like QEMU's, and never another's."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from gmemd.errors import QmpError


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
        _write(fd, place)
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(place)):
                os.unlink(place)
        os.close(fd)


def _locked(path: str) -> int:
    """The file, created if needed, and locked: the one at the path, because its last owner may just have removed it."""
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise _cannot(f"Could not create '{path}'", exc) from exc
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except OSError as exc:
            os.close(fd)
            raise _cannot("Cannot lock pid file", exc) from exc
        os.close(fd)


def _write(fd: int, path: str) -> None:
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise _cannot("Failed to write pid file", exc) from exc


def _cannot(what: str, exc: OSError) -> QmpError:
    return QmpError(f"cannot create PID file: {what}: {os.strerror(exc.errno or 0)}")
