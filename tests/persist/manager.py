"""Service managers without threads: they work through their queues when the test says so.

The stand-in follows what systemd 252-262 was seen to do with FDSTORE, FDSTOREREMOVE, FDNAME and BARRIER: a full store
drops silently, newest first, one open file has one entry and keeps its first name, a removal takes all of a name.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
from array import array
from pathlib import Path

from gmemd.keeper.keeper import Keeper
from gmemd.keeper.kept import PROMISED
from gmemd.keeper.options import Options

_KCMP = {"x86_64": 312, "aarch64": 272}[platform.machine()]
_libc = ctypes.CDLL(None)


class StandIn:
    """The fd store of one unit."""

    several, sure = 1, 0

    def __init__(self, directory: Path, limit: int = 1024) -> None:
        self.limit = limit
        self.store: list[tuple[str, int]] = []  # newest first
        self.address = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self.address)

    def receive(self) -> None:
        """Work through all messages in the queue."""
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(253 * 4))
            except BlockingIOError:
                return
            fds = array("i")
            for _, _, value in ancillary:
                fds.frombytes(value)
            left = fds.tolist()
            if not flags & socket.MSG_TRUNC:
                left = self._message(data, left)
            for fd in left:
                os.close(fd)

    def names(self) -> list[str]:
        return [name for name, _ in self.store]

    def begin(self) -> None:
        """A new daemon is about to start."""

    def hand_down(self) -> list[tuple[str, int]]:
        """What a new daemon gets: (name, fd), the fds are its own."""
        return [(name, os.dup(fd)) for name, fd in self.store]

    def close(self) -> None:
        self._drop(self.names())
        self._socket.close()

    def _message(self, data: bytes, fds: list[int]) -> list[int]:
        """Act on a message; the fds that are not kept."""
        fields: dict[str, str] = {}
        for line in data.decode(errors="replace").split("\n"):
            key, _, value = line.partition("=")
            fields.setdefault(key, value)
        name = fields.get("FDNAME", "stored")
        if len(name) > 255 or not all(" " <= letter <= "~" and letter != ":" for letter in name):
            name = "stored"
        if fields.get("FDSTOREREMOVE") == "1":
            self._drop([name])
        elif fields.get("FDSTORE") == "1":
            return [fd for fd in fds if not self._keep(name, fd)]
        return fds

    def _keep(self, name: str, fd: int) -> bool:
        pid = os.getpid()
        if len(self.store) >= self.limit:
            return False
        if any(_libc.syscall(_KCMP, pid, pid, 0, fd, other) == 0 for _, other in self.store):
            return False
        self.store.insert(0, (name, fd))
        return True

    def _drop(self, names: list[str]) -> None:
        for name, fd in [entry for entry in self.store if entry[0] in names]:
            self.store.remove((name, fd))
            os.close(fd)


class KeeperAsManager(Keeper):
    """A keeper whose daemon is the test itself."""

    several = 64

    def __init__(self, limit: int = 1024, sure: int = PROMISED) -> None:
        super().__init__(Options(["none"], fdstore_max=limit))
        self.pid = os.getpid()
        self.limit = limit
        self.sure = self.kept.promised = sure

    @property
    def address(self) -> str:
        return self.mailbox.address

    def receive(self) -> bool:
        """Work through all messages in the queue."""
        while super().receive():
            pass
        return False

    def names(self) -> list[str]:
        return [name for name, _ in self.kept.newest_first()]

    def begin(self) -> None:
        self.kept.lost = False
        self.kept.forget_answers()

    def hand_down(self) -> list[tuple[str, int]]:
        return [(name, os.dup(fd)) for name, fd in self.kept.newest_first()]
