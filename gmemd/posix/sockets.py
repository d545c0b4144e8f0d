"""Unix sockets by path: how a path is written in an option, and how a place to listen at is taken and given back.

A place is taken under a lock, for between bind(2) and listen(2) a socket refuses connections and so looks like one
that nobody serves. Only such a one is replaced, and nothing but a socket is ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator

from gmemd.errors import QmpError

BACKLOG = 512
MODE = 0o660
_LOCK_SUFFIX = ".gmemd-lock"

Identity = tuple[int, int]  # device and inode of a socket file


def split_unix(text: str) -> tuple[str, list[str]] | None:
    """The path and the options of unix:PATH[,OPTION]..., where a comma in PATH is doubled, as in QEMU; or None."""
    kind, colon, rest = text.partition(":")
    path, *options = (part.replace("\0", ",") for part in rest.replace(",,", "\0").split(","))
    return (path, options) if kind == "unix" and colon and path else None


def written(path: str) -> str:
    """A path as --qmp and --http take it."""
    return "unix:" + path.replace(",", ",,")


def path_of(text: str) -> str:
    """The socket that a client is told of: a path as it stands, or unix:PATH as it is written for --qmp."""
    found = split_unix(text)
    return text if found is None else found[0]


def bind_unix(path: str, *, mode: int = MODE, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket at `path`, which the caller owns; QmpError if something is in the way, or it is served."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with taking(path):
            bind(listener, path, mode)
            listener.listen(backlog)
    except (OSError, ValueError) as exc:
        listener.close()
        raise QmpError(f"Failed to bind socket to {path}: {getattr(exc, 'strerror', None) or exc}") from exc
    return listener


def bind(listener: socket.socket, path: str, mode: int) -> None:
    """Bind a socket to a path that is taken; at no moment may more than `mode` allows connect. OSError, ValueError."""
    umask = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
    finally:
        os.umask(umask)


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    """Be the only one to bind a socket to `path` and let it listen; OSError if something is there that must stay."""
    name = path + _LOCK_SUFFIX
    fd = _locked(name)
    try:
        _remove_stale(path)
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_size == 0:
                os.unlink(name)
        os.close(fd)


def identity(path: str) -> Identity | None:
    """Which socket file is there; None: none."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def remove_own(path: str, own: Identity | None) -> None:
    """Remove a socket file if it is still the one that `identity` told of.

    To be called before the socket is closed: until then nobody replaces the file, and its inode is no other file's.
    """
    if own is not None and identity(path) == own:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EEXIST, "there is a file already, and it is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except PermissionError:
            raise
        except OSError:  # its queue is full, or it is not a stream: somebody is there
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _locked(name: str) -> int:
    """The lock file, made if need be, and locked; OSError EADDRINUSE if somebody is just taking the place.

    A file of its own, which nobody else can open: who may read a directory could hold a lock on that.
    """
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.lstat(name)
            if os.path.samestat(os.fstat(fd), there):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        except FileNotFoundError:  # its holder has just removed it
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
