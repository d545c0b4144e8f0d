"""The listening sockets that the keeper creates and passes to each daemon."""

from __future__ import annotations

import os
import socket

from gmemd.posix.private import exposed
from gmemd.posix.sockets import Identity, identity, listen_unix, remove_own

BACKLOG = 4096  # as systemd's default


class Listening:
    """All of them, by name."""

    def __init__(self, places: list[tuple[str, str]], mode: int, group: str) -> None:
        """Create one for each (name, path). OSError when that fails; nothing is left then."""
        self._made: list[tuple[str, socket.socket, str, Identity | None]] = []
        try:
            for name, path in places:
                _check_place(path)
                self._made.append((name, listen_on(path, mode, group), path, identity(path)))
        except BaseException:
            self.close()
            raise

    def fds(self) -> list[tuple[str, int]]:
        """(name, fd) as they are passed to a daemon."""
        return [(name, listener.fileno()) for name, listener, _, _ in self._made]

    def close(self) -> None:
        """Close them, and remove their files."""
        for _, listener, path, own in self._made:
            remove_own(path, own)
            listener.close()


def listen_on(path: str, mode: int, group: str) -> socket.socket:
    """A listening stream socket at `path`; a dead predecessor's socket is replaced. OSError."""
    try:
        return listen_unix(path, mode, BACKLOG, group)
    except OSError as exc:
        raise OSError(f"cannot listen on '{path}': {exc.strerror or exc}") from exc


def _check_place(path: str) -> None:
    """Raise OSError for a socket whose directory others can write: whoever replaced it would be sent the memory."""
    place = exposed(os.path.dirname(path))
    if place:
        raise OSError(
            f"'{place}' can be written by others, who could replace '{path}' by a socket of their own: "
            f"remove that permission (chmod go-w), or let it listen elsewhere"
        )
