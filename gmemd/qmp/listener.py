"""A listening unix socket: made, found stale or live, accepted from, removed.

A socket file that nobody answers on is stale and replaced; one that is answered on is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable

from gmemd.errors import QmpError

BACKLOG = 512
_ACCEPTS_A_TURN = 16
_RETRY_SECONDS = 0.1  # after EMFILE or ENOMEM in accept


def bind_unix(path: str) -> socket.socket:
    """A listening socket at `path`, mode 0660; the caller owns it. QmpError if another process answers there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        umask = os.umask(0o117)
        try:
            listener.bind(path)
        finally:
            os.umask(umask)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        reason = str(exc) if exc.errno is None else os.strerror(exc.errno)
        raise QmpError(f"Failed to bind socket to {path}: {reason}") from exc
    return listener


def _remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "in use")


class Listener:
    """Accepts clients of one listening socket, which it owns."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, *, pretty: bool,
                 accepted: Callable[[socket.socket, bool], None], remove: bool) -> None:
        self._loop = loop
        self._sock = sock
        self._pretty = pretty
        self._accepted = accepted
        self.path: str = sock.getsockname()
        self._inode = _inode(self.path) if remove else None
        sock.setblocking(False)
        self._queue = select.poll()
        self._queue.register(sock.fileno(), select.POLLIN)
        loop.add_reader(sock.fileno(), self._acceptable)

    def _acceptable(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                # accept(2) without looking up the names of family and type, which takes as long again
                fd, _ = self._sock._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no fds or memory left: the client waits in the queue
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(_RETRY_SECONDS, self._resume)
                return
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            client.setblocking(False)
            self._accepted(client, self._pretty)
            if not self._queue.poll(0):  # a fifth of what it costs to be refused
                return

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._acceptable)

    def close(self) -> None:
        """Stop listening; remove the socket file if it is still the one that was made here."""
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self._inode is not None and _inode(self.path) == self._inode:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
