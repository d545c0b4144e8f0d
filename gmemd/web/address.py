"""Where HTTP listens: a unix socket, or TCP of the loopback interface."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass

from gmemd.errors import QmpError
from gmemd.posix.sockets import bind_unix, split_unix
from gmemd.web.passed import Listening

_BACKLOG = 64


@dataclass(frozen=True)
class Address:
    """One --http option: a path, or else a loopback address and port (0: any free one)."""

    path: str = ""
    host: str = ""
    port: int = 0


def parse_http(text: str) -> Address:
    """unix:PATH, tcp:127.0.0.1:PORT or tcp:[::1]:PORT."""
    written = split_unix(text)
    if written is not None:
        path, options = written
        if options:
            raise QmpError(f"'{options[0]}' is not an option of --http (a comma in a path is doubled)")
        return Address(path=path)
    kind, _, rest = text.partition(":")
    if kind != "tcp":
        raise QmpError(f"--http takes off, unix:PATH or tcp:127.0.0.1:PORT, not '{text}'")
    host, _, port = rest.rpartition(":")
    host = {"localhost": "127.0.0.1"}.get(host, host.removeprefix("[").removesuffix("]"))
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise QmpError(f"'{port}' is not a TCP port")
    if not _is_loopback(host):
        raise QmpError(f"'{host}' is not the loopback interface: HTTP serves this host only")
    return Address(host=host, port=int(port))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(address: Address) -> socket.socket:
    """A listening socket at the address, which the caller owns. QmpError if that is not possible."""
    if address.path:
        return Listening(fileno=bind_unix(address.path).detach())
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise QmpError(f"cannot listen on {address.host}:{address.port}: {os.strerror(exc.errno or 0)}") from exc
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL to type."""
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}/"
