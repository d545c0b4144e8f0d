"""A socket that takes long to close."""

from __future__ import annotations

import contextlib
import os
import socket
import struct


class Lingering:
    """A socket whose last close waits until its peer has read everything, or is gone."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._sock = socket.create_connection(listener.getsockname())
            self._peer, _ = listener.accept()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._sock.send(bytes(1 << 16))

    def give(self) -> int:
        """Its descriptor, to be passed."""
        return self._sock.fileno()

    def given(self) -> None:
        """It was passed, and the caller's copy is closed."""
        os.close(self._sock.detach())

    def let_go(self) -> None:
        """Reset the connection, which ends all waiting."""
        if self._peer.fileno() < 0:
            return
        self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._peer.close()
