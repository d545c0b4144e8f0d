"""A gmemd with HTTP on, as the tests of the web use it, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import re
import socket
from dataclasses import dataclass
from typing import Any

from tests.daemon import Daemon
from tests.patience import PATIENCE


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


class Site(Daemon):
    """A daemon that serves HTTP: on a unix socket, or by TCP on a port of the loopback interface."""

    def __init__(self, *arguments: str, tcp: bool = False, kernel: str = "simulated", **how: Any) -> None:
        address = "tcp:127.0.0.1:0" if tcp else "unix:{directory}/http.sock"
        super().__init__(*arguments, "--http", address, kernel=kernel, **how)
        self.tcp = tcp

    @property
    def url(self) -> str:
        """The address of the status page."""
        while not (found := re.search(r'"url": "([^"]+)"', self.log())):
            assert self.process.poll() is None
        return found[1]

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def connect_http(self) -> socket.socket:
        """A socket that is connected to HTTP."""
        if self.tcp:
            return socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(str(self.dir / "http.sock"))
        except OSError:
            sock.close()
            raise
        return sock

    def get(self, path: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Reply:
        """Ask for a path; `headers` replace the usual ones."""
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
        connection.sock = self.connect_http()
        try:
            connection.request(method, path, headers={"Host": "localhost", **(headers or {})})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()


def fill(site: Site, number: int) -> None:
    """Make objects o0, o1, ..., without waiting for each answer."""
    with site.connect() as sock, sock.makefile("rb") as answers:
        answers.readline()
        sock.sendall(b'{"execute":"qmp_capabilities"}\n')
        answers.readline()
        for start in range(0, number, 100):
            numbers = range(start, min(start + 100, number))
            sock.sendall(b"".join(b'{"execute":"object-add","arguments":{"qom-type":"memory-backend-memfd",'
                                  b'"id":"o%d","size":4096}}\n' % found for found in numbers))
            for _ in numbers:
                assert answers.readline() == b'{"return": {}}\r\n'
