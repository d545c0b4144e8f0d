"""Where QMP monitors listen: -chardev, -mon and -qmp."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from dataclasses import dataclass

from gmemd.emulator.argv import Pairs
from gmemd.errors import QmpError, os_errors
from gmemd.posix.sockets import bind_unix

_is_fd = re.compile(r"[0-9]+").fullmatch


@dataclass(frozen=True)
class Chardev:
    """One -chardev; for a socket also where it listens: a path or an inherited descriptor."""

    label: str
    backend: str
    path: str = ""
    fd: int = -1

    @property
    def filename(self) -> str:
        """Its entry in query-chardev."""
        if self.backend == "socket":
            return f"unix:{self.path},server=on"
        return f"{self.backend}:{self.path}" if self.path else self.backend

    def listen(self) -> tuple[socket.socket, bool]:
        """The listening socket, and whether its file is to be removed at the end; QmpError if that is impossible."""
        if self.backend != "socket" or (self.fd < 0 and not self.path):
            raise QmpError(f"-chardev {self.backend},id={self.label}: a monitor needs a socket with fd= or path=")
        if self.fd < 0:
            return bind_unix(self.path), True
        with os_errors(f"-chardev socket,id={self.label},fd={self.fd}"):
            sock = socket.socket(fileno=self.fd)
        sock.set_inheritable(False)
        return sock, False


@dataclass(frozen=True)
class MonitorOption:
    """A QMP monitor: the chardev that it uses."""

    chardev: str
    pretty: bool = False


def chardev_of(pairs: Pairs, before: Collection[str]) -> Chardev:
    """Read -chardev; `before` are the labels of earlier ones."""
    label, fd = pairs.needed("id"), pairs.text("fd")
    if label in before:
        raise pairs.error(f"Duplicate ID '{label}' for chardev")
    if fd and not _is_fd(fd):
        raise pairs.error(f"Unable to parse FD number {fd}")
    return Chardev(label, pairs.needed("backend"), pairs.text("path"), int(fd) if fd else -1)


def qmp_of(option: str, value: str, label: str) -> Chardev:
    """Read -qmp: unix:PATH with server=on."""
    if value.startswith("unix:"):
        pairs = Pairs(option, "path=" + value.removeprefix("unix:"), "", ("path", "server", "wait"))
        if pairs.flag("server"):
            return Chardev(label, "socket", pairs.text("path"))
    raise QmpError(f"-{option} {value}: only unix:PATH,server=on can be served")
