"""Unix sockets by path: how a path is written in an option, and how a path to listen on is taken and released.

A path is taken under a lock, because between bind(2) and listen(2) a socket refuses connections and so looks like one
that nobody serves. Only such a socket is replaced, and nothing but a socket is ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import termios
from collections.abc import Iterator

from gmemd.errors import QmpError

BACKLOG = 512
MODE = 0o660
EVERYBODY = 0o666
_LOCK_SUFFIX = ".gmemd-lock"

Identity = tuple[int, int]  # device and inode of a socket file


def split_unix(text: str) -> tuple[str, list[str]] | None:
    """The path and the options of unix:PATH[,OPTION]..., where a comma in PATH is doubled, as in QEMU; or None."""
    kind, colon, rest = text.partition(":")
    path, *options = (part.replace("\0", ",") for part in rest.replace(",,", "\0").split(","))
    return (path, options) if kind == "unix" and colon and path else None


def written(path: str) -> str:
    """Write a path as --qmp and --http take it."""
    return "unix:" + path.replace(",", ",,")


def path_of(text: str) -> str:
    """The socket that a client is given: a plain path, or unix:PATH as written for --qmp."""
    found = split_unix(text)
    return text if found is None else found[0]


def bind_unix(path: str, mode: int = MODE, *, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket at `path`, which the caller owns; QmpError if something is in the way or serves it."""
    try:
        return listen_unix(path, mode, backlog, flags=socket.SOCK_NONBLOCK)
    except (OSError, ValueError) as exc:
        raise QmpError(f"Failed to bind socket to {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def listen_unix(path: str, mode: int, backlog: int, group: str = "", *, flags: int = 0) -> socket.socket:
    """The same, blocking unless `flags` say otherwise, with a mode, and for a group, by name or number.

    OSError, ValueError; LookupError: no such group. Nothing is left at the path then.
    """
    listener, own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | flags), None
    try:
        with taking(path):
            bind(listener, path, mode)
            own = identity(path)
            if group:
                import grp  # rarely needed

                os.chown(path, -1, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid)
            os.chmod(path, mode)
            listener.listen(backlog)
    except BaseException:
        remove_own(path, own)
        listener.close()
        raise
    return listener


def bind(listener: socket.socket, path: str, mode: int) -> None:
    """Bind a socket to a path; at no moment can anybody connect whom `mode` does not allow. OSError, ValueError."""
    if mode == EVERYBODY:  # the umask is the process's, and this may be one of its threads
        listener.bind(path)
        return
    umask = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
    finally:
        os.umask(umask)


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    """Be the only process to bind a socket to `path` and listen; OSError if what is there must stay."""
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


def unread(sock: socket.socket) -> int:
    """How much that was sent on a unix socket the peer has not received yet, with what the kernel adds; 0: nothing."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def identity(path: str) -> Identity | None:
    """Which socket file is at the path; None: none."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def remove_own(path: str, own: Identity | None) -> None:
    """Remove a socket file if it is still the one with this identity.

    Call it before the socket is closed: until then nobody replaces the file, and no other file has its inode.
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
        raise OSError(errno.EEXIST, "the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except PermissionError:
            raise
        except OSError:  # its backlog is full, or it is not a stream: it is served
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _locked(name: str) -> int:
    """The lock file, created if needed, and locked; OSError EADDRINUSE if another process is just taking the path.

    It is a separate file that nobody else can open: anybody who may read a directory could lock that.
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
