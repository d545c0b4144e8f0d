"""A listening unix socket: accepting its clients, and removing its file at the end."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Callable

from gmemd.posix.sockets import identity, remove_own

_ACCEPTS_A_TURN = 16
_RETRY_SECONDS = 0.1  # seconds after EMFILE or ENOMEM in accept


class Listener:
    """Accepts clients of one listening socket, which it owns."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, *,
                 accepted: Callable[[socket.socket], None], remove: bool, path: str = "") -> None:
        """`remove`: the file at the end; `path`: of that, if the socket was bound by another."""
        self._loop = loop
        self._sock = sock
        self._accepted = accepted
        self.path: str = path or sock.getsockname()
        self._file = os.path.abspath(self.path) if remove else ""  # the process may leave its directory
        self._own = identity(self._file)
        sock.setblocking(False)
        self._queue = select.poll()
        self._queue.register(sock.fileno(), select.POLLIN)
        loop.add_reader(sock.fileno(), self._acceptable)

    def _acceptable(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                # accept(2) without looking up the names of family and type, which would double the time
                fd, _ = self._sock._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no fds or memory left: the client waits in the backlog
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(_RETRY_SECONDS, self._resume)
                return
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            client.setblocking(False)
            self._accepted(client)
            if not self._queue.poll(0):  # a fifth of the cost of being refused
                return

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._acceptable)

    def close(self) -> None:
        """Stop listening; remove the socket file if it is still the one created here."""
        self._loop.remove_reader(self._sock.fileno())
        remove_own(self._file, self._own)
        self._sock.close()
