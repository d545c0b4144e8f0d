"""Descriptors that a client passes to HTTP's unix socket, where they are unwanted.

Reading without asking for them, or closing a socket that has some, makes the kernel close them at once; and closing the
last descriptor of much memory, or of a lingering socket, can take long.
"""

from __future__ import annotations

import array
import socket
from typing import Any, Final

from gmemd.changes.threads import close_beside

_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(253 * 4)  # SCM_MAX_FD of the kernel


class Listening(socket.socket):
    """A listening unix socket, for an event loop."""

    def accept(self) -> tuple[socket.socket, Any]:
        fd, address = self._accept()  # type: ignore[attr-defined]
        return _Connection(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd), address


class _Connection(socket.socket):
    """A connection that closes descriptors off the event loop."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """The bytes received, without descriptors."""
        data, ancillary, _, _ = self.recvmsg(size, _ANCILLARY_SIZE, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                close_beside(array.array("i", payload[:len(payload) // 4 * 4]))
        return data

    def close(self) -> None:
        """Close it, off the event loop if there is anything in it."""
        if self._has_more():
            close_beside([self.detach()])
        else:
            super().close()

    def _has_more(self) -> bool:
        try:
            return bool(super().recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False
